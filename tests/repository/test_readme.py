"""The README's commands: the files exist, the scripts know the flags, the launch script knows the names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CODE = [block for _, block in re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)]
COMMANDS = [line for block in CODE for line in block.splitlines()]


def used_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<!\S)(--[a-z][a-z-]+)", text))


def flags_of(script: str) -> set[str]:
    text = subprocess.run(
        [sys.executable, script, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return used_flags(text.stdout.replace("[", " ").replace(",", " ").replace("]", " "))


@pytest.mark.parametrize(
    "script", ["data_preparation.py", "convert_checkpoint.py", "evaluate_qwen2vl.py", "finetune_qwen2vl.py"]
)
def test_flags_in_commands_exist(script):
    lines = [line for line in COMMANDS if line.startswith((f"python {script}",))]
    if script == "finetune_qwen2vl.py":
        lines = [line for line in COMMANDS if "qwen_launch.sh" in line]
    assert lines, f"the README shows no command of {script}"
    assert used_flags(" ".join(lines)) <= flags_of(script)


def test_flags_in_the_text_exist():
    known = set().union(*(flags_of(path.name) for path in REPOSITORY.glob("*.py") if "__main__" in path.read_text()))
    in_text = set(re.findall(r"`(--[a-z][a-z-]+)", README))
    assert in_text
    assert in_text <= known


def test_files_exist():
    tree = next(block for block in CODE if "sample_data.py " in block and "Dockerfile" in block)
    named = set(re.findall(r"\b[\w-]+\.(?:py|sh|txt|lock)\b", tree)) | {"Makefile", "Dockerfile", "tests"}
    assert len(named) >= 20
    folders = (REPOSITORY, REPOSITORY / "preparation")
    assert [name for name in sorted(named) if not any((folder / name).exists() for folder in folders)] == []
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert linked
    assert [link for link in linked if not (REPOSITORY / link).is_file()] == []


def test_every_script_is_in_the_tree():
    assert [path.name for path in REPOSITORY.glob("*.py") if f"{path.name}" not in README] == []


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= used <= targets


def test_names_of_the_launch_table_are_settings():
    script = (REPOSITORY / "qwen_launch.sh").read_text()
    chapter = README.split("## Launch")[1].split("## ")[0]
    names = set(re.findall(r"\b([A-Z][A-Z_]{2,})\b", " ".join(re.findall(r"^\| (`.*?`) \|", chapter, re.MULTILINE))))
    assert len(names) >= 20
    assert [name for name in sorted(names) if f"{name}=${{{name}:-" not in script] == []


def test_chapters_stand_in_order():
    chapters = re.findall(r"^## (.+)$", README, re.MULTILINE)
    wanted = ["Environment", "Model preparation", "Dataset preparation", "Launch", "Training output", "Customization"]
    assert [name for name in chapters if name in wanted] == wanted
    assert chapters[-2:] == ["Troubleshooting", "References"]


def test_expected_dialogue_answers_are_the_tools(tmp_path):
    assert "8,1,1" in README and "class: 11" in README
    assert "@@" not in README
