"""Samples of the training benchmark: of the shapes of videos and of a mix of images, in the layout of the loader.

Ids and tokens are random. `training.py` says what the works are.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.speed.scenes import WORKS as SCENES
from benchmarks.speed.scenes import kept_in

TEXT_TOKENS, LEARNED_SHARE = 256, 0.5
PAGE_TEXT = 128  # tokens
IMAGES = ((448, 448), (336, 448), (448, 672), (672, 896), (896, 672), (896, 896))  # height, width of the mix
PIXEL_BLOCK, PIXEL_WIDTH = (2, 14, 14), 3 * 2 * 14 * 14  # frames, height, width of a pixel patch; its floats
IMAGE_ID, VIDEO_ID = 151655, 151656
FP8_TOKENS = 128  # tokens of a sequence are a multiple of it for all recipes


@dataclass(frozen=True)
class Work:
    """A sample before a token format is chosen. frames 0: text only. scene: what is drawn, for skipping."""

    frames: int
    height: int
    width: int
    text: int
    learned: int
    scene: str = ""


def make_work(name: str, count: int, seed: int) -> list[Work]:
    if name == "videos":
        return [Work(16, 448, 448, TEXT_TOKENS, int(TEXT_TOKENS * LEARNED_SHARE))] * count
    if name in SCENES:
        frames, height, width, text = (1, 1120, 784, PAGE_TEXT) if name == "pages" else (60, 448, 672, TEXT_TOKENS)
        scenes = [SCENES[name][number % len(SCENES[name])] for number in range(count)]
        return [Work(frames, height, width, text, int(text * LEARNED_SHARE), scene) for scene in scenes]
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        height, width = IMAGES[rng.integers(len(IMAGES))]
        text = int(np.clip(rng.lognormal(5.2, 0.7), 24, 1500))
        made.append(Work(0 if rng.random() < 0.1 else 1, height, width, text, max(1, int(text * LEARNED_SHARE))))
    return made


def grid_of(work: Work, block: tuple[int, int, int]) -> tuple[int, int, int]:
    """(t, h, w) of an image or video whose sides are multiples of the block and of the merge of two."""
    frames, height, width = block
    sides = [max(2, round(side / step / 2) * 2) for side, step in ((work.height, height), (work.width, width))]
    return (max(1, work.frames // frames), *sides)


LANGUAGE = {
    "2b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
           "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
           "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip


def real_config(width: int | None = None, size: str = "2b"):
    """Configuration of Qwen2-VL-2B-Instruct or 7B-Instruct; for DCT tokens of `width` floats, or for pixels."""
    from transformers import Qwen2VLConfig

    patch = {"in_channels": 3, "patch_size": 14, "temporal_patch_size": 2}
    if width:
        patch = {"in_channels": width, "patch_size": 1, "temporal_patch_size": 1}
    language = LANGUAGE[size]
    return Qwen2VLConfig(
        **language,
        num_hidden_layers=28,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": language["hidden_size"],
            "num_heads": 16,
            "mlp_ratio": 4,
            **patch,
        },
    )


def make_samples(
    works: list[Work], block: tuple[int, int, int], width: int, seed: int, preset: str = "", skip_db: float = 0.0
) -> list:
    """EncodedSamples with random ids and tokens. skip_db: dB, of the cells that have tokens of this preset; 0: all."""
    from dct_qwen2vl.data.positions import KeptRun, mrope_positions
    from dct_qwen2vl.data.samples import IGNORE_INDEX, EncodedSample

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, work in enumerate(works):
        grid = grid_of(work, block) if work.frames else None
        cells = (grid[0], grid[1] // 2, grid[2] // 2) if grid else (0, 0, 0)
        kept = kept_in(work.scene, preset, skip_db) if skip_db and work.scene else np.ones(cells, bool)
        visual = int(kept.sum())
        kind = VIDEO_ID if work.frames > 1 else IMAGE_ID
        before = work.text - work.learned
        text = torch.randint(0, 150000, (work.text,), generator=generator)
        ids = torch.cat([text[: before // 2], torch.full((visual,), kind), text[before // 2 :]])
        labels = ids.clone()
        labels[: len(ids) - work.learned] = IGNORE_INDEX
        merged = [KeptRun(cells, kept) if skip_db else cells] if grid else []
        positions = mrope_positions([before // 2, *merged, work.text - before // 2])
        tokens = torch.randn(4 * visual, width, generator=generator)
        grids = torch.tensor([grid] if grid else [], dtype=torch.int64).reshape(-1, 3)
        none = torch.zeros(0, 3, dtype=torch.int64)
        video = work.frames > 1
        mask, empty = torch.from_numpy(kept.ravel()), torch.ones(0, dtype=torch.bool)
        masks = {"image_kept": empty if video else mask, "video_kept": mask if video else empty}
        samples.append(
            EncodedSample(
                __key__=str(number), __restore_key__=(), __subflavor__=None, __subflavors__={},
                input_ids=ids, labels=labels, position_ids=torch.from_numpy(positions),
                pixel_values=tokens[:0] if video else tokens, image_grid_thw=none if video else grids,
                pixel_values_videos=tokens if video else tokens[:0], video_grid_thw=grids if video else none,
                **(masks if skip_db else {}),
            )
        )  # fmt: skip
    return samples


def size_of(sample) -> tuple[int, int]:
    """Tokens of a sample, vision tokens of its media."""
    return len(sample.input_ids), len(sample.pixel_values) + len(sample.pixel_values_videos)


def sequences_of(
    name: str, works: list[Work], budget: tuple[int, int], seed: int, skip_db: float = 0.0, size: str = "2b"
) -> tuple:
    """The configuration of a model of this token format, and the samples as packed sequences, in pinned memory if there
    is a GPU. skip_db: dB, 0 for all cells. size: key of LANGUAGE."""
    from dct_qwen2vl.data.packing import fit_sequences, pack
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

    config = None if name == "none" else DCTConfig.preset(name)
    block, width = (config.block, config.num_coefficients) if config else (PIXEL_BLOCK, PIXEL_WIDTH)
    samples = make_samples(works, block, width, seed, name, skip_db)
    sequences = fit_sequences([size_of(sample) for sample in samples], budget)
    sequences.sort(key=lambda chosen: -sum(len(samples[n].input_ids) for n in chosen))
    # The rest comes last: at first the host is not ahead, and a short sequence ends before the next is launched.
    ids = (IMAGE_ID, VIDEO_ID)
    packed = [pack([samples[n] for n in chosen], 2, width, torch.bfloat16, ids) for chosen in sequences]
    if torch.cuda.is_available():
        packed = [batch.pin_memory() for batch in packed]
    return real_config(width if config else None, size), packed


def pad(batch, multiple: int = FP8_TOKENS):
    """A packed sequence whose tokens are a multiple of this; those that are added are a sample without losses."""
    missing = -len(batch.input_ids) % multiple
    if not missing:
        return batch
    ends = torch.tensor([len(batch.input_ids) + missing], dtype=torch.int32)
    return replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, missing)),
        position_ids=torch.nn.functional.pad(batch.position_ids, (0, missing)),
        sample_starts=torch.cat([batch.sample_starts, ends]),
        longest_sample=max(batch.longest_sample, missing),
    )
