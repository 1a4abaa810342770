"""The rules of the house that matter, as tests: who imports whom, sizes, and names that must resolve."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from xseg import config, paths
from xseg.models.build import build_config
from xseg.tasks import SHARED, load_task
from xseg.train.stage import read_stage

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"errors"},
    {"types", "tokens", "paths"},
    {"config", "geometry"},
    {"metrics", "losses", "postprocess"},
    {"encode", "tasks", "models"},
    {"data"},
    {"infer"},
    {"train"},
    {"ui", "adapters"},
]
LEVEL = {room: n for n, rooms in enumerate(LEVELS) for room in rooms}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 8
PACKAGE = sorted((ROOT / "xseg").rglob("*.py"))
ALL_CODE = [*PACKAGE, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]
TASK_NAMES = sorted(p.stem for p in (ROOT / "xseg/tasks").glob("*.py") if p.stem not in {"__init__", *SHARED})
TASK_BLIND = [
    p for p in PACKAGE if {"models", "losses", "train"} & set(p.relative_to(ROOT).parts) or p.name == "collate.py"
]


def rel(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "xseg").with_suffix("").parts
    return parts[0]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{rel(path)}:{node.lineno}: relative import; write the full module name"
            names.add(node.module or "")
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "xseg" or len(parts) < 2 or parts[1] not in LEVEL or parts[1] == room:
            continue
        assert LEVEL[parts[1]] < LEVEL[room], f"{rel(path)} imports {name}: level {LEVEL[parts[1]]} is not lower"


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_outside_libraries_stay_in_their_room(path: Path) -> None:
    tops = {n.split(".")[0] for n in imported(path)}
    room = room_of(path)
    if room != "ui":
        assert not tops & {"typer", "rich", "gradio"}, f"{rel(path)}: only xseg/ui knows the terminal and the web"
    if room == "metrics":
        assert not tops & {"torch", "transformers", "PIL"}, f"{rel(path)}: metrics need numpy, scipy and hotcoco only"
    if room == "tasks":
        assert not tops & {"torch", "transformers"}, f"{rel(path)}: tasks never import torch"
    assert not tops & {"torchvision", "timm", "cv2"}, f"{rel(path)}: these break a CPU install"


@pytest.mark.parametrize("path", ALL_CODE, ids=rel)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    assert text.count("\n") <= MAX_FILE, f"{rel(path)}: over {MAX_FILE} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        size = (node.end_lineno or node.lineno) - node.lineno + 1
        names = [a.arg for a in [*node.args.args, *node.args.kwonlyargs]]
        count = len([n for n in names if n not in {"self", "cls"}])
        assert size <= MAX_FUNCTION, f"{rel(path)}:{node.lineno} {node.name}: {size} lines"
        # typer reads a command's options from its parameters
        if room_of_any(path) != "ui":
            assert count <= MAX_PARAMETERS, f"{rel(path)}:{node.lineno} {node.name}: {count} parameters"


def room_of_any(path: Path) -> str:
    return room_of(path) if (ROOT / "xseg") in path.parents else ""


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_no_error_is_swallowed_and_no_global_randomness(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in {"Exception", "BaseException"}
            assert not (broad and all(isinstance(b, ast.Pass) for b in node.body)), f"{rel(path)}:{node.lineno}"
    assert "random" not in set(imported(path)), f"{rel(path)}: pass a generator instead of `random`"


@pytest.mark.parametrize("path", TASK_BLIND, ids=rel)
def test_the_core_never_hears_a_task_name(path: Path) -> None:
    strings = [
        n.value
        for n in ast.walk(ast.parse(path.read_text(encoding="utf8")))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    for task in TASK_NAMES:
        assert task not in strings, f"{rel(path)} names the task {task}"
    assert not [n for n in imported(path) if n.startswith("xseg.tasks") and room_of(path) != "train"]


def recipes(kind: type[config.Recipe], exclude: tuple[str, ...] = ()) -> list[Path]:
    folder = ROOT / config.FOLDERS[kind]
    return [p for p in sorted(folder.rglob("*.yaml")) if not set(exclude) & set(p.relative_to(folder).parts)]


@pytest.mark.parametrize("path", recipes(config.DataRecipe, ("mixtures",)), ids=rel)
def test_data_recipes_resolve(path: Path) -> None:
    recipe = config.load_recipe(config.DataRecipe, str(path))
    source = importlib.import_module(f"xseg.data.sources.{recipe.source}").Source
    known = {n for n, p in inspect.signature(source).parameters.items() if p.kind == p.KEYWORD_ONLY}
    assert set(recipe.options) <= known, f"{rel(path)}: options {set(recipe.options) - known}"
    load_task(recipe.task)
    assert recipe.licence, f"{rel(path)}: name the licence"


@pytest.mark.parametrize("path", recipes(config.Mixture), ids=rel)
def test_mixtures_resolve(path: Path) -> None:
    check_entries(config.load_recipe(config.Mixture, str(path)).datasets)


@pytest.mark.parametrize("path", recipes(config.Suite), ids=rel)
def test_suites_resolve(path: Path) -> None:
    check_entries(config.load_recipe(config.Suite, str(path)).rows)


def check_entries(entries: list) -> None:
    assert entries
    for entry in entries:
        recipe = config.load_recipe(config.DataRecipe, entry.recipe)
        load_task(entry.task or recipe.task)


STAGES = recipes(config.StageRecipe, ("models", "accelerate"))


@pytest.mark.parametrize("path", [*STAGES, *sorted((ROOT / "bench/ablations").glob("s[0-9]*.yaml"))], ids=rel)
def test_stages_resolve(path: Path) -> None:
    stage = read_stage(str(path), ["init_from=[]"])  # the stages before have not run
    check_entries(stage.mixture.datasets)
    if "llm" in stage.recipe.parts:
        paths.find(stage.model.chat_template, "chat_templates", ".jinja")
    built = build_config(stage.model, stage.recipe.parts, stage.recipe.head)
    assert built.region_encoder == stage.model.region_encoder


@pytest.mark.parametrize("path", sorted((ROOT / "train_stages/accelerate").glob("*.yaml")), ids=rel)
def test_accelerate_configs_are_yaml(path: Path) -> None:
    assert "num_processes" in yaml.safe_load(path.read_text())


def test_help_starts_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['xseg', '--help']\n"
        "from xseg.ui.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "bad = {'torch', 'transformers', 'deepspeed', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.split() if (ROOT / line).is_file()]


def test_the_tree_speaks_of_itself_alone() -> None:
    import re

    bad = re.compile(r"/(?:wor" + r"k|roo" + r"t|hom" + r"e)/[a-z]")
    for path in tracked():
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".jinja", ".txt", ".json"}:
            found = bad.search(path.read_text(encoding="utf8"))
            assert not found, f"{rel(path)}: absolute path of a machine: {found and found.group()}"


def test_readme_tree_is_true() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    tree = readme.split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
    named = {line.split()[0] for line in tree.splitlines() if line and not line.startswith(("`", " "))}
    top = {p.relative_to(ROOT).parts[0] for p in tracked() if len(p.relative_to(ROOT).parts) > 1}
    assert {n.rstrip("/") for n in named if n.endswith("/")} == {t for t in top if not t.startswith(".")}
