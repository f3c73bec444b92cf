"""The profile on a GPU, by its command: what the CPU cannot show of it. Not among tests/gpu, which gate benchmarks.

pytest -m gpu tests/bench/test_profile_on_gpu.py       two minutes, most of them torch.compile's
"""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import profile_tables, shapes
from bench.shapes import Shape

ROOT = Path(__file__).parents[2]
SHAPE = Shape("T", 8, 256)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def profile(out, *more):
    command = [sys.executable, "-m", "bench.profile_long", "--device", "cuda", "--dtype", "bf16", "--out", str(out)]
    command += ["--model", SHAPE.model, "--patch", str(SHAPE.patch), "--size", str(SHAPE.size), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return out


def rows(path):
    return list(csv.DictReader(path.open()))


def total(path, column="ms"):
    return sum(float(row[column] or 0) for row in rows(path))


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory):
    out = tmp_path_factory.mktemp("torch")
    more = ("--tokens", "257", "1025", "--minutes", "6", "--providers", "eager", "sdpa-flash", "compile", "triton")
    return profile(out, *more)


@pytest.mark.parametrize("provider", ["eager", "sdpa-flash", "triton"])
def test_every_kernel_has_an_operator_and_a_region(by_torch, provider):
    regions, kernels = rows(by_torch / f"regions_{provider}.csv"), by_torch / f"device_kernels_{provider}.csv"
    lost = [row for row in regions if row["region"] == "(elsewhere)"]
    assert sum(float(row["share_percent"]) for row in lost) < 5, lost
    assert total(by_torch / f"regions_{provider}.csv") == pytest.approx(total(kernels), rel=1e-2)
    assert total(by_torch / f"kernels_{provider}.csv") == pytest.approx(total(kernels), rel=1e-2)
    assert total(by_torch / f"regions_{provider}.csv", "gflop") == pytest.approx(
        shapes.forward_flops(SHAPE) / 1e9, rel=1e-4
    )
    assert all(float(row["percent_flops"] or 0) < 130 for row in regions)


def test_our_kernels_are_operators(by_torch):
    found = {row["operator"]: row for row in rows(by_torch / "kernels_triton.csv")}
    assert float(found["segmenter::attention"]["calls"]) >= SHAPE.n_layers
    assert {"segmenter::layernorm_mlp", "segmenter::mask_head"} <= found.keys()
    regions = {row["region"]: row for row in rows(by_torch / "regions_triton.csv")}
    assert all(float(regions[f"encoder.blocks.*.{part}"]["ms"]) > 0 for part in ("attn", "norm2+mlp"))
    ours = [row for row in rows(by_torch / "device_kernels_triton.csv") if "attention" in row["kernel"]]
    assert ours and all(int(row["registers"]) > 0 for row in ours)


def test_a_compiled_program_is_listed_by_its_kernels(by_torch):
    regions = rows(by_torch / "regions_compile.csv")
    assert {row["region"] for row in regions} <= {"compiled program", "(elsewhere)"}
    assert all(not row["gflop"] for row in regions)
    assert any("triton" in row["kernel"] for row in rows(by_torch / "device_kernels_compile.csv"))


def test_memory_and_traces(by_torch):
    for provider in ("eager", "sdpa-flash", "compile", "triton"):
        assert (by_torch / f"memory_{provider}.pickle").stat().st_size > 1000
        trace = json.loads(gzip.decompress((by_torch / f"trace_{provider}.json.gz").read_bytes()))
        memory = profile_tables.timeline(trace, {profile_tables.FORWARD}, "cuda")[0]
        assert max(held for _, held in memory) > 1 << 20
    assert (by_torch / "memory.png").exists()
    points = rows(by_torch / "scaling.csv")
    assert all(float(p["ms"]) > 0 and float(p["peak_mib"]) > 0 for p in points if p["provider"] != "compile"), points
