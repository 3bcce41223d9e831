"""DCTImageProcessor: every form of image and video, sizes, arguments, errors, saving; stock Qwen2-VL's as reference.

Letters as in dct_tokenizer.py: T H W frames and pixels, (t, h, w) the grid, K kept.
"""

import copy
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from dct_qwen2vl.data.images import to_rgb
from dct_qwen2vl.dct import (
    configuration_dct,
    image_colours_dct,
    image_inputs_dct,
    image_processing_dct,
    image_sizes_dct,
    transform_dct,
)
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.dct.transform_dct import DCTTokenizer
from dct_tokenizer import DCTConfig, target_size

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@lru_cache
def tokenizer(name: str) -> DCTTokenizer:
    return DCTTokenizer(DCTConfig.preset(name))


@lru_cache
def processor(name: str = "x4") -> DCTImageProcessor:
    return DCTImageProcessor(name)


def image_tokens(image, **options) -> torch.Tensor:
    return processor()(images=image, return_tensors="pt", **options)["pixel_values"]


def stock_pixels(**arguments) -> np.ndarray:
    """What the stock processor resizes an image or video to, as float [T, H, W, 3] in the range of its input."""
    output = Qwen2VLImageProcessor(do_rescale=False, do_normalize=False)(**arguments)
    (grid,) = output["image_grid_thw"] if "image_grid_thw" in output else output["video_grid_thw"]
    patches = output["pixel_values"] if "pixel_values" in output else output["pixel_values_videos"]
    t, h, w = grid.tolist()
    # (t, group row, group column, row in group, column in group, channel, frame, row, column) as Qwen2-VL lays it out
    patches = patches.reshape(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return patches.reshape(t * 2, h * 14, w * 14, 3)


def our_pixels(**arguments) -> np.ndarray:
    """What `exact` is given, uint8 [T, H, W, 3]: its tokens give back every byte."""
    output = processor("exact")(**arguments, return_tensors="pt")
    tokens, grid = output.values()
    return tokenizer("exact").decode(tokens, grid[0].tolist()).numpy()


# Outputs


def test_outputs_of_the_processor(natural_frames):
    image = natural_frames(1, 200, 310)[0]
    output = processor()(images=image, return_tensors="pt")
    assert set(output) == {"pixel_values", "image_grid_thw"}
    # 200 x 310 -> 224 x 336 px, blocks of 28 px
    assert output["image_grid_thw"].tolist() == [[1, 8, 12]] and output["image_grid_thw"].dtype == torch.int64
    assert output["pixel_values"].shape == (96, 1764) and output["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_kinds_of_tensors(return_tensors, natural_frames):
    image = natural_frames(1, 56, 112)[0]
    output = processor()(images=image, videos=[image, image], return_tensors=return_tensors)
    kind = torch.Tensor if return_tensors == "pt" else np.ndarray
    assert all(isinstance(value, kind) for value in output.values())
    found = {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in output.items()}
    assert found == {
        "pixel_values": ("float32", (8, 1764)),
        "image_grid_thw": ("int64", (1, 3)),
        "pixel_values_videos": ("float32", (8, 1764)),
        "video_grid_thw": ("int64", (1, 3)),
    }
    np.testing.assert_array_equal(np.asarray(output["pixel_values"]), image_tokens(image).numpy())


def test_images_of_mixed_sizes_stand_one_after_another(natural_frames):
    images = [natural_frames(1, height, width, seed=height)[0] for height, width in ((56, 56), (200, 100), (90, 300))]
    together = processor()(images=images, videos=[list(natural_frames(2, 60, 60))], return_tensors="pt")
    assert together["image_grid_thw"].tolist() == [[1, 2, 2], [1, 8, 4], [1, 4, 10]]
    assert torch.equal(together["pixel_values"], torch.cat([image_tokens(image) for image in images]))
    assert together["video_grid_thw"].tolist() == [[1, 2, 2]]


def test_what_needs_no_change_is_not_copied(natural_frames, monkeypatch):
    video = natural_frames(5, 56, 112)
    own, given_to_encode = DCTImageProcessor("x4"), []

    def encode(frames):
        given_to_encode.append(frames)
        return tokens, (3, 2, 4)

    tokens = torch.zeros(24, 1764)
    monkeypatch.setattr(own.tokenizer, "encode", encode)
    output = own(videos=video, return_tensors="pt")
    assert output["pixel_values_videos"].data_ptr() == tokens.data_ptr()
    for same in (
        video,
        torch.from_numpy(video),
        list(video),
        [torch.from_numpy(frame) for frame in video],
        video.transpose(0, 3, 1, 2),
        video[:, ::-1],
    ):
        own(videos=same, return_tensors="pt")
        assert all(np.shares_memory(frame, video) for frame in given_to_encode[-1])
    own(images=video[0], return_tensors="pt")
    assert np.shares_memory(given_to_encode[-1][0], video)


# Sizes


@given(
    height=st.integers(56, 3000), width=st.integers(56, 3000), low=st.integers(56**2, 10**6), more=st.integers(0, 10**6)
)
@settings(max_examples=200, deadline=None)
def test_sizes_are_those_of_smart_resize(height, width, low, more):
    expected = smart_resize(height, width, factor=56, min_pixels=low, max_pixels=4 * low + more)
    if 0 not in expected and max(expected) <= 200 * min(expected):
        assert target_size(height, width, 56, low, 4 * low + more) == expected


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    factor=st.sampled_from([1, 28, 40, 56, 112]),
    low=st.integers(1, 10**6),
    more=st.integers(0, 10**6),
)
@settings(max_examples=500, deadline=None)
def test_sizes_are_multiples_within_the_bounds(height, width, factor, low, more):
    high = low + more
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            target_size(height, width, factor, low, high)
        return
    found = target_size(height, width, factor, low, high)
    assert found[0] % factor == found[1] % factor == 0 and min(found) >= factor
    assert math.prod(found) <= max(high, factor**2)
    assert low <= math.prod(found) or high < max(4 * low, factor**2), "there was room between the bounds"
    assert max(found) <= 200 * min(found)
    assert target_size(*found, factor, low, high) == found


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (56, 56)),
        ((10, 30), (56, 112)),
        ((27, 100), (56, 112)),
        ((84, 27), (112, 56)),
        ((13, 55), (56, 168)),
        ((40, 150), (56, 168)),
        ((8, 1600), (56, 840)),
        ((55, 56), (56, 56)),
        ((56, 55), (56, 56)),
        ((20, 10), (112, 56)),
        ((3, 600), (56, 840)),
        ((83, 16600), (56, 11200)),  # smart_resize: 56 x 16632, an aspect ratio that it would refuse itself
    ],
)
def test_tiny_and_thin_images_have_the_sizes_of_newer_transformers(size, expected):
    """All but the last were printed by `smart_resize` of transformers 4.57.6; that of 4.51.3 refuses them."""
    assert target_size(*size, 56, 56 * 56, 10**6) == expected


def test_bounds_that_leave_no_room_keep_the_upper_one():
    assert smart_resize(480, 640, 112, 1_000_000, 1_003_520) == (896, 1232), "1,103,872 px"
    assert target_size(480, 640, 112, 1_000_000, 1_003_520) == (784, 1120)
    assert target_size(480, 640, 112, 2_000_000, 1_003_520) == (784, 1120)


def test_tiny_images_are_taken(natural_frames):
    output = processor()(images=natural_frames(1, 3, 5)[0], return_tensors="pt", input_data_format="channels_last")
    assert output["image_grid_thw"].tolist() == [[1, 2, 4]]
    assert output["pixel_values"].isfinite().all()


def test_pixel_bounds(natural_frames):
    def grid(own: DCTImageProcessor, **arguments) -> list[int]:
        return own(images=natural_frames(1, 448, 448)[0], **arguments)["image_grid_thw"].tolist()[0]

    few = DCTImageProcessor("x4", max_pixels=112 * 112)
    assert grid(few) == grid(DCTImageProcessor("x4", size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}))
    assert grid(few) == [1, 4, 4]
    assert grid(few, max_pixels=224 * 224) == [1, 8, 8]
    assert grid(few, size={"shortest_edge": 3136, "longest_edge": 56 * 56}) == [1, 2, 2]
    assert grid(DCTImageProcessor("x4", min_pixels=896 * 896)) == [1, 32, 32]
    assert grid(processor(), min_pixels=896 * 896) == [1, 32, 32]
    assert grid(DCTImageProcessor("x4", max_pixels=1)) == [1, 2, 2], "one square of the resize factor is the least"
    video = few(videos=[list(natural_frames(4, 224, 224))])
    assert video["video_grid_thw"].tolist() == [[2, 4, 4]], "the bound holds for each frame"


def test_size_is_the_second_name_of_the_bounds(tmp_path):
    own = DCTImageProcessor("x4", min_pixels=4000, max_pixels=90000)
    assert own.size == {"shortest_edge": 4000, "longest_edge": 90000}
    own.size = {"shortest_edge": 5000, "longest_edge": 80000}
    assert (own.min_pixels, own.max_pixels) == (5000, 80000)
    own.save_pretrained(tmp_path)
    for changes, expected in (
        ({}, (5000, 80000)),
        ({"max_pixels": 70000}, (5000, 70000)),
        ({"size": {"shortest_edge": 6000, "longest_edge": 60000}}, (6000, 60000)),
    ):
        read = DCTImageProcessor.from_pretrained(tmp_path, **changes)
        assert (read.min_pixels, read.max_pixels) == tuple(read.size.values()) == expected


def test_without_resizing(natural_frames):
    own = DCTImageProcessor("x4", do_resize=False, max_pixels=56 * 56)
    image = natural_frames(1, 112, 168)[0]
    output = own(images=image, return_tensors="pt")
    assert output["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert torch.equal(output["pixel_values"], tokenizer("x4").encode(image[None])[0])
    assert own(images=image, do_resize=True)["image_grid_thw"].tolist() == [[1, 2, 2]]
    for wrong in (image[:100], image[:, :100]):
        height, width = wrong.shape[:2]
        with pytest.raises(
            ValueError, match=f"do_resize, preset x4 needs .* multiples of 56 px, got {height} x {width}"
        ):
            own(images=wrong)
    with pytest.raises(ValueError, match="all frames of a video need one size, got 112 x 168, 56 x 168"):
        own(videos=[image, image[:56]])


# Pixels: those of the stock processor


def image_forms(array: np.ndarray) -> dict[str, dict]:
    """Arguments of a processor call for one uint8 image [H, W, 3], as the stock processor takes them, too."""
    image = Image.fromarray(array)
    return {
        "numpy": {"images": array},
        "channels first": {"images": array.transpose(2, 0, 1)},
        "torch": {"images": torch.from_numpy(array)},
        "PIL": {"images": image},
        "PIL grey": {"images": image.convert("L")},
        "PIL palette": {"images": image.convert("P")},
        "PIL CMYK": {"images": image.convert("CMYK")},
        "whole floats": {"images": array.astype(np.float32)},
        "int64": {"images": array.astype(np.int64)},
        "video": {"images": None, "videos": [array, array[::-1], array[:, ::-1], array.max() - array]},
    }


@pytest.mark.parametrize("form", image_forms(np.zeros((1, 1, 3), np.uint8)))
@pytest.mark.parametrize("size", [(100, 150), (333, 90), (112, 56)])
def test_resized_pixels_are_the_stock_processors(form, size, natural_frames):
    arguments = image_forms(natural_frames(1, *size)[0])[form]
    expected = stock_pixels(**arguments)
    assert expected.std() > 10
    np.testing.assert_array_equal(our_pixels(**arguments), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_values_from_0_to_1_are_resized_like_bytes(dtype, natural_frames):
    array = (natural_frames(1, 100, 150)[0] / 255 * 0.9 + 0.001).astype(dtype)
    expected = stock_pixels(images=array) * 255
    np.testing.assert_allclose(our_pixels(images=array, do_rescale=False), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("resample", [PILImageResampling.BILINEAR, PILImageResampling.LANCZOS, 0])
def test_other_filters(resample, natural_frames):
    image = natural_frames(1, 100, 150)[0]
    resized = np.asarray(Image.fromarray(image).resize((168, 112), resample))
    expected = tokenizer("x4").encode(resized[None])[0]
    assert torch.equal(image_tokens(image, resample=resample), expected)
    own = DCTImageProcessor("x4", resample=resample)
    assert torch.equal(own(images=image, return_tensors="pt")["pixel_values"], expected)
    assert not torch.equal(image_tokens(image), expected)


# Forms of images


def test_the_same_image_in_every_form_gives_the_same_tokens(natural_frames):
    array = natural_frames(1, 112, 168)[0]
    expected, image, tensor = image_tokens(array), Image.fromarray(array), torch.from_numpy(array)
    opaque = np.concatenate([array, np.full((112, 168, 1), 255, np.uint8)], axis=-1)
    for same in (
        image,
        [image],
        [[image]],
        (image,),
        [[image], []],
        array.transpose(2, 0, 1),
        tensor,
        tensor.permute(2, 0, 1),
        array[None],
        tensor[None],
        array[::-1][::-1],
        opaque,
        opaque.transpose(2, 0, 1),
        image.convert("RGBA"),
        array.astype(np.int16),
        tensor.long(),
        array.astype(np.uint16) * 257,
        tensor.double(),
        tensor.to(torch.bfloat16),  # has 8 bits: exact
    ):
        assert torch.equal(image_tokens(same), expected)
    torch.testing.assert_close(image_tokens(array.astype(np.float32)), expected)
    torch.testing.assert_close(image_tokens(tensor.float().requires_grad_()), expected)
    torch.testing.assert_close(image_tokens(array / 255, do_rescale=False), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(image_tokens(tensor / 255, do_rescale=False), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(image_tokens(opaque / 255, do_rescale=False), expected, rtol=0, atol=1e-4)


def test_layouts(natural_frames):
    """3 and 1 px high or wide: only input_data_format tells the channels."""
    last = natural_frames(1, 3, 60)[0]
    first = last.transpose(2, 0, 1)
    expected = image_tokens(last, input_data_format="channels_last")
    assert torch.equal(image_tokens(first, input_data_format=ChannelDimension.FIRST), expected)
    assert torch.equal(image_tokens(first), expected), "[3, 3, 60] can only have them first"
    for ambiguous in (last, first.transpose(0, 2, 1), last[:1]):
        with pytest.raises(ValueError, match=r"cannot tell which axis of \[., ., .\] holds the channels: give input_"):
            image_tokens(np.ascontiguousarray(ambiguous)[:, :3])
    wide = natural_frames(1, 70, 4)[0]
    assert torch.equal(image_tokens(wide.transpose(2, 0, 1)), image_tokens(wide)), "four pixels are no RGBA"
    video = natural_frames(2, 56, 56)
    expected = processor()(videos=video)["pixel_values_videos"]
    for same, layout in ((video, "channels_last"), (video.transpose(0, 3, 1, 2), "channels_first")):
        np.testing.assert_array_equal(
            processor()(videos=same, input_data_format=layout)["pixel_values_videos"], expected
        )


def test_grey_images(natural_frames):
    luma = natural_frames(1, 112, 113)[0][..., :1]
    expected = image_tokens(luma.repeat(3, axis=-1))
    grey = luma[..., 0]
    for same in (
        Image.fromarray(grey),
        grey,
        luma,
        luma.transpose(2, 0, 1),
        torch.from_numpy(grey),
        torch.from_numpy(luma).permute(2, 0, 1),
        grey.astype(np.uint16) * 257,
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey.astype(np.int32) * 257),
        Image.fromarray(grey).convert("LA"),
        [grey],
    ):
        assert torch.equal(image_tokens(same), expected)
    black_and_white = Image.fromarray(grey).convert("1")
    assert torch.equal(image_tokens(np.array(black_and_white)), image_tokens(black_and_white))
    frames = processor()(videos=[[grey, grey]], return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(frames, expected)


def special_images() -> dict[str, Image.Image]:
    """Images in modes that carry transparency or more than 8 bits."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (60, 70, 4), dtype=np.uint8))
    palette = Image.fromarray(rng.integers(0, 8, (60, 70), dtype=np.uint8)).convert("P")
    palette.putpalette(rng.integers(0, 256, 24, dtype=np.uint8).tobytes())
    keyed = palette.copy()
    keyed.info["transparency"] = 3
    faded = palette.copy()
    faded.info["transparency"] = bytes(range(0, 256, 36))
    colour_key = rgba.convert("RGB")
    colour_key.info["transparency"] = colour_key.getpixel((0, 0))
    deep = rng.integers(0, 65536, (60, 70)).astype(np.uint16)
    return {
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "RGBa": rgba.convert("RGBa"),
        "P": palette,
        "P, one colour transparent": keyed,
        "P, faded": faded,
        "RGB, one colour transparent": colour_key,
        "I;16": Image.fromarray(deep),
        "I": Image.fromarray(deep.astype(np.int32)),
        "F": Image.fromarray(deep.astype(np.float32) / 257),
        "1": rgba.convert("1"),
        "CMYK": rgba.convert("RGB").convert("CMYK"),
        "YCbCr": rgba.convert("RGB").convert("YCbCr"),
    }


@pytest.mark.parametrize("name", special_images())
def test_special_images_are_read_as_from_files(name):
    image = special_images()[name]
    expected = image_tokens(np.asarray(to_rgb(image.copy())))
    assert torch.equal(image_tokens(image), expected)


def test_transparency_lies_on_white():
    array = np.zeros((56, 56, 4), np.uint8)
    array[:28, :, 3] = 255  # black above; below, black that is not to be seen
    array[:7, :, 3] = 51
    seen = np.full((56, 56, 3), 255, np.uint8)
    seen[:28] = 0
    seen[:7] = 204
    expected = image_tokens(seen)
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array), Image.fromarray(array)):
        assert torch.equal(image_tokens(same), expected)
    torch.testing.assert_close(image_tokens(array / 255, do_rescale=False), expected, rtol=0, atol=1e-4)
    assert not torch.equal(image_tokens(array[..., :3]), expected)


def test_arrays_are_composed_as_by_pillow():
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    array = np.stack([value, value, value, alpha], axis=-1)  # every pair there is
    assert torch.equal(image_tokens(array), image_tokens(Image.fromarray(array)))


def test_floats_of_0_to_255_are_rounded_where_they_are_resized(natural_frames):
    array = natural_frames(1, 100, 150)[0]
    nearly = array + np.random.default_rng(0).uniform(-0.4, 0.4, array.shape)
    assert torch.equal(image_tokens(nearly), image_tokens(array))
    finer = np.full((56, 56, 3), 100.25)
    assert not torch.equal(image_tokens(finer), image_tokens(finer.round())), "without resizing they are finer"


# Videos


def test_videos_in_every_form(natural_frames):
    video = natural_frames(3, 112, 112)
    output = processor()(images=None, videos=[list(video)], return_tensors="pt")
    assert set(output) == {"pixel_values_videos", "video_grid_thw"}
    assert output["video_grid_thw"].tolist() == [[2, 4, 4]]
    expected, grid = tokenizer("x4").encode(video)
    assert torch.equal(output["pixel_values_videos"], expected) and grid == (2, 4, 4)
    tensor, images = torch.from_numpy(video), [Image.fromarray(frame) for frame in video]
    for same in (
        video,
        [video],
        [[video]],
        video[None],
        list(video),
        tuple(video),
        tensor,
        [tensor],
        list(tensor),
        [video.transpose(0, 3, 1, 2)],
        tensor.permute(0, 3, 1, 2),
        [tensor.permute(0, 3, 1, 2)],
        list(tensor.permute(0, 3, 1, 2)),
        images,
        [images],
        [[images]],
        [images[0], video[1], tensor[2]],
    ):
        found = processor()(videos=same, return_tensors="pt")
        assert torch.equal(found["pixel_values_videos"], expected)
        assert found["video_grid_thw"].tolist() == [[2, 4, 4]]


def test_several_videos(natural_frames):
    video, lone = natural_frames(3, 112, 112), natural_frames(1, 56, 112)
    expected = torch.cat([tokenizer("x4").encode(frames)[0] for frames in (video, lone)])
    images = [Image.fromarray(frame) for frame in video]
    for same in (
        [list(video), list(lone)],
        [video, lone],
        [images, [Image.fromarray(lone[0])]],
        [[video], [lone]],
        [[video, lone]],
        [images, lone],
    ):
        found = processor()(videos=same, return_tensors="pt")
        assert found["video_grid_thw"].tolist() == [[2, 4, 4], [1, 2, 4]]
        assert torch.equal(found["pixel_values_videos"], expected)
    assert processor()(videos=lone[0])["video_grid_thw"].tolist() == [[1, 2, 4]], "a lone frame is a video"


def test_frames_of_other_sizes_become_as_large_as_the_first(natural_frames):
    first, second, third = (natural_frames(1, *size)[0] for size in ((100, 170), (112, 168), (300, 90)))
    resized = [
        np.asarray(Image.fromarray(frame).resize((168, 112), Image.Resampling.BICUBIC)) for frame in (first, third)
    ]
    expected, _ = tokenizer("x4").encode([resized[0], second, resized[1]])
    for frames in ([first, second, third], [Image.fromarray(frame) for frame in (first, second, third)]):
        found = processor()(videos=[frames], return_tensors="pt")
        assert found["video_grid_thw"].tolist() == [[2, 4, 6]]
        assert torch.equal(found["pixel_values_videos"], expected)


def test_videos_of_floats_are_resized(natural_frames):
    video = natural_frames(3, 100, 150)
    expected = processor()(videos=video, return_tensors="pt")["pixel_values_videos"]
    for same in (video.astype(np.float32), torch.from_numpy(video).permute(0, 3, 1, 2).float()):
        assert torch.equal(processor()(videos=same, return_tensors="pt")["pixel_values_videos"], expected)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs images or videos, got neither"),
        ({"images": []}, "at least one image, got an empty list: give None"),
        ({"images": [[], []]}, "at least one image, got an empty list"),
        ({"videos": []}, "videos of at least one frame, got an empty list"),
        ({"videos": [[]]}, "videos of at least one frame, got an empty list"),
        (
            {"images": "cat.jpg"},
            "expected PIL, numpy or torch images, or lists of them, got str: open the file first",
        ),
        ({"images": [Path("cat.jpg")]}, "got PosixPath: open the file first"),
        ({"images": b"\x89PNG"}, "got bytes: open the file first"),
        ({"videos": ["video.mp4"]}, "got str: open the file first"),
        ({"images": [None]}, "got NoneType$"),
        ({"images": {"image": 1}}, "got dict$"),
        ({"images": np.zeros(7)}, r"expected an image \[H, W\], .* got \[7\]"),
        ({"images": np.zeros((1, 2, 56, 56, 3))}, r"expected an image .* got \[1, 2, 56, 56, 3\]"),
        ({"videos": np.zeros(7)}, r"expected a video \[T, H, W, C\] .* got \[7\]"),
        ({"images": np.zeros((56, 56, 2))}, r"expected 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\) channels .* \[56, 56, 2\]"),
        ({"images": np.zeros((5, 56, 56))}, r"channels first or last, got \[5, 56, 56\]"),
        (
            {"images": np.zeros((56, 56, 3)), "input_data_format": "channels_first"},
            r"channels, got 56: \[56, 56, 3\] with channels first",
        ),
        ({"images": np.zeros((0, 56, 3), np.uint8)}, r"H and W at least 1, got \[0, 56, 3\]"),
        ({"images": np.zeros((0, 56), np.uint8)}, r"H and W at least 1, got \[0, 56\]"),
        ({"videos": np.zeros((0, 56, 56, 3), np.uint8)}, r"got \[0, 56, 56, 3\]"),
        ({"images": Image.new("RGB", (0, 5))}, "must have at least one pixel, got 5 x 0"),
        ({"images": np.zeros((10, 2010, 3), np.uint8)}, "aspect ratio must be smaller than 200, got 201"),
        ({"images": np.zeros((56, 56, 3), np.complex64)}, "bytes, floats or whole numbers, got complex64"),
        ({"images": np.full((56, 56, 3), 256)}, "expected values 0..255, got int64 from 256 to 256"),
        ({"images": np.full((56, 56, 3), -1, np.int8)}, "expected values 0..255, got int8 from -1 to -1"),
        ({"images": np.full((56, 56, 3), 1000.0)}, r"expected values 0..255, got 1000 to 1000"),
        ({"images": np.full((56, 56, 3), np.nan)}, r"expected values 0..255, got nan to nan"),
        (
            {"images": np.full((56, 56, 3), 99.0), "do_rescale": False},
            "0..1, got 99 to 99: 0..255 needs do_rescale=True",
        ),
        ({"images": np.full((56, 56, 3), -2.1), "do_rescale": False}, "got -2.1 to -2.1: .* undo any normalization"),
        ({"images": Image.new("RGBA", (56, 56)), "do_convert_rgb": False}, "must be RGB or L, got RGBA"),
        ({"images": np.zeros((56, 56)), "return_tensors": "torch"}, "torch is not a valid TensorType, please select"),
        (
            {"images": np.zeros((56, 56)), "input_data_format": "last"},
            "last is not a valid ChannelDimension, please select",
        ),
        ({"images": np.zeros((56, 56)), "size": {"height": 3}}, r"size must hold shortest_edge .* got \{'height': 3\}"),
        ({"images": np.zeros((56, 56)), "min_pixels": 9, "max_pixels": 8}, "min_pixels 9 and max_pixels 8"),
        ({"images": np.zeros((56, 56)), "min_pixels": 10**7}, "min_pixels 10000000 and max_pixels 1003520"),
        ({"images": np.zeros((56, 56)), "max_pixels": 0}, "1 <= min_pixels <= max_pixels, got min_pixels 0"),
        ({"images": np.zeros((56, 56)), "patch_size": 14}, "patch_size is 28 in the token format x4, got 14"),
        (
            {"images": np.zeros((56, 56)), "do_normalize": False},
            "do_normalize is True in the token format x4, got False",
        ),
        (
            {"images": np.zeros((56, 56)), "image_mean": (0.5, 0.5, 0.5)},
            r"image_mean is \[0.48.* got \(0.5, 0.5, 0.5\)",
        ),
    ],
)
def test_errors_say_what_was_given_and_what_is_expected(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        processor()(**arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match=r"DCTImageProcessor has no argument max_pixel$"):
        processor()(images=np.zeros((56, 56)), max_pixel=3)


def test_the_stock_processors_arguments_may_say_what_is_so(natural_frames):
    image = natural_frames(1, 60, 60)[0]
    stock = {"do_normalize": True, "image_mean": CLIP_MEAN, "image_std": list(CLIP_STD), "rescale_factor": 1 / 255}
    layout = {"patch_size": 28, "temporal_patch_size": 2, "merge_size": 2, "data_format": "channels_first"}
    assert torch.equal(image_tokens(image, **stock, **layout), image_tokens(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dct": DCTConfig.select((2, 14, 28), "444")}, "needs square blocks, got 14 x 28 px"),
        ({"patch_size": 14}, "patch_size is 28 in the token format x4, got 14"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .* in the token format x4"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels 5000 and max_pixels 4000"),
        ({"size": {"shortest_edge": 56}}, "size must hold shortest_edge"),
    ],
)
def test_a_processor_that_contradicts_itself_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DCTImageProcessor(**arguments)


def test_floats_that_look_like_0_to_1_are_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr(image_inputs_dct.logger, "warning_once", warnings.append)
    for harmless in (np.zeros((56, 56)), np.full((56, 56), 2.0), np.ones((56, 56), np.uint8)):
        image_tokens(harmless)
    image_tokens(np.full((56, 56), 0.5), do_rescale=False)
    assert not warnings
    image_tokens(np.full((56, 56), 0.5))
    assert warnings == ["Images of values 0..1 are taken as nearly black: for 0..1 give do_rescale=False."]


# Copies, files, other processes


def test_copies_leave_the_matrices_behind(natural_frames):
    image = natural_frames(1, 60, 60)[0]
    own = DCTImageProcessor("x16", max_pixels=50000)
    before = pickle.dumps(own)
    expected = own(images=image, return_tensors="pt")["pixel_values"]
    assert pickle.dumps(own) == before, "using it makes matrices, which are not copied"
    assert len(before) < 200_000
    for twin in (copy.copy(own), copy.deepcopy(own)):
        assert twin.tokenizer is not own.tokenizer and twin.tokenizer is twin.tokenizer
        assert (twin.dct, twin.size) == (own.dct, own.size)
        assert torch.equal(twin(images=image, return_tensors="pt")["pixel_values"], expected)


def test_what_is_saved(tmp_path):
    own = DCTImageProcessor("x4", min_pixels=4000)
    plain = own.to_dict()
    own(images=np.zeros((56, 56)))
    assert own.to_dict() == plain and not any("tokenizer" in name for name in plain)
    assert (plain["min_pixels"], plain["max_pixels"], plain["patch_size"]) == (4000, 1003520, 28)
    own.save_pretrained(tmp_path)
    assert DCTImageProcessor.from_pretrained(tmp_path).to_dict() == {**plain, "auto_map": plain_auto_map()}


def plain_auto_map() -> dict[str, str]:
    kinds = "Image", "Video"  # AutoProcessor asks for the second from transformers 4.52 on
    return {f"Auto{kind}Processor": f"image_processing_dct.DCT{kind}Processor" for kind in kinds}


def test_it_prints_in_one_line():
    assert repr(processor()) == (
        "DCTImageProcessor(dct='x4', block=(2, 28, 28), coefficients=1764, min_pixels=3136, max_pixels=1003520, "
        "do_resize=True, do_rescale=True)"
    )


READ_IN_A_FRESH_PROCESS = """
import sys
import numpy as np
from transformers import AutoImageProcessor, AutoProcessor
folder, image, video, output = sys.argv[1], np.load(sys.argv[2]), np.load(sys.argv[3]), sys.argv[4]
own = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert "dct_tokenizer" not in sys.modules, "the code must come from the folder"
both = AutoProcessor.from_pretrained(folder, trust_remote_code=True, use_fast=False)
text = "<|vision_start|><|image_pad|><|vision_end|>a <|vision_start|><|video_pad|><|vision_end|>b"
found = both(text=[text], images=image, videos=video, return_tensors="np")
np.savez(output, **own(images=image, videos=video), **{f"with_text_{name}": value for name, value in found.items()})
"""


def test_saved_processor_gives_the_same_tokens_in_a_fresh_process(tmp_path, qwen2vl_directory, natural_frames):
    config = replace(DCTConfig.select((4, 20, 20), "420", 777), name="mine")
    own = DCTImageProcessor(config, min_pixels=80 * 80, max_pixels=120 * 120)
    tokenizer = AutoTokenizer.from_pretrained(qwen2vl_directory)
    Qwen2VLProcessor(own, tokenizer).save_pretrained(tmp_path / "saved")
    for module in (
        configuration_dct,
        image_colours_dct,
        image_inputs_dct,
        image_processing_dct,
        image_sizes_dct,
        transform_dct,
    ):
        assert (tmp_path / "saved" / Path(module.__file__).name).read_text() == Path(module.__file__).read_text()
    image, video = natural_frames(1, 200, 300)[0], natural_frames(5, 60, 60)
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "video.npy", video)
    arguments = [tmp_path / name for name in ("saved", "image.npy", "video.npy", "found.npz")]
    command = [sys.executable, "-W", "ignore", "-c", READ_IN_A_FRESH_PROCESS, *map(str, arguments)]
    subprocess.run(command, check=True, cwd=tmp_path)
    found, expected = np.load(tmp_path / "found.npz"), own(images=image, videos=video)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(found[f"with_text_{name}"], value)
    # 200 x 300 px within 14,400 px: 80 x 120; 60 x 60 px to 80 x 80; a token of the language model covers 40 x 40 px
    ids = found["with_text_input_ids"][0].tolist()
    pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    assert [ids.count(pad) for pad in pads] == [2 * 3, 2 * 2 * 2]
    again = AutoImageProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert (again.dct_config.to_dict(), again.min_pixels, again.max_pixels) == (config.to_dict(), 6400, 14400)


def test_processor_works_inside_qwen2vl_processor(qwen2vl_directory, natural_frames):
    image_pad, video_pad = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    both = Qwen2VLProcessor(DCTImageProcessor("x4"), AutoTokenizer.from_pretrained(qwen2vl_directory))
    images = [natural_frames(1, 112, 168)[0], natural_frames(1, 56, 56)[0]]
    text = [f"{image_pad}a {video_pad}b", f"{image_pad}c"]
    video = list(natural_frames(4, 112, 112))
    output = both(text=text, images=images, videos=[video], padding=True, return_tensors="pt")
    pads = both.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    # a token of the language model covers 56 x 56 px of two frames
    assert [(row == pads[0]).sum().item() for row in output["input_ids"]] == [2 * 3, 1]
    assert [(row == pads[1]).sum().item() for row in output["input_ids"]] == [2 * 2 * 2, 0]
    assert output["pixel_values"].shape == (4 * 6 + 2 * 2, 1764)
    assert output["pixel_values_videos"].shape == (2 * 4 * 4, 1764)
    bounded = both(text=f"{image_pad}a", images=images[0], max_pixels=56 * 56, return_tensors="pt")
    assert bounded["image_grid_thw"].tolist() == [[1, 2, 2]]


# Other devices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_are_made_where_the_images_are(natural_frames):
    video = natural_frames(3, 112, 168)
    own = DCTImageProcessor("x4")
    expected = own(videos=video, return_tensors="pt")["pixel_values_videos"]
    tensor = torch.from_numpy(video).cuda()
    for same in (tensor, list(tensor), tensor.permute(0, 3, 1, 2), tensor.float(), tensor.long()):
        found = own(videos=same, return_tensors="pt")
        assert found["pixel_values_videos"].device.type == "cuda" and found["video_grid_thw"].tolist() == [[2, 4, 6]]
        torch.testing.assert_close(found["pixel_values_videos"].cpu(), expected, rtol=0, atol=2e-3)
        assert isinstance(own(videos=same)["pixel_values_videos"], np.ndarray)
    asked = own(videos=video, device="cuda", return_tensors="pt")["pixel_values_videos"]
    assert asked.device.type == "cuda"
    torch.testing.assert_close(asked.cpu(), expected, rtol=0, atol=2e-3)
    for image in (video[0], video[0, :100, :90], video[0, ..., 0], np.dstack([video[0], video[1, ..., :1]])):
        found = own(images=torch.from_numpy(image.copy()).cuda(), return_tensors="pt")["pixel_values"]
        assert found.device.type == "cuda"
        torch.testing.assert_close(
            found.cpu(), own(images=image, return_tensors="pt")["pixel_values"], rtol=0, atol=2e-3
        )
