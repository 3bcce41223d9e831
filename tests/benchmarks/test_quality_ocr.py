"""The study of legibility, without its engines and its pages: errors, sheets, what tokens show, results, the figure."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.analysis import ocr_legibility, ocr_report
from benchmarks.quality.ocr import pages
from benchmarks.quality.ocr.engines import ENGINES, enlarged, pages_of
from benchmarks.quality.ocr.errors import bootstrap, compared, edit_distance, error_rate
from benchmarks.quality.ocr.pages import PageLine, drawn_sheet, is_running_text, overlap, padded, page_line, pixel_box
from benchmarks.quality.ocr.shown import LUMA, VIEWS, coloured, colours, compressed, tokenizer, visual_tokens
from benchmarks.quality.result_files import Output
from dct_qwen2vl.common.scripts import UserError

LINES = ["A line of print that is read", "Another one, with more words in it"]


def recursive_distance(read: str, true: str) -> int:
    """Levenshtein's definition as it stands."""
    if not read or not true:
        return len(read) + len(true)
    changed = recursive_distance(read[1:], true[1:]) + (read[0] != true[0])
    return min(changed, recursive_distance(read[1:], true) + 1, recursive_distance(read, true[1:]) + 1)


# Errors


@pytest.mark.parametrize(
    ("read", "true", "distance"),
    [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ba", "ab", 2)],
)
def test_known_distances(read, true, distance):
    assert edit_distance(read, true) == distance


def test_distances_are_those_of_the_definition():
    rng = random.Random(0)
    for _ in range(60):
        read, true = ("".join(rng.choices("abc", k=rng.randrange(6))) for _ in range(2))
        assert edit_distance(read, true) == recursive_distance(read, true)


def test_what_looks_alike_and_white_space_do_not_count():
    assert compared("“ﬁne” – it’s\t1\n") == '"fine"-it\'s1'
    assert compared("colour") != compared("color")


def test_the_rate_is_of_all_characters_and_the_interval_over_pages():
    wrong, characters = np.array([0, 30, 0, 0]), np.array([100, 100, 50, 50])
    assert error_rate(wrong, characters) == pytest.approx(0.1)
    low, high = bootstrap(wrong, characters)
    assert low == 0 and 0.1 < high <= 0.3
    assert bootstrap(np.array([5, 10]), np.array([50, 100])) == (pytest.approx(0.1), pytest.approx(0.1))


# Sheets


def test_a_line_has_its_box_from_the_top_of_the_page_and_its_widest_gap():
    boxes = [(10.0, 80.0, 15.0, 90.0), (15.0, 80.0, 15.0, 80.0), (40.0, 78.0, 45.0, 88.0)]
    line = page_line(list("a b"), boxes, 100.0)
    assert line == PageLine("a b", (10.0, 10.0, 45.0, 22.0), 25.0)


@pytest.mark.parametrize(
    ("raw", "gap", "kept"),
    [
        ("This is a line of running text.", 4.0, True),
        ("This is a “line” of running text.", 4.0, True),
        ("too short a line", 4.0, False),
        ("This is a line of a table, with a gap", 31.0, False),
        ("A heading in the contents . . . . . 7", 4.0, False),
        ("This is a formula with α, β and γ in it", 4.0, False),
    ],
)
def test_running_text(raw, gap, kept):
    assert is_running_text(PageLine(raw, (0, 0, 1, 1), gap)) == kept


def test_lines_beside_each_other_overlap():
    first, beside, below = (PageLine("", (0, top, 9, top + 10)) for top in (0, 4, 11))
    assert overlap(first, beside) and not overlap(first, below)


def test_boxes_hold_the_print_at_every_resolution():
    assert pixel_box((72.0, 72.0, 144.0, 82.0), 1.0) == (69, 70, 147, 84)
    assert pixel_box((0.0, 0.0, 144.0, 82.0), 0.5)[:2] == (0, 0)


def test_padding_is_ground_to_the_right_and_below():
    page = padded(np.zeros((113, 112), np.uint8))
    assert page.shape == (224, 112) and (page[113:] == 255).all() and not page[:113].any()


def test_drawn_print_lies_in_its_boxes_and_has_the_height_asked_for():
    sheet = drawn_sheet("a page", LINES, 8)
    assert [line.text for line in sheet.lines] == [compared(line) for line in LINES]
    outside = sheet.grey.copy()
    for left, top, right, bottom in (line.box for line in sheet.lines):
        assert (sheet.grey[top:bottom, left:right] < 128).any()
        outside[top:bottom, left:right] = 255
    assert (outside == 255).all() and all(side % 112 == 0 for side in sheet.grey.shape)
    rows = 255 - drawn_sheet("", ["H"], 8).grey.min(axis=1).astype(float)
    assert rows.sum() / rows.max() == pytest.approx(8, abs=0.3)


def test_pages_are_missing_is_one_line(tmp_path, capsys):
    command = ["--output", str(tmp_path / "ocr"), "--manuals", str(tmp_path), "--engines", "tesseract"]
    assert ocr_legibility.main(command) == 1
    assert "apt-get install" in capsys.readouterr().err and not (tmp_path / "ocr").exists()


def test_missing_packages_are_one_line_with_what_to_type(tmp_path):
    Path(tmp_path, "R-intro.pdf").write_bytes(b"%PDF-1.4")
    program = f"""
import sys
from pathlib import Path
sys.modules["pypdfium2"] = None
from benchmarks.quality.ocr.pages import Manuals
Manuals(Path({str(tmp_path)!r}), 1, 1, 0)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stderr.rstrip().endswith(pages.missing("pypdfium2"))


def test_requirements_pin_versions_and_name_no_package_of_the_product(pytestconfig):
    lines = (pytestconfig.rootpath / "benchmarks" / "quality" / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    product = (pytestconfig.rootpath / "requirements.txt").read_text()
    assert "pypdfium2" in pins and [name for name in pins if name in product] == []


# What tokens show


@pytest.fixture(scope="module")
def sheet() -> np.ndarray:
    return coloured(drawn_sheet("", LINES, 8).grey, (0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("view", ["as-is", "x4"])
def test_black_print_is_kept_whole(view, sheet):
    assert np.array_equal(VIEWS[view].show(sheet), sheet)


def test_views_of_as_many_tokens_keep_less_in_this_order(sheet):
    error = {name: float(np.square(view.show(sheet).astype(float) - sheet).mean()) for name, view in VIEWS.items()}
    assert 0 == error["x4"] < error["x4-588"] < error["half-size"] < error["quarter-size"]
    assert error["x16"] < error["quarter-size"]


def test_the_smaller_x4_has_as_many_numbers_as_a_patch():
    config = tokenizer("x4-588").config
    assert config.num_coefficients == 588 and config.block == (1, 28, 28) and config.chroma == "420"


def test_tokens_are_counted_in_the_language_model(sheet):
    tokens = [visual_tokens(np.zeros((224, 112, 3)), view) for view in VIEWS]
    assert tokens == [32, 8, 8, 8, 2, 2]


def test_half_size_is_what_a_lower_max_pixels_shows(sheet):
    height, width = sheet.shape[:2]
    small = Image.fromarray(sheet).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    shown = Image.fromarray(VIEWS["half-size"].show(sheet))
    again = np.asarray(shown.resize(small.size, Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(again - np.asarray(small)).mean() < 3


def test_colours_are_as_far_apart_as_their_kind_says():
    rng = np.random.default_rng(0)
    for kind, least, most in (("coloured", 80, 255), ("equal-luma", 0, 0.5)):
        for _ in range(20):
            ink, ground = (np.array(colour) for colour in colours(kind, rng))
            assert least <= abs((ink - ground) @ LUMA) <= most and np.abs(ink - ground).max() > 50
            assert min(*ink, *ground) >= 0 and max(*ink, *ground) <= 255
    assert colours("black", rng) == ((0, 0, 0), (255, 255, 255))


def test_ink_and_ground_stand_where_print_is_black_and_white():
    image = coloured(np.array([[0, 255]], np.uint8), (10, 20, 30), (200, 100, 50))
    assert image.tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_print_told_from_its_ground_by_colour_alone_loses_its_edges_and_black_print_none():
    """4:2:0 has colour at half the resolution, as JPEG has."""
    grey = drawn_sheet("", LINES, 8).grey
    ink, ground = colours("equal-luma", np.random.default_rng(0))
    image = coloured(grey, ink, ground).astype(float)
    inside = grey < 255
    assert np.abs(VIEWS["x4"].show(image.astype(np.uint8)) - image)[inside].mean() > 10


def test_jpeg_changes_little_and_keeps_the_size(sheet):
    small = compressed(sheet)
    assert small.shape == sheet.shape and 0 < np.abs(small.astype(float) - sheet).mean() < 10


# Engines and results


def test_lines_are_enlarged_with_their_proportions():
    assert enlarged(np.zeros((12, 100, 3), np.uint8)).shape == (48, 400, 3)


@pytest.mark.parametrize("printed", ["one\n\ftwo\n", "one\n\ftwo\n\f"])
def test_texts_of_tesseract_are_told_apart(printed):
    run = subprocess.CompletedProcess([], 0, printed, "")
    assert pages_of(run, 2) == ["one\n", "two\n"]


def test_an_empty_last_line_is_a_line():
    assert pages_of(subprocess.CompletedProcess([], 0, "one\n\f", ""), 2) == ["one\n", ""]


@pytest.mark.parametrize(("status", "printed"), [(0, "one"), (1, "one\n\ftwo\n")])
def test_a_line_that_tesseract_did_not_read_is_an_error(status, printed):
    run = subprocess.CompletedProcess([], status, printed, "Page 0\nno memory\n")
    with pytest.raises(UserError, match="of 2 lines: no memory"):
        pages_of(run, 2)


def conditions(*arguments: str) -> list[ocr_legibility.Condition]:
    return list(ocr_legibility.conditions(ocr_legibility.parse_arguments(["--output", "x", *arguments])))


def test_all_inks_and_compressions_are_read_at_one_size_of_each_source():
    kinds = {(c.source, c.size, c.ink, c.compression) for c in conditions()}
    full = [kind for kind in kinds if kind[:2] in (("pages", 75), ("drawn", 8))]
    assert len(full) == 12 and len(kinds) == 16
    assert {kind[2:] for kind in kinds.difference(full)} == {("black", "clean")}
    assert len({c.name for c in conditions("--seeds", "0", "1")}) == 16 * 6 * 2 * 2


def test_edits_of_all_lines_of_a_sheet_are_counted():
    condition = conditions("--dpi", "--heights", "8", "--views", "x4", "--engines", "tesseract")[0]
    sheet = drawn_sheet("a page", LINES, 8)
    image = ocr_legibility.shown(sheet, 0, condition)
    read = ["A line of print that is bread", "Another one, with words in it"]
    assert ocr_legibility.read_sheet(image, sheet, lambda lines: read) == (5, sum(len(compared(x)) for x in LINES))


def test_pages_have_colours_of_their_own_the_same_for_all_views():
    every = conditions("--dpi", "75", "--heights", "--engines", "tesseract", "--views", "as-is", "half-size")
    first, half = (c for c in every if (c.ink, c.compression) == ("coloured", "clean"))
    sheet = drawn_sheet("a page", LINES, 8)
    ground = [ocr_legibility.shown(sheet, number, first)[0, 0].tolist() for number in (0, 1)]
    assert ground[0] != ground[1]
    assert ocr_legibility.shown(sheet, 0, half)[0, 0].tolist() == ground[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_reads_large_print(engine):
    try:
        reader = ENGINES[engine](1)
    except UserError as error:
        pytest.skip(str(error))
    sheet = drawn_sheet("", LINES, 16)
    image = coloured(sheet.grey, (0, 0, 0), (255, 255, 255))
    assert ocr_legibility.read_sheet(image, sheet, reader)[0] <= 2


def result(view: str, size: int, rate: float, engine: str = "pp-ocrv4") -> dict:
    condition = ocr_legibility.Condition("pages", size, "black", "clean", view, engine, 0, 2, 2)
    ocr = json.loads(json.dumps(condition.__dict__))
    return {"name": condition.name, "finished": True, "ocr": ocr, "error_rate": rate, "interval": [rate / 2, 2 * rate]}


def test_the_report_has_a_line_for_each_sheet_and_engine_and_draws(tmp_path, capsys):
    output = Output.at(tmp_path / "mine.jsonl", "ocr")
    for size in (100, 75):
        for engine in ("pp-ocrv4", "tesseract"):
            output.record(result("half-size", size, 0.428, engine))
            output.record(result("x4", size, 0.007, engine))
    figure = tmp_path / "legibility.png"
    assert ocr_report.main(["--results", str(tmp_path / "mine"), "--figure", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| what is read | engine | half-size page | x4 |" and len(lines) == 7
    assert lines[2] == "| pages, 75 dpi, black, clean | PP-OCRv4 | 42.8 (21.4 to 85.6) | 0.7 (0.4 to 1.4) |"
    with Image.open(figure) as image:
        assert image.width >= 800


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    assert ocr_report.main(["--results", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"ocr_report.py: no results in {tmp_path}: expected .jsonl files of ocr_legibility.py\n"
    )


def test_the_figure_has_a_line_for_each_view():
    assert list(ocr_report.STYLES) == list(VIEWS)
    assert [ocr_report.STYLES[name][1] for name in VIEWS] == [view.share for view in VIEWS.values()]


def test_lines_of_a_page_are_found_where_they_are_printed(tmp_path):
    pytest.importorskip("pypdfium2", reason=pages.missing("pypdfium2"))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2))
    for number, line in enumerate(LINES):
        figure.text(0.1, 0.8 - 0.3 * number, line, fontsize=12)
    figure.savefig(tmp_path / "R-drawn.pdf", metadata={"CreationDate": None})
    manuals = pages.Manuals(tmp_path, 1, 1, 0)
    (sheet,) = manuals.sheets(72)
    ((left, top, right, bottom),) = (line.box for line in sheet.lines)
    assert sheet.name == "R-drawn 1" and sheet.lines[0].text == compared(LINES[1])  # the first one is too short
    assert (sheet.grey[top:bottom, left:right] < 128).any(axis=1).sum() >= 9
    assert (sheet.grey[bottom:] == 255).all() and (sheet.grey[top:, right:] == 255).all()
