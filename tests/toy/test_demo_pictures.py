"""The sheet of samples that the demo leaves."""

from dct_qwen2vl.toy.demo_pictures import _legible


def test_what_the_font_lacks_is_shown_by_its_escape():
    assert _legible("könnte – „rund“\n有多少?") == "könnte – „rund“\n\\u6709\\u591a\\u5c11?"
