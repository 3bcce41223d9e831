"""The container: the very docker commands, with a stand-in docker that records them, and the versions it pins."""

import os
import pty
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "make-and-run-docker.sh"
# Writes its arguments, one command per record, arguments ended by NUL, and knows an image if a file says so.
DOCKER = """#!/bin/sh
printf '%s\\0' "$@" >> "$RECORD"; printf '\\n' >> "$RECORD"
case "$1" in
    image) [ -e "$IMAGE_EXISTS" ] ;;
    build) exit "${BUILD_STATUS:-0}" ;;
    run) exit "${RUN_STATUS:-0}" ;;
esac
"""


class Sandbox:
    """A copy of the script in a folder with a space in its name, with folders to mount and a docker on PATH."""

    def __init__(self, folder: Path):
        self.repository = folder / "my repository"
        self.models = folder / "the models"
        self.datasets = folder / "data sets"
        self.record = folder / "record"
        self.image = folder / "image exists"
        bin_folder = folder / "bin"
        for path in (self.repository, self.models, self.datasets, bin_folder):
            path.mkdir()
        for name in (SCRIPT, "Dockerfile", "qwen_launch.sh"):
            shutil.copy(REPOSITORY / name, self.repository / name)
        self.docker = bin_folder / "docker"
        self.docker.write_text(DOCKER)
        self.docker.chmod(0o755)
        self.environment = {
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "MODEL_DIR": str(self.models),
            "DATASET_DIR": str(self.datasets),
            "RECORD": str(self.record),
            "IMAGE_EXISTS": str(self.image),
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.repository / SCRIPT), *arguments],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def commands(self) -> list[list[str]]:
        records = self.record.read_text().split("\0\n") if self.record.exists() else []
        return [record.split("\0") for record in records if record]

    def run_command(self) -> list[str]:
        (command,) = [command for command in self.commands() if command[0] == "run"]
        return command


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_first_call_looks_builds_and_runs(sandbox):
    result = sandbox.run("torchrun", "--nproc-per-node", "2", "finetune_qwen2vl.py", "--run-name", "two words", "")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    look, build, run = sandbox.commands()
    tag = run[run.index("/workspace/repository") + 1]
    assert re.fullmatch(r"dct-qwen2vl:[0-9a-f]{16}", tag)
    assert look == ["image", "inspect", tag]
    user_name = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert build == [
        "build",
        *("--build-arg", f"UID={os.getuid()}"),
        *("--build-arg", f"GID={os.getgid()}"),
        *("--build-arg", f"USER_NAME={user_name}"),
        *("--tag", tag),
        str(sandbox.repository),
    ]
    assert run == [
        "run",
        "--rm",
        "--interactive",
        *("--gpus", "all"),
        *("--ipc", "host"),
        *("--ulimit", "memlock=-1"),
        *("--ulimit", "stack=67108864"),
        *("--env", "HF_HUB_OFFLINE", "--env", "WANDB_API_KEY", "--env", "WANDB_MODE"),
        *("--mount", f"type=bind,source={sandbox.models},target=/models"),
        *("--mount", f"type=bind,source={sandbox.datasets},target=/datasets"),
        *("--mount", f"type=bind,source={sandbox.repository},target=/workspace/repository"),
        *("--workdir", "/workspace/repository"),
        tag,
        *("torchrun", "--nproc-per-node", "2", "finetune_qwen2vl.py", "--run-name", "two words", ""),
    ]


def test_build_is_skipped_when_the_image_is_there(sandbox):
    sandbox.image.touch()
    assert sandbox.run("true").returncode == 0
    assert [command[0] for command in sandbox.commands()] == ["image", "run"]


def test_without_a_command_the_image_decides(sandbox):
    sandbox.run()
    assert sandbox.run_command()[-1].startswith("dct-qwen2vl:")


def test_tag_follows_the_dockerfile_only(sandbox):
    def tag():
        sandbox.record.unlink(missing_ok=True)
        sandbox.run()
        return sandbox.run_command()[-1]

    before = tag()
    (sandbox.repository / "README.md").write_text("changed")
    assert tag() == before
    with (sandbox.repository / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("# changed\n")
    assert tag() != before


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [("all", ["--gpus", "all"]), ("3", ["--gpus", '"device=3"']), ("0,1", ["--gpus", '"device=0,1"']), ("none", [])],
)
def test_gpus(sandbox, gpus, expected):
    sandbox.run(GPUS=gpus)
    command = sandbox.run_command()
    start = command.index("--interactive") + 1
    assert command[start : command.index("--ipc")] == expected


def test_settings_of_the_launcher_are_passed_on(sandbox):
    sandbox.run("bash", "qwen_launch.sh", LR="2e-5", MAX_STEPS="77", EXPERIMENT_NAME="first", TP="", PYTHON="/python3")
    command = sandbox.run_command()
    assert [name for flag, name in pairwise(command) if flag == "--env"] == [
        *("HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE"),
        *("EXPERIMENT_NAME", "TP", "MAX_STEPS", "LR"),
    ]
    launcher = (REPOSITORY / "qwen_launch.sh").read_text()
    settings = set(re.findall(r"^([A-Z_]+)=", launcher, re.MULTILINE)) - {"MODEL_DIR", "DATASET_DIR"}
    sandbox.record.unlink()
    sandbox.run(**dict.fromkeys(settings, "1"))
    assert settings and settings <= set(sandbox.run_command())


def test_container_s_own_interpreter_is_used():
    assert re.search(r"^ENV PYTHON=python$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)


def test_own_shared_memory(sandbox):
    sandbox.run(SHM_SIZE="16g")
    command = sandbox.run_command()
    assert command[command.index("--shm-size") + 1] == "16g"
    assert "--ipc" not in command


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_several_nodes_use_the_network_of_the_host(sandbox, nodes):
    assert sandbox.run("true", NNODES=nodes).returncode == 0
    command = sandbox.run_command()
    assert ("--network" in command) is (nodes == "2")
    if nodes == "2":
        assert command[command.index("--network") + 1] == "host"


def test_relative_folders_become_absolute(sandbox):
    script = str(sandbox.repository / SCRIPT)
    environment = {**sandbox.environment, "MODEL_DIR": ".", "DATASET_DIR": "../data sets"}
    subprocess.run([script], cwd=sandbox.models, env=environment, stdin=subprocess.DEVNULL, check=True, timeout=60)
    command = sandbox.run_command()
    assert f"type=bind,source={sandbox.models},target=/models" in command
    assert f"type=bind,source={sandbox.datasets},target=/datasets" in command


def test_terminal_is_passed_on(sandbox):
    leader, follower = pty.openpty()
    try:
        subprocess.run(
            [str(sandbox.repository / SCRIPT)],
            env=sandbox.environment,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            check=True,
            timeout=60,
        )
    finally:
        os.close(leader)
        os.close(follower)
    assert sandbox.run_command()[:4] == ["run", "--rm", "--interactive", "--tty"]


def test_status_of_the_command_is_kept(sandbox):
    assert sandbox.run("false", RUN_STATUS="42").returncode == 42


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MODEL_DIR": ""}, "MODEL_DIR is not set"),
        ({"DATASET_DIR": ""}, "DATASET_DIR is not set"),
        ({"MODEL_DIR": "/not/there"}, "MODEL_DIR=/not/there is not a folder"),
        ({"DATASET_DIR": "/etc/passwd"}, "DATASET_DIR=/etc/passwd is not a folder"),
        ({"BUILD_STATUS": "1"}, "docker build failed"),
    ],
)
def test_errors_are_one_line_and_nothing_runs(sandbox, environment, said):
    result = sandbox.run("true", **environment)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"{SCRIPT}: {said}")
    assert result.stderr.count("\n") == 1
    assert "run" not in [command[0] for command in sandbox.commands()]


def test_comma_in_a_folder_is_refused(sandbox, tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    result = sandbox.run(MODEL_DIR=str(folder))
    assert result.returncode == 1
    assert result.stderr.startswith(f"{SCRIPT}: docker cannot mount {folder}")
    assert sandbox.commands() == []


def test_missing_docker(sandbox, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "id", "cat", "sha256sum"):
        (tools / name).symlink_to(shutil.which(name))
    sandbox.environment["PATH"] = str(tools)
    result = sandbox.run()
    assert result.returncode == 1
    assert result.stderr.startswith(f"{SCRIPT}: docker is not on PATH; install Docker and the NVIDIA Container Toolkit")
    assert result.stderr.count("\n") == 1


def test_help_starts_nothing(sandbox):
    result = sandbox.run("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Builds the container")
    assert "MODEL_DIR=~/models" in result.stdout
    assert "set -" not in result.stdout
    assert sandbox.commands() == []


def dockerfile_pins() -> dict[str, str]:
    return dict(re.findall(r"^ +([a-z-]+)==(\S+)", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE))


def test_dockerfile_pins_what_the_lock_pins():
    lock = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE))
    pins = dockerfile_pins()
    assert {"transformers", "tokenizers", "megatron-energon", "webdataset", "av"} <= pins.keys()
    assert pins == {name: lock[name] for name in pins}


def test_dockerfile_imports_what_it_leaves_to_the_base_image():
    """The check inside the image must name modules that exist: it runs in this environment as well."""
    (imports,) = re.findall(r'python -c "(import [^"]+)"', (REPOSITORY / "Dockerfile").read_text())
    subprocess.run([sys.executable, "-c", imports], check=True, timeout=120)


def test_image_gets_no_files():
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["*"]
    assert not re.search(r"^(COPY|ADD)\b", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)


def lint(tool: str, *arguments: str, **options) -> tuple[int, str]:
    command = [str(Path(sys.executable).parent / tool), *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, **options)
    return result.returncode, result.stdout


def test_hadolint_finds_nothing_in_the_dockerfile():
    assert lint("hadolint", "Dockerfile") == (0, "")
    status, said = lint("hadolint", "-", input="FROM debian:latest\n")
    assert (status, "DL3007" in said) == (1, True)


def test_shellcheck_finds_nothing_in_the_scripts():
    assert lint("shellcheck", *sorted(path.name for path in REPOSITORY.glob("*.sh")), ".ci/run") == (0, "")
    status, said = lint("shellcheck", "-", input="#!/bin/sh\ncd $1\n")
    assert (status, "SC2086" in said) == (1, True)
