"""What ships compiles for every architecture, fits it and uses it. `python -m bench.compile_report` does all of it.

The compiler runs in a process of its own: in this one Triton may be interpreting.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

from bench.compile_report import Row, check, main
from segmenter.kernels import launch
from segmenter.kernels.configs import ARCHITECTURES, SHARED_MEMORY

ROOT = Path(__file__).parents[2]
CASES = (  # the first one is for every architecture, the others for sm_90 only
    "^attention bf16 N=1025 h=12 d=64$|^attention bf16 N=1100 h=12 d=64 lse|^linear bf16 fc1.*M=8200 K=384 |"
    "^layernorm_mlp bf16 M=8200 D=192|^mask_head bf16 K=150 D=384|^layernorm bf16 D=384$"
)
GOOD = Row("attention", "sm_90", "bf16", "highest", "N=1025", shared=50_000, shared_limit=SHARED_MEMORY["sm_90"],
           tensor_core="wgmma.mma_async", has_dot=True)  # fmt: skip


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


def test_kernels_for_hopper(rows):
    rows = [row for row in rows if row["architecture"] == "sm_90"]
    assert {row["op"] for row in rows} == {"attention", "linear", "layernorm", "layernorm_mlp", "mask_head"}
    for row in rows:
        assert row["spills"] == row["local_memory"] == row["serialised"] == len(row["hazards"]) == 0
        assert 0 < row["registers"] <= 255
        assert row["shared"] <= row["shared_limit"]
        assert row["programs_per_sm"] >= 1
        assert row["tensor_core"] == ("wgmma.mma_async" if row["has_dot"] else "none")
        assert row["has_dot"] or "layernorm" in row["kernel"] or "fold" in row["kernel"]
    (attention,) = [row for row in rows if row["what"] == "N=1025 h=12 d=64"]
    # The main loop's exponentials: one an element and one a row, over the threads of the block.
    block = {part[0]: int(part[1:]) for part in attention["config"].split() if part[0] in "MNw"}
    elements, rows_each = block["M"] * block["N"] / (32 * block["w"]), block["M"] / (8 * block["w"])
    assert attention["loops"][0]["MUFU.EX2"] == elements + rows_each
    assert [0 < row["gelu_cost"] <= 12 for row in rows if row["op"] == "linear"] == [True]


def test_kernels_for_all_architectures(rows):
    assert {row["architecture"] for row in rows if row["op"] == "attention"} == set(ARCHITECTURES)
    cores = {row["architecture"]: row["tensor_core"] for row in rows if row["has_dot"]}
    special = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    assert cores == dict.fromkeys(ARCHITECTURES, "mma.sync") | special
    assert all(row["shared"] <= row["shared_limit"] == SHARED_MEMORY[row["architecture"]] for row in rows)


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
import json, sys
from bench import aot, compile_report
from bench.compile_cases import cases
from bench.sass import Program
from segmenter.kernels import configs
case = next(c for c in cases() if c.op == "attention" and c.dtype == "bf16" and c.what == "N=1025 h=12 d=64")
task = compile_report.Task(case, "sm_90", 0)
good = aot.disassemble(aot.compile_launch(compile_report.record(case, "sm_90")[0], "sm_90").binary)
without_waits = "\\n".join(line for line in good.splitlines() if "WARPGROUP.DEPBAR" not in line)
found = {"good": len(Program(good).hazards()), "without waits": len(Program(without_waits).hazards())}
for name, tiles in (("spills", (256, 128, 4, 2)), ("too much", (64, 256, 4, 5)), ("no tile", (48, 64, 4, 2))):
    configs.attention = lambda *args, tiles=tiles: configs.AttentionConfig(*tiles, True)
    found[name] = compile_report.compile_row(task).failures
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
        ({"hazards": ["MOV R1, R2 overwrites"]}, "overwrites"),
        ({"gelu_cost": 12.0}, None),
        ({"gelu_cost": 12.1}, "12.1 instructions"),
        ({"error": "does not compile: so"}, "does not compile"),
    ],
)
def test_check(change, words):
    failures = check(replace(GOOD, **change))
    assert (len(failures) == 1 and words in failures[0]) if words else failures == []
