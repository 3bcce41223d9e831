"""The words of a conversation, as data preparation checks them and training reads them.

A turn is split into pieces: text, kind, text, ..., kind, text, each kind the "image" or "video" that stands there.
"""

import re
from collections.abc import Iterator
from typing import Any

# Speakers of LLaVA (`from`) and OpenAI (`role`) -> roles of Qwen2-VL's chat template
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DEFAULT_SYSTEM = "You are a helpful assistant."  # what the chat template inserts when there is no system turn
PLACEHOLDER = re.compile(r"(?:\r?\n)?<(image|video)>(?:\r?\n)?")  # line breaks around one in a string are no text
TAGS = r"(?:<(?:image|video)>[ \t]*)+"
LOST_IN_QUESTION = re.compile(rf"\A\s*{TAGS}|^[ \t]*{TAGS}\r?$", re.MULTILINE)  # first, or alone on a line
LOST_ELSEWHERE = re.compile(r"\A\s*(?:<(?:image|video)>\s*)+\Z")  # nothing else is there
MEDIA_FIELDS = ("image", "images", "video", "videos")  # of an entry
PART_KINDS = {"image": "image", "image_url": "image", "video": "video"}  # OpenAI's and Qwen's parts of a turn
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may spell one out, tokenizers take none


def content_of(turn: dict[str, Any]) -> Any:
    return turn.get("value", turn.get("content"))


def kind_of(part: dict[str, Any]) -> str | None:
    """The kind of the medium that a part stands for, None for a part that stands for none."""
    return PART_KINDS.get(str(part.get("type")))


def list_parts(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of all turns that stand for media, in order; turns that are none hold none."""
    turns = entry.get("conversations") or entry.get("messages")
    for turn in turns if isinstance(turns, list) else ():
        content = content_of(turn) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and kind_of(part):
                yield part


def name_in(part: dict[str, Any]) -> Any:
    """What a part says of its medium's file: a name, or a list of them for a video's frames; None where it says none.

    {"type": "image", "image": name}, {"type": "image_url", "image_url": {"url": name}}, {"type": "video", "video":
    name}. `file://` before a name is left out. A `data:` URL is no name: it is the image itself.
    """
    value = part.get(part["type"])
    value = value.get("url") if isinstance(value, dict) else value
    if isinstance(value, list):
        return [strip_scheme(name) for name in value] or None
    return None if not value or (isinstance(value, str) and value.startswith("data:")) else strip_scheme(value)


def strip_scheme(name: Any) -> Any:
    return name.removeprefix("file://") if isinstance(name, str) else name


def text_of(content: Any) -> str | None:
    """A turn's text; OpenAI's list of parts becomes text with placeholders. None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return None
    pieces = [f"<{kind_of(part)}>" if kind_of(part) else words_of(part) for part in content]
    return "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else None


def words_of(part: dict[str, Any]) -> Any:
    return part.get("text") if part.get("type") == "text" else None


def has_parts(content: Any) -> bool:
    """Whether media stand in a turn as parts."""
    return isinstance(content, list) and any(kind_of(part) for part in content)


def names_media(entry: Any) -> bool:
    """Whether an entry names any media beside its turns."""
    return isinstance(entry, dict) and any(entry.get(name) for name in MEDIA_FIELDS)


def split_turns(turns: list[tuple[str, Any]], has_media: bool) -> list[list[str]]:
    """The pieces of each turn of a conversation, given as role and content; contents are such that `text_of` takes
    them. has_media: whether there are media to place.

    A conversation with media as parts has its lists split at these alone, as Qwen2-VL's chat template does: a tag and
    a line break in their text are text. Everything else is split at the placeholders in its text. Without media a tag
    is text, unless it says that there were some: a question begins with it or has it alone on a line, another turn
    has nothing else in it.
    """
    in_parts = any(has_parts(content) for _, content in turns)
    pieces = []
    for role, content in turns:
        text = text_of(content)
        if in_parts and isinstance(content, list):
            pieces.append(split_parts(content))
        elif has_media or in_parts or has_lost_media(role, text):
            pieces.append(PLACEHOLDER.split(text))
        else:
            pieces.append([text])
    return pieces


def has_lost_media(role: str, text: str) -> bool:
    """Whether a text has placeholders of media that an entry without any must have lost."""
    return bool((LOST_IN_QUESTION if role == "user" else LOST_ELSEWHERE).search(text)) if "<" in text else False


def split_parts(parts: list[dict[str, Any]]) -> list[str]:
    pieces = [""]
    for part in parts:
        kind = kind_of(part)
        if kind:
            pieces += [kind, ""]
        else:
            pieces[-1] += words_of(part)
    return pieces


def put_first(kinds: list[str], pieces: list[str]) -> list[str]:
    """The pieces with media of these kinds before them."""
    return [piece for kind in kinds for piece in ("", kind)] + pieces
