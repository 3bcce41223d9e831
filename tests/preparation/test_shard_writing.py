"""Shards: their bytes, the order of reading, what is left when a disk fills up, a file vanishes, a run is killed."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest
from raw_sets import (
    GOOD,
    SMALL_SHARDS,
    all_files,
    command,
    entry,
    make_set,
    make_small_set,
    plain_jpeg,
    read_shard,
    run,
)

import data_preparation
from dct_qwen2vl.common.files import replacing
from dct_qwen2vl.preparation import output_folder, shards
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.output_folder import is_finished, locked
from dct_qwen2vl.preparation.shards import (
    PlannedSample,
    SourceReader,
    TarWriter,
    cut_windows,
    make_header,
    read_window,
    write_all,
)

SCRIPT = Path(data_preparation.__file__)


# Tars


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 123_456_789, 8**11 - 1])
def test_headers_are_those_of_tarfile(size):
    header = tarfile.TarInfo("000000123-7.12.jpg")
    header.size, header.mode = size, 0o444
    assert make_header(header.name, size) == header.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("flush_bytes", [1, 1 << 30])
def test_a_written_tar_is_that_of_tarfile(tmp_path, monkeypatch, flush_bytes):
    hinted = []
    monkeypatch.setattr(shards, "FLUSH_BYTES", flush_bytes)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, place, size, advice: hinted.append((place, size)))
    parts = {"0.jpg": os.urandom(700), "1.png": b"", "json": b"{}" * 256}
    with (tmp_path / "ours.tar").open("wb") as file:
        writer = TarWriter(file)
        for key in ("000000001", "000000002-1"):
            writer.add_sample(key, parts)
        writer.end()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in ("000000001", "000000002-1"):
            for name, data in parts.items():
                header = tarfile.TarInfo(f"{key}.{name}")
                header.size, header.mode = len(data), 0o444
                tar.addfile(header, io.BytesIO(data))
    data = (tmp_path / "ours.tar").read_bytes()
    assert data == stream.getvalue()
    assert (writer.digest.hexdigest(), writer.size) == (sha256(data).hexdigest(), len(data))
    assert hinted == ([(0, 3072), (3072, 3072), (6144, 4096)] if flush_bytes == 1 else [])


def test_a_sample_of_very_many_parts(tmp_path):
    parts = {f"{number}.jpg": b"x" for number in range(1024)}
    with (tmp_path / "1.tar").open("wb") as file:
        writer = TarWriter(file)
        writer.add_sample("1", parts)
        writer.end()
    assert read_shard(tmp_path / "1.tar") == {"1": parts}


def test_a_disk_that_takes_less_than_all_at_once(tmp_path, monkeypatch):
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, pieces: real(descriptor, [b"".join(pieces)[:10]]))
    with (tmp_path / "x").open("wb") as file:
        write_all(file.fileno(), [b"one", b"", b"two and more", b"three"])
    assert (tmp_path / "x").read_bytes() == b"onetwo and morethree"


# Reading


def planned(*media: tuple[str, int, int]) -> PlannedSample:
    return PlannedSample(0, 0, "", 0, 0, 0, 0, 0, False, (), list(media), False)


def test_windows_hold_consecutive_samples_up_to_their_budget():
    sizes = [[40], [30, 30], [], [10], [200], [10], [90]]
    samples = [planned(*(("a", number, size) for size in of)) for number, of in enumerate(sizes)]
    windows = list(cut_windows(samples, 100))
    assert [sample for window in windows for sample in window] == samples
    assert [[sum(size for _, _, size in sample.places) for sample in window] for window in windows] == [
        [40, 60, 0],
        [10],
        [200],
        [10, 90],
    ]


def test_a_window_is_read_in_the_order_of_the_files_and_each_range_once(tmp_path, monkeypatch):
    data = {name: os.urandom(1000) for name in ("a.tar", "b.tar")}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    places = [("b.tar", 500, 100), ("a.tar", 900, 50), ("b.tar", 0, 10), ("a.tar", 0, 900), ("b.tar", 500, 100)]
    window = [planned(*((str(tmp_path / name), offset, size) for name, offset, size in places[:3]))]
    window += [planned(*((str(tmp_path / name), offset, size) for name, offset, size in places[3:]))]
    read, real = [], SourceReader.read_into

    def note(reader, target, path, offset):
        read.append((Path(path).name, offset))
        real(reader, target, path, offset)

    monkeypatch.setattr(SourceReader, "read_into", note)
    with closing(SourceReader()) as reader:
        files = read_window(window, reader)
    assert read == [("a.tar", 0), ("a.tar", 900), ("b.tar", 0), ("b.tar", 500)]
    for (path, offset, size), found in files.items():
        assert bytes(found) == data[Path(path).name][offset : offset + size]


def test_a_medium_larger_than_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WINDOW_BYTES", 100)
    shards.window_memory.cache_clear()
    media = {"large.jpg": os.urandom(5000), "small.jpg": b"s"}
    for name, data in media.items():
        (tmp_path / name).write_bytes(data)
    samples = [planned((str(tmp_path / name), 0, len(data))) for name, data in media.items()]
    with closing(SourceReader()) as reader:
        for window, data in zip(cut_windows(samples, 100), media.values()):
            assert [bytes(found) for found in read_window(window, reader).values()] == [data]
    shards.window_memory.cache_clear()


def test_a_reader_keeps_few_files_open_and_closes_them(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    paths = [tmp_path / f"{number}" for number in range(3 * SourceReader.MOST_FILES)]
    for path in paths:
        path.write_bytes(path.name.encode())
    with closing(SourceReader()) as reader:
        for path in [*paths, *paths]:
            assert reader.read(str(path), 0, len(path.name)) == path.name.encode()
        assert len(os.listdir("/proc/self/fd")) <= before + SourceReader.MOST_FILES
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_cannot_be_read_any_more(tmp_path):
    (tmp_path / "short").write_bytes(b"12345")
    with closing(SourceReader()) as reader:
        with pytest.raises(PreparationError, match=r"short changed while it was read; .*run the same command again"):
            reader.read(str(tmp_path / "short"), 2, 10)
        with pytest.raises(PreparationError, match=r"gone was there and cannot be opened any more \(No such file"):
            reader.read(str(tmp_path / "gone"), 0, 1)
        with pytest.raises(PreparationError, match=r"cannot be read \(Is a directory\)"):
            reader.read(str(tmp_path), 0, 1)


def test_windows_do_not_change_the_bytes(tmp_path, monkeypatch):
    data = make_small_set(tmp_path / "data")
    assert run(data, tmp_path / "one") == 0
    monkeypatch.setattr(shards, "WINDOW_BYTES", 3000)
    shards.window_memory.cache_clear()
    assert run(data, tmp_path / "many") == 0
    shards.window_memory.cache_clear()
    assert all_files(tmp_path / "one") == all_files(tmp_path / "many")


# Files in whole or not at all


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "stats.json"
    path.write_bytes(b"old")
    for error in (ValueError("bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(path) as stream:
            stream.write(b"new")
            raise error
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"stats.json": b"old"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, real_replace, real_fsync = [], os.replace, os.fsync

    def fsync(descriptor):
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[0])
        real_fsync(descriptor)

    def replace(source, target):
        calls.append("rename " + Path(target).name)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with replacing(tmp_path / "a.tar") as stream:
        stream.write(b"1")
    assert calls == ["fsync a", "rename a.tar", f"fsync {tmp_path.name}"]


def test_a_shard_is_finished_when_both_its_files_are_there(tmp_path):
    shard = tmp_path / "pretrain-000000.tar"
    assert not is_finished(shard)
    shard.write_bytes(b"12345")
    assert not is_finished(shard)
    for stats, finished in (("[]", False), ('{"bytes": 4}', False), ('{"byt', False), ('{"bytes": 5}', True)):
        shard.with_suffix(".stats.json").write_text(stats)
        assert is_finished(shard) == finished
    shard.unlink()
    assert not is_finished(shard)


def test_locks(tmp_path):
    path = tmp_path / ".work" / "run.lock"
    with locked(path):
        for shared in (False, True):
            with pytest.raises(PreparationError, match=f"another run is writing to {tmp_path}"), locked(path, shared):
                pass
    with locked(path, shared=True), locked(path, shared=True), pytest.raises(PreparationError), locked(path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_folder.fcntl, "flock", flock)
    with locked(tmp_path / ".work" / "run.lock"), locked(tmp_path / ".work" / "run.lock"):
        pass


# Bad nights


@pytest.fixture(scope="module")
def raw_set(tmp_path_factory) -> Path:
    return make_small_set(tmp_path_factory.mktemp("raw") / "data")


@pytest.fixture(scope="module")
def whole(raw_set, tmp_path_factory) -> dict[str, bytes]:
    """All files of a run that nothing has stopped."""
    output = tmp_path_factory.mktemp("whole") / "shards"
    assert run(raw_set, output, *SMALL_SHARDS) == 0
    return all_files(output)


def one_error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Checking", "Processing"))]
    lines = [line.split("\r")[-1] for line in lines if "error:" in line or "it/s" not in line]
    errors = [line for line in lines if line.startswith("data_preparation.py: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(lines), lines
    return errors[0]


def assert_finished_shards_are_sound(output: Path, whole: dict[str, bytes]) -> int:
    """Every file with a shard's name is complete; returns the number of finished shards."""
    for path in output.glob("pretrain-*"):
        assert path.suffix == ".tmp" or path.read_bytes() == whole[path.name], path.name
    return sum(map(is_finished, output.glob("pretrain-??????.tar")))


def test_a_full_disk(raw_set, whole, tmp_path, monkeypatch, capsys):
    output, real, written = tmp_path / "shards", os.writev, []

    def writev(descriptor, pieces):
        written.append(sum(map(len, pieces)))
        if sum(written) > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", writev)
        assert run(raw_set, output, *SMALL_SHARDS) == 1
    message = one_error(capsys)
    assert "could not be written (No space left on device)" in message and "run the same command again" in message
    finished = assert_finished_shards_are_sound(output, whole)
    assert 0 < finished < 20 and not list(output.glob("*.tmp"))
    assert run(raw_set, output, *SMALL_SHARDS, workers=2) == 0
    assert f"{finished} of 20 shards are finished already" in capsys.readouterr().out
    assert all_files(output) == whole


def test_a_file_size_limit_in_the_workers(raw_set, whole, tmp_path):
    """The kernel's own refusal, in other processes: EFBIG behaves as ENOSPC does."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY));"
        "sys.path.insert(0, sys.argv.pop(1)); import data_preparation; sys.exit(data_preparation.main(sys.argv[1:]))"
    )
    output = tmp_path / "shards"
    arguments = command(raw_set, output, *SMALL_SHARDS, workers=2)
    done = subprocess.run(
        # -B: bytecode that is cut short by the limit would stay.
        [sys.executable, "-B", "-c", limited, str(SCRIPT.parent), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "could not be written (File too large)" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert_finished_shards_are_sound(output, whole)
    assert run(raw_set, output, *SMALL_SHARDS) == 0
    assert all_files(output) == whole


def test_a_file_that_vanishes_and_comes_back(raw_set, whole, tmp_path, monkeypatch, capsys):
    data, output = make_small_set(tmp_path / "data"), tmp_path / "shards"
    hidden, real = tmp_path / "hidden.jpg", data_preparation.write_missing

    def vanish(*arguments):
        (data / "folder" / "plain.jpg").rename(hidden)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data_preparation, "write_missing", vanish)
        assert run(data, output, *SMALL_SHARDS) == 1
    assert "plain.jpg was there and cannot be opened any more" in one_error(capsys)
    finished = assert_finished_shards_are_sound(output, whole)
    assert run(data, output, *SMALL_SHARDS) == 1  # another plan, in which the entry is missing
    assert "different: media" in one_error(capsys)
    hidden.rename(data / "folder" / "plain.jpg")
    assert run(data, output, *SMALL_SHARDS) == 0
    assert f"{finished} of 20 shards" in capsys.readouterr().out or finished == 0
    assert all_files(output) == whole


def test_a_tar_that_shrinks(raw_set, whole, tmp_path, monkeypatch, capsys):
    data, output = make_small_set(tmp_path / "data"), tmp_path / "shards"
    tar, real = data / "coco.tar", data_preparation.write_missing
    content = tar.read_bytes()

    def shrink(*arguments):
        tar.write_bytes(content[:5000])
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data_preparation, "write_missing", shrink)
        assert run(data, output, *SMALL_SHARDS) == 1
    assert "coco.tar changed while it was read" in one_error(capsys)
    assert_finished_shards_are_sound(output, whole)
    tar.write_bytes(content)
    assert run(data, output, *SMALL_SHARDS) == 0
    assert all_files(output) == whole


def start(data: Path, output: Path, workers: int, *options: str) -> subprocess.Popen:
    arguments = command(data, output, *SMALL_SHARDS, *options, workers=workers)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], start_new_session=True, **quiet)


def processes_of(session: int) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(path.name))
    return found


@pytest.mark.parametrize(("workers", "again", "shards"), [(2, 0, 1), (0, 2, 12)])
def test_kill_9_and_the_same_command_again(raw_set, whole, tmp_path, workers, again, shards):
    """Killed when some shards are there: no process survives, no half file has a name, the second run ends the same."""
    output = tmp_path / "shards"
    process = start(raw_set, output, workers)
    while process.poll() is None and len(list(output.glob("pretrain-??????.tar"))) < shards:
        time.sleep(0.001)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    for _ in range(200):
        if not processes_of(process.pid):
            break
        time.sleep(0.05)
    assert not processes_of(process.pid)
    assert_finished_shards_are_sound(output, whole)
    assert run(raw_set, output, *SMALL_SHARDS, workers=again) == 0
    assert all_files(output) == whole
    assert not (output / ".work").exists()


# Renames in their order: two indexes, run.json, then tar and stats of 20 shards, then the lists and stats.json.
@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 44, 46])
def test_killed_between_any_two_steps_of_a_file(raw_set, whole, tmp_path, step):
    """The process ends at once, without any clean-up, where it would have given a file its name."""
    output = tmp_path / "shards"
    child = os.fork()
    if child == 0:
        die_at_rename(step)
        os._exit(run(raw_set, output, *SMALL_SHARDS))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert_finished_shards_are_sound(output, whole)
    assert len(list(output.rglob("*.tmp"))) == 1
    assert run(raw_set, output, *SMALL_SHARDS) == 0
    assert all_files(output) == whole


def die_at_rename(step: int) -> None:
    """Let this process, which a test has forked, end at that call of os.replace; silently."""
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == step:
            os._exit(9)
        real(source, target)

    os.replace = replace
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def test_a_worker_that_is_killed(tmp_path, monkeypatch, capsys):
    names = {f"{number}.jpg": plain_jpeg(number) for number in range(40)}
    data = make_set(tmp_path / "data", [entry(n, image=name) for n, name in enumerate(names)], names)
    output = tmp_path / "shards"
    monkeypatch.setattr(data_preparation, "write_shard", kill_own_process)
    assert run(data, output, workers=2) == 1
    assert "a worker process died" in one_error(capsys)
    monkeypatch.undo()
    assert run(data, output, workers=2) == 0


def kill_own_process(task, advance) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_second_run_at_the_same_time_is_refused(raw_set, tmp_path, capsys):
    output = tmp_path / "shards"
    with locked(output / ".work" / "run.lock"):
        assert run(raw_set, output) == 1
    assert "another run is writing to" in one_error(capsys)
    assert not list(output.glob("pretrain-*"))


def test_stats_beside_a_shard(raw_set, tmp_path):
    output = tmp_path / "shards"
    assert run(raw_set, output) == 0
    total, written = 0, 0
    for path in sorted(output.glob("pretrain-??????.tar")):
        stats = json.loads(path.with_suffix(".stats.json").read_text())
        samples = read_shard(path)
        assert (stats["name"], stats["written"], stats["bytes"]) == (path.name, len(samples), path.stat().st_size)
        assert stats["sha256"] == sha256(path.read_bytes()).hexdigest()
        columns, media = stats["samples"], stats["media"]
        assert {len(column) for column in columns.values()} == {len(samples)}
        assert {len(column) for column in media.values()} == {sum(columns["media"])}
        shapes = iter(zip(*(media[name] for name in ("height", "width", "frames", "seconds"))))
        for row, parts in enumerate(samples.values()):
            item = json.loads(parts["json"])
            turns = item["conversations"]
            assert columns["text"][row] == sum(len(turn["value"]) for turn in turns)
            assert columns["media"][row] == len(parts) - 1
            if item.get("source") == "coco":
                assert stats["sources"][columns["source"][row]] == "coco"
            for ending in list(parts)[:-1]:
                shape = next(shapes)
                if ending == "mp4":
                    assert shape[2:] == (6, 0.75)
                elif ending == "jpg" and item.get("source") == "coco":
                    assert shape == (40, 56, 1, 0)
        total += len(stats["skipped"])
        written += len(samples)
    assert (written, total) == (len(GOOD), 5)
