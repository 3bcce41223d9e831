"""Energon's own metadata beside the shards: its dialogue, and the same without one."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dct_qwen2vl.common.files import write_text
from dct_qwen2vl.data.energon_files import PreparedSetError, count_samples, read_splits
from dct_qwen2vl.preparation.data_splits import SPLITS
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.output_folder import ENERGON_FOLDER, SHARD_NAME, remove_own_folder

CRUDE_SAMPLE = "11"  # "Crude sample (plain dict for cooking)" in the dialogue of Energon 5.2.0
DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\nauto_decode: false\n"


def dialogue_command(output_dir: Path, split: str) -> str:
    """The dialogue with `energon prepare` as one line to type.

    output_dir: The folder of shards.
    split: Shares as Energon asks for them, such as "8,1,1".
    """
    beside_python = Path(sys.executable).with_name("energon")
    energon = str(beside_python) if shutil.which("energon") is None and beside_python.exists() else "energon"
    return f"printf '{split}\\ny\\n{CRUDE_SAMPLE}\\n' | {shlex.quote(energon)} prepare {shlex.quote(str(output_dir))}"


def is_cut_alike(shares: tuple[int, int, int], shards: int) -> bool:
    """Whether Energon cuts the sorted shards as this tool does.

    shares: Of train, val and test.
    shards: Number of shards.

    Energon adds up rounded fractions (WebdatasetPreparator in 5.2.0), which goes wrong for 7,2,1.
    """
    end, shares_before = 0.0, 0
    for share in shares:
        end += share / sum(shares)
        shares_before += share
        if int(shards * end) != shards * shares_before // sum(shares):
            return False
    return True


def energon_prepare(output_dir: Path, split: str, split_of: tuple[str, ...], num_workers: int) -> str:
    """Runs `energon prepare` with this interpreter and answers its questions, unless it has run on these shards.
    Returns a line on what is there.

    output_dir: The folder of shards.
    split: Shares as Energon asks for them, such as "8,1,1".
    split_of: The split of each shard. They replace Energon's own.
    num_workers: Processes that read the shards.

    The dataset.yaml is written so that media stay bytes. Raises PreparationError if `energon prepare` fails.
    """
    folder = output_dir / ENERGON_FOLDER
    shards = {name: [SHARD_NAME.format(n) for n, of in enumerate(split_of) if of == name] for name in SPLITS}
    if not is_prepared(output_dir, shards):
        _run_energon(output_dir, split, shards, num_workers)
    samples = {name: count_samples(output_dir, names) for name, names in read_splits(output_dir, SPLITS).items()}
    counts = ", ".join(f"{name} {count}" for name, count in samples.items())
    return f"Energon metadata in {folder}; samples: {counts}"


def is_prepared(output_dir: Path, shards: dict[str, list[str]]) -> bool:
    """Whether the metadata is complete and later than every shard. To make it again would read all shards, and for
    that time nothing else could read the set.

    output_dir: The folder of shards.
    shards: Names of the shards of each split.
    """
    folder = output_dir / ENERGON_FOLDER
    try:
        if read_splits(output_dir, SPLITS) != shards or (folder / "dataset.yaml").read_text() != DATASET_YAML:
            return False
    except PreparedSetError:
        return False
    written = (folder / "dataset.yaml").stat().st_mtime_ns  # the last file
    return all((output_dir / name).stat().st_mtime_ns <= written for names in shards.values() for name in names)


def _run_energon(output_dir: Path, split: str, shards: dict[str, list[str]], num_workers: int) -> None:
    import yaml

    folder = output_dir / ENERGON_FOLDER
    remove_own_folder(folder)
    python = [sys.executable, "-W", "ignore"]  # or the last line that it prints may be a warning
    command = [*python, "-m", "megatron.energon.cli.main", "prepare", f"--num-workers={max(1, num_workers)}"]
    answers = f"{split}\ny\n{CRUDE_SAMPLE}\n"
    done = subprocess.run([*command, str(output_dir)], input=answers, capture_output=True, text=True)
    if done.returncode != 0 or not (folder / "split.yaml").is_file():
        last_line = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        command = dialogue_command(output_dir, split)
        raise PreparationError(f"energon prepare failed: {last_line}; to see it whole: {command}")
    splits = {**yaml.safe_load((folder / "split.yaml").read_text()), "split_parts": shards}
    for name, text in (("split.yaml", yaml.dump(splits)), ("dataset.yaml", DATASET_YAML)):
        write_text(folder / name, text)
