"""Generated tasks: the same bytes from the same seed, a test set of its own, and answers that are what is drawn.

Every task is read back from its frames by a way of its own, which knows where cells are and nothing else of the answer.
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn.functional import conv2d

from benchmarks.quality.tasks.cells import (
    CELL_NAMES,
    DIGITS,
    DIRECTIONS,
    NOT_SCORED,
    PLACES,
    SHORT_WORDS,
    TILTS,
    TOKEN,
    WORDS,
    Batch,
)
from benchmarks.quality.tasks.drawing import PHASES, GlyphAtlas
from benchmarks.quality.tasks.reading import LETTERS, Reading
from benchmarks.quality.tasks.registry import TASKS, Source, make_task
from dct_qwen2vl.common.scripts import UserError

LUMA = torch.tensor([0.299, 0.587, 0.114])
# Without grain, and large enough for the simple ways in which this file reads.
CLEAR = {
    "reading": {"heights": [6, 9, 12], "noise": 3.0},
    "numbers": {"heights": [10, 12], "noise": 0.0},
    "words": {"size": 224, "cells": 5, "heights": [10, 12], "noise": 0.0},
    "odd-one": {"heights": [9, 12], "blank": 0.0, "noise": 0.0},
    "counting": {"size": 224, "cells": 5, "diameters": [5], "noise": 0.0},
    "texture": {"noise": 0.0},
    "chart": {"size": 224, "units": [2, 3, 4], "noise": 0.0},
    "motion": {"speeds": [1.0, 2.0, 3.0], "noise": 0.0},
    "order": {"noise": 0.0},
    "flashes": {"diameters": [6], "noise": 0.0},
    "ticker": {"heights": [10], "noise": 0.0},
    # The event is the whole of the video, the print that of the page.
    "still-motion": {"speeds": [1.0, 2.0, 3.0], "noise": 0.0, "whole": 84, "seconds": 4},
    "still-order": {"noise": 0.0, "whole": 84, "seconds": 4},
    "still-flashes": {"diameters": [6], "noise": 0.0, "whole": 56, "seconds": 8},
    "still-ticker": {"heights": [10], "noise": 0.0, "whole": 84, "seconds": 4},
    "still-board": {"heights": [9, 12], "noise": 0.0, "whole": 48},
    "page-reading": {"heights": [6, 9, 12], "noise": 3.0, "whole": 112},
}


@pytest.fixture(scope="module", params=TASKS)
def source(request) -> Source:
    return Source(make_task(request.param, CLEAR[request.param]), "cpu")


@pytest.fixture(scope="module")
def reading() -> Source:
    return Source(Reading(heights=(6, 9, 12), noise=3.0), "cpu")


def answers_of(source: Source, batch: Batch) -> list[list[list[str]]]:
    """Words by sample, cell, answer."""
    task = source.task
    by_cell = batch.answer.view(len(batch.answer), -1, 1 + task.answers)
    return [[[WORDS[token] for token in cell[1:]] for cell in sample] for sample in by_cell.tolist()]


def luma(frames: torch.Tensor) -> torch.Tensor:
    return frames.float() @ LUMA


def cells_of(task, image: torch.Tensor) -> torch.Tensor:
    """[..., H, W] -> [C, ..., side, side]"""
    whole = task.cell * task.cells
    parts = image[..., :whole, :whole].unflatten(-1, (-1, task.cell)).unflatten(-3, (-1, task.cell))
    return parts.movedim((-4, -2), (0, 1)).flatten(0, 1)


def explained(image: torch.Tensor, templates: torch.Tensor) -> torch.Tensor:
    """How much of the squares about the mean each template explains at each place: [templates, places, places]."""
    centred = templates - templates.mean((1, 2), keepdim=True)
    centred = centred / centred.square().sum((1, 2), keepdim=True).sqrt()
    return conv2d(image[None, None], centred[:, None])[0].square()


def best_glyphs(image: torch.Tensor, atlas: GlyphAtlas, cell: int | None = None) -> torch.Tensor:
    """How well the best drawing of each character fits at each pixel of an image [H, W]: [characters, H, W]. cell: if
    given, only drawings that lie within one cell of this side."""
    fits = torch.zeros(len(atlas.characters), *image.shape)
    for number in range(len(atlas.characters)):
        for size, height in enumerate(atlas.heights):
            width = math.ceil(atlas.widths[number, size].item())
            fit = explained(image, atlas.masks[number, size, :, : height + 2, : width + 2]).amax(dim=0)
            if cell:
                rows, columns = (torch.arange(side) % cell for side in fit.shape)
                fit = fit * ((rows < cell - height - 1)[:, None] & (columns < cell - width - 1))
            place = fits[number, : fit.shape[0], : fit.shape[1]]
            place.copy_(torch.maximum(place, fit))
    return fits


def read_digits(source: Source, batch: Batch) -> list[list[list[str]]]:
    """The digit whose drawing fits best in each cell."""
    read = []
    for image in luma(batch.frames[:, 0]):
        fits = cells_of(source.task, best_glyphs(image, source.tools[0], source.task.cell)).amax((2, 3))
        read.append([[DIGITS[best]] for best in fits.argmax(1).tolist()])
    return read


def read_boards(source: Source, batch: Batch) -> list[list[list[str]]]:
    """As `read_digits`, each turn of six frames on its own."""
    turns = [replace(batch, frames=batch.frames[:, begin:]) for begin in range(1, source.task.frames, 6)]
    read = zip(*(read_digits(source, turn) for turn in turns))
    return [[[digit for (digit,) in cell] for cell in zip(*sample)] for sample in read]


def read_lines(source: Source, batch: Batch) -> list[list[str]]:
    """The characters of each cell from left to right: those that fit best, none over another."""
    task, atlas, read = source.task, source.tools[0], []
    for image in luma(batch.frames[:, 0]):
        fits = cells_of(task, best_glyphs(image, atlas))
        lines = []
        for fit in fits:
            found = []
            for _ in range(task.length):
                number, _, column = np.unravel_index(int(fit.argmax()), fit.shape)
                found.append((column, atlas.characters[number]))
                fit[:, :, max(0, column - 3) : column + 4] = 0
            lines.append("".join(character for _, character in sorted(found)))
        read.append(lines)
    return read


def read_odd_ones(source: Source, batch: Batch) -> list[list[list[str]]]:
    rows = []
    for sample in read_digits(source, batch):
        digits = [cell[0] for cell in sample]
        lines = [digits[start : start + source.task.cells] for start in range(0, len(digits), source.task.cells)]
        odd = [min(range(len(line)), key=lambda place, line=line: line.count(line[place])) for line in lines]
        same = [max(line, key=line.count) for line in lines]
        rows.append([[digit, line[place], DIGITS[place]] for digit, line, place in zip(same, lines, odd)])
    return rows


def count_dots(source: Source, batch: Batch) -> list[list[list[str]]]:
    counts = []
    for image in luma(batch.frames[:, 0]):
        dark = image < image.median() - 35
        counts.append([[DIGITS[ndimage.label(cell.numpy())[1]]] for cell in cells_of(source.task, dark)])
    return counts


def tilts(source: Source, batch: Batch) -> list[list[list[str]]]:
    """Stripes rise where the two differences have the same sign, as rows count downwards."""
    found = []
    for image in luma(batch.frames[:, 0]):
        cells = cells_of(source.task, image)
        product = ((cells[:, 1:, :-1] - cells[:, :-1, :-1]) * (cells[:, :-1, 1:] - cells[:, :-1, :-1])).sum((1, 2))
        found.append([[TILTS[int(value < 0)]] for value in product])
    return found


def bar_values(source: Source, batch: Batch) -> list[list[list[str]]]:
    """The rows that are dark in the middle of a bar, in units: a tenth of the distance of the lines between bars."""
    task, found = source.task, []
    for image in luma(batch.frames[:, 0]):
        ground = image.median()
        lines = torch.nonzero((image[:, :: task.cell] < ground - 15).all(dim=1))[:, 0]
        unit = (lines[1:] - lines[:-1]).float().median() / 10
        middle = image[:, task.cell // 2 :: task.cell]
        bars = ((middle < ground - 60).sum(dim=0) / unit).round().int().tolist()
        found.append([list(f"{bar:02d}") for bar in bars])
    return found


def centres(frames: torch.Tensor) -> np.ndarray:
    """Of what is dark, for [T, side, side]: [T, 2]"""
    return np.array([ndimage.center_of_mass((frame < frame.median() - 35).numpy()) for frame in frames])


def motions(source: Source, batch: Batch) -> list[list[list[str]]]:
    task, found = source.task, []
    for video in luma(batch.frames):
        cells = []
        for cell in cells_of(task, video):
            row, column = (centres(cell)[-1] - centres(cell)[0]) / (task.frames - 1)
            direction = round(math.atan2(row, column) / (2 * math.pi / 8)) % 8
            speed = int(np.abs(np.array(task.speeds) - math.hypot(row, column)).argmin())
            cells.append([DIRECTIONS[direction], DIGITS[speed]])
        found.append(cells)
    return found


def orders(source: Source, batch: Batch) -> list[list[list[str]]]:
    found = []
    for video in luma(batch.frames):
        cells = []
        for cell in cells_of(source.task, video):
            thirds = (cell < video.median() - 35)[:, :, : cell.shape[2] // 3 * 3].unflatten(2, (3, -1)).sum((1, 3))
            onset = [int((thirds[:, place] > 3).nonzero()[0, 0]) for place in range(3)]
            cells.append([PLACES[place] for place in sorted(range(3), key=lambda place, onset=onset: onset[place])])
        found.append(cells)
    return found


def count_flashes(source: Source, batch: Batch) -> list[list[list[str]]]:
    found = []
    for video in luma(batch.frames):
        lit = (cells_of(source.task, video) < video.median() - 50).sum((2, 3)) > 5
        found.append([[DIGITS[int(cell.sum())]] for cell in lit])
    return found


def read_tickers(source: Source, batch: Batch) -> list[list[list[str]]]:
    """The digit that fits best where each digit of the longest line must lie, over all frames, at any place of a still
    line: a line is put together from the frames by its speed."""
    task, atlas, read = source.task, source.tools[0], []
    reach = math.ceil(task.speed) * (task.frames - 1)
    for video in luma(batch.frames):
        lines = []
        for row in range(task.cells):
            band = video[:, row * task.cell : (row + 1) * task.cell]
            still = torch.full((task.cell, task.size + reach), float(video.median()))
            for frame, strip in enumerate(band):
                shift = round(task.speed * frame)
                still[:, shift : shift + task.size] = torch.minimum(still[:, shift : shift + task.size], strip)
            fit, found = best_glyphs(still, atlas), []
            for _ in range(task.answers):
                number, _, column = np.unravel_index(int(fit.argmax()), fit.shape)
                found.append((column, DIGITS[number]))
                fit[:, :, max(0, column - 3) : column + 4] = 0
            lines.append([digit for _, digit in sorted(found)])
        read.append(lines)
    return read


READERS = {
    "reading": read_digits,
    "numbers": lambda source, batch: [[list(line) for line in sample] for sample in read_lines(source, batch)],
    "words": lambda source, batch: [[[line] for line in sample] for sample in read_lines(source, batch)],
    "odd-one": read_odd_ones,
    "counting": count_dots,
    "texture": tilts,
    "chart": bar_values,
    "motion": motions,
    "order": orders,
    "flashes": count_flashes,
    "ticker": read_tickers,
    "still-motion": motions,
    "still-order": orders,
    "still-flashes": count_flashes,
    "still-ticker": read_tickers,
    "still-board": read_boards,
    "page-reading": read_digits,
}
# Share that the simple ways read right; backgrounds mislead them now and then.
READ = {"reading": 0.97, "words": 0.9, "ticker": 0.9, "odd-one": 0.9, "motion": 0.9, "numbers": 0.9}
READ |= {"still-ticker": 0.9, "still-motion": 0.9, "still-order": 0.9}


def test_the_answer_is_what_is_drawn(source):
    batch = source.batch("test", 0, 0, 8)
    read, true = (np.array(words) for words in (READERS[source.task.name](source, batch), answers_of(source, batch)))
    assert read.shape == true.shape
    assert (read == true)[true != "blank"].mean() >= READ.get(source.task.name, 0.95), (read, true)


def test_blank_cells_hold_nothing(reading):
    batch = reading.batch("test", 0, 0, 8)
    cells = torch.stack([cells_of(reading.task, image) for image in luma(batch.frames[:, 0])])
    contrast = cells.flatten(2).median(dim=2).values - cells.flatten(2).amin(dim=2)
    assert contrast[batch.level == NOT_SCORED].median() < 30 < 60 < contrast[batch.level != NOT_SCORED].median()


def test_rows_whose_odd_place_is_empty_do_not_count():
    source = Source(make_task("odd-one", {"heights": [12], "blank": 0.5, "noise": 0.0}), "cpu")
    batch = source.batch("test", 0, 0, 8)
    place = (batch.answer[:, 3::4] - TOKEN["0"]).flatten()
    cells = torch.stack([cells_of(source.task, image) for image in luma(batch.frames[:, 0])])
    contrast = cells.flatten(2).median(dim=2).values - cells.flatten(2).amin(dim=2)  # [B, C]
    odd = contrast.view(-1, source.task.cells)[torch.arange(len(place)), place]
    assert (batch.level.view(8, -1, 3)[..., :2] == NOT_SCORED).all()
    counts = (batch.level.view(8, -1, 3)[..., 2] != NOT_SCORED).flatten()
    assert torch.equal(counts, (batch.answer[:, 2::4] != TOKEN["blank"]).flatten())
    assert 0.3 < counts.float().mean() < 0.7
    assert odd[~counts].median() < 30 < 60 < odd[counts].median()


def test_shapes_levels_and_words_of_a_batch(source):
    task, batch = source.task, source.batch("train", 0, 0, 3)
    assert batch.frames.shape == (3, task.duration, task.side, task.side, 3) and batch.frames.dtype == torch.uint8
    assert batch.answer.shape == (3, task.answer_length) and batch.question.shape == (3, task.question_length)
    assert batch.level.shape == (3, len(task.scored))
    names = set(range(task.answer_length)) - set(task.scored)
    assert [WORDS[batch.answer[0, place]] for place in sorted(names)] == list(CELL_NAMES[: len(names)])
    assert set(task.hard) <= set(source.batch("train", 0, 1, 64).level.flatten().tolist())
    assert [WORDS[token] for token in batch.question[0]] == [f"question-{task.name}"]


def test_no_answer_is_much_more_frequent_than_chance(source):
    task, batch = source.task, source.batch("train", 0, 0, 384)
    said = batch.answer[:, list(task.scored)][batch.level != NOT_SCORED]
    if task.answers == 1 or task.name in ("odd-one", "still-board"):  # one place counts, or as many as are not blank
        most = torch.bincount(said).max() / len(said)
    else:  # of each place of the answer on its own
        by_place = said.view(-1, task.answers)
        most = sum(torch.bincount(place).max() / len(by_place) for place in by_place.T) / task.answers
    assert task.chance * 0.95 < most < 1.35 * task.chance


def test_the_same_seed_gives_the_same_bytes(source):
    one, two = (Source(source.task, "cpu").batch("train", 3, 17, 2) for _ in range(2))
    assert torch.equal(one.frames, two.frames) and torch.equal(one.answer, two.answer)
    assert torch.equal(one.level, two.level)


def test_every_step_seed_split_and_knob_is_another_sample(reading):
    keys = [("train", 0, 0), ("train", 0, 1), ("train", 1, 0), ("test", 0, 0), ("fit", 0, 0)]
    answers = [tuple(reading.batch(*key, 2).answer.flatten().tolist()) for key in keys]
    answers.append(tuple(Source(Reading(), "cpu").batch("train", 0, 0, 2).answer.flatten().tolist()))
    assert len(set(answers)) == len(answers)


def test_the_test_set_shares_no_image_with_training(reading):
    test = {frame.numpy().tobytes() for step in range(2) for frame in reading.batch("test", 0, step, 8).frames}
    train = {frame.numpy().tobytes() for step in range(8) for frame in reading.batch("train", 0, step, 8).frames}
    assert len(test) == 16 and len(train) == 64 and not test & train


def test_digits_are_uniform_and_levels_are_heights(reading):
    batch = reading.batch("train", 0, 0, 128)
    digits = batch.answer[:, 1::2] - TOKEN["0"]  # a blank is 10
    share = torch.bincount(digits.flatten(), minlength=11) / digits.numel()
    assert (share[:10] - 0.07).abs().max() < 0.02 and abs(share[10] - 0.3) < 0.04
    assert torch.equal(digits == 10, batch.level == NOT_SCORED)
    assert set(batch.level.flatten().tolist()) == {NOT_SCORED, 6, 9, 12}


@pytest.mark.parametrize("height", [4, 8, 12])
def test_a_digit_is_as_high_as_its_level(height):
    atlas = GlyphAtlas(DIGITS, (height,))
    for digit, mask in enumerate(atlas.masks[:, 0, 0]):
        rows = mask.sum(dim=1)
        above = (rows.cumsum(0) < 0.02 * rows.sum()).sum().item()
        below = (rows.flip(0).cumsum(0) < 0.02 * rows.sum()).sum().item()
        assert abs(atlas.side - above - below - height) <= 1, DIGITS[digit]


def test_a_subpixel_place_moves_the_centre_of_mass():
    atlas = GlyphAtlas("7", (9,))
    place = torch.arange(atlas.side, dtype=torch.float32)
    middles = [(mask.sum(dim=0) @ place / mask.sum()).item() for mask in atlas.masks[0, 0, :PHASES]]
    steps = [later - earlier for earlier, later in pairwise(middles)]
    assert steps == pytest.approx([1 / PHASES] * (PHASES - 1), abs=0.01)


def test_words_are_spelt_with_the_letters_of_the_atlas():
    assert len(set(SHORT_WORDS)) == 32 and set("".join(SHORT_WORDS)) == set(LETTERS)
    assert len(set(WORDS)) == len(WORDS) == len(TOKEN)


@pytest.mark.parametrize(
    ("name", "knobs", "word"),
    [
        ("nothing", {}, "unknown task"),
        ("reading", {"colour": 3}, "no knob 'colour'"),
        ("reading", {"heights": [40]}, "must hold 1 x 40 px of print"),
        ("reading", {"cells": 9}, "at most 64 cells"),
        ("motion", {"speeds": [9.0]}, "hold paths at 9.0 px a frame"),
        ("still-board", {"heights": [21]}, "hold digits of 21 px"),
        ("still-board", {"seconds": 5}, "must hold an event of 24 frames"),
        ("chart", {"units": [9]}, "hold a bar of 50 x 9 px"),
        ("texture", {"cells": 6}, "divide the image"),
    ],
)
def test_a_task_that_cannot_be_is_refused(name, knobs, word):
    with pytest.raises(ValueError, match=word):
        make_task(name, knobs)


@pytest.mark.parametrize(("name", "stays"), [("still-motion", False), ("still-order", True)])
def test_before_a_fixed_camera_an_event_has_its_time_and_place(name, stays):
    """Outside of them the video stands still; afterwards what has appeared is gone, or stays."""
    task = make_task(name, {"noise": 0.0})
    frames = luma(Source(task, "cpu").batch("train", 0, 0, 24).frames)
    assert frames.shape[1:] == (24, 112, 112)
    moving = (frames[:, 1:] - frames[:, :-1]).abs() > 20
    assert not moving[:, :, :9].any() and not moving[:, :, 93:].any() and moving[:, :, 9:93, 9:93].any()
    times = moving.flatten(2).any(2)
    first, last = times.float().argmax(1), 22 - times.flip(1).float().argmax(1)
    assert (last - first < 9).all() and len(set(first.tolist())) > 2
    begun_and_ended = (first > 0) & (last < 22)
    assert begun_and_ended.any()
    same = ((frames[:, 0] - frames[:, -1]).abs() < 20).flatten(1).all(1)
    assert same[begun_and_ended].all() if not stays else not same.any()


def test_a_board_changes_every_three_steps_and_is_of_one_colour_where_it_is_blank():
    task = make_task("still-board", {"noise": 0.0})
    batch = Source(task, "cpu").batch("train", 0, 0, 8)
    frames = luma(batch.frames)
    changed = (frames[:, 1:] != frames[:, :-1]).flatten(2).any(2)
    assert (changed.any(0).nonzero()[:, 0] + 1).tolist() == [6, 12, 18]
    assert (frames[:, :, :21] == frames[:, :1, :21]).all() and (frames[:, :, 69:] == frames[:, :1, 69:]).all()
    cells = cells_of(task, frames[:, ::6, 21:69, 21:69])  # by cell, sample, turn
    blank = (batch.level == NOT_SCORED).view(8, 4, 4).movedim(1, 0)
    spread = cells.amax((3, 4)) - cells.amin((3, 4))
    assert (spread[blank] < 0.01).all() and (spread[~blank] > 40).all()
    assert 0.2 < blank.float().mean() < 0.4


def test_a_page_has_white_margins():
    frames = luma(Source(make_task("page-reading"), "cpu").batch("train", 0, 0, 4).frames[:, 0])
    for page in frames:
        margin = torch.cat([page[:28].flatten(), page[:, :28].flatten(), page[140:].flatten()])
        assert margin.min() == margin.max() > 230 and page[28:140, 28:140].min() < 180


def test_a_video_that_does_not_hold_its_event_is_refused():
    with pytest.raises(UserError, match="a video of 6 frames of 112 px must hold an event of 8 frames of 84 px"):
        make_task("still-motion", {"seconds": 3})
