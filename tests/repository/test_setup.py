"""The set-up: what setup_env.sh does, with a stand-in uv that installs nothing, the pins, the lock and the Makefile."""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM_FILES = [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "slurm").glob("*.sh")]
BASE_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
# Records its arguments and settings; makes an environment without pip; "installs" unless told to fail.
UV = f"""#!/bin/bash
echo "uv $*" >> "$FOLDER/record"
env | grep -E '^(UV_|SSL_|ALL_)' >> "$FOLDER/record"
case $1 in
    venv) "{BASE_PYTHON}" -m venv --without-pip "$5" ;;
    pip) [[ ! -e $FOLDER/fail ]] || {{ echo "no such wheel"; exit 1; }} ;;
esac
"""
# A Python whose pip "installs" the stand-in uv.
PYTHON_THAT_FETCHES_UV = """#!/bin/bash
case "$1 $2 $3" in
    "-m venv --clear") mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    "-m pip install") echo "pip ${*:3}" >> "$FOLDER/record"; cp "$FOLDER/uv" "${0%/*}/uv" ;;
esac
"""
# As `pip config list` prints them.
PIP_SETTINGS = r""":env:.index-url='https://one/simple'
global.cert='/etc/ca.pem'
global.extra-index-url='\nhttps://two/simple\nhttps://three/simple'
global.find-links='/wheels /more'
global.index-url='https://passed/over'
global.proxy='http://proxy:3128'
"""


class Sandbox:
    """A copy of setup_env.sh beside a small lock; the stand-ins come first on PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repository = folder / "a repository"
        self.repository.mkdir()
        (folder / "bin").mkdir()
        shutil.copy(REPOSITORY / "setup_env.sh", self.repository)
        self.lock = self.repository / "requirements.lock"
        self.lock.write_text("alpha==1.0\nbeta==2.0\n")
        self.script("uv", UV)
        self.script("pip", "#!/bin/sh\n")
        self.environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "FOLDER": str(folder), "MIN_FREE_GB": "0"}

    @property
    def venv(self) -> Path:
        return self.repository / ".venv"

    def script(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.repository / "setup_env.sh"), *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def recorded(self, pattern: str) -> list[str]:
        """The recorded lines that begin with a regular expression."""
        record = self.folder / "record"
        return re.findall(f"^{pattern}.*", record.read_text(), re.MULTILINE) if record.exists() else []


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_first_run_installs_the_lock_and_the_second_does_nothing(sandbox):
    result = sandbox.run()
    assert result.returncode == 0
    assert sandbox.recorded("uv [vp]") == [
        f"uv venv --allow-existing --python cpython>=3.10,<3.13 {sandbox.venv}",
        f"uv pip sync --python {sandbox.venv}/bin/python requirements.lock",
    ]
    lines = result.stderr.splitlines()
    assert lines[0] == f"setup_env.sh: installing requirements.lock into {sandbox.venv}"
    assert re.fullmatch(f"setup_env.sh: {sandbox.venv} is ready after [0-9]+ s", lines[1])
    digest = hashlib.sha256(sandbox.lock.read_bytes()).hexdigest()
    version = ".".join(map(str, sys.version_info[:3]))
    assert (sandbox.venv / "setup.stamp").read_text() == f"{digest} python{version} {sandbox.venv}\n"
    second = sandbox.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(sandbox.recorded("uv venv")) == 1


def change_lock(sandbox):
    sandbox.lock.write_text("alpha==1.1\n")


def cut_off(sandbox):
    """As if killed: the stamp is empty, and the environment from before still waits."""
    (sandbox.venv / "setup.stamp").write_text("")
    sandbox.venv.with_name(".venv.old").mkdir()


def break_interpreter(sandbox):
    (sandbox.venv / "bin" / "python").unlink()


def move_repository(sandbox):
    sandbox.repository = sandbox.repository.rename(sandbox.repository.with_name("moved"))


def name_another_python(sandbox):
    sandbox.script("another", f'#!/bin/bash\necho "3.12.99 {BASE_PYTHON}"\n')
    sandbox.environment["PYTHON"] = "another"


@pytest.mark.parametrize("happening", [change_lock, cut_off, break_interpreter, move_repository, name_another_python])
def test_set_up_again_after(sandbox, happening):
    sandbox.run()
    (sandbox.venv / "left over").touch()
    happening(sandbox)
    assert sandbox.run().returncode == 0
    assert len(sandbox.recorded("uv venv")) == 2
    assert not (sandbox.venv / "left over").exists()
    assert [path.name for path in sandbox.repository.glob(".venv*")] == [".venv"]


def test_environment_is_back_if_the_next_cannot_be_installed(sandbox):
    sandbox.run()
    change_lock(sandbox)
    (sandbox.venv / "before").touch()
    (sandbox.folder / "fail").touch()
    result = sandbox.run(PYTHON=f"{sandbox.venv}/bin/python")
    assert sandbox.recorded("uv venv")[1].startswith(f"uv venv --allow-existing --python {BASE_PYTHON} ")
    assert result.returncode == 1
    assert "no such wheel" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("setup_env.sh: could not install requirements.lock")
    assert (sandbox.venv / "before").exists()
    assert [path.name for path in sandbox.repository.glob(".venv*")] == [".venv"]


def test_uv_is_fetched_once_where_there_is_none(sandbox):
    (sandbox.folder / "bin" / "uv").rename(sandbox.folder / "uv")
    sandbox.script("uv", "#!/bin/sh\nexit 127\n")  # a shim of a uv that is not installed
    sandbox.script("python3", PYTHON_THAT_FETCHES_UV)
    for _ in range(2):
        assert sandbox.run().returncode == 0
        change_lock(sandbox)
    assert sandbox.recorded("pip") == ["pip install --quiet --disable-pip-version-check uv>=0.8,<1"]
    assert len(sandbox.recorded("uv venv")) == 2


def test_uv_gets_the_settings_of_pip_and_keeps_its_own(sandbox):
    (sandbox.folder / "settings").write_text(PIP_SETTINGS)
    sandbox.script("pip", '#!/bin/sh\n[ "$*" = "config list" ] && cat "$FOLDER/settings"\n')
    assert sandbox.run(SSL_CERT_FILE="/own.pem").returncode == 0
    assert sorted(set(sandbox.recorded("[A-Z_]+="))) == [
        "ALL_PROXY=http://proxy:3128",
        "SSL_CERT_FILE=/own.pem",
        "UV_EXTRA_INDEX_URL=https://two/simple https://three/simple",
        "UV_FIND_LINKS=/wheels,/more",
        "UV_INDEX_STRATEGY=unsafe-best-match",
        "UV_INDEX_URL=https://one/simple",
    ]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--forse"], {}, "unknown argument '--forse'"),
        ([], {"PYTHON": "/not/there"}, "PYTHON=/not/there does not run; name a Python 3.10, 3.11 or 3.12"),
        ([], {"PYTHON": "old"}, "PYTHON=old is Python 3.9.18; name a Python 3.10, 3.11 or 3.12"),
        ([], {"PYTHON": "new"}, "PYTHON=new is Python 3.13.0; name a Python 3.10, 3.11 or 3.12"),
        ([], {"MIN_FREE_GB": "1000000000"}, "it needs 1000000000; to try with less: make setup MIN_FREE_GB="),
        ([], {"UNAME": "Darwin variant64"}, "requirements.lock is for Linux x86_64; this is Darwin variant64"),
        ([], {"VENV": "notes"}, "notes was not made by this script"),
        ([], {"NO_UV": "1"}, "pip could not fetch uv"),
    ],
)
def test_refusals(sandbox, arguments, environment, said):
    sandbox.script("old", "#!/bin/sh\necho 3.9.18 /usr/bin/python3.9\n")
    sandbox.script("new", "#!/bin/sh\necho 3.13.0 /usr/bin/python3.13\n")
    sandbox.script("uname", '#!/bin/sh\necho "${UNAME:-Linux x86_64}"\n')
    sandbox.script("uv", '#!/bin/sh\nexit "${NO_UV:-0}"\n')
    sandbox.script("python3", "#!/bin/sh\nexit 1\n")
    (sandbox.repository / "notes").mkdir()
    (sandbox.repository / "notes" / "thesis.tex").touch()
    result = sandbox.run(*arguments, **environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("setup_env.sh: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not sandbox.venv.exists()
    assert (sandbox.repository / "notes" / "thesis.tex").exists()


def test_two_at_once_install_once(sandbox):
    command = [str(sandbox.repository / "setup_env.sh")]
    both = [subprocess.Popen(command, env=sandbox.environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(sandbox.recorded("uv venv")) == 1


def test_help(sandbox):
    result = sandbox.run("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Makes .venv")
    assert "set -" not in result.stdout
    assert not sandbox.venv.exists()


# The pins and the lock.


def direct_requirements() -> list[Requirement]:
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    return [Requirement(line.partition(" #")[0]) for line in lines if line.strip() and not line.startswith("#")]


def locked_requirements() -> list[Requirement]:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    return [Requirement(line.partition(" #")[0]) for line in lines if not line.startswith("#")]


def pinned(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    assert not specifier.version.endswith(".*")
    return specifier.version


def test_direct_requirements_are_pinned_as_locked():
    locked = {canonicalize_name(requirement.name): pinned(requirement) for requirement in locked_requirements()}
    direct = {canonicalize_name(requirement.name): pinned(requirement) for requirement in direct_requirements()}
    assert direct == {name: locked[name] for name in direct}
    assert direct["transformers"] == "4.51.3"


def test_direct_requirements_say_why():
    """Each stands under a comment or has one of its own."""
    paragraphs = (REPOSITORY / "requirements.txt").read_text().split("\n\n")
    for paragraph in paragraphs:
        lines = paragraph.strip().splitlines()
        assert lines[0].startswith("#") or all(" # " in line for line in lines), paragraph


def test_lock_holds_each_package_once_for_all_three_pythons():
    locked = locked_requirements()
    names = [canonicalize_name(requirement.name) for requirement in locked]
    assert names == sorted(set(names))
    assert {str(requirement.marker) for requirement in locked} <= {"None", 'python_full_version < "3.11"'}


def test_lock_names_no_place():
    for name in ("requirements.txt", "requirements.lock"):
        text = (REPOSITORY / name).read_text()
        assert not re.search(r"://|--(index|extra-index|find-links|trusted)|\.(org|com|net|io)\b", text), name


def test_lock_is_what_is_installed():
    if Path(sys.prefix) != REPOSITORY / ".venv":
        pytest.skip("not run in .venv")
    expected = {
        canonicalize_name(requirement.name): pinned(requirement)
        for requirement in locked_requirements()
        if requirement.marker is None or Marker(str(requirement.marker)).evaluate()
    }
    site_packages = [sysconfig.get_path("purelib")]  # not what setuptools puts on sys.path of its own
    distributions = importlib.metadata.distributions(path=site_packages)
    found = {canonicalize_name(each.metadata["Name"]): each.version for each in distributions}
    assert {name: found.get(name) for name in expected} == expected


# The Makefile and what starts it.


def make(*arguments: str) -> str:
    """What make prints, without what the make that runs these tests was given."""
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_make_help_lists_every_target():
    listed = re.findall(r"^make (\S+)", make("help"), re.MULTILINE)
    assert listed == ["help", "setup", "demo", "test", "compat", "lint", "format", "lock", "clean", "distclean"]
    assert make() == make("help")


def test_make_demo_command():
    commands = make("--dry-run", "demo").splitlines()
    assert commands[0].endswith("./setup_env.sh")
    assert commands[-1].rstrip().endswith(' python -m dct_qwen2vl.toy.demo --output-dir "demo"')
    assert f'PATH="{REPOSITORY}/.venv/bin:$PATH"' in commands[-1]
    assert "HF_HUB_OFFLINE=1" in commands[-1]
    command = make("--dry-run", "demo", "DEMO_DIR=/data/a b", "SEED=7", "DEMO_ARGS=--debug").splitlines()[-1]
    assert command.endswith(' python -m dct_qwen2vl.toy.demo --output-dir "/data/a b" --seed 7 --debug')


def test_make_test_lints_first():
    commands = make("--dry-run", "test", "TEST_ARGS=-k lock").splitlines()
    tools = [re.search(r"/bin:\$PATH\" (?:[A-Z_]+=\S+ )*(.+)", command) for command in commands]
    of_studies = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("benchmarks/**/*.sh")]
    shell_files = [*sorted(path.name for path in REPOSITORY.glob("*.sh")), *sorted(SLURM_FILES), *of_studies]
    assert [tool.group(1) for tool in tools if tool] == [
        "ruff check .",
        "ruff format --check .",
        " ".join(["shellcheck", *shell_files, ".ci/run"]),
        "hadolint Dockerfile",
        "python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -k lock",
    ]


def test_pre_commit_runs_what_lint_runs():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    entries = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in hooks]
    commands = re.findall(r":\$PATH\" (.+)", make("--dry-run", "lint"))
    assert [command.startswith(entry) for command, entry in zip(commands, entries, strict=True)] == [True] * 4


def test_continuous_integration_passes_on_arguments_and_status(tmp_path):
    (tmp_path / "make").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n[ "$1" = compat ] || exit 3\n')
    (tmp_path / "make").chmod(0o755)
    result = subprocess.run(
        [str(REPOSITORY / ".ci" / "run"), "TEST_ARGS=-k lock"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 3
    assert result.stdout.splitlines() == [str(REPOSITORY), "compat", str(REPOSITORY), "test", "TEST_ARGS=-k lock"]


# Every script answers --help at once.


HEAVY = {"torch", "transformers", "nemo", "megatron", "lightning", "datasets", "av", "scipy"}
LIST_HEAVY_MODULES = """
import json, runpy, sys
heavy, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]
try:
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(sorted(set(heavy) & set(sys.modules))), file=sys.stderr)
"""


def scripts() -> list[str]:
    """Scripts at the top by file, those of the package by module."""
    found = []
    for path in [*REPOSITORY.glob("*.py"), *(REPOSITORY / "dct_qwen2vl").rglob("*.py")]:
        if 'if __name__ == "__main__"' in path.read_text():
            name = path.relative_to(REPOSITORY)
            module = ".".join(name.with_suffix("").parts).removesuffix(".__main__")
            found.append(name.name if name.parent == Path(".") else module)
    return sorted(found)


def test_scripts_are_there():
    package = {f"dct_qwen2vl.{name}" for name in ("toy.demo", "toy.sample_data", "preparation.report")}
    assert package | {"data_preparation.py", "convert_checkpoint.py", "finetune_qwen2vl.py"} <= set(scripts())


# launch.py is torchrun, whose help is torch's own.
@pytest.mark.parametrize("script", [script for script in scripts() if script != "dct_qwen2vl.training.launch"])
def test_help_of_scripts_imports_nothing_heavy(script):
    """Thus it takes no two seconds: a module of HEAVY alone would."""
    result = subprocess.run(
        [sys.executable, "-c", LIST_HEAVY_MODULES, json.dumps(sorted(HEAVY)), script, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert result.stderr == "[]\n"
