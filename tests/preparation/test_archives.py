"""Which tars of a data folder are read, and that all other archives in it are named."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from raw_sets import by_id, entry, make_set, plain_jpeg, read_stats, run, write_tar

from dct_qwen2vl.preparation.archives import is_tar, list_tars, name_unread, name_unread_below

NAMES = [f"{number}.jpg" for number in range(20)]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Entries of twenty images in D/media.tar."""
    entries = [entry(number, image=name) for number, name in enumerate(NAMES)]
    return make_set(tmp_path / "data", entries, {name: plain_jpeg(number) for number, name in enumerate(NAMES)})


@pytest.mark.parametrize("name", ["MEDIA.TAR", "media.Tar", "media.TAR.GZ", "media.tar.Gz", "media.TGZ"])
def test_endings_in_upper_case_are_read(data, tmp_path, name):
    if "g" in name.lower():
        subprocess.run(["gzip", data / "media.tar"], check=True)
    next(data.glob("media.tar*")).rename(data / name)
    assert list_tars(data) == [data / name]
    assert run(data, tmp_path / "out", "--split", "1,0,0") == 0
    assert len(by_id(tmp_path / "out")) == 20
    assert list(read_stats(tmp_path / "out")["tars"]) == [name]


@pytest.mark.parametrize(
    "name", ["a.tar.idx", "a.tar.md5", "a.tar.gz.sha256", "a.targets", "tar", "a.tar.json", "a.tar.md", "a.tar.gz.js"]
)
def test_what_lies_beside_tars_is_no_archive(tmp_path, name):
    assert not is_tar(name)
    assert name_unread(touch(tmp_path, name)) == []


def test_other_archives_are_named(tmp_path):
    others = ["a.TAR.BZ2", "b.tar.xz", "c.zip", "d.tar.zst.00", "e.tar.part", "f.zip.001", "g.7z"]
    (tmp_path / "folder.zip").mkdir()
    line = f"Not read, only .tar, .tar.gz and .tgz are: {', '.join(others)}; unpack them"
    assert name_unread(touch(tmp_path, *others)) == [line]


SPLIT = [
    ("x.tar.gz", ["x.tar.gz.00", "x.tar.gz.01", "x.tar.gz.10"], "x.tar.gz.??"),
    ("x.tar", ["x.tar.part-aa", "x.tar.part-ab"], "x.tar.part-a?"),
    ("x.tar", ["x.tar.001"], "x.tar.001"),
    ("x.tgz", ["x.tgzaa", "x.tgzab", "x.tgzba"], "x.tgz??"),
    ("X.TAR", ["X.TAR.PART1", "X.TAR.PART2"], "X.TAR.PART?"),
    ("x.tar.gz", ["x.tar.gz-1-of-2", "x.tar.gz-2-of-2"], "x.tar.gz-??????"),
]


@pytest.mark.parametrize(("whole", "parts", "pattern"), SPLIT)
def test_parts_of_a_split_tar_are_named_with_the_command_that_joins_them(tmp_path, whole, parts, pattern):
    (said,) = name_unread(touch(tmp_path, *parts))
    assert said == f"Not read, parts of {whole}; join them: cat {tmp_path}/{pattern} > {tmp_path}/{whole}"
    assert name_unread(touch(tmp_path, whole)) == []  # joined


@pytest.mark.parametrize(("numbers", "other"), [(("000", "001"), "md5"), (("00", "01"), "md")])
def test_a_pattern_that_another_file_fits_is_not_used(tmp_path, numbers, other):
    """What the shell finds for it would be joined, too."""
    folder = touch(tmp_path, *(f"x.tar.gz.{number}" for number in numbers), f"x.tar.gz.{other}", "x.tar.gz.zzz")
    (said,) = name_unread(folder)
    (command,) = (line.split("join them: ")[1] for line in [said])
    for number in numbers:
        (folder / f"x.tar.gz.{number}").write_text(number)
    (folder / f"x.tar.gz.{other}").write_text("no part")
    subprocess.run(["bash", "-c", command], check=True)
    assert (folder / "x.tar.gz").read_text() == "".join(numbers)


def test_parts_whose_order_no_pattern_gives_are_named_one_by_one(tmp_path):
    folder = touch(tmp_path / "my data", *(f"x.tar.{number}" for number in (1, 2, 10)))
    (said,) = name_unread(folder)
    *parts, whole = (f"'{folder}/x.tar{ending}'" for ending in (".1", ".2", ".10", ""))
    assert said.endswith(f"cat {' '.join(parts)} > {whole}")


def test_split_tars_are_read_once_the_command_has_been_run(data, tmp_path, capsys):
    subprocess.run(["split", "-b", "20k", data / "media.tar", data / "media.tar."], check=True)
    (data / "media.tar").unlink()
    write_tar(data / "other.tar", {"0.jpg": plain_jpeg()})
    assert run(data, tmp_path / "out", "--split", "1,0,0") == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Not read")]
    assert read_stats(tmp_path / "out")["skipped"] == {"missing_media": 19}
    subprocess.run(["bash", "-c", said.split("join them: ")[1]], check=True)
    assert run(data, tmp_path / "out", "--split", "1,0,0", "--force") == 0
    assert read_stats(tmp_path / "out")["skipped"] == {}
    assert "Not read" not in capsys.readouterr().err


def test_tars_with_different_files_of_one_name_are_told(data, tmp_path, capsys):
    write_tar(data / "other.tar", {"0.jpg": plain_jpeg() + b"trailer"})
    assert run(data, tmp_path / "out", "--split", "1,0,0") == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Note: ")]
    what = (
        "Note: 1 of the names are in several tars with different content, such as 0.jpg, which is read from other.tar"
    )
    assert said == f"{what}; to read another tar's, write its name before, as in other/0.jpg"
    assert run(data, tmp_path / "out", "--strict", "--split", "1,0,0", "--force") == 1
    assert "several tars have another 0.jpg" in capsys.readouterr().err


def test_tars_in_folders_are_named_where_media_are_missing(data, tmp_path, capsys):
    (data / "images").mkdir()
    (data / "media.tar").rename(data / "images" / "media.TAR")
    write_tar(data / "other.tar", {"0.jpg": plain_jpeg()})
    assert run(data, tmp_path / "out", "--strict") == 1
    assert f"Not read, in folders below {data}: images/media.TAR; tars are read in {data} itself alone" in (
        capsys.readouterr().err
    )
    (data / "media.tar").symlink_to("images/media.TAR")
    assert run(data, tmp_path / "out", "--strict", "--split", "1,0,0") == 0
    assert "Not read" not in capsys.readouterr().err


def test_archives_in_folders_are_named_a_few_at_a_time_and_parts_are_joined_into_the_data_folder(tmp_path):
    shards = [f"old/pretrain-{number:06d}.tar" for number in range(8)]
    names = ["read.tar", "split.tar.gz.00", "new/split.tar.gz.00", "new/split.tar.gz.01", "new/1.jpg", *shards]
    folder = touch(tmp_path, *names)
    (folder / "linked.tar").symlink_to(shards[0])
    others, parts = name_unread_below([*names, "linked.tar"], folder, [folder / "read.tar", folder / "linked.tar"])
    assert f"below {folder}: {', '.join(shards[1:6])} and 2 more; tars are read in {folder} itself alone" in others
    command = f"cat {folder}/new/split.tar.gz.0? > {folder}/split.tar.gz"
    assert parts == f"Not read, parts of new/split.tar.gz; join them: {command}"


def test_a_tar_that_is_half_zeros_is_said_in_one_line(data, tmp_path, capfd):
    whole = (data / "media.tar").read_bytes()
    (data / "media.tar").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert run(data, tmp_path / "out", "--split", "1,0,0") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("media.tar: ")]
    assert len(said) == 1
    assert "only zeros up to its end, so perhaps not fetched whole, at byte" in said[0]
    assert 0 < len(by_id(tmp_path / "out")) < 20


def test_joined_tars_and_links_in_them_are_used(data, tmp_path):
    whole = (data / "media.tar").read_bytes()
    write_tar(data / "media.tar", {"other.jpg": plain_jpeg(99)})
    with tarfile.open(data / "media.tar", "a") as tar:
        for name in NAMES[10:]:
            link = tarfile.TarInfo(f"links/{name}")
            link.type, link.linkname = tarfile.LNKTYPE, "other.jpg"
            tar.addfile(link)
    (data / "media.tar").write_bytes((data / "media.tar").read_bytes() + whole)
    entries = [entry(number, image=name if number < 10 else f"links/{name}") for number, name in enumerate(NAMES)]
    (data / "cambrian737k.json").write_text(json.dumps(entries))
    assert run(data, tmp_path / "out", "--split", "1,0,0") == 0
    samples = by_id(tmp_path / "out")
    assert len(samples) == 20
    assert read_stats(tmp_path / "out")["skipped"] == {}
