"""What is written is on the disk before it has its name; pipes are not read; what resumes is what was saved."""

import os

import pytest

from segmenter import files
from segmenter.data.datasets import open_dataset
from segmenter.errors import InputError
from segmenter.text_files import read_bytes, read_json, read_text, read_yaml
from segmenter.training.distributed import Group
from segmenter.training.loop import Run, train
from segmenter.weights.read import CheckpointError, read_state_dict
from tests.support.tiny_runs import differences, read_checkpoint, tiny_recipe


def test_a_file_is_on_the_disk_before_it_is_renamed_and_its_name_after(tmp_path, monkeypatch):
    """Else a power cut leaves the new name with nothing in it, in place of the old content."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        folder = os.path.samestat(os.fstat(descriptor), os.stat(tmp_path))
        others = [p.read_bytes() for p in tmp_path.iterdir() if p != path]
        calls.append(("folder" if folder else "file", path.read_bytes(), others))
        fsync(descriptor)

    def renamed(*args, **options):
        calls.append(("rename",))
        replace(*args, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.write_atomically(path, lambda file: file.write(b"new"))
    assert calls == [("file", b"old", [b"new"]), ("rename",), ("folder", b"new", [])]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_yaml])
@pytest.mark.parametrize("waiting", [True, False])
def test_pipes_are_not_read_whatever_is_in_them(tmp_path, read, waiting):
    """Neither an empty one, which would be waited for, nor one whose content would do."""
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    try:
        if waiting:
            os.write(writer, b"{}")
        with pytest.raises(InputError, match=r"pipe: cannot be read \(is no regular file\)$"):
            read(tmp_path / "pipe", InputError)
    finally:
        os.close(writer)
    with pytest.raises(InputError, match=r"pipe: cannot be read \(is no regular file\)$"):
        read(tmp_path / "pipe", InputError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_weights_in_a_pipe_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(writer, (2).to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="is no regular file"):
            read_state_dict(tmp_path / "pipe")
    finally:
        os.close(writer)


class Cut(Exception):
    """As if the process had been killed."""


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """(recipe, folder) of a run that was saved after its second step, when average, rate and weights have moved."""
    folder = tmp_path_factory.mktemp("cut")
    recipe, save = tiny_recipe(folder, warmup_steps=4, val_split=None, save_minutes=0), Run.save

    def save_and_die(run):
        save(run)
        if run.step == 2:
            raise Cut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Run, "save", save_and_die)
        train(recipe, folder / "run", progress=False)
    return recipe, folder / "run"


def test_a_run_is_resumed_with_its_average_and_its_schedule(cut):
    recipe, output = cut
    saved = read_checkpoint(output)
    assert saved["step"] == saved["lr_scheduler"]["last_epoch"] == saved["average"]["n_averaged"] == 2
    dataset = open_dataset(recipe.data)
    run = Run(recipe.completed(dataset.key), dataset, output, Group(0, 1))
    assert differences(dict(run.average.state_dict()), dict(saved["average"])) == []
    assert differences({f"module.{n}": t for n, t in saved["model"].items()}, dict(saved["average"])), "else it is moot"
    assert run.schedule.state_dict() == saved["lr_scheduler"]
    assert [group["lr"] for group in run.optimizer.param_groups] == run.schedule.get_last_lr()


def test_a_resumed_run_ends_with_the_average_and_the_rates_of_one_that_was_not_cut(cut):
    recipe, output = cut
    train(recipe, output, progress=False)
    train(recipe, output.parent / "straight", progress=False)
    resumed, straight = read_checkpoint(output), read_checkpoint(output.parent / "straight")
    for part in ("average", "lr_scheduler", "model", "optimizer"):
        assert differences(resumed[part], straight[part]) == [], part
