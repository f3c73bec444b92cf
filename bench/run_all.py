"""Everything that one machine can tell, within a time budget: python -m bench.run_all --out DIR --minutes 9

In this order, so that a run that is cut short has what tells most: are the kernels right (operations whose tests fail
are not timed by them, and nothing is if the tests cannot run), the core sweep with waterfall and peers, long sequences,
then the whole sweep where there is a GPU. The results file is saved after every row; running the command again with the
same DIR goes on where it ended.
"""

import argparse
import csv
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import machine, report, shapes
from bench.harness import rates, row_facts
from bench.results import ResultsError, ResultsFile
from bench.steps import DONE, GRACE, NOT_STARTED, OUT_OF_TIME, Step, run
from bench.timing import Ceilings

PAGE = "report.html"
LONG_MODEL, LONG_PATCH = {"cuda": "S", "cpu": "T"}, 8
# Tests -> the operations that they are of. Others are of no single one, and whole models have a check of their own.
OPERATIONS = {
    "test_attention_on_gpu": ("attention", "attention-backward"),
    "test_layers_on_gpu": ("layernorm-mlp", "mask-head"),
    "test_labels_on_gpu": ("masks-to-labels", "noise-to-labels"),
}
TESTS_FAILED = 1  # pytest's exit status; any other but 0 says that they did not run
FAILED = "tests failed: "  # how the state of a gate begins that is not repeated, as done ones are not
TIMED = ("core", "full")  # steps that leave out operations whose tests failed


def steps_of(args: argparse.Namespace) -> list[Step]:
    """The steps of a run, in their order."""
    on_gpu = args.device == "cuda"
    at = ("--device", args.device, "--dtype", args.dtype)
    uncached = ("-q", "-p", "no:cacheprovider")
    bench = ("-m", "pytest", "bench", "--no-header", *uncached, *at)
    timed = (*bench, "--missing", "--row-seconds", "0.3" if on_gpu else "0.5", "--results", str(args.out))
    timed += ("--camvid", str(args.camvid)) if args.camvid else ()
    if on_gpu:  # without what takes minutes by itself; every row has a gate of its own besides
        gate = ("-m", "pytest", "tests/gpu", "-m", "gpu", "-k", "not random and not golden", "-rfE", *uncached)
    else:  # through Triton's interpreter, on tiny inputs
        gate = (*bench, "--benchmark-disable", "-k", "triton")
    model = ("--model", LONG_MODEL[args.device], "--patch", str(LONG_PATCH))
    long = ("-m", "bench.profile_long", *at, *model, "--out", str(args.out / "long"))
    steps = [
        Step("gate", gate, 0.4, limit="--compile-first" if on_gpu else "", once=True),
        Step("core", (*timed, "--sweep", "core"), 0.7 if on_gpu else 0.85),
        Step("long", long, 0.5 if on_gpu else 1.0, limit="--minutes", once=True),
    ]
    return [*steps, Step("full", (*timed, "--sweep", "full"), 1.0)] if on_gpu else steps


def failed_operations(log: str) -> dict[str, tuple[str, ...]]:
    """Test files with failures, by pytest's summary -> the operations that are not to be timed."""
    files = dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) \S*?(\w+)\.py", log, flags=re.MULTILINE))
    return {file: OPERATIONS.get(file, ()) for file in files}


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


def parser_of(description: str) -> argparse.ArgumentParser:
    """The arguments that `measure` takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file, logs and report")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it; default 9")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=machine.DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--camvid", type=Path, help="CamVid (images/test, annotations/test), for mIoU")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    args.out, args.camvid = args.out.resolve(), args.camvid and args.camvid.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def measure(args: argparse.Namespace, steps_of: Callable[[argparse.Namespace], list[Step]]) -> int:
    """Runs the steps, and makes the page of what they gave after each. The exit status."""
    # Of the steps: threads that wait actively take the core from each other on small or shared CPUs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    end = time.monotonic() + 60 * args.minutes - GRACE
    device = torch.device(args.device)
    path = args.out / machine.results_name(device, machine.DTYPES[args.dtype])
    facts = machine.facts(device)  # of the beginning, whatever is committed meanwhile
    try:
        known = ResultsFile(path, facts).content.get("steps", [])
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 1
    before, steps, entries = {entry["name"]: entry for entry in known}, steps_of(args), []
    untimed: list[str] = []  # operations whose tests failed
    for step in steps:
        earlier, log = before.get(step.name, {"state": ""}), args.out / f"{step.name}.log"
        if step.once and earlier["state"].startswith((DONE, FAILED)):
            entries.append(earlier)
        else:
            if step.name in TIMED and untimed:
                step = dataclasses.replace(step, command=(*step.command, "--failed", *untimed))
            entries.append(run(step, step.share * (end - time.monotonic()), log))
        if step.name == "gate":
            _judge(entries[-1], log, args.device)
            untimed = entries[-1].get("untimed", [])
        content = _note(ResultsFile(path, facts), args, entries, steps)
        state = entries[-1]["state"]
        if step.name == "gate" and not state.startswith((DONE, FAILED, OUT_OF_TIME, NOT_STARTED)):
            print(log.read_text()[-3000:])
            print(f"the kernels did not pass their tests ({state}), so nothing is timed", file=sys.stderr)
            return 1
    print(summary(content))
    for entry in entries:
        print(f"{entry['name']:10} {entry['seconds']:7.1f} s  {entry['state']}")
    print(f"results in {path}, page in {args.out / PAGE}; the same command goes on")
    return 0


def _judge(entry: dict[str, Any], log: Path, device: str) -> None:
    """Notes what tests that failed, or did not end, mean."""
    if entry["state"] == OUT_OF_TIME:
        print("the kernels' tests did not end in time; each row is checked by itself all the same", file=sys.stderr)
    elif entry["state"] == f"failed with exit status {TESTS_FAILED}" and device == "cuda":
        failed = failed_operations(log.read_text())
        entry["untimed"] = sorted({operation for operations in failed.values() for operation in operations})
        less = ", ".join(entry["untimed"]) or "nothing less"
        entry["state"] = f"{FAILED}{', '.join(failed)}; not timed: {less}"
        print(f"{entry['state']} (see {log})", file=sys.stderr)


def _note(
    file: ResultsFile, args: argparse.Namespace, entries: list[dict[str, Any]], steps: list[Step]
) -> dict[str, Any]:
    """Saves what the steps came to, with what the last one measured, and makes the page."""
    scaling = args.out / "long" / "scaling.csv"
    if entries[-1]["name"] == "long" and scaling.exists():
        add_long_rows(file, scaling, args.device, args.dtype)
    done = [entry["name"] for entry in entries if entry["state"] == DONE]
    file.content |= {"steps": entries, "complete": done == [step.name for step in steps]}
    file.save()
    report.main([str(file.path), "--out", str(args.out / PAGE)])
    return file.content


def main(arguments: list[str] | None = None) -> int:
    return measure(parse(parser_of(__doc__), arguments), steps_of)


if __name__ == "__main__":
    sys.exit(main())
