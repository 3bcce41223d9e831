"""Draw a small Cambrian-format data set and make a tiny, untrained Qwen2-VL checkpoint. Nothing is downloaded.

    python -m dct_qwen2vl.toy.sample_data --output-dir sample

    sample/data/cambrian737k.json     entries: conversations + the names of their images and videos
    sample/data/*.tar                 coco, gqa, ocr_vqa, vg (images), clips (mp4); member names as in the entries
    sample/model/tiny-qwen2-vl/       a Hugging Face directory that stock transformers loads
    sample/summary.json               how many entries of which kind there are, and what can be read

Every question has one short right answer and needs the image. Every answer is equally frequent: a model that does not
see the image stays at chance. The same arguments give the same bytes.

sample_plan.py decides what is drawn and asked, drawing.py draws it, sample_conversations.py asks and answers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import UserError, run_main
from dct_qwen2vl.toy.drawing import (
    COLOURS,
    COUNTS,
    DIRECTIONS,
    EXTENSIONS,
    SHAPES,
    VIDEO_FORMS,
    Scene,
    draw_scene,
    draw_video,
    encode_image,
    encode_video,
)
from dct_qwen2vl.toy.sample_conversations import (
    choose_turns,
    conversation_texts,
    entry_answers,
    make_entry,
    text_only_entry,
)
from dct_qwen2vl.toy.sample_plan import EXTRA_KINDS, Item, plan_items, shuffle

if TYPE_CHECKING:
    import numpy as np

UNREADABLE = ("missing", "zero_byte", "truncated", "garbage", "broken_video")
# height, width; mostly two cells by two, the others wide and tall
IMAGE_SIZES = ((112, 112),) * 8 + ((112, 168), (168, 112))
PARTS = ("data", "model", "summary.json")
CHUNK = 100  # items that a process draws at a time


@dataclass
class DataSet:
    """What is written.

    entries: of the JSON file.
    files: name of a tar -> [(name of a member, its bytes)].
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)

    def add_file(self, name: str, content: bytes) -> None:
        """Adds a file to the tar of its top folder.

        name: Of the member, with its folders.
        content: Its bytes.
        """
        self.files.setdefault(name.split("/", 1)[0], []).append((name, content))

    def add(self, other: DataSet) -> None:
        """What follows."""
        self.entries += other.entries
        for name, members in other.files.items():
            self.files.setdefault(name, []).extend(members)


def draw_data_set(seed: int, total: int, meanwhile: Callable[[], object] = lambda: None) -> DataSet:
    """All entries, in random order, and all files.

    total: images and videos that can be read. Entries without one come on top.
    meanwhile: as in `draw_items`.
    """
    import numpy as np

    rng = np.random.default_rng([seed, 0])
    items = plan_items(rng, total)
    data = draw_items(seed, items, meanwhile)
    add_extras(data, seed, total, first_number=len(items))
    data.entries = shuffle(rng, data.entries)
    return data


def draw_items(seed: int, items: list[Item], meanwhile: Callable[[], object]) -> DataSet:
    """Files and entries of all items, in order. A process for each core draws: an item's random numbers are its own.

    meanwhile: called in this process once the others draw.
    """
    data, chunks = DataSet(), [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = pool.map(draw_chunk, repeat(seed), chunks)
        meanwhile()
        for part in parts:
            data.add(part)
    return data


def draw_chunk(seed: int, items: list[Item]) -> DataSet:
    data = DataSet()
    for item in items:
        add_item(data, seed, item)
    return data


def add_item(data: DataSet, seed: int, item: Item) -> None:
    """Draws `item`. Adds its files and its entry, or two entries, to `data`."""
    import numpy as np

    rng = np.random.default_rng([seed, 1, item.number])
    if item.scene.motion is not None:
        name = f"clips/{item.number:06d}.mp4"
        data.add_file(name, _draw_video_file(rng, item))
        names = [name]
    else:
        names = image_names(item)
        for name in names:
            data.add_file(name, _draw_image_file(rng, item, second=name != names[0]))
    turns = choose_turns(rng, item)
    if item.dialogue_kind == "two_entries" and len(turns) > 1:  # a grey digit has one question, and so one entry
        data.entries.append(make_entry(rng, item, names, turns[:1]))
        turns = turns[1:]
    data.entries.append(make_entry(rng, item, names, turns))


def image_names(item: Item) -> list[str]:
    """Member names of the image or the two images of `item`, in folders named like Cambrian's."""
    number = item.number
    if item.file_kind != "jpeg":
        # a dot in the stem, as web images have: it must not end up in a shard's keys
        return [f"vg/VG_100K/{item.file_kind}.{number:06d}.{EXTENSIONS.get(item.file_kind, 'jpg')}"]
    if item.scene.digit is not None:
        return [f"ocr_vqa/images/{number:09d}.jpg"]
    names = [f"coco/train2017/{number:012d}.jpg" if number % 3 else f"gqa/images/{number}.jpg"]
    if item.dialogue_kind == "two_images":
        names.append(f"coco/train2017/{1_000_000 + number:012d}.jpg")
    return names


def _draw_image_file(rng: np.random.Generator, item: Item, second: bool) -> bytes:
    scene = item.scene
    if second:  # the same colour and shape, any number
        scene = Scene(scene.colour, scene.shape, count=COUNTS[rng.integers(len(COUNTS))])
    height, width = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
    if item.file_kind == "exif_jpeg":
        height, width = ((112, 168), (168, 112))[rng.integers(2)]  # a quarter turn shows
    pixels, opaque = draw_scene(rng, scene, height, width, transparent=item.file_kind == "rgba_png")
    return encode_image(rng, pixels, item.file_kind, item.orientation, opaque)


def _draw_video_file(rng: np.random.Generator, item: Item) -> bytes:
    frames_per_second, frames = VIDEO_FORMS[rng.integers(len(VIDEO_FORMS))]
    video = draw_video(rng, item.scene, frames)
    return encode_video(video, frames_per_second, "mpeg4" if item.file_kind == "mp4_mpeg4" else "libx264")


def add_extras(data: DataSet, seed: int, total: int, first_number: int) -> None:
    """Adds the entries without an image, and those whose image is missing or broken."""
    import numpy as np

    kinds = [kind for kind, share in EXTRA_KINDS.items() for _ in range(max(1, round(total * share / 1000)))]
    for number, kind in enumerate(kinds, start=first_number):
        rng = np.random.default_rng([seed, 2, number])
        if kind == "text_only":
            data.entries.append(text_only_entry(rng, number))
            continue
        item = Item(number, _any_scene(rng, moving=kind == "broken_video"), "mp4_h264", "turns")
        name = f"clips/{number:06d}.mp4" if kind == "broken_video" else f"coco/train2017/{number:012d}.jpg"
        if kind != "missing":
            data.add_file(name, _break_file(rng, kind, item))
        data.entries.append(make_entry(rng, item, [name], choose_turns(rng, item)) | {"file_kind": kind})


def _any_scene(rng: np.random.Generator, moving: bool) -> Scene:
    colour, shape = list(COLOURS)[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]
    if moving:
        return Scene(colour, shape, motion=list(DIRECTIONS)[rng.integers(len(DIRECTIONS))])
    return Scene(colour, shape, count=COUNTS[rng.integers(len(COUNTS))])


def _break_file(rng: np.random.Generator, kind: str, item: Item) -> bytes:
    if kind == "zero_byte":
        return b""
    if kind == "garbage":
        return rng.bytes(500)
    if kind == "broken_video":  # the index of an mp4 is at its end: nothing can be read without it
        content = _draw_video_file(rng, item)
        return content[: len(content) // 2]
    pixels, opaque = draw_scene(rng, item.scene)
    content = encode_image(rng, pixels, "jpeg", 1, opaque)
    return content[: len(content) // 2]


# Writing


def write_data_set(data: DataSet, folder: Path) -> None:
    """Writes cambrian737k.json and one tar for each top folder. Dates and owners are fixed: same data, same bytes.

    data: Entries and files.
    folder: To make.
    """
    folder.mkdir(parents=True)
    text = json.dumps(data.entries, ensure_ascii=False, indent=1) + "\n"
    (folder / "cambrian737k.json").write_text(text, encoding="utf-8")
    for name, members in sorted(data.files.items()):
        with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for member_name, content in members:
                member = tarfile.TarInfo(member_name)
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))


def summarise(data: DataSet, seed: int, total: int) -> dict[str, Any]:
    """Counts by kind. `entries` is `readable` plus the sum of `unreadable`."""
    unreadable = Counter(entry["file_kind"] for entry in data.entries if entry["file_kind"] in UNREADABLE)
    answers: dict[str, Counter] = {}
    for entry in data.entries:
        if entry["file_kind"] not in UNREADABLE:
            for question_type, answer in zip(entry["question_type"], entry_answers(entry), strict=True):
                answers.setdefault(question_type, Counter())[answer] += 1
    return {
        "seed": seed,
        "num_images": total,
        "entries": len(data.entries),
        "readable": len(data.entries) - unreadable.total(),
        "unreadable": dict(sorted(unreadable.items())),
        "file_kinds": _count(data.entries, "file_kind"),
        "dialogue_kinds": _count(data.entries, "dialogue_kind"),
        "answers": {question_type: dict(sorted(counts.items())) for question_type, counts in sorted(answers.items())},
    }


def _count(entries: list[dict[str, Any]], key: str) -> dict[str, int]:
    return dict(sorted(Counter(entry[key] for entry in entries).items()))


# Command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Writes data/, model/, summary.json.")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where data/ and model/ go")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    parser.add_argument(
        "--num-images",
        type=int,
        default=5000,
        metavar="N",
        help="images and videos that can be read, at least 100 (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace data/, model/ and summary.json in DIR")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if arguments.num_images < 100:
        parser.error(f"--num-images must be at least 100 to hold every kind, not {arguments.num_images}")
    if arguments.seed < 0:
        parser.error(f"--seed must not be negative, not {arguments.seed}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("sample_data.py", lambda: make_sample_data(arguments), arguments.debug)


def make_sample_data(arguments: argparse.Namespace) -> int:
    """Raises UserError, OSError."""
    refuse_overwrite(arguments.output_dir, arguments.force)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=arguments.output_dir) as staged:
        summary = build(Path(staged), arguments.seed, arguments.num_images)
        publish(Path(staged), arguments.output_dir)
    print_summary(summary, arguments.output_dir)
    return 0


def refuse_overwrite(output_dir: Path, force: bool) -> None:
    """Raises UserError where there is something to overwrite, unless `force` allows it."""
    present = [part for part in PARTS if (output_dir / part).exists()]
    if present and not force:
        raise UserError(f"{output_dir} already holds {', '.join(present)}; add --force to replace it")


def build(folder: Path, seed: int, total: int) -> dict[str, Any]:
    """Writes all parts. Returns the summary.

    folder: where they go.
    seed: of everything random.
    total: images and videos that can be read.
    """
    from dct_qwen2vl.toy.model import load_libraries, write_checkpoint

    start = time.perf_counter()
    data = draw_data_set(seed, total, meanwhile=load_libraries)
    write_data_set(data, folder / "data")
    print(f"data: {len(data.entries)} entries in {time.perf_counter() - start:.1f} s", flush=True)

    start = time.perf_counter()
    parameters = write_checkpoint(conversation_texts(data.entries), folder / "model" / "tiny-qwen2-vl", seed)
    print(f"model: {parameters:,} parameters in {time.perf_counter() - start:.1f} s", flush=True)
    summary = summarise(data, seed, total)
    write_json(folder / "summary.json", summary)
    return summary


def publish(staged: Path, output_dir: Path) -> None:
    """Moves each finished part from `staged` to its place, over what was there."""
    for part in PARTS:
        target = output_dir / part
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(staged / part, target)


def print_summary(summary: dict[str, Any], output_dir: Path) -> None:
    """Says what has been written."""
    unreadable = ", ".join(f"{kind} {count}" for kind, count in summary["unreadable"].items())
    counts = f"{summary['entries']} entries, {summary['readable']} readable"
    print(f"{output_dir}: {counts}; unreadable on purpose: {unreadable}")


if __name__ == "__main__":
    sys.exit(main())
