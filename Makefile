# Every target sets up .venv by itself. See README.md.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all overfit photos parts train-long bench clean

# The same weights to the last bit in less time, for memory (bench/results/allocator.json): on Linux a step of training on CPU
# else spends 5 to 10 % of its time on fresh memory, and some on preparing products for lengths that it has met before.
demo: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
demo: export ONEDNN_PRIMITIVE_CACHE_CAPACITY := 32768
demo: $(READY)
	$(BIN)/xseg demo --out runs/demo

overfit: $(READY)
	$(BIN)/xseg demo --recipe overfit --out runs/overfit

# Photographs by heart; DATA is the folder that examples/photos.py speaks of.
LAUNCH := $(BIN)/accelerate launch --config_file train_stages/accelerate/zero2.yaml -m xseg.train
PHOTOS := runs/real/data
photos: $(READY)
	$(BIN)/python examples/photos.py $(DATA) --out $(PHOTOS)
	$(LAUNCH) train_stages/real/s1_segmentor.yaml --set data_root=$(PHOTOS) --resume auto
	$(LAUNCH) train_stages/real/s3_mixed.yaml --set data_root=$(PHOTOS) --resume auto
	$(BIN)/xseg eval --model runs/real/s3/final --suite real --root $(PHOTOS) --out runs/real/s3/eval
	$(LAUNCH) train_stages/real/s3_tasks.yaml --set data_root=$(PHOTOS) --resume auto
	$(BIN)/xseg eval --model runs/real/s3_tasks/final --suite real_tasks --root $(PHOTOS) --out runs/real/s3_tasks/eval
	$(BIN)/xseg report runs/real

# The pretrained miniatures that train_stages/long starts from; every script resumes what was cut short.
# Two processes of one thread each: at these sizes a second thread gains little.
PAIR := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2
parts: $(READY)
	$(PAIR) examples/tiny_parts/phi.py --out examples/tiny_parts/phi
	$(PAIR) examples/tiny_parts/siglip.py --out examples/tiny_parts/siglip
	$(PAIR) examples/tiny_parts/sam.py --out examples/tiny_parts/sam

# The shipped model, from those parts: what `xseg chat` opens.
train-long: $(READY)
	$(BIN)/xseg demo --recipe long --out runs/long --images 30000
	$(BIN)/xseg export runs/long --out examples/tiny_model --limit-mb 12

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
	$(BIN)/python bench/metrics.py
	$(BIN)/python bench/postprocess.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv runs dist build
