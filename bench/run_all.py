"""Everything that one machine can tell, within a time budget: python -m bench.run_all --out DIR --minutes 9

In this order, so that a run that is cut short has what tells most: are the kernels right (operations whose tests fail
are not timed by them, and nothing is if the tests cannot run), the core sweep with waterfall and peers, long sequences,
then the whole sweep where there is a GPU. The results file is saved after every row; running the command again with the
same DIR goes on where it ended.
"""

import argparse
import csv
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine, report, shapes
from bench.harness import rates, row_facts
from bench.results import ResultsError, ResultsFile
from bench.steps import DEADLINE, GRACE, HALF, LEAST, MINUTES, OUT_OF_TIME, module, run
from bench.timing import Ceilings

LONG_MODEL, LONG_PATCH = {"cuda": "S", "cpu": "T"}, 8
# Tests -> the operations that they are of. Others are of no single one, and whole models have a check of their own.
OPERATIONS = {
    "test_attention_on_gpu": ("attention", "attention-backward"),
    "test_layers_on_gpu": ("layernorm-mlp", "layernorm-mlp-scaled", "mask-head", "rotate"),
    "test_queries_on_gpu": ("queries-to-labels",),
    "test_maps_on_gpu": ("attention-rows", "attention-statistics", "attention-transposed"),
    "test_gradients_on_gpu": (
        "attention-backward", "attention-half-backward", "layernorm-backward", "linear-backward",
        "layernorm-mlp-backward", "mask-head-backward", "pixels-to-tokens-backward", "loss",
    ),
    "test_labels_on_gpu": ("masks-to-labels", "noise-to-labels"),
}  # fmt: skip
TESTS_FAILED = 1  # pytest's exit status; any other but 0 says that they did not run
# Steps after the gate: name, and the share of what is left of the time that it may use.
SHARES = {"cuda": {"core": 0.7, "long": 0.5, "full": 1.0}, "cpu": {"core": 0.85, "long": 1.0}}


def commands(out: Path, device: str, dtype: str, camvid: Path | None) -> dict[str, list[str]]:
    """The command of each step."""
    at = ["--device", device, "--dtype", dtype]
    uncached = ["-q", "-p", "no:cacheprovider"]
    bench = ["pytest", "bench", "--no-header", *uncached, *at]
    timed = [*bench, "--missing", "--row-seconds", {"cuda": "0.3", "cpu": "0.5"}[device], "--results", str(out)]
    timed += ["--deadline", DEADLINE]
    timed += ["--camvid", str(camvid)] if camvid else []
    if device == "cuda":  # without what takes minutes by itself; every row has a gate of its own besides
        gate = ["pytest", "tests/gpu", "-m", "gpu", "-k", "not random and not golden", "-rfE", *uncached]
        gate += ["--compile-first", HALF]
    else:  # through Triton's interpreter, on tiny inputs
        gate = [*bench, "--benchmark-disable", "-k", "triton"]
    model = ["--model", LONG_MODEL[device], "--patch", str(LONG_PATCH)]
    long = ["bench.profile_long", *at, *model, "--out", str(out / "long"), "--minutes", MINUTES]
    found = {"gate": gate, "core": [*timed, "--sweep", "core"], "long": long, "full": [*timed, "--sweep", "full"]}
    return {name: module(*command) for name, command in found.items()}


def failed_operations(log: str) -> dict[str, tuple[str, ...]]:
    """Test files with failures, by pytest's summary -> the operations that are not to be timed."""
    files = dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) \S*?(\w+)\.py", log, flags=re.MULTILINE))
    return {file: OPERATIONS.get(file, ()) for file in files}


def red_gate(log: Path) -> tuple[str, list[str]]:
    """The gate's state where tests failed, and the options of `pytest bench` that keep their operations untimed."""
    failed = failed_operations(log.read_text())
    untimed = sorted({operation for operations in failed.values() for operation in operations})
    state = f"tests failed: {', '.join(failed)}; not timed: {', '.join(untimed) or 'nothing less'}"
    return state, ["--failed", *untimed] if untimed else []


def add_long_rows(file: ResultsFile, scaling: Path, device: str, dtype: str) -> None:
    """Adds the points of bench.profile_long's scaling.csv to the results; those not measured with their reasons."""
    roofs = file.content["ceilings"]
    with scaling.open(newline="") as lines:
        points = list(csv.DictReader(lines))
    for point in points:
        shape, provider = shapes.Shape(LONG_MODEL[device], LONG_PATCH, int(point["size"])), point["provider"]
        name = f"long-{shape.id}-{dtype}-{provider}"
        if point["reason"]:
            facts = {"kind": "long", "provider": provider, "shape": shape._asdict()}
            file.add_unavailable({**facts, "name": name, "reason": point["reason"]})
            continue
        median, spread = float(point["ms"]) / 1e3, point["spread_percent"]
        work = shapes.model(shape, machine.DTYPES[dtype].itemsize)
        info = row_facts("long", provider, name, dtype, work, shape)
        info |= {"timing": "wall", "tflops": work.flops / median / 1e12}
        info["peak_bytes"] = int(float(point["peak_mib"]) * 2**20) if point["peak_mib"] else None
        if roofs:
            reached = rates(work, None, median, Ceilings(**roofs))
            info |= {key: reached[key] for key in ("floor_seconds", "percent_of_floor", "percent_flops")}
        stats: dict[str, Any] = {"median": median}
        if spread:
            half = float(spread) / 100 * median
            stats |= {"q1": median - half, "q3": median + half, "iqr": 2 * half}
        group = f"long {shape.id} {dtype} {'GPU' if device == 'cuda' else 'CPU'}"
        row = {"group": group, "name": name, "fullname": name, "params": {}, "extra_info": info, "stats": stats}
        file.add(row)


def summary(content: dict[str, Any]) -> str:
    """A line for each whole model, peer and step of the waterfall: what to look at first."""
    lines = []
    for info in (row["extra_info"] for row in content["benchmarks"]):
        if "images_per_second" in info:
            what = f"{info['kind']:10} {info.get('model', ''):18} {info['provider']:22}"
            memory = "" if info.get("peak_bytes") is None else f"{info['peak_bytes'] / 2**20:8.0f} MiB"
            lines.append(f"{what} {info['images_per_second']:9.2f} images/s {memory}")
    lines.append(f"{len(content['benchmarks'])} rows, {len(content['unavailable'])} not to be had here or not reached")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file, logs and report")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it; default 9")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=machine.DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--camvid", type=Path, help="CamVid (images/test, annotations/test), for mIoU")
    args = parser.parse_args(arguments)
    # Of the steps: threads that wait actively take the core from each other on small or shared CPUs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    end = time.monotonic() + 60 * args.minutes - GRACE
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    device = torch.device(args.device)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / machine.results_name(device, machine.DTYPES[dtype])
    steps: list[dict[str, Any]] = []
    shares = SHARES[args.device]
    todo = commands(out, args.device, dtype, args.camvid and args.camvid.resolve())

    def note() -> dict[str, Any]:
        file = ResultsFile(path, machine.facts(device))
        done = [step["name"] for step in steps if step["state"] == "done"]
        scaling = out / "long" / "scaling.csv"
        if steps[-1]["name"] == "long" and scaling.exists():
            add_long_rows(file, scaling, args.device, dtype)
        file.content |= {"steps": steps, "complete": done == ["gate", *shares]}
        file.save()
        return file.content

    try:
        before = ResultsFile(path, machine.facts(device)).content.get("steps", [])
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 1
    passed = [step for step in before if (step["name"], step["state"]) == ("gate", "done")]
    steps += passed or [run("gate", todo["gate"], max(LEAST, 0.4 * (end - time.monotonic())), out / "gate.log")]
    content = note()
    if steps[-1]["state"] == OUT_OF_TIME:
        print("the kernels' tests did not end in time; each row is checked by itself all the same", file=sys.stderr)
    elif steps[-1]["state"] == f"failed with exit status {TESTS_FAILED}" and args.device == "cuda":
        steps[-1]["state"], options = red_gate(out / "gate.log")
        print(f"{steps[-1]['state']} (see {out / 'gate.log'})", file=sys.stderr)
        for name in ("core", "full"):
            todo[name] += options
    elif steps[-1]["state"] != "done":
        print((out / "gate.log").read_text()[-3000:])
        print(f"the kernels did not pass their tests ({steps[-1]['state']}), so nothing is timed", file=sys.stderr)
        return 1
    for name, share in shares.items():
        steps.append(run(name, todo[name], share * (end - time.monotonic()), out / f"{name}.log"))
        content = note()
    print(summary(content))
    for step in steps:
        print(f"{step['name']:6} {step['seconds']:7.1f} s  {step['state']}")
    page = out / "report.html"
    report.main([str(path), "--out", str(page)])
    print(f"results in {path}, page in {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
