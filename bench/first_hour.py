"""The first hour on a GPU as one command, in calls of a few minutes: python -m bench.first_hour --out DIR --minutes 9

In this order: are the kernels right (their tests; the golden cases; each default 1,000 times, bit for bit; small
launches under compute-sanitizer), then how fast (ceilings and the core sweep with every backend of attention, blocks,
whole models, the waterfall and peers; long sequences), then what could be faster (bench.tune, with what is left). The
same command goes on where it ended. --rehearse goes through all of it on a CPU, on tiny inputs, and measures nothing.
"""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from bench import providers, run_all
from bench.steps import Step
from bench.tuning import measure
from bench.tuning.buckets import Bucket, buckets
from segmenter.kernels import launch

HERE = ("-m", "bench.first_hour")
NOT_REHEARSED = (
    "speed; races and memory errors of compiled code (compute-sanitizer); CUDA graphs and streams; memory on a GPU; "
    "kernels as compiled (here they are interpreted); backends of attention other than the CPU's"
)
REPEATS = 1000
_SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")
KINDS = ("half", "tf32", "fp32")


def sanitizer() -> str | None:
    """The program, if this machine has it."""
    places = (shutil.which("compute-sanitizer"), *_SANITIZERS)
    return next((place for place in places if place and Path(place).exists()), None)


def steps_of(args: argparse.Namespace) -> list[Step]:
    """The steps on a GPU."""
    gate, core, long = run_all.steps_of(args)[:3]
    where = ("--out", str(args.out), "--device", args.device)
    golden = ("tests/golden/check.py", "tests/golden", "--adapter", "tests/golden_adapter.py", "--quiet")
    program = sanitizer()
    missing = "" if program else "not here: compute-sanitizer (it comes with the CUDA toolkit)"
    launches = (sys.executable, *HERE, "--step", "launches", *where)
    return [
        gate,
        Step("golden", golden, 0.2, limit="", once=True, variables=(("GOLDEN_IMPL", "triton"),)),
        Step("repeats", (*HERE, "--step", "repeats", *where), 0.2, limit="", once=True),
        *(
            Step(tool, (program or "", "--tool", tool, "--error-exitcode", "9", *launches), 0.15, "", True, missing)
            for tool in ("memcheck", "racecheck")
        ),
        dataclasses.replace(core, share=0.6),
        dataclasses.replace(long, share=0.4),
        Step("tune", ("-m", "bench.tune", "--out", str(args.out)), 1.0, limit="--minutes"),
    ]


def rehearsal_of(args: argparse.Namespace) -> list[Step]:
    """The same on a CPU: kernels in Triton's interpreter, tiny inputs, nothing timed."""
    at = ("--device", "cpu")
    interpreted = (("TRITON_INTERPRET", "1"),)
    steps = {step.name: step for step in steps_of(args)}
    golden = (*steps["golden"].command, "--case", "05")
    launches = ("--out", str(args.out), *at, "--rehearse")
    smoke = ("-m", "pytest", "bench", "-q", "--benchmark-disable", "-k", "(not compile and not noise) or mlp", *at)
    long = ("-m", "bench.profile_long", *at, "--model", "X", "--size", "64", "--tokens", "17", "65")
    both = (*interpreted, ("GOLDEN_IMPL", "triton"))
    return [
        dataclasses.replace(steps["gate"], share=0.5),
        dataclasses.replace(steps["golden"], command=golden, share=0.4, variables=both),
        Step("repeats", (*HERE, "--step", "repeats", *launches), 0.4, limit="", variables=interpreted),
        Step("memcheck", (*HERE, "--step", "launches", *launches), 0.4, limit="", variables=interpreted),
        Step("core", smoke, 0.5, limit=""),
        Step("long", (*long, "--out", str(args.out / "rehearsed-long")), 0.5, limit="--minutes"),
        Step("tune", (*steps["tune"].command, "--rehearse", "--op", "attention"), 0.7, limit="--minutes"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What two of the steps do: the example of every row that this architecture takes


def shipped(architecture: str, tiny: bool) -> list[Bucket]:
    """Every row of every table in force here; `tiny`: with its example made small."""
    found = [bucket for kind in KINDS for bucket in buckets(architecture, kind)]
    return [dataclasses.replace(bucket, tiny=tiny) for bucket in found]


def launched(bucket: Bucket, device: torch.device) -> Callable[[], torch.Tensor]:
    """The row's example on random inputs."""
    arguments, function = measure.inputs(bucket, 0, device), bucket.arguments()[0]
    return lambda: function(*arguments)


def differing(run: Callable[[], torch.Tensor], repeats: int) -> int:
    """How many of so many further results are not the first one, bit for bit. Waits for the device once."""
    first = run().contiguous().view(torch.uint8).clone()
    differ = torch.zeros((), dtype=torch.int64, device=first.device)
    for _ in range(repeats):
        differ += (run().contiguous().view(torch.uint8) != first).any()
    return int(differ)


def each_shipped(device: torch.device, tiny: bool, repeats: int) -> int:
    """Runs the example of every row, and again `repeats` times to compare. The exit status."""
    architecture = launch.architecture(torch.empty(0, device=device))
    wrong, rows = [], shipped(architecture, tiny)
    for bucket in tqdm(rows, unit="row", file=sys.stderr):
        with torch.no_grad(), providers.float32_products(bucket.case.precision), bucket.in_force(bucket.row.config):
            try:
                run = launched(bucket, device)
                found = differing(run, repeats) if repeats else run() is None
            except Exception as error:  # a finding, not the end
                wrong.append(f"{bucket.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
        if found:
            wrong.append(f"{bucket.name}: {found} of {repeats} results differ from the first")
    print("\n".join(wrong) or f"{len(rows)} rows, each {1 + repeats} times: all the same")
    return int(bool(wrong))


def main(arguments: list[str] | None = None) -> int:
    parser = run_all.parser_of(__doc__)
    parser.add_argument("--rehearse", action="store_true", help="all of it on a CPU, on tiny inputs; measures nothing")
    parser.add_argument("--step", choices=("repeats", "launches"), help="only this, in this process")
    args = run_all.parse(parser, arguments)
    if args.rehearse:
        args.device, args.dtype = "cpu", "fp32"
    elif args.device == "cpu":
        parser.error("there is no GPU here; --rehearse goes through all of it without one")
    if args.step:
        repeats = (3 if args.rehearse else REPEATS) if args.step == "repeats" else 0
        return each_shipped(torch.device(args.device), args.rehearse or args.step == "launches", repeats)
    if args.rehearse:
        args.out = args.out / "rehearsal"
        args.out.mkdir(exist_ok=True)
        print(f"a rehearsal, not a measurement. What it cannot show: {NOT_REHEARSED}")
    steps = (rehearsal_of if args.rehearse else steps_of)(args)
    print("\n".join(f"{step.name:10} {step.missing or ' '.join(step.command)[:110]}" for step in steps))
    return run_all.measure(args, lambda args: steps)


if __name__ == "__main__":
    sys.exit(main())
