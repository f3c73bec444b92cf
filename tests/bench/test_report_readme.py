"""What the report writes beside its page: the README's tables, the waterfall's image; numbers; the command line."""

import copy
import math
import os
import re
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path

import pytest

from bench import report, report_rows
from bench.report import BLOCKS, MarkerError, block, replaced
from bench.report_plots import Bar, Point, bars, lines
from bench.report_rows import Results
from tests.support.report_results import results, saver

ROOT = Path(__file__).parents[2]
README = "before\n<!-- bench:headline:start -->\nold\n<!-- bench:headline:end -->\nafter\n"


@pytest.fixture
def save(tmp_path):
    return saver(tmp_path)


def test_readme_blocks_are_replaced_and_nothing_else(save, tmp_path):
    path, readme = save(results()), tmp_path / "README.md"
    text = README + "".join(f"<!-- bench:{name}:start --><!-- bench:{name}:end -->\n" for name in ("models", "peers"))
    readme.write_text(text)
    assert report.main([str(path), "--readme", str(readme)]) == 0
    made = readme.read_text(encoding="utf-8")
    assert made.startswith("before\n<!-- bench:headline:start -->\n**GPU X**, torch 2.9, triton 3.6, commit abc")
    assert "after\n<!-- bench:models:start -->\n" in made
    assert "old" not in made
    assert "| graph | 160 | 1.60x | **0.80x, slower than the step before** | 3.00 MiB | 100.00 % | 58.30 |" in made
    assert "| compile | not measured: compiler error |" in made
    assert "| 100 | 400 (flash) | 800 (triton) | 8.00x | 2.00x | 3.00 MiB → 3.00 MiB |" in made
    assert "mIoU: the shipped model on 12 images of CamVid's test set." in made
    assert "| EoMT-L | 80.0 | 92.0 (H100) | 58.40 | – | 512x512, batch 4 |" in made
    assert "| ACNet | – | – | – | 45.90 | – |" in made
    assert "[gpu.json](gpu.json)" in made
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "gpu.json"]
    assert report.main([str(path), "--readme", str(readme)]) == 0
    assert readme.read_text(encoding="utf-8") == made


def test_check_is_red_when_a_figure_is_edited(save, tmp_path, capsys):
    path, readme = save(results()), tmp_path / "README.md"
    readme.write_text(README)
    arguments = [str(path), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert readme.read_text() == README
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    made = readme.read_text(encoding="utf-8")
    readme.write_text(made.replace("| 160 |", "| 161 |"), encoding="utf-8")
    capsys.readouterr()
    assert report.main([*arguments, "--check"]) == 1
    assert "block headline: not what the result files give" in capsys.readouterr().err
    readme.write_text("more prose\n" + made, encoding="utf-8")
    assert report.main([*arguments, "--check"]) == 0


def test_a_failed_write_leaves_the_old_readme(save, tmp_path, monkeypatch, capsys):
    path, readme = save(results()), tmp_path / "README.md"
    readme.write_text(README)

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    assert report.main([str(path), "--readme", str(readme)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert readme.read_text() == README


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "needs pairs"),
        ("<!-- bench:speed:start --><!-- bench:speed:end -->", "no block is called speed"),
        ("<!-- bench:models:start -->", "needs pairs"),
        ("<!-- bench:models:end --><!-- bench:models:start -->", "needs pairs"),
        ("<!-- bench:models:start --><!-- bench:peers:start --><!-- bench:peers:end -->", "needs pairs"),
        (
            "<!-- bench:models:start --><!-- bench:peers:start --><!-- bench:peers:end --><!-- bench:models:end -->",
            "needs pairs",
        ),
        (2 * "<!-- bench:models:start --><!-- bench:models:end -->", "each NAME once"),
    ],
)
def test_wrong_markers_are_refused(save, tmp_path, text, message, capsys):
    path = save(results())
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(MarkerError, match=message):
        replaced(readme, [Results(path)])
    assert report.main([str(path), "--readme", str(readme)]) == 2
    assert "README.md" in capsys.readouterr().err
    assert readme.read_text() == text


def test_readme_says_what_is_not_measured(save, tmp_path):
    content = results("cpu")
    content["benchmarks"] = [entry for entry in content["benchmarks"] if entry["extra_info"]["kind"] != "waterfall"]
    content["unavailable"] = []
    readme = tmp_path / "README.md"
    readme.write_text(README)
    made = replaced(readme, [Results(save(content, "cpu.json"))])
    assert "Not measured (the waterfall): `cpu.json`." in made
    assert "No GPU figure has been measured yet." in made
    made = replaced(readme, [Results(save(results())), Results(save(results("cpu"), "cpu.json"))])
    assert "No GPU figure" not in made
    assert made.index("**GPU X**") < made.index("**CPU: CPU Y, 2 threads**")


def test_the_readmes_are_what_the_committed_results_give(capsys):
    """The files that the blocks of bench/results/README.md name give these and README.md's."""
    long, short = ((ROOT / path).read_text(encoding="utf-8") for path in ("bench/results/README.md", "README.md"))
    names = [re.findall(r"bench:([\w-]+):start", text) for text in (long, short)]
    assert names == [["waterfalls", "all-models", "peers"], ["headline", "models"]]
    files = list(dict.fromkeys(re.findall(r"\]\((\S+\.json)\)", long)))
    assert files, "no results file is named"
    paths = [str(ROOT / "bench" / "results" / file) for file in files]
    assert report.main([*paths, "--readme", "--check"]) == 0, capsys.readouterr().err
    assert all(f"](bench/results/{file})" in short for file in files)


def test_short_tables_are_short(save, tmp_path):
    content = results()
    steps = [entry for entry in content["benchmarks"] if entry["extra_info"]["kind"] == "waterfall"]
    shapes = [entry for entry in content["benchmarks"] if entry["extra_info"]["kind"] == "model"]
    for i in range(4, 15):
        content["benchmarks"].append(copy.deepcopy(steps[-1]))
        content["benchmarks"][-1]["extra_info"] |= {"provider": f"step {i}", "step": i}
    for i in range(7):
        content["benchmarks"].append(copy.deepcopy(shapes[0]))
        content["benchmarks"][-1]["extra_info"]["model"] = f"model {i}"
    found = Results(save(content))
    blocks = {name: block(name, [found], tmp_path) for name in BLOCKS}
    lines = {name: sum(line.startswith("|") for line in text.splitlines()) - 2 for name, text in blocks.items()}
    assert lines == {"headline": 10, "waterfalls": 15, "models": 5, "all-models": 8, "peers": 2}
    assert "5 more steps in bench/results/README.md." in blocks["headline"]
    assert "3 more shapes in bench/results/README.md." in blocks["models"]
    assert "more" not in blocks["waterfalls"] + blocks["all-models"]


@pytest.mark.parametrize(
    ("folder", "target"),
    [(".", "bench/results/README.md"), ("docs", "../bench/results/README.md"), ("bench/results", "README.md")],
)
def test_a_short_table_links_to_the_long_one(save, folder, target):
    content = results()
    shape = next(entry for entry in content["benchmarks"] if entry["extra_info"]["kind"] == "model")
    for i in range(7):
        content["benchmarks"].append(copy.deepcopy(shape))
        content["benchmarks"][-1]["extra_info"]["model"] = f"model {i}"
    text = block("models", [Results(save(content))], ROOT / folder)
    assert f"3 more shapes in [bench/results/README.md]({target})." in text
    assert (ROOT / folder / target).is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Images, numbers, command line


def drawn_bars(svg):
    """Where each begins and ends."""
    return re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [^"]*" clip-path=', svg)


def test_waterfall_image_stands_alone(save, tmp_path):
    path, image = save(results()), tmp_path / "waterfall.svg"
    arguments = [str(path), "--waterfall-svg", str(image)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    text = image.read_text(encoding="utf-8")
    root = xml.dom.minidom.parseString(text.encode()).documentElement
    assert root.tagName == "svg"
    assert float(root.getAttribute("width").removesuffix("pt")) > 0
    assert "var(" not in text
    assert "not measured: compiler error" in text
    widths = [float(right) - float(left) for left, right in drawn_bars(text)]
    assert [round(w / widths[0], 1) for w in widths] == [1.0, 0.0, 2.0, 1.6]
    assert report.main([*arguments, "--check"]) == 0
    image.write_text(text.replace("160", "161"), encoding="utf-8")
    assert report.main([*arguments, "--check"]) == 1


def test_long_names_leave_length_for_bars(recwarn):
    long = "name " * 50
    svg = bars(long, [Bar(long, "eager", 2.0, long), Bar(long, "triton", 1.0, "1.00"), Bar("b", "c", None, long)], 4.5)
    widths = [float(right) - float(left) for left, right in drawn_bars(svg)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=1e-3)
    assert widths[0] > 5
    assert not recwarn.list


@pytest.mark.parametrize("value", [1.1, 2.1, 3.0, 5.1, 9.0])
@pytest.mark.parametrize(("form", "unit"), [("memory", 2**20), ("duration", 1e-3)])
def test_a_plot_of_equal_values_has_a_scale(form, unit, value):
    points = [Point("eager", x, value * unit) for x in (1025, 4097)]
    svg = lines("title", points, "tokens", getattr(report_rows, form))
    assert re.search(r">\d+ (MiB|ms)</text>", svg)


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        ("duration", 1.2345e-5, "12.3 µs"),
        ("duration", 0.00099999, "1.00 ms"),
        ("duration", 4.5e-8, "45.0 ns"),
        ("duration", 75.0, "75.0 s"),
        ("memory", 3 << 29, "1.50 GiB"),
        ("memory", 100, "100 B"),
        ("significant", 1234.0, "1,230"),
        ("significant", 9.999, "10.0"),
        ("significant", 0.0, "0"),
        ("significant", None, "–"),
        ("times", 0.804, "0.80x"),
        ("times", 12.34, "12.3x"),
        ("share", 0.999999, "99.99 %"),
        ("share", 1.0, "100.00 %"),
        ("points", 58.3, "58.30"),
        ("percent", 99.96, "100 %"),
        ("percent", 4.04, "4.0 %"),
        ("percent", 0.0256, "0.026 %"),
    ],
)
def test_numbers_for_people(form, value, expected):
    assert getattr(report_rows, form)(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(2, 2.0), (0.0, 0.0), (True, None), ("2", None), (None, None), (math.inf, None), (-1, None)]
)
def test_only_measurable_numbers_count(value, expected):
    assert report_rows.number(value) == expected


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        (1, "", "say what to make"),
        (1, "--check", "say what to make"),
        (1, "--text", "--text compares two files"),
        (1, "--out gpu.json", "would be written over"),
        (1, "--check --out x.html", "--check needs"),
        (3, "--out x.html", "--out shows one file, or two compared"),
    ],
)
def test_what_makes_no_sense_is_refused(save, tmp_path, monkeypatch, capsys, files, arguments, message):
    monkeypatch.chdir(tmp_path)
    path = save(results())
    before = path.read_text()
    with pytest.raises(SystemExit) as error:
        report.main([path.name] * files + arguments.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert path.read_text() == before


def test_a_file_that_holds_no_results_is_refused(save, tmp_path, capsys):
    for path in (save({"a": 1}), tmp_path / "none.json"):
        assert report.main([str(path), "--out", str(tmp_path / "x.html")]) == 2
        assert path.name in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_importing_is_cheap():
    code = "import sys, bench.report; print({'torch', 'numpy', 'matplotlib', 'triton'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "set()\n", result.stderr
