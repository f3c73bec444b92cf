"""One row of the benchmark, from its inputs to its line in the results file: check, warm up, time, memory, context."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch

from bench import ceilings, machine, providers, timing
from bench.operations import Operation
from bench.results_file import ResultsFile
from bench.shapes import Shape, Work

OUT_OF_TIME = "not run: the time was used up"


@dataclass
class Row:
    """What is timed, and what is said about it.

    Attributes:
        fn: called with what `inputs` makes; what else it needs is built before.
        inputs: a new set of inputs each time, from torch's global generator, which is seeded before: every provider of
            a group gets the same ones.
        check: (result, its inputs) -> how right it is; raises gate.GateError.
        pictures: pictures of one call, for images a second; None for single operations.
        whole: timed by the wall clock as a user sees it, launches included, instead of on the device.
        compiled: by torch.compile, so the first call is compilation.
        replays: a CUDA graph's, whose memory no single call shows.
        extra: joins `extra_info`.
    """

    kind: str
    provider: str
    shape: Shape | None
    fn: Callable
    inputs: Callable[[], tuple]
    check: Callable[[Any, tuple], str]
    work: Work
    name: str
    pictures: int | None = None
    whole: bool = False
    compiled: bool = False
    replays: bool = False
    extra: dict[str, Any] | None = None


class Harness:
    """What the rows of one session share.

    Args:
        device, dtype: where and in what type. smoke: nothing is timed, sizes are tiny. results: None keeps nothing.
        seconds: what the rounds of one row should take. deadline: `time.time()` after which no row starts any more.
        known: names of rows that are not to be measured again.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        smoke: bool,
        results: ResultsFile | None,
        seconds: float,
        deadline: float,
        known: frozenset[str] = frozenset(),
    ):
        self.device, self.dtype, self.smoke = device, dtype, smoke
        self.results, self.seconds, self.deadline, self.known = results, seconds, deadline, known

    @cached_property
    def ceilings(self) -> ceilings.Ceilings:
        """Measured once a results file, before its first timed row."""
        known = self.results and self.results.content["ceilings"]
        if known:  # of the run that is continued, or percentages of one file would mean different things
            return ceilings.Ceilings(**known)
        found = ceilings.measure(self.device, self.dtype, small=self.smoke)
        if self.results is not None:
            self.results.content["ceilings"] = found._asdict()
            self.results.save()
        return found

    def operation(self, benchmark: Any, operation: Operation, shape: Shape, provider: str) -> None:
        """Times one operation by one provider."""
        kind, name = operation.kind, f"{operation.kind}-{shape.id}-{machine.SHORT[self.dtype]}-{provider}"

        def build() -> Row:
            return Row(
                kind,
                provider,
                shape,
                operation.call(provider, shape),
                lambda: operation.inputs(shape, self.dtype, self.device),
                lambda result, inputs: operation.check(provider, shape, result, inputs),
                operation.work(shape, self.dtype.itemsize),
                name,
                compiled=provider == "compile",
            )

        self.run(benchmark, kind, provider, shape, name, build)

    def run(
        self,
        benchmark: Any,
        kind: str,
        provider: str,
        shape: Shape | None,
        name: str,
        build: Callable[[], Row],
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Builds, checks and times a row; one that cannot be had here is skipped, and noted with `facts`."""
        if name in self.known:
            pytest.skip(f"{name}: measured before")
        if time.time() > self.deadline:
            self._unavailable(kind, provider, shape, name, OUT_OF_TIME, facts)
        torch._dynamo.reset()  # or the ninth shape of a function would run uncompiled
        try:
            if provider in providers.PROVIDERS:
                providers.require(provider, self.device, self.dtype, timed=not self.smoke)
            self._measure(benchmark, build())
        except providers.Unavailable as error:
            self._unavailable(kind, provider, shape, name, str(error), facts)
        except (RuntimeError, MemoryError) as error:
            if not timing.out_of_memory(error):
                raise
            self._unavailable(kind, provider, shape, name, "out of memory", facts)
        finally:
            timing.CLOCK.reset()
            timing.release(self.device)

    def _unavailable(
        self, kind: str, provider: str, shape: Shape | None, name: str, reason: str, facts: dict[str, Any] | None
    ) -> None:
        if self.results is not None:
            self.results.add_unavailable(kind, provider, shape and shape._asdict(), name, reason, facts)
        pytest.skip(f"{name}: {reason}")

    def _measure(self, benchmark: Any, row: Row) -> None:
        inputs = self._inputs(row, 0)
        result, first = self._call(row, inputs)  # compiles and warms up
        seconds = first
        # A GPU's first call compiles our kernels too, and the second of torch.compile records its graph.
        more = 2 if self.device.type == "cuda" else 1 if row.compiled or first < timing.SLOW else 0
        for _ in range(more):
            result, seconds = self._call(row, inputs)
        benchmark.group = self.group(row)
        verdict = self._verdict(row, result, inputs)
        benchmark.extra_info.update(self._facts(row), gate=verdict)
        del result
        if row.compiled:
            benchmark.extra_info["compile_seconds"] = round(first - seconds, 2)
        if not benchmark.enabled:
            benchmark.pedantic(row.fn, args=inputs)
            return
        roofs = self.ceilings
        count = timing.n_sets(timing.tensor_bytes(inputs), machine.cache_bytes(self.device), seconds)
        sets = [inputs, *(self._inputs(row, i) for i in range(1, count))]
        run, calls, mode = self._round(row, sets, seconds)
        timing.CLOCK.reset("wall" if mode == "wall" else "events", calls, self.device)
        rounds = timing.rounds_for(seconds * calls, self.seconds)
        if time.time() + (rounds + 2) * calls * seconds > self.deadline:
            raise providers.Unavailable(OUT_OF_TIME)
        state = machine.sampling(self.device)
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=1, iterations=1)
        benchmark.extra_info.update(timing=mode, input_sets=count, state=state())
        del run, sets
        hidden = row.replays and self.device.type == "cuda"
        peak = None if hidden else timing.peak_bytes(lambda: row.fn(*inputs), self.device)
        benchmark.extra_info["peak_bytes"] = peak
        found = rates(row, benchmark.stats.stats.median, roofs)
        if benchmark.extra_info["dtype"] != machine.SHORT[self.dtype]:  # the ceilings are of another type
            found = {key: value for key, value in found.items() if key in ("tflops", "gbps", "images_per_second")}
        benchmark.extra_info.update(found)
        if self.results is not None:
            self.results.add(benchmark.stats.as_dict(include_data=False))

    def _verdict(self, row: Row, result: Any, inputs: tuple) -> str:
        try:
            return row.check(result, inputs)
        except (RuntimeError, MemoryError) as error:
            if not timing.out_of_memory(error):
                raise
        raise providers.Unavailable("its exact result does not fit in memory, so it cannot be checked")

    def _call(self, row: Row, inputs: tuple) -> tuple[Any, float]:
        start = time.perf_counter()
        result = row.fn(*inputs)
        timing.synchronize(self.device)
        return result, time.perf_counter() - start

    def _inputs(self, row: Row, i: int) -> tuple:
        torch.manual_seed(i)
        return row.inputs()

    def _round(self, row: Row, sets: Sequence[tuple], seconds: float) -> tuple[Callable, int, str]:
        """What a round runs, the number of calls in it, and how that is called in the results."""
        if self.device.type == "cpu" or row.whole:
            calls = len(sets) if seconds < timing.SHORT and not row.whole else 1
            return timing.Rotation(row.fn, sets, calls), calls, "wall"
        run = timing.Rotation(row.fn, sets, len(sets))
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

    def group(self, row: Row) -> str:
        """What rows have in common that are compared with each other."""
        where = "CPU" if self.device.type == "cpu" else "GPU"
        what = row.shape.id if row.shape else "all"
        return f"{row.kind} {what} {machine.SHORT[self.dtype]} {where}"

    def _facts(self, row: Row) -> dict[str, Any]:
        shape = row.shape
        facts = {
            "kind": row.kind,
            "provider": row.provider,
            "row": row.name,
            "dtype": machine.SHORT[self.dtype],
            "flops": row.work.flops,
            "bytes": row.work.bytes,
        }
        if shape is not None:
            facts |= {"model": shape.name, "shape": shape._asdict(), "tokens": shape.tokens}
        return {**facts, **(row.extra or {})}


def rates(row: Row, seconds: float, roofs: ceilings.Ceilings) -> dict[str, Any]:
    """What a row reached in `seconds` a call, absolutely and in percent of the measured ceilings and of its floor."""
    found: dict[str, Any] = {}
    flops, moved = row.work.flops / seconds, row.work.bytes / seconds
    if row.work.flops:
        found |= {"tflops": flops / 1e12, "percent_flops": 100 * flops / roofs.flops_per_second}
    if row.work.bytes:
        found |= {"gbps": moved / 1e9, "percent_bytes": 100 * moved / roofs.bytes_per_second}
    if found:
        floor = row.work.floor(roofs.flops_per_second, roofs.bytes_per_second)
        found |= {"floor_seconds": floor, "percent_of_floor": 100 * floor / seconds}
    if row.pictures is not None:
        found["images_per_second"] = row.pictures / seconds
    return found
