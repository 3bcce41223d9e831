"""One entry of the metadata, checked and repaired: what passes here is what task_encoder.py can learn from.

Turns are LLaVA's (`from`, `value`) or OpenAI's (`role`, `content`) and lie under `conversations` or `messages`; the
names of the media under `image` and `video`, or `images` and `videos`, one name or a list of them. Where none is there,
the names are those in the parts of turns that are lists, in reading order: `{"type": "image", "image": name}`,
`{"type": "image_url", "image_url": {"url": name}}` and `{"type": "video", "video": name}`; `path` or `url` may stand in
place of the second key.

A name may lie in an object (`{"path": name, "bytes": null}`) or in lists of lists, and may begin with `file://`; "" and
null name nothing. A question without any of these may name its images itself, as Qwen-VL's data do: `<img>NAME</img>`.

Such a part says where its medium goes, and so does `<image>` or `<video>` in a question. Where a question has none,
`<|vision_start|><|image_pad|><|vision_end|>` and `<img>NAME</img>` stand for them (conversations.py). Line breaks
around these are no text in a string and are text between parts. Where media stand as parts, `<image>` and `<video>` in
the text of a list are text. Without media they are text as well, unless one begins a question, stands alone on a line
of it, or is all there is of another turn: that entry has lost its media (conversations.py).

What is wrong with an entry is repaired where there is one right way to do so, and is a reason to skip it otherwise:

    finding                                                       what is done                  counted as
    no JSON object; nested deeper than 64 levels; a media name    skipped                       malformed_entry
      that is no text, is empty or is no Unicode
    a media path that begins with "/" or has ".." in it           skipped                       unsafe_path
    more than 1,024 media                                         skipped                       too_many_media
    a medium that is a web address                                skipped                       missing_media
    a list of turns as JSON text                                  the list put in its place     turns_as_text
    no list of turns, or an empty one                             skipped                       no_conversations
    a turn that is no object; speaker or text missing or no text  skipped                       malformed_turn
    a speaker that ROLES in conversations.py does not name        skipped                       unknown_role
    an answer's `loss`, `weight` or `train` that is no share      skipped                       malformed_turn
    no answer that is to be learned (`loss: false`, `weight: 0`)  skipped                       nothing_learned
    another number for it (`weight: 0.5`)                         1 put in its place            partial_weight
    a system prompt beside the turns (`system`) and another one   left out                      second_system_prompt
      among them; a lone one is used
    the medium itself in place of its name: a `data:` URL, bytes  skipped                       embedded_media
    half a surrogate pair in a text                               skipped                       broken_text
    an empty system turn                                          left out                      empty_system_turn
    a last question without answer and without media              left out: nothing that is     unanswered_question
                                                                  learned depends on it
    other than [system] user assistant user assistant ...         skipped                       roles_out_of_order
    a question or an answer without text                          skipped                       empty_turn
    more than 262,144 characters in all turns                     skipped                       text_too_long
    a placeholder in an answer, with media in the entry or        skipped                       placeholder_in_answer
      nothing else in the answer
    a placeholder in the system turn, likewise                    skipped                       placeholder_in_system
    no media, and <image> or <video> within a line of text, or    kept: it is text
      in an answer or system turn with other text
    no media, and a question that begins with a placeholder or    skipped                       placeholder_mismatch
      has one alone on a line
    a video of which only a part is named (`video_start`;         skipped                       unsupported_video
      `start` with `end`; `clip`)
    no media, none of the fields for them, and the name of one    skipped                       missing_media
      in another field (`image_path`, also in an object in the
      entry, as `meta`, or in a turn), or its number (`image_id`)
    media and no placeholder at all                               put before the first          missing_placeholder
                                                                  question, as many as media
    videos and as many <image> as videos (LLaVA-Video writes so)    <video> put in their place    image_for_video
    media, no placeholder, and what other models' data have in    skipped                       placeholder_mismatch
      its place (`<image_1>`, `<IMG_CONTEXT>`, `[IMG]`, ...)
    any other disagreement of placeholders and media              skipped                       placeholder_mismatch
    a part that names another file than the list of media has     skipped                       media_names_disagree
      in its place; `image` names what `images` does not, or
      less than `images` where no placeholder decides
    NaN and infinite numbers, among them such as 1e999 and those  null put in their place       not_a_number
      of more than 4,300 digits, which no JSON reader takes

Duplicates, files that are not there and names in another letter case are found by the plan (plan.py). Of
two values under one key the last counts, as in every use of Python's json. `video` may be a list of image files: the
frames of one video.
"""

import json
import math
import posixpath
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from dct_qwen2vl.data.conversations import (
    LEARNED_FIELDS,
    LONE_SURROGATE,
    MEDIA_FIELDS,
    ROLES,
    SYSTEM_FIELDS,
    content_of,
    has_parts,
    holds_medium,
    is_blank,
    is_data_url,
    is_share,
    kind_of,
    learning_of,
    list_named_images,
    list_names,
    list_parts,
    name_in,
    named_images,
    names_media,
    names_nothing,
    own_system,
    role_of,
    split_turns,
    strip_scheme,
    system_beside,
    text_of,
    turns_of,
    with_placeholders,
)
from dct_qwen2vl.data.text_tokens import MEDIUM_TOKENS
from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS

# GIF is left out: it may be a video itself.
FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

VIDEO_ENDINGS = tuple(f".{name}" for name in VIDEO_EXTENSIONS)
MEDIUM_ENDINGS = (*FRAME_ENDINGS, ".gif", ".avif", ".jp2", *VIDEO_ENDINGS)
# Fields under which other tools' data name their media. In the first ones, web addresses are media, too.
MEDIUM_FIELD = re.compile("image|img|picture|photo|video", re.IGNORECASE)
OTHER_FIELD = re.compile(f"{MEDIUM_FIELD.pattern}|figure|clip|frame|media|file|path", re.IGNORECASE)

NUMBER_FIELDS = ("image_id", "video_id")
IMAGE_BYTES = re.compile("(image|img).*(base64|b64|bytes)", re.IGNORECASE)

CUT_FIELDS = ("video_start", "video_end")  # of qwen-vl-utils, seconds
# Of an entry. One of these words alone may say anything, both together name a part.
CUT_PAIRS = tuple(
    (f"{before}{unit}", f"{after}{unit}")
    for before, after in (("start", "end"), ("begin", "end"))
    for unit in ("", "_time", "_sec", "_second", "_seconds", "_frame")
)
CUT_LISTS = ("clip", "video_clip")  # beginning and end

# What stands for a medium in the data of other models, and what is left of a marker of Qwen2-VL's.
OTHER_MARKER = re.compile(
    "|".join(
        [
            *map(re.escape, MEDIUM_TOKENS),
            r"</?img>|\[(?:IMG|image|video)\]|<start_of_image>",
            r"<\s*\|?(?:image|img|video)(?:[ _-]?(?:\d+|placeholder|here|context|pad|token|soft_token))?\|?\s*>",
        ]
    ),
    re.IGNORECASE,
)

WEB_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9]+://", re.IGNORECASE)  # of buckets, too
EMBEDDED = "the entry holds an image itself, not its name: write it to a file and name that"

MAXIMUM_CHARACTERS = 8 * 32_768  # Qwen2-VL's context is 32,768 tokens; a token of ordinary text has 1 to 6 characters
MAXIMUM_MEDIA = 1024
MAXIMUM_DEPTH = 64
MAXIMUM_DIGITS = 4300  # of an integer: what CPython converts (sys.get_int_max_str_digits)


class UnusableSample(Exception):
    """A sample that cannot be used. `reason`: one of a fixed set of words; `detail`: which part, and what is wrong."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple:
        return UnusableSample, (self.reason, self.detail)  # exceptions travel from worker processes by their message


@dataclass(frozen=True)
class CheckedEntry:
    """An entry to learn from.

    entry: With its repairs; the one that was given, if there are none.
    media: (kind, name) in the order of the placeholders. A kind is "image", "video" or "frame"; adjacent frames are
        one video.
    repairs: Their names, each once.
    """

    entry: dict[str, Any]
    media: tuple[tuple[str, str], ...]
    repairs: tuple[str, ...]

    @property
    def part_kinds(self) -> list[str]:
        """The kinds, "image" or "video", of the parts that a sample of this entry has, in order."""
        kinds = [kind for kind, _ in self.media]
        firsts = [kind for number, kind in enumerate(kinds) if kind != "frame" or kinds[number - 1 : number] != [kind]]
        return ["video" if kind == "frame" else kind for kind in firsts]


class Turn(NamedTuple):
    """A turn of a conversation.

    role: "system", "user" or "assistant".
    text: With placeholders.
    source: The entry's own object, or the one to write in its place.
    pieces: As `conversations.split_turns` gives them.
    """

    role: str
    text: str
    source: dict[str, Any]
    pieces: list[str]


class Medium(NamedTuple):
    """What one placeholder stands for.

    kind: "image" or "video".
    names: One file, or the frames of a video.
    is_frames: Whether the names are frames.
    """

    kind: str
    names: tuple[str, ...]
    is_frames: bool = False


def check_entry(entry: Any) -> CheckedEntry:
    """Check and repair one entry of the metadata; `entry` stays as it is. Raises UnusableSample."""
    if not isinstance(entry, dict):
        raise UnusableSample("malformed_entry", f"the entry is a {type(entry).__name__}, not an object")
    repairs: list[str] = []
    if not has_finite_numbers(entry.values(), 1):
        entry = replace_numbers(entry)
        repairs.append("not_a_number")
    entry = leave_out_second_prompt(read_turns_as_text(entry, repairs), repairs)
    media = list_media(entry)
    given = read_turns(entry)
    turns = check_roles(leave_out_turns(given, repairs))
    check_texts(turns)
    turns = learn_whole_turns(turns, repairs)
    refuse_lost_media(entry, turns, media)
    placed, media = place_media(turns, media, repairs)
    if "missing_placeholder" in repairs:
        compare_fields(entry, placed=False)
    compare_names(turns, media)
    if placed is not given:
        name = "conversations" if entry.get("conversations") else "messages"
        entry = {**entry, name: [turn.source for turn in placed]}
    return CheckedEntry(entry, flatten(media), tuple(repairs))


# Numbers


def read_integer(digits: str) -> int | float:
    """For json's parse_int, which would refuse the whole file over one huge number: infinity, as for 1e999."""
    return int(digits) if len(digits) <= MAXIMUM_DIGITS else float(digits)


DECODER = json.JSONDecoder(parse_int=read_integer)  # how entries are read, wherever that is


def has_finite_numbers(values: Any, depth: int) -> bool:
    """Whether no number among `values`, and what they hold, is NaN or infinite. Raises UnusableSample at a depth over
    MAXIMUM_DEPTH."""
    if depth > MAXIMUM_DEPTH:
        raise UnusableSample("malformed_entry", f"it is nested deeper than {MAXIMUM_DEPTH} levels")
    for value in values:
        if isinstance(value, float):
            if not math.isfinite(value):
                return False
        elif isinstance(value, dict):
            if not has_finite_numbers(value.values(), depth + 1):
                return False
        elif isinstance(value, list) and not has_finite_numbers(value, depth + 1):
            return False
    return True


def replace_numbers(value: Any, depth: int = 0) -> Any:
    """A copy with None for NaN and infinite numbers. Raises UnusableSample at a depth over MAXIMUM_DEPTH."""
    if depth > MAXIMUM_DEPTH:
        raise UnusableSample("malformed_entry", f"it is nested deeper than {MAXIMUM_DEPTH} levels")
    if isinstance(value, dict):
        return {key: replace_numbers(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_numbers(item, depth + 1) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Names of media


def list_media(entry: dict) -> list[Medium]:
    """Images first, then videos, each in the entry's order; where it lists none, those of its parts in reading order.
    Raises UnusableSample."""
    compare_fields(entry, placed=True)
    media = [Medium("image", (name,)) for name in names_of(field_of(entry, "image"))]
    media += list_videos(field_of(entry, "video"))
    if not media:
        media = [medium for medium in map(read_part, list_parts(entry)) if medium]
        if sum(medium.is_frames for medium in media) > 1:
            raise UnusableSample("malformed_entry", "the frames of more than one video are listed")
    if not media and any(map(holds_medium, list_parts(entry))):
        raise UnusableSample("embedded_media", EMBEDDED)
    if not media:
        media = [Medium("image", (clean_name(name),)) for name in list_named_images(entry)]
    number = max(len(media), *(len(medium.names) for medium in media), 0)
    if number > MAXIMUM_MEDIA:
        raise UnusableSample("too_many_media", f"{number} media in one entry, the limit is {MAXIMUM_MEDIA}")
    if any(medium.kind == "video" for medium in media):
        refuse_part_of_video(entry)
    return media


def refuse_part_of_video(entry: dict) -> None:
    """Raises UnusableSample for seconds at which a video begins or ends: all of it would be learned."""
    videos = flatten_objects([part for part in list_parts(entry) if kind_of(part) == "video"])
    videos += flatten_objects([entry.get("video"), entry.get("videos")])
    said = [field for field in CUT_FIELDS if entry.get(field) is not None]
    said += [" and ".join(pair) for pair in CUT_PAIRS if not any(names_nothing(entry.get(field)) for field in pair)]
    said += [field for field in CUT_LISTS if is_range(entry.get(field))]
    said += [field for video in videos for field in (*CUT_FIELDS, "start", "end") if video.get(field) is not None]
    if said:
        what = f"{said[0]}: parts of videos are not read"
        remedy = "cut them with ffmpeg -ss START -to END and name the pieces; leave the field out if all of it is meant"
        raise UnusableSample("unsupported_video", f"{what}: {remedy}")


def is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, int | float) for each in value)


def flatten_objects(value: Any) -> list[dict]:
    """The objects in a value, or in lists in it."""
    if isinstance(value, list):
        return [found for item in value for found in flatten_objects(item)]
    return [value, *flatten_objects(list(value.values()))] if isinstance(value, dict) else []


def list_videos(value: Any) -> list[Medium]:
    """Of a field: the frames of one video, or a video for each name. Raises UnusableSample."""
    names = names_of(value)
    if not (isinstance(value, list) and names and are_frames(names)):
        return [Medium("video", (name,)) for name in names]
    if sum(isinstance(item, list) and bool(list_names(item)) for item in value) > 1:
        raise UnusableSample("malformed_entry", "the frames of more than one video are listed")
    return [Medium("video", tuple(names), is_frames=True)]


def are_frames(names: list[str]) -> bool:
    return all(name.strip().lower().endswith(FRAME_ENDINGS) for name in names)


def read_part(part: dict[str, Any]) -> Medium | None:
    """The medium that a part names, None for a part without a name. Raises UnusableSample."""
    kind, given = kind_of(part), name_in(part)
    if given is None:
        return None
    names = names_of(given)
    is_frames = kind == "video" and isinstance(given, list) and are_frames(names)
    if len(names) > 1 and not is_frames:
        raise UnusableSample("malformed_entry", f"one part names {len(names)} media")
    return Medium(kind, tuple(names), is_frames)


def field_of(entry: dict, kind: str) -> Any:
    """The value of an entry's field for one kind of media. None where there is none.

    entry: Of the metadata.
    kind: "image" or "video". The plural is read where the singular names nothing.
    """
    return next((entry[name] for name in (kind, f"{kind}s") if name in entry and list_names(entry[name])), None)


def compare_fields(entry: dict, placed: bool) -> None:
    """Checks that `image` and `images`, and `video` and `videos`, leave no doubt which media are meant.

    entry: Of the metadata.
    placed: Whether questions have placeholders. They then decide between one medium and a list that has it, too.

    Raises UnusableSample.
    """
    for kind in ("image", "video"):
        if not (many := names_of(entry.get(f"{kind}s"))):
            continue
        one = names_of(entry.get(kind))
        named = [name for name in one if name not in many] if placed or one == many else one
        if named:
            lists = [
                f"{names[0]:.300}" + (f" and {len(names) - 1} more" if names[1:] else "") for names in (named, many)
            ]
            what = f"{kind} names {lists[0]}, {kind}s names {lists[1]}"
            raise UnusableSample("media_names_disagree", f"{what}: leave one of the two fields out")


def names_of(value: Any) -> list[str]:
    return [clean_name(name) for name in list_names(value)]


def clean_name(name: Any) -> str:
    """The name as media are indexed by: "a/b.jpg" for "./a//b.jpg".

    Raises UnusableSample for what is no name or leads out of the data folder.
    """
    if (isinstance(name, dict) and name.get("bytes") is not None) or is_data_url(name):
        raise UnusableSample("embedded_media", EMBEDDED)
    if isinstance(name, str) and WEB_ADDRESS.match(name):
        raise UnusableSample(
            "missing_media", f"{name:.300} is a web address: fetch the file and name it as it lies here"
        )
    given, name = name, strip_scheme(name)
    if not isinstance(name, str) or (not name.isascii() and LONE_SURROGATE.search(name)):
        raise UnusableSample("malformed_entry", f"{name!r:.100} is not the name of a media file")
    if name.startswith("/"):
        raise UnusableSample(
            "unsafe_path", f"{given!r:.300} is an absolute path: write it as it lies below the data folder"
        )
    if "\0" in name or (".." in name and ".." in name.split("/")):
        raise UnusableSample("unsafe_path", f"{given!r:.300} is not a path below the data folder")
    name = posixpath.normpath(name)
    if name == ".":
        raise UnusableSample("malformed_entry", "the name of a media file is empty")
    return name


def flatten(media: list[Medium]) -> tuple[tuple[str, str], ...]:
    return tuple(("frame" if medium.is_frames else medium.kind, name) for medium in media for name in medium.names)


# Turns


def read_turns(entry: dict) -> list[Turn]:
    """The turns, at least one, in either style. Raises UnusableSample."""
    turns = turns_of(entry)
    if not isinstance(turns, list) or not turns:
        keys = f"; its fields are {', '.join(map(str, entry))[:100]}" if isinstance(entry, dict) and entry else ""
        raise UnusableSample("no_conversations", f"neither conversations nor messages is a list of turns{keys}"
                             f"{say_inner_list(entry)}")  # fmt: skip
    read = [check_turn(number, turn) for number, turn in enumerate(turns)]
    contents = [(role, content_of(turn)) for (role, _), turn in zip(read, turns)]
    split = split_turns(contents, names_media(entry))
    return [Turn(*both, turn, pieces) for both, turn, pieces in zip(read, turns, split)]


def say_inner_list(entry: Any) -> str:
    """What to do where the entries are in a list of this object, "" for an entry of its own."""
    fields = entry.items() if isinstance(entry, dict) else ()
    lists = [
        (name, value[0]) for name, value in fields if isinstance(value, list) and isinstance(next(iter(value), 0), dict)
    ]
    if lists and lists[0][1].keys() & {"from", "role"}:
        return f"; if {lists[0][0]} holds the turns, call it conversations"
    return f"; if {lists[0][0]} holds the entries, write that list to a file of its own" if lists else ""


def check_turn(number: int, turn: Any) -> tuple[str, str]:
    """Role and text of a turn. Raises UnusableSample."""
    speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    text = text_of(content_of(turn)) if isinstance(speaker, str) else None
    if text is None:
        raise UnusableSample("malformed_turn", f"turn {number} {what_is_no_text(turn, speaker)}")
    role = role_of(speaker)
    if role is None:
        raise UnusableSample("unknown_role", f"turn {number} is by {speaker!r:.100}; known are {', '.join(ROLES)}")
    if not text.isascii() and LONE_SURROGATE.search(text):
        raise UnusableSample("broken_text", f"turn {number} has half a surrogate pair in it")
    if role == "assistant" and not is_share(learning_of(turn)):
        said = f"turn {number} is to be learned by {learning_of(turn)!r:.100}"
        raise UnusableSample("malformed_turn", f"{said}, which is neither true nor false nor a weight from 0 on")
    return role, text


def what_is_no_text(turn: Any, speaker: Any) -> str:
    """What to say of a turn whose speaker or text is missing."""
    content = content_of(turn) if isinstance(turn, dict) else None
    if isinstance(speaker, str) and content is None and {"value", "content"} & turn.keys():
        return "has null in place of its text"
    if content is None or not isinstance(speaker, str):
        return "has neither from and value nor role and content"
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    odd = next((part.get("type") for part in parts if text_of([part]) is None), None)
    if isinstance(odd, str) and odd != "text":
        return f"has a part of type {odd!r:.100}, which is no text, image or video"
    return f"has {content!r:.100} in place of its text"


def read_turns_as_text(entry: dict, repairs: list[str]) -> dict:
    """With a list of turns in place of its JSON text, as tables write it."""
    name = "conversations" if entry.get("conversations") else "messages"
    text = entry.get(name)
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return entry
    try:
        turns = DECODER.decode(text)
    except (ValueError, RecursionError):
        return entry
    repairs.append("turns_as_text")
    if not has_finite_numbers(turns, 2):
        turns = replace_numbers(turns, 1)
        repairs.append("not_a_number")
    return {**entry, name: turns}


def leave_out_second_prompt(entry: dict, repairs: list[str]) -> dict:
    """Without the system prompt beside the turns, where they begin with another one."""
    beside, turns = system_beside(entry), entry.get("conversations") or entry.get("messages")
    own = own_system(turns) if isinstance(turns, list) and turns else None
    if beside is None or own is None or is_blank(own) or own == beside:
        return entry
    repairs.append("second_system_prompt")
    return {name: value for name, value in entry.items() if name not in SYSTEM_FIELDS}


def learn_whole_turns(turns: list[Turn], repairs: list[str]) -> list[Turn]:
    """The same turns; an answer that is to be learned in part is learned. Raises UnusableSample where none is."""
    shares = [learning_of(turn.source) for turn in turns if turn.role == "assistant"]
    if all(share is True for share in shares):
        return turns
    if not any(shares):
        raise UnusableSample("nothing_learned", "none of its answers is to be learned (loss, weight or train)")
    if all(share in (0, 1) for share in shares):
        return turns
    repairs.append("partial_weight")
    return [learn_whole(turn) if turn.role == "assistant" and learning_of(turn.source) else turn for turn in turns]


def learn_whole(turn: Turn) -> Turn:
    """The turn without what says that it is learned in part."""
    return turn._replace(source={**turn.source, **dict.fromkeys(LEARNED_FIELDS & turn.source.keys(), 1)})


def rewrite(turn: Turn, content: Any) -> Turn:
    """The turn with other content to be written."""
    name = "value" if "value" in turn.source else "content"
    return turn._replace(source={**turn.source, name: content})


def leave_out_turns(turns: list[Turn], repairs: list[str]) -> list[Turn]:
    """Without an empty system turn, and without a last question that nobody answers."""
    if turns[0].role == "system" and is_empty(turns[0].text):
        turns = turns[1:]
        repairs.append("empty_system_turn")
    if len(turns) > 2 and [turn.role for turn in turns[-2:]] == ["assistant", "user"]:
        if len(turns[-1].pieces) > 1:
            raise UnusableSample("roles_out_of_order", "the last question has media and no answer")
        turns = turns[:-1]
        repairs.append("unanswered_question")
    return turns


def check_roles(turns: list[Turn]) -> list[Turn]:
    """Checks that there is at most one system turn, first, and that user and assistant then take turns. Returns the
    turns.

    turns: Of one entry.

    Raises UnusableSample.
    """
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    for number, turn in enumerate(spoken):
        if turn.role != ("assistant" if number % 2 else "user"):
            break
    else:
        if spoken and len(spoken) % 2 == 0:
            return turns
    roles = ", ".join(turn.role for turn in turns[:8]) + (", ..." if len(turns) > 8 else "")
    raise UnusableSample("roles_out_of_order", f"user and assistant must take turns and the assistant end, got {roles}")


def check_texts(turns: list[Turn]) -> None:
    """Raises UnusableSample for empty turns and over-long text."""
    characters = 0
    for number, turn in enumerate(turns):
        if is_empty(turn.text):
            raise UnusableSample("empty_turn", f"turn {number}, by the {turn.role}, has no text")
        characters += len(turn.text)
    if characters > MAXIMUM_CHARACTERS:
        raise UnusableSample("text_too_long", f"{characters} characters, the limit is {MAXIMUM_CHARACTERS}")


def is_empty(text: str) -> bool:
    return not text or text.isspace()


# Placeholders


def place_media(turns: list[Turn], media: list[Medium], repairs: list[str]) -> tuple[list[Turn], list[Medium]]:
    """The turns with their placeholders repaired, the media in the order of the placeholders. Raises UnusableSample."""
    placed = list_placeholders(turns)
    kinds = [medium.kind for medium in media]
    if placed == kinds:
        return turns, media
    if not placed:
        refuse_other_markers(turns)
        repairs.append("missing_placeholder")
        return put_before_first_question(turns, kinds), media
    if placed == ["image"] * len(media) and kinds == ["video"] * len(media):
        repairs.append("image_for_video")
        return [put_videos(turn) if len(turn.pieces) > 1 else turn for turn in turns], media
    if sorted(placed) != sorted(kinds):
        raise UnusableSample("placeholder_mismatch", f"{count_kinds(placed)} in the turns for {count_kinds(kinds)}")
    of_kind = {kind: iter([medium for medium in media if medium.kind == kind]) for kind in ("image", "video")}
    return turns, [next(of_kind[kind]) for kind in placed]


def refuse_lost_media(entry: dict, turns: list[Turn], media: list[Medium]) -> None:
    """Raises UnusableSample for an entry without media that has placeholders in questions or media in other fields."""
    placed = [] if media else list_placeholders(turns)
    if placed:
        said = f"{count_kinds(placed)} in the turns, and no medium in {', '.join(MEDIA_FIELDS)} or in a part"
        raise UnusableSample("placeholder_mismatch", f"{said}; its fields are {', '.join(map(str, entry))[:100]}")
    if not media and entry.keys().isdisjoint(MEDIA_FIELDS):
        refuse_other_fields(entry)


def refuse_other_fields(entry: dict) -> None:
    """Raises UnusableSample for a field that is not read and names a medium: the entry would be learned without it."""
    for field, value in entry.items():
        refuse_other_field("", field, value)
        if field in NUMBER_FIELDS and not names_nothing(value):
            right = field.removesuffix("_id")
            what = f"{field} is {value!r:.100}, and no field names the file"
            raise UnusableSample("missing_media", f"{what}: name it in {right}, or leave {field} out")
        for inner, named in value.items() if isinstance(value, dict) else ():
            refuse_other_field(f"{field:.100}: ", inner, named)
    for number, turn in enumerate(turns_of(entry)):
        for field, value in turn.items():
            if field not in ("value", "content"):
                refuse_other_field(f"turn {number}: ", field, value)


def refuse_other_field(where: str, field: str, value: Any) -> None:
    """As `refuse_other_fields`, of one field. `where` says in which object of the entry it is, "" for the entry."""
    names = [name for name in list_names(value) if isinstance(name, str)] if OTHER_FIELD.search(field) else []
    if not names:
        return
    if IMAGE_BYTES.search(field):
        raise UnusableSample("embedded_media", EMBEDDED)
    name = names[0]
    is_address = MEDIUM_FIELD.search(field) and (WEB_ADDRESS.match(name) or is_data_url(name))
    if is_address or name.lower().endswith(MEDIUM_ENDINGS):
        right = "video" if name.lower().endswith(VIDEO_ENDINGS) else "image"
        what = f"{where}{field:.100} names {name:.300}, and this field is not read"
        remedy = "fetch the file and name it in" if is_address else "name it in the entry's" if where else "call it"
        raise UnusableSample("missing_media", f"{what}: {remedy} {right}")


def refuse_other_markers(turns: list[Turn]) -> None:
    """Raises UnusableSample where a question has another marker in place of `<image>`: it would be learned as text."""
    for number, turn in enumerate(turns):
        found = OTHER_MARKER.search(turn.text) if turn.role == "user" else None
        if found:
            what = f"turn {number} has {found[0]} in it, which is not read as an image"
            raise UnusableSample("placeholder_mismatch", f"{what}: write <image> (or <video>) where it stands")


def compare_names(turns: list[Turn], media: list[Medium]) -> None:
    """Checks that a part names the same file as the entry's list of media.

    turns: Of one entry.
    media: In the order of the placeholders, if there are any.

    Raises UnusableSample.
    """
    for medium, own in zip(media, [own for turn in turns for own in name_placeholders(turn)]):
        if own and own.names != medium.names:
            names = [", ".join(of.names) for of in (own, medium)]
            raise UnusableSample(
                "media_names_disagree", f"a part is {names[0]:.300}, {names[1]:.300} in the list of media"
            )


def name_placeholders(turn: Turn) -> list[Medium | None]:
    """What each placeholder of a turn names itself: a part may, one in a string does not."""
    content = content_of(turn.source)
    if has_parts(content):
        return [read_part(part) for part in content if kind_of(part)]
    names = named_images(turn.text) if "<img>" in turn.text else []
    own = [Medium("image", (clean_name(name),)) for name in names]
    return own or [None] * (len(turn.pieces) // 2)


def list_placeholders(turns: list[Turn]) -> list[str]:
    """The kinds that the questions ask for, in order. Raises UnusableSample for placeholders elsewhere."""
    placed = []
    for number, turn in enumerate(turns):
        found = turn.pieces[1::2]
        if found:
            if turn.role != "user":
                where = "answer" if turn.role == "assistant" else "system"
                raise UnusableSample(f"placeholder_in_{where}", f"turn {number} has <{found[0]}> in it")
            placed += found
    return placed


def put_before_first_question(turns: list[Turn], kinds: list[str]) -> list[Turn]:
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    text = "".join(f"<{kind}>\n" for kind in kinds) + turns[first].text
    return [*turns[:first], rewrite(turns[first], text), *turns[first + 1 :]]


def put_videos(turn: Turn) -> Turn:
    """The turn with a video for every image in it."""
    content = content_of(turn.source)
    if not has_parts(content):
        return rewrite(turn, with_placeholders(turn.text).replace("<image>", "<video>"))
    return rewrite(turn, [as_video(part) if kind_of(part) else part for part in content])


def as_video(part: dict[str, Any]) -> dict[str, Any]:
    """The part as one of a video, with what it says of its file."""
    own = part["type"]
    others = {key: value for key, value in part.items() if key not in (own, "video")}
    return others | {"type": "video"} | ({"video": part[own]} if own in part else {})


def count_kinds(kinds: list[str]) -> str:
    return f"{kinds.count('image')} <image> and {kinds.count('video')} <video>"
