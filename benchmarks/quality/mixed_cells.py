"""Which cells an image has if cells differ in size: small ones where there is detail, large ones where there is little.

A cell is 2 x 2 blocks. In sides of the smallest, cells have a side of 1, 2 (those of `x4`) or 4. With patches of 14 px
these are 28, 56 and 112 px. Step 0 of a folded model sees the low corner of each block, `patch` x `patch` coefficients
of each colour: all of a small block, a half-size image of a middle one, a quarter-size image of a large one.

The rule: begin with the largest cells, and divide the cell whose division saves the largest error until the budget is
spent. The error is the energy beyond the corners.

Letters used for shapes:

    B H W   images, their rows and columns, pixels
    R C     rows and columns of an image, smallest cells
    M P     all cells that an image may have, of all sizes, the largest first; those of them that can be divided
    V       cells that are chosen
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.dct.configuration_dct import dct_matrix

SIDES = (4, 2, 1)  # of cells, in sides of the smallest; the one in the middle is x4's
MERGE = 2  # blocks along a side of a cell


@dataclass(frozen=True)
class CellTree:
    """All cells that an image may have.

    rows, columns: of the image, smallest cells; even. Large cells that would reach over the edge do not exist.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows % 2 or self.columns % 2 or not self.rows or not self.columns:
            raise UserError(f"an image must be whole cells of x4, got {self.rows} x {self.columns} halves of a cell")

    @property
    def budget(self) -> int:
        """Cells of `x4`."""
        return self.rows * self.columns // 4

    def grid(self, side: int) -> tuple[int, int]:
        """Rows and columns of the cells of one size."""
        return self.rows // side, self.columns // side

    @cached_property
    def sides(self) -> torch.Tensor:
        """int64 [M], in sides of the smallest."""
        return torch.cat([torch.full((rows * columns,), side) for side in SIDES for rows, columns in [self.grid(side)]])

    @cached_property
    def corners(self) -> torch.Tensor:
        """Row and column of the first smallest cell of each, int64 [M, 2]."""
        grids = [torch.cartesian_prod(*(torch.arange(count) for count in self.grid(side))) * side for side in SIDES]
        return torch.cat([grid.view(-1, 2) for grid in grids])

    @cached_property
    def children(self) -> torch.Tensor:
        """Numbers of the four cells that a cell is divided into, int64 [P, 4]."""
        cells = [(side, *corner) for side, corner in zip(self.sides.tolist(), self.corners.tolist())]
        number = {cell: place for place, cell in enumerate(cells)}
        parents = [(side // 2, row, column) for side, row, column in cells if side > 1]
        return torch.tensor(
            [[number[half, row + y, column + x] for y in (0, half) for x in (0, half)] for half, row, column in parents]
        )

    @cached_property
    def first(self) -> torch.Tensor:
        """The cells to begin with: the large ones, and middle ones where no large one fits. bool [M]"""
        large = torch.tensor([side // SIDES[0] * SIDES[0] for side in (self.rows, self.columns)])
        outside = (self.sides == SIDES[1]) & (self.corners >= large).any(dim=1)
        return (self.sides == SIDES[0]) | outside


def low_corner(images: torch.Tensor, block: int, corner: int) -> torch.Tensor:
    """What is left of images if each block keeps the low corner of its DCT, without rounding. [B, H, W, ...] -> same.

    images: float [B, H, W, ...]. H and W are multiples of `block`.
    block: side of a block, pixels.
    corner: coefficients that are kept along a side.
    """
    if corner >= block:
        return images
    basis = torch.from_numpy(dct_matrix(block)[:corner]).to(images)
    projection = basis.T @ basis
    rows = torch.einsum("yp,bhp...->bhy...", projection, images.unflatten(1, (-1, block)))
    columns = torch.einsum("xp,bhwp...->bhwx...", projection, rows.flatten(1, 2).unflatten(2, (-1, block)))
    return columns.flatten(2, 3)


def whole_cells(images: torch.Tensor, cell: int) -> torch.Tensor:
    """The part of images [B, H, W, ...] that whole cells of `cell` px fill, from the top and the left."""
    return images[:, : images.shape[1] // cell * cell, : images.shape[2] // cell * cell]


def cell_errors(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Energy beyond the corners in each cell that can be divided: float [B, P], squared levels, over all colours.

    images: float [B, H, W, 3].
    patch: side of the pixel model's patch, which is the smallest block, pixels.
    """
    errors = []
    for side in SIDES[:-1]:
        cell = MERGE * side * patch
        part = whole_cells(images, cell)
        lost = (part - low_corner(part, side * patch, patch)).square().sum(dim=3)
        errors.append(lost.unflatten(1, (-1, cell)).unflatten(3, (-1, cell)).sum(dim=(2, 4)).flatten(1))
    return torch.cat(errors, dim=1)


def savings(errors: torch.Tensor, tree: CellTree) -> torch.Tensor:
    """Error that the division of a cell saves: float [B, P].

    errors: float [B, P], of `cell_errors`.
    tree: of the images.

    A large cell may save little until some of its quarters are divided, too. It counts with the most that it saves for
    each division, whether none, one, or all of its quarters follow. Dividing by the largest savings then comes near the
    least error that the budget allows.
    """
    large = int((tree.sides == SIDES[0]).sum())
    quarters = errors[:, tree.children[:large].to(errors.device)].sort(dim=2, descending=True).values
    left = quarters.flip(2).cumsum(2).flip(2)  # after the division of those before
    saved = errors[:, :large, None] - torch.nn.functional.pad(left, (0, 1))
    divisions = torch.arange(1, 6, device=errors.device)
    return torch.cat([(saved / divisions).amax(2), errors[:, large:]], dim=1)


def choose_cells(errors: torch.Tensor, tree: CellTree, least: float = -1.0) -> torch.Tensor:
    """Divides the cell that saves the most until there are as many as `x4` has: bool [B, M].

    errors: float [B, P], of `cell_errors`.
    tree: of the images.
    least: cells that save this error or less are not divided. Below 0, all images get exactly the budget.

    Of cells that save the same, the one with the lower number is divided.
    """
    device, parents = errors.device, errors.shape[1]
    saved = savings(errors, tree)
    children, row = tree.children.to(device), torch.arange(len(errors), device=device)
    chosen = tree.first.to(device).repeat(len(errors), 1)
    for _ in range((tree.budget - int(tree.first.sum())) // 3):
        most, cell = saved.masked_fill(~chosen[:, :parents], -1).max(dim=1)
        divided = most > least
        chosen[row, cell] &= ~divided
        chosen[row[:, None], children[cell]] |= divided[:, None]
    return chosen


def in_reading_order(chosen: torch.Tensor, tree: CellTree) -> torch.Tensor:
    """Numbers of the chosen cells by the row, then the column of their first smallest cell: int64 [B, V].

    chosen: bool [B, M], as many of each image as `x4` has.
    """
    place = (tree.corners[:, 0] * tree.columns + tree.corners[:, 1]).to(chosen.device)
    place = place.masked_fill(~chosen, tree.rows * tree.columns)
    return place.argsort(dim=1)[:, : tree.budget]


def sides_by_place(chosen: torch.Tensor, tree: CellTree) -> torch.Tensor:
    """Side of the chosen cell over each smallest cell, int64 [R, C]; 0 where there is none. Sides of cells that overlap
    are added.

    chosen: bool [M], of one image.
    """
    found = torch.zeros(tree.rows, tree.columns, dtype=torch.int64)
    for side, (row, column) in zip(tree.sides[chosen].tolist(), tree.corners[chosen].tolist()):
        found[row : row + side, column : column + side] += side
    return found
