"""Do checkpoints give the same logits in other versions of transformers? `make compat` runs it.

    python -m benchmarks.compat.compare_versions                # the versions below, which are installed if need be
    python -m benchmarks.compat.compare_versions 4.52.4 5.20.2  # these

A tiny coefficient model with perturbed columns, as if trained, and its stock form are made here. The reference is this
environment's own: the coefficient form, read by this repository's processor. Each version then answers in a process of
its own, which has transformers and the checkpoint alone (forward.py). Each is installed into .compat/VERSION without
its dependencies: two packages must follow it, all others are this environment's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dct_qwen2vl.common.scripts import UserError, run_main

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / ".compat"
FORWARD = Path(__file__).with_name("forward.py")
OWN = "4.51.3"
# transformers -> what must follow it. 5.24 needs Python 3.11.
PINS = {
    "4.52.4": ("huggingface_hub==0.36.2", "tokenizers==0.21.4"),
    "4.57.6": ("huggingface_hub==0.36.2", "tokenizers==0.22.2"),
    "5.0.0": ("huggingface_hub==1.33.0", "tokenizers==0.22.2"),
    "5.20.2": ("huggingface_hub==1.33.0", "tokenizers==0.23.3"),
    "5.24.0": ("huggingface_hub==1.33.0", "tokenizers==0.23.3"),
}
NEWEST = "5.24.0" if sys.version_info >= (3, 11) else "5.20.2"
DEFAULT = (OWN, "4.57.6", NEWEST)
AT_ONCE = 2  # processes of one thread each
MOST = 1e-5  # relative difference of logits in float32
MOST_RESIZED = 1e-2  # stock processors resize by Pillow up to 4.51 and by torchvision later; pixels differ by one level
TEXTS = ["user\nWhat colour is the circle?", "assistant\nThe circle is red.", "You are a helpful assistant."] * 8
CASES = {  # images and videos of a conversation, in pixels; all but those of "resized" are multiples of 56
    "text": ((), ()),
    "image": (((112, 168, 3),), ()),
    "several images": (((112, 168, 3), (224, 56, 3)), ()),
    "video": ((), ((5, 112, 168, 3),)),
    "image and video": (((112, 112, 3),), ((4, 56, 112, 3),)),
    "resized": (((150, 190, 3),), ((4, 100, 131, 3),)),
}


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """The coefficient form and the stock form of one tiny model, by the repository's own commands."""
    import torch
    from safetensors.torch import load_file, save_file

    import convert_checkpoint
    from dct_qwen2vl.checkpoints.hf_folder import write_processor_settings
    from dct_qwen2vl.checkpoints.video_sampling import write_sampling
    from dct_qwen2vl.toy.model import write_checkpoint

    forms = {"stock": folder / "stock", "coefficients": folder / "coefficients"}
    write_checkpoint(TEXTS, folder / "pixels", seed=3)
    convert_checkpoint.main(["--model-dir", str(folder / "pixels"), "--output-dir", str(forms["coefficients"])])
    path = forms["coefficients"] / "model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("patch_embed.proj.weight"))
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    weights[name] = weights[name] + 0.02 * noise
    save_file(weights, path, metadata={"format": "pt"})
    write_sampling(forms["coefficients"], {"fps": 1.0, "min_frames": 2, "max_frames": 16, "total_pixels": 10**6})
    skipping = {"skip_db": 38.0, "skip_noise_floor": True, "skip_share": 0.5}  # recorded, which no version minds
    write_processor_settings(forms["coefficients"], skipping)
    told = ["--to", "stock", "--model-dir", str(forms["coefficients"]), "--output-dir", str(forms["stock"])]
    if convert_checkpoint.main(told):
        raise UserError("the stock form could not be written, see above")
    return forms


def write_reference(checkpoint: Path, path: Path) -> None:
    """Random images and videos, and this environment's input_ids and logits for them."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor

    torch.set_num_threads(1)
    processor = Qwen2VLProcessor(
        DCTImageProcessor.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    random = np.random.default_rng(0)
    tensors, told = {}, {}
    for name, (images, videos) in CASES.items():
        media = {
            "images": [random.integers(0, 256, shape, dtype=np.uint8) for shape in images],
            "videos": [random.integers(0, 256, shape, dtype=np.uint8) for shape in videos],
        }
        marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
        marks += "<|vision_start|><|video_pad|><|vision_end|>" * len(videos)
        text = f"<|im_start|>user\n{marks}What colour is the circle?<|im_end|>\n<|im_start|>assistant\n"
        given = {kind: arrays for kind, arrays in media.items() if arrays}
        inputs = processor(text=[text], **given, return_tensors="pt")
        with torch.inference_mode():
            tensors[f"{name}.logits"] = model(**inputs).logits[0]
        tensors[f"{name}.input_ids"] = inputs["input_ids"]
        for kind, arrays in media.items():
            tensors.update({f"{name}.{kind}.{i}": torch.from_numpy(array) for i, array in enumerate(arrays)})
        told[name] = json.dumps({"text": text, **{kind: len(arrays) for kind, arrays in media.items()}})
    save_file(tensors, path, metadata=told)


def install(version: str) -> Path | None:
    """The folder that holds a version, made if it is not there; None for the environment's own. Raises UserError."""
    if version == OWN:
        return None
    folder = FOLDER / version
    if folder.is_dir():
        return folder
    pip = FOLDER / "pip" / "bin" / "python"
    if not pip.is_file():  # .venv need not hold pip
        _run([sys.executable, "-m", "venv", "--clear", str(FOLDER / "pip")], version)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{version}-", dir=FOLDER))
    wanted = [f"transformers=={version}", *PINS[version]]
    target = ["--no-deps", "--no-compile", "--disable-pip-version-check", "--target", str(unfinished)]
    _run([str(pip), "-m", "pip", "install", "--quiet", *target, *wanted], version)
    unfinished.rename(folder)
    return folder


def _run(command: list[str], version: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        line = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"transformers {version} could not be installed ({line}): give pip a package index that has it")


def answers(folder: Path | None, checkpoints: Iterable[Path], reference: Path) -> list[dict]:
    """What forward.py prints of each checkpoint with the version in `folder`. Raises UserError where it prints less."""
    checkpoints = list(checkpoints)
    with tempfile.TemporaryDirectory() as modules:
        path = {} if folder is None else {"PYTHONPATH": str(folder)}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ran = subprocess.run(
            [sys.executable, str(FORWARD), str(reference), *map(str, checkpoints)],
            env={**environment, **offline, **path},
            capture_output=True,
            text=True,
        )
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or len(lines) < len(checkpoints):
        raise UserError(f"{FORWARD.name} failed with {folder or OWN}: {ran.stderr.strip().splitlines()[-1:]}")
    return [json.loads(line) for line in lines[-len(checkpoints) :]]


def verdict(found: dict, form: str) -> str:
    """ "equal", "refused" (one line that names the stock form, for coefficients alone) or "WRONG"."""
    if "error" in found:
        return "refused" if form == "coefficients" and "--to stock" in found["error"] else "WRONG"
    limits = {name: MOST_RESIZED if name == "resized" else MOST for name in CASES}
    equal = found.keys() == limits.keys() and all(found[name] <= limits[name] for name in limits)
    return "equal" if equal else "WRONG"


def line_of(version: str, form: str, found: dict) -> str:
    """A row of the table."""
    numbers = (
        found["error"] if "error" in found else " | ".join(f"{found.get(name, float('nan')):.1e}" for name in CASES)
    )
    return f"{version} | {form} | {numbers} | {verdict(found, form)}"


def compare(versions: list[str]) -> int:
    """Prints the table. Returns 1 if anything is wrong."""
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(AT_ONCE) as pool:
        folders = pool.submit(lambda: [install(version) for version in versions])  # while the checkpoints are made
        forms, reference = make_checkpoints(Path(temporary)), Path(temporary) / "reference.safetensors"
        write_reference(forms["coefficients"], reference)
        results = pool.map(lambda folder: answers(folder, forms.values(), reference), folders.result())
        print("transformers | form | " + " | ".join(CASES) + " | verdict", flush=True)
        for version, found in zip(versions, results, strict=True):
            for form, of_form in zip(forms, found, strict=True):
                print(line_of(version, form, of_form), flush=True)
                wrong += verdict(of_form, form) == "WRONG"
    return int(wrong > 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    known = (OWN, *PINS)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(known)}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.versions) - set(known):
        parser.error(
            f"no pins for transformers {', '.join(sorted(unknown))}; add them to PINS in {Path(__file__).name}"
        )
    versions = arguments.versions or list(DEFAULT)
    return run_main("compare_versions.py", lambda: compare(versions), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
