# Every target sets up .venv by itself. See README.md.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all overfit real bench check clean

demo: compiler $(READY)
	$(BIN)/xseg demo --out runs/demo

overfit: compiler $(READY)
	$(BIN)/xseg demo --recipe overfit --out runs/overfit

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest

bench: $(READY)
	$(BIN)/python bench/criterion.py
	$(BIN)/python bench/data_path.py
	$(BIN)/python bench/postprocess.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

# DeepSpeed compiles one small operator on its first CPU run; say so before any work is done.
compiler:
	@command -v $${CXX:-c++} >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || { \
	echo "xseg: DeepSpeed on CPU needs a C++ compiler, and none was found: install one (Debian: apt-get install g++), then run make again" >&2; exit 2; }
.PHONY: compiler

clean:
	rm -rf .venv runs dist build
