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
import time
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
BASE_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
TOOLS = "awk bash cat cut df dirname env flock grep ls mkdir mktemp mv realpath rm sed sha256sum tail"
# Notes its arguments; makes an environment without pip; "installs" unless told to fail.
UV = f"""#!/bin/bash
echo "uv $*" >> "$RECORD"
case $1 in
    venv) "{BASE_PYTHON}" -m venv --without-pip "$4" ;;
    pip) [[ ! -e $FAIL ]] || {{ echo "no such wheel"; exit 1; }} ;;
esac
"""
# The Python of the tests, but it gives itself out for another version.
OTHER_PYTHON = f"""#!/bin/bash
{{ echo 'import sys; sys.version_info = VERSION'; cat; }} | exec "{BASE_PYTHON}" "$@"
"""
# The Python of the tests, but its environments hold a pip that only notes its arguments.
PYTHON_WITH_STAND_IN_PIP = f"""#!/bin/bash
case "$1 $2" in
    "-I -") {{ echo "import sys; sys.executable = '$0'"; cat; }} | exec "{BASE_PYTHON}" "$@" ;;
    "-m venv")
        "{BASE_PYTHON}" -m venv --without-pip "$3"
        cat > "$3/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/pip.py" <<'PIP'
import os, sys
with open(os.environ["RECORD"], "a") as record:
    print("pip", *sys.argv[1:], file=record)
PIP
        ;;
    *) exec "{BASE_PYTHON}" "$@" ;;
esac
"""


class Sandbox:
    """A copy of setup_env.sh beside a small lock, and a PATH with nothing on it but tools and stand-ins."""

    def __init__(self, folder: Path):
        self.repository = folder / "a repository"
        self.bin = folder / "bin"
        self.record = folder / "record"
        self.fail = folder / "fail"
        self.repository.mkdir()
        self.bin.mkdir()
        shutil.copy(REPOSITORY / "setup_env.sh", self.repository)
        self.lock = self.repository / "requirements.lock"
        self.lock.write_text("alpha==1.0\nbeta==2.0\n")
        for name in TOOLS.split():
            (self.bin / name).symlink_to(shutil.which(name))
        self.script("uv", UV)
        (self.bin / "python3").symlink_to(BASE_PYTHON)
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "RECORD": str(self.record),
            "FAIL": str(self.fail),
            "MIN_FREE_GB": "0",
        }

    @property
    def venv(self) -> Path:
        return self.repository / ".venv"

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.repository / "setup_env.sh"), *arguments],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installed(self) -> int:
        """How often an installation was started."""
        return self.record.read_text().count("uv venv") if self.record.exists() else 0


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def assert_one_error(result: subprocess.CompletedProcess, said: str) -> None:
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("setup_env.sh: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_first_run_installs_the_lock(sandbox):
    result = sandbox.run()
    assert result.returncode == 0
    assert sandbox.record.read_text().splitlines() == [
        "uv --version",
        f"uv venv --python {sandbox.bin}/python3 {sandbox.venv}",
        f"uv pip sync --python {sandbox.venv}/bin/python requirements.lock",
    ]
    version = ".".join(map(str, sys.version_info[:3]))
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"setup_env.sh: 2 packages for Python {version} into {sandbox.venv} with uv")
    assert re.fullmatch(f"setup_env.sh: {sandbox.venv} is ready after [0-9]+ s", lines[1])
    digest = hashlib.sha256(sandbox.lock.read_bytes()).hexdigest()
    assert (sandbox.venv / "setup.stamp").read_text() == f"{digest} python{version} {sandbox.venv}\n"


def test_second_run_is_silent_and_quick(sandbox):
    sandbox.run()
    started = time.monotonic()
    result = sandbox.run()
    assert time.monotonic() - started < 1
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert sandbox.installed() == 1


def change_lock(sandbox):
    sandbox.lock.write_text("alpha==1.1\n")


def remove_stamp(sandbox):
    (sandbox.venv / "setup.stamp").unlink()


def break_interpreter(sandbox):
    (sandbox.venv / "bin" / "python").unlink()


def move_repository(sandbox):
    sandbox.repository = sandbox.repository.rename(sandbox.repository.with_name("moved"))


@pytest.mark.parametrize("happening", [change_lock, remove_stamp, break_interpreter, move_repository])
def test_set_up_again_after(sandbox, happening):
    sandbox.run()
    (sandbox.venv / "left over").touch()
    happening(sandbox)
    assert sandbox.run().returncode == 0
    assert sandbox.installed() == 2
    assert not (sandbox.venv / "left over").exists()
    assert sandbox.run().stderr == ""


def test_failed_installation_is_done_again(sandbox):
    sandbox.fail.touch()
    result = sandbox.run(INSTALLER="uv")
    assert result.returncode == 1
    assert "no such wheel" in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "setup_env.sh: could not install requirements.lock with uv; see above, then run the same command again"
    )
    sandbox.fail.unlink()
    assert sandbox.run(INSTALLER="uv").returncode == 0
    assert sandbox.installed() == 2


@pytest.mark.parametrize("uv", ["#!/bin/sh\nexit 127\n", UV])
def test_pip_takes_over(sandbox, uv):
    """Where uv is a shim that does not run, and where it cannot install, as when only pip knows the package index."""
    sandbox.script("uv", uv)
    sandbox.script("python3", PYTHON_WITH_STAND_IN_PIP)
    sandbox.fail.touch()
    result = sandbox.run()
    assert result.returncode == 0
    assert f"into {sandbox.venv} with pip;" in result.stderr
    assert sandbox.record.read_text().splitlines()[-1] == (
        "pip install --disable-pip-version-check --no-compile --no-deps --use-pep517 --requirement requirements.lock"
    )
    assert sandbox.run().stderr == ""


def test_broken_shim_is_passed_over(sandbox):
    sandbox.script("python3", "#!/bin/sh\necho 'pyenv: python3: command not found' >&2\nexit 127\n")
    (sandbox.bin / "python3.12").symlink_to(BASE_PYTHON)
    assert sandbox.run().returncode == 0
    assert f"uv venv --python {sandbox.bin}/python3.12 " in sandbox.record.read_text()


def test_python_that_pyenv_holds_but_does_not_show(sandbox, tmp_path):
    (sandbox.bin / "python3").unlink()
    folder = tmp_path / ".pyenv" / "versions" / "3.11.9" / "bin"
    folder.mkdir(parents=True)
    (folder / "python3").symlink_to(BASE_PYTHON)
    assert sandbox.run().returncode == 0


def test_python_of_an_active_environment_stands_for_its_base(sandbox, tmp_path):
    """`make test` in an activated .venv must not build the new .venv from the one it is about to remove."""
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", str(tmp_path / "active")], check=True, timeout=60)
    (sandbox.bin / "python3").unlink()
    sandbox.environment["PATH"] = f"{tmp_path}/active/bin:{sandbox.bin}"
    assert sandbox.run().returncode == 0
    (line,) = [line for line in sandbox.record.read_text().splitlines() if line.startswith("uv venv")]
    assert os.path.realpath(line.split()[3]) == BASE_PYTHON
    assert str(tmp_path / "active") not in line


@pytest.mark.parametrize("version", ["(3, 9, 18)", "(3, 13, 0)"])
def test_unsuitable_python(sandbox, version):
    other = sandbox.script("python3", OTHER_PYTHON.replace("VERSION", version))
    shown = re.sub(r"[() ]", "", version).replace(",", ".")
    assert_one_error(sandbox.run(), f"no CPython 3.10, 3.11 or 3.12 for Linux x86_64; {other} is CPython {shown}.")
    assert sandbox.installed() == 0


def test_no_python(sandbox):
    (sandbox.bin / "python3").unlink()
    assert_one_error(sandbox.run(), "no python3 on PATH. Install one, or name it: make setup PYTHON=")


def test_named_python_is_the_only_one_tried(sandbox):
    assert_one_error(sandbox.run(PYTHON="/not/there"), "; /not/there does not run.")


def test_other_named_python_means_another_environment(sandbox):
    sandbox.run()
    named = sandbox.script("named", f'#!/bin/bash\n[[ $3 == *print* ]] && echo 3.12.99 || exec "{BASE_PYTHON}" "$@"\n')
    assert sandbox.run(PYTHON=str(named)).returncode == 0
    assert sandbox.installed() == 2


def test_too_little_disk(sandbox):
    result = sandbox.run(MIN_FREE_GB="1000000000")
    assert_one_error(result, f" GB are free in {sandbox.repository}, 1000000000 GB are needed;")
    assert not sandbox.venv.exists()


def test_folder_that_is_no_environment_is_kept(sandbox):
    sandbox.venv.mkdir()
    (sandbox.venv / "thesis.tex").touch()
    assert_one_error(sandbox.run(), f"{sandbox.venv} is in the way and is no virtual environment")
    assert (sandbox.venv / "thesis.tex").exists()


def test_environment_of_someone_else_is_kept(sandbox):
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", str(sandbox.venv)], check=True, timeout=60)
    (sandbox.venv / "theirs").touch()
    assert_one_error(sandbox.run(), f"{sandbox.venv} is a virtual environment that this script did not finish")
    assert (sandbox.venv / "theirs").exists()


def test_environment_is_back_if_the_next_cannot_be_installed(sandbox):
    sandbox.run()
    (sandbox.venv / "before").touch()
    change_lock(sandbox)
    sandbox.fail.touch()
    assert sandbox.run(INSTALLER="uv").returncode == 1
    assert (sandbox.venv / "before").exists()
    sandbox.fail.unlink()
    assert sandbox.run().returncode == 0
    assert not (sandbox.venv / "before").exists()
    assert [path.name for path in sandbox.repository.glob(".venv*")] == [".venv"]


@pytest.mark.parametrize("name", [".venv", ".venv.old"])
def test_set_up_that_was_cut_off_is_done_again(sandbox, name):
    """Killed in its first run, or when it had put the old environment aside."""
    sandbox.run()
    (sandbox.venv / "setup.stamp").unlink()
    (sandbox.venv / "setup.log").unlink()
    sandbox.venv.rename(sandbox.repository / name)
    (sandbox.repository / ".venv.begun").touch()
    assert sandbox.run().returncode == 0
    assert sandbox.run().stderr == ""
    assert [path.name for path in sandbox.repository.glob(".venv*")] == [".venv"]


def test_missing_lock(sandbox):
    sandbox.lock.unlink()
    assert_one_error(sandbox.run(), "requirements.lock is missing")


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--forse"], {}, "unknown argument '--forse'"),
        ([], {"INSTALLER": "conda"}, "INSTALLER is 'conda'; it must be uv or pip"),
    ],
)
def test_wrong_arguments(sandbox, arguments, environment, said):
    assert_one_error(sandbox.run(*arguments, **environment), said)


def test_two_at_once_install_once(sandbox):
    command = [str(sandbox.repository / "setup_env.sh")]
    both = [subprocess.Popen(command, env=sandbox.environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert sandbox.installed() == 1


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
    assert listed == ["help", "setup", "demo", "test", "lint", "format", "lock", "clean", "distclean"]
    assert make() == make("help")


def test_make_demo_command():
    commands = make("--dry-run", "demo").splitlines()
    assert commands[0].endswith("./setup_env.sh")
    assert commands[-1].rstrip().endswith(' python -m dct_qwen2vl.toy.demo --output-dir "demo"')
    assert f'PATH="{REPOSITORY}/.venv/bin:$PATH"' in commands[-1]
    assert "HF_HUB_OFFLINE=1" in commands[-1]
    command = make("--dry-run", "demo", "DEMO_DIR=/data/a b", "SEED=7", "DEMO_ARGS=--debug").splitlines()[-1]
    assert command.endswith(' python demo.py --output-dir "/data/a b" --seed 7 --debug')


def test_make_test_lints_first():
    commands = make("--dry-run", "test", "TEST_ARGS=-k lock").splitlines()
    tools = [re.search(r"/bin:\$PATH\" (?:[A-Z_]+=\S+ )*(.+)", command) for command in commands]
    shell_files = sorted(path.name for path in REPOSITORY.glob("*.sh"))
    assert [tool.group(1) for tool in tools if tool] == [
        "ruff check .",
        "ruff format --check .",
        " ".join(["shellcheck", *shell_files, ".ci/run"]),
        "hadolint Dockerfile",
        "python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -k lock",
    ]


def test_continuous_integration_passes_on_arguments_and_status(tmp_path):
    (tmp_path / "make").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\nexit 3\n')
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
    assert result.stdout.splitlines() == [str(REPOSITORY), "test", "TEST_ARGS=-k lock"]


# Every script answers --help at once.

HEAVY = {"torch", "transformers", "nemo", "megatron", "lightning", "datasets", "av", "scipy"}
LIST_HEAVY_MODULES = """
import json, runpy, sys
heavy, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(sorted(set(heavy) & set(sys.modules))), file=sys.stderr)
"""


def scripts() -> list[str]:
    return sorted(path.name for path in REPOSITORY.glob("*.py") if 'if __name__ == "__main__"' in path.read_text())


def test_scripts_are_there():
    assert {"data_preparation.py", "sample_data.py", "convert_checkpoint.py", "finetune_qwen2vl.py"} <= set(scripts())


@pytest.mark.parametrize("script", scripts())
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
