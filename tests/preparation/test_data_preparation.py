"""Data preparation from end to end: raw data in, shards read back with tarfile and with Energon."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from raw_sets import (
    BAD,
    GOOD,
    JPEGS,
    PNG,
    SMALL_SHARDS,
    VIDEO,
    all_files,
    by_id,
    command,
    dialogue,
    entry,
    make_set,
    make_small_set,
    plain_jpeg,
    read_shards,
    read_stats,
    run,
    splits_of,
    write_entries,
    write_tar,
)

import data_preparation
from dct_qwen2vl.data.energon_files import count_samples, read_splits
from dct_qwen2vl.preparation import fingerprint
from dct_qwen2vl.preparation.output_folder import OLD_NAMES, locked
from dct_qwen2vl.preparation.plan import source_of
from dct_qwen2vl.preparation.report import writing

SCRIPT = Path(data_preparation.__file__)
SHARDS = [f"pretrain-{number:06d}.tar" for number in range(10)]


@pytest.fixture(scope="module")
def raw_set(tmp_path_factory) -> Path:
    return make_small_set(tmp_path_factory.mktemp("raw") / "data")


@pytest.fixture(scope="module")
def prepared(raw_set, tmp_path_factory) -> Path:
    """The small data set, prepared for Energon without a dialogue."""
    output = tmp_path_factory.mktemp("prepared") / "shards"
    assert run(raw_set, output, "--energon-prepare", workers=2) == 0
    return output


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """400 entries on 150 images from three sources, text among them."""
    images = {f"{'abc'[number % 3]}/{number}.jpg": plain_jpeg(number) for number in range(150)}
    names = list(images)
    entries = [entry(number, image=names[number * 7 % 150]) for number in range(360)]
    entries += [entry(number) for number in range(360, 400)]
    return make_set(tmp_path_factory.mktemp("many") / "data", entries, images)


# What is in the set


def test_every_entry_is_written_or_accounted_for(prepared):
    stats = read_stats(prepared)
    reasons = [reason for reason, _ in BAD]
    assert stats["complete"] is True
    assert (stats["read"], stats["written"]) == (len(GOOD) + len(BAD), len(GOOD))
    assert stats["skipped"] == dict(sorted(Counter(reasons).items()))
    assert stats["parts"] == {"images_copied": 46, "images_converted": 1, "videos_copied": 1, "text_only": 3}
    assert stats["repairs"] == {"other_letter_case": 1}
    assert sum(stats["shards"].values()) == sum(stats["splits"].values()) == len(GOOD)
    for count in stats["sources"].values():
        assert count["read"] == count["written"] + sum(count["skipped"].values())
    read = {name: count["read"] for name, count in stats["sources"].items()}
    assert (read["coco"], read["png"], read["folder"], read["videos"], read["text"]) == (48, 3, 1, 3, 5)
    assert sum(read.values()) == stats["read"]
    lines = [json.loads(line) for line in (prepared / "skipped.jsonl").read_text().splitlines()]
    assert [(line["index"], line["reason"]) for line in lines] == [
        (2 * number + 1, reason) for number, reason in enumerate(reasons)
    ]
    assert lines[0]["id"] == "id.30" and "coco/train/9999.jpg" in lines[0]["detail"]
    assert "entry 10 has the same id, turns and media" in lines[-1]["detail"]


def test_filtered_metadata_holds_what_was_written(prepared):
    assert json.loads((prepared / "cambrian737k_filtered.json").read_text(encoding="utf-8")) == GOOD


def test_shards_hold_the_entries_and_their_media(prepared):
    samples = by_id(prepared)
    assert {name: json.loads(parts["json"]) for name, parts in samples.items()} == {item["id"]: item for item in GOOD}
    for number, data in enumerate(JPEGS.values()):
        assert samples[f"id.{number + 100}"]["jpg"] == data
    assert samples["id.20"]["jpg"] == samples["id.100"]["jpg"]
    assert samples["id.21"]["png"] == PNG
    assert {name: data for name, data in samples["id.22"].items() if name != "json"} == {
        "0.jpg": JPEGS["coco/train/0001.jpg"],
        "1.png": PNG,
    }
    assert samples["id.23"]["jpg"] == plain_jpeg(99)
    assert samples["id.24"]["mp4"] == VIDEO
    assert set(samples["id.25"]) == set(samples["id.27"]) == {"json"}
    assert set(samples["id.28"]) == {"jpg", "json"}  # a transparent PNG becomes a JPEG
    assert samples["id.29"]["jpg"] == JPEGS["coco/train/0003.jpg"]


def test_shards_are_shuffled_and_their_keys_have_no_dots(prepared):
    assert list(read_stats(prepared)["shards"]) == SHARDS
    keys = list(read_shards(prepared))
    assert keys != sorted(keys) and all("." not in key and "/" not in key for key in keys)


def test_bytes_do_not_depend_on_the_workers_but_on_the_seed(raw_set, prepared, tmp_path):
    for workers in (0, 3):
        assert run(raw_set, tmp_path / f"{workers}", workers=workers) == 0
        assert all_files(tmp_path / f"{workers}").items() <= all_files(prepared).items()
    assert run(raw_set, tmp_path / "other", "--seed", "1") == 0
    assert list(read_shards(tmp_path / "other")) != list(read_shards(prepared))
    assert read_shards(tmp_path / "other") == read_shards(prepared)


def test_maxcount_bounds_the_samples_of_a_shard(raw_set, tmp_path):
    assert run(raw_set, tmp_path / "shards", *SMALL_SHARDS) == 0
    shards = read_stats(tmp_path / "shards")["shards"]
    assert set(shards.values()) <= {1, 2, 3} and sum(shards.values()) == len(GOOD)


# Forms of raw data


def test_the_other_letter_case_of_the_metadata_name(tmp_path):
    data = make_small_set(tmp_path / "data", "Cambrian737k.json")
    assert run(data, tmp_path / "shards") == 0
    assert len(read_shards(tmp_path / "shards")) == len(GOOD)
    assert (tmp_path / "shards" / "cambrian737k_filtered.json").is_file()


def test_entries_with_empty_lists_of_media_are_text(tmp_path):
    entries = [{**entry(number), "images": [], "videos": []} for number in range(20)]
    data = make_set(tmp_path / "data", entries, {})
    assert run(data, tmp_path / "shards") == 0
    stats = read_stats(tmp_path / "shards")
    assert (stats["written"], list(stats["sources"])) == (20, ["text"])


def test_several_files_of_metadata_lists_and_lines(raw_set, tmp_path):
    data = make_small_set(tmp_path / "data")
    entries = json.loads((data / "cambrian737k.json").read_text(encoding="utf-8"))
    (data / "cambrian737k.json").unlink()
    write_entries(data / "1.json", entries[:20])
    lines = [json.dumps(item) for item in entries[20:]]
    (data / "2.jsonl").write_text("\n".join([*lines[:5], '{"id": "broken', *lines[5:]]))
    assert run(data, tmp_path / "shards", "--metadata", "1.json", "2.jsonl") == 0
    stats = read_stats(tmp_path / "shards")
    assert (stats["metadata"], stats["read"], stats["written"]) == ("1.json, 2.jsonl", len(entries) + 1, len(GOOD))
    assert stats["skipped"]["malformed_entry"] == 3
    assert json.loads((tmp_path / "shards" / "metadata_filtered.json").read_text(encoding="utf-8")) == GOOD


def test_compressed_tars_give_the_same_set(raw_set, tmp_path):
    data = make_small_set(tmp_path / "data")
    for name, ending in (("coco", "tar.gz"), ("other", "tgz")):
        subprocess.run(["gzip", data / f"{name}.tar"], check=True)
        (data / f"{name}.tar.gz").rename(data / f"{name}.{ending}")
    for output, of in ((tmp_path / "packed", data), (tmp_path / "plain", raw_set)):
        assert run(of, output) == 0
        assert not (output / ".work").exists()
    assert read_shards(tmp_path / "packed") == read_shards(tmp_path / "plain")


def test_damaged_and_hostile_tars_are_named_and_what_is_sound_is_used(tmp_path, capsys):
    data, output = make_small_set(tmp_path / "data"), tmp_path / "shards"
    evil = {"/etc/passwd": b"x", "../up.jpg": b"x", "good.jpg": plain_jpeg(7), "last.jpg": b"y" * 900}
    write_tar(data / "evil.tar", evil)
    content = (data / "evil.tar").read_bytes()
    (data / "evil.tar").write_bytes(content[: content.index(b"yyyy") + 500])
    (data / "more.zip").write_bytes(b"PK")
    entries = json.loads((data / "cambrian737k.json").read_text(encoding="utf-8"))
    write_entries(data / "cambrian737k.json", [*entries, entry(99, image="good.jpg"), entry(98, image="last.jpg")])
    assert run(data, output) == 0
    said = capsys.readouterr().err
    assert "evil.tar: only the 1 members before its damage are used: cut short at byte" in said
    assert "members refused (absolute_path 1, cut_short 1, parent_path 1), by name in refused_members.jsonl" in said
    assert "Not read, only .tar, .tar.gz and .tgz are: more.zip" in said
    assert by_id(output)["id.99"]["jpg"] == plain_jpeg(7)
    stats = read_stats(output)
    assert stats["tars"]["evil.tar"]["members"] == 1 and "cut short" in stats["tars"]["evil.tar"]["damage"]
    assert stats["tars"]["coco.tar"] == {"members": 42, "refused": {}, "damage": ""}
    refused = [json.loads(line) for line in (output / "refused_members.jsonl").read_text().splitlines()]
    assert [(line["tar"], line["member"], line["reason"]) for line in refused] == [
        ("evil.tar", "/etc/passwd", "absolute_path"),
        ("evil.tar", "../up.jpg", "parent_path"),
        ("evil.tar", "last.jpg", "cut_short"),
    ]
    assert not list(tmp_path.parent.rglob("up.jpg"))
    assert run(data, tmp_path / "strict", "--strict") == 1
    assert not (tmp_path / "strict").exists() or not list((tmp_path / "strict").glob("pretrain*"))


# Splits


def images_of(entries: list[dict]) -> set[str]:
    return {item["image"] for item in entries if "image" in item}


def test_no_image_is_in_two_splits_and_sources_are_divided_alike(many, tmp_path):
    assert run(many, tmp_path / "shards") == 0
    splits = splits_of(tmp_path / "shards")
    assert sum(map(len, splits.values())) == 400
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not images_of(splits[one]) & images_of(splits[other])
    stats = read_stats(tmp_path / "shards")
    assert stats["splits"] == {name: len(items) for name, items in splits.items()}
    for source in ("a", "b", "c", "text"):
        shares = stats["sources"][source]["splits"]
        read = stats["sources"][source]["read"]
        assert abs(shares["train"] / read - 0.8) <= 0.03 and min(shares.values()) >= 0.07 * read, shares


def test_one_image_in_two_tars_is_in_one_split(tmp_path):
    data = tmp_path / "data"
    images = [plain_jpeg(number) for number in range(60)]
    data.mkdir()
    for name in "ab":
        write_tar(data / f"{name}.tar", {f"{name}/{number}.jpg": image for number, image in enumerate(images)})
    write_entries(data / "cambrian737k.json", [entry(n, image=f"{'ab'[n % 2]}/{n // 2}.jpg") for n in range(120)])
    assert run(data, tmp_path / "shards") == 0
    sides = {}
    for split, items in splits_of(tmp_path / "shards").items():
        for item in items:
            sides.setdefault(item["image"][2:], set()).add(split)
    assert len(sides) == 60 and all(len(found) == 1 for found in sides.values())


def test_another_split(many, tmp_path, capsys):
    assert run(many, tmp_path / "shards", "--split", "90, 5, 5") == 0
    assert "printf '18,1,1\\ny\\n11\\n' | " in capsys.readouterr().out
    stats = read_stats(tmp_path / "shards")
    assert (stats["split"], len(stats["shards"])) == ("18,1,1", 20)
    for split, wanted in (("train", 360), ("val", 20), ("test", 20)):
        assert abs(stats["splits"][split] - wanted) <= 2


def test_a_split_that_the_dialogue_would_cut_otherwise(many, tmp_path, capsys):
    assert run(many, tmp_path / "shards", "--split", "7,2,1") == 0
    assert "Next: run the same command with --energon-prepare" in capsys.readouterr().out


def test_weights_of_sources(many, tmp_path):
    assert run(many, tmp_path / "plain") == 0
    assert run(many, tmp_path / "shards", "--source-weight", "a=3", "b=0.5", "text=0") == 0
    plain, stats = read_stats(tmp_path / "plain"), read_stats(tmp_path / "shards")
    trained = {name: count["splits"]["train"] for name, count in plain["sources"].items()}
    found = {name: count["splits"]["train"] for name, count in stats["sources"].items()}
    assert (found["a"], found["c"], found["text"]) == (3 * trained["a"], trained["c"], 0)
    assert 0.3 * trained["b"] < found["b"] < 0.7 * trained["b"]
    assert (stats["copies"], stats["thinned"]) == (2 * trained["a"], trained["b"] - found["b"] + trained["text"])
    for split in ("val", "test"):
        assert stats["splits"][split] == plain["splits"][split]
    samples = read_shards(tmp_path / "shards")
    repeated = [key for key in samples if "-" in key]
    assert len(repeated) == stats["copies"]
    for key in repeated:
        assert samples[key] == samples[key.split("-")[0]]
    filtered = json.loads((tmp_path / "shards" / "cambrian737k_filtered.json").read_text())
    assert len(filtered) == 400 - stats["thinned"]


# Parts, limits, dry runs


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_in_any_order_are_one_set(many, tmp_path, order, capsys):
    options = ("--maxcount", "15")
    assert run(many, tmp_path / "whole", *options) == 0
    output, whole = tmp_path / "parts", all_files(tmp_path / "whole")
    for done, part in enumerate(order):
        assert len(list(output.glob("pretrain-*.tar"))) == 10 * done
        assert run(many, output, *options, "--part", f"{part}/3", workers=part % 2 * 2) == 0
        assert f"Part {part} of 3 done: 10 of 30 shards" in capsys.readouterr().out
        assert not (output / "stats.json").exists()
    assert run(many, output, *options) == 0
    assert "30 of 30 shards are finished already" in capsys.readouterr().out
    assert all_files(output) == whole


def test_parts_at_the_same_time(many, tmp_path):
    assert run(many, tmp_path / "whole") == 0
    output = tmp_path / "parts"
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *command(many, output, "--part", f"{part}/2")], stderr=subprocess.DEVNULL
        )
        for part in (1, 2)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    assert run(many, output) == 0
    assert all_files(output) == all_files(tmp_path / "whole")


FAKE_SBATCH = """#!/usr/bin/env bash
# Runs what it is given at once: the tasks of an array one after the other.
set -euo pipefail
echo "$STEP $*" >> "$SBATCH_LOG"
array=1-1
while [[ $1 == --* ]]; do case $1 in --array=*) array=${1#--array=};; esac; shift; done
for task in $(seq "${array%-*}" "${array#*-}"); do
  (cd "$SPOOL" && cp "$1" copy.sh && SLURM_ARRAY_TASK_ID=$task bash copy.sh "${@:2}" >> "$SBATCH_LOG" 2>&1)
done
echo "$((1000 + RANDOM));cluster"
"""


def test_an_array_of_slurm(many, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "spool").mkdir()
    sbatch, log = tmp_path / "bin" / "sbatch", tmp_path / "log"
    sbatch.write_text(FAKE_SBATCH)
    sbatch.chmod(0o755)
    output = tmp_path / "shards"
    environment = {
        **os.environ,
        "PATH": f"{sbatch.parent}:{os.environ['PATH']}",
        "SBATCH_LOG": str(log),
        "SPOOL": str(tmp_path / "spool"),
        "PARTS": "2",
        "PYTHON": sys.executable,
    }
    script = ["bash", str(SCRIPT.parent / "slurm" / "prepare_slurm.sh"), *command(many, output)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr + log.read_text()
    job = re.fullmatch(r"submitted: 2 parts as job (\d+), then job \d+ puts the counts together\n", done.stdout)[1]
    said = log.read_text()
    assert "--array=1-2" in said and f"--dependency=afterok:{job} " in said
    assert "Part 1 of 2 done: 5 of 10 shards" in said and "Part 2 of 2 done: 5 of 10 shards" in said
    assert run(many, tmp_path / "whole") == 0
    assert all_files(output) == all_files(tmp_path / "whole")


def test_limit(many, tmp_path):
    assert run(many, tmp_path / "shards", "--limit", "120") == 0
    assert read_stats(tmp_path / "shards")["read"] == 120
    assert {int(key) for key in read_shards(tmp_path / "shards")} == set(range(120))


def test_a_dry_run_says_everything_and_writes_nothing(raw_set, tmp_path, capsys):
    before = sorted(path.name for path in raw_set.rglob("*"))
    assert run(raw_set, tmp_path / "shards", "--dry-run") == 0
    said = capsys.readouterr().out
    for text in ("Keeping 55 of 65 conversations: 10 shards", "Samples: train ", "missing_media 2", "coco  "):
        assert text in said
    assert not (tmp_path / "shards").exists()
    assert sorted(path.name for path in raw_set.rglob("*")) == before
    assert run(raw_set, tmp_path / "shards", "--maxcount", "4") == 0
    files = all_files(tmp_path / "shards")
    assert run(raw_set, tmp_path / "shards", "--dry-run", "--seed", "3") == 0
    assert all_files(tmp_path / "shards") == files


def test_max_pixels_and_quality(many, tmp_path):
    assert run(many, tmp_path / "shards", "--max-pixels", "1000", "--jpeg-quality", "50", "--limit", "40") == 0
    stats = read_stats(tmp_path / "shards")
    assert stats["parts"]["images_downsized"] == 40 and stats["max_pixels"] == 1000
    assert run(many, tmp_path / "shards", "--max-pixels", "2000", "--jpeg-quality", "50", "--limit", "40") == 1


def test_strict_stops_at_the_first_finding(tmp_path, capsys):
    images = {f"{number}.jpg": plain_jpeg(number) for number in range(30)}
    entries = [entry(number, image=name) for number, name in enumerate(images)]
    findings = {
        "entry 12 of the metadata: needs repair: missing_placeholder": {"image": "1.jpg", "conversations": dialogue()},
        "entry 12 of the metadata: missing_media: gone.jpg": entry(12, image="gone.jpg"),
        "entry 12 of the metadata: duplicate_entry": entries[3],
        "entry 12 of the metadata: broken_image: broken.jpg": entry(12, image="broken.jpg"),
        "entry 12 of the metadata: needs repair: other_letter_case": entry(99, image="12.JPG"),
    }
    for number, (message, item) in enumerate(findings.items()):
        data = make_set(tmp_path / f"{number}", [*entries[:12], item, *entries[12:]], {**images, "broken.jpg": b"x"})
        for workers in (0, 2) if "broken.jpg" in message else (0,):
            fails_with(capsys, data, tmp_path / f"out{number}{workers}", message, "--strict", workers=workers)
    data = make_set(tmp_path / "good", entries, images)
    assert run(data, tmp_path / "shards", "--strict") == 0


def test_strict_on_a_complete_set_fails_as_it_would_have(raw_set, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(raw_set, output) == 0
    before = all_files(output)
    for _ in range(2):
        fails_with(capsys, raw_set, output, "--strict: ", "--strict")
    fails_with(capsys, raw_set, output, "skipped: broken_image 3, skipped: broken_video 2", "--strict")
    fails_with(capsys, raw_set, output, "repaired: other_letter_case 1", "--strict")
    (output / "stats.json").unlink()  # all shards are there, and none is read again
    fails_with(capsys, raw_set, output, "entry 15 of the metadata: unsafe_path", "--strict")
    assert run(raw_set, output) == 0
    assert all_files(output) == before
    images = {f"{number}.jpg": plain_jpeg(number) for number in range(20)}
    broken = [entry(number, image=name) for number, name in enumerate([*images, "broken.jpg"])]
    data = make_set(tmp_path / "broken", broken, {**images, "broken.jpg": b"x"})
    assert run(data, tmp_path / "other", "--split", "1,0,0") == 0
    (tmp_path / "other" / "stats.json").unlink()
    fails_with(capsys, data, tmp_path / "other", "skipped: broken_image 1", "--strict", "--split", "1,0,0")


@pytest.mark.parametrize("change", ["replaced", "added", "removed"])
def test_plain_files_are_looked_at_again(tmp_path, capsys, change):
    data, output = tmp_path / "data", tmp_path / "shards"
    (data / "folder").mkdir(parents=True)
    for number in range(10):
        (data / "folder" / f"{number}.jpg").write_bytes(plain_jpeg(number))
    write_entries(data / "cambrian737k.json", [entry(number, image=f"folder/{number}.jpg") for number in range(11)])
    assert run(data, output, "--split", "1,0,0") == 0
    before = all_files(output)
    assert run(data, output, "--split", "1,0,0") == 0
    assert "is complete, nothing is left to do" in capsys.readouterr().out
    if change == "removed":
        (data / "folder" / "3.jpg").unlink()
    else:
        (data / "folder" / ("3.jpg" if change == "replaced" else "10.jpg")).write_bytes(plain_jpeg(50))
    fails_with(capsys, data, output, "holds shards of another run (different: media)", "--split", "1,0,0")
    assert all_files(output) == before


# What it says


def test_what_it_says(raw_set, tmp_path):
    output = tmp_path / "my shards"
    script = [sys.executable, str(SCRIPT), *command(raw_set, output, workers=1)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    for text in (
        "Found 48 files in 2 tars",
        "Keeping 55 of 65 conversations: 10 shards of up to 6 samples",
        f"{output}/cambrian737k_filtered.json",
        "read 65 = written 50 + skipped 15 (broken_image 3, broken_video 2,",
        "other letter case 1",
        "Conversion done: 10 shards",
        f"prepare '{output}'",
    ):
        assert text in done.stdout, done.stdout
    assert "Processing images: 100%" in done.stderr
    assert not list(output.glob("*.tmp"))


def test_the_report_is_written_once(raw_set, tmp_path, capsys, monkeypatch):
    def write_report(output_dir: Path, say) -> Path:
        assert read_stats(output_dir)["complete"]
        with (output_dir / "report.html").open("x") as file:
            file.write("report")
        return output_dir / "report.html"

    monkeypatch.setattr(writing, "write_report", write_report)
    for said in (f"Report: {tmp_path / 'shards' / 'report.html'}", "is complete, nothing is left to do"):
        assert run(raw_set, tmp_path / "shards", report=True) == 0
        assert said in capsys.readouterr().out


def test_a_complete_set_is_left_alone(raw_set, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(raw_set, output) == 0
    files, times = all_files(output), {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    capsys.readouterr()
    assert run(raw_set, output) == 0
    assert "is complete, nothing is left to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == times
    (output / "pretrain-000004.tar").unlink()
    assert run(raw_set, output) == 0
    assert "9 of 10 shards are finished already" in capsys.readouterr().out
    assert all_files(output) == files


def test_a_set_that_was_begun_with_old_names_goes_on(raw_set, tmp_path, capsys):
    """Stats with the first names of reasons and counts, and the first name of a flag."""
    new, old = tmp_path / "new", tmp_path / "old"
    assert run(raw_set, new, "--check-images") == 0
    shutil.copytree(new, old)
    for path in [*old.glob("*.json"), old / "skipped.jsonl"]:
        for before, now in OLD_NAMES.items():
            path.write_text(path.read_text().replace(f'"{now}"', f'"{before}"'))
    assert "broken_clip" in (old / "stats.json").read_text()
    assert data_preparation.main(["--output-dir", str(old), "--verify", "--num-workers", "0"]) == 0
    assert "clip" not in capsys.readouterr().out
    for path in (old / SHARDS[0], old / "stats.json"):
        path.unlink()
    assert run(raw_set, old, "--check-pictures") == 0
    assert f"{len(SHARDS) - 1} of {len(SHARDS)} shards are finished already" in capsys.readouterr().out
    assert (old / "stats.json").read_bytes() == (new / "stats.json").read_bytes()
    assert (old / "skipped.jsonl").read_bytes() == (new / "skipped.jsonl").read_bytes()


def test_verify(raw_set, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(raw_set, output) == 0
    verify = ["--verify", "--output-dir", str(output), "--num-workers", "0"]
    assert data_preparation.main(verify) == 0
    assert "no problems" in capsys.readouterr().out
    shard = output / "pretrain-000003.tar"
    shard.write_bytes(shard.read_bytes().replace(b"Question", b"question"))
    assert data_preparation.main(verify) == 1
    assert "pretrain-000003.tar: " in capsys.readouterr().out


# Refusals


def fails_with(capsys, data: Path, output: Path, message: str, *options: str, workers: int = 0) -> None:
    capsys.readouterr()
    assert run(data, output, *options, workers=workers) == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("data_preparation.py: ")]
    assert len(errors) == 1 and message in errors[0], lines
    assert not any("Traceback" in line for line in lines)


def test_help_and_wrong_arguments(tmp_path, capsys):
    usual = ["--data-dir", "x", "--output-dir", "y"]
    for options, message in (
        ([], "--output-dir"),
        (["--output-dir", "y"], "required: --data-dir"),
        ([*usual, "--maxcount", "0"], "--maxcount must be at least 1, got 0"),
        ([*usual, "--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
        ([*usual, "--num-workers", "100000"], f"--num-workers must be at most {8 * os.cpu_count()} here"),
        ([*usual, "--seed", "1" * 65], "--seed must be from -9223372036854775807 to 9223372036854775807"),
        ([*usual, "--seed", str(-(2**63))], "--seed must be from"),
        ([*usual, "--limit", "0"], "--limit must be at least 1, got 0"),
        ([*usual, "--max-pixels", "0"], "--max-pixels must be at least 1, got 0"),
        ([*usual, "--jpeg-quality", "101"], "--jpeg-quality must be from 1 to 100, got 101"),
        ([*usual, "--split", "8,1"], "a split is three shares for train, val and test, like 8,1,1"),
        *(
            ([*usual, "--split", wrong], f"a split is three shares for train, val and test, like 8,1,1, not '{wrong}'")
            for wrong in ("8:1:1", "8,1,x", "1/0,1,1")
        ),
        ([*usual, "--source-weight", "coco"], "a weight is NAME=W"),
        ([*usual, "--part", "4/3"], "a part is I/N with I from 1 to N"),
        ([*usual, "--part", "1/2", "--force"], "--force with --part"),
        (["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)], "must not be or contain"),
        *(
            (
                ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path / name)],
                f"has {sign} in its path, which energon",
            )
            for name, sign in (("shards*", "*"), ("a[1]", "["), ("what?", "?"))
        ),
        (["--data-dir", str(tmp_path / "x"), "--output-dir", str(tmp_path)], "must not be or contain"),
    ):
        with pytest.raises(SystemExit) as caught:
            data_preparation.main(options)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ({"source": "gqa", "image": "coco/a.jpg"}, "gqa"),
        ({"dataset": "vg", "source": 3}, "vg"),
        ({"image": "./coco/train/a.jpg"}, "coco"),
        ({"images": ["coco/a.jpg", "gqa/a.jpg"]}, "coco"),
        ({"image": [], "video": "videos/a.mp4"}, "videos"),
        ({"image": "a.jpg"}, "no folder"),
        ({"image": "../coco/a.jpg"}, "no folder"),
        ({"image": {"path": "coco/a.jpg"}}, "coco"),
        ({"image": []}, "text"),
        ({"video": []}, "text"),
        ({"videos": []}, "text"),
        ({"image": [], "video": []}, "text"),
        ({"images": [], "videos": []}, "text"),
        ({"image": None, "video": []}, "text"),
        ({"messages": [{"content": [{"type": "image"}, {"type": "image", "image": "coco/a.jpg"}]}]}, "coco"),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "gqa/a.jpg"}}]}]}, "gqa"),
        ({"messages": [{"content": [{"type": "video", "video": ["videos/1.jpg"]}]}]}, "videos"),
        ({"messages": [3, {"content": [3, {"type": "image", "image": {}}]}], "image": []}, "text"),
        ({"messages": 3}, "text"),
        ({}, "text"),
        ([], "unknown"),
    ],
)
def test_sources_of_entries(entry, source):
    assert source_of(entry) == source


def test_help_is_quick_and_workers_are_light():
    """Nothing of what workers and --help import brings torch with it."""
    code = "import sys, data_preparation, dct_qwen2vl.preparation.verification; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_name_is_shown_beside_one_that_is_there(tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "shards"
    entries = [entry(number, image=f"coco/train2017/{number}.jpg") for number in range(30)]
    make_set(data, entries, {f"train2017/{number}.jpg": plain_jpeg(number) for number in range(30)})
    wanted = "coco/train2017/0.jpg is in no tar and no folder; there is train2017/0.jpg in media.tar"
    fails_with(capsys, data, output, f"(missing_media 30; the first skipped: {wanted})")
    (data / "media.tar").rename(data / "other.tar")
    write_tar(data / "other.tar", {"././a/b/one.jpg": plain_jpeg()})
    fails_with(capsys, data, output, "no folder; there is a/b/one.jpg in other.tar)")
    (data / "coco" / "train2017").mkdir(parents=True)
    (data / "coco" / "train2017" / "0.png").write_bytes(plain_jpeg())
    fails_with(capsys, data, output, "no folder; there is coco/train2017/0.png)")
    (data / "other.tar").unlink()
    (data / "coco" / "train2017" / "0.png").rename(data / "coco" / "train2017" / "a.jpg")
    fails_with(capsys, data, output, "no folder; there is coco/train2017/a.jpg)")


def test_a_name_within_a_folder_says_which_data_folder_would_fit(tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "shards"
    make_set(data, [entry(number, image=f"{number}.jpg") for number in range(30)], {})
    folder = data / "coco" / "train2017"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"{number}.jpg").write_bytes(plain_jpeg(number))
    remedy = f"if names begin in {folder}, give --data-dir {folder} and the whole path of --metadata"
    fails_with(capsys, data, output, f"0.jpg is in no tar and no folder; there is coco/train2017/0.jpg: {remedy})")
    metadata = next(data.glob("*.json"))
    assert run(folder, output, "--metadata", str(metadata.resolve())) == 0


def test_a_tar_stands_for_the_folder_of_its_name(tmp_path):
    data, output = tmp_path / "data", tmp_path / "shards"
    spellings = [f"coco/train2017/{number}.jpg" for number in range(20)] + [
        "coco\\train2017\\20.jpg",
        "coco/a%20b.jpg ",
    ]
    entries = [entry(number, image=name) for number, name in enumerate(spellings)]
    files = {f"train2017/{number}.jpg": plain_jpeg(number) for number in range(21)} | {"a b.jpg": plain_jpeg(99)}
    make_set(data, entries, files)
    (data / "media.tar").rename(data / "coco.tar")
    assert run(data, output) == 0
    stats = read_stats(output)
    assert (stats["written"], stats["skipped"], stats["repairs"]) == (22, {}, {"tar_as_folder": 22})
    assert list(stats["sources"]) == ["coco"]


def test_media_in_folders_alone_are_found_and_no_tars_are_counted(tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "shards"
    make_set(data, [entry(number, image=f"coco/{number}.jpg") for number in range(20)], {})
    (data / "media.tar").unlink(missing_ok=True)
    (data / "coco").mkdir()
    for number in range(20):
        (data / f"coco/{number}.jpg").write_bytes(plain_jpeg(number))
    assert run(data, output) == 0
    assert read_stats(output)["written"] == 20
    said = capsys.readouterr().out
    assert f"Found no tars: media are looked for in the folders of {data}\n" in said and "0 tars" not in said


def test_a_member_that_is_refused_is_not_said_to_be_nowhere(tmp_path):
    data, output = tmp_path / "data", tmp_path / "shards"
    names = [f"{number}.jpg" for number in range(20)]
    make_set(data, [entry(number, image=name) for number, name in enumerate([*names, "link.jpg", "b/c.jpg"])], {})
    write_tar(data / "media.tar", {name: plain_jpeg(number) for number, name in enumerate([*names, "/b/c.jpg"])})
    with tarfile.open(data / "media.tar", "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert run(data, output) == 0
    link, absolute = map(json.loads, (output / "skipped.jsonl").read_text().splitlines())
    assert link["detail"].startswith("link.jpg is refused in media.tar (link)")
    assert absolute["detail"] == "b/c.jpg is refused in media.tar (absolute_path)"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "it is a pointer of git-lfs: type git lfs pull in its folder",
        ),
        (b"PAR1", "it is Parquet: write its rows as JSON lines"),
        (b"\x1f\x8b\x08", "it is compressed: gunzip it"),
        ("[]".encode("utf-16"), "it is UTF-16: write it as UTF-8"),
        (b"id,question", "it begins with b'id,question'"),
        (b'{\n "data": []}', "is not JSON lines (an entry a line): Expecting"),
        (b'{"data": [1]}', "neither conversations nor messages is a list of turns; its fields are data"),
    ],
)
def test_what_lies_in_place_of_metadata_is_named(tmp_path, capsys, data, said):
    (tmp_path / "cambrian737k.json").write_bytes(data)
    fails_with(capsys, tmp_path, tmp_path / "shards", said)


def test_a_folder_in_place_of_frames_is_named(tmp_path, capsys):
    data = tmp_path / "data"
    make_set(data, [entry(0, video="clip/")], {})
    (data / "clip").mkdir()
    fails_with(capsys, data, tmp_path / "shards", "clip is a folder: name the files in it")


def test_names_of_what_is_no_readable_file_cost_their_entries_alone(tmp_path):
    data, output = tmp_path / "data", tmp_path / "shards"
    odd = {
        "m/loop.jpg": "m/loop.jpg is not readable (Too many levels of symbolic links)",
        "m/gone.jpg": "m/gone.jpg is a link to nowhere.jpg, which is not there",
        "m/pipe.jpg": "m/pipe.jpg is no file, but a pipe, a socket or a device",
        f"m/{'x' * 300}.jpg": "xxx is not readable (File name too long)",
    }
    names = [f"{number}.jpg" for number in range(12)]
    entries = [entry(number, image=name) for number, name in enumerate([*names, *odd])]
    make_set(data, entries, {name: plain_jpeg(number) for number, name in enumerate(names)})
    (data / "m").mkdir()
    (data / "m/loop.jpg").symlink_to("loop.jpg")
    (data / "m/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(data / "m/pipe.jpg")
    assert run(data, output) == 0
    skipped = [json.loads(line)["detail"] for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == len(odd) and all(said in detail for said, detail in zip(odd.values(), skipped)), skipped


def test_missing_or_unreadable_data(tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "shards"
    fails_with(capsys, data, output, "is not a folder")
    make_set(data, [entry(0)], {})
    fails_with(capsys, data, data / "cambrian737k.json", "is no folder; --output-dir takes the name of a folder")
    (data / "cambrian737k.json").unlink()
    fails_with(capsys, data, output, "holds no cambrian737k.json")
    (data / "pretrain-000000.stats.json").write_text("{}")
    fails_with(capsys, data, output, "holds shards that this tool has written: give --data-dir the raw data")
    (data / "pretrain-000000.stats.json").unlink()
    (data / "cambrian737k.json").write_text("[")
    fails_with(capsys, data, output, "is not a JSON list")
    (data / "cambrian737k.json").write_text("[]")
    fails_with(capsys, data, output, "holds no entries")
    assert not output.exists()
    write_entries(data / "cambrian737k.json", [entry(number, image="a.jpg") for number in range(30)])
    fails_with(
        capsys,
        data,
        output,
        "py: none of the 30 entries read can be used (missing_media 30; the first skipped: a.jpg is in no tar",
    )
    write_tar(data / "a.tar", {"a.jpg": plain_jpeg()})
    (data / "a.tar").write_bytes((data / "a.tar").read_bytes()[:1000])
    fails_with(capsys, data, output, "a.tar cannot be read as a tar")
    fails_with(capsys, data, output, "there is no metadata file x.json", "--metadata", "x.json")
    (data / "parts").mkdir()
    (data / "parts" / "1.jsonl").touch()
    said = "--metadata parts is a folder: name a file in it, as in --metadata parts/1.jsonl"
    fails_with(capsys, data, output, said, "--metadata", "parts")
    assert [path.name for path in output.iterdir()] == [".work"]


def test_too_few_samples_for_a_split(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    write_entries(data / "cambrian737k.json", [entry(number) for number in range(9)])
    fails_with(capsys, data, tmp_path / "shards", "the split 8,1,1 is cut by whole shards and needs 10 of them")
    write_entries(data / "cambrian737k.json", [entry(number) for number in range(10)])
    assert run(data, tmp_path / "shards") == 0
    write_entries(data / "cambrian737k.json", [entry(number) for number in range(9)])
    fails_with(capsys, data, tmp_path / "few", "add data, or put all of it into one split (--split 1,0,0)")
    assert run(data, tmp_path / "few", "--split", "1,0,0", "--energon-prepare") == 0
    fails_with(capsys, data, tmp_path / "other", "the sources are text", "--source-weight", "coco=2")


def times_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        None,
        lambda folder: os.utime(folder / SHARDS[0]),
        lambda folder: (folder / f"{SHARDS[3]}.idx").unlink(),
        lambda folder: (folder / ".nv-meta/dataset.yaml").write_text("__module__: megatron.energon\n"),
        lambda folder: (folder / ".nv-meta/split.yaml").write_text(json.dumps({"split_parts": {"train": SHARDS}})),
    ],
    ids=["nothing", "a later shard", "no index", "another data set", "another split"],
)
def test_metadata_is_made_again_only_where_it_must_be(raw_set, prepared, tmp_path, change, capsys):
    """Other runs may read the set in the meantime, and Energon would read all shards of it."""
    folder = Path(shutil.copytree(prepared, tmp_path / "shards"))
    if change:
        change(folder)
    made = times_of(folder / ".nv-meta")
    assert run(raw_set, folder, "--energon-prepare", workers=2) == 0
    assert "samples: train" in capsys.readouterr().out
    assert (times_of(folder / ".nv-meta") == made) == (change is None)
    for name in ("split.yaml", "dataset.yaml", ".info.yaml"):
        assert (folder / ".nv-meta" / name).read_bytes() == (prepared / ".nv-meta" / name).read_bytes()


def test_a_shard_whose_samples_are_all_broken(tmp_path, capsys):
    media = {"good.jpg": plain_jpeg(), "bad.jpg": b"bad"}
    data = make_set(
        tmp_path / "data", [*(entry(n) for n in range(40)), *(entry(40 + n, image="bad.jpg") for n in range(5))], media
    )
    found = [seed for seed in range(20) if run(data, tmp_path / f"{seed}", "--seed", str(seed), "--maxcount", "3") == 1]
    assert 0 < len(found) < 20
    said = capsys.readouterr().err
    assert "would be empty, for none of its samples can be used" in said and "try another --seed" in said


def test_a_few_entries_of_which_one_is_broken(tmp_path, capsys):
    entries = [*(entry(number) for number in range(9)), entry(9, image="bad.jpg")]
    data = make_set(tmp_path / "data", entries, {"bad.jpg": b"bad"})
    for seed in range(3):
        assert run(data, tmp_path / f"{seed}", "--seed", str(seed)) == 1
        said = capsys.readouterr().err
        assert "fewer and larger shards (one split: --split 1,0,0), add data, or repair what is broken" in said
    assert run(data, tmp_path / "shards", "--split", "1,0,0") == 0


def test_what_helps_against_an_empty_shard_is_what_has_not_been_done(tmp_path, capsys):
    entries = [entry(number, image=f"{number}.jpg") for number in range(4)]
    data = make_set(tmp_path / "data", entries, {f"{number}.jpg": b"bad %d" % number for number in range(4)})
    assert run(data, tmp_path / "one", "--split", "1,0,0") == 1
    said = capsys.readouterr()
    assert said.err.endswith("); add data, or repair what is broken\n") and "(fewer than" not in said.out
    assert run(data, tmp_path / "two", "--split", "1,0,0", "--maxcount", "2") == 1
    said = capsys.readouterr().err
    assert "fewer and larger shards (a larger --maxcount), try another --seed, add data" in said
    assert run(data, tmp_path / "four", "--split", "1,1,0", "--maxcount", "1") == 1
    assert "(a larger --maxcount, or one split: --split 1,0,0), add data" in capsys.readouterr().err


def test_the_folder_of_another_run_is_refused(raw_set, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(raw_set, output, *SMALL_SHARDS) == 0
    first = all_files(output)
    fails_with(capsys, raw_set, output, "another run (different: maxcount was 3, now is 4)", "--maxcount", "4")
    fails_with(capsys, raw_set, output, "split was 8,1,1, now is 18,1,1", *SMALL_SHARDS, "--split", "90,5,5")
    data = make_small_set(tmp_path / "data")
    write_tar(data / "new.tar", {"new.jpg": plain_jpeg()})
    fails_with(capsys, data, output, "different: media", *SMALL_SHARDS)
    write_entries(data / "cambrian737k.json", GOOD)
    fails_with(capsys, data, output, "different: metadata, media", *SMALL_SHARDS)
    assert all_files(output) == first


def test_a_set_of_another_version_is_refused(raw_set, tmp_path, capsys, monkeypatch):
    assert run(raw_set, tmp_path / "shards") == 0
    monkeypatch.setattr(fingerprint, "SET_VERSION", 1000)
    fails_with(capsys, raw_set, tmp_path / "shards", "another run (different: version)")


def test_force_replaces_only_what_the_tool_wrote(raw_set, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(raw_set, output, *SMALL_SHARDS) == 0
    first = all_files(output)
    (output / "notes.txt").write_text("mine")
    (output / "report.html").write_text("stale")
    (output / "report").mkdir()
    (output / "report" / "sizes.png").write_bytes(b"stale")
    (output / "report" / "notes.txt").write_text("mine")
    (output / "pretrain-000003.tar.idx").write_bytes(b"stale")
    (output / ".nv-meta").mkdir()
    (output / ".nv-meta" / "split.yaml").write_text("stale")
    assert run(raw_set, output, "--force") == 0
    assert (output / "notes.txt").read_text() == (output / "report" / "notes.txt").read_text() == "mine"
    assert not (output / ".nv-meta").exists() and not (output / "report.html").exists()
    assert [path.name for path in (output / "report").iterdir()] == ["notes.txt"]
    (output / "notes.txt").unlink()
    (output / "report" / "notes.txt").unlink()
    assert len(all_files(output)) == 2 * 10 + 4 < len(first)
    assert run(raw_set, output, "--force", *SMALL_SHARDS) == 0
    assert all_files(output) == first


@pytest.mark.parametrize("option", ["--force", "--limit=90"])
def test_what_killed_runs_left_is_cleared(raw_set, tmp_path, option):
    """By a run that writes the set again, and by one that finds it complete."""
    output = tmp_path / "shards"
    assert run(raw_set, output, "--limit=90") == 0
    before = all_files(output)
    for folder, name in ((".", "stats.json"), ("report", "sizes.png"), (".nv-meta", "split.yaml"), (".work", "x.tar")):
        (output / folder).mkdir(exist_ok=True)
        (output / folder / f"{name}.0123abcd.tmp").write_bytes(b"cut")
    (output / "report" / "notes.0123abcd.tmp").write_text("mine")
    assert run(raw_set, output, "--limit=90", option) == 0
    assert all_files(output) == before
    assert [path.name for path in output.rglob("*.tmp")] == ["notes.0123abcd.tmp"]
    assert not (output / ".work").exists()


def test_a_run_does_not_clear_what_another_is_writing(raw_set, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(raw_set, output) == 0
    written = output / "report.html.0123abcd.tmp"
    written.write_bytes(b"half")
    with locked(output / ".work" / "run.lock"):
        fails_with(capsys, raw_set, output, "another run is writing to")
    assert written.read_bytes() == b"half"


def test_force_leaves_other_shards_alone(raw_set, tmp_path, capsys):
    output = tmp_path / "shards"
    output.mkdir()
    (output / "pretrain-000000.tar").write_bytes(b"somebody's")
    fails_with(capsys, raw_set, output, "is not empty and holds no run of this tool; add --force")
    fails_with(capsys, raw_set, output, "which this tool did not write", "--force")
    (output / "pretrain-000000.tar").rename(output / "other.tar")
    fails_with(capsys, raw_set, output, "energon would take it for a shard", "--force")
    assert (output / "other.tar").read_bytes() == b"somebody's"
    (output / "other.tar").rename(output / "notes.txt")
    assert run(raw_set, output, "--force") == 0
    assert (output / "notes.txt").read_bytes() == b"somebody's"


def test_bad_data_are_seen_before_an_earlier_run_is_removed(raw_set, tmp_path, capsys):
    output, data = tmp_path / "shards", tmp_path / "data"
    assert run(raw_set, output) == 0
    before = all_files(output)
    data.mkdir()
    for text, message in (
        ("[1, 2", "not closed"),
        ("[]", "holds no entries"),
        ("[{}]", "none of the 1 entries read"),
    ):
        (data / "cambrian737k.json").write_text(text)
        fails_with(capsys, data, output, message, "--force")
        assert all_files(output) == before


# Energon


def energon_samples(output: Path, split: str) -> list[dict]:
    """The raw samples of one split, through Energon's own validation loader."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        get_loader,
        get_val_dataset,
    )

    class Reader(DefaultTaskEncoder):
        cookers = [Cooker(lambda sample: {**basic_sample_keys(sample), **sample})]  # noqa: RUF012 (Energon's own way)

        def encode_sample(self, sample):
            return sample

        def batch(self, samples):
            return samples

        def encode_batch(self, batch):
            return batch

    dataset = get_val_dataset(
        output,
        split_part=split,
        batch_size=1,
        task_encoder=Reader(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )
    return [sample for batch in get_loader(dataset) for sample in batch]


def test_energon_reads_back_every_sample_in_its_split(prepared):
    assert "auto_decode: false" in (prepared / ".nv-meta" / "dataset.yaml").read_text()
    intended, expected, found = splits_of(prepared), read_shards(prepared), {}
    for split, items in intended.items():
        samples = energon_samples(prepared, split)
        assert sorted(json.loads(sample["json"])["id"] for sample in samples) == sorted(item["id"] for item in items)
        found.update({sample["json"]: sample for sample in samples})
    assert len(found) == len(expected) == len(GOOD)
    for parts in expected.values():
        sample = found[parts["json"]]
        assert {name: sample[name] for name in parts} == parts


def test_the_dialogue_it_names_gives_exactly_the_splits(many, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(many, output, "--maxcount", "15") == 0
    said = capsys.readouterr().out.splitlines()
    dialogue_command = next(line for line in said if line.startswith("Next: ")).removeprefix("Next: ")
    assert "printf '8,1,1\\ny\\n11\\n' | " in dialogue_command
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", dialogue_command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Found 30 tar files in total" in done.stdout, done.stdout + done.stderr
    assert "CrudeWebdataset" in (output / ".nv-meta" / "dataset.yaml").read_text()
    splits = read_splits(output, ("train", "val", "test"))
    counts = {name: count_samples(output, shards) for name, shards in splits.items()}
    assert counts == read_stats(output)["splits"]
    for split, items in splits_of(output).items():
        ids = sorted(sample["json"]["id"] for sample in energon_samples(output, split))  # Energon decodes JSON here
        assert ids == sorted(item["id"] for item in items)
    assert shlex.split(dialogue_command)[-1] == str(output)
