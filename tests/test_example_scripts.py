"""The scripts in examples/, run to their end on tiny inputs, and as a newcomer starts them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.pages import ROOT
from tests.support.processes import torchrun
from tests.support.tiny import tiny_model

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def script(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(text):
    """The cells of the rows of a table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(n_cls=11).save_pretrained(folder)
    return str(folder)


def test_drop_in(model, tmp_path, capsys):
    pytest.importorskip("triton")
    Image.open(EXAMPLES / "street.jpg").resize((64, 48)).save(tmp_path / "photo.png")
    arguments = ["--model", model, "--image", str(tmp_path / "photo.png"), "--repeats", "1", "--device", "cpu"]
    assert script("drop_in").main(arguments) == 0
    text = capsys.readouterr().out
    assert "0 left alone" in text
    assert "ms  eager\nafter:" in text
    assert "ms  triton\n" in text  # in Triton's interpreter, on which tests run
    assert "speed: " in text
    assert float(text.split(" % of the labels")[0].split()[-1]) > 99


def test_drop_in_where_no_kernel_runs(model, capsys, monkeypatch):
    module = script("drop_in")
    monkeypatch.setattr(module.segmenter, "accelerate", lambda model: "nothing", raising=False)
    assert module.main(["--model", model, "--repeats", "1", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "eager ran both times: a difference in time is noise" in text
    assert "speed" not in text


def test_benchmark(model, capsys):
    arguments = ["--model", model, "--size", "64", "--seconds", "0.01", "--device", "cpu", "--batch", "2"]
    assert script("benchmark").main([*arguments, "--ways", "eager", "sdpa", "ours"]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["eager", "sdpa", "ours"]
    assert [row[4] for row in rows] == ["PyTorch", "PyTorch", "eager, no graph"]
    assert all(float(row[1]) > 0 and float(row[2].rstrip("x")) > 0 for row in rows)
    assert all(float(row[3].rstrip(" %")) > 99 for row in rows)


def test_the_benchmark_computes_score_matrices_only_for_eager(model, monkeypatch, capsys):
    module, calls = script("benchmark"), []

    def counted(qkv, heads):
        calls.append(heads)
        return module.explicit_attention(qkv, heads)

    monkeypatch.setattr(module, "PUBLISHED", module.PUBLISHED._replace(attention=counted))
    arguments = ["--model", model, "--size", "64", "--seconds", "0.01", "--device", "cpu"]
    assert module.main([*arguments, "--ways", "sdpa", "ours"]) == 0
    assert not calls
    assert module.main([*arguments, "--ways", "eager"]) == 0
    assert calls


def test_long_sequences(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    assert script("long_sequences").main(["--sizes", "32", "16", "--device", "cpu", "--output", str(figure)]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [[way, n] for way in ("score matrices", "ours") for n in ("5", "17")]
    assert all(float(row[2]) > 0 for row in rows)
    assert Image.open(figure).size[0] > 1000


def test_long_sequences_tells_kinds_of_work_apart():
    module = script("long_sequences")
    run = module.forward("Seg-T-Mask/8", 64, "ours", module.torch.device("cpu"), module.torch.float32)
    found = module.shares(run, module.torch.device("cpu"))
    assert sum(found.values()) == pytest.approx(100)
    assert min(found["attention"], found["matrix products"], found["norms and GELU"]) > 0


def test_long_sequences_finds_the_benchmark_beside_it(monkeypatch):
    """A script's own folder is on the path, the project's root is not, and bench/ is not installed."""
    module = script("long_sequences")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    kept = []
    assert module.peak_mib(lambda: kept.append(torch.ones(8 << 20)), torch.device("cpu")) == pytest.approx(32, abs=3)


STEPS = ["--model", "Seg-T-Mask/32", "--size", "64", "--device", "cpu"]


@pytest.mark.more
def test_train_sharded(capsys):
    """Two processes that have half of the weights and of the batch each lose what one loses; so does one graph."""
    pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")
    assert script("train_sharded").main(STEPS) == 0
    alone = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in alone.splitlines()]
    assert len(losses) == 3 and losses[2] != losses[0]
    pair = torchrun(str(EXAMPLES / "train_sharded.py"), *STEPS)
    assert [float(line.split()[-1]) for line in pair.splitlines()] == pytest.approx(losses, abs=3e-6)


def test_scripts_start_from_anywhere_and_say_what_they_do(tmp_path):
    code = (
        "import contextlib, runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = [path, '--help']\n"
        "    with contextlib.suppress(SystemExit): runpy.run_path(path, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, *map(str, SCRIPTS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert len(SCRIPTS) == 4
    assert all(f"python examples/{path.name}" in result.stdout for path in SCRIPTS)
