"""README.md and docs/: files, links, programs, flags, settings exist; the README is short and shows what is printed."""

import importlib
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from raw_sets import SMALL_SHARDS, command, make_small_set

REPOSITORY = next(parent for parent in Path(__file__).resolve().parents if (parent / "pyproject.toml").is_file())
README = REPOSITORY / "README.md"
TRAINING = REPOSITORY / "docs" / "training.md"
LOG = REPOSITORY / "docs" / "experiment_log.md"  # keeps the commands of its time
PAGES = [README, *sorted(path for path in (REPOSITORY / "docs").glob("*.md") if path != LOG)]
TEXTS = {path: path.read_text(encoding="utf-8") for path in [*PAGES, LOG]}

CHAPTERS = """\
# DCT Tokenizer Experiment
## Setup Instructions
### 1. Environment Setup
### 2. Model Preparation
### 3. Dataset Preparation
### 4. Launch Training
## Training Output
## Customization
### Modifying Training Parameters
## Troubleshooting
### Common Issues
## References""".splitlines()

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"(?:^|[\s`/])python (-m [\w.]+|\w+\.py)(?: (show|encode|decode)\b)?")
LAUNCHERS = {"qwen_launch.sh": "finetune_qwen2vl.py", "prepare_slurm.sh": "data_preparation.py"}
LAUNCHERS["train_slurm.sh"] = LAUNCHERS["qwen_launch.sh"]
FOREIGN = "-m benchmarks.quality.lmms_eval_model"  # starts lmms-eval, which is not installed here, with its flags


def blocks(text: str) -> list[str]:
    return [block for _, block in FENCE.findall(text)]


def prose(text: str) -> str:
    """A page without code and without the targets of links."""
    return re.sub(r"\]\([^)]*\)|`[^`]*`", "", FENCE.sub("", text))


def snippets(text: str) -> list[str]:
    """The lines of code blocks, continued ones joined, and the code spans between them."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def programs(snippet: str) -> list[tuple[str, ...]]:
    """What a command starts, as arguments of python: a script or -m with a module, then a subcommand."""
    started = [(*found[0].split(), *filter(None, found[1:])) for found in PYTHON.findall(snippet)]
    name = next((name for name in LAUNCHERS if re.search(rf"(bash|sbatch|/)\s?.*{name}", snippet)), None)
    return started + ([(LAUNCHERS[name],)] if name else [])


COMMANDS = [
    (path.name, snippet, program)
    for path in PAGES
    for snippet in snippets(TEXTS[path])
    for program in programs(snippet)
    if " ".join(program) != FOREIGN
]
PROGRAMS = sorted({program for _, _, program in COMMANDS})


def used_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)(?![\w-])", text))


def given_flags(snippet: str) -> set[str]:
    """The flags after the name of the program, without those of commands in $(...)."""
    return used_flags(re.split(r"\w+\.(?:py|sh)\b|-m ", re.sub(r"\$\([^)]*\)", "", snippet), maxsplit=1)[-1])


@cache
def flags_of(program: tuple[str, ...]) -> set[str]:
    """What --help names. The program runs in this process: starting another takes longer than all else."""
    name, *subcommand = program[1:] if program[0] == "-m" else (program[0].removesuffix(".py"), *program[1:])
    if (REPOSITORY / name.replace(".", "/")).is_dir():
        name += ".__main__"
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as end:
        importlib.import_module(name).main([*subcommand, "--help"])
    assert not end.value.code, f"python {' '.join(program)} --help: exit status {end.value.code}"
    return used_flags(said.getvalue())


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_flags_in_commands_exist(program):
    flags_in = {snippet: given_flags(snippet) for _, snippet, started in COMMANDS if started == program}
    known = flags_of(program) if any(flags_in.values()) else set()
    assert {snippet: flags - known for snippet, flags in flags_in.items() if flags - known} == {}


def test_every_stage_has_a_command():
    in_readme = {program[0] for name, _, program in COMMANDS if name == "README.md"}
    assert {"data_preparation.py", "convert_checkpoint.py", "evaluate_qwen2vl.py", "finetune_qwen2vl.py"} <= in_readme


def test_programs_exist_and_start_as_such():
    missing = []
    for program in PROGRAMS:
        name = program[1].replace(".", "/") if program[0] == "-m" else program[0].removesuffix(".py")
        files = [path for path in (REPOSITORY / f"{name}.py", REPOSITORY / name / "__main__.py") if path.is_file()]
        if not any('\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8") for path in files):
            missing.append(" ".join(program))
    assert missing == []


def test_flags_in_the_text_exist():
    known = set().union(*map(flags_of, PROGRAMS))
    named = {flag for path in PAGES for flag in re.findall(r"`(--[a-z][a-z-]+)(?=[` ])", FENCE.sub("", TEXTS[path]))}
    assert named
    assert named <= known


def test_tree_names_what_there_is():
    tree = next(block for block in blocks(TEXTS[README]) if "dct_qwen2vl/" in block)
    names = re.findall(r"^(?:  )?([\w.]+/?)", tree, re.MULTILINE)
    assert len(names) >= 15
    folders = (REPOSITORY, REPOSITORY / "dct_qwen2vl")
    assert [name for name in names if not any((folder / name).exists() for folder in folders)] == []
    rooms = {path.parent.name for path in (REPOSITORY / "dct_qwen2vl").glob("*/__init__.py")}
    scripts = {path.name for path in REPOSITORY.glob("*.py")}
    assert scripts | {f"{room}/" for room in rooms} <= set(names)


def test_paths_in_the_text_exist():
    inside = r"`((?:dct_qwen2vl|benchmarks|slurm|docs|tests)/[\w./-]*)`"
    named = {name for path in PAGES for name in re.findall(inside, FENCE.sub("", TEXTS[path]))}
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    wrong = []
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", TEXTS[path])):
        name, _, anchor = link.partition("#")
        if name.startswith("http"):
            continue
        target = (path.parent / name).resolve() if name else path
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    assert wrong == []


def test_every_page_and_figure_is_shown():
    linked = {
        (path.parent / link.partition("#")[0]).resolve()
        for path, text in TEXTS.items()
        for link in re.findall(r"\]\(([^)]+)\)", text)
    }
    there = {*(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "docs" / "figures").iterdir()}
    assert there - linked == set()


def test_figures_have_captions():
    for path in PAGES:
        for after in re.split(r"^!\[.*$", TEXTS[path], flags=re.MULTILINE)[1:]:
            assert re.match(r"\n\n\*[^*]", after), f"{path.name}: a figure without a caption, before {after[:60]!r}"


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    used = {name for path in PAGES for name in re.findall(r"(?:^|`)make (\w+)", TEXTS[path], re.MULTILINE)}
    assert {"demo", "test"} <= used <= targets


def test_chapters_stand_in_order():
    assert re.findall(r"^#+ .+$", FENCE.sub("", TEXTS[README]), re.MULTILINE) == CHAPTERS


def test_readme_is_short_and_starts_with_the_answer():
    assert len(TEXTS[README].encode()) < 12_000
    first_screen = TEXTS[README].split("## Setup Instructions")[0]
    assert "**Question.**" in first_screen and "\nmake demo " in first_screen and "\nmake test " in first_screen
    assert len(re.findall(r"^\| --- ", first_screen, re.MULTILINE)) == 1
    assert len(re.findall(r"^!\[", first_screen, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("path", "heading", "least"),
    [(README, "## Customization", 10), (TRAINING, "## Settings", 20)],
)
def test_names_of_the_settings_tables_are_settings(path, heading, least):
    script = (REPOSITORY / "qwen_launch.sh").read_text()
    chapter = TEXTS[path].split(f"{heading}\n")[1].split("\n## ")[0]
    names = set(re.findall(r"\b([A-Z][A-Z_]{1,})\b", " ".join(re.findall(r"^\| (`.*?`) \|", chapter, re.MULTILINE))))
    assert len(names) >= least
    assert [name for name in sorted(names) if f"{name}=${{{name}:-" not in script] == []


def test_readme_writes_where_the_launch_script_reads():
    script = (REPOSITORY / "qwen_launch.sh").read_text()
    defaults = dict(re.findall(r"^([A-Z_]+)=\$\{\1:-([^}]*)\}", script, re.MULTILINE))
    written = {
        program[0]: re.search(r"--output-dir (\S+)", snippet)[1]
        for name, snippet, program in COMMANDS
        if name == "README.md" and "--output-dir /" in snippet
    }
    assert written == {
        "convert_checkpoint.py": defaults["MODEL_DIR"],
        "data_preparation.py": defaults["DATASET_DIR"],
    }


# What the README shows of the programs' output.


@cache
def sources() -> str:
    """All Python of the repository, strings that go on in the next line joined."""
    files = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "dct_qwen2vl").rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))


def shown(first_words: str) -> list[str]:
    return next(block.splitlines() for block in blocks(TEXTS[README]) if block.startswith(first_words))


def test_preparation_prints_what_the_readme_shows(tmp_path):
    data = make_small_set(tmp_path / "data")
    arguments = command(data, tmp_path / "shards", *SMALL_SHARDS, report=True)
    run = subprocess.run(
        [sys.executable, "data_preparation.py", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    printed = iter(re.split(r"[\r\n]+", run.stdout))
    for line in shown("Found 5220 files"):
        beginning = re.split(r"\d|demo/", line)[0]
        assert any(other.startswith(beginning) for other in printed), f"not printed, or not in this place: {line}"
    reasons = re.findall(r"[a-z]+_[a-z]+(?= \d)", "\n".join(shown("Found 5220 files")))
    assert [reason for reason in reasons if f'"{reason}"' not in sources()] == []


def test_energon_dialogue_gives_the_documented_answers():
    answers = re.findall(r'(?:"8,1,1"|\[Y/n\]|class): (\S+)$', "\n".join(shown("Found 30 tar")), re.MULTILINE)
    assert answers == ["8,1,1", "y", "11"]
    assert any(line == "energon prepare /datasets/Cambrian737k-wds" for line in snippets(TEXTS[README]))


def test_training_prints_what_the_readme_shows():
    words = {
        word.strip(" |+%")
        for line in shown("step ")
        for word in re.split(r"[-\d.:/]*\d[-\d.:e]*%?|\|", line)
        if word.strip()
    }
    assert {"loss", "data wait", "validation loss", "text tokens/s"} <= words
    assert [word for word in sorted(words) if word and word not in sources()] == []


def is_printed(message: str) -> bool:
    """Three words that follow each other stand in the code, or all where there are fewer."""
    pieces = re.split(r"\.\.\.|\d\S*|[()/]|\.nv-meta\S*|--[a-z-]+ \w+", message)
    words = max(pieces, key=len).split()
    runs = [" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))]
    return any(run in sources() for run in runs)


@pytest.mark.parametrize("path", [README, TRAINING], ids=lambda path: path.name)
def test_messages_are_the_programs(path):
    chapter = re.split(r"^#+ (?:Common Issues|Messages)$", TEXTS[path], flags=re.MULTILINE)[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", chapter, re.MULTILINE)
    assert len(messages) >= 4
    assert [message for message in messages if not is_printed(message)] == []


def test_words():
    """The field's words: image, video, variant, from the start."""
    unwanted = re.compile(r"\b(pictures?|clips?|arms?|anew)\b", re.IGNORECASE)
    found = {path.name: unwanted.findall(prose(text)) for path, text in TEXTS.items()}
    assert {name: words for name, words in found.items() if words} == {}
