"""Which way imports run. Scripts and studies know the rooms, rooms know those below them, and there is no circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "dct_qwen2vl"
SCRIPTS = {path.stem for path in REPOSITORY.glob("*.py")}
BELOW = {
    "common": set(),
    "dct": {"common"},
    "data": {"common", "dct"},
    "checkpoints": {"common", "dct"},
    **{
        room: {"common", "dct", "data", "checkpoints"} for room in ("preparation", "training", "evaluation", "analysis")
    },
}
# Files of which `--help` and checks are made must start fast.
WITHOUT_TORCH = (
    *(
        "common",
        "checkpoints/inspection.py",
        "checkpoints/video_sampling.py",
        "dct/configuration_dct.py",
        "dct/image_colours_dct.py",
        "dct/image_sizes_dct.py",
    ),
    *(
        "data/conversations.py",
        "data/energon_files.py",
        "data/images.py",
        "data/media.py",
        "data/positions.py",
        "data/reading.py",
        "data/videos.py",
        "evaluation/served_media.py",
        "preparation",
        "training/config.py",
        "training/checks.py",
        "training/export.py",
    ),
)
HEAVY = {"torch", "transformers", "nemo", "lightning", "megatron"}


def modules() -> dict[str, Path]:
    """Name in Python -> file, of the scripts, the package and the benchmarks."""
    files = [
        *REPOSITORY.glob("*.py"),
        *(REPOSITORY / PACKAGE).rglob("*.py"),
        *(REPOSITORY / "benchmarks").rglob("*.py"),
    ]
    return {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in files if path.stat().st_size}


MODULES = modules()


def imports_of(name: str, top_level: bool = False) -> Iterator[str]:
    """Modules that a module imports, relative ones by their whole name. top_level: without those inside functions."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = f"{name.rsplit('.', node.level)[0]}." if node.level else ""
            module = f"{parent}{node.module or ''}".rstrip(".")
            inside = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from inside or {module}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(f"{PACKAGE}.")])
def test_rooms_know_only_rooms_below_them(name):
    room = name.split(".")[1]
    known = {imported.split(".")[1] for imported in imports_of(name) if imported.startswith(f"{PACKAGE}.")} - {room}
    if room != "toy":
        assert known <= BELOW[room]
        assert not {imported.split(".")[0] for imported in imports_of(name)} & (SCRIPTS | {"benchmarks", "tests"})
    assert "toy" not in known


def test_there_is_no_circle():
    left = {name: {other for other in imports_of(name) if other in MODULES} - {name} for name in MODULES}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_what_starts_fast_imports_nothing_slow():
    for name, path in MODULES.items():
        if any(path.is_relative_to(REPOSITORY / PACKAGE / part) for part in WITHOUT_TORCH):
            assert not {imported.split(".")[0] for imported in imports_of(name, top_level=True)} & HEAVY, name


@pytest.mark.parametrize("name", MODULES)
def test_no_path_is_edited_and_nothing_is_imported_under_main(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert "sys.path" not in text
    for node in ast.parse(text).body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            assert not [child for child in ast.walk(node) if isinstance(child, (ast.Import, ast.ImportFrom))]


def test_six_scripts_stand_at_the_top():
    before = {"data_preparation", "convert_checkpoint", "dct_tokenizer"}
    assert before | {"task_encoder", "finetune_qwen2vl", "evaluate_qwen2vl"} == SCRIPTS
