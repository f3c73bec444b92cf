"""`segmenter eval`: files, resuming, several processes, options."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segmenter.cli import main
from segmenter.cli.arguments import build_parser
from segmenter.cli.commands import eval as eval_module
from segmenter.cli.records import DIRECTORY as RECORDS
from segmenter.cli.shards import DIRECTORY as REPORT
from segmenter.data.datasets import open_dataset
from segmenter.evaluation import evaluate as evaluate_module
from segmenter.evaluation.evaluate import MULTISCALE, Protocol, evaluate
from segmenter.evaluation.metrics import percent
from tests.cli.tools import files, image, load_json
from tests.support.data_sets import describe, make_data_set, rectangles, save
from tests.support.processes import torchrun
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def street_files(trained, tmp_path_factory):
    """7 samples of two sizes in each split; in val, half of each is as the model says, and class 10 does not occur."""
    root = make_data_set(tmp_path_factory.mktemp("data"), "camvid", n=7, size=(64, 64))
    for i, sample in enumerate(open_dataset(root, "val").samples):
        size = (70, 91) if i % 2 else (64, 64)
        pixels, noise = image(*size, seed=i), rectangles(size, [*range(10), 11], i)
        half = np.arange(size[1]) < size[1] // 2
        save(sample.image, pixels)
        save(sample.label, np.where(half, trained.segment(pixels).numpy(), noise))
    return root


@pytest.fixture
def streets(street_files, tmp_path):
    """The same, to be changed."""
    for sample in open_dataset(street_files, "val").samples:
        for path in (sample.image, sample.label):
            copy = tmp_path / "streets" / path.relative_to(street_files)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path / "streets"


@pytest.fixture
def argv(folder, streets, out):
    return ["eval", "--data", str(streets), "-m", folder, "-o", str(out), "--no-chart", "--device", "cpu"]


@pytest.fixture
def runs(monkeypatch):
    """How many images the model has run on."""
    calls = []
    original = evaluate_module.enqueue_labels
    monkeypatch.setattr(evaluate_module, "enqueue_labels", lambda *a: calls.append(a[1].shape) or original(*a))
    return calls


def scores(out):
    """What must not depend on how a run went."""
    data = load_json(out / "scores.json")
    assert data.pop("run")["device"] == "cpu"
    return data


def test_scores_are_those_of_the_library(trained, streets, out, argv, capsys):
    assert main([*argv, "--im-size", "80", "--flip"]) == 0
    data = scores(out)
    found = evaluate(trained, open_dataset(streets, "val"), Protocol(80, flip=True))
    want = percent(found)
    assert data["scores"] == {name: want[name] for name in ("mIoU", "mAcc", "aAcc", "bF", "bIoU")}
    assert min(data["scores"].values()) > 1
    for row, iou, bf in zip(data["classes"], want["IoU"], want["bF_per_class"], strict=True):
        assert (row["IoU"], row["bF"]) == tuple(None if np.isnan(v) else v for v in (iou, bf))
    assert [row["name"] for row in data["classes"]][:2] == ["Sky", "Building"]
    assert data["data"] == {"root": str(streets), "kind": "camvid", "split": "val", "pictures": 7, "failed": 0}
    expected = {"im_size": 80, "flip": True, "window_size": 64, "dtype": "float32"}
    assert expected.items() <= data["protocol"].items()
    assert yaml.safe_load((out / "scores.yml").read_text()) == load_json(out / "scores.json")
    assert files(out) == [f"{RECORDS}/rank-0.jsonl", "scores.json", "scores.yml"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "class", "IoU", "Acc", "bF", "bIoU"]
    assert lines[1].split()[:3] == ["0", "Sky", f"{want['IoU'][0]:.2f}"]
    assert lines[12].startswith(f"mIoU {want['mIoU']:.2f}  mAcc ")
    assert lines[13].startswith("7 done, 0 skipped, 0 failed of 7 in ")
    assert lines[14:] == ["windows of 64 x 64 pixels every 64 pixels (as the model says)"]


def test_classes_that_do_not_occur_are_null(streets, out, argv, capsys):
    for sample in open_dataset(streets, "val").samples:
        label = np.array(Image.open(sample.label))
        save(sample.label, np.where(label == 10, 11, label).astype(np.uint8))
    assert main([*argv, "--no-boundary", "--split", "val"]) == 0
    rows = load_json(out / "scores.json")["classes"]
    assert rows[10]["Acc"] is None, "no pixel of the truth is a bicyclist"
    assert rows[0].keys() == {"id", "name", "IoU", "Acc"}
    assert capsys.readouterr().out.splitlines()[11].split()[-1] == "-"


@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0), (2, 0, 1)])
def test_processes_give_exactly_the_scores_of_one(street_files, folder, out, process, capsys, order):
    argv = ["eval", "--data", str(street_files), "-m", folder, "--no-chart", "--device", "cpu"]
    assert main([*argv, "-o", str(out / "one")]) == 0
    capsys.readouterr()
    for rank in order[:-1]:
        process(rank, world=len(order))
        assert main([*argv, "-o", str(out / "many")]) == 0
        told = f"segmenter: {len(order)} processes share 7 images\n" if rank == 0 else ""
        assert capsys.readouterr() == ("", told)
        assert not (out / "many" / "scores.json").exists()
    process(order[-1], world=len(order))
    assert main([*argv, "-o", str(out / "many")]) == 0
    assert scores(out / "many") == scores(out / "one")
    assert load_json(out / "many" / "scores.json")["run"]["processes"] == len(order)
    assert "7 done, 0 skipped, 0 failed of 7 in " in capsys.readouterr().out
    records = sorted((out / "many" / RECORDS).iterdir())
    names = [json.loads(line)["sample"] for path in records for line in path.read_text().splitlines()]
    assert sorted(names) == [sample.name for sample in open_dataset(street_files, "val").samples]
    assert not (out / "many" / REPORT).exists()


def test_resume_does_what_is_not_recorded(out, argv, runs, capsys):
    """As after kill -9: some lines, the last one cut off."""
    assert main(argv) == 0
    want, record = scores(out), out / RECORDS / "rank-0.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    assert (len(runs), len(lines)) == (7, 7)
    record.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    (out / "scores.json").unlink()
    assert main([*argv, "--resume"]) == 0
    assert len(runs) == 7 + 4
    assert scores(out) == want
    assert "4 done, 3 skipped, 0 failed of 7" in capsys.readouterr().out
    assert [json.loads(line)["sample"] for line in record.read_text().splitlines()] == [
        json.loads(line)["sample"] for line in lines
    ]
    assert main(argv) == 0
    assert len(runs) == 11 + 7, "without --resume all is done again"
    assert len(record.read_bytes().splitlines()) == 7


def test_resume_goes_on_with_another_number_of_processes(out, argv, runs, process):
    assert main(argv) == 0
    want, record = scores(out), out / RECORDS / "rank-0.jsonl"
    record.write_bytes(b"".join(record.read_bytes().splitlines(keepends=True)[:5]))
    runs.clear()
    for rank in (1, 0):
        process(rank)
        assert main([*argv, "--resume"]) == 0
    assert len(runs) == 2
    assert scores(out) == want
    for rank in range(3):
        process(rank, world=3)
        assert main(argv) == 0
    assert len(runs) == 2 + 7
    assert scores(out) == want
    for rank in range(2):
        process(rank)
        assert main(argv) == 0
    assert [path.name for path in sorted((out / RECORDS).iterdir())] == ["rank-0.jsonl", "rank-1.jsonl"]
    assert scores(out) == want


@pytest.mark.parametrize("change", ["options", "picture", "label"])
def test_records_of_other_settings_or_images_are_not_taken(streets, out, argv, runs, capsys, change):
    assert main(argv) == 0
    before = scores(out)
    sample = open_dataset(streets, "val").samples[2]
    if change == "options":
        argv += ["--im-size", "80"]
    elif change == "picture":
        save(sample.image, image(64, 64, seed=99))
    else:
        save(sample.label, np.zeros((64, 64), np.uint8))
    runs.clear()
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 0
    assert len(runs) == (7 if change == "options" else 1)
    assert f"warning: {len(runs)} records in {out / RECORDS} are of other settings" in capsys.readouterr().err
    assert scores(out)["data"] == before["data"]
    assert scores(out)["scores"] != before["scores"]


def test_an_image_that_is_recorded_twice_counts_once_and_a_lost_one_is_an_error(out, argv, monkeypatch, capsys):
    assert main(argv) == 0
    want, record = scores(out), out / RECORDS / "rank-0.jsonl"
    record.write_bytes(2 * record.read_bytes())
    assert main([*argv, "--resume"]) == 0
    assert scores(out) == want
    add = eval_module.Records.add

    def loses(self, sample, *rest):
        if "2" not in sample.name:
            add(self, sample, *rest)

    monkeypatch.setattr(eval_module.Records, "add", loses)
    (out / "scores.json").unlink()
    capsys.readouterr()
    assert main(argv) == 1
    assert "images have no record, the first is " in capsys.readouterr().err
    assert not (out / "scores.json").exists()


def test_bad_samples_stop_or_are_left_out(trained, streets, out, argv, process, capsys):
    samples = open_dataset(streets, "val").samples
    samples[3].label.write_bytes(b"no image")
    assert main(argv) == 3
    captured = capsys.readouterr()
    assert captured.out.startswith("stopped early, --resume goes on: 3 done, 0 skipped, 0 failed of 7")
    assert f"segmenter: error: {samples[3].label}: not an image" in captured.err
    assert "--bad-samples skip" in captured.err
    assert not (out / "scores.json").exists()

    assert main([*argv, "--bad-samples", "skip", "--resume"]) == 3
    want = scores(out)
    assert (want["data"]["pictures"], want["data"]["failed"]) == (6, 1)
    assert [entry["image"] for entry in load_json(out / "failed.json")] == [str(samples[3].image)]
    assert "3 done, 3 skipped, 1 failed of 7" in capsys.readouterr().out
    samples[3].image.unlink()
    samples[3].label.unlink()
    others = percent(evaluate(trained, open_dataset(streets, "val")))
    assert want["scores"] == {name: others[name] for name in want["scores"]}

    save(samples[3].image, image())
    samples[3].label.write_bytes(b"no image")
    for rank in (0, 1):
        process(rank)
        assert main([*argv, "--bad-samples", "skip"]) == 0, "another status would end the other processes"
    assert scores(out) == want
    assert len(load_json(out / "failed.json")) == 1


def test_data_and_model_must_have_the_same_classes(streets, folder, out, argv, capsys):
    describe(streets, classes=["a", "b"], ignore_index=11)
    assert main([*argv, "--kind", "folder"]) == 2
    assert "the model has 11 classes, the data set" in capsys.readouterr().err
    names = ["sky", "House", *map(str, range(2, 11))]
    describe(streets, classes=names, ignore_index=11)
    assert main([*argv, "--kind", "folder", "--no-boundary"]) == 0
    assert "10 of 11 classes are called differently, the first is 1: 'Building' in the model and 'House'" in (
        capsys.readouterr().err
    )
    assert [row["name"] for row in load_json(out / "scores.json")["classes"]] == names
    assert main([*argv, "--kind", "camvid", "--no-boundary"]) == 0
    assert "called differently" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--split", "nothing"], "has no split 'nothing'"),
        (["--window-stride", "65"], "would leave pixels out"),
        (["--scales", "1", "--multiscale"], "not allowed with argument"),
        (["--im-size", "none"], "expected an integer from 1, or own"),
    ],
)
def test_wrong_options_are_one_line(argv, options, told, capsys):
    assert main([*argv, *options]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("ade20k", [], Protocol(512, 4, dtype="float32")),
        ("pascal_context_59", [], Protocol(520, 8, dtype="float32")),
        ("cityscapes", ["--window-size", "768", "--window-stride", "512", "--dtype", "auto"],
         Protocol(1024, 2, 768, 512, dtype="auto")),
        ("ade20k", ["--multiscale"], Protocol(512, 4, scales=MULTISCALE, flip=True, dtype="float32")),
        ("ade20k", ["--im-size", "own"], Protocol(None, 4, dtype="float32")),
        ("ade20k", ["--im-size", "640", "--max-ratio", "3"], Protocol(640, 3.0, dtype="float32")),
        ("camvid", [], Protocol(None, 4, dtype="float32")),
        ("camvid", ["--scales", "0.5,1", "--flip"], Protocol(scales=(0.5, 1.0), flip=True, dtype="float32")),
        ("folder", ["--im-size", "300", "--batch-size", "3"], Protocol(300, batch_size=3, dtype="float32")),
    ],
)  # fmt: skip
def test_the_protocol_is_the_published_one_of_the_data_set_unless_said_otherwise(kind, options, expected, tmp_path):
    dataset = open_dataset(make_data_set(tmp_path, kind), kind=kind)
    args = build_parser().parse_args(["eval", "--data", str(tmp_path), "-m", "M", *options])
    assert eval_module.choose_protocol(args, dataset) == expected


@pytest.mark.parametrize(
    ("options", "stride", "told"),
    [
        ([], 32, "64 x 64 pixels every 32 pixels (as published for cityscapes)"),
        (["--im-size", "own"], 32, "64 x 64 pixels every 32 pixels (as published for cityscapes)"),
        (["--window-stride", "48"], 48, "64 x 64 pixels every 48 pixels (as asked for)"),
        (["--window-size", "80"], 48, "80 x 80 pixels every 48 pixels (as published for cityscapes)"),
    ],
)
def test_the_stride_is_the_published_one_of_the_data_set_and_is_printed(tmp_path, out, capsys, options, stride, told):
    make_data_set(tmp_path / "city", "cityscapes", n=1)
    tiny_model(n_cls=19).save_pretrained(tmp_path / "model")
    argv = ["eval", "--data", str(tmp_path / "city"), "-m", str(tmp_path / "model"), "-o", str(out), "--no-chart"]
    argv += ["--no-boundary", "--im-size", "64", "--device", "cpu"]
    assert main([*argv, *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"windows of {told}"
    assert load_json(out / "scores.json")["protocol"]["window_stride"] == stride


def test_ctrl_c_is_told_as_such(argv, out, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "enqueue_labels", interrupted)
    assert main(argv) == 130
    captured = capsys.readouterr()
    assert captured.err == "segmenter: error: interrupted\n"
    assert captured.out.startswith("stopped early, --resume goes on: 0 done")


def test_a_folder_that_cannot_be_entered_is_named(streets, argv, monkeypatch, capsys):
    scandir, locked = os.scandir, ("images/val/locked", "annotations/val/locked")

    def refusing(path):
        if str(path).endswith(locked):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    for name in locked:
        (streets / name).mkdir()
    monkeypatch.setattr(os, "scandir", refusing)
    assert main([*argv, "--no-boundary"]) == 0
    err = capsys.readouterr().err
    for name in locked:
        assert f"segmenter: warning: {streets / name}: cannot be entered (Permission denied)\n" in err


def test_overlays_are_evenly_spread_and_drawn_again_if_they_are_missing(out, argv, runs):
    assert main([*argv, "--overlays", "2"]) == 0
    drawn = [f for f in files(out) if f.startswith("overlays/")]
    lines = (out / RECORDS / "rank-0.jsonl").read_text().splitlines()
    samples = [f"overlays/{json.loads(line)['sample']}.png" for line in lines]
    assert drawn == sorted([samples[0], samples[3]])
    assert Image.open(out / drawn[1]).width > 3 * 64
    (out / drawn[1]).unlink()
    runs.clear()
    assert main([*argv, "--overlays", "2", "--resume"]) == 0
    assert len(runs) == 1
    assert (out / drawn[1]).exists()
    assert main([*argv, "--overlays", "--resume"]) == 0
    assert len(runs) == 1 + 5
    assert [f for f in files(out) if f.startswith("overlays/")] == samples


def test_the_chart_needs_matplotlib_and_says_so_first(out, argv, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    argv.remove("--no-chart")
    assert main(argv) == 0
    assert Image.open(out / "per_class.png").width > 500
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv[argv.index("-m") + 1] = "no such model"
    assert main(argv) == 2
    assert "pip install 'segmenter-triton[train]', or say --no-chart" in capsys.readouterr().err


LOSES_A_PROCESS = """
import os, signal, sys
from pathlib import Path
import torch
from segmenter.cli import main
from segmenter.cli.commands import eval

torch.set_num_threads(1)
once = Path(sys.argv[1])
add = eval.Records.add

def torn(self, sample, facts, counts):
    if sample.name.endswith("3") and not once.exists():
        once.touch()
        self._file.write(b'{"settings": "cut o')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, sample, facts, counts)

eval.Records.add = torn
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.more
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torchrun")
def test_torchrun_goes_on_after_a_process_that_was_killed_while_it_wrote(out, argv, tmp_path):
    assert main(argv) == 0
    want = scores(out)
    (tmp_path / "script.py").write_text(LOSES_A_PROCESS)
    argv[argv.index("-o") + 1] = str(out / "many")
    script = [str(tmp_path / "script.py"), str(tmp_path / "once")]
    printed = torchrun("--max-restarts", "1", *script, *argv, cwd=tmp_path)
    assert (tmp_path / "once").exists()
    assert scores(out / "many") == want
    assert printed.count("mIoU ") == 1
