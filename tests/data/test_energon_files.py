"""What `energon prepare` leaves beside the shards: read as Energon reads it, broken files refused in one line."""

import shutil
from pathlib import Path

import pytest

import evaluate_qwen2vl
import finetune_qwen2vl
from dct_qwen2vl.data.energon_files import FOLDER, PreparedSetError, read_splits

FILES = {
    "dataset.yaml": "__module__: megatron.energon\n__class__: CrudeWebdataset\n",
    "split.yaml": "exclude: [b.tar]\nsplit_parts:\n  train: ['a{0..2}.tar', b.tar]\n  val: []\n",
    ".info.yaml": "shard_counts: {a0.tar: 5, a1.tar: 4, a2.tar: 1}\n",
}


def write_files(data_dir: Path, **changes: str) -> Path:
    """A folder with Energon's three files; changes: by name."""
    (data_dir / FOLDER).mkdir()
    for name, text in {**FILES, **changes}.items():
        (data_dir / FOLDER / name).write_text(text)
    for name in ("a0.tar", "a1.tar", "a2.tar"):
        (data_dir / name).touch()
        (data_dir / f"{name}.idx").touch()
    return data_dir


def test_shards_are_those_that_energon_finds(tmp_path):
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

    write_files(tmp_path)
    shards = read_splits(tmp_path, ("train", "val", "test"))
    assert shards == {"train": ["a0.tar", "a1.tar", "a2.tar"], "val": [], "test": []}
    found = WebdatasetMeta.from_config(EPath(tmp_path), split_part="train").shards
    assert [shard.name for shard in found] == shards["train"]


def test_raw_data_and_single_shards_are_told_from_prepared_sets(tmp_path):
    (tmp_path / "a.tar").touch()
    (tmp_path / "Cambrian737k.json").write_text("[]")
    with pytest.raises(PreparedSetError, match=r"raw data \(Cambrian737k.json\).*: python data_preparation.py --data"):
        read_splits(tmp_path, ("train",))
    with pytest.raises(PreparedSetError, match=f"is a file: give --data-dir the folder that it lies in, {tmp_path}"):
        read_splits(tmp_path / "a.tar", ("train",))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("split.yaml", "", "is empty"),
        ("split.yaml", "a: [", "is not YAML (expected the node content, but found '<stream end>', line 1)"),
        ("split.yaml", "a: 2001-99-99", "is not YAML (month must be in 1..12)"),
        ("split.yaml", "\0\0\0", "is not YAML (unacceptable character #x0000: special characters are not allowed in"),
        ("split.yaml", "[a.tar]", "is YAML, but has no fields"),
        ("split.yaml", "exclude: []", "does not list the shards of its splits (split_parts, exclude)"),
        ("split.yaml", "split_parts: [a.tar]", "does not list the shards of its splits"),
        ("split.yaml", "split_parts: {train: a.tar}", "does not list the shards of its splits"),
        ("split.yaml", "split_parts: {train: [1]}", "does not list the shards of its splits"),
        ("split.yaml", "split_parts: {train: []}\nexclude:", "does not list the shards of its splits"),
        ("split.yaml", "split_parts: {train: ['a{0.tar']}", "has names that cannot be expanded (Unbalanced braces"),
        (".info.yaml", "", "is empty"),
        (".info.yaml", "shard_counts:", "does not say how many samples each shard holds (shard_counts)"),
        (".info.yaml", "shard_counts: [3]", "does not say how many samples each shard holds"),
        (".info.yaml", "shard_counts: {a0.tar: many}", "does not say how many samples each shard holds"),
        (".info.yaml", "shard_counts: {a0.tar: 5}", "has no shard_counts of a1.tar, which is in split.yaml"),
        ("dataset.yaml", "", "is empty"),
        ("dataset.yaml", "__module__: megatron.energon\n__cla", "is not YAML (could not find expected ':', line 2)"),
        ("dataset.yaml", "__module__: megatron.energon", "does not say which class reads the set (__module__, __class"),
        ("dataset.yaml", "__module__: megatron.energon\n__class__: VQAWebdataset", "is for VQAWebdataset, only crude"),
    ],
)
def test_broken_files_are_refused_in_one_line(name, text, said, tmp_path):
    write_files(tmp_path, **{name: text})
    with pytest.raises(PreparedSetError) as refusal:
        read_splits(tmp_path, ("train",))
    line = str(refusal.value)
    assert line.startswith(f"{tmp_path / FOLDER / name} {said}") and "\n" not in line
    assert line.endswith(f": energon prepare {tmp_path}")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (write_files(tmp_path) / FOLDER / "split.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PreparedSetError, match=r"split\.yaml is not YAML \('utf-8' codec can't decode byte 0xff"):
        read_splits(tmp_path, ("train",))
    (tmp_path / FOLDER / ".info.yaml").unlink()
    with pytest.raises(PreparedSetError, match=r"is not prepared \(no \.nv-meta/\.info\.yaml\): energon prepare"):
        read_splits(tmp_path, ("train",))


def test_a_folder_without_shards_is_told_where_they_are(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PreparedSetError, match=f"^no shards in {folder}: python data_preparation.py .* {folder}$"):
            read_splits(folder, ("train",))
    (tmp_path / "shards").mkdir()
    write_files(tmp_path / "shards")
    with pytest.raises(PreparedSetError, match=f"^no shards in {tmp_path}: give --data-dir {tmp_path / 'shards'}$"):
        read_splits(tmp_path, ("train",))


def test_splits_that_are_not_read_need_no_counts(tmp_path):
    write_files(tmp_path, **{"split.yaml": "split_parts: {train: [a0.tar], test: [c.tar]}"})
    assert read_splits(tmp_path, ("train",)) == {"train": ["a0.tar"]}
    with pytest.raises(PreparedSetError, match=r"\.info\.yaml has no shard_counts of c\.tar, which is in split\.yaml"):
        read_splits(tmp_path, ("train", "test"))


@pytest.mark.parametrize("name", ["a1.tar", "a1.tar.idx"])
def test_shards_that_are_not_there_are_named(name, tmp_path):
    (write_files(tmp_path) / name).unlink()
    assert read_splits(tmp_path, ("val",)) == {"val": []}
    with pytest.raises(PreparedSetError) as refusal:
        read_splits(tmp_path, ("train",))
    remedy = f"copy it there again, or energon prepare {tmp_path}"
    assert str(refusal.value) == f"{tmp_path / name} is missing, which .nv-meta/split.yaml names: {remedy}"


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    places = [place.to_bytes(8, "little") for place in (0, 512, 1024)]
    (write_files(tmp_path) / "a1.tar.idx").write_bytes(b"".join(places))
    (tmp_path / "a1.tar").write_bytes(bytes(1024))
    assert read_splits(tmp_path, ("train",))["train"] == ["a0.tar", "a1.tar", "a2.tar"]
    (tmp_path / "a1.tar").write_bytes(bytes(1023))
    with pytest.raises(PreparedSetError, match=r"/a1\.tar is cut short at byte 1023, its samples end at byte 1024: "):
        read_splits(tmp_path, ("train",))


def test_a_function_that_makes_the_set_is_not_looked_into(tmp_path):
    write_files(tmp_path, **{"dataset.yaml": "__module__: megatron.energon\n__function__: make\n"})
    assert read_splits(tmp_path, ("val",)) == {"val": []}


@pytest.fixture
def arguments(prepared, tmp_path) -> list[str]:
    """What training and evaluation are given alike, with a copy of a prepared set."""
    shutil.copytree(prepared.shards, tmp_path / "set")
    folders = {"--model-dir": prepared.model, "--data-dir": tmp_path / "set", "--output-dir": tmp_path / "out"}
    return [str(word) for pair in folders.items() for word in pair]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tool", [finetune_qwen2vl, evaluate_qwen2vl])
def test_training_and_evaluation_end_in_one_line(tool, name, arguments, tmp_path, one_line_error):
    (tmp_path / "set" / FOLDER / name).write_text("")
    extra = ["--engine", "automodel"] if tool is finetune_qwen2vl else []
    assert tool.main([*arguments, *extra]) == 1
    path = tmp_path / "set" / FOLDER / name
    assert one_line_error() == f"{tool.__name__}.py: {path} is empty: energon prepare {tmp_path / 'set'}"
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_a_split_without_shards_ends_in_one_line(arguments, tmp_path, one_line_error):
    (tmp_path / "set" / FOLDER / "split.yaml").write_text("split_parts: {test: []}")
    assert evaluate_qwen2vl.main(arguments) == 1
    said = f"evaluate_qwen2vl.py: the test split of {tmp_path / 'set'} holds no shard: choose another --split"
    assert one_line_error() == said
