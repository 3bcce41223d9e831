"""The questions of a split, with their media as training reads them, and how far the split has been read."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from dct_qwen2vl.data.conversations import Message
    from dct_qwen2vl.data.media_encoder import Frames


GREY = 128  # of 0..255


ASKED_AT_ONCE = 256  # questions whose media are in memory together, at most


MEDIA_AT_ONCE = 2 << 30  # bytes of them


NO_TYPE = "all"  # of a question whose entry names no type
ALL_TYPES = "overall"  # the table's own line
MOST_CHARACTERS = 60  # of a type's name


@dataclass(frozen=True)
class Question:
    """One question.

    pieces: text, with "image" or "video" between texts where a medium stands.
    media: (kind, frames) in the order of the entry; frames as `media_encoder.MediaEncoder.read` gives them.
    system: the entry's own system turn, None for the default.
    """

    key: str
    turn: int
    question_type: str
    pieces: tuple[str, ...]
    answer: str
    media: tuple[tuple[str, "Frames"], ...]
    system: str | None = None

    @property
    def text(self) -> str:
        """The question without its media."""
        return "".join(self.pieces[::2])


@dataclass
class Reading:
    """How far a split has been read.

    entries: Entries asked, the last one perhaps in part.
    questions: Questions of these.
    turns: Questions of the last entry. 0 once there are no more of it.
    left_out: Entries that cannot be used, by reason.
    """

    entries: int = 0
    questions: int = 0
    turns: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, for a JSON file."""
        return {**vars(self), "left_out": dict(self.left_out)}

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> "Reading":
        """What `as_dict` gave; None: nothing has been read."""
        return cls(**{**values, "left_out": Counter(values["left_out"])}) if values else cls()

    @property
    def entries_read(self) -> int:
        """Entries that were read, with those that were left out."""
        return self.entries + self.left_out.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items()))
        left_out = f"{self.left_out.total()}{f' ({reasons})' if reasons else ''}"
        return f"read {self.entries_read} entries = asked {self.entries} + left out {left_out}"


def read_questions(
    data_dir: Path,
    split: str,
    limit: int | None,
    read: Callable[[str, Any], "Frames"],
    special: Iterable[str] = (),
    reading: Reading | None = None,
) -> Iterator[Question]:
    """The questions of a split, in the order of its shards. Entries that cannot be used are reported on stderr.

    data_dir: Prepared folder of shards.
    split: Name of the split.
    limit: Most questions. None: all.
    read: Kind and content of a media part -> its frames, as `MediaEncoder.read`.
    special: Tokens that training learns as text where a text contains them (`TextTokens.stay_text`). The chat template
        would give them their special meaning, so questions with them are left out.
    reading: Where to begin. It is kept up to date.
    """
    from tqdm import tqdm

    from dct_qwen2vl.data.media import BadSample
    from dct_qwen2vl.data.reading import MediaError
    from dct_qwen2vl.data.sample_encoder import place_media as check_media
    from dct_qwen2vl.data.samples import parse_entry, parse_messages, read_samples

    reading = Reading() if reading is None else reading
    begun = reading.entries_read - (reading.turns > 0)
    for sample in islice(read_samples(data_dir, split), begun, None):
        if limit is not None and reading.questions >= limit:
            return
        try:
            entry = parse_entry(sample.entry)
            messages = parse_messages(entry, bool(sample.media))
            refuse_special(messages, special)
            check_media(messages, [kind for kind, _ in sample.media])  # a question without its image is not asked
            media = tuple((kind, read(kind, content)) for kind, content in sample.media)
        except (BadSample, MediaError) as error:
            reading.left_out[getattr(error, "reason", "undecodable_media")] += 1
            tqdm.write(f"evaluate_qwen2vl.py: {sample.__key__} left out: {error}", file=sys.stderr)  # beside its bar
            continue
        system = messages[0].pieces[0] if messages[0].role == "system" else None
        spoken = [message.pieces for message in messages if message.role != "system"]
        types = list_types(entry, len(spoken) // 2)
        reading.entries += not reading.turns
        for turn, (question, (answer,)) in enumerate(zip(spoken[::2], spoken[1::2], strict=True)):
            if turn < reading.turns:
                continue
            if limit is not None and reading.questions >= limit:
                return
            reading.questions += 1
            reading.turns += 1
            yield Question(sample.__key__, turn, types[turn], place_media(question, media), answer, media, system)
        reading.turns = 0


def list_types(entry: Any, count: int) -> list[str]:
    """The type of each of an entry's questions: one for all of them, or a list with one for each."""
    given = entry.get("question_type") if isinstance(entry, dict) else None
    types = given[:count] if isinstance(given, list) else [given] * count
    return [name_type(kind) for kind in types] + [NO_TYPE] * (count - len(types))


def name_type(given: Any) -> str:
    """A type as one line of the table is called; NO_TYPE where an entry names none."""
    if not isinstance(given, (str, int, float)):
        return NO_TYPE
    name = " ".join(str(given).encode("utf-8", "replace").decode().split())[:MOST_CHARACTERS]
    return f"{name} (type)" if name == ALL_TYPES else name or NO_TYPE


def refuse_special(messages: "list[Message]", special: Iterable[str]) -> None:
    """Raises BadSample for a question or system turn with a special token in its text: training learns it as text,
    which the chat template cannot say."""
    from dct_qwen2vl.data.media import BadSample

    for message in messages:
        for token in special if message.role != "assistant" else ():
            if any(token in text for text in message.pieces[::2]):
                raise BadSample("special_token", f"its text spells out {token}")


def place_media(pieces: list[str], media: tuple) -> tuple[str, ...]:
    """The media of an entry stand where this turn has placeholders for all of them, or else before its text."""
    if pieces[1::2] == [kind for kind, _ in media]:
        return tuple(pieces)
    before = [part for kind, _ in media for part in ("", kind)]
    return (*before, "".join(pieces[::2]))


def blinded(question: Question) -> Question:
    """The same question with grey media of the same size."""
    return replace(question, media=tuple((kind, grey_frames(frames)) for kind, frames in question.media))


def grey_frames(frames: "Frames") -> "np.ndarray":
    """Grey RGB of the size of an image, a video or its planes: uint8 [H, W, 3] or [T, H, W, 3]."""
    import numpy as np

    shape = frames.shape if isinstance(frames, np.ndarray) else (*frames.luma.shape, 3)
    return np.full(shape, GREY, np.uint8)


def in_rounds(questions: Iterable[Question], most: int) -> Iterator[list[Question]]:
    """Lists of questions, each small enough for memory.

    questions: In order.
    most: Questions of a list, at most. A list is shorter if its media fill MEDIA_AT_ONCE.
    """
    chosen, size = [], 0
    for question in questions:
        chosen.append(question)
        size += sum(frames.nbytes for _, frames in question.media)
        if len(chosen) >= most or size >= MEDIA_AT_ONCE:
            yield chosen
            chosen, size = [], 0
    if chosen:
        yield chosen
