"""The words of a conversation, as data preparation checks them and training reads them.

A turn is split into pieces: text, kind, text, ..., kind, text, each kind the "image" or "video" that stands there.

Where a question has no `<image>` or `<video>`, the markers that Qwen2-VL's chat template writes stand for them, and so
does Qwen-VL's `<img>NAME</img>`.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# Speakers of LLaVA (`from`), OpenAI (`role`) and ShareGPT -> roles of Qwen2-VL's chat template
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"},
    **{"system": "system", "developer": "system"},
}
DEFAULT_SYSTEM = "You are a helpful assistant."  # what the chat template inserts when there is no system turn
PLACEHOLDER = re.compile(r"(?:\r?\n)?<(image|video)>(?:\r?\n)?")  # line breaks around one in a string are no text
TAGS = r"(?:<(?:image|video)>[ \t]*)+"
LOST_IN_QUESTION = re.compile(rf"\A\s*{TAGS}|^[ \t]*{TAGS}\r?$", re.MULTILINE)  # first, or alone on a line
LOST_ELSEWHERE = re.compile(r"\A\s*(?:<(?:image|video)>\s*)+\Z")  # nothing else is there
MEDIA_FIELDS = ("image", "images", "video", "videos")  # of an entry
PART_KINDS = {"image": "image", "image_url": "image", "video": "video"}  # OpenAI's and Qwen's parts of a turn
SYSTEM_FIELDS = ("system", "system_prompt")  # of an entry: what other tools take for the system turn
LEARNED_FIELDS = frozenset({"loss", "weight", "train"})  # of an answer: ms-swift, OpenAI, axolotl
NAME_FIELDS = ("path", "url")  # of an object in place of a name: `datasets`, OpenAI
DEEPEST_NAMES = 8  # lists of lists of names
WRAPPED = re.compile(r"<\|vision_start\|>(<(?:image|video)>)<\|vision_end\|>")
TEMPLATE_MARKER = re.compile(r"(?:<\|vision_start\|>)?(?:<\|(image|video)_pad\|>)+(?:<\|vision_end\|>)?")
NAMED_IMAGE = re.compile(r"<img>([^<>\n]*[./][^<>\n]*)</img>")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may spell one out, tokenizers take none


class Message(NamedTuple):
    """A turn as it is learned.

    role: "system", "user" or "assistant".
    pieces: text, kind, text, ...; of a system turn one text.
    is_learned: whether an answer is.
    """

    role: str
    pieces: list[str]
    is_learned: bool = True


def turns_of(entry: Any) -> Any:
    """The turns of an entry, or of a bare list.

    A system prompt in a field of the entry comes first, as a turn of the same style, unless the turns have one.
    """
    if not isinstance(entry, dict):
        return entry
    turns = entry.get("conversations") or entry.get("messages")
    prompt = system_beside(entry)
    if prompt is None or not isinstance(turns, list) or not turns:
        return turns
    own = own_system(turns)
    if own is not None and not is_blank(own):
        return turns
    names = ("role", "content") if isinstance(turns[0], dict) and "role" in turns[0] else ("from", "value")
    return [dict(zip(names, ("system", prompt))), *turns[own is not None :]]


def system_beside(entry: dict[str, Any]) -> Any:
    """The system prompt that stands beside the turns, None where there is none."""
    found = (entry[name] for name in SYSTEM_FIELDS if name in entry)
    return next((prompt for prompt in found if prompt is not None and not is_blank(prompt)), None)


def own_system(turns: list[Any]) -> Any:
    """What the first turn says, where it is the system's; None otherwise."""
    first = turns[0] if isinstance(turns[0], dict) else {}
    return content_of(first) if role_of(first.get("from", first.get("role"))) == "system" else None


def role_of(speaker: Any) -> str | None:
    """The role of who speaks, whatever the letter case; None for a speaker that ROLES does not name."""
    if not isinstance(speaker, str):
        return None
    return ROLES.get(speaker) or ROLES.get(speaker.strip().lower())


def is_blank(value: Any) -> bool:
    """Whether a value is a text without any character but white space."""
    return isinstance(value, str) and (not value or value.isspace())


def learning_of(turn: dict[str, Any]) -> Any:
    """What a turn says about being learned: the least of LEARNED_FIELDS, or a value that is no share. True without
    any of them."""
    if LEARNED_FIELDS.isdisjoint(turn):
        return True
    said = [turn[name] for name in LEARNED_FIELDS if turn.get(name) is not None]
    odd = [value for value in said if not is_share(value)]
    return odd[0] if odd else min(said, default=True)


def is_share(value: Any) -> bool:
    """Whether a value says how much a turn is learned: true, false, or a number from 0 on."""
    return isinstance(value, (bool, int, float)) and value >= 0


def content_of(turn: dict[str, Any]) -> Any:
    """What a turn says, in the style of LLaVA or of OpenAI."""
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
    name}, or the name under `path` or `url`. A `data:` URL is no name: it is the image itself.
    """
    value = medium_in(part)
    names = [name for name in list_names(value) if not is_data_url(name)]
    return names if isinstance(value, list) and names else next(iter(names), None)


def medium_in(part: dict[str, Any]) -> Any:
    """What a part has of its medium, under its type or, as transformers writes it, under `path` or `url`."""
    value = part.get(part["type"])
    return value if list_names(value) else next((part[name] for name in NAME_FIELDS if part.get(name)), value)


def list_names(value: Any) -> list[Any]:
    """The names of media in a field: one name, a list, or lists in a list.

    A field that holds only None, "", {} and [] names none. An object is named by its `path` or `url`. Values that are
    no name stay.
    """
    if isinstance(value, str):  # next to all are
        return [] if is_blank(value) else [value]
    names = flatten_names(value)
    return [] if all(map(names_nothing, names)) else names


def flatten_names(value: Any, depth: int = 0) -> list[Any]:
    if isinstance(value, list) and depth < DEEPEST_NAMES:
        return [name for item in value for name in flatten_names(item, depth + 1)]
    if isinstance(value, dict):
        value = next((value[name] for name in NAME_FIELDS if value.get(name)), value)
    return [value]


def names_nothing(value: Any) -> bool:
    """Whether a value of a field names no medium: None, "", blanks or {}."""
    return value is None or is_blank(value) or value == {}


def strip_scheme(name: Any) -> Any:
    """A name without `file://`. Other values stay."""
    return name.removeprefix("file://") if isinstance(name, str) else name


def holds_medium(part: dict[str, Any]) -> bool:
    """Whether a part has the medium itself in place of a name."""
    return any(map(is_data_url, flatten_names(medium_in(part))))


def is_data_url(name: Any) -> bool:
    """Whether a name is a `data:` URL, which holds the medium itself."""
    return isinstance(name, str) and ":" in name and name[:5].lower() == "data:"


def list_named_images(entry: dict[str, Any]) -> list[str]:
    """The names that questions give as `<img>NAME</img>`, in order."""
    turns = turns_of(entry)
    names = []
    for turn in turns if isinstance(turns, list) else ():
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = text_of(content_of(turn)) if role_of(speaker) == "user" else None
        names += named_images(text) if text else []
    return names


def named_images(text: str) -> list[str]:
    """The names in `<img>NAME</img>`, where these are a text's placeholders."""
    return NAMED_IMAGE.findall(text) if marker_of(text) is NAMED_IMAGE else []


def marker_of(text: str) -> re.Pattern[str] | None:
    """What stands for media in a text that has no placeholder; None where it has one, or nothing else does."""
    if not ("<|" in text or "<img>" in text) or PLACEHOLDER.search(text):
        return None
    return next((marker for marker in (TEMPLATE_MARKER, NAMED_IMAGE) if marker.search(text)), None)


def with_placeholders(text: str) -> str:
    """A text with `<image>` and `<video>` in place of the markers that stand for them."""
    text = WRAPPED.sub(r"\1", text) if "<|" in text else text
    marker = marker_of(text)
    if marker is TEMPLATE_MARKER:
        return marker.sub(r"<\1>", text)
    return marker.sub("<image>", text) if marker else text


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
    """Whether an entry names any media beside its turns, or as `<img>NAME</img>` in them."""
    if not isinstance(entry, dict):
        return False
    return any(list_names(entry[name]) for name in MEDIA_FIELDS if name in entry) or bool(list_named_images(entry))


def split_turns(turns: list[tuple[str, Any]], has_media: bool) -> list[list[str]]:
    """The pieces of each turn of a conversation: text, kind of a medium, text, and so on.

    turns: (role, content). `text_of` accepts each content.
    has_media: Whether there are media to place.

    If media are parts of turns, lists are split only at these parts, as Qwen2-VL's chat template does. A tag or a line
    break in their text stays text. All other turns are split at the placeholders in their text.

    Without media, a tag is text unless media seem to be lost: a question begins with the tag or has it alone on a line,
    or another turn holds nothing else.
    """
    in_parts = any(has_parts(content) for _, content in turns)
    pieces = []
    for role, content in turns:
        text = text_of(content)
        if in_parts and isinstance(content, list):
            pieces.append(split_parts(content))
        elif has_media or in_parts or has_lost_media(role, text):
            pieces.append(PLACEHOLDER.split(with_placeholders(text) if role == "user" else text))
        else:
            pieces.append([text])
    return pieces


def has_lost_media(role: str, text: str) -> bool:
    """Whether a text has placeholders of media that an entry without any must have lost."""
    if "<" not in text:
        return False
    return bool(LOST_IN_QUESTION.search(with_placeholders(text)) if role == "user" else LOST_ELSEWHERE.search(text))


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
    """The pieces of a turn with media before them.

    kinds: "image" or "video" for each medium.
    pieces: As `split_turns` gives them.
    """
    return [piece for kind in kinds for piece in ("", kind)] + pieces
