"""Evaluation against damaged input: mutated questions, shards, Energon's files beside them, files of answers.

    python -m benchmarks.fuzz_evaluation --inputs 2000 --json fuzz.json

Every input must end as answers that add up, or as one line of error, within seconds and without a traceback. The model
is a tiny Qwen2-VL with random weights; each input runs the whole command.
"""

import gc
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.fuzz_preparation import correct_tar, image_files, video_files
from benchmarks.fuzzing import JSON_WORDS, Finding, Target, mutate, mutate_json, quiet, run_target

JSON_BYTES = 4096  # of each json part, so that a changed one leaves the offsets of the shard right
WORDS = (
    *(word for word in JSON_WORDS if len(word) < JSON_BYTES),
    *(b'"question_type"', b'["colour"]', b'{"a": 1}', b"[[1], null]", b'"overall"', b'"loss"', b"false", b"0.5"),
    *(b'"weight"', b'"system"', b'"messages"', b'"role"', b'"<|box_start|>(1,2)<|box_end|>"', b'"<|image_pad|>"'),
    *(b'"<|im_end|>"', b'"<img>a.jpg</img>"', b'{"type": "image"}', b'"content"'),
)
ENERGON_FILES = (".nv-meta/dataset.yaml", ".nv-meta/split.yaml", ".nv-meta/.info.yaml")
SHARD = "pretrain-000000.tar"
DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\nauto_decode: false\n"
TRAINED_ON = ["user\nWhat colour is the circle?", "assistant\nThe circle is red."] * 8


def samples() -> list[tuple[Any, dict[str, bytes]]]:
    """Entries of all forms, and the media parts of each."""
    image, video = image_files()[0], video_files()[0]
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    parts = [{"type": "image"}, {"type": "text", "text": "And <|box_start|>(1,2)<|box_end|>?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "It is.", "weight": 1}]
    plain = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "4", "loss": False}] * 2
    plain[3] = {"from": "gpt", "value": "4"}
    return [
        ({"id": 1, "conversations": asked, "question_type": ["colour"], "system": "Be brief."}, {"jpg": image}),
        ({"id": 2, "messages": turns, "question_type": "box"}, {"jpg": image}),
        ([{"from": "system", "value": "Be brief."}, *plain], {}),
        ({"conversations": [{"from": "human", "value": "<video>?"}, asked[1]]}, {"mp4": video}),
    ]


def write_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, (entry, media) in enumerate(samples()):
            parts = {**media, "json": json.dumps(entry).encode().ljust(JSON_BYTES)}
            for ending, data in parts.items():
                header = tarfile.TarInfo(f"{number:09d}.{ending}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return stream.getvalue()


@cache
def workplace() -> Path:
    """A folder with a model, prepared shards, and what a run that was stopped before its end leaves."""
    import atexit
    import subprocess

    from dct_qwen2vl.toy.model import write_checkpoint

    folder = Path(tempfile.mkdtemp(prefix="fuzz-evaluation-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_checkpoint(TRAINED_ON, folder / "model", seed=0)
    shards = folder / "shards"
    shards.mkdir()
    (shards / SHARD).write_bytes(write_tar())
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", "--num-workers=1", str(shards)]
    subprocess.run(command, input="0,0,1\ny\n11\n", capture_output=True, text=True, check=True)
    (shards / ".nv-meta" / "dataset.yaml").write_text(DATASET)
    write_part(folder)
    return folder


def write_part(folder: Path) -> None:
    """predictions.jsonl.part of the first two rounds."""
    import evaluate_qwen2vl
    from dct_qwen2vl.evaluation.answer_file import AnswerFile
    from dct_qwen2vl.evaluation.questions import Question, Reading
    from dct_qwen2vl.evaluation.scoring import describe_answers

    arguments = evaluate_qwen2vl.parse_arguments(command_line(folder, folder / "shards", folder))
    with AnswerFile(folder / "part", evaluate_qwen2vl.describe_settings(arguments)) as file:
        for number in range(2):
            asked = Question(f"{number:09d}", 0, "colour", ("", "image", "What?"), "red", ())
            reading = Reading(entries=number + 1, questions=number + 1)
            file.add_round(describe_answers([asked], ["red"], ["blue"]), reading.as_dict())


def command_line(folder: Path, shards: Path, output: Path) -> list[str]:
    given = {"--model-dir": folder / "model", "--data-dir": shards, "--output-dir": output}
    return [*(str(part) for pair in given.items() for part in pair), "--max-new-tokens", "2"]


def run_entries(rng: random.Random) -> str:
    """The json parts of one or two samples."""
    data = bytearray((workplace() / "shards" / SHARD).read_bytes())
    found = samples()
    for number in rng.sample(range(len(found)), rng.choice((1, 1, 2))):
        old = json.dumps(found[number][0]).encode()
        new = mutate_json(rng, old, json.dumps(found[0][0]).encode(), WORDS)[:JSON_BYTES].ljust(JSON_BYTES)
        place = data.index(old)
        data[place : place + JSON_BYTES] = new
    return evaluate({SHARD: bytes(data)})


def run_shard(rng: random.Random) -> str:
    """The bytes of a shard, and perhaps of the index beside it."""
    shards = workplace() / "shards"
    data = mutate(rng, (shards / SHARD).read_bytes(), video_files()[0])
    return evaluate({SHARD: correct_tar(data) if rng.random() < 0.5 else data})


def run_energon(rng: random.Random) -> str:
    """A file that `energon prepare` wrote."""
    shards = workplace() / "shards"
    name = rng.choice((*ENERGON_FILES, f"{SHARD}.idx"))
    return evaluate({name: mutate(rng, (shards / name).read_bytes(), (shards / ENERGON_FILES[1]).read_bytes())})


def run_answers(rng: random.Random) -> str:
    """The file of answers from which a run goes on."""
    part = (workplace() / "part").read_bytes()
    words = (*WORDS, b'"read"', b'"left_out"', b"-1", b'{"read": {}}')
    return evaluate({}, part=mutate_json(rng, part, part, words))


def evaluate(changed: dict[str, bytes], part: bytes | None = None) -> str:
    """Run the command on the shards with some files of other bytes, or after a run that left `part`."""
    import evaluate_qwen2vl

    with tempfile.TemporaryDirectory() as name, quiet() as said:
        shards, output = workplace() / "shards", Path(name) / "out"
        output.mkdir()
        if changed:
            shards = Path(shutil.copytree(shards, Path(name) / "shards"))
        for path, data in changed.items():
            (shards / path).write_bytes(data)
        if part is not None:
            (output / "predictions.jsonl.part").write_bytes(part)
        status = evaluate_qwen2vl.main(command_line(workplace(), shards, output))
        return judge(status, said.getvalue(), output)


def judge(status: int, said: str, output: Path) -> str:
    """What became of an input. Raises Finding."""
    if "Traceback" in said:
        raise Finding(f"a traceback: {said[said.index('Traceback') :].splitlines()[-1]}")
    if status == 1:
        lines = [line for line in said.splitlines() if line.startswith("evaluate_qwen2vl.py: ")]
        if not any("left out:" not in line for line in lines):
            raise Finding("exit status 1 without a line of error")
        return "skipped: the set is refused"
    if status != 0:
        raise Finding(f"exit status {status}")
    summary = json.loads((output / "accuracy.json").read_text())
    answers = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    left_out = sum(summary["entries_left_out"].values())
    if len(answers) != summary["questions"] or summary["entries_read"] != summary["entries_asked"] + left_out:
        raise Finding(f"{len(answers)} answers, {summary}")
    return "stored answers, left some entries out" if left_out else "stored all answers"


def prepare() -> None:
    """Before the clock runs: import and make all, and keep the many objects of it out of what Energon has collected
    for every split that it opens."""
    import torch

    torch.set_num_threads(1)
    outcome = evaluate({})
    if outcome != "stored all answers":
        raise Finding(f"what is not damaged: {outcome}")
    gc.collect()
    gc.freeze()


TARGET = Target(
    name="fuzz_evaluation",
    kinds={"entries": 40, "shard": 25, "energon": 15, "answers": 20},
    runners={"entries": run_entries, "shard": run_shard, "energon": run_energon, "answers": run_answers},
    prepare=prepare,
    memory=64 << 30,  # torch alone takes 10 GiB of addresses
)


def main(argv: list[str] | None = None) -> int:
    return run_target(TARGET, argv, __doc__, 2000)


if __name__ == "__main__":
    sys.exit(main())
