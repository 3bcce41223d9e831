"""The model that a run leaves behind, and --export of a checkpoint, in its two forms.

PARENT/hf_dct   the form that was trained, over DCT coefficients
PARENT/hf       its stock form; of a pixel model, what was trained
"""

from pathlib import Path

from dct_qwen2vl.checkpoints.inspection import note_on_skipping
from dct_qwen2vl.training.config import ModelInfo


def trained_folder(parent: Path, info: ModelInfo) -> Path:
    """The folder of the form that was trained.

    parent: The folder of both forms.
    info: The checkpoint's token format.
    """
    return parent / ("hf_dct" if info.dct else "hf")


def write_stock_form(info: ModelInfo, parent: Path, complete: bool = True) -> None:
    """Writes parent/hf from the coefficient form in parent/hf_dct. A pixel model has no other form.

    info: The checkpoint's token format.
    parent: The folder of both forms.
    complete: Whether all weights are there.
    """
    from dct_qwen2vl.checkpoints.stock_form import to_stock

    if info.dct:
        to_stock(trained_folder(parent, info), parent / "hf", force=True, complete=complete)


def tell_where(what: str, parent: Path, info: ModelInfo) -> None:
    """Prints where a model is, and what its stock form does not do.

    what: What it is called.
    parent: The folder of both forms.
    info: The checkpoint's token format.
    """
    further = f", in the stock form; to train it further: {parent / 'hf_dct'}" if info.dct else ""
    print(f"Done: {what} is in {parent / 'hf'}{further}", flush=True)
    if info.dct and (note := note_on_skipping(parent / "hf_dct")):
        print(f"Note: {note}", flush=True)
