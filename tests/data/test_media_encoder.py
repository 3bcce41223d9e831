"""Media -> tokens: sizes by the bounds and the budget, grids known in advance, the same in training and evaluation."""

import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import rotated_exif
from PIL import Image
from pipeline import run
from samples_by_hand import answer, conversation_sample
from transformers import AutoTokenizer, Qwen2VLImageProcessor

from dct_qwen2vl.data.images import decode_image
from dct_qwen2vl.data.media import BadSample, media_shape
from dct_qwen2vl.data.media_encoder import MediaEncoder, PixelFit
from dct_qwen2vl.data.reading import counted_frames
from dct_qwen2vl.data.videos import VideoSampling, YUVFrames
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from task_encoder import QwenTaskEncoder

SMALL_BUDGET = VideoSampling(total_pixels=4 * 56 * 56)


@pytest.fixture(scope="module", params=["pixels", "exact", "x4"])
def processor(request, qwen2vl_directory):
    if request.param == "pixels":
        return Qwen2VLImageProcessor.from_pretrained(qwen2vl_directory, min_pixels=56 * 56, max_pixels=224 * 224)
    return DCTImageProcessor(request.param, min_pixels=56 * 56, max_pixels=224 * 224)


@pytest.fixture(scope="module")
def tokenizer(qwen2vl_directory):
    return AutoTokenizer.from_pretrained(qwen2vl_directory)


def test_an_image_has_no_share_in_the_budget_of_videos(tokenizer, processor, image_file, natural_frames):
    data = image_file(natural_frames(1, 168, 168)[0], "PNG")
    sample = conversation_sample(answer("What?", "red"), ("image", data))
    encoder = QwenTaskEncoder(tokenizer, processor, video_sampling=SMALL_BUDGET)
    encoded = encoder.encode(sample)
    side = 168 // processor.patch_size
    assert encoded.image_grid_thw.tolist() == [[1, side, side]]
    assert encoder.measure(sample) == (len(encoded.input_ids), side * side)


def test_sizes_by_hand():
    fit = PixelFit(56, 56 * 56, 1344 * 1344, VideoSampling(total_pixels=200_000))
    assert fit(1344, 1344, 1) == (1344, 1344)  # an image
    assert counted_frames(1) == 2
    assert fit(1344, 1344, counted_frames(1)) == (392, 392)  # a lone frame of a video: 7 x 7 squares of 56 x 56
    assert fit(1344, 1344, 4) == (280, 280)


@given(
    size=st.tuples(st.integers(28, 3000), st.integers(28, 3000)),
    factor=st.sampled_from([28, 56, 112]),
    low=st.integers(1, 10**6),
    more=st.integers(0, 10**6),
    frames=st.sampled_from([1, 2, 6, 192, 768]),
    total=st.integers(1, 10**8),
)
@settings(max_examples=300, deadline=None)
def test_what_was_read_at_its_size_keeps_it(size, factor, low, more, frames, total):
    fit = PixelFit(factor, low, low + more, VideoSampling(total_pixels=total))
    try:
        target = fit(*size, frames)
    except BadSample:
        return
    assert fit(*target, frames) == target


def parts(image_file, video_file, natural_frames) -> list[tuple[str, object]]:
    """Images and videos in all the forms in which they may come, most of them over the bounds or the budget."""
    turned = Image.fromarray(natural_frames(1, 100, 400)[0])
    files = [image_file(turned, "JPEG", exif=rotated_exif(6)), image_file(natural_frames(1, 500, 740)[0], "PNG")]
    found = [("image", data) for data in files]
    found += [("image", Image.open(io.BytesIO(data))) for data in files]
    found.append(("image", torch.rand(3, 500, 300)))
    found += [("video", video_file(natural_frames(count, 168, 300), rate=2)) for count in (1, 2, 5, 8)]
    for count in (1, 6):
        frames = torch.from_numpy(natural_frames(count, 168, 300)).permute(0, 3, 1, 2)
        found.append(("video", SimpleNamespace(frames=frames, info={"video_fps": 2.0})))
    return found


@pytest.mark.parametrize("total_pixels", [10**9, 6 * 112 * 112, 4 * 56 * 56, 1])
def test_grids_are_known_before_media_are_decoded(processor, image_file, video_file, natural_frames, total_pixels):
    media = MediaEncoder(processor, VideoSampling(total_pixels=total_pixels))
    for kind, content in parts(image_file, video_file, natural_frames):
        tokens, grid = media.encode(kind, media.read(kind, content))
        assert media.expected_grid(kind, content) == grid
        assert len(tokens) == np.prod(grid)
        if kind == "video":
            low, area = 56 * 56, np.prod(grid[1:]) * processor.patch_size**2
            assert area <= max(total_pixels / grid[0], 1.05 * low)


def test_a_pil_image_is_read_as_its_file(image_file, natural_frames):
    image = Image.fromarray(natural_frames(1, 100, 400)[0])
    data = image_file(image, "PNG", exif=rotated_exif(6))
    media = MediaEncoder(DCTImageProcessor("x4", max_pixels=112 * 112))
    opened = Image.open(io.BytesIO(data))
    assert media_shape("image", opened, VideoSampling()) == (400, 100, 1)
    np.testing.assert_array_equal(media.read("image", opened), decode_image(data, media.fit))


def test_planes_are_read_where_tokens_hold_no_more_colour(processor, video_file, natural_frames):
    media = MediaEncoder(processor)
    frames = media.read("video", video_file(natural_frames(4, 112, 112)))
    fits = isinstance(processor, DCTImageProcessor) and processor.dct_config.chroma == "420"
    assert media.reads_planes == fits == isinstance(frames, YUVFrames)
    expected = 4 * 112 * 112 * 3 // (2 if fits else 1)
    assert frames.nbytes == expected


def test_kept_tokens_stay_when_the_memory_of_the_others_is_used_again(video_file, natural_frames):
    """Also that of a longer video, and of one that is shorter again."""
    media = MediaEncoder(DCTImageProcessor("x4", skip_db=30.0))
    still = [natural_frames(1, 112, 168, seed).repeat(count, axis=0) for count, seed in ((4, 1), (8, 2), (6, 3))]
    files = [video_file(frames, rate=2) for frames in still]
    frames = [media.read("video", data) for data in files]
    found = [media.encode_kept("video", each) for each in frames]
    for each, ((kind, tokens, grid), kept) in zip(frames, found):
        (expected,), (mask,) = media.skip([("video", *media.encode("video", each))])
        assert (kind, grid) == (expected[0], expected[2]) and torch.equal(kept, mask)
        assert torch.equal(tokens, expected[1]) and len(tokens) < np.prod(grid)
    assert len({tokens.untyped_storage().data_ptr() for (_, tokens, _), _ in found}) == 3


def test_an_image_has_no_shared_memory(natural_frames):
    media = MediaEncoder(DCTImageProcessor("x4", skip_db=30.0))
    (_, tokens, grid), kept = media.encode_kept("image", natural_frames(1, 112, 168)[0])
    assert torch.equal(tokens, media.encode("image", natural_frames(1, 112, 168)[0])[0][kept.repeat_interleave(4)])
    assert grid == (1, 4, 6) and not len(media._memory)


ENCODE_ON_ONE_THREAD = """
import sys, time
from pathlib import Path
import torch
from dct_qwen2vl.data.media_encoder import MediaEncoder
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor

torch.set_num_threads(1)
media = MediaEncoder(DCTImageProcessor("x4", skip_db=38.0))
files = {Path(name).suffix[1:]: Path(name).read_bytes() for name in sys.argv[1:]}
for measured in (False, True):  # what is made once may take threads
    time.sleep(0.3)  # until these are asleep
    begin = time.process_time(), time.thread_time()
    for _ in range(10):
        for kind, data in files.items():
            media.encode_kept(kind, media.read(kind, data, threads=1))
everything, own = time.process_time() - begin[0], time.thread_time() - begin[1]
print(own, everything - own)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="NumPy's BLAS has one thread for each core")
def test_encoding_on_one_thread_wakes_no_other(tmp_path, image_file, video_file, natural_frames):
    """NumPy's BLAS has a thread for each core. Once woken, they wait actively, which takes the cores of other loader
    processes."""
    (tmp_path / "one.image").write_bytes(image_file(natural_frames(1, 224, 224)[0], "JPEG"))
    (tmp_path / "one.video").write_bytes(video_file(natural_frames(8, 224, 224), rate=2))
    files = [str(tmp_path / name) for name in ("one.image", "one.video")]
    done = run([sys.executable, "-c", ENCODE_ON_ONE_THREAD, *files], check=False, OPENBLAS_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr
    own, others = map(float, done.stdout.split())
    assert others < 0.1 * own
