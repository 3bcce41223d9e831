"""Settings: the fields of a frozen dataclass, and the flags, the help and the bounds that are made from them.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        lr: float = setting("how", 1e-5, "peak learning rate", over=0)

    add_flags(parser, Config)
    config = from_flags(Config, parser.parse_args())
    check_ranges(config)

Programs add metadata of their own: training/config.py a rule for resumed runs, preparation/config.py the fingerprint.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from dct_qwen2vl.common.scripts import UserError

Config = TypeVar("Config")


def setting(
    group: str | None,
    default: Any,
    help: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    over: float | None = None,
    below: float | None = None,
    not_over: str | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    nargs: str | None = None,
    const: Any = None,
    parse: Callable[[str], Any] | None = None,
    first_name: str | None = None,
    **more: Any,
) -> Any:
    """A field of a dataclass of settings, with its metadata. The field's type is the flag's; a bool's flag turns it on.

    group: title of its flag's group in --help. "": the flag has no group. None: there is no flag, the program sets it.
    default: MISSING makes the flag required.
    help, choices, metavar: as argparse has them.
    at_least, at_most, over, below: bounds of a number. With at_least or over it must also be finite.
    not_over: name of another field. The value must not exceed that field's value.
    nargs: "*" or "+". The words behind the flag become a tuple, and those of a repeated flag follow. "?": there may be
        one word.
    const: the value, under "?", of a flag without a word.
    parse: makes the value of one word, or raises ValueError. None: the type of the field does.
    first_name: name that the field had before. Its flag is still read, and --help does not show it.
    more: metadata that only one program reads.
    """
    metadata = {name: value for name, value in locals().items() if name not in ("default", "more")}
    return field(default=default, metadata={**metadata, **more})


def setting_of(kind: type, name: str, prefix: str = "", **changes: Any) -> Any:
    """A copy of a field of another dataclass of settings, with its default and its metadata.

    kind: The other dataclass.
    name: Of the field there.
    prefix: What its name begins with here.
    changes: Metadata that differ here.
    """
    known = {each.name: each for each in fields(kind)}[name]
    not_over = known.metadata["not_over"]
    renamed = {"not_over": not_over and prefix + not_over}
    return field(default=known.default, metadata={**known.metadata, **renamed, **changes})


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of a flag, unless there is none or the help names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default is None or action.default is False or action.default in ((), [])
        return action.help if has_none or "(default:" in (action.help or "") else super()._get_help_string(action)


def flag_of(name: str) -> str:
    """min_lr -> --min-lr."""
    return f"--{name.replace('_', '-')}"


def add_flags(parser: Any, kind: type, prefix: str = "", **options: Any) -> None:
    """Adds the flags of a dataclass of settings to a parser or a group.

    parser: argparse parser or argument group. Gets the flags.
    kind: Dataclass of settings.
    prefix: What the names begin with, as in --video-fps.
    options: Arguments of `add_argument` for all flags. They replace what the fields say.
    """
    groups: dict[str, Any] = {"": parser}
    for each in fields(kind):
        group, first_name = each.metadata["group"], each.metadata["first_name"]
        if group is None:
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        add, about = groups[group].add_argument, {**_flag_options(each), **options}
        add(flag_of(prefix + each.name), **about)
        if first_name:
            add(flag_of(prefix + first_name), dest=prefix + each.name, **{**about, "help": argparse.SUPPRESS})


def _flag_options(each: Field) -> dict[str, Any]:
    """What argparse is told about a field."""
    about = each.metadata
    if each.type is bool:
        return {"action": "store_true", "help": about["help"]}
    words = ("help", "choices", "metavar", "nargs", "const")
    options = {name: about[name] for name in words if about[name] is not None}
    options["type"] = _explained(about["parse"]) if about["parse"] else _type_of_word(each.type)
    if each.default is MISSING:
        options["required"] = True
    else:
        options["default"] = list(each.default) if isinstance(each.default, tuple) and about["nargs"] else each.default
    return {**options, "action": "extend"} if about["nargs"] in ("*", "+") else options


def _type_of_word(kind: Any) -> Any:
    """int | None, tuple[int, ...] -> int."""
    inner = get_args(kind)
    return _type_of_word(inner[0]) if inner else kind


def _explained(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type whose ValueError becomes the message."""

    def convert(word: str) -> Any:
        try:
            return parse(word)
        except (ValueError, ZeroDivisionError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def from_flags(kind: type[Config], arguments: argparse.Namespace) -> Config:
    """The settings that the user typed.

    kind: Dataclass of settings.
    arguments: Of a parser that has the flags of `kind` and no others.
    """
    values = vars(arguments).items()
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values})


def from_words(kind: type[Config], words: dict[str, Any], prefix: str = "", **defaults: Any) -> Config:
    """The settings that another program has parsed.

    kind: Dataclass of settings.
    words: Name with the prefix -> text, number or None. None leaves the default. Other names are ignored.
    prefix: What the names in `words` begin with.
    defaults: Values that replace the defaults of `kind`.

    Raises UserError for a word that has another type than its field.
    """
    values = dict(defaults)
    for each in fields(kind):
        word = words.get(prefix + each.name)
        if word is None:
            continue
        try:
            values[each.name] = _type_of_word(each.type)(word)
        except ValueError as error:
            raise UserError(f"{prefix}{each.name} must be {_type_of_word(each.type).__name__}, got {word!r}") from error
    return kind(**values)


def check_ranges(config: Any, prefix: str = "", error: type[UserError] = UserError) -> None:
    """Checks that all numbers are within their bounds.

    config: Instance of a dataclass of settings.
    prefix: What the names of the flags begin with.
    error: Class of the error that is raised.

    Raises `error` for the first number outside its bounds.
    """
    given = {each.name: each for each in fields(config) if getattr(config, each.name) is not None}
    for name, each in given.items():
        check_bounds(flag_of(prefix + name), getattr(config, name), each.metadata, error)
    for name, each in given.items():
        high = each.metadata["not_over"]
        if high in given and getattr(config, name) > getattr(config, high):
            low_said, high_said = (f"{flag_of(prefix + one)} {getattr(config, one)}" for one in (name, high))
            raise error(f"{low_said} is over {high_said}: change one of them")


def check_bounds(flag: str, value: Any, bounds: Mapping[str, Any], error: type[UserError] = UserError) -> None:
    """Checks that a number is within its bounds.

    flag: Named in the message.
    value: The number.
    bounds: Metadata of its field.
    error: Class of the error that is raised.

    Raises `error` if it is not.
    """
    at_least, at_most, over, below = (bounds[name] for name in ("at_least", "at_most", "over", "below"))
    if at_least is not None and at_most is not None and not at_least <= value <= at_most:
        raise error(f"{flag} must be from {at_least} to {at_most}, got {value}")
    if at_least is not None and not at_least <= value < math.inf:
        raise error(f"{flag} must be {_finite(value)}at least {at_least}, got {value}")
    if at_most is not None and not value <= at_most:
        raise error(f"{flag} must be {_finite(value)}at most {at_most}, got {value}")
    if over is not None and not over < value < math.inf:
        raise error(f"{flag} must be {_finite(value)}over {over}, got {value}")
    if below is not None and not value < below:
        raise error(f"{flag} must be below {below}, got {value}")


def _finite(value: float) -> str:
    return "" if math.isfinite(value) else "a finite number, "


def plain(value: Any) -> Any:
    """A value as JSON gives it back: paths are texts, tuples are lists."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
