"""`segmenter export`."""

import pytest
import torch

from segmenter.cli import main
from segmenter.cli.arguments import EXPORT_FORMATS, EXPORT_OUTPUTS
from segmenter.cli.commands import export
from segmenter.export.check import FORMATS, OUTPUTS, ExportError


def test_choices_are_those_of_the_library():
    assert EXPORT_FORMATS == FORMATS
    assert EXPORT_OUTPUTS == OUTPUTS


def test_export(folder, trained, tmp_path, capsys):
    path = tmp_path / "model.pt2"
    argv = ["export", "-m", folder, "--device", "cpu", "--format", "torch", "-o", str(path)]
    assert main([*argv, "--output-kind", "masks", "--check-sizes", "64x64,40x90"]) == 0
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == ["segmenter"] * 3
    size = path.stat().st_size / 1e6
    assert f"{path}: torch, {size:.1f} MB, float32, cpu" in out
    for part in (
        "pixels (batch, height, width, 3) uint8", "masks (batch, 11, ceil(height/16), ceil(width/16)) float32",
        "batch >= 1, height >= 17, width >= 17", "1 x 64x64", "2 x 40x90", "largest error",
    ):  # fmt: skip
        assert part in out
    with torch.inference_mode():
        got = torch.export.load(path).module()(torch.full((1, 50, 60, 3), 255, dtype=torch.uint8))
        torch.testing.assert_close(got, trained.masks(torch.ones(1, 3, 50, 60)))


def test_disagreement_ends_with_status_1(folder, tmp_path, capsys, monkeypatch):
    """tests/export has disagreements themselves, and that no file is left."""

    def disagree(*args, **kwargs):
        raise ExportError("the file disagrees with the model")

    monkeypatch.setattr(export, "export_model", disagree)
    argv = ["export", "-m", folder, "--device", "cpu", "--format", "torch", "-o", str(tmp_path / "model.pt2")]
    assert main(argv) == 1
    assert "error: the file disagrees with the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "tflite", "-o", "x.pt2"], "invalid choice: 'tflite'"),
        (["--format", "onnx", "-o", "x.pt2"], "has to end in .onnx"),
        (["--format", "torch", "-o", "none/x.pt2"], "none: no such folder"),
        (["--format", "torch", "-o", "x.pt2", "--check-sizes", "64"], "expected two sizes or more"),
        (["--format", "torch", "-o", "x.pt2", "--check-sizes", "64x64,8x64"], "more than a patch, 16"),
        (["--format", "onnx", "-o", "x.onnx", "--dtype", "bfloat16"], "choose float16"),
        (["--format", "torch"], "required: -o/--output"),
    ],
)
def test_usage_errors(options, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "-m", folder, "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints_end_with_status_4(tmp_path, capsys):
    argv = ["export", "-m", str(tmp_path / "none"), "--format", "torch", "-o", str(tmp_path / "x.pt2")]
    assert main(argv) == 4
    assert "no such file" in capsys.readouterr().err
