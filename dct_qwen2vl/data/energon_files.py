"""What `energon prepare` leaves in .nv-meta beside the shards, looked into before training and evaluation begin.

Energon reads the same files after its import, and ends in a traceback where they are not what it expects.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dct_qwen2vl.common.scripts import UserError

FOLDER = ".nv-meta"
METADATA_NAME = "cambrian737k.json"  # of raw data, in any letter case
DATASET, SPLIT, INFO = "dataset.yaml", "split.yaml", ".info.yaml"


class PreparedSetError(UserError):
    """A folder of shards cannot be read. The message is one line: what, where, what to type next."""


def read_splits(data_dir: Path, wanted: Iterable[str]) -> dict[str, list[str]]:
    """The shards of each wanted split. An empty list for an empty split.

    data_dir: Prepared folder of shards.
    wanted: Names of splits, such as "train".

    Raises PreparedSetError unless all that Energon reads of them is there and complete.
    """
    refuse_other_data(data_dir)
    for name in (DATASET, SPLIT, INFO):
        if not (data_dir / FOLDER / name).is_file():
            raise PreparedSetError(f"{data_dir} is not prepared (no {FOLDER}/{name}): {prepare_again(data_dir)}")
    check_dataset(data_dir)
    splits, counts = read_split_file(data_dir), read_counts(data_dir)
    shards = {part: splits.get(part, []) for part in wanted}
    uncounted = [name for names in shards.values() for name in names if name not in counts]
    if uncounted:
        raise broken(data_dir, INFO, f"has no shard_counts of {uncounted[0]}, which is in {SPLIT}")
    check_files(data_dir, dict.fromkeys(name for names in shards.values() for name in names))
    return shards


def refuse_other_data(data_dir: Path) -> None:
    """Raises PreparedSetError for one shard in place of its folder, for raw data, and where there are no shards."""
    if data_dir.is_file():
        raise PreparedSetError(f"{data_dir} is a file: give --data-dir the folder that it lies in, {data_dir.parent}")
    if data_dir.is_dir() and not (data_dir / "stats.json").exists() and not (data_dir / FOLDER).exists():
        raw = next((path.name for path in data_dir.iterdir() if path.name.lower() == METADATA_NAME), None)
        if raw:
            raise PreparedSetError(f"{data_dir} holds raw data ({raw}), not a prepared set: python data_preparation.py "
                                   f"--data-dir {data_dir} --output-dir SHARDS --energon-prepare")  # fmt: skip
    if not (data_dir / FOLDER).exists() and not any(data_dir.glob("*.tar")):
        below = sorted(path.parents[1] for path in data_dir.glob(f"*/{FOLDER}/{SPLIT}"))
        make_them = f"python data_preparation.py --data-dir RAW --output-dir {data_dir}"
        raise PreparedSetError(f"no shards in {data_dir}: {f'give --data-dir {below[0]}' if below else make_them}")


def check_files(data_dir: Path, names: Iterable[str]) -> None:
    """Raises PreparedSetError for a shard that is not there or cut short, or for a missing index, as after a copy that
    was cut off."""
    for name in names:
        for path in (data_dir / name, data_dir / f"{name}.idx"):
            if not path.is_file():
                raise PreparedSetError(f"{path} is missing, which {FOLDER}/{SPLIT} names: copy it there again, or "
                                       f"{prepare_again(data_dir)}")  # fmt: skip
        size, end = (data_dir / name).stat().st_size, end_of_samples(data_dir / f"{name}.idx")
        if size < end:
            raise PreparedSetError(f"{data_dir / name} is cut short at byte {size}, its samples end at byte {end}: "
                                   "copy it there again")  # fmt: skip


def end_of_samples(index: Path) -> int:
    """The byte of a shard at which its last sample ends, which its index has last (Energon 5.2.0, uint64)."""
    with index.open("rb") as file:
        file.seek(max(0, index.stat().st_size // 8 * 8 - 8))
        return int.from_bytes(file.read(8), "little")


def check_dataset(data_dir: Path) -> None:
    """Raises PreparedSetError where dataset.yaml is broken, or for another kind of samples than those that are cooked
    here; a function, or a class of another module than Energon's, is not looked into."""
    dataset = read_yaml(data_dir, DATASET)
    module, name = dataset.get("__module__"), dataset.get("__class__", dataset.get("__function__"))
    if not isinstance(module, str) or not isinstance(name, str):
        raise broken(data_dir, DATASET, "does not say which class reads the set (__module__, __class__)")
    if module == "megatron.energon" and "__class__" in dataset and name != "CrudeWebdataset":
        raise broken(data_dir, DATASET, f"is for {name}, only crude samples are read")


def read_split_file(data_dir: Path) -> dict[str, list[str]]:
    """The shards of every split but those that are excluded. Raises PreparedSetError."""
    from braceexpand import UnbalancedBracesError, braceexpand

    content = read_yaml(data_dir, SPLIT)
    parts, exclude = content.get("split_parts"), content.get("exclude", [])
    if not isinstance(parts, dict) or not all(is_list_of_names(names) for names in (*parts.values(), exclude)):
        raise broken(data_dir, SPLIT, "does not list the shards of its splits (split_parts, exclude)")
    try:
        excluded = {name for pattern in exclude for name in braceexpand(pattern)}
        expanded = {part: [name for pattern in parts[part] for name in braceexpand(pattern)] for part in parts}
    except UnbalancedBracesError as error:
        raise broken(data_dir, SPLIT, f"has names that cannot be expanded ({error})") from error
    return {part: [name for name in names if name not in excluded] for part, names in expanded.items()}


def is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def read_counts(data_dir: Path) -> dict[str, int]:
    """The samples of each shard. Raises PreparedSetError."""
    counts = read_yaml(data_dir, INFO).get("shard_counts")
    if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
        raise broken(data_dir, INFO, "does not say how many samples each shard holds (shard_counts)")
    return counts


def count_samples(data_dir: Path, shards: Iterable[str]) -> int:
    """Samples of some shards together.

    data_dir: Prepared folder of shards.
    shards: Names of the shards.

    Raises PreparedSetError.
    """
    counts = read_counts(data_dir)
    return sum(counts[name] for name in shards)


def fingerprint_of_shards(data_dir: Path, split: str = "train") -> str:
    """A digest of names, samples and bytes of the shards of a split. It tells two sets in the same folder apart.

    data_dir: Prepared folder of shards.
    split: Name of the split.

    Raises PreparedSetError.
    """
    counts = read_counts(data_dir)
    lines = [
        f"{name} {counts.get(name)} {(data_dir / name).stat().st_size}\n"
        for name in sorted(read_splits(data_dir, (split,))[split])
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def read_yaml(data_dir: Path, name: str) -> dict[str, Any]:
    """The fields of a file in .nv-meta. Raises PreparedSetError."""
    import yaml

    try:
        content = yaml.safe_load((data_dir / FOLDER / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise broken(data_dir, name, f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise broken(data_dir, name, f"is not YAML ({describe(error)})") from error
    if content is None:
        raise broken(data_dir, name, "is empty")
    if not isinstance(content, dict):
        raise broken(data_dir, name, "is YAML, but has no fields")
    return content


def describe(error: Exception) -> str:
    """What PyYAML or the decoding of UTF-8 found, in one line and without the text around it."""
    mark = getattr(error, "problem_mark", None)
    return f"{error.problem}, line {mark.line + 1}" if mark else " ".join(str(error).split())


def broken(data_dir: Path, name: str, what: str) -> PreparedSetError:
    """The error for a file in .nv-meta of which `what` is said."""
    return PreparedSetError(f"{data_dir / FOLDER / name} {what}: {prepare_again(data_dir)}")


def prepare_again(data_dir: Path) -> str:
    """The command that writes Energon's metadata."""
    return f"energon prepare {data_dir}"
