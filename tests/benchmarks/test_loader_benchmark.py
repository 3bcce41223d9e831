"""The measures of the loader and of whole runs: real videos in pieces, stages, figures of a run."""

import argparse
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import loader, training_run
from benchmarks.speed.real_videos import cut_videos
from dct_qwen2vl.common.scripts import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, natural_frames, video_file) -> Path:
    """A video of 11 frames at 2 frames a second, one of 3 frames, and a text."""
    made = tmp_path_factory.mktemp("videos")
    (made / "long.mp4").write_bytes(video_file(natural_frames(11, 112, 169 // 2 * 2), rate=2))
    (made / "short.mp4").write_bytes(video_file(natural_frames(3, 112, 112), rate=2))
    (made / "notes.txt").write_text("no video")
    return made


def frames_of(path: Path) -> tuple[str, float, list[np.ndarray]]:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream.codec_context.name, float(stream.average_rate), frames


def test_pieces_are_h264_of_the_same_rate_and_content(folder, tmp_path):
    pieces = cut_videos(folder, tmp_path, seconds=2)
    assert [piece.name for piece in pieces] == ["long.mp4-0000.mp4", "long.mp4-0001.mp4", "short.mp4-0000.mp4"]
    read = [frames_of(piece) for piece in pieces]
    assert [(codec, rate, len(frames)) for codec, rate, frames in read] == [
        ("h264", 2, 4),
        ("h264", 2, 4),
        ("h264", 2, 3),
    ]
    whole = frames_of(folder / "long.mp4")[2]
    for start, (_, _, frames) in zip((0, 4), read):
        difference = np.stack(frames).astype(float) - np.stack(whole[start : start + 4])
        assert np.square(difference).mean() < 30


def test_a_folder_without_videos_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(UserError, match=r"has no video \(mp4, .*name a folder"):
        cut_videos(tmp_path, tmp_path, seconds=2)


def test_a_stage_does_not_count_the_stages_inside_it():
    stages = loader.Stages()

    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    inner = stages.timed("inner", work)

    def outer() -> None:
        inner(0.2)
        work(0.1)
        inner(0.2)

    stages.timed("outer", outer)()
    assert stages.seconds["inner"] == pytest.approx(0.4, abs=0.05)
    assert stages.seconds["outer"] == pytest.approx(0.1, abs=0.05)


def test_workers_are_those_whose_tokens_the_gpu_trains():
    """100 samples a second of 1,000 tokens; a process makes 10 a second."""
    assert loader.workers({"tokens": 1000, "total": 100}, gpu_tokens=100_000) == pytest.approx(10 * loader.SPARE)


def options(*given: str) -> argparse.Namespace:
    return training_run.new_parser().parse_args(given)


def test_figures_are_means_over_the_time_past_the_warm_up():
    line = {"loss": 1.0, "samples": 4, "visual_tokens": 100, "kept_share": 0.25, "mfu": 0.4, "peak_memory_gib": 9.0}
    slow, fast = (line | {"seconds": s, "data_wait_share": w} for s, w in ((3.0, 0.0), (1.0, 0.4)))
    found = training_run.figures(
        [{**slow, "seconds": 50.0, "data_wait_share": 0.5}] * training_run.WARM_UP + [slow, fast],
        training_run.WARM_UP,
    )
    assert found["samples_per_second"] == 2 and found["visual_tokens_per_second"] == 50
    assert found["data_wait_share"] == pytest.approx(0.1) and found["first_wait_seconds"] == 25
    assert found["kept_share"] == pytest.approx(0.25) and found["steps"] == 2


def test_a_run_without_skipping_keeps_all_cells():
    line = {"samples": 4, "visual_tokens": 100, "seconds": 1.0, "data_wait_share": 0.0}
    found = training_run.figures([line] * 7, 6)
    assert found["kept_share"] == 1 and found["mfu"] == 0


def test_real_videos_are_bounded_and_drawn_ones_are_not(tmp_path):
    drawn, real = (
        training_run.settings_of(options(*given), tmp_path, tmp_path, tmp_path)
        for given in ([], ["--videos", "mine", "--num-workers", "14"])
    )
    assert "MAXPIXELS" not in drawn and real["MAXPIXELS"] == str(448 * 448)
    assert (drawn["NUM_WORKERS"], real["NUM_WORKERS"]) == ("8", "14") and real["ENGINE"] == "megatron"


def test_a_layout_is_that_of_the_launch_and_divides_the_gpus(tmp_path):
    layout = ["--gpus", "4", "--tensor-parallel", "2", "--pipeline-parallel", "2"]
    settings = training_run.settings_of(options(*layout), tmp_path, tmp_path, tmp_path)
    assert (settings["TP"], settings["PP"]) == ("2", "2")
    with pytest.raises(UserError, match="--gpus 1 4: a copy of the model takes 4 GPUs, give multiples"):
        training_run.check_devices(options(*layout, "--gpus", "1", "4"))
    training_run.check_devices(options(*layout, "--tiny"))


def test_a_launch_with_skipping_has_a_folder_of_its_own(tmp_path, monkeypatch):
    launched = []

    def run(command, **environment):
        launched.append(environment)
        run_dir = Path(environment["OUTPUT_DIR"]) / environment["EXPERIMENT_NAME"]
        run_dir.mkdir()
        line = (
            '{"loss": 1, "samples": 1, "visual_tokens": 8, "seconds": 1, "data_wait_share": 0.02, "kept_share": 0.5}\n'
        )
        (run_dir / "metrics.jsonl").write_text(line * 6 + '{"val_loss": 1}\n')

    monkeypatch.setattr(training_run, "run", run)
    arguments = options("--skip-db", "38", "--gpus", "2")
    settings = training_run.settings_of(arguments, tmp_path, tmp_path, tmp_path)
    first, second = (training_run.launch(arguments, settings, 2, skip_db) for skip_db in (0.0, 38.0))
    assert [each["SKIP_DB"] for each in launched] == ["0.0", "38.0"] and {each["GBS"] for each in launched} == {"8"}
    assert [each["EXPERIMENT_NAME"] for each in launched] == ["gpus2", "gpus2-skip"]
    assert second["kept_share"] == 0.5 and "50% of the cells" in training_run.described(second, first)
    assert "data wait 2.0% (0 s before the first step)" in training_run.described(first, first)


@pytest.mark.parametrize("given", [["--steps", "5"], []])
def test_what_cannot_work_is_refused(given, capsys):
    if given:
        with pytest.raises(SystemExit):
            training_run.main(given)
        assert "--uncounted must be at least 5 and under --steps, got 5 and 5" in capsys.readouterr().err
    else:
        assert training_run.main(["--gpus", "64"]) == 1
        assert "CUDA devices, not 64: lower --gpus, or try the command with --tiny" in capsys.readouterr().err


def test_the_loader_is_measured_with_and_without_skipping(folder, capsys):
    arguments = ["--videos", str(folder), "--video-seconds", "2", "--files", "40", "--samples", "8", "--rounds", "1"]
    assert loader.main([*arguments, "--packing-buffer", "4", "--pack-tokens", "256"]) == 0
    printed = capsys.readouterr().out
    whole, skipping = printed.split("all cells: ")[1].split("skipping at 38 dB: ")
    assert "100% of the cells" in whole and "encoded 1.00 times" in whole and "held 0 MiB" in whole
    for stage in ("decode", "resize", "DCT", "rule", "keep"):
        assert float(skipping.split(f"{stage} ")[1].split(",")[0].split(")")[0]) > 0, stage
    assert "encoded 1.00 times" in skipping
