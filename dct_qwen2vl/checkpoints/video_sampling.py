"""How a model's videos are sampled, saved beside it in video_preprocessor_config.json.

transformers reads that file from 4.52 on, and so do servers. Evaluation takes from it what training sampled.
Its fields are those of `VideoSampling`: fps, min_frames, max_frames and total_pixels. transformers knows the
first three; total_pixels bounds a whole video.
"""

from pathlib import Path
from typing import Any

from dct_qwen2vl.checkpoints.inspection import PROCESSOR, VIDEO_PROCESSOR, CheckpointError, read_json
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.video_sampling import VideoSampling

# Those of training where nothing says others, which are Qwen2-VL's.
DEFAULT_SAMPLING = vars(VideoSampling())
KEPT = (*DEFAULT_SAMPLING, "do_sample_frames", "num_frames")  # of a video processor: the image processor has the rest


def saved_sampling(model_dir: Path) -> dict[str, Any]:
    """The fields of `VideoSampling` that a model's files say; {} where they say none. Raises CheckpointError."""
    path = model_dir / VIDEO_PROCESSOR
    saved = read_json(path) if path.is_file() else {}
    found = {name: saved[name] for name in DEFAULT_SAMPLING if saved.get(name) is not None}
    for name, value in found.items():
        whole = name == "fps" or value == int(value) if isinstance(value, int | float) else False
        if isinstance(value, bool) or not whole or not 0 < value < float("inf"):
            raise CheckpointError(f"{path} has {name} {value!r}, which is no number over 0: correct it or remove it")
    return {name: value if name == "fps" else int(value) for name, value in found.items()}


def video_processor(images: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """video_preprocessor_config.json that goes with an image processor.

    images: preprocessor_config.json, of pixels or of DCT tokens.
    saved: video_preprocessor_config.json as it was, {} where there was none. Only its sampling is kept.
    """
    sampling = {name: saved[name] for name in KEPT if saved.get(name) is not None}
    settings = {name: value for name, value in images.items() if name != "image_processor_type"}
    if "dct" in images:  # its own processor is named in its auto_map
        return {**settings, "video_processor_type": "DCTVideoProcessor", **sampling}
    return {**settings, "video_processor_type": "Qwen2VLVideoProcessor", **DEFAULT_SAMPLING, **sampling}


def write_sampling(folder: Path, sampling: dict[str, Any] | None = None) -> None:
    """Writes the settings of a Hugging Face directory's image processor for its video processor, too.

    folder: Hugging Face directory.
    sampling: Fields of `VideoSampling`. None: those that the directory has. Without any, no file is written.
    """
    path = folder / VIDEO_PROCESSOR
    if not (folder / PROCESSOR).is_file() or (sampling is None and not path.is_file()):
        return
    saved = read_json(path) if path.is_file() else {}
    write_json(path, video_processor(read_json(folder / PROCESSOR), {**saved, **(sampling or {})}))
