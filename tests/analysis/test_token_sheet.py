"""The sheet of what tokens keep: its figures against plain arithmetic, its layout, the command line."""

import itertools
import math
import re
import sys
from pathlib import Path

import av
import matplotlib
import numpy as np
import pytest
from PIL import Image

from dct_qwen2vl.analysis import coefficient_masks, sheet_canvas, skipped_cells, token_measures, token_sheet
from dct_qwen2vl.analysis.sheet_canvas import Canvas
from dct_qwen2vl.analysis.token_measures import measure, worst_window
from dct_qwen2vl.data.media_encoder import MediaEncoder
from dct_qwen2vl.data.videos import decode_video
from dct_qwen2vl.dct import (
    configuration_dct,
    image_colours_dct,
    image_inputs_dct,
    image_processing_dct,
    image_sizes_dct,
    skipping_dct,
    transform_dct,
)
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.dct.transform_dct import DCTTokenizer
from dct_tokenizer import DCTConfig, target_size

PRESETS = [DCTConfig.preset(name) for name in ("exact", "x4", "x16")]


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((found.astype(float) - expected) ** 2))


def save(path: Path, frames: np.ndarray, video_file=None) -> Path:
    if video_file is None:
        Image.fromarray(frames).save(path)
    else:
        path.write_bytes(video_file(frames))
    return path


# Figures


def test_measured_figures_are_those_of_the_tokens(natural_frames):
    frames, config = natural_frames(11, 112, 224), PRESETS[1]  # an odd number, and more than are encoded at once
    result = measure(frames, config, [0, 7, 10])
    tokens, grid = DCTTokenizer(config).encode(frames)
    decoded = DCTTokenizer(config).decode(tokens, grid).numpy()[:11]
    assert result.tokens == len(tokens) == 6 * 4 * 8
    np.testing.assert_array_equal(result.decoded, decoded[[0, 7, 10]])
    assert result.psnr == pytest.approx(psnr(decoded, frames), abs=1e-9)
    difference = np.abs(decoded.astype(float) - frames)[[0, 7, 10]]
    np.testing.assert_allclose(result.error, difference.mean(axis=-1), atol=1e-4)
    half = [Image.fromarray(frame).resize((112, 56), Image.Resampling.LANCZOS) for frame in frames]
    enlarged = np.stack([np.asarray(image.resize((224, 112), Image.Resampling.BICUBIC)) for image in half])
    assert result.pixels_psnr == pytest.approx(psnr(enlarged, frames), abs=1e-9)


def test_nothing_is_lost_by_exact(natural_frames):
    frames = natural_frames(2, 56, 84)
    result = measure(frames, PRESETS[0], [0, 1])
    np.testing.assert_array_equal(result.decoded, frames)
    assert result.psnr == result.pixels_psnr == math.inf and not result.error.any()
    assert token_measures.describe(result, 2, 56, 84)[-1] == "every byte is kept"


@pytest.mark.parametrize(
    ("frames", "bt", "side"),
    [(1, 2, 56), (1, 1, 56), (1, 4, 56), (4, 2, 56), (8, 8, 28), (8, 1, 79), (9, 4, 43)],
)
def test_as_many_tokens_of_pixels(frames, bt, side, natural_frames, monkeypatch):
    """A 112 x 112 px video in blocks of (bt, 28, 28): the side of the smaller image, where 14 px are a pixel patch."""
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest)
    )
    result = measure(natural_frames(frames, 112, 112), DCTConfig.select((bt, 28, 28), "444", 900), [0])
    assert set(sizes) == {(side, side), (112, 112)}
    pixel_tokens = math.ceil(frames / 2) * (side / 14) ** 2
    assert pixel_tokens == pytest.approx(result.tokens, rel=0.03)


def test_words_of_a_preset(natural_frames):
    still = token_measures.describe(measure(natural_frames(1, 112, 112), PRESETS[1], [0]), 1, 112, 112)
    assert still[:3] == [
        "2 x 28 x 28 blocks, 4:2:0, 1,764 floats a token",
        "16 tokens an image, 4 in the language model",
        "28,224 floats an image, 2.25 a pixel (33% are 0)",
    ]
    assert re.fullmatch(r"PSNR \d\d\.\d dB \(as many tokens of pixels: \d\d\.\d dB\)", still[3])
    video = token_measures.describe(measure(natural_frames(4, 112, 112), PRESETS[1], [0]), 4, 112, 112)
    assert video[1:3] == ["32 tokens a video, 8 in the language model", "56,448 floats a video, 1.12 a pixel"]


def test_figures_with_skipping_are_those_of_what_is_shown(natural_frames):
    """Five frames, nothing moves until the last: cells of its place are new, all others are kept once."""
    frames, config = natural_frames(1, 112, 224).repeat(5, axis=0), PRESETS[1]
    frames[4, :56, 56:112] = 255 - frames[4, :56, 56:112]
    result = measure(frames, config, [0, 3, 4], skip_db=38.0)
    whole = measure(frames, config, [0, 3, 4])
    assert whole.kept is None and whole.tokens == 3 * 32
    assert result.kept.sum((1, 2)).tolist() == [8, 0, 1] and result.kept[2, 0, 1]
    assert result.tokens == 9 * 4 and result.share == 9 / 24
    np.testing.assert_array_equal(result.decoded, whole.decoded)
    assert result.psnr == pytest.approx(whole.psnr) and result.pixels_psnr < whole.pixels_psnr
    words = token_measures.describe(result, 5, 112, 224)
    assert words[1] == "36 tokens a video, 9 in the language model (38% kept)"


def test_cells_that_are_left_out_are_tinted():
    frames = np.full((1, 4, 6, 3), 200, np.uint8)
    shown = skipped_cells.tint_skipped(frames, np.array([[[True, False], [False, True]]]))[0]
    expected = np.round(0.2 * 200 + 0.8 * np.array(skipped_cells.TINT))
    for rows, columns, colour in ((slice(2), slice(3), 200), (slice(2), slice(3, 6), expected)):
        assert (shown[rows, columns] == colour).all()
        assert (shown[2:][:, slice(3, 6) if columns == slice(3) else slice(3)] == colour).all()


def test_the_window_where_most_is_lost():
    error = np.random.default_rng(0).uniform(0, 1, (40, 60)).astype(np.float32)
    error[21:30, 33:45] += 2
    sums = {(y, x): error[y : y + 10, x : x + 10].sum() for y in range(31) for x in range(51)}
    assert worst_window(error, 10) == max(sums, key=sums.get)
    assert worst_window(np.zeros((20, 30)), 20) == (0, 0)


@pytest.mark.parametrize(("most", "scale"), [(0, 4), (4, 4), (5, 8), (90, 128), (250, 255)])
def test_the_error_scale_is_a_round_number(most, scale):
    config = PRESETS[0]
    result = token_measures.Result(config, 1, np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8), most), 30.0, 30.0)
    assert token_measures.error_scale([result]) == scale


def test_error_colours_follow_the_scale():
    colours = sheet_canvas.error_image(np.array([[0.0, 4.0, 16.0, 99.0]]), 16)[0]
    expected = [np.round(np.array(matplotlib.colormaps["inferno"](place)[:3]) * 255) for place in (0.0, 0.5, 1.0, 1.0)]
    np.testing.assert_array_equal(colours, expected)


def test_sizes_suit_all_presets(tmp_path, natural_frames):
    path = save(tmp_path / "a.png", natural_frames(1, 300, 500)[0])
    frames, original = token_measures.read_frames(path, token_measures.common_factor(PRESETS, 10**6), 10**6)
    assert original == (300, 500)
    assert frames.shape == (1, *target_size(300, 500, 112, 3136, 10**6), 3) == (1, 336, 448, 3)
    resized = Image.fromarray(natural_frames(1, 300, 500)[0]).resize((448, 336), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(frames[0], np.asarray(resized))


# Layout


def boxes(canvas: Canvas) -> tuple[dict, dict]:
    """Rectangles (left, bottom, right, top) in px of all words, and of all images and axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, renderer = canvas.figure, FigureCanvasAgg(canvas.figure).get_renderer()
    masks = [axis for axes in figure.axes if axes.images for axis in (axes.xaxis, axes.yaxis)]
    shown = [label for axis in masks for label in axis.get_ticklabels() if label.get_text()]
    words = {
        f"{number}: {text.get_text()}": text.get_window_extent(renderer).extents
        for number, text in enumerate([*figure.texts, *shown])
    }
    areas = {f"axes {number}": axes.get_window_extent(renderer).extents for number, axes in enumerate(figure.axes)}
    for number, image in enumerate(figure.images):
        left, right, bottom, top = image.get_extent()
        areas[f"image {number}"] = (left, bottom, right, top)
    return words, areas


def overlap(one, other, slack: float = 1.0) -> bool:
    return (
        min(one[2], other[2]) - max(one[0], other[0]) > slack and min(one[3], other[3]) - max(one[1], other[1]) > slack
    )


LAYOUTS = {
    "image": (1, 448, 560, PRESETS, "a.jpg"),
    "tall image, long name": (1, 672, 112, PRESETS, f"{'name' * 40}.jpg"),
    "large image": (1, 1120, 896, [PRESETS[2]], "a.jpg"),
    "strip": (1, 112, 2240, PRESETS[:2], "a.jpg"),
    "smallest image": (1, 28, 28, [PRESETS[0]], "a.jpg"),
    "odd presets": (
        1,
        240,
        240,
        [
            DCTConfig.select((1, 30, 30), "444", 100, name="one frame"),
            DCTConfig.select((4, 15, 15), "444", 1500, name="a name that is too long for the width of a column"),
        ],
        "a.jpg",
    ),
    "video": (6, 224, 336, PRESETS, "a.mp4"),
    "tall video, one preset": (4, 336, 112, [PRESETS[1]], "a.mp4"),
    "many frames": (12, 112, 224, PRESETS, f"{'name' * 40}.mp4"),
    "long blocks": (8, 112, 112, [DCTConfig.select((8, 28, 28), "420", 4000, name="eight"), PRESETS[1]], "a.mp4"),
    "longest blocks": (4, 112, 112, [DCTConfig.select((16, 28, 28), "444", 4000)], "a.mp4"),
}


def test_cells_of_a_video_are_those_that_training_keeps(tmp_path):
    """RGB has other errors than the planes at the edges of colours."""
    frames = np.full((8, 224, 224, 3), 128, np.uint8)
    for number, frame in enumerate(frames):  # along an edge of cells
        frame[56:100, 14 * number : 14 * number + 50] = (255, 0, 0)
    path = tmp_path / "box.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, width=224, height=224, options={"crf": "10"})
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    processor = DCTImageProcessor(dct="x4", skip_db=38.0, max_pixels=token_sheet.MAX_FRAME_PIXELS)
    encoder = MediaEncoder(processor, token_measures.SAMPLING)
    _, kept = encoder.encode_kept("video", encoder.read("video", path.read_bytes()))
    _, (line,) = token_sheet.make_sheet(path, [DCTConfig.preset("x4")], None, 3, skip_db=38.0)
    assert f", {int(kept.sum())} in the language model ({kept.float().mean():.0%} kept)" in line
    rgb = measure(decode_video(path.read_bytes(), token_measures.SAMPLING), DCTConfig.preset("x4"), [0], skip_db=38.0)
    assert rgb.share > kept.float().mean(), "or the test shows nothing"


@pytest.mark.parametrize("skip_db", [None, 38.0])
@pytest.mark.parametrize("case", LAYOUTS)
def test_nothing_overlaps_and_all_is_on_the_sheet(case, skip_db, natural_frames):
    count, height, width, configs, name = LAYOUTS[case]
    frames = natural_frames(count, height, width)
    shown = list(range(count))
    results = [measure(frames, config, shown, skip_db) for config in configs]
    canvas = (
        token_sheet.draw_image_sheet(name, (999, 1999), frames, results)
        if count == 1
        else token_sheet.draw_video_sheet(name, (999, 1999), frames, results, shown)
    )
    words, areas = boxes(canvas)
    assert len(words) > 15 and len(areas) > 4
    for label, (left, bottom, right, top) in (words | areas).items():
        assert min(left, bottom) > -0.1 and right < canvas.width + 0.1 and top < canvas.height + 0.1, label
    for (one, box), (other, other_box) in itertools.combinations(words.items(), 2):
        assert not overlap(box, other_box), (one, other)
    for (one, box), (other, other_box) in itertools.product(words.items(), areas.items()):
        assert not overlap(box, other_box), (one, other)
    for (one, box), (other, other_box) in itertools.combinations(areas.items(), 2):
        assert not overlap(box, other_box), (one, other)


def test_images_stand_on_the_sheet_pixel_for_pixel(tmp_path, natural_frames):
    frames = natural_frames(1, 448, 448)
    result = measure(frames, PRESETS[2], [0])
    canvas = token_sheet.draw_image_sheet("a.png", (448, 448), frames, [result])
    canvas.save(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert sheet.shape == (canvas.height, canvas.width, 3)
    top, left = worst_window(result.error[0], 100)
    window = np.s_[top : top + 100, left : left + 100]
    found = 0
    for expected in (frames[0][window], result.decoded[0][window]):
        enlarged = expected.repeat(4, axis=0).repeat(4, axis=1)
        for y, x in itertools.product(range(sheet.shape[0] - 399), (18, 18 + 418)):
            if np.array_equal(sheet[y, x : x + 400], enlarged[0]):
                found += np.array_equal(sheet[y : y + 400, x : x + 400], enlarged)
    assert found == 2


def test_masks_show_what_is_kept(natural_frames):
    config = PRESETS[1]
    canvas = Canvas(500, 600)
    coefficient_masks.draw_masks(canvas, 0, 0, config, 400, still=False)
    from matplotlib.colors import to_rgb

    shown = np.stack([np.asarray(axes.images[0].get_array()) for axes in canvas.figure.axes]).reshape(3, 2, 28, 28, 3)
    kept = np.zeros((3, 2, 28, 28), bool)
    kept.ravel()[list(config.kept)] = True
    for plane, colour in enumerate(coefficient_masks.PLANE_COLOURS):
        np.testing.assert_array_equal((shown[plane] == to_rgb(colour)).all(axis=-1), kept[plane])
    dropped = (shown == to_rgb(coefficient_masks.DROPPED)).all(axis=-1)
    assert dropped[0, 1].sum() == 784 - 196 and dropped.sum() == 784 - 196, "4:2:0 has no more chroma to drop"


# The command


@pytest.fixture
def sheet(tmp_path, capsys):
    """sheet(path, *arguments): runs the command, which must succeed -> the sheet's bytes and what it printed."""

    def run(path: Path, *arguments: str) -> tuple[bytes, str]:
        output = tmp_path / "out.png"
        assert token_sheet.main(["show", str(path), "--output", str(output), "--force", *arguments]) == 0
        assert not list(tmp_path.glob(".*.tmp"))
        return output.read_bytes(), capsys.readouterr().out

    return run


def test_an_image_through_the_command(tmp_path, natural_frames, sheet, monkeypatch):
    path = save(tmp_path / "photo.png", natural_frames(1, 230, 340)[0])
    first, printed = sheet(path)
    for name, value in (("axes.facecolor", "red"), ("font.family", ["monospace"]), ("savefig.bbox", "tight")):
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    assert sheet(path)[0] == first, "the same input gives the same bytes, whatever settings matplotlib finds"
    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["exact", "x4", "x16"]
    assert "96 tokens an image, 24 in the language model" in lines[1]
    assert re.fullmatch(r"Wrote .*out\.png \(1690 x \d+ px\)\.", lines[3])
    assert Image.open(tmp_path / "out.png").size[0] == 1690


def test_a_video_through_the_command(tmp_path, natural_frames, video_file, sheet):
    path = save(tmp_path / "video.MP4", natural_frames(8, 112, 112), video_file)
    first, printed = sheet(path, "--presets", "x16", "--frames", "3")
    assert printed.startswith("x16: 2 x 56 x 56 blocks, 4:2:0")
    assert "tokens a video" in printed
    assert sheet(path, "--presets", "x16", "--frames", "2")[0] != first


def test_skipping_through_the_command(tmp_path, natural_frames, video_file, sheet):
    path = save(tmp_path / "video.mp4", natural_frames(1, 112, 112).repeat(8, axis=0), video_file)
    bare = sheet(path, "--presets", "x4")
    first, printed = sheet(path, "--presets", "x4", "--skip-db", "30")
    assert "16 tokens a video, 4 in the language model (50% kept)" in printed, "two steps at 2 frames a second"
    assert "32 tokens a video, 8 in the language model;" in bare[1] and first != bare[0]
    blank = save(tmp_path / "page.png", np.full((112, 112, 3), 255, np.uint8))
    assert sheet(blank, "--presets", "x4", "--skip-db", "30")[1].splitlines()[0].endswith("; 25% of the cells are kept")
    assert "are kept" not in sheet(blank, "--presets", "x4")[1]


def test_max_pixels_and_files_of_presets(tmp_path, natural_frames, sheet):
    path = save(tmp_path / "photo.png", natural_frames(1, 300, 300)[0])
    DCTConfig.select((2, 20, 20), "420", 500).save(tmp_path / "mine.json")
    printed = sheet(path, "--presets", str(tmp_path / "mine.json"), "--max-pixels", "14400")[1]
    assert printed.startswith("mine: 2 x 20 x 20 blocks, 4:2:0, 500 floats a token; 36 tokens an image, 9 in")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show"], "the following arguments are required: file"),
        (["draw", "a.png"], "invalid choice: 'draw'"),
        (
            ["show", "a.png", "--presets", "x5"],
            "argument --presets: unknown DCT preset 'x5': choose one of exact, x4, x16",
        ),
        (["show", "a.png", "--presets", "none.json"], "argument --presets: .*none.json"),
        (["show", "a.png", "--frames", "0"], "argument --frames: must be at least 1, got 0"),
        (["show", "a.png", "--skip-db", "inf"], "--skip-db: must be a finite number of dB, at least 0, got inf"),
        (["show", "a.png", "--max-pixels", "-4"], "argument --max-pixels: must be at least 1, got -4"),
        (["show", "a.png", "--output", "sheet.jpg"], "argument --output: the sheet is a PNG, got sheet.jpg"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        token_sheet.main(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("missing.png", [], r"No such file or directory: '.*missing\.png'"),
        ("broken.png", [], r"broken\.png: not a readable image: "),
        ("broken.mp4", [], r"broken\.mp4: not a readable video: "),
        ("thin.png", [], "aspect ratio must be smaller than 200"),
        (
            "good.png",
            ["--output", "there.png"],
            r"there\.png is there already: choose another --output, or add --force",
        ),
        ("good.png", ["--output", "no/folder.png"], "there is no folder no for --output"),
        ("good.png", ["--presets", "x4", "b20.json"], "x4, b20 need multiples of 56, 40 px, together of 280 px, too"),
        ("good.png", ["--presets", "flat.json"], "flat has blocks of 14 x 28 px: only squares are shown"),
        ("good.png", ["--max-pixels", "3136"], "--max-pixels must be at least 12544, got 3136"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    name, options, message, tmp_path, monkeypatch, natural_frames, one_line_error
):
    monkeypatch.chdir(tmp_path)
    save(Path("good.png"), natural_frames(1, 112, 112)[0])
    save(Path("thin.png"), np.zeros((2, 500, 3), np.uint8))
    for broken in ("broken.png", "broken.mp4", "there.png"):
        Path(broken).write_bytes(b"nothing")
    DCTConfig.select((2, 20, 20), "420", 500).save("b20.json")
    DCTConfig.select((2, 14, 28), "444").save("flat.json")
    assert token_sheet.main(["show", name, *options]) == 1
    line = one_line_error()
    assert line.startswith("dct_tokenizer.py: ") and re.search(message, line)
    assert not Path("sheet.png").exists()
    with pytest.raises((ValueError, OSError), match=message.removeprefix(rf"{re.escape(name)}: ")):
        token_sheet.main(["show", name, *options, "--debug"])


def test_transformers_finds_nothing_to_miss_in_the_copy():
    """It refuses a checkpoint's code unless all that its import statements name is installed."""
    from transformers.dynamic_module_utils import get_imports

    installed = {"PIL", "numpy", "torch", "transformers"}
    shipped = (
        configuration_dct,
        image_colours_dct,
        image_inputs_dct,
        image_processing_dct,
        image_sizes_dct,
        skipping_dct,
        transform_dct,
    )
    found = {name for module in shipped for name in get_imports(module.__file__)}
    assert found - set(sys.stdlib_module_names) == installed
