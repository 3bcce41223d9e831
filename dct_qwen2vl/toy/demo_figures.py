"""What the demo leaves to look at: loss curve, a sheet of samples as the model receives them, table of accuracies."""

import json
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoTokenizer, Qwen2VLImageProcessor

from dct_qwen2vl.data.media import VideoSampling, as_array
from dct_qwen2vl.data.samples import IGNORE_INDEX, ConversationSample, EncodedSample, read_samples
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.evaluation.scoring import table
from dct_qwen2vl.training.log import read_metrics
from task_encoder import QwenTaskEncoder

CELL = 224  # px, the side of a picture on the sheet
TEXT_WIDTH = 560  # px
LINE = 17  # px of a line of text
LEARNED, GIVEN = (0, 120, 40), (90, 90, 90)
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


def draw_loss(metrics: Path, output: Path) -> Path:
    """Training and validation loss against optimizer steps."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(metrics)
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    axes.plot(*zip(*training, strict=True), linewidth=0.8, label="training, each step")
    axes.plot(*zip(*validation, strict=True), "o-", label="validation split")
    axes.set(xlabel="optimizer step", ylabel="loss of learned tokens, nats", yscale="log", title="Fine-tuning loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output)
    pyplot.close(figure)
    return output


def write_table(accuracy: Path, output: Path) -> Path:
    """The accuracies as text."""
    output.write_text(table(json.loads(accuracy.read_text(encoding="utf-8"))) + "\n", encoding="utf-8")
    return output


def tokens_per_image(pixel_model: Path, dct_model: Path, shards: Path) -> dict[str, float]:
    """Mean number of language-model tokens of an image of the val split, for the pixel and for the DCT processor."""
    processors = {
        "pixels": Qwen2VLImageProcessor.from_pretrained(pixel_model),
        "dct": DCTImageProcessor.from_pretrained(dct_model),
    }
    counts: dict[str, list[int]] = {name: [] for name in processors}
    for sample in read_samples(shards, "val"):
        for kind, content in sample.media:
            if kind == "image":
                picture = as_array(kind, content, VideoSampling())
                for name, processor in processors.items():
                    grid = processor(images=picture, return_tensors="np")["image_grid_thw"][0]
                    counts[name].append(int(np.prod(grid)) // processor.merge_size**2)
    return {name: sum(values) / len(values) for name, values in counts.items()}


def draw_samples(model_dir: Path, shards: Path, output: Path, count: int = 8) -> Path:
    """For each of `count` val samples: the picture before, what its tokens decode to with the token grid, its text with
    the learned part in green. Clips show one frame of each token row in time."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    processor = DCTImageProcessor.from_pretrained(model_dir)
    encoder = QwenTaskEncoder(tokenizer, processor)
    rows = [_sample_row(sample, encoder) for sample in _choose(shards, count)]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(output)
    return output


def _choose(shards: Path, count: int) -> list[ConversationSample]:
    """The first samples of the val split, at least two clips and one text-only entry among them if there are any."""
    samples = list(read_samples(shards, "val"))
    clips = [sample for sample in samples if [kind for kind, _ in sample.media] == ["video"]][:2]
    texts = [sample for sample in samples if not sample.media][:1]
    images = [sample for sample in samples if [kind for kind, _ in sample.media] == ["image"]]
    return [*images[: count - len(clips) - len(texts)], *clips, *texts]


def _sample_row(sample: ConversationSample, encoder: QwenTaskEncoder) -> Image.Image:
    encoded = encoder.encode(sample)
    pictures = []
    if sample.media:
        kind, content = sample.media[0]
        source = as_array(kind, content, VideoSampling())
        pictures.append(("source", _fit(Image.fromarray(source if kind == "image" else source[0]))))
        pictures += [(name, _fit(picture)) for name, picture in _received(encoded, encoder.image_processor)]
    pictures, font = pictures[:4], ImageFont.truetype(FONT, 12)
    left, right = len(pictures) * (CELL + 8) + 12, 4 * (CELL + 8) + TEXT_WIDTH - 8
    words = _wrap(_pieces(encoded, encoder), left, right, font)
    height = max((CELL if pictures else 0) + 26, max(y for _, y, _, _ in words) + 2 * LINE)
    row = Image.new("RGB", (right + 8, height), "white")
    draw = ImageDraw.Draw(row)
    for column, (name, picture) in enumerate(pictures):
        row.paste(picture, (column * (CELL + 8) + 4, 20))
        draw.text((column * (CELL + 8) + 4, 2), name, fill="black", font=font)
    for x, y, word, is_learned in words:
        draw.text((x, y), word, fill=LEARNED if is_learned else GIVEN, font=font)
    return row


def _received(encoded: EncodedSample, processor: DCTImageProcessor) -> list[tuple[str, Image.Image]]:
    """The decoded first medium, a picture for each time step of its grid, with the lines between its LLM tokens."""
    clip = len(encoded.video_grid_thw) > 0
    grids, tokens = (
        (encoded.video_grid_thw, encoded.pixel_values_videos)
        if clip
        else (encoded.image_grid_thw, encoded.pixel_values)
    )
    t, h, w = grids[0].tolist()
    frames = processor.tokenizer.decode(tokens[: t * h * w], (t, h, w))
    step, count = processor.temporal_patch_size, h * w // processor.merge_size**2
    names = [f"received: {count} tokens" + (f", time {i}" if clip else "") for i in range(t)]
    return [(name, _with_grid(frames[i * step], processor)) for i, name in enumerate(names)]


def _with_grid(frame: torch.Tensor, processor: DCTImageProcessor) -> Image.Image:
    picture = Image.fromarray(frame.numpy())
    draw, side = ImageDraw.Draw(picture), processor.patch_size * processor.merge_size
    for x in range(side, picture.width, side):
        draw.line([(x, 0), (x, picture.height)], fill="white")
    for y in range(side, picture.height, side):
        draw.line([(0, y), (picture.width, y)], fill="white")
    return picture


def _fit(picture: Image.Image) -> Image.Image:
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST)


def _pieces(encoded: EncodedSample, encoder: QwenTaskEncoder) -> list[tuple[str, bool]]:
    """(text, learned) runs of the ids; a run of visual tokens is shortened to its name and number."""
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
    placed, x, y = [], float(left), 20
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
