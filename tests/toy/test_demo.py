"""The demo's screen: no noise of libraries, one line for a progress bar, and never an error less."""

import sys
from pathlib import Path

import pytest

from dct_qwen2vl.toy import demo
from dct_qwen2vl.toy.demo import Screen, Stage, StageError, find_reason, run_stage, run_stages

TRACEBACK = """\
[rank0]: Traceback (most recent call last):
[rank0]:   File "finetune_qwen2vl.py", line 1, in <module>
[rank0]: ValueError: the shards hold no sample
[NeMo E 2026-11-29 01:16:42 nemo_logging:393] it went wrong
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
NOISE = """\
[rank: 0] Seed set to 0
[NeMo I 2026-11-29 01:16:42 nemo_logging:393] Experiments will be logged at E
Cannot import zarr, support for zarr-based checkpoints is not available. ModuleNotFoundError: No module named 'zarr'
WARNING:root:The package `decord` was not installed in this environment.
GPU available: False, used: False
Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2
--------------------
`Trainer.fit` stopped: `max_steps=600` reached.
rank=0, worker=0: shard_range=[pretrain-000024.tar[0, 174)] sum(count)=174
"""


def says(text: str, exit_code: int = 0) -> Stage:
    return Stage("speech", [sys.executable, "-c", f"import sys; sys.stderr.write({text!r}); sys.exit({exit_code})"])


def test_noise_is_in_the_log_alone(tmp_path, capsys):
    run_stage(says(f"{NOISE}step 1/600 | loss 6.5\n"), tmp_path / "log")
    command, said = capsys.readouterr().out.split("sys.exit(0)'\n")
    assert command.startswith("\n=== speech\n$ python -c ") and said == "step 1/600 | loss 6.5\n"
    assert (tmp_path / "log").read_text() == f"{NOISE}step 1/600 | loss 6.5\n"


def test_errors_of_libraries_are_shown(capsys):
    screen = Screen()
    for line in TRACEBACK.splitlines(keepends=True):
        screen.show(line)
    assert capsys.readouterr().out == TRACEBACK


def test_a_failing_stage_says_why(tmp_path, capsys):
    reason = "data_preparation.py: error: no *.json in /raw: give --data-dir the folder that holds it"
    with pytest.raises(StageError, match="the stage speech failed with exit code 3") as raised:
        run_stage(says(f"{NOISE}{reason}\n", 3), tmp_path / "log")
    assert reason in str(raised.value) and str(tmp_path / "log") in str(raised.value)
    assert reason in capsys.readouterr().out.splitlines()


def meets(own: Path, other: Path, says: str) -> list[str]:
    """A command that ends well only if another one, which waits for it, runs at the same time."""
    code = f"""
import pathlib, time
pathlib.Path({str(own)!r}).touch()
end = time.monotonic() + 60
while not pathlib.Path({str(other)!r}).exists():
    assert time.monotonic() < end
    time.sleep(0.01)
print({says!r})
"""
    return [sys.executable, "-c", code]


def test_a_stage_beside_another_runs_with_it_and_is_shown_after_it(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    second = Stage("second", meets(b, a, "GPU available: no\nI am second"))
    seconds = run_stages([Stage("first", meets(a, b, "I am first"), beside=second), says("I am third")], tmp_path)
    shown = capsys.readouterr().out.splitlines()
    said = [line for line in shown if line.startswith(("===", "I am"))]
    assert said == ["=== first", "I am first", "=== second", "I am second", "=== speech", "I am third"]
    assert "GPU available: no" not in shown and "GPU available: no" in (tmp_path / "second.log").read_text()
    assert list(seconds) == ["first", "second", "speech"]


def test_a_stage_that_fails_beside_another_is_named(tmp_path, capsys):
    failing = Stage("second", says("convert_checkpoint.py: there is no model\n", 1).command)
    with pytest.raises(StageError, match=r"the stage second failed with exit code 1: .*there is no model"):
        run_stages([Stage("first", says("fine").command, beside=failing)], tmp_path)
    assert "convert_checkpoint.py: there is no model" in capsys.readouterr().out.splitlines()


def test_a_failing_demo_ends_with_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "stages", lambda folder, seed: [says("convert_checkpoint.py: there is no model\n", 1)])
    assert demo.main(["--output-dir", str(tmp_path / "demo")]) == 1
    printed = capsys.readouterr()
    assert "convert_checkpoint.py: there is no model" in printed.out.splitlines()
    assert len(printed.err.splitlines()) == 1 and "there is no model; its log: " in printed.err


def test_reason_of_a_failure():
    assert find_reason(TRACEBACK.splitlines()) == "ValueError: the shards hold no sample"
    left_out = "evaluate_qwen2vl.py: 000001 left out: broken"
    assert (
        find_reason([left_out, "evaluate_qwen2vl.py: there is no question"])
        == "evaluate_qwen2vl.py: there is no question"
    )
    assert find_reason([left_out, "RuntimeError: out of memory"]) == "RuntimeError: out of memory"
    assert find_reason(["step 1/600 | loss 6.5"]) == ""


def test_a_progress_bar_is_one_line(tmp_path, capsys):
    code = """
from tqdm import tqdm
for _ in tqdm(range(3), desc="Looking", mininterval=0, leave=False): pass
print("Found 3", flush=True)
with tqdm(desc="Answering", total=3, mininterval=0) as bar:
    for _ in range(3):
        bar.update()
        print("rank=0, worker=0: shard_range=[]", flush=True)
for _ in tqdm(range(3), desc="Counting", mininterval=0): pass
print("Done", flush=True)
"""
    run_stage(Stage("bars", [sys.executable, "-c", code]), tmp_path / "log")
    lines = capsys.readouterr().out.split("\nFound 3\n")
    assert "Looking: " not in lines[0].splitlines()[-1]
    assert [line.partition("|")[0] for line in lines[1].splitlines()] == ["Answering: 100%", "Counting: 100%", "Done"]
    assert "Looking:  67%" in (tmp_path / "log").read_text()


def test_commands_can_be_typed_again():
    stage = Stage(
        "x", [sys.executable, "a.py", *(["--output-dir", "/data/a b/" + "c" * 40] * 3)], {"LR": "1", "PYTHON": "p"}
    )
    lines = stage.shown().split(" \\\n")
    assert lines[0] == f"LR=1 python a.py --output-dir '/data/a b/{'c' * 40}'"
    assert len(lines) == 3 and all(line.startswith("    --output-dir '/data/a b/ccc") for line in lines[1:])


def test_last_words():
    summary = {
        "accuracy": {"overall": 0.963},
        "blind_accuracy": {"overall": 0.209},
        "tokens_per_image": {"pixels": 18.0, "dct": 4.5},
        "seconds": {"training": 100.0, "evaluation": 60.0, "images": 50.0},
        "total_seconds": 145.2,
    }
    words = "\n".join(demo.last_words(Path("demo"), summary))
    for said in ("96.3%", "20.9%", "4.5 tokens", "pixels take 18.0", "145 s", "make test", "Setup Instructions"):
        assert said in words
    for path in ("samples.png", "loss.png", "evaluation/predictions.jsonl", "shards/report.html"):
        assert f"  demo/{path} " in words
