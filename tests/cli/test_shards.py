"""`segmenter predict` by several processes, and the options of its stream."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter.cli import main
from segmenter.cli.commands import predict as predict_module
from segmenter.cli.errors import CommandError
from segmenter.cli.report import Tally, say, write_failed
from segmenter.cli.shards import DIRECTORY, Shard, SharedReport
from segmenter.inference import stream as stream_module
from tests.cli.conftest import VARIABLES
from tests.cli.tools import files, image, labels_of, load_json
from tests.support.processes import torchrun

ROOT = Path(__file__).parents[2]


@pytest.fixture
def many(tmp_path):
    """7 images of two sizes, of which 2 and 5 cannot be read."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(7):
        Image.fromarray(image(*((70, 91), (64, 64))[i % 3 == 0], seed=i)).save(folder / f"{i}.png")
    for i in (2, 5):
        (folder / f"{i}.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def argv(folder, many, out):
    return ["predict", str(many), "-m", folder, "-o", str(out), "--no-overlay"]


def done(out):
    return [f for f in files(out) if f.endswith("_labels.png")]


def test_images_run_in_batches_and_each_gets_its_own_labels(trained, many, out, argv, monkeypatch):
    calls = []
    enqueue = stream_module.enqueue

    def spy(model, pixels, **options):
        calls.append((len(pixels), options["batch_size"]))
        return enqueue(model, pixels, **options)

    monkeypatch.setattr(stream_module, "enqueue", spy)
    assert main([*argv, "--pictures", "3", "--batch-size", "2", "--workers", "1"]) == 3
    assert calls == [(3, 2), (2, 2)], "0, 3, 6 and 1, 4"
    assert done(out) == [f"{i}_labels.png" for i in (0, 1, 3, 4, 6)]
    for i in (0, 1, 3, 4, 6):
        expected = trained.segment(many / f"{i}.png").numpy()
        np.testing.assert_array_equal(labels_of(out / f"{i}_labels.png"), expected)


def test_running_out_of_memory_is_said_and_gone_on_from(out, argv, monkeypatch, capsys):
    enqueue = stream_module.enqueue

    def limited(model, pixels, **options):
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return enqueue(model, pixels, **options)

    monkeypatch.setattr(stream_module, "enqueue", limited)
    assert main([*argv, "--pictures", "3"]) == 3
    captured = capsys.readouterr()
    assert "5 done, 0 skipped, 2 failed of 7" in captured.out
    expected = "segmenter: warning: not enough memory for 3 images of 64x64 at once; from here on 1 a batch\n"
    assert captured.err.startswith(expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_images_and_the_last_one_reports(out, argv, process, capsys, order):
    for rank in order[:2]:
        process(rank, world=3)
        assert main(argv) == 0
        told = "segmenter: 3 processes share 7 images\n" if rank == 0 else ""
        assert capsys.readouterr() == ("", told)
    assert not (out / "failed.json").exists()
    assert (out / DIRECTORY).exists()
    process(order[2], world=3)
    assert main(argv) == 0, "another status would end the other processes"
    captured = capsys.readouterr()
    assert captured.out.startswith("5 done, 0 skipped, 2 failed of 7 in ")
    assert captured.out.endswith(f" s each by 3 processes -> {out}\n")
    assert captured.err.count("segmenter: failed: ") == 2
    assert [Path(f["image"]).name for f in load_json(out / "failed.json")] == ["2.png", "5.png"]
    assert done(out) == [f"{i}_labels.png" for i in (0, 1, 3, 4, 6)]
    assert not (out / DIRECTORY).exists()


def test_each_process_does_only_its_part(out, argv, process):
    process(1)
    assert main(argv) == 0
    assert done(out) == [f"{i}_labels.png" for i in (1, 3)]


def test_after_a_lost_process_the_restart_completes_and_reports(many, out, argv, process, capsys, monkeypatch):
    process(0)
    assert main(argv) == 0  # 0, 4, 6 done, 2 failed
    process(1)
    with monkeypatch.context() as patch:

        def lost(labels, path, *args):
            raise KeyboardInterrupt

        patch.setattr(predict_module, "save_label_png", lost)
        assert main(argv) == 130
    assert "process 1 of 2 stopped early, --resume goes on: 0 done" in capsys.readouterr().out
    assert not (out / "failed.json").exists(), "what one process alone knows is no report"
    process(1, restarts=1)
    assert main(argv) == 0
    assert capsys.readouterr().out == "", "process 0 of this start has not finished yet"
    process(0, restarts=1)
    before = {f: (out / f).stat().st_mtime_ns for f in done(out)}
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("2 done, 3 skipped, 2 failed of 7 in ")
    assert {f: (out / f).stat().st_mtime_ns for f in done(out)} == before, "nothing twice"
    assert not (out / DIRECTORY).exists()


def test_resume_by_one_process_completes_what_several_left(out, argv, process, monkeypatch, capsys):
    process(1)
    assert main(argv) == 0
    for name in VARIABLES:
        monkeypatch.delenv(name)
    assert main([*argv, "--resume"]) == 3
    assert capsys.readouterr().out.startswith("3 done, 2 skipped, 2 failed of 7 in ")


def test_processes_that_see_other_images_are_told(many, out, argv, process, capsys):
    process(1)
    assert main(argv) == 0
    Image.fromarray(image()).save(many / "00.png")
    process(0)
    assert main(argv) == 0
    assert "the processes tell of different images or options" in capsys.readouterr().err
    assert not (out / "failed.json").exists()


def test_only_one_of_those_that_finish_together_reports(tmp_path):
    reports = [SharedReport(Shard(rank, 2, rank, 0, "run"), tmp_path, []) for rank in (0, 1)]
    assert reports[0].finish(Tally(1, 2), 3.0) is None
    merged, seconds = reports[1].finish(Tally(10, 20, {7: {"image": "x"}}), 2.0)
    assert (merged, seconds) == (Tally(11, 22, {7: {"image": "x"}}), 3.0)
    read = [reports[0]._read(rank) for rank in (0, 1)]
    assert not reports[0]._claim(read), "the other one has"
    reports[1].remove()
    assert not tmp_path.joinpath(DIRECTORY).exists()
    assert not reports[0]._claim(read), "reported and removed"
    tmp_path.joinpath(DIRECTORY).mkdir()
    assert not reports[0]._claim(read)
    assert files(tmp_path) == []


def test_failures_are_told_in_the_order_of_the_images(tmp_path, capsys):
    tally = Tally(3, 1, {5: {"image": "b", "error": "b: bad"}, 2: {"image": "a", "error": "a: bad"}})
    say(tally, 6, 1.5, "out")
    assert capsys.readouterr() == (
        "3 done, 1 skipped, 2 failed of 6 in 1.5 s, 0.50 s each -> out\n",
        "segmenter: failed: a: bad\nsegmenter: failed: b: bad\n",
    )
    write_failed(tally, tmp_path)
    assert [f["image"] for f in load_json(tmp_path / "failed.json")] == ["a", "b"]
    write_failed(Tally(), tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Shard()),
        ({"WORLD_SIZE": "4"}, Shard()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Shard()),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Shard(2, 4, 0, 0, "- - 4 - -")),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2", "MASTER_PORT": "7"},
            Shard(5, 8, 1, 2, "- 2 8 - 7"),
        ),
    ],
)
def test_which_process_this_is(environment, expected):
    assert Shard.of_this_process(environment) == expected


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "-1"}, {"RANK": "x"}, {"RANK": "0", "LOCAL_RANK": ""}])
def test_variables_that_make_no_sense(wrong):
    with pytest.raises(CommandError, match="makes no sense: RANK="):
        Shard.of_this_process({"WORLD_SIZE": "4", **wrong})


@pytest.mark.parametrize("world", [2, 3, 9])
def test_parts_are_all_images_once(world):
    parts = [Shard(rank, world).part("abcdefg") for rank in range(world)]
    assert sorted(sum(parts, [])) == list(enumerate("abcdefg"))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("segmenter.cli.shards.choose_device", torch.device)
    assert Shard(5, 8, 1).device("auto") == Shard(5, 8, 1).device("cuda") == torch.device("cuda:1")
    assert Shard(5, 8, 1).device("cuda:0") == torch.device("cuda:0")
    assert Shard(5, 8, 1).device("cpu") == torch.device("cpu")
    assert [d.index for d in chosen] == [1, 1, 0]
    with pytest.raises(CommandError, match="process 2 of this machine has no GPU of its own, there are 2"):
        Shard(2, 8, 2).device("auto")


LOSES_A_PROCESS = """
import os, signal, sys, time
from pathlib import Path
import torch
from segmenter.cli import main
from segmenter.cli.commands import predict

torch.set_num_threads(1)
log, once = Path(sys.argv[1]), Path(sys.argv[2])
write_json = predict.write_json

def logged(path, data):
    if path.stem == "3" and not once.exists():
        while "1" not in (log.read_text().split() if log.exists() else ()):  # images are written by threads
            time.sleep(0.01)
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, data)
    with log.open("a") as file:
        file.write(f"{path.stem}\\n")

predict.write_json = logged
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.more
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torchrun")
def test_torchrun_goes_on_after_a_killed_process(trained, many, out, argv, tmp_path):
    """For real: two processes, one killed by a signal before it has finished its second image."""
    (tmp_path / "script.py").write_text(LOSES_A_PROCESS)
    log, once = tmp_path / "log", tmp_path / "once"
    printed = torchrun("--max-restarts", "1", str(tmp_path / "script.py"), str(log), str(once), *argv, cwd=tmp_path)
    assert once.exists()
    written = log.read_text().split()
    assert len(written) == len(set(written)), "none twice"
    summaries = [line for line in printed.splitlines() if " failed of 7 in " in line]
    assert len(summaries) == 1, printed
    counts = [int(word) for word in summaries[0].replace(",", "").split() if word.isdecimal()]
    assert counts[0] + counts[1] == 5
    assert counts[1] >= 1, "1.png was done before the loss"
    assert [Path(f["image"]).name for f in json.loads((out / "failed.json").read_text())] == ["2.png", "5.png"]
    for i in (0, 1, 3, 4, 6):
        expected = trained.segment(many / f"{i}.png").numpy()
        np.testing.assert_array_equal(labels_of(out / f"{i}_labels.png"), expected)
    assert not (out / DIRECTORY).exists()
