"""One version of transformers answers: are the logits of checkpoints those of the reference?

    PYTHONPATH=.compat/5.24.0 python benchmarks/compat/forward.py REFERENCE.safetensors CHECKPOINT...

It imports nothing of this repository: a server has the checkpoint's folder and stock classes, nothing else.
For each checkpoint it prints one line, a JSON object: the case's name -> the largest difference of logits, relative to
the largest logit. Where the checkpoint cannot be used, that is {"error": the last line of the error}.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor


def read_case(tensors, name: str) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """What the processor is given, and the reference's input_ids [1, L] and logits [L, V]."""
    told = json.loads(tensors.metadata()[name])
    given = {"text": [told["text"]]}
    for kind in ("images", "videos"):
        if told[kind]:
            given[kind] = [tensors.get_tensor(f"{name}.{kind}.{i}").numpy() for i in range(told[kind])]
    return given, tensors.get_tensor(f"{name}.input_ids"), tensors.get_tensor(f"{name}.logits")


def difference(processor, model, given: dict, input_ids: torch.Tensor, logits: torch.Tensor) -> float:
    """Largest absolute difference of logits over the largest logit. Infinite where input_ids or logits are no match."""
    inputs = processor(**given, return_tensors="pt")
    if not torch.equal(inputs["input_ids"], input_ids):
        return float("inf")
    with torch.inference_mode():
        found = model(**inputs).logits[0]
    relative = ((found - logits).abs().max() / logits.abs().max()).item()
    return relative if relative == relative else float("inf")


def compare(checkpoint: Path, reference: Path) -> dict[str, float]:
    """Every case of the reference. `trust_remote_code` is for the processor that lies beside the coefficient form."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=any(checkpoint.glob("*.py")))
    with safe_open(reference, "pt") as tensors:
        return {name: difference(processor, model, *read_case(tensors, name)) for name in tensors.metadata()}


def answer(checkpoint: Path, reference: Path) -> dict:
    """What is printed of one checkpoint."""
    try:
        return compare(checkpoint, reference)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".strip().splitlines()[-1]}


def main(reference: str, *checkpoints: str) -> int:
    torch.set_num_threads(1)  # the last digits of a product depend on the number
    for checkpoint in checkpoints:
        print(json.dumps(answer(Path(checkpoint), Path(reference))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
