"""One row of the benchmark, from its inputs to its line in the results file: check, warm up, time, memory, context."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from bench import machine, providers, results, timing
from bench.operations import Operation
from bench.shapes import Shape, Work

OUT_OF_TIME = "not run: the time was used up"


class Call(NamedTuple):
    """What is timed: `fn`, called with what `inputs` makes; what else it needs is built before."""

    fn: Callable
    inputs: Callable[[], tuple]  # from torch's global generator, seeded before: all providers of a group get the same
    check: Callable[[Any, tuple], str]  # (result, its inputs) -> how right it is; raises gate.GateError
    work: Work


@dataclass
class Row:
    """One row, and what is said about it."""

    kind: str
    provider: str
    shape: Shape | None
    build: Callable[[], Call]  # called when the row's turn has come; raises providers.Unavailable
    # Those of one call; the row is then timed by the wall clock as a user sees it, launches included. None for single
    # operations, which are timed on the device.
    images: int | None = None
    compiled: bool = False  # by torch.compile, so the first call is compilation
    replays: bool = False  # a CUDA graph's, whose memory no single call shows
    extra: dict[str, Any] = field(default_factory=dict)  # joins `extra_info`, or stands beside the reason for no result
    name: str = ""  # made of kind, shape, type and provider if there is none


@dataclass
class Harness:
    """What the rows of one session share."""

    device: torch.device
    dtype: torch.dtype
    smoke: bool  # nothing is timed, sizes are tiny
    results: results.ResultsFile | None  # None keeps nothing
    seconds: float  # what the rounds of one row should take
    deadline: float  # `time.time()` after which no row starts any more
    known: frozenset[str] = frozenset()  # names of rows that are not to be measured again
    failed: Sequence[str] = ()  # operations whose kernels failed their tests

    @property
    def short(self) -> str:
        """The session's type: "bf16"."""
        return machine.SHORT[self.dtype]

    @functools.cached_property
    def ceilings(self) -> timing.Ceilings:
        """Measured once a results file, before its first timed row."""
        known = self.results and self.results.content["ceilings"]
        if known:  # of the run that is continued, or percentages of one file would mean different things
            return timing.Ceilings(**known)
        found = timing.measure_ceilings(self.device, self.dtype, small=self.smoke)
        if self.results is not None:
            self.results.content["ceilings"] = found._asdict()
            self.results.save()
        return found

    def operation(self, benchmark: Any, operation: Operation, shape: Shape, provider: str) -> None:
        """Times one operation by one provider."""

        def build() -> Call:
            return Call(
                operation.call(provider, shape),
                lambda: operation.inputs(shape, self.dtype, self.device),
                functools.partial(operation.check, provider, shape),
                operation.work(shape, self.dtype.itemsize),
            )

        self.run(benchmark, Row(operation.kind, provider, shape, build, compiled=provider == "compile"))

    def run(self, benchmark: Any, row: Row) -> None:
        """Builds, checks and times a row; one that cannot be had here is skipped, and noted."""
        row.name = row.name or f"{row.kind}-{row.shape.id}-{self.short}-{row.provider}"
        if row.name in self.known:
            pytest.skip(f"{row.name}: measured before")
        if time.time() > self.deadline:
            self._unavailable(row, OUT_OF_TIME)
        provider = providers.computing(row.provider)
        if provider == "triton" and row.kind in self.failed:
            self._unavailable(row, "not run: the kernels failed the tests of this operation")
        # A row that raised leaves the clock half used and memory held; neither may reach this one.
        timing.CLOCK.reset()
        if not self.smoke:  # tiny inputs hold little, and a release takes 0.3 s
            timing.release(self.device)
        torch._dynamo.reset()  # or the ninth shape of a function would run uncompiled
        try:
            if provider in providers.PROVIDERS:
                providers.require(provider, self.device, self.dtype, timed=not self.smoke)
            with _in_memory("out of memory"):
                self._measure(benchmark, row, row.build())
        except providers.Unavailable as error:
            self._unavailable(row, str(error))
        finally:
            timing.CLOCK.reset()

    def _unavailable(self, row: Row, reason: str) -> None:
        if self.results is not None:
            facts = {"kind": row.kind, "provider": row.provider, "shape": row.shape and row.shape._asdict()}
            self.results.add_unavailable({**row.extra, **facts, "name": row.name, "reason": reason})
        pytest.skip(f"{row.name}: {reason}")

    def _measure(self, benchmark: Any, row: Row, call: Call) -> None:
        def inputs_of(i: int) -> tuple:
            torch.manual_seed(i)
            return call.inputs()

        inputs = inputs_of(0)
        result, first = timing.timed(lambda: call.fn(*inputs), self.device)  # compiles and warms up
        seconds = first
        # A GPU's first call compiles our kernels too, and the second of torch.compile records its graph.
        more = 2 if self.device.type == "cuda" else 1 if row.compiled or first < timing.SLOW else 0
        for _ in range(more):
            result, seconds = timing.timed(lambda: call.fn(*inputs), self.device)
        where = "CPU" if self.device.type == "cpu" else "GPU"  # a group is compared with each other
        benchmark.group = f"{row.kind} {row.shape.id if row.shape else 'all'} {self.short} {where}"
        with _in_memory("its exact result does not fit in memory, so it cannot be checked"):
            verdict = call.check(result, inputs)
        facts = row_facts(row.kind, row.provider, row.name, self.short, call.work, row.shape)
        benchmark.extra_info.update(facts | row.extra, gate=verdict)
        del result
        if row.compiled:
            benchmark.extra_info["compile_seconds"] = round(first - seconds, 2)
        if not benchmark.enabled:
            benchmark.pedantic(call.fn, args=inputs)
            return
        roofs = self.ceilings
        count = timing.n_sets(timing.tensor_bytes(inputs), machine.cache_bytes(self.device), seconds)
        sets = [inputs, *(inputs_of(i) for i in range(1, count))]
        run, calls, mode = self._round(row, call.fn, sets, seconds)
        timing.CLOCK.reset("wall" if mode == "wall" else "events", calls, self.device)
        rounds = timing.rounds_for(seconds * calls, self.seconds)
        if time.time() + (rounds + 2) * calls * seconds > self.deadline:
            raise providers.Unavailable(OUT_OF_TIME)
        state = machine.sampling(self.device)
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=1, iterations=1)
        benchmark.extra_info.update(timing=mode, input_sets=count, state=state())
        del run, sets
        hidden = row.replays and self.device.type == "cuda"
        peak = None if hidden else timing.peak_bytes(lambda: call.fn(*inputs), self.device)
        found = rates(call.work, row.images, benchmark.stats.stats.median, roofs)
        if benchmark.extra_info["dtype"] != self.short:  # the ceilings are of another type
            found = {key: value for key, value in found.items() if key in ("tflops", "gbps", "images_per_second")}
        benchmark.extra_info.update(found, peak_bytes=peak)
        if self.results is not None:
            self.results.add(benchmark.stats.as_dict(include_data=False))

    def _round(self, row: Row, fn: Callable, sets: Sequence[tuple], seconds: float) -> tuple[Callable, int, str]:
        """What a round runs, the number of calls in it, and how that is called in the results."""
        whole = row.images is not None
        if self.device.type == "cpu" or whole:
            calls = len(sets) if seconds < timing.SHORT and not whole else 1
            return timing.Rotation(fn, sets, calls), calls, "wall"
        run = timing.Rotation(fn, sets, len(sets))
        try:
            return timing.graphed(run), len(sets), "graph"
        except RuntimeError as error:  # not every provider can be captured; the row says how it was timed
            if timing.out_of_memory(error):
                raise
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError:
                pytest.exit(f"{row.name}: a failed capture left torch unusable ({error}); run again with --missing", 3)
            return run, len(sets), "events"


@contextlib.contextmanager
def _in_memory(reason: str) -> Iterator[None]:
    """Where memory does not suffice for what is inside, the row is unavailable for that reason."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not timing.out_of_memory(error):
            raise
        raise providers.Unavailable(reason) from None


def row_facts(kind: str, provider: str, name: str, dtype: str, work: Work, shape: Shape | None) -> dict[str, Any]:
    """What `extra_info` says of every row."""
    facts = {"kind": kind, "provider": provider, "row": name, "dtype": dtype, "flops": work.flops, "bytes": work.bytes}
    return facts | ({"model": shape.name, "shape": shape._asdict(), "tokens": shape.tokens} if shape else {})


def rates(work: Work, images: int | None, seconds: float, roofs: timing.Ceilings) -> dict[str, Any]:
    """What was reached in `seconds` a call, absolutely and in percent of the measured ceilings and of the floor."""
    found: dict[str, Any] = {}
    if work.flops:
        reached = work.flops / seconds
        found |= {"tflops": reached / 1e12, "percent_flops": 100 * reached / roofs.flops_per_second}
    if work.bytes:
        reached = work.bytes / seconds
        found |= {"gbps": reached / 1e9, "percent_bytes": 100 * reached / roofs.bytes_per_second}
    if found:
        floor = work.floor(roofs.flops_per_second, roofs.bytes_per_second)
        found |= {"floor_seconds": floor, "percent_of_floor": 100 * floor / seconds}
    if images is not None:
        found["images_per_second"] = images / seconds
    return found
