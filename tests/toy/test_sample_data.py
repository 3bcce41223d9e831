"""The sample data: every awkward kind is what it claims; the answers are right; the same seed gives the same bytes."""

import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from dct_qwen2vl.toy import drawing, sample_data, sample_plan
from dct_qwen2vl.toy.drawing import COLOURS, Scene

TOTAL = 200
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "out"
    assert sample_data.main(["--output-dir", str(folder), "--num-images", str(TOTAL)]) == 0
    return folder


@pytest.fixture(scope="module")
def entries(output_dir) -> list[dict]:
    return json.loads((output_dir / "data" / "cambrian737k.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def files(output_dir) -> dict[str, bytes]:
    found = {}
    for path in sorted((output_dir / "data").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                assert member.name.startswith(f"{path.stem}/"), f"{member.name} in {path.name}"
                found[member.name] = archive.extractfile(member).read()
    return found


@pytest.fixture(scope="module")
def checkpoint(output_dir) -> Path:
    return output_dir / "model" / "tiny-qwen2-vl"


def media_names(entry: dict) -> list[str]:
    names = entry.get("image", entry.get("video", []))
    return [names] if isinstance(names, str) else names


def of_kind(entries: list[dict], kind: str) -> list[dict]:
    found = [entry for entry in entries if entry["file_kind"] == kind]
    assert found, f"no entry of kind {kind}"
    return found


def facts(entry: dict) -> dict[str, str]:
    return dict(zip(entry["question_type"], sample_data.entry_answers(entry)))


def digests(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def nearest_colour(pixels: np.ndarray) -> str:
    """The named colour of most of the saturated pixels; the background is muted, its channels within about 40."""
    flat = pixels.reshape(-1, 3).astype(int)
    bright = flat[(np.ptp(flat, axis=1) > 90) & (flat.max(axis=1) > 150)]
    assert len(bright) > 100, "nothing colourful in the image"
    table = np.array(list(COLOURS.values()))
    votes = np.argmin(((bright[:, None] - table) ** 2).sum(-1), axis=1)
    return list(COLOURS)[np.bincount(votes).argmax()]


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(output_dir, tmp_path):
    arguments = ["--num-images", str(TOTAL), "--output-dir"]
    assert sample_data.main([*arguments, str(tmp_path / "again")]) == 0
    assert sample_data.main([*arguments, str(tmp_path / "other"), "--seed", "1"]) == 0
    first, again, other = digests(output_dir), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert first == again
    assert first.keys() == other.keys()
    for name in ("data/cambrian737k.json", "data/coco.tar", "data/clips.tar", "model/tiny-qwen2-vl/model.safetensors"):
        assert first[name] != other[name], name


def test_videos_are_the_same_bytes_whatever_the_cpu():
    """x264's code for AVX-512 rounds otherwise than its plain code, which every CPU could run."""
    scene = Scene("cyan", "circle", motion="left")
    for seed in range(6):
        frames = drawing.draw_video(np.random.default_rng(seed), scene, 8)
        plain = io.BytesIO()
        with av.open(plain, "w", format="mp4") as container:
            options = {"preset": "veryfast", "crf": "16", "x264-params": "asm=0"}
            stream = container.add_stream("libx264", rate=4, width=112, height=112, pix_fmt="yuv420p", options=options)
            stream.codec_context.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        assert drawing.encode_video(frames, 4, "libx264") == plain.getvalue(), seed


def test_refuses_to_overwrite_and_leaves_what_is_there(output_dir, capsys):
    before = digests(output_dir)
    assert sample_data.main(["--output-dir", str(output_dir), "--num-images", "100"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--force" in message and str(output_dir) in message
    assert digests(output_dir) == before


def test_too_few_images_is_a_wrong_argument(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample_data.main(["--output-dir", str(tmp_path / "out"), "--num-images", "99"])
    assert stopped.value.code == 2
    assert "at least 100" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_over(output_dir):
    assert sorted(path.name for path in output_dir.iterdir()) == ["data", "model", "summary.json"]


def test_tars_have_fixed_dates_and_owners(output_dir):
    paths = sorted((output_dir / "data").glob("*.tar"))
    assert [path.stem for path in paths] == ["clips", "coco", "gqa", "ocr_vqa", "vg"]
    for path in paths:
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


# ---------------------------------------------------------------------------------------------------------------------
# Every awkward kind


@pytest.mark.parametrize(
    ("kind", "file_format", "mode"),
    [
        ("jpeg", "JPEG", "RGB"),
        ("png", "PNG", "RGB"),
        ("grey_jpeg", "JPEG", "L"),
        ("palette_png", "PNG", "P"),
        ("rgba_png", "PNG", "RGBA"),
        ("cmyk_jpeg", "JPEG", "CMYK"),
        ("grey16_png", "PNG", "I;16"),
        ("exif_jpeg", "JPEG", "RGB"),
        ("animated_gif", "GIF", "P"),
    ],
)
def test_images_are_of_the_kind_they_claim(entries, files, kind, file_format, mode):
    for entry in of_kind(entries, kind):
        for name in media_names(entry):
            image = Image.open(io.BytesIO(files[name]))
            assert (image.format, image.mode) == (file_format, mode)
            assert getattr(image, "n_frames", 1) == (4 if kind == "animated_gif" else 1)
            image.load()


def test_rgba_is_transparent_somewhere_and_16_bit_grey_uses_its_range(entries, files):
    for entry in of_kind(entries, "rgba_png"):
        alpha = np.asarray(Image.open(io.BytesIO(files[entry["image"]])))[..., 3]
        assert set(np.unique(alpha)) <= {0, 255} and 255 in alpha
    for entry in of_kind(entries, "grey16_png"):
        assert np.asarray(Image.open(io.BytesIO(files[entry["image"]]))).max() > 20000


def test_every_exif_orientation_is_there_and_the_stored_size_is_the_turned_one(entries, files):
    seen = set()
    for entry in of_kind(entries, "exif_jpeg"):
        image = Image.open(io.BytesIO(files[entry["image"]]))
        orientation = image.getexif()[274]
        seen.add(orientation)
        turned = ImageOps.exif_transpose(image)
        assert (turned.size == image.size) == (orientation in (2, 3, 4))
    assert seen == {2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("orientation", drawing.ORIENTATIONS)
def test_undoing_the_orientation_gives_the_image_that_was_drawn(orientation):
    rng = np.random.default_rng(3)
    pixels, opaque = drawing.draw_scene(rng, Scene("red", digit="7"), 112, 168)
    content = drawing.encode_image(rng, pixels, "exif_jpeg", orientation, opaque)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))).astype(int)
    assert turned.shape == (112, 168, 3)
    assert np.abs(turned - pixels).mean() < 8  # JPEG; any other turn is above 20
    assert np.abs(turned[::-1, ::-1] - pixels).mean() > 20


@pytest.mark.parametrize(("kind", "codec"), [("mp4_h264", "h264"), ("mp4_mpeg4", "mpeg4")])
def test_videos_play(entries, files, kind, codec):
    for entry in of_kind(entries, kind):
        with av.open(io.BytesIO(files[entry["video"]])) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            assert stream.codec_context.name == codec
            assert (int(stream.average_rate), frames) in drawing.VIDEO_FORMS
            assert 2.0 <= frames / stream.average_rate <= 4.0


def test_missing_and_broken_media(entries, files):
    assert all(entry["image"] not in files for entry in of_kind(entries, "missing"))
    assert all(files[entry["image"]] == b"" for entry in of_kind(entries, "zero_byte"))
    for entry in of_kind(entries, "garbage"):
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(files[entry["image"]]))
    for entry in of_kind(entries, "truncated"):
        image = Image.open(io.BytesIO(files[entry["image"]]))  # the header is whole
        with pytest.raises(OSError, match="truncated"):
            image.load()
    for entry in of_kind(entries, "broken_video"):
        with pytest.raises(av.error.InvalidDataError):
            av.open(io.BytesIO(files[entry["video"]]))


def test_everything_else_is_in_the_tars_and_every_file_is_asked_about(entries, files):
    named = {name for entry in entries if entry["file_kind"] != "missing" for name in media_names(entry)}
    assert named == set(files)


def test_conversations_come_in_every_form(entries):
    by_kind = defaultdict(list)
    for entry in entries:
        by_kind[entry["dialogue_kind"]].append(entry)
    assert {turn["role"] for entry in by_kind["openai"] for turn in entry["conversations"]} == {"user", "assistant"}
    assert all(entry["conversations"][0]["from"] == "system" for entry in by_kind["system"])
    assert all(len(entry["image"]) == 2 for entry in by_kind["two_images"]) and by_kind["two_images"]
    assert all(len(entry["question_type"]) == 1 for entry in by_kind["one_turn"])
    assert max(len(entry["question_type"]) for entry in by_kind["turns"]) == 3
    assert not any(json.dumps(entry, ensure_ascii=False).isascii() for entry in by_kind["non_ascii"])
    shared = Counter(media_names(entry)[0] for entry in by_kind["two_entries"])
    assert 2 in shared.values() and set(shared.values()) <= {1, 2}
    assert all("image" not in entry and "video" not in entry for entry in of_kind(entries, "text_only"))


def test_one_placeholder_for_each_image_and_video_and_one_type_for_each_answer(entries):
    for entry in entries:
        text = "".join(turn.get("value", turn.get("content")) for turn in entry["conversations"])
        media = len(media_names(entry))
        assert text.count("<video>" if "video" in entry else "<image>") == media
        assert text.count("<image>") + text.count("<video>") == media
        assert len(entry["question_type"]) == len(sample_data.entry_answers(entry)) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_the_colour_answered_is_the_colour_in_the_image(entries, files):
    checked = 0
    for entry in entries:
        answer = facts(entry).get("colour")
        if answer is None or "image" not in entry or entry["file_kind"] in sample_data.UNREADABLE:
            continue
        for name in media_names(entry):
            assert nearest_colour(np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))) == answer, name
            checked += 1
    assert checked > 100


def test_the_count_answered_is_the_number_of_shapes(entries, files):
    from scipy import ndimage

    checked = 0
    for entry in entries:
        answer = facts(entry).get("count")
        if answer is None or entry["file_kind"] not in ("jpeg", "png"):
            continue
        pixels = np.asarray(Image.open(io.BytesIO(files[entry["image"]]))).astype(int)
        labels, found = ndimage.label(np.ptp(pixels, axis=-1) > 80)
        areas = ndimage.sum_labels(np.ones_like(labels), labels, range(1, found + 1))
        assert np.count_nonzero(areas > 100) == int(answer), entry["image"]
        checked += 1
    assert checked > 40


def test_shapes_fill_the_share_of_their_box_that_geometry_says():
    # circle pi/4, square 1, triangle 1/2, cross of variants a third wide 1 - (2/3)^2
    expected = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "cross": 0.56}
    for shape, share in expected.items():
        mask = drawing.shape_mask(shape, 20, (2.0, -3.0))
        rows, columns = np.flatnonzero(mask.max(1) > 0.5), np.flatnonzero(mask.max(0) > 0.5)
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert mask.sum() / box == pytest.approx(share, abs=0.04), shape
        assert mask.min() >= 0.0 and mask.max() == 1.0


def test_the_motion_answered_is_where_the_video_goes(entries, files):
    rows_columns = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    checked = 0
    for entry in entries:
        answer = facts(entry).get("motion")
        if answer is None or entry["file_kind"] not in ("mp4_h264", "mp4_mpeg4"):
            continue
        with av.open(io.BytesIO(files[entry["video"]])) as container:
            frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
        centres = [np.argwhere(np.ptp(frame, axis=-1) > 80).mean(0) for frame in (frames[0], frames[-1])]
        way = (centres[1] - centres[0]) / np.linalg.norm(centres[1] - centres[0])
        assert way == pytest.approx(rows_columns[answer], abs=0.1), entry["video"]
        checked += 1
    assert checked > 10


def test_digits_differ_from_each_other_in_print():
    masks = {digit: drawing.glyph_mask(digit, 32, (0.0, 0.0)) for digit in "0123456789"}
    for first, second in [(a, b) for a in masks for b in masks if a < b]:
        assert np.abs(masks[first] - masks[second]).sum() > 20, (first, second)
    heights = [np.count_nonzero(mask.max(1) > 0.5) for mask in masks.values()]
    assert min(heights) >= 20 and max(heights) <= 25


def test_plans_are_balanced_so_that_a_guess_stays_at_chance():
    items = sample_plan.plan_items(np.random.default_rng(0), 2000)
    for question_type, choices in (("colour", 6), ("shape", 4), ("count", 4), ("digits", 10), ("motion", 4)):
        answers = Counter(item.scene.answers().get(question_type) for item in items)
        del answers[None]
        assert len(answers) == choices
        assert max(answers.values()) <= 1.05 * min(answers.values()) + 1, answers


def test_one_answer_does_not_tell_another():
    items = sample_plan.plan_items(np.random.default_rng(0), 2400)
    for first, second in (("colour", "shape"), ("shape", "count"), ("colour", "digits"), ("colour", "motion")):
        pairs = Counter((item.scene.answers().get(first), item.scene.answers().get(second)) for item in items)
        pairs = {pair: count for pair, count in pairs.items() if None not in pair}
        assert max(pairs.values()) <= 1.2 * min(pairs.values()) + 1, pairs


def test_most_of_the_default_data_is_plain_jpeg_and_enough_of_it_can_be_read():
    items = sample_plan.plan_items(
        np.random.default_rng(0), sample_data.parse_arguments(["--output-dir", "x"]).num_images
    )
    images = [item for item in items if item.scene.motion is None]
    assert len(items) >= 2000
    assert sum(item.file_kind == "jpeg" for item in images) / len(images) > 0.8


def test_summary_adds_up(output_dir, entries):
    summary = json.loads((output_dir / "summary.json").read_text())
    assert summary["entries"] == len(entries) == summary["readable"] + sum(summary["unreadable"].values())
    assert set(summary["unreadable"]) == set(sample_data.UNREADABLE)
    assert summary["file_kinds"] == dict(Counter(entry["file_kind"] for entry in entries))


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint


def test_stock_transformers_loads_the_checkpoint_and_runs_it(checkpoint, entries, files):
    import torch
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(processor, Qwen2VLProcessor)
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert 300_000 < model.num_parameters() < 2_000_000
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    content = [{"type": "image"}, {"type": "text", "text": "Name the colour."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(io.BytesIO(files[of_kind(entries, "png")[0]["image"]]))
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 3 * 2 * 14 * 14
    answer = model.generate(**inputs, max_new_tokens=2)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert torch.isfinite(model(**inputs).logits).all()


def test_special_tokens_are_single_ids_that_the_configuration_names(checkpoint):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer, config = AutoTokenizer.from_pretrained(checkpoint), AutoConfig.from_pretrained(checkpoint)
    from dct_qwen2vl.toy.model import SPECIAL_TOKENS

    ids = {token: tokenizer.encode(token) for token in SPECIAL_TOKENS}
    assert all(len(found) == 1 for found in ids.values())
    assert len({found[0] for found in ids.values()}) == 14
    assert config.image_token_id == ids["<|image_pad|>"][0]
    assert config.video_token_id == ids["<|video_pad|>"][0]
    assert config.vision_start_token_id == ids["<|vision_start|>"][0]
    assert config.vision_end_token_id == ids["<|vision_end|>"][0]
    assert tokenizer.eos_token == "<|im_end|>" and config.eos_token_id == ids["<|im_end|>"][0]
    assert tokenizer.pad_token == "<|endoftext|>" and config.pad_token_id == ids["<|endoftext|>"][0]
    assert len(tokenizer) <= config.vocab_size
    eos = GenerationConfig.from_pretrained(checkpoint).eos_token_id
    assert eos == [ids["<|im_end|>"][0], ids["<|endoftext|>"][0]]
    assert sum(config.rope_scaling["mrope_section"]) * 2 == config.hidden_size // config.num_attention_heads


def test_tokenizer_round_trips_and_answers_are_short(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in (
        "What colour do you see?\n",
        "  two  spaces",
        "¿Qué? 这是什么颜色？ ➡️ \U0001f600",
        "0123456789",
        "a\r\n\tb",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for answer in (*COLOURS, *drawing.SHAPES, *drawing.DIRECTIONS, *"0123456789"):
        assert len(tokenizer.encode(answer)) == 1, answer


def test_chat_template_renders_the_format_of_qwen2_vl(checkpoint):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Sure?"},
    ]
    vision = "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
    turns = (
        f"<|im_start|>user\n{vision}What is it?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
    )
    assert processor.apply_chat_template(messages) == DEFAULT_SYSTEM + turns
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == DEFAULT_SYSTEM + turns + "<|im_start|>assistant\n"
    system = [{"role": "system", "content": "Be brief."}, *messages]
    assert processor.apply_chat_template(system) == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns
    assert processor.tokenizer.apply_chat_template(messages, tokenize=False) == DEFAULT_SYSTEM + turns
