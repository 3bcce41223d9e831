"""Crops of real pages with the character that stands in each small cell.

Letters used for shapes:

    P H W     pages, their rows and columns in pixels
    M         most characters of a page
    B S       crops and their side in pixels
    r c       rows and columns of cells: S / 7 and S / 3.5

`build` renders the pages once, with pypdfium2. `PageStore` cuts crops on the device, labels and all.
"""

import json
import multiprocessing
import unicodedata
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.ocr.pages import MANUALS, POINTS_AN_INCH, opened
from dct_qwen2vl.common.scripts import UserError

TEST = ("R-FAQ", "R-data", "R-intro", "R-lang")  # manuals that training never sees
REFERENCE = "fullrefman"  # set like the manuals
ROWS, COLUMNS = 7.0, 3.5  # px of a cell
FIRST, LAST = 33, 126  # printable ASCII; each is a class of its own
OTHER = LAST - FIRST + 2  # class of other characters; 0 is blank
CLASSES = OTHER + 1
SHARED = -100  # label of a cell with several characters, which is not learned and does not count


def label_of(character: str) -> int:
    """0 for white space."""
    plain = unicodedata.normalize("NFKC", character)
    if not plain.strip():
        return 0
    return ord(plain) - FIRST + 1 if len(plain) == 1 and FIRST <= ord(plain) <= LAST else OTHER


# grey uint8 [H, W] at each resolution; characters float32 [M, 3]: label, distance of the middle from the top and the
# left edge of the page in points
Page = tuple[list[np.ndarray], np.ndarray]


def read_pages(job: tuple[Path, list[int], tuple[int, ...]]) -> list[Page]:
    """(file, page numbers, dpi) -> the pages. To find a page among thousands takes longer than to render it, so that a
    file is opened for many."""
    path, numbers, dpi = job
    with opened(path) as document:
        return [read_page(document, number, dpi) for number in numbers]


def read_page(document: Any, number: int, dpi: tuple[int, ...]) -> Page:
    import pypdfium2.raw as raw

    with closing(document[number]) as page, closing(page.get_textpage()) as text:
        images = [np.array(page.render(scale=one / POINTS_AN_INCH, grayscale=True).to_pil()) for one in dpi]
        found = []
        for index in range(text.count_chars()):
            if label := label_of(chr(raw.FPDFText_GetUnicode(text, index))):
                left, bottom, right, top = text.get_charbox(index, loose=True)
                found.append((label, page.get_height() - (top + bottom) / 2, (left + right) / 2))
    return images, np.array(found, np.float32).reshape(-1, 3)


def build(manuals: Path, output: Path, dpi: tuple[int, ...], limit: int, processes: int) -> None:
    """Writes DPI_grey.npy [P, H, W], DPI_characters.npy [P, M, 3] and pages.json, the manual of each page.

    limit: most pages of a manual, evenly spread.
    """
    files = [*sorted(manuals.glob(MANUALS)), *manuals.glob(f"{REFERENCE}.pdf")]
    if not files:
        raise UserError(f"no R-*.pdf in {manuals}: apt-get install r-doc-pdf, or name the folder with --manuals")
    numbers = {path: list(chosen(path, limit)) for path in files}
    jobs = [(path, part, dpi) for path, all_of in numbers.items() for part in in_parts(all_of)]
    output.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pages = list(chain.from_iterable(pool.map(read_pages, jobs, chunksize=1)))
    for index, resolution in enumerate(dpi):
        scale = np.array([1, resolution, resolution], np.float32) / np.array([1, POINTS_AN_INCH, POINTS_AN_INCH])
        write_pages(output, resolution, [(images[index], found * scale) for images, found in pages])
    manuals = [path.stem for path in files for _ in numbers[path]]
    (output / "pages.json").write_text(json.dumps({"dpi": dpi, "manuals": manuals}))


def in_parts(numbers: list[int], size: int = 32) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def chosen(path: Path, limit: int) -> Iterator[int]:
    """Numbers of at most `limit` pages, evenly spread."""
    with opened(path) as document:
        count = len(document)
    yield from np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int)).tolist()


def write_pages(output: Path, dpi: int, pages: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """All pages in one array, blank paper where one is smaller, label 0 where one has fewer characters."""
    height, width = (max(grey.shape[axis] for grey, _ in pages) for axis in (0, 1))
    most = max(len(characters) for _, characters in pages)
    grey = np.full((len(pages), height, width), 255, np.uint8)
    characters = np.zeros((len(pages), most, 3), np.float32)
    for number, (image, found) in enumerate(pages):
        grey[number, : image.shape[0], : image.shape[1]] = image
        characters[number, : len(found)] = found
    np.save(output / f"{dpi}_grey.npy", grey)
    np.save(output / f"{dpi}_characters.npy", characters)


@dataclass(frozen=True)
class Crops:
    """images: uint8 [B, S, S]. labels: int64 [B, r, c]. page: int64 [B]. dpi: of all of them."""

    images: torch.Tensor
    labels: torch.Tensor
    page: torch.Tensor
    dpi: int


class PageStore:
    """The pages of a split on a device.

    folder: Path. What `build` wrote.
    split: "train" or "test", by manual.
    """

    def __init__(self, folder: Path, split: str, device: torch.device) -> None:
        try:
            described = json.loads((folder / "pages.json").read_text())
        except FileNotFoundError as error:
            raise UserError(
                f"no pages in {folder}: make them with python -m benchmarks.quality.dense.prepare"
            ) from error
        self.device, self.dpi = device, tuple(described["dpi"])
        mine = [number for number, name in enumerate(described["manuals"]) if (name in TEST) == (split == "test")]
        self.names = [described["manuals"][number] for number in mine]
        characters = {dpi: np.load(folder / f"{dpi}_characters.npy", mmap_mode="r")[mine] for dpi in self.dpi}
        self.text = {dpi: torch.from_numpy(text_bounds(found)).to(device) for dpi, found in characters.items()}
        self.characters = {dpi: torch.from_numpy(found).to(device) for dpi, found in characters.items()}
        self.grey = {
            dpi: torch.from_numpy(np.load(folder / f"{dpi}_grey.npy", mmap_mode="r")[mine]).to(device)
            for dpi in self.dpi
        }

    def crops(self, dpi: int, page: torch.Tensor, place: torch.Tensor, side: int) -> Crops:
        """page: int64 [B]. place: float [B, 2] in 0..1, where the crop lies between the ends of the page's text."""
        grey = self.grey[dpi]
        first, last = self.text[dpi][page].unbind(dim=1)
        first = first.minimum((first + last - side) / 2)  # text that is smaller than a crop lies within it
        start = (first + place * (last - side - first).clamp(min=0)).long().clamp(min=0)
        start = torch.stack([start[:, axis].clamp(max=grey.shape[1 + axis] - side) for axis in (0, 1)], dim=1)
        rows, columns = (start[:, axis, None] + torch.arange(side, device=self.device) for axis in (0, 1))
        images = grey[page[:, None, None], rows[:, :, None], columns[:, None, :]]
        return Crops(images, cell_labels(self.characters[dpi][page], start, side), page, dpi)

    def draw(self, dpi: int, count: int, side: int, generator: torch.Generator) -> Crops:
        """Random crops. generator: on the CPU, so that all devices get the same."""
        page = torch.randint(len(self.names), (count,), generator=generator)
        place = torch.rand(count, 2, generator=generator)
        # a copy that waits for the GPU would leave it idle until the next step is drawn
        return self.crops(dpi, *(some.to(self.device, non_blocking=True) for some in (page, place)), side)

    def draw_each(self, count: int, side: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of as many random crops of each resolution. count: of one."""
        crops = [self.draw(dpi, count, side, generator) for dpi in self.dpi]
        images, labels = (torch.cat(parts) for parts in zip(*((some.images, some.labels) for some in crops)))
        return images, labels


def text_bounds(characters: np.ndarray) -> np.ndarray:
    """float [P, M, 3] -> float32 [P, 2, 2]: row and column of the first and of the last character; 0 without any."""
    there = characters[..., :1] > 0
    first = np.where(there, characters[..., 1:], np.inf).min(axis=1)
    last = np.where(there, characters[..., 1:], -np.inf).max(axis=1)
    bounds = np.stack([first, last], axis=1) + np.array([[-ROWS], [ROWS]])
    return np.where(there.any(axis=1)[..., None], bounds, 0.0).astype(np.float32)


def cell_labels(characters: torch.Tensor, start: torch.Tensor, side: int) -> torch.Tensor:
    """characters: float [B, M, 3]. start: int64 [B, 2], the crops' first pixels. Returns int64 [B, r, c]."""
    rows, columns = int(side / ROWS), int(side / COLUMNS)
    row = ((characters[..., 1] - start[:, :1]) / ROWS).floor().long()
    column = ((characters[..., 2] - start[:, 1:]) / COLUMNS).floor().long()
    inside = (characters[..., 0] > 0) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    place = torch.where(inside, row * columns + column, rows * columns)  # one more cell takes what lies outside
    shape = (len(characters), rows * columns + 1)
    labels = torch.zeros(shape, dtype=torch.long, device=characters.device).scatter_(
        1, place, characters[..., 0].long()
    )
    count = torch.zeros(shape, dtype=torch.long, device=characters.device).scatter_add_(
        1, place, torch.ones_like(place)
    )
    return labels.masked_fill(count > 1, SHARED)[:, :-1].unflatten(1, (rows, columns))
