"""The benchmark of attention's gradients where all scores are low."""

import json

import torch
from torch.nn.attention import SDPBackend

from benchmarks.speed import low_scores


def test_scores_lie_near_the_one_asked_for():
    query, key, _ = low_scores.make_parts(32, 80, -100.0, 2, 2, 0, "cpu")
    scores = query.float() @ key.float().transpose(-1, -2) * 80**-0.5
    assert abs(scores.mean() + 100) < 1 and scores.max() < -90


def test_gradients_do_not_depend_on_what_all_scores_share():
    parts = low_scores.make_parts(16, 8, -50.0, 1, 2, 0, "cpu")
    free = (*(part.clone() for part in parts),)
    free[0][..., 0] = 0
    upstream = torch.randn_like(parts[0])
    for place in (0, 2):
        found, expected = (
            low_scores.gradients(tuple(part.float() for part in given), upstream, SDPBackend.MATH)[place]
            for given in (parts, free)
        )
        torch.testing.assert_close(found[..., 1:], expected[..., 1:], rtol=1e-3, atol=1e-4)


def test_a_gradient_that_is_no_number_is_told(monkeypatch):
    whole = low_scores.gradients

    def broken(parts, upstream, kernel):
        found = whole(parts, upstream, SDPBackend.MATH)
        if kernel == SDPBackend.FLASH_ATTENTION:
            found[0][0, 1, 3, 2] = torch.nan
        return found

    monkeypatch.setattr(low_scores, "gradients", broken)
    parts = low_scores.make_parts(16, 8, 0.0, 2, 2, 0, "cpu")
    assert low_scores.compare(parts, SDPBackend.FLASH_ATTENTION)["bad"] == 0.25
    assert low_scores.compare(parts, SDPBackend.MATH)["bad"] == 0


def test_figures_are_printed_and_written(tmp_path, capsys):
    words = ["--lengths", "16", "--widths", "32", "--scores", "0", "-100", "--samples", "1", "--heads", "2"]
    assert low_scores.main([*words, "--json", str(tmp_path / "low.json")]) == 0
    lines = json.loads((tmp_path / "low.json").read_text())["lines"]
    assert [line["score"] for line in lines] == [0, -100]
    for line in lines:
        assert line["math"]["bad"] == 0 and line["math"]["error"] < 0.02
        assert torch.cuda.is_available() or line["cudnn"] is None
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and (torch.cuda.is_available() or "not there" in printed[2])
