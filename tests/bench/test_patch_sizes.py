"""`python -m bench.patch_sizes`: tokens by hand, a measurement of tiny models, and the table of given figures."""

import json

import numpy as np
import pytest
import torch
import yaml

from bench import patch_sizes
from bench.machine import ROOT
from tests.support.tiny import tiny_model


@pytest.fixture
def sisters(tmp_path, monkeypatch):
    """Tiny models of patch 32, 16 and 8, with scores, in place of the shipped ones."""
    for patch in (32, 16, 8):
        folder = tmp_path / f"seg-s-mask-{patch}"
        tiny_model(patch_size=patch, n_cls=11).save_pretrained(folder)
        for name, less in (("scores.yml", 0.0), ("scores_float32.yml", 0.25)):
            scores = {"mIoU": 60 - patch - less, "bF": 50.0 + patch, "bIoU": 40.125}
            (folder / name).write_text(yaml.safe_dump({"scores": scores}))
    monkeypatch.setattr(patch_sizes, "SISTERS", tmp_path)
    monkeypatch.setattr(patch_sizes, "RESULTS", tmp_path / "costs.json")
    monkeypatch.setattr(patch_sizes, "FOLDERS", sorted(path for path in tmp_path.iterdir() if path.is_dir()))
    monkeypatch.setattr(patch_sizes, "SIZE", (100, 70))
    return tmp_path


def test_tokens_are_those_of_all_windows():
    """70 x 100 pixels in windows of 64: at rows 0 and 6, columns 0 and 36, each of 8 x 8 patches of 8."""
    assert patch_sizes.tokens(tiny_model(patch_size=8), 70, 100) == 4 * 64
    assert patch_sizes.tokens(tiny_model(patch_size=32), 64, 64) == 4
    assert patch_sizes.tokens(tiny_model(patch_size=16), 32, 64) == 2 * 16, "enlarged to the window: 64 x 128"


def test_a_measurement_is_written_and_printed(sisters, capsys):
    assert patch_sizes.main(["--repeats", "3", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    content = json.loads((sisters / "costs.json").read_text())
    assert [model["tokens"] for _, model in sorted(content["models"].items())] == [4 * 16, 4 * 4, 4 * 64]
    assert all(model["milliseconds"] > 0 for model in content["models"].values())
    assert (content["size"], content["repeats"]) == ([100, 70], 3)
    assert {"cpu", "threads", "commit", "at_work"} <= set(content["machine"])
    assert str(ROOT) not in json.dumps(content), "no path of the machine"
    assert patch_sizes.main(["--table"]) == 0
    assert capsys.readouterr().out == printed == patch_sizes.table(sisters, sisters / "costs.json")


def test_models_take_turns(sisters, monkeypatch):
    calls = []
    segment = patch_sizes.Segmenter.segment
    monkeypatch.setattr(
        patch_sizes.Segmenter, "segment", lambda self, image: calls.append(self.patch_size) or segment(self, image)
    )
    image = np.zeros((64, 64, 3), np.uint8)
    found = patch_sizes.measured(patch_sizes.FOLDERS, image, 2, torch.device("cpu"))
    assert calls[-6:] == 2 * [found[folder.name]["patch_size"] for folder in patch_sizes.FOLDERS]


def test_the_table_has_the_figures_that_are_there(sisters):
    models = {
        f"seg-s-mask-{patch}": {"patch_size": patch, "tokens": 10368 // patch, "milliseconds": ms, "peak_bytes": peak}
        for patch, ms, peak in ((8, 1234.5, None), (32, 9.4, 12_400_000), (16, 99.6, 345_600_000))
    }
    (sisters / "costs.json").write_text(json.dumps({"models": models}))
    size = {n: (sisters / f"seg-s-mask-{n}" / "model.safetensors").stat().st_size / 1e6 for n in (32, 16, 8)}
    assert patch_sizes.table(sisters, sisters / "costs.json").splitlines()[2:] == [
        f"| 32 | 324 | 28.00 | 82.00 | 40.12 | 27.75 | 9 | 12 MB | {size[32]:.1f} MB |",
        f"| 16 | 648 | 44.00 | 66.00 | 40.12 | 43.75 | 100 | 346 MB | {size[16]:.1f} MB |",
        f"| 8 | 1,296 | 52.00 | 58.00 | 40.12 | 51.75 | 1234 | not seen | {size[8]:.1f} MB |",
    ]
    assert len({line.count("|") for line in patch_sizes.table(sisters, sisters / "costs.json").splitlines()}) == 1
