"""What one field of PreparationConfig brings with it, and the fingerprint of sets that were begun before."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from dct_qwen2vl.preparation.config import PreparationConfig, parse_arguments, setting
from dct_qwen2vl.preparation.fingerprint import list_settings

KNOWN = ["--data-dir", "raw", "--output-dir", "shards"]


@dataclass(frozen=True, kw_only=True)
class LargerConfig(PreparationConfig):
    """With fields that the program does not have."""

    least_side: int | None = setting("what is written", None, "leave smaller images out", at_least=1, at_most=9)
    blur: float = setting("what is written", 0.0, "of images (default: %(default)s)", over=-1, first_name="soften")
    colours: tuple[str, ...] = setting("what is written", (), "that are kept", nargs="*", choices=("red", "green"))
    quiet: bool = setting("how it runs", False, "say nothing", in_fingerprint=False)


def typed(*words: str) -> LargerConfig:
    return parse_arguments([*KNOWN, *words], LargerConfig)


def test_a_new_field_has_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], LargerConfig)
    written, running = capsys.readouterr().out.split("what is written:\n")[1].split("how it runs:\n")
    assert "--least-side LEAST_SIDE\n" in written and "leave smaller images out" in written
    assert "--blur BLUR" in written and "of images (default: 0.0)" in written and "--soften" not in written
    assert "--quiet" in running
    assert (typed().least_side, typed().blur, typed().colours, typed().quiet) == (None, 0.0, (), False)
    found = typed("--least-side", "4", "--soften", "0.5", "--colours", "red", "--colours", "green", "red", "--quiet")
    assert (found.least_side, found.blur, found.colours, found.quiet) == (4, 0.5, ("red", "green", "red"), True)
    with pytest.raises(SystemExit):
        parse_arguments([*KNOWN, "--quiet"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--least-side", "0"], "--least-side must be from 1 to 9, got 0"),
        (["--least-side", "10"], "--least-side must be from 1 to 9, got 10"),
        (["--blur", "-1"], "--blur must be over -1, got -1.0"),
        (["--soften", "nan"], "--blur must be a finite number, over -1, got nan"),
        (["--colours", "blue"], "argument --colours: invalid choice: 'blue'"),
    ],
)
def test_a_new_field_has_bounds(words, said, capsys):
    with pytest.raises(SystemExit) as refusal:
        typed(*words)
    assert refusal.value.code == 2
    assert said in capsys.readouterr().err


def test_a_new_field_enters_the_fingerprint():
    """At its default it does not, so that a set of an earlier commit goes on."""
    before = list_settings(parse_arguments(KNOWN))
    assert list_settings(typed("--quiet")) == before
    changed = list_settings(typed("--least-side", "4", "--colours", "red", "--blur", "1"))
    assert changed == {**before, "least_side": 4, "soften": 1.0, "colours": ["red"]}
    assert list(changed) == [*before, "least_side", "soften", "colours"]


def test_the_fingerprint_has_the_settings_that_it_always_had():
    """Text of the settings in run.json at commit 3c4803b. The fingerprint is a hash of it."""
    words = ["--limit", "9", "--source-weight", "vg=2", "coco=0.5", "--check-pictures", "--split", "0.8,0.1,0.1"]
    assert repr(list_settings(parse_arguments([*KNOWN, *words]))) == (
        "{'seed': 0, 'maxcount': 1000, 'limit': 9, 'max_pixels': None, 'jpeg_quality': 95, 'check_pictures': True, "
        "'split': '8,1,1', 'source_weight': {'coco': 0.5, 'vg': 2.0}}"
    )


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        typed().seed = 1
