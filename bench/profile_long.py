"""Profiles a model on long sequences: where the time goes by part, operator and kernel; memory; how both grow.

python -m bench.profile_long --patch 8 --size 1024 --out DIR        one image of 16,385 tokens, five providers
python -m bench.profile_long --device cpu --out DIR                 a small model and small images, two minutes
python -m bench.profile_long --profiler proton --out DIR            Triton's profiler instead of torch's; CUDA only

DIR gets for each provider regions_*.csv (the model's own names: time against measured ceilings, peak memory),
kernels_*.csv (torch.profiler's table of operators), trace_*.json.gz (for chrome://tracing or ui.perfetto.dev) and on
CUDA device_kernels_*.csv, memory_*.pickle and memory_*.html (pytorch.org/memory_viz; the page loads its viewer from the
network); for all together roofline.png, memory.png, scaling.csv, scaling.png, summary.md and report.html, which needs
nothing else.

What runs is the network and the labels; "triton" takes labels without full-resolution logits, the others by these.
A trace and a snapshot hold function names and a snapshot the paths of source files: look before you publish them.
"""

import argparse
import contextlib
import gzip
import importlib
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench import long_sequences, profile_report, profiling, providers, results, timing
from bench import profile_tables as tables
from bench.long_sequences import Point
from bench.profile_tables import FORWARD, Profile, csv_text
from bench.profiling import Regions
from bench.shapes import WIDTHS, Shape, forward_flops
from segmenter.files import write_atomically, write_text

QUICK = 1.0  # seconds: a forward below it is profiled several times
FORWARDS = 3
SCALING_SHARE = 0.55  # of the time; it goes first, what is left is for the profiles
SNAPSHOT_ENTRIES = 200_000
Call = Callable[[], None]
FILES = {"regions": "regions", "operators": "kernels", "kernels": "device_kernels"}


DEFAULTS = {  # option -> on a GPU, on a CPU, where compiling alone would take a minute a size
    "model": ("S", "T"),
    "size": (1024, 256),
    "dtype": ("bf16", "fp32"),
    "providers": (("eager", "sdpa-flash", "sdpa-cudnn", "triton", "compile"), ("eager", "sdpa-flash")),
    "tokens": ((257, 1025, 4097, 16385, 65537), (257, 1025, 4097)),
    "minutes": (15.0, 1.5),
}


class Setting(NamedTuple):
    """What is profiled, on what, with what, until when (`time.monotonic`), and where to."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    profiler: str
    roofs: timing.Ceilings
    deadline: float
    out: Path

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def profile(provider: str, setting: Setting, cost: float = 0.0) -> Profile:
    """Profiles one provider and writes its files; where that cannot be, the profile says why.

    `cost`: seconds that it takes, as far as something like it was measured before.
    """
    reason = long_sequences.unavailable(provider, setting.device, setting.dtype)
    least = 3 * forward_flops(setting.shape) / setting.roofs.flops_per_second  # counted, profiled, timed
    needed, left = max(cost, least), setting.seconds_left()
    if not reason and needed > left:
        reason = f"not run: predicted {long_sequences.rounded(needed)} s" if left > 0 else "not run: no time left"
    if reason:
        return Profile(provider, reason)
    try:
        with long_sequences.limited_memory(setting.device), torch.no_grad():
            return _profile(provider, setting)
    except (RuntimeError, MemoryError) as error:
        return Profile(provider, long_sequences.why_failed(error))
    finally:
        timing.release(setting.device)


def _profile(provider: str, setting: Setting) -> Profile:
    found, compiled = Profile(provider), provider == "compile"
    device, by_proton = setting.device, setting.profiler == "proton"
    im = long_sequences.image(setting.shape, device, setting.dtype)
    model = long_sequences.build(setting.shape, device, setting.dtype)
    regions = Regions(_proton().scope if by_proton else torch.profiler.record_function)
    # Without this, generated CPU kernels are no events of the profiler.
    options = {"cpp.enable_kernel_profile": True} if device.type == "cpu" else None
    run = long_sequences.network(model, provider, regions, options)
    counter = profiling.Counter(lambda: regions.current)

    def forward() -> None:
        run(im)
        timing.synchronize(device)

    if compiled:
        first = timing.wall_seconds(forward, device)
        found.notes.append(
            "Fused kernels compute several operators at once: their operations and bytes are unknown, their columns"
            " empty. There is one region, because compiled code knows no modules. What the program says is not always"
            " done: full-resolution logits, for one, can be fused away."
        )
    else:
        with regions.of(model), counter:
            first = timing.wall_seconds(forward, device)
    found.seconds = statistics.median(long_sequences.wall_times(forward, device, first))
    forwards = FORWARDS if found.seconds < QUICK else 1
    with contextlib.nullcontext() if compiled else regions.of(model):
        if by_proton:
            seconds = _by_proton(forward, forwards, regions, found, setting)
        else:
            warm_up = first < QUICK or compiled  # the first launches under a profiler are slow
            seconds = _by_torch(forward, forwards, warm_up, regions, found, setting)
    found.regions = tables.region_lines(seconds, counter.found, found.region_peaks(), forwards, setting.roofs)
    for name in ("regions", "operators", "kernels"):
        if lines := getattr(found, name):
            write_text(setting.out / f"{FILES[name]}_{provider}.csv", csv_text(lines))
    if device.type == "cuda":
        memory_snapshot(forward, provider, setting.out)
    return found


def _by_torch(
    forward: Call, forwards: int, warm_up: bool, regions: Regions, found: Profile, setting: Setting
) -> dict[str, float]:
    """Profiles with torch.profiler and writes the Chrome trace. Fills `found` and returns the regions' seconds."""
    device = setting.device.type
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, device.upper())}
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=forwards, repeat=1) if warm_up else None
    with torch.profiler.profile(activities=activities, schedule=schedule, profile_memory=True) as profiler:
        for _ in range(warm_up + forwards):
            with torch.profiler.record_function(FORWARD):
                forward()
            profiler.step()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    for key in ("host_name", "traceName", "trace_id"):  # of the machine, and of no use to anybody else
        trace.pop(key, None)
    packed = gzip.compress(json.dumps(trace).encode())
    write_atomically(setting.out / f"trace_{found.provider}.json.gz", lambda file: file.write(packed))
    events = profiler.events()
    found.profiled_seconds = statistics.fmean(e.time_range.elapsed_us() / 1e6 for e in tables.forwards_of(events))
    found.operators = tables.operator_lines(profiler.key_averages(), regions.names, forwards, device == "cuda")
    found.kernels = tables.kernel_lines(trace, forwards)
    found.memory, found.spans = tables.timeline(trace, regions.names, device)
    return tables.region_seconds(events, regions.names, device == "cuda")


def _by_proton(forward: Call, forwards: int, regions: Regions, found: Profile, setting: Setting) -> dict[str, float]:
    """As `_by_torch` with Proton and its .hatchet. Never together with torch.profiler: both need CUPTI."""
    proton = _proton()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "proton.hatchet"
        session = proton.start(str(path.with_suffix("")), context="shadow", data="tree")  # adds ".hatchet" itself
        try:
            for _ in range(forwards):
                forward()
        finally:
            proton.finalize(session)
        written = path.read_text()
    write_text(setting.out / f"proton_{found.provider}.hatchet", written)
    found.notes.append("Proton sees kernels, no operators of torch.")
    seconds, found.operators = tables.read_hatchet(json.loads(written), regions.names, forwards)
    return seconds


def _proton() -> Any:
    return importlib.import_module("triton.profiler")


def memory_snapshot(forward: Call, provider: str, out: Path) -> None:
    """Writes what torch's allocator on the GPU did during one forward, as a pickle and as a page."""
    from torch.cuda import _memory_viz, memory

    memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES, stacks="python")
    try:
        forward()
        snapshot = memory._snapshot()
    finally:
        memory._record_memory_history(enabled=None)
    write_atomically(out / f"memory_{provider}.pickle", lambda file: pickle.dump(snapshot, file))
    write_text(out / f"memory_{provider}.html", _memory_viz.trace_plot(snapshot))


def scaling_points(args: argparse.Namespace, setting: Setting, bar: Any) -> Iterator[tuple[Point, float]]:
    """All providers at all lengths, each with the seconds that it took; providers share the time that scaling gets."""
    sizes, on = long_sequences.sizes_for(args.tokens, args.patch), (setting.device, setting.dtype)
    stop = time.monotonic() + SCALING_SHARE * setting.seconds_left()
    for i, provider in enumerate(args.providers):
        start = time.monotonic()
        end = start + max(stop - start, 0) / (len(args.providers) - i)
        bar.set_description_str(f"scaling {provider}")
        left = lambda end=end: end - time.monotonic()  # noqa: E731
        for point in long_sequences.scaling(setting.shape, sizes, provider, *on, left):
            bar.update()
            yield point, time.monotonic() - start
            start = time.monotonic()


def cost_of(provider: str, shape: Shape, points: list[tuple[Point, float]]) -> float:
    """What profiling this shape takes at least, by the provider's point of this length or the longest below it."""
    done = [(p.tokens, took) for p, took in points if p.provider == provider and not p.reason]
    return max((one for one in done if one[0] <= shape.tokens), default=(0, 0.0))[1]


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
    add("dtype", choices=results.DTYPES)
    add("device", "default: a GPU if there is one", choices=("cuda", "cpu"))
    add("tokens", "lengths for the scaling; ", type=int, nargs="*")
    add("minutes", "nothing is started after so long; ", type=float)
    add("profiler", choices=("torch", "proton"), default="torch")
    add("out", "folder for everything", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.device == "cpu"])
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    if args.profiler == "proton" and args.device == "cpu":
        parser.error("--profiler proton: Triton's profiler sees GPU kernels only; leave it out on a CPU")
    if args.size < args.patch or args.size % args.patch:
        parser.error(f"--size {args.size} is no multiple of --patch {args.patch}")
    if not 2 <= args.classes <= 256 or args.batch < 1:
        parser.error("--classes must be 2 to 256 and --batch at least 1")
    try:
        long_sequences.sizes_for(args.tokens, args.patch)
    except ValueError as error:
        parser.error(f"--tokens: {error}")
    args.providers = list(dict.fromkeys(args.providers))
    return args


def command(argv: list[str]) -> str:
    """The command line without the directory, which is of this machine."""
    words = ["DIR" if before == "--out" else word for before, word in zip(["", *argv], argv, strict=False)]
    return " ".join(["python -m bench.profile_long", *("--out=DIR" if w.startswith("--out=") else w for w in words)])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    started = time.monotonic()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its library reports every start and stop on a CPU otherwise
    args.out.mkdir(parents=True, exist_ok=True)
    device, dtype = torch.device(args.device), results.DTYPES[args.dtype]
    shape = Shape(args.model, args.patch, args.size, args.batch, args.classes, args.decoder == "mask")
    with tqdm(total=1 + len(args.providers) * (1 + len(args.tokens)), file=sys.stderr, desc="ceilings") as bar:
        roofs = timing.measure_ceilings(device, dtype, small=args.model == "X")
        bar.update()
        deadline = started + 60 * args.minutes
        setting = Setting(shape, device, dtype, args.profiler, roofs, deadline, args.out)
        facts = results.facts(device) | {"command": command(sys.argv[1:] if argv is None else argv)}
        points: list[tuple[Point, float]] = []
        for found in scaling_points(args, setting, bar):
            points.append(found)
            # after each: an interruption loses one point
            write_text(args.out / "scaling.csv", csv_text(profile_report.scaling_lines([point for point, _ in points])))
        report = profile_report.Report(shape, dtype, args.profiler, roofs, facts, [], [p for p, _ in points])
        profile_report.write(report, args.out)  # in case that what follows is interrupted
        for provider in args.providers:
            bar.set_description_str(f"profile {provider}")
            report.profiles.append(profile(provider, setting, cost_of(provider, shape, points)))
            bar.update()
    profile_report.write(report, args.out)
    for table in (profile_report.overview(report), *profile_report.scaling_tables(report.points)):
        print(f"{table.caption}\n{table.plain()}\n")
    print(args.out / "report.html")


if __name__ == "__main__":
    main()
