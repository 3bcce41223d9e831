"""What the demo leaves to look at: the loss curve, and a sheet of samples as the model receives them. And how many
tokens an image takes, as pixels and as DCT."""

import math
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoTokenizer, Qwen2VLImageProcessor

from dct_qwen2vl.data.media import as_array
from dct_qwen2vl.data.media_encoder import MediaEncoder
from dct_qwen2vl.data.samples import IGNORE_INDEX, ConversationSample, EncodedSample, read_samples
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.training.metrics_file import read_metrics
from task_encoder import QwenTaskEncoder

CELL = 232  # px, the side of an image on the sheet
GAP = 12  # px between images, and around a row
MOST_IMAGES = 4  # of a row
TEXT_WIDTH = 660  # px
TEXT_SIZE, LINE = 15, 19  # px of the font and of a line
LEARNED, GIVEN, FAINT = (0, 120, 40), (70, 70, 70), (200, 200, 200)
LEGEND = [
    ("Samples as the model receives them. Source: the file's image, or the first frame of a video.", GIVEN),
    ("Received: what the DCT tokens hold, decoded. White lines separate the tokens of the language model.", GIVEN),
    ("Text: what the model reads; tokens of an image or video are counted.", GIVEN),
    ("Green text: the answers that it learns to give.", LEARNED),
]
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


def draw_loss(metrics: Path, output: Path) -> Path:
    """Draws training and validation loss over optimizer steps. Returns `output`.

    metrics: metrics.jsonl of a run.
    output: Figure to write, .png.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    lines = read_metrics(metrics)
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    axes.plot(*zip(*training, strict=True), linewidth=0.8, label="training, one batch")
    axes.plot(*zip(*validation, strict=True), "o-", label="validation, whole split")
    axes.set(xlabel="optimizer step", ylabel="loss of learned tokens, nats", yscale="log")
    axes.set_title("Demo: loss while fine-tuning (logarithmic axis)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output)
    pyplot.close(figure)
    return output


def tokens_per_image(pixel_model: Path, dct_model: Path, shards: Path) -> dict[str, float]:
    """Mean number of language-model tokens of an image of the val split, with the pixel and with the DCT processor.

    pixel_model: Hugging Face directory of the pixel model.
    dct_model: Hugging Face directory in the coefficient form.
    shards: Prepared folder of shards.
    """
    processors = (Qwen2VLImageProcessor.from_pretrained(pixel_model), DCTImageProcessor.from_pretrained(dct_model))
    encoders = dict(zip(("pixels", "dct"), map(MediaEncoder, processors)))
    images = [content for sample in read_samples(shards, "val") for kind, content in sample.media if kind == "image"]

    def tokens(encoder: MediaEncoder, content: bytes) -> int:
        return math.prod(encoder.expected_grid("image", content)) // encoder.image_processor.merge_size**2

    return {name: sum(tokens(encoder, image) for image in images) / len(images) for name, encoder in encoders.items()}


def draw_samples(model_dir: Path, shards: Path, output: Path, count: int = 8) -> Path:
    """Draws a sheet of val samples: the image before, the decoded tokens with the token grid, and the text. Returns
    `output`.

    model_dir: Hugging Face directory in the coefficient form.
    shards: Prepared folder of shards.
    output: Figure to write, .png.
    count: Samples to draw.

    The learned part of the text is green. Videos show one frame of each time step.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    processor = DCTImageProcessor.from_pretrained(model_dir)
    encoder = QwenTaskEncoder(tokenizer, processor)
    encoded = [(sample, encoder.encode(sample)) for sample in _choose(shards, count)]
    images = [_images(sample, tokens, processor) for sample, tokens in encoded]
    columns = max(map(len, images))
    rows = [_draw_row(row, columns, _pieces(tokens, encoder)) for row, (_, tokens) in zip(images, encoded)]
    rows.insert(0, _draw_legend(rows[0].width))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
        ImageDraw.Draw(sheet).line([(0, top - 1), (sheet.width, top - 1)], fill=FAINT)
    sheet.save(output)
    return output


def _choose(shards: Path, count: int) -> list[ConversationSample]:
    """The first samples of the val split, with at least two videos and one text-only entry if there are any."""
    samples = list(read_samples(shards, "val"))
    videos = [sample for sample in samples if [kind for kind, _ in sample.media] == ["video"]][:2]
    texts = [sample for sample in samples if not sample.media][:1]
    images = [sample for sample in samples if [kind for kind, _ in sample.media] == ["image"]]
    return [*images[: count - len(videos) - len(texts)], *videos, *texts]


def _draw_legend(width: int) -> Image.Image:
    legend = Image.new("RGB", (width, len(LEGEND) * LINE + 2 * GAP), "white")
    for number, (words, colour) in enumerate(LEGEND):
        ImageDraw.Draw(legend).text((GAP, GAP + number * LINE), words, fill=colour, font=_font())
    return legend


def _images(
    sample: ConversationSample, encoded: EncodedSample, processor: DCTImageProcessor
) -> list[tuple[str, Image.Image]]:
    """(caption, image) of the first medium: the source, then what its tokens hold."""
    if not sample.media:
        return []
    kind, content = sample.media[0]
    source = as_array(kind, content, VideoSampling())
    height, width = source.shape[-3:-1]
    caption = f"source: {width} x {height} px" if kind == "image" else f"source: first of {len(source)} frames"
    images = [(caption, Image.fromarray(source if kind == "image" else source[0]))]
    images += _received(encoded, processor)
    return [(name, _fit(image)) for name, image in images[:MOST_IMAGES]]


def _draw_row(images: list[tuple[str, Image.Image]], columns: int, pieces: list[tuple[str, bool]]) -> Image.Image:
    """A row of the sheet.

    columns: for as many images there is room.
    pieces: of the text, as from `_pieces`.
    """
    left = GAP + columns * (CELL + GAP) + GAP
    width, top, font = left + TEXT_WIDTH + GAP, GAP + LINE + 4, _font()
    words = _wrap(pieces, left, width - GAP, font)
    height = max(top + (CELL if images else 0), max(y for _, y, word, _ in words if word) + LINE) + GAP
    row = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(row)
    for column, (name, image) in enumerate(images):
        x = GAP + column * (CELL + GAP)
        row.paste(image, (x, top))
        draw.text((x, GAP), name, fill="black", font=font)
    if not images:
        draw.text((GAP, GAP), "text only", fill="black", font=font)
    for x, y, word, is_learned in words:
        draw.text((x, y), word, fill=LEARNED if is_learned else GIVEN, font=font)
    return row


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, TEXT_SIZE)


def _received(encoded: EncodedSample, processor: DCTImageProcessor) -> list[tuple[str, Image.Image]]:
    """The decoded first medium, an image for each time step of its grid, with the lines between its LLM tokens."""
    video = len(encoded.video_grid_thw) > 0
    grids, tokens = (
        (encoded.video_grid_thw, encoded.pixel_values_videos)
        if video
        else (encoded.image_grid_thw, encoded.pixel_values)
    )
    t, h, w = grids[0].tolist()
    frames = processor.tokenizer.decode(tokens[: t * h * w], (t, h, w))
    step, count = processor.temporal_patch_size, h * w // processor.merge_size**2
    names = [f"received: {count} tokens" + (f", time step {i + 1}" if video else "") for i in range(t)]
    return [(name, _with_grid(frames[i * step], processor)) for i, name in enumerate(names)]


def _with_grid(frame: torch.Tensor, processor: DCTImageProcessor) -> Image.Image:
    image = Image.fromarray(frame.numpy())
    draw, side = ImageDraw.Draw(image), processor.patch_size * processor.merge_size
    for x in range(side, image.width, side):
        draw.line([(x, 0), (x, image.height)], fill="white")
    for y in range(side, image.height, side):
        draw.line([(0, y), (image.width, y)], fill="white")
    return image


def _fit(image: Image.Image) -> Image.Image:
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST)


def _pieces(encoded: EncodedSample, encoder: QwenTaskEncoder) -> list[tuple[str, bool]]:
    """(text, learned) runs of the ids. A run of visual tokens is shortened to its name and number."""
    pads = set(encoder.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"]))
    learned = (encoded.labels != IGNORE_INDEX).tolist()
    pieces = []
    runs = groupby(zip(encoded.input_ids.tolist(), learned, strict=True), key=lambda pair: (pair[0] in pads, pair[1]))
    for (is_pad, is_learned), run in runs:
        ids = [token_id for token_id, _ in run]
        text = f"{encoder.tokenizer.decode(ids[:1])} x {len(ids)}" if is_pad else encoder.tokenizer.decode(ids)
        pieces.append((_legible(text), is_learned))
    return pieces


def _legible(text: str) -> str:
    """With Python's escapes for what the font lacks, such as Chinese."""
    return "".join(
        character if character == "\n" or ord(character) in _characters() else ascii(character)[1:-1]
        for character in text
    )


@lru_cache
def _characters() -> frozenset[int]:
    """The code points that the font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(FONT)).get_charmap())


def _wrap(pieces: list[tuple[str, bool]], left: int, right: int, font) -> list[tuple[float, int, str, bool]]:
    """(x, y, word, learned) of every word in px, wrapped at `right`."""
    placed, x, y = [], float(left), GAP
    for text, is_learned in pieces:
        for number, paragraph in enumerate(text.split("\n")):
            if number:
                x, y = left, y + LINE
            words = paragraph.split(" ")
            for word in [*(f"{word} " for word in words[:-1]), words[-1]]:
                width = font.getlength(word)
                if x + width > right and x > left:
                    x, y = left, y + LINE
                placed.append((x, y, word, is_learned))
                x += width
    return placed
