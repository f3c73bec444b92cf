"""Whole training runs in one process: what they leave, how they go on, what they say."""

import dataclasses
import math
import os
import signal
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter.data.datasets import DataError, open_dataset
from segmenter.training import checkpoint as files
from segmenter.training.distributed import Group
from segmenter.training.loop import Run, train
from segmenter.training.recipe import Recipe, RecipeError
from segmenter.weights.load import load_model
from segmenter.weights.read import CheckpointError
from tests.support.data_sets import make_data_set, save
from tests.support.tiny_runs import N, differences, log_of, read_checkpoint, tiny_recipe, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def done(folder):
    """One epoch with an evaluation after it: outcome and folder."""
    return train(tiny_recipe(folder, epochs=1), folder / "done", progress=False), folder / "done"


class TestWholeRuns:
    def test_what_is_left(self, done, folder):
        outcome, output = done
        assert (outcome.step, outcome.total, outcome.stopped) == (3, 3, False)
        names = {path.name for path in output.iterdir()}
        assert names == {"checkpoint.pth", "variant.yml", "recipe.yml", "log.jsonl", "best", "final", "overlays"}
        ((overlay),) = (output / "overlays").iterdir()
        with Image.open(overlay) as image:
            assert overlay.name == "0000003_val_0.png" and image.width >= 3 * 32 and image.height >= 24
        steps, scores = log_of(output)[:-1], log_of(output)[-1]
        assert [line["step"] for line in steps] == [1, 2, 3] and [line["epoch"] for line in steps] == [0, 0, 1]
        assert all(line["loss"] > 0 and line["lr"] > 0 and line["grad_norm"] > 0 and line["bad"] == 0 for line in steps)
        assert scores["val_pictures"] == N and scores["val_mIoU"] == outcome.best and len(scores["val_IoU"]) == 5

    def test_the_average_is_what_is_kept(self, done):
        _, output = done
        checkpoint = read_checkpoint(output)
        average = {n.removeprefix("module."): t for n, t in checkpoint["average"].items() if n != "n_averaged"}
        for name in ("final", "best"):
            model, variant = load_model(output / name)
            assert differences(weights(model), average) == []
        assert differences(average, checkpoint["model"])
        assert model.info.weights == "trained" and (model.info.window_size, model.info.window_stride) == (32, 32)

    def test_a_checkpoint_is_a_model_too(self, done):
        model, _ = load_model(done[1] / files.CHECKPOINT)
        assert differences(weights(model), read_checkpoint(done[1])["model"]) == []

    def test_a_finished_run_is_not_trained_again(self, done, folder):
        before = read_checkpoint(done[1])
        again = train(tiny_recipe(folder, epochs=1), done[1], progress=False)
        assert again == done[0]
        assert differences(read_checkpoint(done[1]), before) == [] and len(log_of(done[1])) == 4

    def test_other_settings_are_another_run(self, done, folder):
        with pytest.raises(CheckpointError, match=r"other settings \(learning_rate 0\.02 -> 0\.5, seed 0 -> 1\)"):
            train(tiny_recipe(folder, epochs=1, learning_rate=0.5, seed=1), done[1], progress=False)
        free = {"workers": 1, "accumulate": 2, "log_steps": 3, "save_minutes": 1.0, "overlays": 0, "eval_freq": 5}
        assert train(tiny_recipe(folder, epochs=1, **free), done[1], progress=False) == done[0]

    def test_other_images_are_another_run(self, done, tmp_path):
        make_data_set(tmp_path / "more", n=7)
        recipe = dataclasses.replace(tiny_recipe(done[1].parent, epochs=1), data=str(tmp_path / "more"))
        with pytest.raises(CheckpointError, match="its run has 3 steps, but 7 images make 4"):
            train(recipe, done[1], progress=False)

    def test_goes_on_without_what_it_started_from(self, tmp_path):
        recipe = tiny_recipe(tmp_path, epochs=1, class_weighting=0.5)
        first = train(recipe, tmp_path / "run", progress=False)
        (tmp_path / "model").rename(tmp_path / "elsewhere")
        assert train(recipe, tmp_path / "run", progress=False) == first
        assert read_checkpoint(tmp_path / "run")["class_weights"].sum() == pytest.approx(5)

    def test_goes_on_past_a_sample_that_stopped_it(self, tmp_path, capfd):
        recipe = tiny_recipe(tmp_path, val_split=None, save_minutes=0.0)
        bad = tmp_path / "data/images/train/train_2.png"
        bad.write_bytes(b"no image")
        with pytest.raises(DataError, match="train_2.png"):
            train(recipe, tmp_path / "run", progress=False)
        outcome = train(dataclasses.replace(recipe, bad_samples="skip"), tmp_path / "run", progress=False)
        assert outcome.step == outcome.total == 6
        assert capfd.readouterr().err.count("left out: ") == 1, "once, though it was met twice"

    def test_a_signal_is_noticed_before_an_evaluation(self, tmp_path, monkeypatch):
        recipe = tiny_recipe(tmp_path)
        step = Run.training_step

        def signalled(self, batch):
            facts = step(self, batch)
            if self.step == 3:  # the end of an epoch
                os.kill(os.getpid(), signal.SIGTERM)
            return facts

        monkeypatch.setattr(Run, "training_step", signalled)
        outcome = train(recipe, tmp_path / "run", progress=False)
        assert (outcome.step, outcome.stopped, outcome.best) == (3, True, None)
        monkeypatch.undo()
        train(recipe, tmp_path / "run", progress=False)
        assert [line["step"] for line in log_of(tmp_path / "run") if "val_mIoU" in line] == [3, 6], "none is left out"

    def test_what_goes_wrong_in_an_evaluation_loses_no_step(self, tmp_path):
        recipe = tiny_recipe(tmp_path)
        label = tmp_path / "data/annotations/val/val_2.png"
        good = label.read_bytes()
        label.write_bytes(b"no image")
        with pytest.raises(DataError, match="val_2.png"):
            train(recipe, tmp_path / "run", progress=False)
        assert read_checkpoint(tmp_path / "run")["step"] == 3
        label.write_bytes(good)
        assert train(recipe, tmp_path / "run", progress=False).step == 6
        assert [line["step"] for line in log_of(tmp_path / "run") if "val_mIoU" in line] == [3, 6]

    def test_without_progress_nothing_is_printed(self, tmp_path, capfd):
        train(tiny_recipe(tmp_path, epochs=1), tmp_path / "run", progress=False)
        assert "".join(capfd.readouterr()) == ""

    def test_a_data_set_without_val(self, tmp_path):
        recipe = tiny_recipe(tmp_path, val_split="weekend")
        with pytest.raises(DataError, match="has no split 'weekend'.*val_split none trains without evaluation"):
            train(recipe, tmp_path / "run", progress=False)

    def test_a_damaged_checkpoint_is_named(self, folder, tmp_path):
        (tmp_path / files.CHECKPOINT).write_bytes(b"PK nothing")
        with pytest.raises(CheckpointError, match="checkpoint.pth: training cannot go on from it"):
            train(tiny_recipe(folder), tmp_path, progress=False)
        torch.save({"model": {}, "schema": 99}, tmp_path / files.CHECKPOINT)
        with pytest.raises(CheckpointError, match="not written by this version"):
            train(tiny_recipe(folder), tmp_path, progress=False)

    def test_one_run_at_a_time_in_a_folder(self, folder, tmp_path):
        """From its first step on, when there is no checkpoint yet whose settings could differ."""
        recipe, seen = tiny_recipe(folder, epochs=1, val_split=None), []

        def step(self, batch):
            if not seen:
                seen.append(self.step)
                with pytest.raises(OSError, match="another process is writing into this folder") as raised:
                    train(dataclasses.replace(recipe, learning_rate=0.5), tmp_path / "run", progress=False)
                assert raised.value.filename == str(tmp_path / "run")
            return training_step(self, batch)

        training_step = Run.training_step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "training_step", step)
            assert train(recipe, tmp_path / "run", progress=False).step == 3
        assert seen == [0]
        assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3]

    def test_learns_what_it_is_shown(self, tmp_path):
        """Dark is class 3 and bright is class 1, on one side or the other."""
        recipe = tiny_recipe(tmp_path, epochs=10, val_split=None, ema=0.0, optimizer="adamw")
        for i in range(N):
            dark = np.broadcast_to((np.arange(32) < 16) == (i % 2 == 0), (24, 32))
            pixels = np.where(dark, 30, 200).astype(np.uint8)[..., None].repeat(3, -1)
            save(tmp_path / f"data/images/train/train_{i}.png", pixels)
            save(tmp_path / f"data/annotations/train/train_{i}.png", np.where(dark, 3, 1).astype(np.uint8))
        train(dataclasses.replace(recipe, learning_rate=3e-3), tmp_path / "run", progress=False)
        losses = [line["loss"] for line in log_of(tmp_path / "run")]
        assert len(losses) == 30 and np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
        assert not (tmp_path / "run" / files.BEST).exists(), "without evaluation there is no best"

    def test_bad_samples_stop_or_are_counted(self, tmp_path):
        recipe = tiny_recipe(tmp_path, epochs=1, val_split=None)
        bad = tmp_path / "data/images/train/train_3.png"
        bad.write_bytes(b"no image")
        with pytest.raises(DataError, match="train_3.png"):
            train(recipe, tmp_path / "stop", progress=False)
        outcome = train(dataclasses.replace(recipe, bad_samples="skip"), tmp_path / "skip", progress=False)
        assert outcome.step == 3 and log_of(tmp_path / "skip")[-1]["bad"] >= 1

    def test_bad_samples_of_val(self, tmp_path):
        recipe = tiny_recipe(tmp_path, epochs=1)
        (tmp_path / "data/images/val/val_3.png").write_bytes(b"no image")
        with pytest.raises(DataError, match="val_3.png"):
            train(recipe, tmp_path / "stop", progress=False)
        train(dataclasses.replace(recipe, bad_samples="skip"), tmp_path / "skip", progress=False)
        assert log_of(tmp_path / "skip")[-1]["val_pictures"] == N - 1

    def test_processes_must_be_able_to_share_a_batch(self, folder, tmp_path):
        recipe = tiny_recipe(folder)
        with pytest.raises(RecipeError, match="batch_size 2 must be a multiple of the 3 processes"):
            Run(recipe.completed("folder"), open_dataset(recipe.data), tmp_path, Group(0, 3))


class TestLog:
    def test_lines_beyond_the_step_and_broken_ones_go(self, tmp_path):
        path = tmp_path / files.LOG
        path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val": 1}\n{"step": 3}\n{"st')
        log = files.Log(tmp_path, 2, tensorboard=False)
        log.write(3, {"loss": 0.5})
        assert log_of(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 2, "val": 1}, {"step": 3, "loss": 0.5}]
        files.Log(tmp_path, 0, tensorboard=False)
        assert path.read_text() == ""

    def test_is_json_whatever_the_numbers(self, tmp_path):
        files.Log(tmp_path, 0, tensorboard=False).write(1, {"IoU": [0.5, math.nan], "grad_norm": math.inf})
        assert log_of(tmp_path) == [{"step": 1, "IoU": [0.5, None], "grad_norm": None}]

    @pytest.mark.more
    def test_tensorboard(self, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = files.Log(tmp_path, 0, tensorboard=True)
        log.write(1, {"loss": 0.5, "IoU": [0.1]})
        log.close()
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert events.Tags()["scalars"] == ["loss"]
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5)]

    def test_leftovers_of_a_kill_are_removed(self, tmp_path):
        for name in (
            ".segmenter-a.tmp",
            "best/.segmenter-b.tmp",
            "overlays/.segmenter-c.tmp",
            "keep.tmp",
            "best/.keep",
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        with files.writing_run(tmp_path):
            assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"keep.tmp", ".keep"}

    def test_a_log_that_is_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / files.LOG)
        with pytest.raises(OSError, match="no regular file"):
            files.Log(tmp_path, 0, tensorboard=False)

    def test_one_flipped_bit_of_a_checkpoint_is_noticed(self, tmp_path):
        path, state = tmp_path / files.CHECKPOINT, {"recipe": {}, "model": {"a": torch.arange(40.0)}}
        files.save_state(path, state)
        assert differences(files.load_state(path, {}), {"schema": 2, **state}) == []
        assert differences(torch.load(path, mmap=True), {"schema": 2, **state}) == []
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        good = path.read_bytes()
        last = 8 * (len(good) - 80)  # each bit of what comes after the zip file itself
        for bit in [*range(0, last, 397), *range(last, 8 * len(good))]:
            data = bytearray(good)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match="training cannot go on from it"):
                files.load_state(path, {})
        path.write_bytes(good[:-1])
        with pytest.raises(CheckpointError, match="training cannot go on from it"):
            files.load_state(path, {})

    def test_checkpoints_of_before_there_was_a_sum(self, tmp_path):
        """Are read if the sums within the zip file are right; newer ones are not read without theirs."""
        path, state = tmp_path / files.CHECKPOINT, {"schema": 1, "recipe": {}, "model": torch.arange(40.0)}
        torch.save(state, path)
        assert differences(files.load_state(path, {}), state) == []
        data = bytearray(path.read_bytes())
        data[data.index(state["model"].numpy().tobytes()) + 8] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged, .*data/0 fails its checksum"):
            files.load_state(path, {})
        torch.save(state | {"schema": 2}, path)
        with pytest.raises(CheckpointError, match="not written by this version"):
            files.load_state(path, {})

    def test_settings_that_did_not_exist_are_as_they_always_were(self, tmp_path):
        path, recipe = tmp_path / files.CHECKPOINT, Recipe("d").to_dict()
        older = {name: value for name, value in recipe.items() if name != "clip_grad"}
        files.save_state(path, {"step": 1, "recipe": older})
        assert files.load_state(path, recipe)["step"] == 1
        with pytest.raises(CheckpointError, match=r"other settings \(clip_grad None -> 1.0\)"):
            files.load_state(path, recipe | {"clip_grad": 1.0})

    def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / files.CHECKPOINT)
        with pytest.raises(CheckpointError, match="no regular file"):
            files.load_state(tmp_path / files.CHECKPOINT, {})

    def test_a_save_that_fails_leaves_the_one_before(self, tmp_path, monkeypatch):
        path = tmp_path / files.CHECKPOINT
        files.save_state(path, {"step": 1, "recipe": {}})

        def fail(content, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space"):
            files.save_state(path, {"step": 2, "recipe": {}})
        assert files.load_state(path, {})["step"] == 1
        assert [p.name for p in tmp_path.iterdir()] == [files.CHECKPOINT]
