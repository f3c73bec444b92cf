"""The report: one page that needs nothing else, and verdicts that respect the spread."""

import base64
import copy
import json
import math
import re
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import report, report_plots
from bench.report_page import Cell, Column, Line, Table, html
from bench.report_rows import FASTER, SAME, SLOWER, UNKNOWN, Comparison, Results, verdict
from bench.report_sections import comparison
from tests.support.report_results import results, row, saver

ROOT = Path(__file__).parents[2]
VOID = {"meta", "input", "br", "hr", "img", "link"}


@pytest.fixture
def save(tmp_path):
    return saver(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not written, which takes most of the time."""
    monkeypatch.setattr(report_plots, "to_svg", lambda figure: f"<title>{figure.get_label()}</title>")


def rendered(*paths):
    page = paths[0].parent / "report.html"
    assert report.main([*map(str, paths), "--out", str(page)]) == 0
    return page.read_text(encoding="utf-8")


class Document(HTMLParser):
    """Collects text, attributes and images of a page whose tags have to be balanced."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.words, self.inside = [], [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes), f"an attribute twice in {name}: {attributes}"
        assert name == "img" or not {"src", "srcset", "data", "poster"} & set(given)
        self.inside.append(name)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        if name == "img":
            kind, _, data = given["src"].partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.images.append((given["alt"], base64.b64decode(data, validate=True).decode()))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name, f"</{name}> closes nothing"

    def handle_data(self, text):
        self.words.append(text)

    @property
    def text(self):
        return "".join(self.words)


def cells(page, *wanted):
    """Texts of the cells of each row of the page that has all of `wanted` as cells."""
    found = []
    for line in re.findall(r"<tr.*?</tr>", page, re.DOTALL):
        texts = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL)]
        if all(text in texts for text in wanted):
            found.append(texts)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_page_is_well_formed_and_needs_nothing_else(save):
    page = rendered(save(results()), save(results("cpu"), "cpu.json"))
    document = Document(page)
    assert not re.search(r"@import|url\(|<link|<iframe|fetch\(|XMLHttp|href=\"http(?!s://example.org/x\")", page)
    assert {link for link in document.links if not link.startswith("#")} == {"https://example.org/x"}
    assert len(set(document.ids)) == len(document.ids)
    assert {link[1:] for link in document.links if link.startswith("#")} <= set(document.ids)
    assert document.inside.count("script") == 1
    assert len(document.images) > 10
    for title, svg in document.images:
        root = xml.dom.minidom.parseString(svg).documentElement
        assert root.tagName == "svg"
        assert root.getElementsByTagName("title")[0].firstChild.data == title
        assert "font-family: 'DejaVu Sans', sans-serif" in svg  # a viewer need not have the first


def test_text_from_files_is_escaped(save):
    page = rendered(save(results()))
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "run &lt;all&gt;" in page
    hostile = results()
    for entry in hostile["benchmarks"]:
        entry["extra_info"] |= {"provider": 'a"><b>', "gate": "<i>", "model": "'\"<u>", "dtype": "<s>"}
    hostile["machine_info"]["name"] = "</title><script>x"
    document = Document(rendered(save(hostile)))
    assert not {"i", "u", "s"} & set(document.inside)
    assert document.inside.count("script") == 1
    assert any("'\"<u>" in title for title, _ in document.images)


def test_header_names_the_machine_and_its_state(save, undrawn):
    content = results()
    for entry, mask in zip(content["benchmarks"], ("0x4", "0x44", "0x1", "unknown"), strict=False):
        entry["extra_info"]["state"] = {"clocks_event_reasons.active": mask, "clocks.sm": f"{mask.count('4')}00 MHz"}
    page = rendered(save(content))
    for text in (
        "GPU X",
        "2.9",
        "abc",
        "700 TFLOP/s of matrix products (±1.0 %)",
        "4,000 GB/s",
        ">core: done<",
        "700 W",
    ):
        assert text in page
    assert "software power cap in 2 of 3 rows, hardware thermal slowdown in 1 of 3 rows, clocks.sm 0 to 200" in page
    assert "cut short" not in page
    assert "says nothing about GPUs" not in page
    content = results("cpu")
    content["complete"] = False
    content["benchmarks"][0]["stats"] = {}
    page = rendered(save(content, "cpu.json"))
    assert "Measured on a CPU: this file says nothing about GPUs." in page
    assert "The run was cut short." in page
    assert "1 row without a usable time left out." in page


def test_tables_sort_by_number(save, undrawn):
    page = rendered(save(results()))
    assert page.count("<table") > 6
    values = [float(v) for v in re.findall(r'data-v="([^"]*)"[^>]*>(?:125|100|800) µs<', page)]
    assert sorted(set(values)) == [1e-4, 1.25e-4, 8e-4]
    shown = str(
        html.table(Table("c", [*map(Column, ("a", "b", "none"))], [Line([Cell("x"), Cell("1 s", 1), Cell("–")])]))
    )
    assert 'data-v="1"' in shown
    assert "none" not in shown


def test_slower_is_said_first_and_only_beyond_the_spread(save, undrawn):
    page = rendered(save(results()))
    label = "Seg-S-Mask/16, 512x512, batch 8"
    first, triton = cells(page, label, "triton", "125 µs")
    assert first == [label, "attention", "triton", "0.80x slower", "125 µs", "sdpa-cudnn", "100 µs"]
    assert "0.80x slower" in triton  # against the best sdpa, 100 µs
    assert "6.40x" in triton
    assert len(re.findall(r'class="slow"[^>]*>0\.80x slower<', page)) == 4  # both shapes, there and in the list
    assert "Slower than the fastest other provider, beyond the spread: 2 rows." in page
    assert page.index("beyond the spread: 2 rows.") < page.index('id="waterfall"')
    worse = results()
    worse["benchmarks"][7]["stats"] = {"median": 3e-4, "q1": 3e-4, "q3": 3e-4}
    page = rendered(save(worse))
    assert page.index("0.33x slower") < page.index("0.80x slower")  # slowest first
    close = results()
    for entry in close["benchmarks"]:
        if entry["extra_info"]["kind"] == "attention" and entry["extra_info"]["provider"] == "triton":
            entry["stats"] |= {"median": 1.02e-4, "q1": 1.01e-4, "q3": 1.03e-4}
    page = rendered(save(close))
    assert "x slower<" not in page
    assert "None of our rows is slower" in page


def test_speed_of_another_timing_is_marked(save, undrawn):
    content = results()
    for entry in content["benchmarks"]:
        if entry["extra_info"]["kind"] == "attention" and entry["extra_info"]["provider"] != "triton":
            entry["extra_info"]["timing"] = "events"
            entry["stats"] = {key: 10 * value for key, value in entry["stats"].items()}
    page = rendered(save(content))
    assert "8.00x*" in page
    assert "None of our rows is slower" in page


def test_waterfall_has_every_step_in_order(save, undrawn):
    page = rendered(save(results()))
    section = page.split('id="waterfall"')[1].split("</section>")[0]
    order = [section.rindex(f">{name}</th>") for name in ("eager fp32", "compile", "bfloat16", "graph")]
    assert order == sorted(order)
    (graph,) = cells(section, "graph", "160")
    assert graph[1:4] == ["160", "1.60x", "0.80x, slower than the step before"]  # nothing says what changes
    assert "58.30" in graph
    (missing,) = cells(section, "compile")
    assert missing[1:4] == ["not measured: compiler error", "–", "–"]


def test_peers_and_long_sequences(save):
    page = rendered(save(results()))
    (peer,) = cells(page, "EoMT-L", "80.0")
    assert {"92.0 (H100)", "58.40", "316 M"} <= set(peer)
    assert "512x512, batch 4" in peer
    (without,) = cells(page, "ACNet", "45.90")
    assert without[1] == "–"
    assert page.index(">ACNet<") < page.index(">EoMT-L<")  # the poster's rows come first
    long = {title: svg for title, svg in Document(page).images if ">grows with the square<" in svg}
    assert list(long) == ["Seg-S", "Seg-S, peak memory"]
    for svg in long.values():
        assert ">out of memory<" in svg
        assert re.search(r"stroke-dasharray: [\d.]+,[\d.]+; stroke-dashoffset: 0; stroke: #59636e", svg)  # that line


def drop(content, path):
    """Without what `path` names; "*" stands for every element of a list."""
    name, *rest = path
    if name == "*":
        for element in content:
            drop(element, rest)
    elif rest:
        drop(content[name], rest)
    else:
        content.pop(name, None)


NUMBERS = ("tflops", "percent_flops", "floor_seconds", "percent_of_floor", "images_per_second", "miou", "agreement")
PARTS = [  # what is dropped together
    *(("ceilings", "datetime"), ("complete", "steps"), ("unavailable",)),
    *(("machine_info.device", "machine_info.name"), ("machine_info.cpu",)),
    tuple(f"machine_info.{name}" for name in ("threads", "torch", "triton", "commit", "command")),
    *(
        (f"benchmarks.*.{name}",)
        for name in ("extra_info", "stats", "name", "stats.median", "stats.q1", "stats.rounds")
    ),
    tuple(f"benchmarks.*.extra_info.{name}" for name in NUMBERS),
    *((f"benchmarks.*.extra_info.{name}",) for name in ("kind", "provider", "model", "shape", "tokens", "peak_bytes")),
    *((f"benchmarks.*.extra_info.{name}",) for name in ("dtype", "timing", "gate", "published", "step")),
    *((f"unavailable.*.{name}",) for name in ("kind", "provider", "shape", "name", "reason", "published")),
]


def not_drawn(title, items, *_, **__):
    """In place of a plot, which takes most of the time: whether it could be drawn."""
    for item in items:
        numbers = item[1:3] if isinstance(item, report_plots.Point) else [item.value]
        assert all(value is None or value > 0 for value in numbers), item
    return f"<title>{title}</title>"


@pytest.mark.parametrize("paths", PARTS, ids=" ".join)
def test_partial_files_render(save, monkeypatch, paths):
    monkeypatch.setattr(report_plots, "lines", not_drawn)
    monkeypatch.setattr(report_plots, "bars", not_drawn)
    content = results()
    for path in paths:
        drop(content, path.split("."))
    whole, partial = save(results(), "whole.json"), save(content)
    page = rendered(whole, partial)
    Document(page)
    assert "torch" in page
    assert report.main([str(partial), str(whole), "--text"]) == 0
    assert "GPU X" in Document(html.blocks(comparison(Comparison(Results(partial), Results(whole))))).text


@pytest.mark.parametrize("value", [None, "text", [], {}, math.nan, -1.0, True], ids=repr)
def test_files_of_strange_values_render(save, value):
    content = results()
    for entry in content["benchmarks"]:
        entry["extra_info"] = {**dict.fromkeys(entry["extra_info"], value), "kind": entry["extra_info"]["kind"]}
    content["benchmarks"][0]["extra_info"]["shape"] = dict.fromkeys(("model", "patch", "size", "batch"), value)
    content["ceilings"] = value
    Document(rendered(save(content)))


def test_a_file_of_nothing_renders(save):
    page = rendered(save({"machine_info": {}, "benchmarks": [], "unavailable": []}))
    assert "This file has no whole models" in page
    assert "This file has no waterfall" in page
    assert "The file lists nothing that was not measured" in page


def test_the_committed_older_files_render(tmp_path, undrawn):
    for path in (ROOT / "bench" / "results").glob("*.json"):
        if "benchmarks" in json.loads(path.read_text()):
            assert report.main([str(path), "--out", str(tmp_path / "x.html")]) == 0
            Document((tmp_path / "x.html").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def rows_of(save, *rows):
    return Results(save({"machine_info": {}, "benchmarks": list(rows)}, "rows.json")).rows


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1.0, 0.01), (1.1, 0.01), SLOWER),
        ((1.1, 0.01), (1.0, 0.01), FASTER),
        ((1.0, 0.01), (1.0, 0.01), SAME),
        ((1.0, 0.001), (1.025, 0.001), SAME),  # apart, but below what changes between sessions
        ((1.0, 0.001), (1.035, 0.001), SLOWER),
        ((1.0, 0.10), (1.15, 0.10), SAME),  # boxes overlap
        ((1.0, 0.10), (1.25, 0.10), SAME),  # boxes apart, but the ratio is within both ranges together
        ((1.0, 0.10), (1.40, 0.10), SLOWER),
        ((1.0, 0.30), (1.20, 0.001), SAME),  # one noisy row is enough
    ],
)
def test_verdict(save, a, b, expected):
    first, second = rows_of(save, row("loss", "eager", *a), row("loss", "compile", *b))
    assert verdict(first, second) == expected
    assert verdict(second, first) == {FASTER: SLOWER, SLOWER: FASTER}.get(expected, expected)


def test_verdict_of_skewed_runs_that_overlap(save):
    a, b = row("loss", "eager", 1.0), row("loss", "compile", 1.35)
    a["stats"] |= {"q1": 1.0, "q3": 1.2}
    b["stats"] |= {"q1": 1.08, "q3": 1.35}
    first, second = rows_of(save, a, b)
    assert math.log(1.35) > math.hypot(first.iqr, second.iqr)
    assert verdict(first, second) == verdict(second, first) == SAME


def test_verdict_needs_a_spread(save):
    bare = row("loss", "eager", 1.0)
    del bare["stats"]["q1"]
    first, second = rows_of(save, bare, row("loss", "compile", 9.0))
    assert verdict(first, second) == verdict(second, first) == UNKNOWN


def scaled(content, factors):
    """The same results with the medians of some providers changed."""
    content = copy.deepcopy(content)
    for entry in content["benchmarks"]:
        factor = factors.get(entry["extra_info"]["provider"], 1.0)
        entry["stats"] |= {key: factor * entry["stats"][key] for key in ("median", "q1", "q3")}
    return content


def test_two_files_are_compared_row_by_row(save, undrawn):
    a, b = save(results()), save(scaled(results(), {"triton": 0.5, "eager": 1.01, "sdpa-cudnn": 2.0}), "new.json")
    for files, names in (((a, b), (FASTER, SLOWER)), ((b, a), (SLOWER, FASTER))):
        found = Comparison(*map(Results, files))
        verdicts = {(p.after.kind, p.after.provider): p.verdict for p in found.pairs}
        assert len(found.pairs) == len(results()["benchmarks"])
        assert verdicts["attention", "triton"] == names[0]
        assert verdicts["attention", "sdpa-cudnn"] == names[1]
        assert verdicts["attention", "eager"] == verdicts["model", "bands"] == SAME
        assert found.notes() == []
    page = rendered(a, b)
    assert page.index('id="comparison"') < page.index('id="f1-run"') < page.index('id="f2-run"')
    (line,) = cells(page, "Seg-S-Mask/16, 512x512, batch 8", "model", "triton", "10.0 ms", "5.00 ms")
    assert "2.00x" in line
    assert "faster" in line


def test_what_cannot_be_compared_is_said(save, capsys):
    other = results("cpu")
    other["ceilings"]["flops_per_second"] = 1e12
    other["benchmarks"][0]["extra_info"]["timing"] = "wall"
    del other["benchmarks"][1]
    a, b = save(results()), save(other, "cpu.json")
    found = Comparison(Results(a), Results(b))
    assert len(found.pairs) == len(results()["benchmarks"]) - 2
    providers = [[row.provider for row in rows] for rows in found.apart.values()]
    assert providers == [["sdpa-flash"], [], ["eager"]]
    assert "Different machines: GPU X against CPU: CPU Y, 2 threads" in found.notes()[0]
    assert report.main([str(a), str(b), "--text"]) == 0
    text = capsys.readouterr().out
    assert "Different machines" in text
    assert "1 row timed differently, not compared: attention 1" in text
    assert "1 row only in A: attention 1" in text
    assert "only in B" not in text
    assert "Rule: faster or slower only if" in text
    slow = results()
    slow["ceilings"]["bytes_per_second"] = 3e12
    assert "its copies ran at 0.75x" in Comparison(Results(a), Results(save(slow, "slow.json"))).notes()[0]


def test_text_lists_every_pair(save, capsys):
    a, b = save(results()), save(scaled(results(), {"triton": 1.5}), "new.json")
    assert report.main([str(a), str(b), "--text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("| **slower** |" in line for line in lines) == 6  # two of attention, one model, three long sequences
    assert "attention: 6 no difference, 2 slower" in lines
