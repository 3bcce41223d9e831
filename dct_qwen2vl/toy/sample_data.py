"""Draw a small Cambrian-format data set and make a tiny, untrained Qwen2-VL checkpoint. Nothing is downloaded.

    python sample_data.py --output-dir sample

    sample/data/cambrian737k.json     entries: conversations + the names of their images and videos
    sample/data/*.tar                 coco, gqa, ocr_vqa, vg (images), videos (mp4); member names as in the entries
    sample/model/tiny-qwen2-vl/       a Hugging Face directory that stock transformers loads
    sample/summary.json               how many entries of which kind there are, and what can be read

Every question has one short right answer, needs the image, and is asked so that every answer is equally frequent:
a model that does not see the image stays at chance. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dct_qwen2vl.toy.drawing import (
    COLOURLESS,
    COLOURS,
    COUNTS,
    DIGITS,
    DIRECTIONS,
    EXTENSIONS,
    FILE_KINDS,
    ORIENTATIONS,
    SHAPES,
    VIDEO_FORMS,
    Scene,
    draw_scene,
    draw_video,
    encode_image,
    encode_video,
)

if TYPE_CHECKING:
    import numpy as np

QUESTIONS = {
    "colour": ("What colour do you see?", "Which colour is it?", "Name the colour.", "What is the main colour?"),
    "shape": ("What shape do you see?", "Which shape is it?", "Name the shape.", "What kind of shape is drawn?"),
    "count": ("How many shapes are there?", "Count the shapes.", "How many do you see?"),
    "digits": ("What digit is printed?", "Which digit do you see?", "Read the digit."),
    "motion": ("Which way does it move?", "In which direction does it move?", "Where is it going?"),
}
# The answers stay English, so that they stay balanced.
NON_ASCII_QUESTIONS = {
    "colour": ("这是什么颜色？", "¿De qué color es?", "Какого это цвета?"),
    "shape": ("这是什么形状？", "¿Qué forma tiene?", "Welche Form könnte das sein – „rund“ oder „eckig“?"),
    "count": ("有多少个形状？", "¿Cuántas figuras hay?", "Combien de formes — où qu’elles soient ?"),
    "digits": ("这是哪个数字？", "¿Qué número está impreso?", "Какая это цифра?"),
    "motion": ("它往哪边移动？", "¿Hacia dónde se mueve?", "Où va-t-il ? ➡️⬅️"),
}
PAIR_QUESTIONS = {
    "colour": ("What colour do both pictures show?", "Which colour is in both pictures?"),
    "shape": ("What shape do both pictures show?", "Which shape is in both pictures?"),
}
TEXT_ONLY = (
    ("What is two plus two?", "4"),
    ("What is the opposite of left?", "right"),
    ("What is the opposite of up?", "down"),
    ("Which shape has three corners?", "triangle"),
    ("Which shape has no corners?", "circle"),
    ("What colour is a ripe tomato?", "red"),
    ("What colour is grass?", "green"),
    ("How many sides has a square?", "4"),
    ("¿De qué color es un limón maduro?", "yellow"),
    ("晴天的天空是什么颜色？", "blue"),
)
SYSTEM_TURNS = ("Answer with one word.", "You look at pictures and answer briefly.")


# So many of a kind in a small data set; 1 of the others.
LEAST = {"exif_jpeg": len(ORIENTATIONS), "two_entries": 2}
# Shares of what is shown, per 1,000 images and videos; the rest shows shapes.
DIGIT_SHARE, VIDEO_SHARE = 320, 130
# How often each form of a conversation occurs, per 1,000; the others ask all there is to ask, one question a turn.
DIALOGUE_KINDS = {
    "one_turn": 40,
    "openai": 30,
    "system": 30,
    "non_ascii": 25,
    "two_entries": 20,  # two entries on one image, with one id, as Cambrian has them
}
PAIR_SHARE = 20  # two images in one entry
# Entries besides those: without an image, or with one that cannot be read; per 1,000.
EXTRA_KINDS = {"text_only": 30, "missing": 8, "zero_byte": 6, "truncated": 8, "garbage": 6, "broken_video": 4}
UNREADABLE = ("missing", "zero_byte", "truncated", "garbage", "broken_video")
# height, width; mostly two cells by two, the others wide and tall
IMAGE_SIZES = ((112, 112),) * 8 + ((112, 168), (168, 112))


@dataclass(frozen=True)
class Item:
    """One thing to draw and ask about. `number` names its files and seeds its random numbers."""

    number: int
    scene: Scene
    file_kind: str
    dialogue_kind: str
    orientation: int = 1


@dataclass
class DataSet:
    """What is written: entries of the JSON file, and tar name -> [(member name, bytes)]."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)

    def add_file(self, name: str, content: bytes) -> None:
        self.files.setdefault(name.split("/", 1)[0], []).append((name, content))


def quota(shares: dict[str, int], total: int, default: str) -> list[str]:
    """`total` kinds: shares are per 1,000, never less than LEAST of a kind, `default` for the rest."""
    kinds = []
    for kind, share in shares.items():
        kinds += [kind] * max(LEAST.get(kind, 1), round(total * share / 1000))
    return (kinds + [default] * total)[:total]


def cycle_scenes(rng: np.random.Generator, scenes: list[Scene], total: int) -> list[Scene]:
    """`total` scenes, each as often as any other (give or take one), in random order."""
    rounds = -(-total // len(scenes))
    return [scenes[i] for _ in range(rounds) for i in rng.permutation(len(scenes))][:total]


def plan_items(rng: np.random.Generator, total: int) -> list[Item]:
    """Decide what to draw, before anything is drawn: answers balanced, every kind of file and conversation present."""
    product = itertools.product
    videos, digits = round(total * VIDEO_SHARE / 1000), round(total * DIGIT_SHARE / 1000)
    shapes = total - videos - digits
    images = cycle_scenes(rng, [Scene(c, s, count=n) for c, s, n in product(COLOURS, SHAPES, COUNTS)], shapes)
    images += cycle_scenes(rng, [Scene(c, digit=d) for c, d in product(COLOURS, DIGITS)], digits)
    moving = cycle_scenes(rng, [Scene(c, s, motion=m) for c, s, m in product(COLOURS, SHAPES, DIRECTIONS)], videos)

    kinds = _shuffle(rng, quota(FILE_KINDS, len(images), "jpeg"))
    kinds += _shuffle(rng, quota({"mp4_mpeg4": 125}, videos, "mp4_h264"))
    dialogues = _shuffle(rng, quota(DIALOGUE_KINDS, total, "turns"))
    orientations = itertools.cycle(ORIENTATIONS)
    for number in _eligible_for_pairs(rng, images, kinds, dialogues)[: max(1, round(total * PAIR_SHARE / 1000))]:
        dialogues[number] = "two_images"
    planned = enumerate(zip(images + moving, kinds, dialogues, strict=True))
    return [
        Item(number, scene, kind, dialogue, next(orientations) if kind == "exif_jpeg" else 1)
        for number, (scene, kind, dialogue) in planned
    ]


def _eligible_for_pairs(
    rng: np.random.Generator, images: list[Scene], kinds: list[str], dialogues: list[str]
) -> list[int]:
    """Numbers of the plain images of shapes with a plain conversation, in random order."""
    plain = [n for n, s in enumerate(images) if s.count and kinds[n] == "jpeg" and dialogues[n] == "turns"]
    return _shuffle(rng, plain)


def _shuffle(rng: np.random.Generator, values: list) -> list:
    return [values[i] for i in rng.permutation(len(values))]


def add_item(data: DataSet, seed: int, item: Item) -> None:
    """Draw `item` and add its files and its entry (or two entries) to `data`."""
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


def choose_turns(rng: np.random.Generator, item: Item) -> list[tuple[str, str, str]]:
    """(question type, question, answer) of each turn, in random order."""
    answers = item.scene.answers()
    if item.file_kind in COLOURLESS:
        del answers["colour"]
    questions = NON_ASCII_QUESTIONS if item.dialogue_kind == "non_ascii" else QUESTIONS
    if item.dialogue_kind == "two_images":
        questions = PAIR_QUESTIONS
        answers = {question_type: answers[question_type] for question_type in PAIR_QUESTIONS}
    types = _shuffle(rng, list(answers))
    if item.dialogue_kind == "one_turn":
        types = types[:1]
    return [(kind, questions[kind][rng.integers(len(questions[kind]))], answers[kind]) for kind in types]


def make_entry(
    rng: np.random.Generator, item: Item, names: list[str], turns: list[tuple[str, str, str]]
) -> dict[str, Any]:
    """One entry of the JSON file. `names` are those of its image, images or video."""
    is_video = item.scene.motion is not None
    placeholders = "\n".join(["<video>" if is_video else "<image>"] * len(names))
    conversations = []
    if item.dialogue_kind == "system":
        conversations.append(("system", SYSTEM_TURNS[rng.integers(len(SYSTEM_TURNS))]))
    for number, (_, question, answer) in enumerate(turns):
        if number == 0:
            after = rng.random() < 0.1  # Cambrian has both orders
            question = f"{question}\n{placeholders}" if after else f"{placeholders}\n{question}"
        conversations += [("human", question), ("gpt", answer)]
    return {
        "id": f"{item.number:012d}",
        "video" if is_video else "image": names if len(names) > 1 else names[0],
        "conversations": _format_turns(conversations, item.dialogue_kind == "openai"),
        "source": names[0].split("/", 1)[0],
        "question_type": [question_type for question_type, _, _ in turns],
        "file_kind": item.file_kind,
        "dialogue_kind": item.dialogue_kind,
    }


def _format_turns(turns: list[tuple[str, str]], openai: bool) -> list[dict[str, str]]:
    if not openai:
        return [{"from": speaker, "value": text} for speaker, text in turns]
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return [{"role": roles[speaker], "content": text} for speaker, text in turns]


def add_extras(data: DataSet, seed: int, total: int, first_number: int) -> None:
    """Add the entries without an image, and those whose image is missing or broken."""
    import numpy as np

    kinds = [kind for kind, share in EXTRA_KINDS.items() for _ in range(max(1, round(total * share / 1000)))]
    for number, kind in enumerate(kinds, start=first_number):
        rng = np.random.default_rng([seed, 2, number])
        if kind == "text_only":
            data.entries.append(_text_only_entry(rng, number))
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


def _text_only_entry(rng: np.random.Generator, number: int) -> dict[str, Any]:
    question, answer = TEXT_ONLY[rng.integers(len(TEXT_ONLY))]
    return {
        "id": f"text-{number:06d}",
        "conversations": _format_turns([("human", question), ("gpt", answer)], openai=False),
        "source": "text",
        "question_type": ["text"],
        "file_kind": "text_only",
        "dialogue_kind": "turns",
    }


def draw_data_set(seed: int, total: int) -> DataSet:
    """All entries, in random order, and all files. `total` counts those that show something and can be read."""
    import numpy as np

    rng = np.random.default_rng([seed, 0])
    data = DataSet()
    items = plan_items(rng, total)
    for item in items:
        add_item(data, seed, item)
    add_extras(data, seed, total, first_number=len(items))
    data.entries = _shuffle(rng, data.entries)
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_data_set(data: DataSet, folder: Path) -> None:
    """Write cambrian737k.json and one tar for each top folder. Dates and owners are fixed: same data, same bytes."""
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
    """Counts by kind. `entries` = `readable` + the sum of `unreadable`."""
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


def entry_answers(entry: dict[str, Any]) -> list[str]:
    """The answers of an entry, turn by turn."""
    turns = entry["conversations"]
    return [t.get("value", t.get("content")) for t in turns if t.get("from", t.get("role")) in ("gpt", "assistant")]


def conversation_texts(entries: list[dict[str, Any]]) -> Iterator[str]:
    """What the tokenizer is trained on: every turn with the words that ChatML puts around it."""
    for entry in entries:
        yield "system\nYou are a helpful assistant."
        for turn in entry["conversations"]:
            yield turn.get("value", turn.get("content"))
            yield "user\nassistant\n"


def publish(staged: Path, output_dir: Path) -> None:
    """Move each finished part from `staged` to its place, over what was there."""
    for part in PARTS:
        target = output_dir / part
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(staged / part, target)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

PARTS = ("data", "model", "summary.json")


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
    try:
        refuse_overwrite(arguments.output_dir, arguments.force)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=arguments.output_dir) as staged:
            summary = build(Path(staged), arguments.seed, arguments.num_images)
            publish(Path(staged), arguments.output_dir)
    except OSError as error:
        if arguments.debug:
            raise
        print(f"sample_data.py: {error}", file=sys.stderr)
        return 1
    print_summary(summary, arguments.output_dir)
    return 0


def refuse_overwrite(output_dir: Path, force: bool) -> None:
    """Raise FileExistsError when there is something to overwrite and nobody said so."""
    present = [part for part in PARTS if (output_dir / part).exists()]
    if present and not force:
        raise FileExistsError(f"{output_dir} already holds {', '.join(present)}; add --force to replace it")


def build(folder: Path, seed: int, total: int) -> dict[str, Any]:
    """Write all parts below `folder`; returns the summary."""
    start = time.perf_counter()
    data = draw_data_set(seed, total)
    write_data_set(data, folder / "data")
    print(f"data: {len(data.entries)} entries in {time.perf_counter() - start:.1f} s", flush=True)

    from dct_qwen2vl.toy.model import write_checkpoint

    start = time.perf_counter()
    parameters = write_checkpoint(conversation_texts(data.entries), folder / "model" / "tiny-qwen2-vl", seed)
    print(f"model: {parameters:,} parameters in {time.perf_counter() - start:.1f} s", flush=True)
    summary = summarise(data, seed, total)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def print_summary(summary: dict[str, Any], output_dir: Path) -> None:
    """Say what is there."""
    unreadable = ", ".join(f"{kind} {count}" for kind, count in summary["unreadable"].items())
    print(f"{output_dir}: {summary['entries']} entries, {summary['readable']} readable; on purpose not: {unreadable}")


if __name__ == "__main__":
    sys.exit(main())
