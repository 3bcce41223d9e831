"""The wrapper for lmms-eval on a task of our own: what lmms-eval logs is what evaluate_qwen2vl answers.

lmms-eval pins versions that this repository has not, so it runs in an environment of its own, made as
docs/real_models.md says: LMMS_EVAL_PYTHON=lmms/bin/python pytest tests/evaluation/test_lmms_eval.py
What the wrapper reads is looked at here, with stand-ins for what it imports of lmms-eval.
"""

import json
import os
import shutil
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from media_files import rotated_exif
from PIL import Image
from pipeline import REPOSITORY, edit_json, run
from samples_by_hand import answer, conversation_sample

from benchmarks.quality.analysis import compare_answers
from dct_qwen2vl.checkpoints.hf_folder import load_processor
from dct_qwen2vl.checkpoints.inspection import PROCESSOR
from dct_qwen2vl.checkpoints.stock_form import to_stock
from dct_qwen2vl.checkpoints.video_sampling import write_sampling
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.evaluation.answering import Answerer
from dct_qwen2vl.evaluation.questions import Question
from task_encoder import QwenTaskEncoder

PYTHON = os.environ.get("LMMS_EVAL_PYTHON") or (sys.executable if find_spec("lmms_eval") else None)
needs_lmms_eval = pytest.mark.skipif(PYTHON is None, reason="lmms-eval is not installed, LMMS_EVAL_PYTHON not set")

MAX_PIXELS, MAX_NEW_TOKENS = 112 * 112, 6
TASK = """\
task: shapes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes.visuals
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {tokens}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """\
from PIL import Image


def visuals(doc):
    return [Image.open(path) if path.endswith(".png") else path for path in doc["media"]]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory, natural_frames, image_file, video_file) -> tuple[Path, list[dict]]:
    """A folder with the task, and its questions: on one image, on two, on a video, on nothing."""
    folder = tmp_path_factory.mktemp("task")
    for number in range(2):
        image = natural_frames(1, 100 + 40 * number, 150, number)[0]
        (folder / f"{number}.png").write_bytes(image_file(image, "PNG"))
    (folder / "video.mp4").write_bytes(video_file(natural_frames(8, 112, 112, 5)))
    asked = [
        ("What colour is the circle?", ["0.png"]),
        ("How many squares are there?", ["0.png", "1.png"]),
        ("What colour is the circle?", ["video.mp4"]),
        ("How many squares are there?", []),
    ]
    docs = [
        {"question": question, "answer": "red", "media": [str(folder / name) for name in names]}
        for question, names in asked
    ]
    data = folder / "shapes.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "shapes.yaml").write_text(TASK.format(data=data, tokens=MAX_NEW_TOKENS))
    (folder / "shapes.py").write_text(FUNCTIONS)
    return folder, docs


def expected_answers(model_dir: Path, docs: list[dict]) -> list[str]:
    answerer = Answerer(model_dir, MAX_NEW_TOKENS, VideoSampling(max_frames=64), max_pixels=MAX_PIXELS)
    said = []
    for doc in docs:
        kinds = ["image" if path.endswith(".png") else "video" for path in doc["media"]]
        data = [Path(path).read_bytes() for path in doc["media"]]
        media = [(kind, answerer.media.read(kind, content)) for kind, content in zip(kinds, data)]
        pieces = [piece for kind, _ in media for piece in ("", kind)]
        said += answerer.answer([Question("", 0, "", (*pieces, doc["question"]), "", tuple(media))])
    return [text.strip() for text in said]


@pytest.fixture(scope="module")
def logged(task, prepared, tmp_path_factory) -> dict[str, Path]:
    """Folders of what lmms-eval wrote about each model."""
    folder, folders = task[0], {}
    for form, model_dir in (("pixels", prepared.pixel_model), ("x4", prepared.model)):
        folders[form] = tmp_path_factory.mktemp(form) / "results"
        model = ["--model", "qwen2_vl_dct", "--model_args", f"pretrained={model_dir},max_pixels={MAX_PIXELS}"]
        tasks = ["--include_path", str(folder), "--tasks", "shapes", "--batch_size", "1"]
        output = ["--log_samples", "--output_path", str(folders[form])]
        offline = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folders[form].parent / "cache")}
        done = run(
            [PYTHON, "-m", "benchmarks.quality.lmms_eval_model", *model, *tasks, *output], check=False, **offline
        )
        written = list(folders[form].rglob("*samples*.jsonl"))  # lmms-eval's exit status is 0 after errors, too
        assert done.returncode == 0 and len(written) == 1, (done.stdout + done.stderr)[-3000:]
    return folders


@needs_lmms_eval
@pytest.mark.parametrize("form", ["pixels", "x4"])
def test_lmms_eval_is_given_the_same_answers(form, task, prepared, logged):
    (log,) = logged[form].rglob("*samples*.jsonl")
    lines = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda line: line["doc_id"])
    found = [line["filtered_resps"] for line in lines]
    assert found == expected_answers(prepared.model if form == "x4" else prepared.pixel_model, task[1])
    assert len(set(found)) > 1


@needs_lmms_eval
def test_what_lmms_eval_logged_is_compared(logged, capsys):
    given = [f"{form}={folder}" for form, folder in logged.items()]
    assert compare_answers.main(["--answers", *given]) == 0
    said = capsys.readouterr().out
    assert "| task | questions | pixels | x4 |" in said and "| shapes | 4 |" in said
    assert "shapes, x4 - pixels, over 4 questions:" in said


# What the wrapper reads


class StandIn:
    """For lmms-eval's base class, for its requests and for accelerate's Accelerator."""

    local_process_index, num_processes = 0, 1


@pytest.fixture
def wrapper(monkeypatch) -> type:
    """The wrapper's class."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = {"lmms_eval": "", "lmms_eval.api": "", "lmms_eval.api.instance": "Instance",
               "lmms_eval.api.model": "lmms", "accelerate": "Accelerator"}  # fmt: skip
    for name, wanted in modules.items():
        module = ModuleType(name)
        setattr(module, wanted, StandIn)
        monkeypatch.setitem(sys.modules, name, module)
    path = REPOSITORY / "benchmarks" / "quality" / "lmms_eval_model.py"
    specification = spec_from_file_location("lmms_eval_model_with_stand_ins", path)
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.Qwen2VLWithDCT


@pytest.mark.parametrize("form", ["pixels", "x4"])
def test_the_wrapper_reads_media_as_training_does(
    wrapper, prepared, form, tmp_path, image_file, video_file, natural_frames
):
    """An image that is turned and over the bounds, as PIL has it and as a file, and a 4:2:0 video."""
    png = image_file(natural_frames(1, 100, 400)[0], "PNG", exif=rotated_exif(6))
    mp4 = video_file(natural_frames(6, 300, 420), rate=2)
    (tmp_path / "a.PNG").write_bytes(png)
    (tmp_path / "a.mp4").write_bytes(mp4)
    visuals = [Image.open(tmp_path / "a.PNG"), str(tmp_path / "a.PNG"), str(tmp_path / "a.mp4")]
    model_dir = prepared.pixel_model if form == "pixels" else prepared.model
    model = wrapper(str(model_dir), max_pixels=str(MAX_PIXELS), video_max_frames=4)
    model.task_dict = {"task": {"test": [None]}}
    asked = model._question(SimpleNamespace(args=("What?", {}, lambda doc: visuals, 0, "task", "test")))
    seen = model.answerer.model_inputs([asked])
    media = [("image", png), ("image", png), ("video", mp4)]
    processor = load_processor(model_dir, max_pixels=MAX_PIXELS)
    encoder = QwenTaskEncoder(
        processor.tokenizer, processor.image_processor, video_sampling=VideoSampling(max_frames=4)
    )
    learned = encoder.encode(conversation_sample(answer("What?", "red"), *media))
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(seen[name], getattr(learned, name)), name
    length = seen["input_ids"].shape[1]
    assert seen["input_ids"][0].tolist() == learned.input_ids[:length].tolist()


def test_the_wrapper_takes_a_stock_form_and_its_sampling(wrapper, prepared, tmp_path, video_file, natural_frames):
    model_dir, stock = Path(shutil.copytree(prepared.model, tmp_path / "model")), tmp_path / "stock"
    write_sampling(model_dir, {"fps": 1.0, "min_frames": 2, "max_frames": 6})
    to_stock(model_dir, stock)
    (tmp_path / "a.mp4").write_bytes(video_file(natural_frames(24, 112, 112), rate=2))
    frames = {"of training": {}, "given": {"video_max_frames": "4"}, "untrained": {}}
    for name, options in frames.items():
        model = wrapper(str(prepared.model if name == "untrained" else stock), **options)
        kind, read = model._read(str(tmp_path / "a.mp4"))
        frames[name] = len(read.luma if name == "untrained" else read)
    assert kind == "video" and frames == {"of training": 6, "given": 4, "untrained": 24}
    assert type(wrapper(str(stock)).answerer.processor.image_processor).__name__ == "Qwen2VLImageProcessor"


def test_the_wrapper_says_once_that_a_stock_form_cannot_skip(wrapper, prepared, tmp_path, capsys, monkeypatch):
    for name, skipping in (("plain", {}), ("skipping", {"skip_db": 38.0, "skip_share": 1.0})):
        model_dir = Path(shutil.copytree(prepared.model, tmp_path / name / "hf_dct"))
        edit_json(model_dir / PROCESSOR, **skipping)
        to_stock(model_dir, tmp_path / name / "hf")
        for form in ("hf", "hf_dct"):
            wrapper(str(tmp_path / name / form))
            noted = [line for line in capsys.readouterr().out.splitlines() if "Note" in line]
            assert len(noted) == (1 if skipping and form == "hf" else 0)
            assert all("cells left out at 38 dB (share 1), but it is a stock form" in line for line in noted)
    monkeypatch.setattr(StandIn, "local_process_index", 1)
    wrapper(str(tmp_path / "skipping" / "hf"))
    assert "Note" not in capsys.readouterr().out, "the first process says it"


def test_the_wrapper_has_the_video_settings_of_training(wrapper, prepared):
    given = {"video_fps": "1", "video_min_frames": 2, "video_total_pixels": 10**6}
    model = wrapper(str(prepared.model), max_batch_size=None, **given)
    assert model.answerer.media.sampling == VideoSampling(1.0, 2, 64, 10**6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"video_fps": 0}, "--video-fps must be over 0, got 0.0"),
        ({"video_min_frames": 65}, "--video-min-frames 65 is over --video-max-frames 64: change one of them"),
        ({"video_frames": 2, "fps": 1}, "--model_args: qwen2_vl_dct has no fps, video_frames"),
    ],
)
def test_the_wrapper_refuses_other_settings(wrapper, given, said):
    with pytest.raises(UserError) as refusal:
        wrapper("no-model", **given)
    assert str(refusal.value) == said
