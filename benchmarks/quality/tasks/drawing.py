"""What the generated tasks are drawn with: glyphs of a real font, backgrounds, drawing in batches on the device.

Letters used for shapes: B images, G glyphs of an image, S side of a glyph's raster, H W rows and columns in pixels.

Everything is a function of a torch.Generator, so the same seed gives the same bytes on the same kind of device.
"""

import hashlib
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dct_qwen2vl.analysis import natural_images

OVERSAMPLING = 8  # glyphs are rendered this much larger and averaged down
PHASES = 4  # subpixel places of a glyph along each axis
BANK_MARGIN = 96  # pixels by which background images are larger than the images drawn on them
BANK_VIEWS = 6  # of each photograph
BANK_SCALES = (0.5, 2.0)  # pixels of the photograph for one of the background, log-uniform


def generator_for(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on `device`, seeded with a hash of `key`: split, seed, step."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=6).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


class Random:
    """Draws on a device from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.device = generator.device

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """float32 [*shape] in low..high."""
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def integers(self, count: int, *shape: int) -> torch.Tensor:
        """int64 [*shape] in 0..count-1."""
        return torch.randint(count, shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        """float32 [*shape] of mean 0, variance 1."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def permutations(self, rows: int, count: int) -> torch.Tensor:
        """int64 [rows, count], each row a permutation of 0..count-1."""
        return self.uniform(0, 1, rows, count).argsort(dim=1)


class GlyphAtlas:
    """Coverage of every character, at every height and subpixel place, in Pillow's built-in font (Aileron Regular).

    masks: float32 [C, heights, PHASES * PHASES, S, S] in 0..1; a glyph's digit-high box begins `margin` pixels from the
        top and left of its raster. widths: advance in pixels, float32 [C, heights]. A height is that of the digit 0.
    """

    margin = 1

    def __init__(self, characters: str, heights: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.characters, self.heights = characters, heights
        self.side = math.ceil(1.4 * max(heights)) + 2 * self.margin + 1
        masks = [[self._render(character, height) for height in heights] for character in characters]
        self.masks = torch.from_numpy(np.array(masks)).to(device)
        widths = [[_font(height).getlength(character) for height in heights] for character in characters]
        self.widths = (torch.tensor(widths, dtype=torch.float32) / OVERSAMPLING).to(device)

    def _render(self, character: str, height: int) -> np.ndarray:
        """float32 [PHASES * PHASES, S, S]"""
        step, side = OVERSAMPLING // PHASES, self.side * OVERSAMPLING
        image = Image.new("L", (side, side))
        start = self.margin * OVERSAMPLING
        ImageDraw.Draw(image).text(
            (start, start + height * OVERSAMPLING), character, font=_font(height), fill=255, anchor="ls"
        )
        fine = np.asarray(image, dtype=np.float32) / 255
        shifted = [np.roll(fine, (y * step, x * step), (0, 1)) for y in range(PHASES) for x in range(PHASES)]
        return np.stack(shifted).reshape(-1, self.side, OVERSAMPLING, self.side, OVERSAMPLING).mean((2, 4))

    def place(
        self, character: torch.Tensor, height: torch.Tensor, y: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices of characters and heights [B, G], where their boxes begin in pixels, float [B, G] -> rasters
        [B, G, S, S] and the pixel at which each begins, int64 [B, G] twice."""
        y, x = ((place * PHASES).round().long() for place in (y, x))
        masks = self.masks[character, height, y % PHASES * PHASES + x % PHASES]
        return (
            masks,
            y.div(PHASES, rounding_mode="floor") - self.margin,
            x.div(PHASES, rounding_mode="floor") - self.margin,
        )


def _font(height: int) -> ImageFont.FreeTypeFont:
    """The font in which a 0 is `height` * OVERSAMPLING pixels high."""
    top, bottom = ImageFont.load_default(size=1000).getbbox("0", anchor="ls")[1::2]
    return ImageFont.load_default(size=height * OVERSAMPLING * 1000 / (bottom - top))


def paint(canvas: torch.Tensor, masks: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> None:
    """Rasters [B, G, S, S] into coverage [B, H, W], in place; where they meet the larger counts, what lies outside is
    cut off. top, left: int64 [B, G]."""
    height, width = canvas.shape[1:]
    rows = top[..., None] + torch.arange(masks.shape[2], device=canvas.device)
    columns = left[..., None] + torch.arange(masks.shape[3], device=canvas.device)
    inside = ((rows >= 0) & (rows < height))[..., :, None] & ((columns >= 0) & (columns < width))[..., None, :]
    place = rows.clamp(0, height - 1)[..., :, None] * width + columns.clamp(0, width - 1)[..., None, :]
    canvas.view(len(canvas), -1).scatter_reduce_(1, place.flatten(1), (masks * inside).flatten(1), "amax")


class Backgrounds:
    """Views of photographs that no coefficient table was made from (natural_images.HELD_OUT_IMAGES) and that
    installed packages carry; without any, images of a 1/f spectrum.

    bank: uint8 [P, H + BANK_MARGIN, W + BANK_MARGIN, 3]. names: the photographs in it.
    """

    def __init__(self, size: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.size = size
        rng = np.random.default_rng(0)
        whole = (size[0] + BANK_MARGIN, size[1] + BANK_MARGIN)
        self.names, views = [], []
        for name in natural_images.HELD_OUT_IMAGES:
            try:
                image = natural_images.load(name)
            except FileNotFoundError:
                continue
            self.names.append(name)
            for scale in np.exp2(rng.uniform(*np.log2(BANK_SCALES), BANK_VIEWS)):
                centre = tuple(rng.uniform(0, side) for side in image.shape[:2])
                views.append(natural_images.view(image, centre, whole, float(scale)))
        if not views:
            self.names, views = ["1/f noise"], [_noise_image(rng, whole) for _ in range(4 * BANK_VIEWS)]
        self.bank = torch.from_numpy(np.stack(views)).to(device)

    def draw(self, random: Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [B, H, W, 3] in 0..255 of low contrast about a level, and that level [B], 0..255."""
        (height, width), device = self.size, self.bank.device
        which = random.integers(len(self.bank), count)[:, None, None]
        rows = random.integers(BANK_MARGIN, count)[:, None] + torch.arange(height, device=device)
        columns = random.integers(BANK_MARGIN, count)[:, None] + torch.arange(width, device=device)
        mirrored = random.integers(2, count)[:, None].bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
        cut = self.bank[which, rows[:, :, None], columns[:, None, :]].float()
        level = random.uniform(130, 215, count)
        contrast = random.uniform(0.1, 0.35, count)[:, None, None, None]
        tint = random.uniform(-20, 20, count, 1, 1, 3)
        cut = (cut - cut.mean((1, 2), keepdim=True)) * contrast
        return cut + level[:, None, None, None] + tint, level


def _noise_image(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3], grey, with a photograph's 1/f spectrum."""
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])[None, :])
    spectrum = np.fft.fft2(rng.standard_normal(size)) / np.maximum(frequency, 1 / max(size))
    field = np.fft.ifft2(spectrum).real
    grey = 128 + 50 * (field - field.mean()) / field.std()
    return np.repeat(grey.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def ink_on(random: Random, level: torch.Tensor) -> torch.Tensor:
    """Colours darker than levels [B] by 90 to 130 of 255, as print on paper: float32 [B, 3]."""
    return (level - random.uniform(90, 130, len(level)))[:, None] + random.uniform(-20, 20, len(level), 3)


def compose(
    random: Random, ground: torch.Tensor, coverage: torch.Tensor, ink: torch.Tensor, noise: float
) -> torch.Tensor:
    """Ink [B, 3] over grounds [B, H, W, 3] by coverage [B, T, H, W], plus grain: uint8 [B, T, H, W, 3].

    noise: standard deviation of the grain, of 255, grey, independent in every pixel and frame.
    """
    mixed = torch.lerp(ground[:, None], ink[:, None, None, None], coverage[..., None])
    grain = noise * random.normal(*coverage.shape)
    return (mixed + grain[..., None]).round().clamp(0, 255).to(torch.uint8)


def discs(
    y: torch.Tensor, x: torch.Tensor, radius: torch.Tensor, widest: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Discs about [B, G] with smooth edges, in pixels -> rasters [B, G, S, S] and the pixel at which each begins, int64
    [B, G] twice. Pixel 0 is from 0 to 1. widest: the largest diameter."""
    side = math.ceil(widest) + 3
    top, left = (y - side / 2).floor().long(), (x - side / 2).floor().long()
    centres = torch.arange(side, device=y.device) + 0.5
    rows, columns = (start[..., None] + centres - middle[..., None] for start, middle in ((top, y), (left, x)))
    distance = torch.hypot(rows[..., :, None], columns[..., None, :])
    return (radius[..., None, None] + 0.5 - distance).clamp(0, 1), top, left
