"""Settings from words of another program, and one dataclass whose flags several programs have."""

import argparse
import re
from dataclasses import dataclass

import pytest

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.common.settings import (
    DefaultsFormatter,
    add_flags,
    check_ranges,
    from_words,
    setting,
    setting_of,
)
from dct_qwen2vl.common.video_sampling import PREFIX, VideoSampling


@dataclass(frozen=True, kw_only=True)
class Copied:
    """Two fields of VideoSampling under other names."""

    clip_min_frames: int = setting_of(VideoSampling, "min_frames", "clip_", group="clips")
    clip_max_frames: int = setting_of(VideoSampling, "max_frames", "clip_")
    name: str | None = setting("", None, "of the run")


def test_words_become_settings():
    words = {"video_fps": "0.5", "video_min_frames": 2, "video_total_pixels": None, "device": "cpu"}
    found = from_words(VideoSampling, words, PREFIX, max_frames=64)
    assert found == VideoSampling(fps=0.5, min_frames=2, max_frames=64)
    assert isinstance(found.fps, float) and isinstance(found.min_frames, int)
    assert from_words(VideoSampling, {"video_max_frames": "9"}, PREFIX, max_frames=64).max_frames == 9


def test_a_word_of_another_type_is_refused():
    with pytest.raises(UserError, match=r"^video_max_frames must be int, got '2\.5'$"):
        from_words(VideoSampling, {"video_max_frames": "2.5"}, PREFIX)


def test_help_names_each_default_once():
    parser = argparse.ArgumentParser(formatter_class=DefaultsFormatter)
    parser.add_argument("--zero", default=0, help="a number")
    parser.add_argument("--none", help="a word")
    parser.add_argument("--off", action="store_true", help="a switch")
    parser.add_argument("--many", nargs="*", default=[], help="words")
    parser.add_argument("--said", default=5, help="a number (default: five)")
    shown = [re.split(" {2,}", line)[-1] for line in parser.format_help().splitlines() if line.startswith("  --")]
    assert shown == ["a number (default: 0)", "a word", "a switch", "words", "a number (default: five)"]


def test_flags_can_be_told_another_default():
    """Nothing given is None, so that a program can tell it from the default."""
    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument_group("videos"), VideoSampling, PREFIX, default=None)
    arguments = parser.parse_args(["--video-fps", "1"])
    assert VideoSampling.of(arguments) == VideoSampling(1.0, None, None, None)
    check_ranges(VideoSampling.of(arguments), PREFIX)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"fps": 0.0}, "--video-fps must be over 0, got 0.0"),
        ({"max_frames": 0}, "--video-max-frames must be at least 1, got 0"),
        ({"max_frames": 3}, "--video-min-frames 4 is over --video-max-frames 3: change one of them"),
    ],
)
def test_refusals_name_the_flag(values, said):
    with pytest.raises(UserError) as refusal:
        check_ranges(VideoSampling(**values), PREFIX)
    assert str(refusal.value) == said


def test_a_field_of_another_dataclass_keeps_default_help_and_bounds(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser, Copied)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "clips:\n  --clip-min-frames CLIP_MIN_FRAMES\n" in shown and "least frames read from a video" in shown
    assert Copied().clip_max_frames == VideoSampling().max_frames
    with pytest.raises(UserError, match="--clip-min-frames 9 is over --clip-max-frames 8"):
        check_ranges(Copied(clip_min_frames=9, clip_max_frames=8))
