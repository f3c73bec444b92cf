"""What ships compiles for every architecture, fits it and uses it. `python -m bench.compile_report` does all of it.

The compiler runs in a process of its own: in this one Triton may be interpreting.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

from bench.compile.cases import case_of_row, rows_of
from bench.compile.report import KNOWN_SPILLS, Kernel, check, main, selected
from segmenter.kernels import launch
from segmenter.kernels.configs import AMD, ANY, ARCHITECTURES, SHARED_MEMORY
from segmenter.kernels.configs_backward import TABLES

ROOT = Path(__file__).parents[2]
CASES = (  # the first one is for every architecture, the others for sm_90 only
    "^attention bf16 n=1025$|^attention bf16 n=1100 lse|^linear bf16 m=8200 k=384 n=1536 gelu|"
    "^layernorm_mlp bf16 m=8200 d=192$|^mask_head bf16 batch=2 n_cls=150 d=384|^layernorm bf16 n=384$"
)
GOOD = Kernel("attention", "sm_90", "bf16", "highest", "n=1025", shared=50_000, shared_limit=SHARED_MEMORY["sm_90"],
           tensor_core="wgmma.mma_async", has_dot=True)  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """In place of the one of all tests: calls are recorded, not run, and their outputs are large."""


def python(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.json"
    result = python("-m", "bench.compile_report", "--json", str(file), "--match", CASES)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(file.read_text())
    assert content["failures"] == []
    assert all(row["what"] in result.stdout for row in content["rows"])
    return content["rows"]


@pytest.mark.more
def test_kernels_for_hopper(rows):
    rows = [row for row in rows if row["architecture"] == "sm_90"]
    assert {row["op"] for row in rows} == {"attention", "linear", "layernorm", "layernorm_mlp", "mask_head"}
    for row in rows:
        assert row["spills"] == row["serialised"] == len(row["hazards"]) == 0
        assert 0 < row["registers"] <= 255
        assert row["shared"] <= row["shared_limit"]
        assert row["programs_per_sm"] >= 1
        assert row["tensor_core"] == ("wgmma.mma_async" if row["has_dot"] else "none")
        assert row["has_dot"] or "layernorm" in row["kernel"] or "fold" in row["kernel"]
        first, *others = row["assemblers"].values()  # Triton's choice, and what else it bundles
        assert [first[key] for key in ("registers", "spills")] == [row["registers"], row["spills"]]
        assert all(0 < other["registers"] <= 255 for other in others)
        loops = sum(sum(loop.values()) for loop in row["loops"])  # innermost ones share no instruction
        assert all(found["instructions"] > 0 for found in (first, *others)) and first["instructions"] > loops
    (attention,) = [row for row in rows if row["what"] == "n=1025"]
    # The main loop's exponentials: one an element and one a row, over the threads of the block.
    block = {part[0]: int(part[1:]) for part in attention["config"].split() if part[0] in "MNw"}
    elements, rows_each = block["M"] * block["N"] / (32 * block["w"]), block["M"] / (8 * block["w"])
    assert attention["loops"][0]["MUFU.EX2"] == elements + rows_each
    assert [0 < row["gelu_cost"] <= 12 for row in rows if row["op"] == "linear"] == [True]


@pytest.mark.more
def test_kernels_for_all_architectures(rows):
    assert {row["architecture"] for row in rows if row["op"] == "attention"} == set(ARCHITECTURES)
    cores = {row["architecture"]: row["tensor_core"] for row in rows if row["has_dot"]}
    special = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    assert cores == dict.fromkeys(ARCHITECTURES, "mma.sync") | special
    assert all(row["shared"] <= row["shared_limit"] == SHARED_MEMORY[row["architecture"]] for row in rows)


TABLE_ROWS = [
    pytest.param(table, row, id=f"{table}-{i}") for table, rows in TABLES.items() for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("table", "row"), TABLE_ROWS)
def test_every_row_is_compiled_on_every_architecture_that_it_names(table, row):
    """By default, by a call that takes this very row there."""
    case = case_of_row(table, row)
    assert case.architectures
    if row.architectures not in (ANY, AMD):
        assert case.architectures == row.architectures
    for architecture in case.architectures:
        assert row in rows_of(case, architecture)
        assert (case, architecture) in selected([architecture], rows=True)
    assert {*selected(ARCHITECTURES, rows=True)} < {*selected(ARCHITECTURES)}


def test_rows_are_for_every_call():
    """No architecture is left without a row, and none takes a row that is not compiled there."""
    everywhere = {table: set() for table in TABLES}
    for table, rows in TABLES.items():
        for row in rows:
            everywhere[table] |= set(case_of_row(table, row).architectures)
    assert all(set(ARCHITECTURES) <= found for found in everywhere.values())


def test_known_spills_are_of_calls_that_are_compiled():
    for op, architecture, what in KNOWN_SPILLS:
        assert any((case.op, case.what) == (op, what) for case, _ in selected([architecture]))


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_refuses_to_work_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert "TRITON_INTERPRET is set" in refusal(capsys)


def test_refuses_an_empty_choice(monkeypatch, capsys):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "no case is left" in refusal(capsys, "--match", "nothing at all")


BAD_TILES = """
import dataclasses, json, sys
from bench.compile import aot, report
from bench.compile.cases import cases
from bench.compile.sass import Program
from segmenter.kernels import configs
case = next(c for c in cases() if (c.op, c.dtype, c.what) == ("attention", "bf16", "n=1025"))
good = aot.disassemble(aot.compile_launch(case.launches("sm_90")[0], "sm_90").kernel)
without_waits = "\\n".join(line for line in good.splitlines() if "WARPGROUP.DEPBAR" not in line)
found = {"good": len(Program(good).hazards()), "without waits": len(Program(without_waits).hazards())}
for name, tiles in (("spills", (256, 128, 4, 2)), ("too much", (64, 256, 4, 5)), ("no tile", (48, 64, 4, 2))):
    configs.attention = lambda *args, tiles=tiles: configs.AttentionConfig(*tiles, True)
    found[name] = report.check(report.compile_row(case, "sm_90", 0))
wrong = dataclasses.replace(case, sizes=(("x", 1),))
found["no call"] = [report.check(report.compile_row(*task)) for task in report.distinct_tasks([(wrong, "sm_90")])]
json.dump(found, sys.stdout)
"""


def test_bad_tiles_and_missing_waits_are_found():
    result = python("-c", BAD_TILES)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["good"] == 0
    assert found["without waits"] > 100
    assert any(text.startswith("spills ") for text in found["spills"])
    assert any("bytes of shared memory" in text for text in found["too much"])
    assert any("does not compile" in text for text in found["no tile"])
    ((failure,),) = found["no call"]
    assert failure.startswith("does not compile: TypeError")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"shared": SHARED_MEMORY["sm_90"]}, None),
        ({"shared": SHARED_MEMORY["sm_90"] + 1}, "bytes of shared memory"),
        ({"tensor_core": "none"}, "without tensor cores"),
        ({"tensor_core": "none", "has_dot": False}, None),
        ({"tensor_core": "none", "dtype": "fp32"}, None),
        ({"tensor_core": "none", "dtype": "fp32", "precision": "high"}, "without tensor cores"),
        ({"spills": 8}, "spills 8 bytes"),
        ({"spills": 8, "dtype": "fp32"}, "spills 8 bytes"),
        ({"spills": 8, "architecture": "sm_80"}, "spills 8 bytes"),
        ({"spills": 8, "architecture": "gfx942"}, "spills 8 bytes"),
        ({"spills": 8, "architecture": "sm_86"}, None),
        ({"serialised": 4}, "one by one"),
        ({"spills": 64, "architecture": "sm_100", "op": "linear", "what": "m=65600 k=3072 residual"}, None),
        (
            {"spills": 72, "architecture": "sm_100", "op": "linear", "what": "m=65600 k=3072 residual"},
            "spills 72 bytes",
        ),
        ({"hazards": ["MOV R1, R2 overwrites"]}, "overwrites"),
        ({"gelu_cost": 12.0}, None),
        ({"gelu_cost": 12.1}, "12.1 instructions"),
        ({"error": "does not compile: so"}, "does not compile"),
    ],
)
def test_check(change, words):
    failures = check(replace(GOOD, **change))
    assert (len(failures) == 1 and words in failures[0]) if words else failures == []


def test_the_loops_in_the_documentation_are_those_of_the_report():
    content = json.loads((ROOT / "bench/results/compile_report_triton3.8.json").read_text())
    rows = {(row["op"], row["what"], row["architecture"]): row for row in content["rows"] if row["dtype"] == "bf16"}
    lines = re.findall(r"^\| (\w+) \| (\S*=.*?) \| (.*) \|$", (ROOT / "docs/benchmark.md").read_text(), re.MULTILINE)
    assert len(lines) == 7
    for op, what, figures in lines:
        found = []
        for architecture, product in (("sm_90", "HGMMA"), ("sm_80", "HMMA")):
            row = rows.get((op, what, architecture)) or rows[op, f"batch=32 {what}", architecture]  # by default
            loop = max(row["loops"], key=lambda mix: sum(mix.values()))
            found += [sum(loop.values()), sum(n for name, n in loop.items() if name.startswith(product))]
        assert [int(x) for x in figures.split(" | ")] == found, (op, what)
