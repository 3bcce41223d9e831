"""First tries, small sets, data that were prepared again, what a shell has left over, Ctrl-C: through qwen_launch.sh,
with two real processes on both engines."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from pipeline import REPOSITORY, edit_json, metrics, run, write_checkpoint
from stand_in_python import write_interpreter

import finetune_qwen2vl
from dct_qwen2vl.data.energon_files import fingerprint_of_shards
from dct_qwen2vl.training import processes, run_file
from dct_qwen2vl.training.launch import main, notes_on_names

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the megatron engine's CPU form")
ENGINES = ["automodel", pytest.param("megatron", marks=cpu_only)]
LEFT_OVER = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
GOES_ON = "run the same command again to continue from the newest checkpoint"


@pytest.fixture(scope="module")
def variables(prepared, tmp_path_factory):
    """variables(engine, folder, **settings): of qwen_launch.sh for a short run of two processes into folder/run."""
    stand_in = write_interpreter(tmp_path_factory.mktemp("python"), "megatron_on_cpu")

    def make(engine: str, folder: Path, **settings) -> dict[str, str]:
        own = {"PYTHON": sys.executable, "MBS": 2, "GBS": 8}
        if engine == "megatron":
            own = {"PYTHON": stand_in, "PYTHON_EXEC": stand_in, "PACK_TOKENS": 256, "GBS": 4}
        values = {
            "EXPERIMENT_NAME": "run", "OUTPUT_DIR": folder, "MODEL_DIR": prepared.model, "ENGINE": engine,
            "DATASET_DIR": prepared.shards, "MAXPIXELS": 112 * 112, "NUM_PROC_PER_NODE": 2, "SEQ_LENGTH": 256,
            "MAX_STEPS": 4, "LR": "1e-3", "WARMUP_STEPS": 1, "VAL_INTERVAL": 2, "SAVE_INTERVAL": 2, "NUM_WORKERS": 1,
            "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1, "PYTHONWARNINGS": "ignore", **own, **settings,
        }  # fmt: skip
        return {**os.environ, **{name: str(value) for name, value in values.items()}}

    return make


def command_of(environment: dict[str, str], *arguments: str) -> list[str]:
    packing = ["--packing-buffer", "8"] if environment["ENGINE"] == "megatron" else []
    return ["bash", "qwen_launch.sh", "--log-interval", "1", *packing, *arguments]


def launch(environment: dict[str, str], *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    done = run(command_of(environment, *arguments), check=False, **environment)
    assert done.returncode == code, (done.stdout + done.stderr)[-4000:]
    return done


def told(text: str) -> list[str]:
    """The lines in which this repository's programs end."""
    return [line for line in text.splitlines() if line.startswith(("finetune_qwen2vl.py: ", "qwen_launch.sh: "))]


def prepare(prepared, folder: Path, *arguments: str) -> Path:
    """A set of the raw data, in place of one that may be in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    data = ["--data-dir", str(prepared.raw), "--output-dir", str(folder), "--energon-prepare", "--no-report"]
    run([sys.executable, "data_preparation.py", *data, *arguments])
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("engine", ENGINES)
def test_a_first_try_without_a_val_split_trains_and_says_so_once(engine, prepared, variables, tmp_path):
    """In a shell in which a job scheduler has left torchrun's variables."""
    shards = prepare(prepared, tmp_path / "shards", "--limit", "40", "--split", "1,0,0")
    done = launch(variables(engine, tmp_path, DATASET_DIR=shards, **LEFT_OVER))
    assert done.stdout.count(f"Note: the val split of {shards} is empty, so there is no validation") == 1
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and not any("val_loss" in line for line in lines)
    assert (tmp_path / "run" / "hf").is_dir() and not (tmp_path / "run" / ".rehearsal").exists()


@pytest.mark.launch
def test_a_model_that_cannot_be_saved_ends_both_processes_in_one_line(prepared, variables, tmp_path):
    model_dir = Path(shutil.copytree(prepared.model, tmp_path / "model"))
    edit_json(model_dir / "generation_config.json", do_sample=False, temperature=0.5)
    done = launch(variables("automodel", tmp_path, MODEL_DIR=model_dir, PYTHONWARNINGS="default"), code=1)
    (line,) = told(done.stderr)
    assert "generation_config.json cannot be loaded" in line and "convert_checkpoint.py" in line
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "metrics.jsonl").exists()


def start(environment: dict[str, str], log: Path) -> subprocess.Popen:
    """A launch as from a terminal: a process group of its own, which Ctrl-C reaches as a whole."""
    command = command_of(environment, "--compare-samples", "0")
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while step not in steps_of(run_dir):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def steps_of(run_dir: Path) -> list[int]:
    """The steps that a run has written whole lines about; it may still go on."""
    path = run_dir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().split("\n")[:-1]) if path.is_file() else ()
    return [line["step"] for line in lines if "loss" in line]


def end(process: subprocess.Popen, log: Path, act) -> tuple[int, list[str]]:
    """Exit status, and what was printed after `act`, but for what steps were under way."""
    size = log.stat().st_size
    act()
    try:
        code = process.wait(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return code, [line for line in log.read_text()[size:].splitlines() if line and not line.startswith("step ")]


def assert_no_line_is_lost(log: str, written: list[int]) -> None:
    """Each step that was shown is in metrics.jsonl."""
    shown = [int(line.split("/")[0].split()[1]) for line in log.splitlines() if "| lr" in line]
    assert len(shown) >= 2 and written[: len(shown)] == shown == list(range(1, len(shown) + 1))


def test_a_flag_that_there_is_not_is_told_once_before_any_process_starts(variables, tmp_path):
    done = run(command_of(variables("automodel", tmp_path), "--no-such-flag"), check=False)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr.count("usage: finetune_qwen2vl.py") == 1
    assert done.stderr.endswith("finetune_qwen2vl.py: error: unrecognized arguments: --no-such-flag\n")


@pytest.fixture(scope="module")
def interrupted(prepared, variables, tmp_path_factory):
    """interrupted(engine): a run that Ctrl-C has ended after its second validation, of one sample for two processes."""
    shards = prepare(
        prepared, tmp_path_factory.mktemp("small") / "shards", "--limit", "24", "--split", "20,1,1", "--maxcount", "2"
    )

    @functools.cache
    def interrupt(engine: str) -> dict:
        folder = tmp_path_factory.mktemp(engine)
        environment = variables(engine, folder, DATASET_DIR=shards, MAX_STEPS=5000, SAVE_INTERVAL=5000)
        process = start(environment, folder / "log")
        wait_for_step(process, folder / "run", 5)
        family = psutil.Process(process.pid).children(recursive=True)
        code, lines = end(process, folder / "log", lambda: os.killpg(process.pid, signal.SIGINT))
        left = psutil.wait_procs(family, timeout=20)[1]
        return {"folder": folder, "code": code, "lines": lines, "left": left}

    return interrupt


@pytest.mark.launch
@pytest.mark.parametrize("engine", ENGINES)
def test_a_val_split_smaller_than_the_processes_works(engine, interrupted):
    """Validation is every two steps."""
    lines = metrics(interrupted(engine)["folder"] / "run")
    validations = [(line["step"], line["val_samples"]) for line in lines if "val_loss" in line]
    assert validations[:2] == [(2, 1), (4, 1)] and {samples for _, samples in validations} == {1}


@pytest.mark.launch
@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_ends_in_one_line(engine, interrupted):
    run = interrupted(engine)
    assert (run["code"], run["lines"]) == (130, [f"qwen_launch.sh: interrupted; {GOES_ON}"])
    assert_no_line_is_lost((run["folder"] / "log").read_text(), steps_of(run["folder"] / "run"))
    assert run["left"] == []


def test_an_interrupt_that_a_callback_drops_comes_once_more(monkeypatch, capfd):
    """Python prints and drops what is raised while a weak reference's callback runs."""
    for name in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    before, thing = signal.getsignal(signal.SIGINT), threading.Event()

    def interrupt(reference) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)

    reference = weakref.ref(thing, interrupt)
    try:
        with pytest.raises(processes.Interrupted), processes.interruptible() as seen:
            del thing
            assert seen == [signal.SIGINT] and reference() is None
            time.sleep(20)
        time.sleep(3 * processes.AGAIN)  # and no more after it
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Exception ignored" not in capfd.readouterr().err


def test_what_else_a_callback_drops_is_shown():
    shown, lost = [], []
    dropped = SimpleNamespace(exc_value=ValueError("another"))
    processes.raise_again(shown.append, lost)(dropped)
    assert shown == [dropped] and not lost


def test_a_thread_that_has_lost_its_other_end_is_silent():
    shown: list[type] = []
    hook = processes.without_lost_ends(lambda kind, error, trace: shown.append(kind))
    for kind in (EOFError, ConnectionResetError, ValueError):
        thread = threading.Thread(target=hook, args=(kind, kind(), None))
        thread.start()
        thread.join()
    hook(EOFError, EOFError(), None)
    assert shown == [ValueError, EOFError]


def test_an_end_that_others_have_made_is_told_in_one_line():
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    ended = SIGTERMException()
    assert finetune_qwen2vl.explain(ended).startswith("ended by SIGTERM")
    ended.__context__ = RuntimeError("gloo/transport/tcp/pair.cc:525] Read error: Connection reset by peer")
    assert finetune_qwen2vl.explain(ended).startswith("another process of this run has ended")


def test_what_a_shell_has_left_over_does_not_count(prepared, tmp_path, monkeypatch):
    monkeypatch.delenv(processes.TORCHRUN, raising=False)
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)
    known = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    assert finetune_qwen2vl.main([*known, "--engine", "automodel", "--devices", "2", "--check"]) == 0
    monkeypatch.setenv(processes.TORCHRUN, "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert finetune_qwen2vl.main([*known, "--engine", "automodel", "--devices", "2", "--check"]) == 1


def test_only_the_first_ctrl_c_counts_and_only_in_the_process_that_asked():
    before, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    with pytest.raises(processes.Interrupted), processes.interruptible() as seen:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7 and not seen
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
    assert seen == [signal.SIGINT]
    signal.signal(signal.SIGINT, before)
    sys.excepthook = hook


STARTED = """
import subprocess, sys

program = '''
import time, finetune_qwen2vl
finetune_qwen2vl.run = lambda config: print("begun", flush=True) or time.sleep(90)
finetune_qwen2vl.main()
'''
process = subprocess.Popen([sys.executable, "-c", program, *sys.argv[1:]])
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_ends_with_the_launcher_that_kill_9_has_ended(launched):
    """One that torchrun has not started does not: a shell may end before what it has started."""
    known = ["--model-dir", "no-model", "--data-dir", "no-data"]
    environment = {name: value for name, value in os.environ.items() if name != processes.TORCHRUN}
    launcher = subprocess.Popen(
        [sys.executable, "-c", STARTED, *known],
        cwd=REPOSITORY, env={**environment, **({processes.TORCHRUN: "1"} if launched else {})},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = psutil.Process(int(launcher.stdout.readline()))
    try:
        assert launcher.stdout.readline() == "begun\n"
        launcher.kill()
        launcher.wait()
        _, alive = psutil.wait_procs([started], timeout=20 if launched else 1)
        assert bool(alive) != launched
    finally:
        if started.is_running():
            started.kill()
        launcher.stdout.close()


LAST_INSTANT = """
import os, signal, sys
import finetune_qwen2vl
from dct_qwen2vl.common import scripts
from dct_qwen2vl.training import processes

def press(*_):
    os.kill(os.getpid(), signal.SIGINT)

def restored(number, handler, set_handler=signal.signal):
    if handler is signal.default_int_handler:
        press()
    return set_handler(number, handler)

moment = sys.argv.pop()
finetune_qwen2vl.run = lambda config: press() if moment == "within" else 0
if moment == "last":
    finetune_qwen2vl.leave = press
if moment == "restored":
    finetune_qwen2vl.leave, processes.signal.signal = print, restored
sys.exit(finetune_qwen2vl.main())
"""


@pytest.mark.parametrize(("moment", "status"), [("within", 130), ("last", 130), ("restored", 130), ("never", 0)])
def test_ctrl_c_in_the_last_instant_of_a_check_is_told(moment, status):
    """A script that goes on after a check stops where the check was interrupted."""
    known = ["--model-dir", "no-model", "--data-dir", "no-data", "--check"]
    done = run([sys.executable, "-c", LAST_INSTANT, *known, moment], check=False)
    said = f"finetune_qwen2vl.py: interrupted; {GOES_ON}\n" if status else ""
    assert (done.returncode, done.stderr) == (status, said)


def test_data_that_were_prepared_again_are_told_before_the_start(prepared, tmp_path, one_line_error, monkeypatch):
    """A run is begun, has a checkpoint, and finds another set in its folder."""
    monkeypatch.setattr(finetune_qwen2vl, "train", run_file.write_run_file)
    shards, run_dir = Path(shutil.copytree(prepared.shards, tmp_path / "shards")), tmp_path / "run"
    known = ["--model-dir", str(prepared.model), "--data-dir", str(shards), "--output-dir", str(tmp_path)]
    command = [*known, "--experiment-name", "run", "--engine", "automodel"]
    assert finetune_qwen2vl.main(command) == 0
    (run_dir / "finished").unlink()
    write_checkpoint(run_dir / "checkpoints" / "step000005")
    assert finetune_qwen2vl.main([*command, "--check"]) == 0
    prepare(prepared, shards, "--limit", "100", "--maxcount", "10")
    assert finetune_qwen2vl.main([*command, "--check"]) == 1
    said = f"the train shards in {shards} are not those that {run_dir} was started with: add --restart-data"
    assert said in one_line_error()
    assert finetune_qwen2vl.main([*command, "--check", "--restart-data"]) == 0
    settings = json.loads((run_dir / "run.json").read_text())
    del settings["train_shards"]  # a run of before there was this key
    (run_dir / "run.json").write_text(json.dumps(settings))
    assert finetune_qwen2vl.main([*command, "--check"]) == 0


def test_a_fingerprint_is_that_of_the_shards(prepared, tmp_path):
    copy = Path(shutil.copytree(prepared.shards, tmp_path / "shards"))
    assert fingerprint_of_shards(copy) == fingerprint_of_shards(prepared.shards)
    with min(copy.glob("*.tar")).open("ab") as shard:
        shard.write(bytes(512))
    assert fingerprint_of_shards(copy) != fingerprint_of_shards(prepared.shards)


@pytest.mark.parametrize(
    ("set_to", "said"),
    [
        ({"MAXSTEPS": "5"}, "MAXSTEPS=5 changes nothing, qwen_launch.sh has no such setting: is MAX_STEPS meant?"),
        ({"max_steps": "5"}, "max_steps=5 changes nothing, qwen_launch.sh has no such setting: is MAX_STEPS meant?"),
        ({"WARMUP_STEP": "5"}, "WARMUP_STEP=5 changes nothing, qwen_launch.sh has no such setting: is WARMUP_STEPS"),
        ({"BATCH_SIZE": "8"}, "BATCH_SIZE=8 changes nothing, qwen_launch.sh has no such setting: is MBS or GBS meant?"),
        ({"SKIP": "38"}, "SKIP=38 changes nothing, qwen_launch.sh has no such setting: is SKIP_DB meant?"),
        ({"lr": "1"}, "lr=1 changes nothing, qwen_launch.sh has no such setting: is LR meant?"),
        ({"BATCH_SIZE": "8", "MBS": "8"}, None),  # of another program
        ({"MAX_STEPS": "5", "LR": "1", "INPUT_DIR": "x", "SLURM_NNODES": "2", "TMPDIR": "/tmp", "TP_": "1x"}, "TP_=1x"),
        ({"LOCAL_RANK": "0", "GROUP_RANK": "0", "CUDA_VISIBLE_DEVICES": "0", "HOME": "/root", "SEEDS": "1"}, None),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_told(set_to, said):
    notes = notes_on_names(set_to)
    assert len(notes) == (said is not None)
    assert all(note.startswith(said) for note in notes)


def test_an_export_is_one_process_that_waits_for_no_other_node(monkeypatch, capsys):
    started = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    script = ["finetune_qwen2vl.py", "--model-dir", "m", "--data-dir", "d", "--num-nodes", "2", "--export"]
    for rank in ("0", "1"):
        nodes = ["--nnodes", "2", "--node-rank", rank, "--master-addr", "10.0.0.1", "--master-port", "29500"]
        assert main([*nodes, "--nproc-per-node", "8", *script]) == 0
    (only,) = started
    assert (only.standalone, only.nnodes, only.nproc_per_node) == (True, "1", "1")
    assert capsys.readouterr().out == "Note: the first node (NODE_RANK=0) exports, this one does nothing\n"
