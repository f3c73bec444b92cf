"""Training that is killed, stopped or shared by processes ends with the very weights of training that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segmenter.data.augment import Augmentation
from segmenter.data.datasets import open_dataset
from segmenter.data.loader import Steps, TrainingSamples, load_batches
from segmenter.training.checkpoint import BEST, FINAL, write_yaml
from segmenter.training.loop import train
from tests.support import dying_runs
from tests.support.data_sets import SIZE, save
from tests.support.processes import torchrun
from tests.support.tiny_runs import differences, read_checkpoint, tiny_recipe

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
ROOT = Path(__file__).parents[2]
SHARED = {"dropout": 0.0, "drop_path": 0.0, "decoder_dropout": 0.0, "epochs": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """folder; recipes by name; statuses: how the processes of each run of `tests.support.dying_runs` ended."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {
        "killed": tiny_recipe(folder, save_minutes=0),
        "half": tiny_recipe(folder, save_minutes=0),
        "terminated": tiny_recipe(folder, workers=2),
        "pair": tiny_recipe(folder, **SHARED, accumulate=2),
        "pair_terminated": tiny_recipe(folder, **{**SHARED, "epochs": 4}),
        "pair_bad": tiny_recipe(folder / "bad", **SHARED),
    }
    (folder / "bad/data/images/train/train_2.png").write_bytes(b"no image")
    few = np.full(SIZE, 255, np.uint8)
    few[:4] = 2
    save(folder / "data/annotations/train/train_0.png", few)
    for name, recipe in recipes.items():
        write_yaml(folder / f"{name}.yml", recipe.to_dict())
    command = [sys.executable, "-m", "tests.support.dying_runs", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    statuses = json.loads((folder / "statuses.json").read_text())
    return SimpleNamespace(folder=folder, recipes=recipes, statuses=statuses, output=result.stdout + result.stderr)


@pytest.fixture(scope="module")
def straight(runs):
    """The checkpoint of the same training in one go."""
    outcome = train(tiny_recipe(runs.folder), runs.folder / "straight", progress=False)
    assert outcome.step == outcome.total == 6
    return read_checkpoint(runs.folder / "straight")


def go_on(runs, name):
    outcome = train(runs.recipes[name], runs.folder / name, progress=False)
    assert (outcome.step, outcome.stopped) == (outcome.total, False)
    return read_checkpoint(runs.folder / name)


def steps_logged(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line], [line["step"] for line in lines if "val_mIoU" in line]


def same_files(a, b, *names):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_three_steps_a_kill_and_three_are_six(runs, straight):
    assert runs.statuses["killed"] == [-9]
    assert read_checkpoint(runs.folder / "killed")["step"] == 3
    assert differences(read_checkpoint(runs.folder / "killed"), straight), "the steps that are left change something"
    assert differences(go_on(runs, "killed"), straight) == []
    weights = [f"{name}/model.safetensors" for name in (BEST, FINAL)]
    assert same_files(runs.folder / "killed", runs.folder / "straight", *weights)
    assert steps_logged(runs.folder / "killed") == ([1, 2, 3, 4, 5, 6], [3, 6])


def test_a_kill_in_the_middle_of_a_save_loses_the_steps_since_the_last_one_and_nothing_else(runs, straight):
    assert runs.statuses["half"] == [-9]
    output = runs.folder / "half"
    assert len(list(output.glob(".*.tmp"))) == 1, "what was written of step 5"
    assert read_checkpoint(output)["step"] == 4
    assert steps_logged(output)[0] == [1, 2, 3, 4, 5]
    assert differences(go_on(runs, "half"), straight) == []
    assert list(output.rglob(".*.tmp")) == []
    assert steps_logged(output) == ([1, 2, 3, 4, 5, 6], [3, 6]), "step 5 once"


def test_a_signal_to_all_processes_saves_and_ends(runs, straight):
    """With two processes that read samples, and which the signal reaches too; the rest is done without them."""
    assert runs.statuses["terminated"] == [143], runs.output
    assert read_checkpoint(runs.folder / "terminated")["step"] in (2, 3)
    assert not (runs.folder / "terminated" / FINAL).exists()
    assert differences(go_on(runs, "terminated"), straight) == []


def test_two_processes_train_as_one_does(runs):
    """In two parts each, with gradients that one has much more pixels for: a mean of their means would be another."""
    assert runs.statuses["pair"] == [0, 0], runs.output
    assert "strides" not in runs.output, "DistributedDataParallel copies gradients that lie otherwise than parameters"
    alone = runs.folder / "alone"
    train(tiny_recipe(runs.folder, **SHARED), alone, progress=False)
    ours, theirs = read_checkpoint(runs.folder / "pair"), read_checkpoint(alone)
    assert ours["step"] == theirs["step"] == 2
    for part in ("model", "average"):
        for name, expected in theirs[part].items():
            torch.testing.assert_close(ours[part][name], expected, rtol=1e-4, atol=2e-6, msg=f"{part} {name}")
    moments = [[state["momentum_buffer"] for state in c["optimizer"]["state"].values()] for c in (ours, theirs)]
    assert max(moment.abs().max() for moment in moments[1]) > 1e-3
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)
    logs = [
        [json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (runs.folder / "pair", alone)
    ]
    for a, b in zip(*logs, strict=True):
        for name in a.keys() & {"loss", "grad_norm", "val_pictures", "val_aAcc"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_the_two_processes_have_different_numbers_of_pixels_that_count(runs):
    """Without which the test above would show little."""
    dataset = open_dataset(runs.recipes["pair"].data)
    augmentation = Augmentation(crop_size=32, im_size=32)
    samples = TrainingSamples(dataset, augmentation, 0)
    counts = []
    for rank in range(2):
        batches = load_batches(samples, Steps(len(dataset), 4, 0, 0, 2, rank, 2))
        counts.append([int((batch.labels != 255).sum()) for batch in batches])
    assert any(max(pair) > 1.4 * min(pair) for pair in zip(*counts, strict=True)), counts


def test_a_signal_to_one_process_stops_both_at_the_same_step(runs):
    assert runs.statuses["pair_terminated"] == [143, 143], runs.output
    assert read_checkpoint(runs.folder / "pair_terminated")["step"] < 8
    assert runs.output.count("stopped and saved after step") == 2, (
        "this run and the one above, told by one process each"
    )


def test_a_sample_that_one_process_cannot_read_ends_both(runs):
    assert runs.statuses["pair_bad"] == [1, 1]
    assert "train_2.png" in runs.output
    assert "another process" in runs.output


@pytest.mark.more
def test_torchrun_starts_the_same(runs):
    output = runs.folder / "torchrun"
    recipe = str(runs.folder / "pair.yml")
    torchrun("-m", "segmenter", "train", "--recipe", recipe, "-o", str(output), "--device", "cpu")
    assert differences(read_checkpoint(output), read_checkpoint(runs.folder / "pair")) == []


def test_every_run_is_looked_at(runs):
    assert runs.statuses.keys() == runs.recipes.keys() == dying_runs.RUNS.keys()
