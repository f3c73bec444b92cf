"""Training and evaluation on a card: types, averages, saves, several processes by NCCL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segmenter.data.datasets import open_dataset
from segmenter.evaluation.evaluate import evaluate
from segmenter.training.checkpoint import FINAL, write_yaml
from segmenter.training.distributed import Group
from segmenter.training.loop import train
from segmenter.weights.load import load_model
from tests.support.tiny_runs import differences, log_of, read_checkpoint, tiny_recipe

ROOT = Path(__file__).parents[2]
STILL = {"dropout": 0.0, "drop_path": 0.0, "decoder_dropout": 0.0}


def run(folder, name, device, **changes):
    output = folder / name
    outcome = train(tiny_recipe(folder, **changes), output, Group(device=device), progress=False)
    assert outcome.step == outcome.total
    losses = [line["loss"] for line in log_of(output) if "loss" in line]
    return torch.tensor(losses), read_checkpoint(output)


@pytest.mark.parametrize("impl", ["eager", "auto"])
@pytest.mark.parametrize("amp", ["none", "bfloat16", "float16"])
def test_trains_as_on_a_cpu(amp, impl, device, tmp_path):
    """The same six steps, within the rounding of the type; evaluation in it, too."""
    options = {**STILL, "class_weighting": 0.5, "clip_grad": 1.0, "optimizer": "adamw", "learning_rate": 1e-3}
    there, state = run(tmp_path, "there", device, amp=amp, impl=impl, **options)
    here, expected = run(tmp_path, "here", torch.device("cpu"), **options)
    same = 1 if amp == "float16" else 6  # float16 leaves out updates until it has found its scale
    torch.testing.assert_close(there[:same], here[:same], rtol=2e-3 if amp == "none" else 3e-2, atol=1e-3)
    assert there.isfinite().all()
    assert all(tensor.device.type == "cpu" for tensor in state["model"].values())  # as `load_state` reads them
    assert state["best"] == pytest.approx(expected["best"], abs=2 if amp == "none" else 30)


def test_goes_on_with_a_run(device, tmp_path, monkeypatch):
    """Three steps and three are six, with everything that is random; a card need not repeat the last bit."""
    recipe = tiny_recipe(tmp_path)
    straight = tmp_path / "straight"
    train(recipe, straight, Group(device=device), progress=False)
    halves = tmp_path / "halves"
    with monkeypatch.context() as patched:
        patched.setattr("segmenter.training.loop.Run._evaluate_if_due", _interrupt_at(3))
        with pytest.raises(InterruptedError):
            train(recipe, halves, Group(device=device), progress=False)
    assert read_checkpoint(halves)["step"] == 3
    train(recipe, halves, Group(device=device), progress=False)
    for part in ("model", "average"):
        for name, expected in read_checkpoint(straight)[part].items():
            torch.testing.assert_close(read_checkpoint(halves)[part][name], expected, rtol=1e-3, atol=1e-5)


def _interrupt_at(step):
    def due(self, log, bar):
        if self.step == step:
            raise InterruptedError
        return False

    return due


def test_scores_are_those_of_a_cpu(device, tmp_path):
    run(tmp_path, "run", device)
    dataset = open_dataset(tmp_path / "data", "val")
    here = evaluate(load_model(tmp_path / "run" / FINAL)[0], dataset)
    there = evaluate(load_model(tmp_path / "run" / FINAL, device=device)[0], dataset)
    assert there["aAcc"] == pytest.approx(here["aAcc"], abs=0.02)
    assert there["bF"] == pytest.approx(here["bF"], abs=0.05)


@pytest.mark.card
def test_a_process_of_torchrun_with_nccl(device, tmp_path):
    """One process by torchrun is as many as one card has room for; several need `torchrun` on several."""
    write_yaml(tmp_path / "recipe.yml", tiny_recipe(tmp_path, **STILL).to_dict())
    output = tmp_path / "torchrun"
    n = str(torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
    command += ["-m", "segmenter", "train", "--recipe", str(tmp_path / "recipe.yml"), "-o", str(output)]
    if int(n) > 2:
        pytest.skip("the batch of two cannot be shared by more than two cards")
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, env=os.environ)
    alone, state = run(tmp_path, "alone", device, **STILL)
    losses = [line["loss"] for line in log_of(output) if "loss" in line]
    torch.testing.assert_close(torch.tensor(losses), alone, rtol=2e-3, atol=1e-3)
    assert differences(read_checkpoint(output)["step"], state["step"]) == []
