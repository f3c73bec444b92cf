"""The profile's failures, its files and its command, on a tiny model; the parts are in tests/bench/test_profile.py."""

import csv
import html.parser
import importlib.util
import io
import pickle
import re
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("triton")

from bench import long_sequences, profile_long, profile_plots, profile_report, timing
from bench.long_sequences import Point
from bench.profile_tables import Profile
from bench.report_plots import style, to_svg
from tests.bench.test_profile import CPU, ROOFS, TINY, tiny_run

# run_all reads these
SCALING = ["provider", "tokens", "size", "ms", "spread_percent", "peak_mib", "attention_percent", "reason"]


# ---------------------------------------------------------------------------------------------------------------------
# What does not run


def scaled(sizes, seconds, provider="eager"):
    stop = time.monotonic() + seconds
    return list(long_sequences.scaling(TINY._replace(batch=1), sizes, [provider], CPU, torch.float32, stop))


def test_scaling_measures():
    points = scaled([40, 16], 1e9)
    assert [(p.tokens, p.size, p.reason) for p in points] == [(5, 16, ""), (26, 40, "")]
    assert all(p.seconds > 0 and p.spread >= 0 and 0 < p.attention < 1 and p.setup > 0 for p in points)


def test_what_would_take_too_long_is_not_run(monkeypatch):
    asked = []

    def measure(shape, *_):
        asked.append(shape.size)
        return Point(shape.tokens, "eager", shape.size, 2.0, None, 1, setup=7.0)

    monkeypatch.setattr(long_sequences, "_measure", measure)
    monkeypatch.setattr(long_sequences.time, "monotonic", lambda: 0.0)
    points = scaled([16, 40, 80], 100.0)
    predicted = 3 * 2.0 * (26 / 5) ** 2 + 7
    assert asked == [16]
    assert points[0].reason == "" and points[0].seconds == 2.0
    assert points[1] == Point(26, "eager", 40, reason=f"not run: predicted {predicted:.3g} s")
    assert points[2].reason == f"not run: predicted {3 * 2.0 * (101 / 5) ** 2 + 7:,.0f} s"
    assert [p.reason for p in scaled([16, 40], 0.0)] == ["not run: no time left"] * 2
    assert len(scaled([16, 40], predicted + 1)) == 2 and asked[-1] == 40


def test_providers_share_the_time(monkeypatch):
    now, given = [100.0], []

    def measure(shape, provider, *_):
        now[0] += 10.0
        return Point(shape.tokens, provider, shape.size, 1.0)

    def attempt(run, provider, device, dtype, needed, left):
        given.append((provider, left))
        return run(), ""

    monkeypatch.setattr(long_sequences.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(long_sequences, "_measure", measure)
    monkeypatch.setattr(long_sequences, "attempt", attempt)
    providers = ["eager", "triton"]
    points = list(long_sequences.scaling(TINY, [16, 40], providers, CPU, torch.float32, 160.0))
    assert [(p.provider, p.size) for p in points] == [(name, size) for name in providers for size in (16, 40)]
    assert given == [("eager", 30.0), ("eager", 20.0), ("triton", 40.0), ("triton", 30.0)]


def test_what_does_not_exist_here_is_not_run():
    (point,) = scaled([16], 1e9, "triton")
    assert point.seconds is None and point.reason.startswith("not run: Triton's interpreter")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory_is_an_answer(monkeypatch, error):
    """Nothing larger is tried."""
    measured = long_sequences._measure

    def measure(shape, *on):
        if shape.size > 16:
            raise error
        return measured(shape, *on)

    monkeypatch.setattr(long_sequences, "_measure", measure)
    points = scaled([48, 16, 40], 1e9)
    assert [(p.tokens, p.seconds is not None, p.reason) for p in points] == [
        (5, True, ""),
        (26, False, "out of memory"),
        (37, False, "not run: out of memory at 26 tokens"),
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
    run = tiny_run(tmp_path)

    def failing(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(profile_long, "_profile", fail)
        return profile_long.profile("eager", run).reason

    assert failing(MemoryError()) == "out of memory"
    assert failing(RuntimeError("no such kernel\nand more")) == "failed: no such kernel"
    with pytest.raises(TypeError):  # a mistake in the program is none of the provider's
        failing(TypeError("a mistake"))
    assert profile_long.profile("eager", run._replace(deadline=0.0)).reason == "not run: no time left"


def test_a_profile_takes_at_least_what_shorter_points_took(monkeypatch, tmp_path):
    monkeypatch.setattr(profile_long, "_profile", lambda provider, run: Profile(provider))
    run = tiny_run(tmp_path, deadline=time.monotonic() + 60)
    run.points.extend(
        [
            Point(17, "eager", 32, 4.0),
            Point(26, "eager", 40, 411.0, setup=1.4),
            Point(37, "eager", 48, 900.0),
            Point(13, "sdpa-flash", 28, 10.0, setup=50.0),
            Point(26, "sdpa-flash", 40, reason="out of memory"),
            Point(37, "sdpa-math", 48, 900.0),
        ]
    )
    assert profile_long.profile("eager", run).reason == "not run: predicted 1,234 s"
    assert profile_long.profile("sdpa-flash", run).reason == "not run: predicted 80 s"
    assert profile_long.profile("sdpa-math", run) == Profile("sdpa-math")


def test_sizes():
    assert long_sequences.sizes_for([257, 16385], 8) == [128, 1024]
    with pytest.raises(ValueError, match="256 tokens are no square"):
        long_sequences.sizes_for([256], 8)


def test_memory_snapshot_ends_the_recording(monkeypatch, tmp_path):
    log, memory = [], torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **kw: log.append(kw.get("enabled", "on")))
    monkeypatch.setattr(memory, "_snapshot", lambda *_, **__: "data")
    path = tmp_path / "memory_eager.pickle"
    profile_long.memory_snapshot(lambda: log.append("forward"), path)
    assert log == ["on", "forward", None]
    assert pickle.loads(path.read_bytes()) == "data"

    def fail():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        profile_long.memory_snapshot(fail, tmp_path / "memory_triton.pickle")
    assert log[-1] is None
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Everything, on a tiny model: (folder, what was printed)."""
    out = tmp_path_factory.mktemp("cli")
    argv = "--device cpu --model X --size 40 --classes 7 --tokens 17 26 --minutes 2 --providers eager triton sdpa-flash"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "stdout", printed)
        monkeypatch.setattr(sys, "argv", [*sys.argv[:1], *argv.split(), "--out", str(out)])
        monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
        profile_long.main()
    return out, printed.getvalue()


def test_the_command_writes_everything(run):
    out, printed = run
    per_provider = ("kernels_{}.csv", "regions_{}.csv", "trace_{}.json.gz")
    expected = {name.format(provider) for name in per_provider for provider in ("eager", "sdpa-flash")}
    expected |= {"roofline.png", "memory.png", "scaling.png", "scaling.csv", "report.html"}
    assert {path.name for path in out.iterdir()} == expected
    assert printed.startswith("Providers, Seg-X-Mask/8, 40x40, 26 tokens, batch 1, fp32, CPU (")
    assert re.search(r"^\| triton \| – .*not run: Triton's interpreter", printed, re.MULTILINE)
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
        self.references += [attrs["href"]] if "href" in attrs else []
        if tag == "img":
            assert attrs["src"].startswith("data:image/svg+xml;base64,") and attrs["alt"]
            self.images += 1
        if tag not in ("meta", "input", "img"):
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
    assert f"--out {out.name}" in text and "encoder.blocks" in text
    assert "nothing of this says how a GPU does" in text
    assert "by our kernel for triton, by full-resolution logits" in text


def test_the_same_tables_are_printed(run):
    """As Markdown: two tables whose lines have as many cells as their headings."""
    tables = re.findall(r"(?:^\|.*\|\n)+", run[1], re.MULTILINE)
    assert [len(lines.splitlines()) for lines in tables] == [2 + 3, 2 + 6]
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines.splitlines()}) == 1, lines


@pytest.mark.parametrize(
    ("argv", "message"),
    [
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


def test_without_matplotlib_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        profile_long.main(["--device", "cpu", "--out", str(tmp_path / "out")])
    assert "pip install 'segmenter-triton[bench]'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_plots_of_nothing_and_of_too_much():
    gone = [Point(17, "eager", 32, reason="not run: no time left")]
    with style():
        assert profile_plots.scaling(profile_report.scaling_lines(gone), "title") is None
        assert profile_plots.roofline([Profile("eager", "out of memory")], ROOFS, "title") is None
        assert profile_plots.memory([Profile("eager", "out of memory")], "title") is None
        points = [
            Point(17, "eager", 32, 0.1, 0.0, 1 << 20),
            Point(65, "eager", 64, reason="out of memory"),
            Point(65, "triton", 64, 0.2),
            Point(257, "triton", 128, reason="not run: no time left"),
        ]
        svg = to_svg(profile_plots.scaling(profile_report.scaling_lines(points), "title"))
    assert "eager: out of memory" in svg and "triton: not run" in svg
    assert profile_plots.short_region("encoder.blocks.*.attn") == "enc attn"
    assert profile_plots.short_region("upsample+argmax") == "upsample+argmax"
