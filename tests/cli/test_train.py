"""`segmenter train` on a tiny data set of one's own."""

import json

import pytest
import torch

from segmenter import load_model
from segmenter.classes import load_classes
from segmenter.cli import main
from segmenter.training.checkpoint import write_yaml
from segmenter.training.loop import Run
from tests.support.tiny_runs import tiny_recipe


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the data set, the model to start from, and one.yml, a recipe of one epoch."""
    folder = tmp_path_factory.mktemp("train")
    write_yaml(folder / "one.yml", tiny_recipe(folder, epochs=1).to_dict())
    return folder


@pytest.fixture
def argv(made, tmp_path):
    return ["train", "--recipe", str(made / "one.yml"), "-o", str(tmp_path / "run"), "--device", "cpu"]


def error_of(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("segmenter: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_ends_with_models_that_know_the_classes(argv, tmp_path, capsys):
    assert main(argv) == 0
    run = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "\n3 steps done, best mIoU on val " in printed and printed.endswith(f" -> {run}\n")
    for name in ("final", "best"):
        model, _ = load_model(run / name)
        assert load_classes(model.info.classes).names == ("road", "car", "person", "tree", "sky")
        assert not model.training and model.info.weights == "trained"
    labels = model.segment(torch.zeros(24, 32, 3, dtype=torch.uint8).numpy())
    assert labels.shape == (24, 32)
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 3]
    assert len(list((run / "overlays").glob("*.png"))) == 1


def test_flags_alone(made, tmp_path):
    settings = {"crop-size": 32, "epochs": 1, "batch-size": 5, "learning-rate": 0.02, "val-split": "none", "workers": 0}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    where = ["--data", str(made / "data"), "--model", str(made / "model"), "-o", str(tmp_path / "run")]
    assert main(["train", *where, *flags, "--device", "cpu"]) == 0
    assert {"final", "checkpoint.pth"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_loss_by_flag(argv, tmp_path, capsys):
    pytest.importorskip("segmentation_models_pytorch")
    assert main([*argv, "--loss", "cross_entropy + 0.5 dice(smooth=1) + 2 ohem", "--val-split", "none"]) == 0
    expected = "loss: cross_entropy by PyTorch in chunks + 0.5 dice(smooth=1.0) by segmentation_models_pytorch of all"
    assert expected in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["loss"] > 3 * 1.5 for line in lines), "cross-entropy of 5 classes is 1.6"


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--loss", "cross_entropy + dise"], 2, "loss 'dise' is unknown; choose of cross_entropy, ohem, dice"),
        (["--optimizer", "adam"], 2, "optimizer 'adam' is unknown"),
        (["--recipe", "nothing.yml"], 2, "nothing.yml: cannot be read"),
        (["--data", "nowhere"], 1, "nowhere: no such folder"),
        (["--split", "trian"], 1, "has no split 'trian'"),
        (["--model", "nothing.pth"], 4, "nothing.pth"),
        (["--learning-rate", "1e-9"], 2, "min_lr 1e-05 is above the smallest learning rate"),
        (["--device", "abacus"], 5, "device 'abacus' cannot be used here"),
    ],
)
def test_errors_are_one_line(argv, capsys, flags, status, message):
    assert main([*argv, *flags]) == status
    assert message in error_of(capsys)


def test_usage(capsys):
    assert main(["train", "-o", "run", "--epochs", "many"]) == 2
    assert "--epochs" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(argv, capsys, monkeypatch):
    begin = Run.run

    def broken(self, *args):
        with torch.no_grad():
            self.model.decoder.proj_dec.weight.fill_(float("nan"))
        return begin(self, *args)

    monkeypatch.setattr(Run, "run", broken)
    assert main(argv) == 1
    message = error_of(capsys)
    assert "the loss is nan at step 0, of the samples train_" in message and "learning_rate" in message


def test_other_settings_in_the_folder_of_a_run(argv, tmp_path, capsys):
    assert main([*argv, "--val-split", "none"]) == 0
    assert main([*argv, "--val-split", "none", "--seed", "3"]) == 4
    assert "other settings (seed 0 -> 3)" in error_of(capsys)
