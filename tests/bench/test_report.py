"""The report: one page that needs nothing else, and verdicts that respect the spread."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import report
from bench.report_page import Cell, Column, Line, Table, html
from bench.report_rows import FASTER, SAME, SLOWER, UNKNOWN, Comparison, Results, verdict
from bench.report_sections import comparison
from tests.support.report_results import results, row, saver

ROOT = Path(__file__).parents[2]
VOID = {"meta", "input", "br", "hr", "img", "link"}


@pytest.fixture
def save(tmp_path):
    return saver(tmp_path)


def rendered(*paths):
    page = paths[0].parent / "report.html"
    assert report.main([*map(str, paths), "--out", str(page)]) == 0
    return page.read_text(encoding="utf-8")


class Document(HTMLParser):
    """Collects text, attributes and script of a page whose tags have to be balanced."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.words, self.inside = [], [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes), f"an attribute twice in {name}: {attributes}"
        self.inside.append(name)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.sources += [(name, given[key]) for key in ("src", "srcset", "data", "poster") if key in given]
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
    assert document.sources == []
    assert not re.search(r"@import|url\((?!#)|<link|<iframe|fetch\(|XMLHttp|href=\"http(?!s://example.org/x\")", page)
    outside = [link for link in document.links if not link.startswith("#")]
    assert sorted(set(outside)) == ["cpu.json", "gpu.json", "https://example.org/x"]
    assert len(set(document.ids)) == len(document.ids)
    inner = {link[1:] for link in document.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert inner <= set(document.ids)
    assert document.inside.count("script") == 1
    assert document.inside.count("svg") > 10


def test_text_from_files_is_escaped(save):
    page = rendered(save(results()))
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "run &lt;all&gt;" in page
    hostile = results()
    for entry in hostile["benchmarks"]:
        entry["extra_info"] |= {"provider": 'a"><b>', "gate": "<i>", "model": "'\"<u>", "dtype": "<s>"}
    hostile["machine_info"]["name"] = "</title><script>x"
    inside = Document(rendered(save(hostile))).inside
    assert not {"i", "u", "s"} & set(inside)
    assert inside.count("script") == 1


def test_header_names_the_machine_and_its_state(save):
    page = rendered(save(results()))
    for text in ("GPU X", "torch 2.9", "abc", "700 TFLOP/s", "4,000 GB/s", ">complete<", "1 of 1 steps done"):
        assert text in page
    assert "GPU figures are not measured yet" not in page
    content = results("cpu")
    content["complete"] = False
    path = save(content, "cpu.json")
    page = rendered(path)
    assert "GPU figures are not measured yet" in page
    assert ">CPU<" in page
    assert ">cut short<" in page
    assert "GPU figures are not measured yet" not in rendered(path, save(results()))


def test_tables_sort_by_number(save):
    page = rendered(save(results()))
    assert page.count("<table") == page.count('class="data"') > 6
    values = [float(v) for v in re.findall(r'data-v="([^"]*)"[^>]*>(?:125|100|800) µs<', page)]
    assert sorted(set(values)) == [1e-4, 1.25e-4, 8e-4]
    shown = str(
        html.table(Table("c", [*map(Column, ("a", "b", "none"))], [Line([Cell("x"), Cell("1 s", 1), Cell("–")])]))
    )
    assert 'data-v="1"' in shown
    assert "none" not in shown


def test_slower_is_said_and_only_beyond_the_spread(save):
    page = rendered(save(results()))
    label = "Seg-S-Mask/16, 512x512, batch 8"
    (triton,) = cells(page, label, "triton", "125 µs")
    assert "0.80x slower" in triton  # against the best sdpa, 100 µs
    assert "6.40x" in triton
    assert len(re.findall(r'class="slow"[^>]*>0\.80x slower<', page)) == 2  # both shapes
    assert "Slower than the fastest other provider: 2 rows" in page
    close = results()
    for entry in close["benchmarks"]:
        if entry["extra_info"]["kind"] == "attention" and entry["extra_info"]["provider"] == "triton":
            entry["stats"] |= {"median": 1.02e-4, "q1": 1.01e-4, "q3": 1.03e-4}
    page = rendered(save(close))
    assert "x slower" not in page.split("Single operations")[1].split("Peers")[0]
    assert "None of our rows is slower" in page


def test_speed_of_another_timing_is_marked_and_not_counted(save):
    content = results()
    for entry in content["benchmarks"]:
        if entry["extra_info"]["kind"] == "attention" and entry["extra_info"]["provider"] != "triton":
            entry["extra_info"]["timing"] = "events"
            entry["stats"] = {key: 10 * value for key, value in entry["stats"].items()}
    page = rendered(save(content))
    assert "8.00x*" in page
    (summary,) = cells(page, "attention", "triton", "64.0x")
    assert summary[-4:] == ["0", "0", "0", "2"]


def test_waterfall_has_every_step_in_order(save):
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
    section = page.split('id="long"')[1].split("</section>")[0]
    assert "eager at 16,385 tokens: out of memory" in section
    assert section.count("eager at 16,385 tokens: out of memory</title>") == 2  # its marks in the plots
    assert section.count("stroke-dasharray: 3.7") == 2  # what grows with the square


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


PARTS = [
    *([name] for name in ("ceilings", "datetime", "complete", "steps", "unavailable")),
    *(["machine_info", name] for name in ("device", "name", "cpu", "threads", "torch", "triton", "commit", "command")),
    *(["benchmarks", "*", name] for name in ("extra_info", "stats", "name")),
    *(["benchmarks", "*", "stats", name] for name in ("median", "q1", "q3", "rounds")),
    *(["benchmarks", "*", "extra_info", name] for name in results()["benchmarks"][0]["extra_info"]),
    *(
        ["benchmarks", "*", "extra_info", name]
        for name in ("images_per_second", "agreement", "miou", "step", "published")
    ),
    *(["unavailable", "*", name] for name in ("kind", "provider", "shape", "name", "reason", "published")),
]


@pytest.mark.parametrize("path", PARTS, ids=".".join)
def test_partial_files_render(save, path):
    content = results()
    drop(content, path)
    whole, partial = save(results(), "whole.json"), save(content)
    page = rendered(partial)
    Document(page)
    assert "torch" in page
    for a, b in ((whole, partial), (partial, whole)):
        assert report.main([str(a), str(b), "--text"]) == 0
        compared = comparison(Comparison(Results(a), Results(b)))
        assert "GPU X" in Document(html.blocks(compared)).text


def test_files_of_strange_values_render(save):
    for value in (None, "text", [], {}, math.nan, -1.0, True):
        content = results()
        for entry in content["benchmarks"]:
            entry["extra_info"] = {**dict.fromkeys(entry["extra_info"], value), "kind": entry["extra_info"]["kind"]}
        content["ceilings"] = value
        Document(rendered(save(content)))
    empty = {"machine_info": {}, "benchmarks": [], "unavailable": []}
    page = rendered(save(empty))
    assert "This file has no whole models" in page
    assert "This file has no waterfall" in page


def test_the_committed_older_files_render(tmp_path):
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
    bare["stats"]["iqr"] = 0.02  # a range alone is taken as lying around the median
    first, second = rows_of(save, bare, row("loss", "compile", 9.0))
    assert verdict(first, second) == SLOWER


def scaled(content, factors):
    """The same results with the medians of some providers changed."""
    content = copy.deepcopy(content)
    for entry in content["benchmarks"]:
        factor = factors.get(entry["extra_info"]["provider"], 1.0)
        entry["stats"] |= {key: factor * entry["stats"][key] for key in ("median", "q1", "q3")}
    return content


def test_two_files_are_compared_row_by_row(save):
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
    assert len(found.timed_differently) == 1
    assert len(found.pairs) == len(results()["benchmarks"]) - 2
    assert [row.provider for row in found.only_before] == ["sdpa-flash"]
    assert found.only_after == []
    assert "Different machines: GPU X against CPU: CPU Y, 2 threads" in found.notes()[0]
    assert report.main([str(a), str(b), "--text"]) == 0
    text = capsys.readouterr().out
    assert "Different machines" in text
    assert "timed differently, not compared: attention" in text
    assert "1 row only in A" in text
    assert "Rule: faster or slower only if" in text
    slow = results()
    slow["ceilings"]["bytes_per_second"] = 3e12
    assert "its copies ran at 0.75x" in Comparison(Results(a), Results(save(slow, "slow.json"))).notes()[0]


def test_text_lists_every_pair(save, capsys):
    a, b = save(results()), save(scaled(results(), {"triton": 1.5}), "new.json")
    assert report.main([str(a), str(b), "--text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("  slower  " in line for line in lines) == 6  # two of attention, one model, three long sequences
    assert "attention: 6 no difference, 2 slower" in lines
