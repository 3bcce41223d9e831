"""The comparison of `make compat`, with the environment's own transformers; other versions need a package index."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.compat import compare_versions
from benchmarks.compat.compare_versions import CASES, MOST, answers, line_of, make_checkpoints, verdict, write_reference


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The two forms of a model, and the reference."""
    folder = tmp_path_factory.mktemp("compat")
    forms = make_checkpoints(folder)
    write_reference(forms["coefficients"], folder / "reference.safetensors")
    return forms, folder / "reference.safetensors"


@pytest.fixture(scope="module")
def found(made, tmp_path_factory) -> dict[str, dict]:
    """What one process says of the stock form, of an empty folder and of the coefficient form."""
    forms, reference = made
    folders = {"stock": forms["stock"], "nothing": tmp_path_factory.mktemp("nothing"), **forms}
    return dict(zip(folders, answers(None, folders.values(), reference), strict=True))


@pytest.mark.parametrize("form", ["stock", "coefficients"])
def test_both_forms_have_the_reference_s_logits(found, form):
    assert verdict(found[form], form) == "equal", found
    assert list(found[form]) and set(found[form]) == set(CASES)


def test_a_checkpoint_that_cannot_be_read_is_an_error(found):
    assert "error" in found["nothing"]


def test_other_logits_are_seen(made, tmp_path):
    forms, reference = made
    with safe_open(reference, "pt") as file:
        tensors, told = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["image.logits"][-1, 7] += 3 * MOST * tensors["image.logits"].abs().max()
    tensors["video.input_ids"][0, 0] += 1
    save_file(tensors, tmp_path / "other.safetensors", metadata=told)
    (found,) = answers(None, [forms["stock"]], tmp_path / "other.safetensors")
    assert 2 * MOST < found["image"] < 4 * MOST and found["video"] == float("inf") and found["text"] <= MOST
    assert verdict(found, "stock") == "WRONG" and "WRONG" in line_of("4.51.3", "stock", found)


def test_verdicts():
    equal = dict.fromkeys(CASES, 0.0)
    refused = {"error": "ValueError: serve the model that python convert_checkpoint.py --to stock writes"}
    assert verdict(equal, "stock") == verdict(equal, "coefficients") == "equal"
    assert verdict({**equal, "video": 2 * MOST}, "stock") == "WRONG"
    assert verdict({"text": 0.0}, "stock") == "WRONG"
    assert verdict(refused, "coefficients") == "refused" and verdict(refused, "stock") == "WRONG"
    assert verdict({"error": "KeyError: 'size'"}, "coefficients") == "WRONG"


def test_unknown_versions_are_refused(capsys):
    with pytest.raises(SystemExit):
        compare_versions.main(["4.0.0"])
    assert "no pins for transformers 4.0.0" in capsys.readouterr().err


def test_reference_holds_what_it_says(made):
    with safe_open(made[1], "pt") as file:
        told = {name: json.loads(text) for name, text in file.metadata().items()}
        assert torch.isfinite(file.get_tensor("video.logits")).all()
    assert {name: (case["images"], case["videos"]) for name, case in told.items()} == {
        name: (len(images), len(videos)) for name, (images, videos) in CASES.items()
    }
