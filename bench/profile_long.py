"""Profiles a model on long sequences: where the time goes by part, operator and kernel; memory; how both grow.

python -m bench.profile_long --patch 8 --size 1024 --out DIR        one image of 16,385 tokens, five providers
python -m bench.profile_long --device cpu --out DIR                 a small model and small images, two minutes

DIR gets for each provider regions_*.csv (the model's own names: time against measured ceilings, peak memory),
kernels_*.csv (torch.profiler's table of operators), trace_*.json.gz (for chrome://tracing or ui.perfetto.dev) and on
CUDA device_kernels_*.csv and memory_*.pickle (for pytorch.org/memory_viz); for all together roofline.png, memory.png,
scaling.csv, scaling.png and report.html, which needs nothing else.

What runs is the network and the labels; "triton" takes labels without full-resolution logits, the others by these.
A trace and a snapshot hold function names and a snapshot the paths of source files: look before you publish them.
"""

import argparse
import contextlib
import functools
import gzip
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from tqdm import tqdm

from bench import long_sequences, machine, profile_report, profiling, providers, timing
from bench import profile_tables as tables
from bench.profile_report import Run
from bench.profile_tables import FORWARD, Profile, csv_text
from bench.shapes import WIDTHS, Shape, forward_flops
from segmenter.files import write_atomically, write_text

QUICK = 1.0  # seconds: a forward below it is profiled several times
FORWARDS = 3
SCALING_SHARE = 0.55  # of the time; it goes first, what is left is for the profiles
SNAPSHOT_ENTRIES = 200_000
DEFAULTS = {  # option -> on a GPU, on a CPU, where compiling alone would take a minute a size
    "model": ("S", "T"),
    "size": (1024, 256),
    "dtype": ("bf16", "fp32"),
    "providers": (("eager", "sdpa-flash", "sdpa-cudnn", "triton", "compile"), ("eager", "sdpa-flash")),
    "tokens": ((257, 1025, 4097, 16385, 65537), (257, 1025, 4097)),
    "minutes": (15.0, 1.5),
}


def profile(provider: str, run: Run) -> Profile:
    """Profiles one provider and writes its files; where that cannot be, the profile says why."""
    needed = 3 * forward_flops(run.shape) / run.roofs.flops_per_second  # at least: counted, profiled, timed
    for point in run.points:
        if point.provider == provider and point.seconds and point.tokens <= run.shape.tokens:
            needed = max(needed, point.predicted(point.tokens))
    left, work = run.deadline - time.monotonic(), functools.partial(_profile, provider, run)
    found, reason = long_sequences.attempt(work, provider, run.device, run.dtype, needed, left)
    return found or Profile(provider, reason)


@torch.no_grad()
def _profile(provider: str, run: Run) -> Profile:
    found, compiled = Profile(provider), provider == "compile"
    device, on_gpu = run.device, run.device.type == "cuda"
    model, im = long_sequences.prepared(run.shape, device, run.dtype)
    regions = profiling.Regions()
    labels = long_sequences.network(model, provider, regions)
    counter = profiling.Counter(lambda: regions.current)

    @regions.region(FORWARD)
    def forward() -> None:
        labels(im)
        timing.synchronize(device)

    named = contextlib.nullcontext if compiled else functools.partial(regions.of, model)
    with named(), contextlib.nullcontext() if compiled else counter:
        first = timing.wall_seconds(forward, device)
    found.seconds = statistics.median(long_sequences.wall_times(forward, device, first))
    forwards = FORWARDS if found.seconds < QUICK else 1
    with named():
        profiler, trace = traced(forward, forwards, forwards > 1 or compiled, device)
    packed = gzip.compress(json.dumps(trace).encode())
    write_atomically(run.out / f"trace_{provider}.json.gz", lambda file: file.write(packed))
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    found.profiled_seconds = statistics.fmean(e.time_range.elapsed_us() / 1e6 for e in events if e.name == FORWARD)
    found.operators = tables.operator_lines(profiler.key_averages(), regions.names, forwards, on_gpu)
    found.kernels = tables.kernel_lines(trace, forwards)
    found.memory, found.spans = tables.timeline(trace, regions.names, device.type)
    seconds = tables.region_seconds(events, regions.names, on_gpu)
    found.regions = tables.region_lines(seconds, counter.found, found.region_peaks(), forwards, run.roofs)
    for name, (file, _) in tables.TABLES.items():
        if lines := getattr(found, name):
            write_text(run.out / f"{file}_{provider}.csv", csv_text(lines))
    if on_gpu:
        memory_snapshot(forward, run.out / f"memory_{provider}.pickle")
    return found


def traced(forward: Callable, forwards: int, warm_up: bool, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """torch's profiler of some forwards, and its Chrome trace. `warm_up`: one more before, for slow first launches."""
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, device.type.upper())}
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=forwards, repeat=1) if warm_up else None
    with torch.profiler.profile(activities=activities, schedule=schedule, profile_memory=True) as profiler:
        for _ in range(warm_up + forwards):
            forward()
            profiler.step()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    for key in ("host_name", "traceName", "trace_id"):  # of the machine, and of no use to anybody else
        trace.pop(key, None)
    return profiler, trace


def memory_snapshot(forward: Callable, path: Path) -> None:
    """Writes what torch's allocator on the GPU did during one forward."""
    memory = torch.cuda.memory
    memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES, stacks="python")
    try:
        forward()
        memory._dump_snapshot(str(path))
    finally:
        memory._record_memory_history(enabled=None)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile_long", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, words: str = "", **kwargs: Any) -> None:
        if name in DEFAULTS:
            gpu, cpu = (" ".join(map(str, v)) if isinstance(v, tuple) else v for v in DEFAULTS[name])
            words += f"default: {gpu} on a GPU, {cpu} on a CPU"
        parser.add_argument(f"--{name}", help=words or None, **kwargs)

    add("model", choices=WIDTHS)
    add("patch", "pixels (default: 8)", type=int, default=8)
    add("size", "side of the profiled image in pixels; ", type=int)
    add("decoder", choices=("mask", "linear"), default="mask")
    add("batch", type=int, default=1)
    add("classes", "2 to 256 (default: 150)", type=int, default=150)
    add("providers", nargs="+", choices=providers.PROVIDERS)
    add("dtype", choices=machine.DTYPES)
    add("device", "default: a GPU if there is one", choices=("cuda", "cpu"))
    add("tokens", "lengths for the scaling; ", type=int, nargs="*")
    add("minutes", "nothing is started after so long; ", type=float)
    add("out", "folder for everything", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.device == "cpu"])
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install 'segmenter-triton[bench]'")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    if args.size < args.patch or args.size % args.patch:
        parser.error(f"--size {args.size} is no multiple of --patch {args.patch}")
    if not 2 <= args.classes <= 256 or args.batch < 1:
        parser.error("--classes must be 2 to 256 and --batch at least 1")
    try:
        args.sizes = long_sequences.sizes_for(args.tokens, args.patch)
    except ValueError as error:
        parser.error(f"--tokens: {error}")
    args.providers = list(dict.fromkeys(args.providers))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    started = time.monotonic()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its library reports every start and stop on a CPU otherwise
    args.out.mkdir(parents=True, exist_ok=True)
    shape = Shape(args.model, args.patch, args.size, args.batch, args.classes, args.decoder == "mask")
    device, dtype = torch.device(args.device), machine.DTYPES[args.dtype]
    with tqdm(total=1 + len(args.providers) * (1 + len(args.tokens)), file=sys.stderr, desc="scaling") as bar:
        roofs = timing.measure_ceilings(device, dtype, small=args.model == "X")
        bar.update()
        facts, deadline = machine.facts(device), started + 60 * args.minutes
        run = Run(shape, device, dtype, roofs, facts, deadline, args.out, points=[], profiles=[])
        stop = deadline - (1 - SCALING_SHARE) * (deadline - time.monotonic())
        for point in long_sequences.scaling(shape, args.sizes, args.providers, device, dtype, stop):
            bar.update()
            run.points.append(point)  # and written at once: an interruption loses one point
            write_text(run.out / "scaling.csv", csv_text(profile_report.scaling_lines(run.points)))
        profile_report.write(run)  # in case that what follows is interrupted
        for provider in args.providers:
            bar.set_description_str(f"profile {provider}")
            run.profiles.append(profile(provider, run))
            bar.update()
    profile_report.write(run)
    for table in profile_report.overviews(run):
        print(f"{table.caption}\n\n{table.markdown()}\n")
    print(run.out / "report.html")


if __name__ == "__main__":
    main()
