"""Entries of the metadata: each finding of the table in conversations.py, and agreement with the task encoder."""

import copy
import json
import pickle
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import encode, video_file
from PIL import Image

from dct_qwen2vl.data.media import as_array
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.preparation.entries import (
    DECODER,
    MAXIMUM_CHARACTERS,
    MAXIMUM_DEPTH,
    MAXIMUM_MEDIA,
    CheckedEntry,
    UnusableSample,
    check_entry,
    clean_name,
)


def entry(*turns: tuple[str, object], **fields) -> dict:
    """An entry with LLaVA turns; without any, one question and its answer."""
    turns = turns or (("human", "What is it?"), ("gpt", "noise"))
    return {"id": "1", **fields, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def ask(question: str, answer: str = "noise", **fields) -> dict:
    return entry(("human", question), ("gpt", answer), **fields)


def texts(checked: CheckedEntry) -> list[str]:
    turns = checked.entry.get("conversations") or checked.entry.get("messages")
    return [turn.get("value", turn.get("content")) for turn in turns]


def reason_of(bad: object) -> str:
    with pytest.raises(UnusableSample) as caught:
        check_entry(bad)
    assert caught.value.detail
    return caught.value.reason


# Nothing to repair


@pytest.mark.parametrize(
    ("good", "media"),
    [
        (entry(), ()),
        (entry(image=None), ()),
        (entry(image=[]), ()),
        (ask("<image>\nWhat?", image="a/b.jpg"), (("image", "a/b.jpg"),)),
        (ask("What?\n<image>", image=["./a//b.jpg"]), (("image", "a/b.jpg"),)),
        (ask("<image>", image="a.jpg"), (("image", "a.jpg"),)),
        (ask("<video>What?", video="a.mp4"), (("video", "a.mp4"),)),
        (ask("<video> or <image>?", images=["a.jpg"], videos=["b.mp4"]), (("video", "b.mp4"), ("image", "a.jpg"))),
        (ask("<image>", image="a.jpg", images=["./a.jpg", "b.jpg"]), (("image", "a.jpg"),)),
        (ask("<image>", image="a.jpg", images=["./a.jpg"]), (("image", "a.jpg"),)),
        (entry(("system", "Be brief."), ("user", "What?"), ("assistant", "noise")), ()),
        (
            entry(("human", "<image>One?"), ("gpt", "1"), ("human", "<image> <image>Two?"), ("gpt", "2"))
            | {"image": ["a.jpg", "b.jpg", "c.jpg"]},
            (("image", "a.jpg"), ("image", "b.jpg"), ("image", "c.jpg")),
        ),
        (
            ask("<image> before <video> and <image>?", image=["a.jpg", "b.jpg"], video="c.mp4"),
            (("image", "a.jpg"), ("video", "c.mp4"), ("image", "b.jpg")),
        ),
        (
            ask("Is <video> after <image>?", image="a.jpg", video=["b.mp4"]),
            (("video", "b.mp4"), ("image", "a.jpg")),
        ),
        (ask("<video>What?", video=["a/1.JPG", "a/2.png"]), (("frame", "a/1.JPG"), ("frame", "a/2.png"))),
        (ask("<video> <video>?", video=["a.mp4", "b.jpg"]), (("video", "a.mp4"), ("video", "b.jpg"))),
        (ask("<video>What?", video=["a.gif"]), (("video", "a.gif"),)),
    ],
)
def test_a_sound_entry_stays_the_same_object(good, media):
    before = copy.deepcopy(good)
    checked = check_entry(good)
    assert checked == CheckedEntry(before, media, ())
    assert checked.entry is good


def test_openai_style_turns():
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "a.jpg"}}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "noise"}]
    for name in ("messages", "conversations"):
        checked = check_entry({name: turns, "image": "a.jpg"})
        assert (checked.media, checked.repairs) == ((("image", "a.jpg"),), ())


def asked(*contents: object, **fields) -> dict:
    """An entry with OpenAI's turns; the answers are all the same."""
    turns = [[{"role": "user", "content": content}, {"role": "assistant", "content": "A."}] for content in contents]
    return {"messages": [turn for pair in turns for turn in pair], **fields}


WHY = {"type": "text", "text": "Why?"}
FIRST = {"type": "image_url", "image_url": {"url": "coco/1.jpg"}}
SECOND = {"type": "image", "image": "./coco//2.jpg"}
VIDEO = {"type": "video", "video": "file://a.mp4"}
FRAMES = {"type": "video", "video": ["b/1.jpg", "b/2.jpg"]}
OF_TRANSFORMERS = [{"type": "image", "url": "coco/1.jpg"}, {"type": "video", "path": "./a.mp4"}]
NAMELESS = [{"type": "image"}, {"type": "image", "image": None}, {"type": "image_url", "image_url": {}}]
NAMELESS += [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]


@pytest.mark.parametrize(
    ("good", "media"),
    [
        (asked([FIRST, WHY]), [("image", "coco/1.jpg")]),
        (asked([{**FIRST, "image_url": "coco/1.jpg"}, WHY], image=[]), [("image", "coco/1.jpg")]),
        (
            asked([VIDEO, WHY, SECOND], "And?", [WHY, FIRST], videos=None),
            [("video", "a.mp4"), ("image", "coco/2.jpg"), ("image", "coco/1.jpg")],
        ),
        (asked([FRAMES, FIRST]), [("frame", "b/1.jpg"), ("frame", "b/2.jpg"), ("image", "coco/1.jpg")]),
        (
            asked([FIRST, SECOND], image=["coco/1.jpg", "coco/2.jpg"]),
            [("image", "coco/1.jpg"), ("image", "coco/2.jpg")],
        ),
        (asked([VIDEO, FIRST], image="coco/1.jpg", video="a.mp4"), [("video", "a.mp4"), ("image", "coco/1.jpg")]),
        (asked([*OF_TRANSFORMERS, WHY]), [("image", "coco/1.jpg"), ("video", "a.mp4")]),
        (asked([FRAMES], video=["b/1.jpg", "b/2.jpg"]), [("frame", "b/1.jpg"), ("frame", "b/2.jpg")]),
        (asked("<image>", [SECOND], image=["a.jpg", "coco/2.jpg"]), [("image", "a.jpg"), ("image", "coco/2.jpg")]),
        *(
            (asked([part, SECOND], image=["a", "coco/2.jpg"]), [("image", "a"), ("image", "coco/2.jpg")])
            for part in NAMELESS
        ),
    ],
)
def test_names_in_parts(place_media, good, media):
    before = copy.deepcopy(good)
    checked = check_entry(good)
    assert checked == CheckedEntry(before, tuple(media), ())
    place_media(json.dumps(checked.entry).encode(), checked.part_kinds)


def test_a_video_named_as_an_image_keeps_its_name():
    part = {"type": "image_url", "image_url": {"url": "a.mp4"}, "video": None}
    checked = check_entry(asked([part, WHY], video="a.mp4"))
    assert checked.repairs == ("image_for_video",)
    assert checked.entry["messages"][0]["content"] == [{"type": "video", "video": {"url": "a.mp4"}}, WHY]
    assert check_entry(checked.entry) == CheckedEntry(checked.entry, (("video", "a.mp4"),), ())


def test_kinds_of_the_parts_of_a_sample():
    media = ("frame", "image", "frame", "frame", "video", "frame")
    assert CheckedEntry({}, tuple((kind, "a") for kind in media), ()).part_kinds == [
        "video", "image", "video", "video", "video",
    ]  # fmt: skip


# Repairs


def test_missing_placeholders_are_put_before_the_first_question():
    given_entry = entry(
        ("system", "Be brief."), ("human", "What?"), ("gpt", "1"), image=["a.jpg", "b.jpg"], video="c.mp4"
    )
    before = copy.deepcopy(given_entry)
    checked = check_entry(given_entry)
    assert texts(checked) == ["Be brief.", "<image>\n<image>\n<video>\nWhat?", "1"]
    assert checked.media == (("image", "a.jpg"), ("image", "b.jpg"), ("video", "c.mp4"))
    assert checked.repairs == ("missing_placeholder",)
    assert given_entry == before and {**checked.entry, "conversations": 0} == {**before, "conversations": 0}


def test_a_turn_of_parts_is_repaired_as_text():
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}], "n": 1},
        {"role": "assistant", "content": "1"},
    ]
    checked = check_entry({"messages": turns, "image": "a.jpg"})
    assert checked.entry["messages"] == [{"role": "user", "content": "<image>\nWhat?", "n": 1}, turns[1]]


def test_images_as_parts_become_videos_and_nothing_else_of_them_changes():
    parts = [{"type": "text", "text": "Who? <image>\n"}, {"type": "image", "n": 1}, {"type": "text", "text": "\nWhy?"}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "<image>"}]},
    ]
    checked = check_entry({"messages": turns, "video": "a.mp4"})
    assert checked.repairs == ("image_for_video",)
    assert checked.entry["messages"] == [
        {"role": "user", "content": [parts[0], {"type": "video", "n": 1}, parts[2]]},
        turns[1],
    ]


def test_tags_in_lists_are_placeholders_only_where_no_media_stand_as_parts():
    text = {"type": "text", "text": "<image>\nWhat is <video>?"}
    turns = [{"role": "user", "content": [{"type": "image"}, text]}, {"role": "assistant", "content": "A."}]
    assert check_entry({"messages": turns, "image": "a.jpg"}).repairs == ()
    turns[0]["content"] = [text]
    assert check_entry({"messages": turns, "image": "a.jpg", "video": "b.mp4"}).repairs == ()
    assert reason_of({"messages": turns, "image": "a.jpg"}) == "placeholder_mismatch"


def test_image_placeholders_of_videos_become_video_placeholders():
    checked = check_entry(
        entry(
            ("human", "<image>\nWho?"), ("gpt", "1"), ("human", "And <image>?"), ("gpt", "2"), video=["a.mp4", "b.mp4"]
        )
    )
    assert texts(checked) == ["<video>\nWho?", "1", "And <video>?", "2"]
    assert checked.media == (("video", "a.mp4"), ("video", "b.mp4"))
    assert checked.repairs == ("image_for_video",)


def test_turns_that_are_left_out():
    checked = check_entry(entry(("system", " "), ("human", "What?"), ("gpt", "1"), ("human", "And?")))
    assert texts(checked) == ["What?", "1"]
    assert checked.repairs == ("empty_system_turn", "unanswered_question")


@pytest.mark.parametrize("text", ["NaN", '[1, {"x": -Infinity}]', "1e999", "9" * 5000, "-" + "9" * 5000])
def test_numbers_that_are_none_become_null(text):
    data = json.dumps({"score": 0, "turns": [{"n": 0}], **ask("What?")}).replace("0", text)
    checked = check_entry(DECODER.decode(data))
    assert checked.repairs == ("not_a_number",)
    written = json.loads(json.dumps(checked.entry, allow_nan=False))
    null = [1, {"x": None}] if text.startswith("[") else None
    assert (written["score"], written["turns"]) == (null, [{"n": null}])


def test_long_integers_stay():
    assert DECODER.decode("1" * 4300) == int("1" * 4300)
    assert check_entry(entry(score=10**300)).repairs == ()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does <video> do in HTML?", "noise"),
        ("What is this tag? <image>", "In SVG, <image> shows an image."),
        ([{"type": "text", "text": "What does <video> do?"}], [{"type": "text", "text": "<video>\n</video> plays."}]),
        ("Write a page.", "<svg><image></image></svg>"),
        ("Write a page.", "<video>\n<source>\n</video>"),
        ("- <image>\n- <video>", "noise"),
    ],
)
def test_tags_in_the_text_of_an_entry_without_media_are_text(place_media, question, answer):
    good = entry(("system", "Explain <image>."), ("human", question), ("gpt", answer), image=[])
    assert check_entry(good) == CheckedEntry(good, (), ())
    texts_only = [
        ["Explain <image>."],
        *([content if isinstance(content, str) else content[0]["text"]] for content in (question, answer)),
    ]
    assert [message.pieces for message in place_media(json.dumps(good).encode(), [])] == texts_only


def test_a_last_question_about_a_tag_is_left_out():
    checked = check_entry(entry(("human", "What?"), ("gpt", "1"), ("human", "And what is <image>?")))
    assert (texts(checked), checked.repairs) == (["What?", "1"], ("unanswered_question",))


# Other ways to say the same

PAD = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        (ask(f"{PAD}\nWhat?", image="a.jpg"), ask("<image>\nWhat?", image="a.jpg")),
        (ask("<|image_pad|>What?", image="a.jpg"), ask("<image>What?", image="a.jpg")),
        (ask("<|vision_start|><image><|vision_end|>What?", image="a.jpg"), ask("<image>What?", image="a.jpg")),
        (
            ask(f"<|vision_start|>{'<|image_pad|>' * 9}<|vision_end|>What?", image="a.jpg"),
            ask("<image>What?", image="a.jpg"),
        ),
        (
            ask(f"{PAD}and{PAD}<|vision_start|><|video_pad|><|vision_end|>?", image=["a.jpg", "b.jpg"], video="c.mp4"),
            ask("<image>and<image><video>?", image=["a.jpg", "b.jpg"], video="c.mp4"),
        ),
        (ask("Picture 1: <img>a/b.jpg</img>\nWhat?"), ask("Picture 1: <image>\nWhat?", image="a/b.jpg")),
        (ask("<img>file://a.jpg</img>What?", image="a.jpg"), ask("<image>What?", image="a.jpg")),
        (ask("<image>What is <|image_pad|>?", image="a.jpg"), None),
        (ask(f"What does {PAD} say?"), None),
        (ask("What?", PAD, image=[]), None),
    ],
)
def test_markers_of_qwen_stand_for_placeholders_where_there_are_none(place_media, marked, plain):
    """plain: the same entry with placeholders; None: the markers are text."""
    checked = check_entry(marked)
    assert (checked.entry, checked.repairs) == (marked, ())
    placed = place_media(json.dumps(marked).encode(), checked.part_kinds)
    if plain:
        assert checked.media == check_entry(plain).media
        assert placed == place_media(json.dumps(plain).encode(), checked.part_kinds)
    else:
        assert "<|image_pad|>" in "".join(piece for message in placed for piece in message.pieces[::2])


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (ask("<|vision_start|><|vision_end|>What?", image="a.jpg"), "<|vision_start|>"),
        (ask("<image_1>What?", image="a.jpg"), "<image_1>"),
        (ask("<img><IMG_CONTEXT></img>What?", image="a.jpg"), "<img>"),
        (ask("[IMG]What?", image="a.jpg"), "[IMG]"),
        (ask("<Image>What?", image="a.jpg"), "<Image>"),
        (ask("< image >What?", image="a.jpg"), "< image >"),
    ],
)
def test_markers_of_other_models_are_not_learned_as_text(bad, found):
    with pytest.raises(UnusableSample, match=f"^placeholder_mismatch: turn 0 has {re.escape(found)} in it"):
        check_entry(bad)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ask(f"{PAD}{PAD}?", image="a.jpg"), "placeholder_mismatch"),
        (ask(f"{PAD}What?"), "placeholder_mismatch"),
        (ask("<img>b.jpg</img>?", image="a.jpg"), "media_names_disagree"),
        (ask("<image>?", image="a.jpg", images=["b.jpg"]), "media_names_disagree"),
        (ask("<video>?", video="a.mp4", videos="b.mp4"), "media_names_disagree"),
        (ask("What?", image="a.jpg", images=["a.jpg", "b.jpg"]), "media_names_disagree"),
        (ask("What?", image="b.jpg", images=["a.jpg", "b.jpg"]), "media_names_disagree"),
        (ask("<img>../b.jpg</img>?"), "unsafe_path"),
    ],
)
def test_markers_that_do_not_fit_the_media(bad, reason):
    assert reason_of(bad) == reason


def test_a_marker_of_a_video_given_as_an_image_is_repaired():
    checked = check_entry(ask(f"{PAD}What?", video="a.mp4"))
    assert (texts(checked)[0], checked.repairs) == ("<video>What?", ("image_for_video",))


@pytest.mark.parametrize("nothing", ["", " ", [None], [""], [[]], {}, [{}], [None, ""]])
def test_a_field_that_names_nothing_makes_an_entry_of_text(place_media, nothing):
    good = entry(image=nothing, video=nothing)
    assert check_entry(good) == CheckedEntry(good, (), ())
    place_media(json.dumps(good).encode(), [])
    named = ask("<image>?", image=nothing, images=["a.jpg"])
    assert check_entry(named).media == (("image", "a.jpg"),)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("file://a/b.jpg", ["a/b.jpg"]),
        (["file://a.jpg", "b.jpg"], ["a.jpg", "b.jpg"]),
        ({"path": "a.jpg", "bytes": None}, ["a.jpg"]),
        ([{"bytes": None, "path": "file://a.jpg"}, {"url": "b.jpg"}], ["a.jpg", "b.jpg"]),
        ([["a.jpg"], [["b.jpg", "c.jpg"]]], ["a.jpg", "b.jpg", "c.jpg"]),
    ],
)
def test_names_in_other_forms(place_media, given, names):
    good = ask("<image>" * len(names), image=given)
    checked = check_entry(good)
    assert checked == CheckedEntry(good, tuple(("image", name) for name in names), ())
    place_media(json.dumps(good).encode(), checked.part_kinds)


def test_frames_in_a_list_of_a_list_are_one_video():
    assert check_entry(ask("<video>", video=[["1.jpg", "2.jpg"]])).media == (("frame", "1.jpg"), ("frame", "2.jpg"))
    assert reason_of(ask("<video><video>", video=[["1.jpg"], ["2.jpg"]])) == "malformed_entry"


def test_a_name_in_a_message_is_as_it_was_given():
    with pytest.raises(UnusableSample, match=r"^unsafe_path: 'file:///data/1.jpg' is an absolute path: write it as"):
        check_entry(ask("<image>", image="file:///data/1.jpg"))


@pytest.mark.parametrize("embedded", ["data:image/png;base64,iVBORw0KGgo=", {"path": None, "bytes": "iVBORw0KGgo="}])
def test_an_image_in_place_of_its_name(embedded):
    assert reason_of(ask("<image>", image=embedded)) == "embedded_media"
    if isinstance(embedded, str):
        for part in ({"type": "image_url", "image_url": {"url": embedded}}, {"type": "image", "url": embedded}):
            assert reason_of(asked([part])) == "embedded_media"


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_turns_is_used(place_media, field):
    for good, names in ((entry(), ("from", "value")), (asked("What?"), ("role", "content"))):
        beside = {**good, field: "Be brief."}
        assert check_entry(beside) == CheckedEntry(beside, (), ())
        name = "conversations" if "conversations" in good else "messages"
        among = {**good, name: [dict(zip(names, ("system", "Be brief."))), *good[name]]}
        assert place_media(json.dumps(beside).encode(), []) == place_media(json.dumps(among).encode(), [])
        assert check_entry({**among, field: "Be brief."}).repairs == ()
        assert check_entry({**good, field: " "}).repairs == ()
        assert check_entry({**among, field: "Be long."}) == CheckedEntry(among, (), ("second_system_prompt",))
        assert reason_of({**good, field: 3}) == "malformed_turn"
    blank = entry(("system", ""), ("human", "What?"), ("gpt", "1"), **{field: "Be brief."})
    assert check_entry(blank).repairs == ()
    assert place_media(json.dumps(blank).encode(), [])[0].pieces == ["Be brief."]


def test_a_developer_is_the_system(place_media):
    good = {"messages": [{"role": "developer", "content": "Be brief."}, *asked("What?")["messages"]]}
    assert check_entry(good) == CheckedEntry(good, (), ())
    assert [message.role for message in place_media(json.dumps(good).encode(), [])] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("question", "answer"), [("Human", "GPT"), ("USER", "ASSISTANT"), (" human", "chatgpt "), ("user", "model")]
)
def test_speakers_are_known_in_any_letter_case(place_media, question, answer):
    good = entry((question, "What?"), (answer, "1"))
    assert check_entry(good) == CheckedEntry(good, (), ())
    assert [message.role for message in place_media(json.dumps(good).encode(), [])] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (ask("<image>What?", img="a.jpg"), "1 <image> and 0 <video> in the turns, and no medium in image, images, "),
        (asked([{"type": "image"}, WHY]), "video, videos or in a part; its fields are messages"),
        (entry(("human", "How many?"), ("gpt", 3)), "turn 1 has 3 in place of its text"),
        (entry(("human", "Which?"), ("gpt", ["a", "b"])), "turn 1 has ['a', 'b'] in place of its text"),
        (entry(("human", [{"type": "audio"}]), ("gpt", "1")), "has a part of type 'audio', which is no text, image or"),
        (entry(("human", "Which?"), ("gpt", None)), "turn 1 has null in place of its text"),
        ({"messages": [{"from": "human", "text": "?"}]}, "turn 0 has neither from and value nor role and content"),
    ],
)
def test_what_is_wrong_is_said(bad, said):
    with pytest.raises(UnusableSample) as caught:
        check_entry(bad)
    assert said in str(caught.value)


def test_turns_as_json_text_are_read():
    """As CSV and Parquet hold them."""
    turns = entry(("human", "<image>What?"), ("gpt", "1"))["conversations"]
    turns[1]["score"] = float("nan")
    for name in ("conversations", "messages"):
        checked = check_entry({"image": "a.jpg", name: json.dumps(turns)})
        expected = {"image": "a.jpg", name: [turns[0], {**turns[1], "score": None}]}
        assert checked == CheckedEntry(expected, (("image", "a.jpg"),), ("turns_as_text", "not_a_number"))
        assert check_entry(checked.entry).repairs == ()
    for text in ("What?", "[broken", "[" * 100_000, "[]", " "):
        assert reason_of({"conversations": text}) == "no_conversations"


def test_what_an_entry_of_another_form_has_is_said():
    with pytest.raises(UnusableSample, match=r"messages is a list of turns; its fields are question, answer$"):
        check_entry({"question": "What?", "answer": "1"})
    with pytest.raises(UnusableSample, match=r"fields are data; if data holds the entries, write that list to a file"):
        check_entry({"data": [entry()]})
    with pytest.raises(UnusableSample, match=r"fields are chat; if chat holds the turns, call it conversations$"):
        check_entry({"chat": entry()["conversations"]})


@pytest.mark.parametrize(("name", "file", "right"), [("image_path", "a.JPG", "image"), ("clips", ["a.mp4"], "video")])
def test_media_in_a_field_that_is_not_read_are_not_lost(name, file, right):
    with pytest.raises(UnusableSample, match=rf"^missing_media: {name} names a\..*, and .* not read: call it {right}$"):
        check_entry(ask("What?", **{name: file}))
    for sound in (ask("What?", image=None, **{name: file}), ask("What?", id="a.jpg"), ask("What?", **{name: "a.txt"})):
        assert check_entry(sound) == CheckedEntry(sound, (), ())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (ask("?", meta={"image": "a.jpg"}), "missing_media: meta: image names a.jpg, and .* in the entry's image$"),
        ({"messages": [{"role": "user", "content": "?", "images": ["a.mp4"]}, {"role": "assistant", "content": "1"}]},
         "missing_media: turn 0: images names a.mp4, and this field is not read: name it in the entry's video$"),
        (entry(("human", "?"), ("gpt", "1")) | {"image_url": "http://x/0.jpg?w=3"},
         "missing_media: image_url names http://x/0.jpg.w=3, and .* fetch the file and name it in image$"),
        (ask("?", image_id=0), "missing_media: image_id is 0, and no field names the file: name it in image, or leave"),
        (ask("?", video_id="v_0"), "missing_media: video_id is 'v_0', and no field names the file: name it in video"),
        (ask("?", image_base64="iVBORw0KGgo="), "embedded_media: "),
    ],
)  # fmt: skip
def test_media_that_are_named_elsewhere_are_not_lost(bad, said):
    with pytest.raises(UnusableSample, match=f"^{said}"):
        check_entry(bad)


def test_what_names_no_medium_is_text():
    for sound in (
        ask("What?", image_id=None),
        ask("What?", image_id="", meta={"note": "a.jpg", "image": None}),
        ask("What?", source_file="http://x/page"),
        ask("What?", meta={"source": "http://x/a.jpg"}),
        ask("What?", image=None, image_id=3),
    ):
        assert check_entry(sound) == CheckedEntry(sound, (), ())


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (ask("<video>?", video="a.mp4", start=10, end=15), "start and end"),
        (ask("What?", video="a.mp4", start_time="0:10", end_time="0:15"), "start_time and end_time"),
        (ask("What?", video="a.mp4", begin=1.5, end=2), "begin and end"),
        (ask("<video>?", video="a.mp4", clip=[0, 2.5]), "clip"),
        (ask("<video>?", video="a.mp4", video_end=3), "video_end"),
        (ask("<video>?", video={"path": "a.mp4", "start": 0, "end": 2.5}), "start"),
        (ask("<video><video>?", videos=["a.mp4", {"path": "b.mp4", "end": 2}]), "end"),
        (asked([{"type": "video", "video": "a.mp4", "video_start": 1.5}, WHY]), "video_start"),
        (asked([{"type": "video", "video": {"path": "a.mp4", "video_start": 1.5}}, WHY]), "video_start"),
    ],
)
def test_a_part_of_a_video_is_not_learned_as_all_of_it(bad, field):
    with pytest.raises(UnusableSample, match=f"^unsupported_video: {field}: parts of videos are not read: cut them"):
        check_entry(bad)


def test_seconds_that_are_null_or_of_something_else_are_no_part_of_a_video():
    for sound in (
        ask("<video>?", video="a.mp4", video_start=None, start=1),
        ask("<image>?", image="a.jpg", video_end=1),
        ask("<image>?", image="a.jpg", start=1, end=2),
        ask("<video>?", video="a.mp4", start=0, end=None, clip="holiday", start_time="", end_time=""),
        ask("<video>?", video="a.mp4", timestamps=[1.5, 2], duration=12),
    ):
        assert check_entry(sound).repairs == ()


@pytest.mark.parametrize("name", ["https://example.org/a.jpg", "s3://bucket/a.jpg", "HTTP://a/b"])
def test_a_web_address_is_named_as_it_was_given(name):
    with pytest.raises(UnusableSample, match=f"^missing_media: {name} is a web address"):
        check_entry(ask("<image>", image=name))


def answers_with(*said: dict) -> dict:
    return {"messages": [turn | more for more in said for turn, more in zip(asked("What?")["messages"], ({}, more))]}


def test_an_answer_that_is_not_to_be_learned(place_media):
    good = answers_with(
        {"loss": False}, {"weight": 0}, {"train": False, "loss": True}, {"weight": 1}, {"loss": None}, {}
    )
    assert check_entry(good) == CheckedEntry(good, (), ())
    learned = [message.is_learned for message in place_media(json.dumps(good).encode(), [])]
    assert learned[1::2] == [False, False, False, True, True, True]
    assert reason_of(answers_with({"loss": False}, {"weight": 0.0})) == "nothing_learned"
    for odd in ("no", -1, [0]):
        assert reason_of(answers_with({}, {"weight": odd})) == "malformed_turn"
    checked = check_entry(answers_with({"weight": 0}, {"weight": 0.5}))
    assert checked == CheckedEntry(answers_with({"weight": 0}, {"weight": 1}), (), ("partial_weight",))


# What cannot be used


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (["no", "object"], "malformed_entry"),
        (None, "malformed_entry"),
        (entry(image={"path": 3}), "malformed_entry"),
        (entry(image=[{}, "a.jpg"]), "malformed_entry"),
        (entry(image=[["a.jpg", ""]]), "malformed_entry"),
        (entry(image=["a.jpg", None]), "malformed_entry"),
        (entry(image="a\ud800.jpg"), "malformed_entry"),
        (entry(video=3), "malformed_entry"),
        (entry(image="/etc/hostname"), "unsafe_path"),
        (entry(image="a/../../b.jpg"), "unsafe_path"),
        (entry(video=["a.mp4", "../b.mp4"]), "unsafe_path"),
        (entry(image=["a.jpg"] * (MAXIMUM_MEDIA + 1)), "too_many_media"),
        (entry(video=["a.jpg"] * (MAXIMUM_MEDIA + 1)), "too_many_media"),
        ({"id": 1}, "no_conversations"),
        ({"conversations": []}, "no_conversations"),
        ({"messages": "What?"}, "no_conversations"),
        ({"conversations": [3]}, "malformed_turn"),
        ({"conversations": [{"from": "human"}]}, "malformed_turn"),
        (entry(("human", 3), ("gpt", "1")), "malformed_turn"),
        (entry(("human", None), ("gpt", "1")), "malformed_turn"),
        (entry(("human", [{"type": "audio"}]), ("gpt", "1")), "malformed_turn"),
        (entry(("human", [{"type": "text", "text": 3}]), ("gpt", "1")), "malformed_turn"),
        (entry((3, "What?"), ("gpt", "1")), "malformed_turn"),
        (entry(("human", "What?"), ("narrator", "1")), "unknown_role"),
        (entry(("tool", "What?"), ("gpt", "1")), "unknown_role"),
        (ask("half a \ud83d pair"), "broken_text"),
        (entry(("gpt", "1"), ("human", "What?"), ("gpt", "2")), "roles_out_of_order"),
        (entry(("human", "What?"), ("human", "And?"), ("gpt", "1")), "roles_out_of_order"),
        (entry(("human", "What?"), ("gpt", "1"), ("gpt", "2")), "roles_out_of_order"),
        (entry(("human", "What?"), ("gpt", "1"), ("system", "Stop."), ("gpt", "2")), "roles_out_of_order"),
        (entry(("human", "What?")), "roles_out_of_order"),
        (entry(("system", "Be brief.")), "roles_out_of_order"),
        (entry(("system", "")), "roles_out_of_order"),
        (
            entry(("human", "<image>1?"), ("gpt", "1"), ("human", "<image>2?")) | {"image": ["a", "b"]},
            "roles_out_of_order",
        ),
        (ask(" \n"), "empty_turn"),
        (ask("What?", ""), "empty_turn"),
        (ask("What?", "\u3000"), "empty_turn"),
        (ask("", image="a.jpg"), "empty_turn"),
        (ask("What?", "x" * MAXIMUM_CHARACTERS), "text_too_long"),
        (ask("What?", "see <image>", image="a.jpg"), "placeholder_in_answer"),
        (ask("What?", "see <video>", video="a.mp4"), "placeholder_in_answer"),
        (ask("What?", "<image>\n"), "placeholder_in_answer"),
        (entry(("system", "<image>"), ("human", "What?"), ("gpt", "1"), image="a.jpg"), "placeholder_in_system"),
        (entry(("system", "<image>"), ("human", "What?"), ("gpt", "1")), "placeholder_in_system"),
        (ask("<image>What?"), "placeholder_mismatch"),
        (ask("<image>\nWhat?"), "placeholder_mismatch"),
        (ask("<video>\r\nWhat?"), "placeholder_mismatch"),
        (ask("What?\n<image>"), "placeholder_mismatch"),
        (ask("What?\r\n<image> <video>\r\nAnd now?"), "placeholder_mismatch"),
        (
            entry(("human", "One?"), ("gpt", "1"), ("human", "\n <image><image>Two?"), ("gpt", "2")),
            "placeholder_mismatch",
        ),
        (ask([{"type": "text", "text": "<image>\nWhat?"}]), "placeholder_mismatch"),
        (ask([{"type": "image"}, {"type": "text", "text": "What?"}]), "placeholder_mismatch"),
        (ask("What is <image>?", image=[], images=["a.jpg", "b.jpg"]), "placeholder_mismatch"),
        (asked([FIRST, SECOND], image=["coco/2.jpg", "coco/1.jpg"]), "media_names_disagree"),
        (asked([FIRST], [WHY, SECOND], images=["coco/1.jpg", "coco/3.jpg"]), "media_names_disagree"),
        (asked("<image>", [SECOND], image=["coco/2.jpg", "a.jpg"]), "media_names_disagree"),
        (asked([FRAMES], video=["b/2.jpg", "b/1.jpg"]), "media_names_disagree"),
        (asked([{"type": "image", "image": "b.mp4"}], video="a.mp4"), "media_names_disagree"),
        (asked([FIRST, SECOND], image="coco/1.jpg"), "placeholder_mismatch"),
        *((asked([part, SECOND]), "placeholder_mismatch") for part in NAMELESS),
        (asked("<image>", [SECOND]), "placeholder_mismatch"),
        (asked([{"type": "image", "image": "file:///etc/hostname"}]), "unsafe_path"),
        (asked([{"type": "image", "image": "../a.jpg"}]), "unsafe_path"),
        (asked([{"type": "image", "image": 3}]), "malformed_entry"),
        (asked([{"type": "video", "video": ["a.mp4", "b.mp4"]}]), "malformed_entry"),
        (asked([{"type": "video", "video": ["a.jpg", None]}]), "malformed_entry"),
        (asked([FRAMES, FRAMES]), "malformed_entry"),
        (asked([FIRST] * (MAXIMUM_MEDIA + 1)), "too_many_media"),
        (asked([{"type": "video", "video": ["a.jpg"] * (MAXIMUM_MEDIA + 1)}]), "too_many_media"),
        (ask("<image><image>What?", image="a.jpg"), "placeholder_mismatch"),
        (ask("<image>What?", image=["a.jpg", "b.jpg"]), "placeholder_mismatch"),
        (ask("<video>What?", image="a.jpg"), "placeholder_mismatch"),
        (ask("<image>What?", video=["a.mp4", "b.mp4"]), "placeholder_mismatch"),
        (ask("<image><image>What?", image="a.jpg", video="b.mp4"), "placeholder_mismatch"),
    ],
)
def test_what_cannot_be_used(bad, reason):
    assert reason_of(bad) == reason


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_nesting_is_bounded():
    assert check_entry(entry(extra=nested(MAXIMUM_DEPTH - 1))).repairs == ()
    assert reason_of(entry(extra=nested(MAXIMUM_DEPTH))) == "malformed_entry"
    assert reason_of(entry(extra=nested(MAXIMUM_DEPTH), score=float("nan"))) == "malformed_entry"
    assert reason_of(entry(score=float("nan"), extra=nested(MAXIMUM_DEPTH + 1))) == "malformed_entry"


def test_the_last_of_two_equal_keys_counts():
    data = json.dumps(ask("What?")).replace('"id"', '"image": "a.jpg", "image": "b.jpg", "id"')
    assert check_entry(DECODER.decode(data)).media == (("image", "b.jpg"),)


def test_text_of_the_greatest_length_passes():
    assert check_entry(ask("What?", "x" * (MAXIMUM_CHARACTERS - 5))).repairs == ()


def test_names_of_media():
    for name, clean in (("./a//b.jpg", "a/b.jpg"), ("a..b/c.jpg", "a..b/c.jpg"), ("Grüße/世界.jpg", "Grüße/世界.jpg")):
        assert clean_name(name) == clean
    for name in ("../a.jpg", "a/../b.jpg", "/a.jpg", "a\0.jpg", ".."):
        with pytest.raises(UnusableSample, match="unsafe_path"):
            clean_name(name)
    for name in ("", ".", "./", 3, None, {}, "\udcff.jpg"):
        with pytest.raises(UnusableSample, match="malformed_entry"):
            clean_name(name)


def test_the_exception_travels_between_processes():
    copied = pickle.loads(pickle.dumps(UnusableSample("broken_image", "x.jpg: cut")))  # noqa: S301
    assert (copied.reason, copied.detail, str(copied)) == ("broken_image", "x.jpg: cut", "broken_image: x.jpg: cut")


# Agreement with training

WORDS = st.sampled_from(["\n", " ", "What?", "<Image>", "<image", "世界", "<|im_end|>", "> <"])
ODD_WORDS = st.sampled_from(["<image>", "<video>", "\n", " ", "\ud800", "\u3000"])
ODD_CONTENTS = st.one_of(
    st.lists(ODD_WORDS, max_size=3).map("".join),
    st.lists(st.sampled_from([{"type": "image"}, {"type": "video"}, {"type": "text", "text": " "}, {"type": 1}, 3])),
    st.none(),
)
SPEAKERS = st.sampled_from(["human", "gpt", "user", "assistant", "system", "narrator", None])
ODD_TURNS = st.one_of(
    st.builds(lambda speaker, content: {"from": speaker, "value": content}, SPEAKERS, ODD_CONTENTS),
    st.builds(lambda speaker, content: {"role": speaker, "content": content}, SPEAKERS, ODD_CONTENTS),
    st.sampled_from([{}, None, {"from": "human", "content": "What?"}, {"role": "user", "value": "<image>"}]),
)


@st.composite
def dialogues(draw, placeholders: list[str]) -> list[dict]:
    """Sound turns with these placeholders in any places of the questions, in either style or both."""
    questions = [[word] for word in draw(st.lists(WORDS, min_size=1, max_size=3))]
    for placeholder in placeholders:
        question = questions[draw(st.integers(0, len(questions) - 1))]
        question.insert(draw(st.integers(0, len(question))), placeholder)
    turns = [{"from": "system", "value": draw(WORDS)}] if draw(st.booleans()) else []
    for words in questions:
        as_parts = [
            {"type": word[1:-1]} if word in ("<image>", "<video>") else {"type": "text", "text": word} for word in words
        ]
        question = draw(st.sampled_from(["".join(words), as_parts]))
        turns.append(
            draw(st.sampled_from([{"from": "human", "value": question}, {"role": "user", "content": question}]))
        )
        turns.append(draw(st.sampled_from([{"from": "gpt", "value": "A."}, {"role": "assistant", "content": "A."}])))
    return turns


@st.composite
def entries(draw) -> dict:
    """Entries that are sound, or can be repaired, or have a fault or two."""
    images = draw(st.lists(st.sampled_from(["a.jpg", "./b.png"]), max_size=2))
    videos = draw(st.lists(st.sampled_from(["c.mp4", "d.jpg", "e.jpg"]), max_size=2))
    number = 1 if videos and all(name.endswith("jpg") for name in videos) else len(videos)  # frames are one video
    right = ["<image>"] * len(images) + ["<video>"] * number
    placeholder_images = ["<image>"] * len(right)
    placeholders = draw(
        st.sampled_from(
            [right, right, [], placeholder_images, [*right, "<video>"], placeholder_images, placeholder_images]
        )
    )
    turns = draw(dialogues(draw(st.permutations(placeholders))))
    if draw(st.integers(0, 2)) == 0:
        place = draw(st.integers(0, len(turns) - 1))
        turns[place : place + draw(st.integers(0, 1))] = draw(st.lists(ODD_TURNS, max_size=1))
    return {draw(st.sampled_from(["conversations", "messages"])): turns, "image": images, "video": videos}


@pytest.fixture(scope="module")
def place_media():
    """What training does with an entry and the kinds of its media parts; raises for what it would skip."""
    from dct_qwen2vl.data.sample_encoder import place_media
    from dct_qwen2vl.data.samples import parse_entry, parse_messages

    def place(data: bytes, kinds: list[str]) -> list[tuple[str, list[str]]]:
        return place_media(parse_messages(parse_entry(data), bool(kinds)), kinds)

    return place


@settings(max_examples=500, deadline=None)
@given(entries())
def test_training_takes_what_passes(place_media, generated):
    before = copy.deepcopy(generated)
    try:
        checked = check_entry(generated)
    except UnusableSample:
        return
    finally:
        assert generated == before
    messages = place_media(json.dumps(checked.entry).encode(), checked.part_kinds)
    assert messages[-1][0] == "assistant" and all("".join(message.pieces).strip() for message in messages)
    again = check_entry(checked.entry)
    assert again == CheckedEntry(checked.entry, checked.media, ())


def test_the_entries_of_the_last_test_pass_often_enough():
    """Otherwise it would say little."""
    outcomes: dict[str, int] = {}

    @settings(max_examples=600, deadline=None, database=None, derandomize=True)
    @given(entries())
    def count(generated):
        try:
            repairs = check_entry(generated).repairs or ("none",)
        except UnusableSample as unusable:
            repairs = (unusable.reason,)
        for name in repairs:
            outcomes[name] = outcomes.get(name, 0) + 1

    count()
    for name in ("none", "missing_placeholder", "image_for_video", "placeholder_mismatch", "roles_out_of_order"):
        assert outcomes.get(name, 0) >= 5, outcomes


def test_videos_frames_and_mixed_media_reach_training(tmp_path, place_media):
    """From a raw folder through shards to the cooker: kinds, order and pixels."""
    import data_preparation
    from dct_qwen2vl.data.samples import cook

    data, output = tmp_path / "data", tmp_path / "shards"
    data.mkdir()
    greys = [0, 80, 160, 240]
    for number, grey in enumerate(greys):
        image = Image.new("RGB", (48, 32), (grey, grey, grey))
        (data / f"{number}.jpg").write_bytes(encode(image, "JPEG", quality=95))
    (data / "a.mkv").write_bytes(video_file("matroska"))
    mixed = {"image": ["0.jpg", "3.jpg"], "video": "a.mkv"}
    entries = {
        "video": ask("<image>\nWhat?", video="a.mkv"),
        "frames": ask("<image>\nWhat?", video=[f"{number}.jpg" for number in range(4)]),
        "mixed": ask("<image> <video> <image>?", **mixed),
        "unplaced": ask("What?", **mixed),
        "parts": asked(
            [
                WHY,
                {"type": "image", "image": "2.jpg"},
                {"type": "video", "video": "a.mkv"},
                {"type": "image_url", "image_url": {"url": "1.jpg"}},
            ]
        ),
        "two": entry(
            ("human", "<image>1?"), ("gpt", "1"), ("human", "<image>2?"), ("gpt", "2"), image=["3.jpg", "0.jpg"]
        ),
    }
    texts_only = [entry(("human", f"{number}?"), ("gpt", "1")) for number in range(20)]
    (data / "cambrian737k.json").write_text(
        json.dumps([*({**item, "id": name} for name, item in entries.items()), *texts_only])
    )
    arguments = ["--data-dir", str(data), "--output-dir", str(output), "--num-workers", "0", "--no-report"]
    assert data_preparation.main(arguments) == 0
    samples = {}
    for path in output.glob("*.tar"):
        with tarfile.open(path) as tar:
            crude: dict[str, dict] = {}
            for member in tar:
                key, _, ending = member.name.partition(".")
                basics = {"__key__": key, "__restore_key__": (), "__subflavor__": None, "__subflavors__": {}}
                crude.setdefault(key, basics)[ending] = tar.extractfile(member).read()
            samples.update({json.loads(sample.entry)["id"]: sample for sample in map(cook, crude.values())})
    shown = {}
    for name in entries:
        sample = samples[name]
        place_media(sample.entry, [kind for kind, _ in sample.media])
        shown[name] = [
            (kind, as_array(kind, content, VideoSampling()).reshape(-1, 3).mean().round())
            for kind, content in sample.media
        ]
    video = shown["video"][0]
    assert shown["video"] == [("video", video[1])]
    assert shown["frames"] == [("video", 120)]
    assert shown["mixed"] == [("image", 0), video, ("image", 240)]
    assert shown["unplaced"] == [("image", 0), ("image", 240), video]
    assert shown["parts"] == [("image", 160), video, ("image", 80)]
    assert shown["two"] == [("image", 240), ("image", 0)]
    assert samples["frames"].media[0][1][4:8] == b"ftyp"
