"""A checkpoint of any tool, as transformers 4.51 reads it: checked in full before anything is made of it."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dct_qwen2vl.checkpoints import inspection
from dct_qwen2vl.checkpoints.inspection import (
    CheckpointError,
    check_tokenizer,
    read_json,
)
from dct_qwen2vl.checkpoints.normalising import (
    normal_config,
    normalise_json,
    normalise_processor,
    normalise_tokenizer,
)
from dct_qwen2vl.checkpoints.weights import (
    EMBEDDING,
    HEAD,
    Stored,
    check_no_pointers,
    check_trainable,
    quantisation,
    read_headers,
    source_files,
    with_model_names,
)
from dct_qwen2vl.common.files import write_json

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp")
STATE_OF_TRAINING = ("trainer_state.json", "zero_to_fp32.py", "latest", "adapter_config.json", "quantize_config.json")


@dataclass(frozen=True)
class Source:
    """A checked checkpoint.

    model_dir: as the user gave it.
    folder: its small files as transformers reads them; gone when the block of `opened` ends.
    tensors: where they lie, by the names that the model has for them.
    notes: lines, one for each thing that was normalised.
    """

    model_dir: Path
    folder: Path
    tensors: dict[str, Stored]
    notes: tuple[str, ...]


@contextlib.contextmanager
def opened(model_dir: Path, complete: bool = True) -> Iterator[Source]:
    """Reads and checks a checkpoint. Its small files are kept in a temporary folder until the block ends.

    model_dir: Hugging Face directory.
    complete: Whether every weight of the model must be there.

    Raises CheckpointError, also for errors in the block. The message names `model_dir` in place of the temporary
    folder.
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        folder = Path(name)
        try:
            yield read_source(model_dir, folder, complete)
        except CheckpointError as error:
            if name not in str(error):
                raise
            raise CheckpointError(str(error).replace(name, str(model_dir))) from error


def read_source(model_dir: Path, folder: Path, complete: bool = True) -> Source:
    """Reads and checks a checkpoint.

    model_dir: Hugging Face directory.
    folder: Empty. Gets the small files.
    complete: Whether every weight of the model must be there.

    Raises CheckpointError.
    """
    if not model_dir.is_dir():
        inspection.read_config(model_dir)  # says so
    check_no_pointers(model_dir)
    method = quantisation(inspection.read_config(model_dir))
    files, notes = source_files(model_dir)
    stored = read_headers(files)
    check_trainable(model_dir, stored, method)
    tensors, renamed = with_model_names(model_dir, stored)
    copy_small_files(model_dir, folder)
    notes += [*normalise_json(folder), *renamed, *normalise_processor(folder), *normalise_tokenizer(folder)]
    check_tokenizer(folder)
    from dct_qwen2vl.checkpoints import loading

    before = read_json(folder / "config.json")
    config, changes = normal_config(before, tensors, loading.token_ids(folder))
    if config != before:
        write_json(folder / "config.json", config)
    notes += [*changes, *loading.complete_tokenizer(folder), *loading.give_template(folder)]
    notes += loading.mend_generation(folder, loading.load_config(folder).vocab_size)
    try:
        if complete:
            loading.check_loads(folder, tensors)
    except CheckpointError as error:
        if method is None:
            raise
        raise CheckpointError(
            f"{error} (config.json says that it is quantised by {method}, which is not read)"
        ) from error
    if config.get("tie_word_embeddings") and EMBEDDING in tensors:
        tensors.pop(HEAD, None)  # the same numbers, by check_loads
    return Source(model_dir, folder, tensors, tuple(notes))


def copy_small_files(model_dir: Path, folder: Path) -> None:
    """Everything but weights and what a training run needs to go on."""
    for path in sorted(model_dir.iterdir()):
        unwanted = path.suffix in WEIGHTS or path.name in STATE_OF_TRAINING or path.name.startswith(".")
        if path.is_file() and not unwanted and path.name != inspection.INDEX:
            shutil.copyfile(path, folder / path.name)
