"""The profile's failures, its files and its command, on a tiny model; the parts are in tests/bench/test_profile.py."""

import csv
import html.parser
import importlib.util
import io
import json
import pickle
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("triton")

from bench import long_sequences, profile_long, profile_plots, profile_report, timing
from bench.long_sequences import Point
from bench.profile_tables import Profile
from bench.profiling import Regions
from bench.report_plots import style, to_svg
from tests.bench.test_profile import CPU, HATCHET, ROOFS, TINY

# run_all reads these
SCALING = ["provider", "tokens", "size", "ms", "spread_percent", "peak_mib", "attention_percent", "reason"]
ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------------------------
# What does not run


def scaled(sizes, left, provider="eager"):
    return list(long_sequences.scaling(TINY._replace(batch=1), sizes, provider, CPU, torch.float32, left))


def test_scaling_measures():
    points = scaled([40, 16], lambda: 1e9)
    assert [(p.tokens, p.size, p.reason) for p in points] == [(5, 16, ""), (26, 40, "")]
    assert all(p.seconds > 0 and p.spread >= 0 and 0 < p.attention < 1 for p in points)


def test_what_would_take_too_long_is_not_run(monkeypatch):
    asked = []

    def measure(shape, *_):
        asked.append(shape.size)
        return long_sequences._Measured(Point(shape.tokens, "eager", shape.size, 2.0, None, 1), 7.0)

    monkeypatch.setattr(long_sequences, "_measure", measure)
    points = scaled([16, 40, 80], lambda: 100.0)
    predicted = 3 * 2.0 * (26 / 5) ** 2 + 7
    assert asked == [16]
    assert points[0].reason == "" and points[0].seconds == 2.0
    assert points[1] == (26, "eager", 40, None, None, None, None, f"not run: predicted {predicted:.3g} s")
    assert points[2].reason == f"not run: predicted {3 * 2.0 * (101 / 5) ** 2 + 7:,.0f} s"
    assert [p.reason for p in scaled([16, 40], lambda: 0.0)] == ["not run: no time left"] * 2
    assert len(scaled([16, 40], lambda: predicted + 1)) == 2 and asked[-1] == 40


def test_what_does_not_exist_here_is_not_run():
    (point,) = scaled([16], lambda: 1e9, "triton")
    assert point.seconds is None and point.reason.startswith("not run: Triton's interpreter")


OUT_OF_MEMORY = """
import torch
from bench import long_sequences as ls
from bench.shapes import Shape
torch.set_num_threads(1)
share = 48e6 / ls._available_bytes()
args = (Shape("X", 8, 0, 1, 7), [512, 40, 520], "eager", torch.device("cpu"), torch.float32)
for point in ls.scaling(*args, lambda: 1e9, memory_share=share):
    print(point.tokens, point.seconds is not None, point.reason, sep="|")
print(torch.zeros(100_000_000, dtype=torch.uint8).numel())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is Linux's")
def test_out_of_memory_is_an_answer():
    """With room for 48 MB a score matrix of 67 MB fails, the process lives on and the limit is gone afterwards."""
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "26|True|",
        "4097|False|out of memory",
        "4226|False|not run: out of memory at 4097 tokens",
        "100000000",
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 50.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert timing.out_of_memory(error) is expected


def test_a_profile_that_fails_says_why(monkeypatch, tmp_path):
    setting = profile_long.Setting(TINY, CPU, torch.float32, "torch", ROOFS, float("inf"), tmp_path)

    def failing(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(profile_long, "_profile", fail)
        return profile_long.profile("eager", setting).reason

    assert failing(MemoryError()) == "out of memory"
    assert failing(RuntimeError("no such kernel\nand more")) == "failed: no such kernel"
    with pytest.raises(TypeError):  # a mistake in the program is none of the provider's
        failing(TypeError("a mistake"))
    assert profile_long.profile("eager", setting._replace(deadline=0.0)).reason == "not run: no time left"
    soon = setting._replace(deadline=time.monotonic() + 60)
    assert profile_long.profile("eager", soon, 1234.4).reason == "not run: predicted 1,234 s"


def test_the_cost_of_a_profile_is_that_of_the_nearest_point():
    points = [
        (Point(17, "eager", 32, 0.1, None, None), 3.0),
        (Point(26, "eager", 40, 0.2, None, None), 5.0),
        (Point(37, "eager", 48, 0.3, None, None), 9.0),
        (Point(26, "compile", 40, 0.1, None, None), 60.0),
        (Point(26, "triton", 40, reason="out of memory"), 7.0),
    ]
    assert profile_long.cost_of("eager", TINY, points) == 5.0
    assert profile_long.cost_of("compile", TINY, points) == 60.0
    assert profile_long.cost_of("triton", TINY, points) == 0.0


def test_sizes():
    assert long_sequences.sizes_for([257, 16385], 8) == [128, 1024]
    with pytest.raises(ValueError, match="256 tokens are no square"):
        long_sequences.sizes_for([256], 8)


def test_memory_snapshot_ends_the_recording(monkeypatch, tmp_path):
    from torch.cuda import _memory_viz, memory

    log = []
    monkeypatch.setattr(memory, "_record_memory_history", lambda **kw: log.append(kw.get("enabled", "on")))
    monkeypatch.setattr(memory, "_snapshot", lambda: "data")
    monkeypatch.setattr(_memory_viz, "trace_plot", lambda data: f"<html>{data}</html>")
    profile_long.memory_snapshot(lambda: log.append("forward"), "eager", tmp_path)
    assert log == ["on", "forward", None]
    assert pickle.loads((tmp_path / "memory_eager.pickle").read_bytes()) == "data"
    assert (tmp_path / "memory_eager.html").read_text() == "<html>data</html>"

    def fail():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        profile_long.memory_snapshot(fail, "triton", tmp_path)
    assert log[-1] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory_eager.html", "memory_eager.pickle"]


def test_proton_runs_without_torchs_profiler(monkeypatch, tmp_path):
    """The order of calls with a stand-in for Proton, which only exists on a GPU."""
    log = []

    def start(name, **kwargs):
        log.append(("start", kwargs["data"]))
        Path(f"{name}.hatchet").write_text(json.dumps(HATCHET))
        return 5

    fake = types.SimpleNamespace(start=start, finalize=lambda session: log.append(("finalize", session)))
    monkeypatch.setattr(profile_long, "_proton", lambda: fake)
    setting = profile_long.Setting(TINY, CPU, torch.float32, "proton", ROOFS, float("inf"), tmp_path)
    regions = Regions()
    regions.names.add("encoder.blocks.0.attn")
    forward = lambda: log.append("forward")  # noqa: E731
    found = Profile("triton")
    seconds = profile_long._by_proton(forward, 2, regions, found, setting)
    assert log == [("start", "tree"), "forward", "forward", ("finalize", 5)]
    assert [line["operator"] for line in found.operators] == ["_attention_fwd_kernel", "elementwise"]
    assert set(seconds) == {"encoder.blocks.0.attn", ""}
    assert [path.name for path in tmp_path.iterdir()] == ["proton_triton.hatchet"]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Everything, on a tiny model: (folder, what was printed)."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("cli")
    argv = "--device cpu --model X --size 40 --classes 7 --tokens 17 26 --minutes 2 --providers eager triton sdpa-flash"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "stdout", printed)
        monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
        profile_long.main([*argv.split(), "--out", str(out)])
    return out, printed.getvalue()


def test_the_command_writes_everything(run):
    out, printed = run
    per_provider = ("kernels_{}.csv", "regions_{}.csv", "trace_{}.json.gz")
    expected = {name.format(provider) for name in per_provider for provider in ("eager", "sdpa-flash")}
    expected |= {"roofline.png", "memory.png", "scaling.png", "scaling.csv", "summary.md", "report.html"}
    assert {path.name for path in out.iterdir()} == expected
    assert printed.startswith("Providers, Seg-X-Mask/8, 40x40, 26 tokens, batch 1, fp32, CPU (")
    assert re.search(r"^triton +– .*not run: Triton's interpreter", printed, re.MULTILINE)
    assert printed.rstrip().endswith("report.html")


def test_tables_are_well_formed(run):
    out, _ = run
    for path in out.glob("*.csv"):
        rows = list(csv.DictReader(path.open()))
        assert rows and all(None not in row and None not in row.values() for row in rows), path
    operators = list(csv.DictReader((out / "kernels_eager.csv").open()))
    assert sum(float(row["share_percent"]) for row in operators) == pytest.approx(100, abs=1)
    times = [float(row["ms"]) for row in operators]
    assert times == sorted(times, reverse=True)
    points = list(csv.DictReader((out / "scaling.csv").open()))
    assert list(points[0]) == SCALING
    assert [(p["provider"], p["tokens"]) for p in points] == [
        (provider, tokens) for provider in ("eager", "triton", "sdpa-flash") for tokens in ("17", "26")
    ]
    assert all((float(p["ms"]) > 0) if p["ms"] else p["reason"] for p in points)


def test_images_show_something(run):
    out, _ = run
    for name in ("roofline", "memory", "scaling"):
        pixels = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert pixels.shape[1] == 1040 and 0.005 < (pixels < 200).mean() < 0.3, name


class Page(html.parser.HTMLParser):
    """Open elements, and what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.ids, self.images = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.references += [attrs[key] for key in ("src", "href") if key in attrs]
        self.images += tag == "svg"
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(run):
    out, _ = run
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert page.images == 3
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference.startswith("#") and reference[1:] in page.ids
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "viewport" in text and str(out) not in text
    assert "--out DIR" in text and "encoder.blocks" in text


def test_the_summary_says_what_ran(run):
    summary = (run[0] / "summary.md").read_text()
    assert str(run[0]) not in summary
    assert "nothing of this says how a GPU does" in summary
    assert "by our kernel for triton, by full-resolution logits" in summary
    assert "| decoder.blocks.\\*.attn |" in summary
    tables = re.findall(r"(?:^\|.*\|\n)+", summary, re.MULTILINE)
    assert len(tables) == 8
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines.splitlines()}) == 1, lines


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--profiler proton", "sees GPU kernels only"),
        ("--size 100", "no multiple of --patch 8"),
        ("--tokens 256", "no square number"),
        ("--classes 1", "2 to 256"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        profile_long.parse(["--device", "cpu", "--out", str(tmp_path), *argv.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_matplotlib_there_are_no_images_and_all_else(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    points = [Point(26, "eager", 40, 0.125, 0.0, 3 << 20)]
    region = {"region": "encoder.norm", "ms": 100.0, "share_percent": 100.0, "tflops": None, "gbps": 5.0}
    profiles = [Profile("eager", seconds=0.2, regions=[region], operators=[{"operator": "aten::mm", "ms": 100.0}])]
    facts = {"device": "cpu", "name": "a CPU", "torch": "2", "triton": "3", "commit": "abc", "command": "x"}
    report = profile_report.Report(TINY, torch.float32, "torch", ROOFS, facts, profiles, points)
    profile_report.write(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "summary.md"}
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert "matplotlib is not installed" in text and "encoder.norm" in text
        assert re.search(r"\b125\b", text)  # milliseconds of the only point


def test_plots_of_nothing_and_of_too_much():
    pytest.importorskip("matplotlib")
    gone = [Point(17, "eager", 32, reason="not run: no time left")]
    with style():
        assert profile_plots.scaling(gone, "title") is None
        assert profile_plots.roofline([Profile("eager", "out of memory")], ROOFS, "title") is None
        assert profile_plots.memory([Profile("eager", "out of memory")], "title") is None
        points = [
            Point(17, "eager", 32, 0.1, 0.0, 1 << 20),
            Point(65, "eager", 64, reason="out of memory"),
            Point(65, "triton", 64, 0.2),
            Point(257, "triton", 128, reason="not run: no time left"),
        ]
        svg = to_svg(profile_plots.scaling(points, "title"))
    assert "eager: out of memory x" in svg and "not run:" in svg
    assert profile_plots.short_region("encoder.blocks.*.attn") == "enc attn"
    assert profile_plots.short_region("upsample+argmax") == "upsample+argmax"
