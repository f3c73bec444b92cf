"""`segmenter data check`."""

import json
import os

import numpy as np
import pytest

from segmenter.cli import main
from segmenter.data.datasets import open_dataset
from tests.support.data_sets import make_data_set, save


def test_a_good_data_set_as_a_table(tmp_path, capsys):
    make_data_set(tmp_path, "camvid")
    assert main(["data", "check", str(tmp_path), "--split", "train,test"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:3] == [f"camvid in {tmp_path}, 11 classes", "train: 2 samples, 0 bad files, all 32 x 24",
                         "test: 2 samples, 0 bad files, all 32 x 24"]  # fmt: skip
    assert lines[3].split() == ["train", "%", "images", "test", "%", "images"]
    table = {line[5:16].strip(): line[16:].split() for line in lines[4:16]}
    assert [*table][::10] == ["Sky", "Bicyclist"]
    samples = open_dataset(tmp_path).samples
    labels = np.stack([open_dataset(tmp_path).read(s)[1] for s in samples])
    assert table["Road"][:2] == [f"{100 * (labels == 3).mean():.3f}", str((labels == 3).any((1, 2)).sum())]
    assert table["ignored"][0] == f"{100 * (labels == 255).mean():.3f}"
    assert "bad" not in err
    assert "Traceback" not in err


def test_bad_files_give_status_3_and_are_all_listed(tmp_path, capsys):
    make_data_set(tmp_path, n=3)
    samples = open_dataset(tmp_path).samples
    save(samples[0].label, np.full((24, 32), 5, np.uint8))
    samples[1].image.write_bytes(b"")
    save(samples[2].image, np.zeros((10, 20, 3), np.uint8))
    save(samples[2].label, np.ones((10, 20), np.uint8))
    assert main(["data", "check", str(tmp_path), "--json", "--workers", "2"]) == 3
    out, err = capsys.readouterr()
    facts = json.loads(out)
    train = facts["splits"]["train"]
    assert [b["file"] for b in train["bad"]] == [str(samples[0].label), str(samples[1].image)]
    assert "value 5 (768 px)" in train["bad"][0]["error"]
    assert "reduce_zero: true" in train["bad"][0]["error"]
    assert train["bad"][1]["error"] == f"{samples[1].image}: the file is empty"
    assert train["sizes"] == [{"width": 20, "height": 10, "pictures": 1}]
    assert train["classes"][1] == {"id": 1, "name": "car", "pixels": 200, "share": 1.0, "pictures": 1}
    assert facts["splits"]["val"]["bad"] == []
    assert (facts["kind"], facts["n_cls"], facts["duplicates"]) == ("folder", 5, [])
    assert err.count("segmenter: bad: ") == 2
    samples[2].image.write_bytes(b"")
    assert main(["data", "check", str(tmp_path), "--json", "--split", "train"]) == 3
    train = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert (train["samples"], train["ignored"]) == (3, {"pixels": 0, "share": None})


def test_several_sizes_and_absent_classes(tmp_path, capsys):
    make_data_set(tmp_path, n=3)
    for i, (h, w) in enumerate([(10, 20), (40, 30)]):
        sample = open_dataset(tmp_path).samples[i]
        save(sample.image, np.zeros((h, w, 3), np.uint8))
        save(sample.label, np.zeros((h, w), np.uint8))
    save(open_dataset(tmp_path).samples[2].label, np.full((24, 32), 3, np.uint8))
    assert main(["data", "check", str(tmp_path), "--split", "train"]) == 0
    out = capsys.readouterr().out
    assert "train: 3 samples, 0 bad files, 3 sizes: 20 x 10 1 times, from 20 x 10 to 30 x 40" in out
    assert out.endswith("never occur: car, person, sky\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{dir}/none"], "none: no such folder"),
        (["{dir}", "--kind", "x"], "kind 'x' is unknown"),
        (["{dir}", "--split", "train,all"], "no split 'all', only train, val, test, trainval"),
        (["{dir}", "--split", "train,"], "expected names with commas"),
        (["{dir}", "--classes", "camvid"], "has 5 classes, camvid names 11"),
    ],
)
def test_what_is_no_data_set_is_a_usage_error(tmp_path, capsys, argv, message):
    make_data_set(tmp_path)
    assert main(["data", "check", *(a.replace("{dir}", str(tmp_path)) for a in argv)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("segmenter: error:") + err.count("error: argument") == 1


def test_warnings_are_no_errors(tmp_path, capsys):
    make_data_set(tmp_path)
    train, val = (open_dataset(tmp_path, split).samples[0] for split in ("train", "val"))
    val.image.write_bytes(train.image.read_bytes())
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "segmenter: warning: same bytes in several splits, 1 times: " in capsys.readouterr().err


def test_folders_that_cannot_be_entered_or_have_two_names_are_named(tmp_path, capsys, monkeypatch):
    make_data_set(tmp_path)
    scandir, locked = os.scandir, tmp_path / "images/train/locked"

    def refusing(path):
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    locked.mkdir()
    (tmp_path / "images/val/up").symlink_to("..")
    for name in ("loop1", "loop2"):
        (tmp_path / "annotations/val" / name).symlink_to(".")
    monkeypatch.setattr(os, "scandir", refusing)
    assert main(["data", "check", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert f"segmenter: warning: {locked}: cannot be entered (Permission denied)\n" in captured.err
    above = f"{tmp_path}/images/val/up: left out, it leads to a folder above {tmp_path}/images/val"
    assert f"segmenter: warning: {above}\n" in captured.err
    assert captured.err.count("segmenter: ") == 2
    assert "val: 2 samples, 0 bad files" in captured.out
