"""The words of a conversation, as data preparation checks them and training reads them.

A turn is split into pieces: text, kind, text, ..., kind, text, each kind the "image" or "video" that stands there.
"""

import re
from typing import Any

# Speakers of LLaVA (`from`) and OpenAI (`role`) -> roles of Qwen2-VL's chat template
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DEFAULT_SYSTEM = "You are a helpful assistant."  # what the chat template inserts when there is no system turn
PLACEHOLDER = re.compile(r"(?:\r?\n)?<(image|video)>(?:\r?\n)?")  # line breaks around one in a string are no text
PART_KINDS = {"image": "image", "image_url": "image", "video": "video"}  # OpenAI's and Qwen's parts of a turn
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may spell one out, tokenizers take none


def content_of(turn: dict[str, Any]) -> Any:
    return turn.get("value", turn.get("content"))


def kind_of(part: dict[str, Any]) -> str | None:
    """The kind of the medium that a part stands for, None for a part that stands for none."""
    return PART_KINDS.get(str(part.get("type")))


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


def split_turns(contents: list[Any]) -> list[list[str]]:
    """The pieces of each turn of a conversation; `contents` are such that `text_of` takes them.

    A conversation with media as parts has its lists split at these alone, as Qwen2-VL's chat template does: a tag and
    a line break in their text are text. Everything else is split at the placeholders in its text.
    """
    in_parts = any(has_parts(content) for content in contents)
    return [
        split_parts(content) if in_parts and isinstance(content, list) else PLACEHOLDER.split(text_of(content))
        for content in contents
    ]


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
