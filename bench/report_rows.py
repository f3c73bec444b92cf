"""What the report knows about result files: rows of any age or completeness, groups, speed-ups, and the verdict.

The rule of every verdict, also of "slower" inside one file: two medians differ only if

1. their quartile boxes [q1, q3] do not overlap, and
2. their ratio is beyond 3 % and beyond both relative interquartile ranges together (root of the sum of squares).

Anything else is "no difference"; a row without quartiles gives "spread unknown". The rule is symmetric: exchanging the
two rows exchanges "faster" and "slower". 3 % is for what changes between two sessions and no single one can see.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report_page import NO_VALUE
from bench.results import load
from bench.shapes import Shape

LEAST_DIFFERENCE = 0.03  # relative
FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no difference", "spread unknown"
NOTHING_SAID = {"kind": "other", "provider": "unknown", "name": "", "reason": "no reason recorded"}
OURS = ("triton", "pruned", "bands")
USUAL_CLASSES = 150  # not worth saying in a label


def number(value: Any) -> float | None:
    """`value` if something measured can have it, else None: files may be partial or of another version."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


@dataclass(frozen=True)
class Row:
    """A measured row. Times are seconds a call; None where the file does not say.

    Attributes:
        label: model, picture and batch, for people. info: `extra_info` as it stands in the file.
    """

    kind: str
    provider: str
    label: str
    dtype: str
    timing: str
    tokens: float | None
    median: float
    q1: float | None
    q3: float | None
    rounds: float | None
    shape: dict[str, Any] = field(hash=False)
    info: dict[str, Any] = field(hash=False)

    def get(self, name: str) -> float | None:
        """A number of `extra_info`, or None."""
        return number(self.info.get(name))

    @property
    def iqr(self) -> float | None:
        """Interquartile range relative to the median."""
        return None if self.q1 is None or self.q3 is None else (self.q3 - self.q1) / self.median

    @property
    def group(self) -> tuple[str, str, str]:
        """What rows have in common that are compared with each other."""
        return self.kind, self.label, self.dtype

    @property
    def ours(self) -> bool:
        return self.provider in OURS or self.info.get("ours") is True

    @property
    def images_per_second(self) -> float | None:
        return self.get("images_per_second")

    @property
    def peak_bytes(self) -> float | None:
        return self.get("peak_bytes")


@dataclass
class Results:
    """One result file, read for the report."""

    path: Path
    machine: dict[str, Any]
    ceilings: dict[str, Any]
    rows: list[Row]
    unavailable: list[dict[str, Any]]
    content: dict[str, Any]
    left_out: int  # rows without a usable median

    @property
    def device(self) -> str:
        """Name of the GPU, or "CPU" and which."""
        name = self.machine.get("name") or cpu_name(self.machine)
        return str(name) if self.on_gpu else f"CPU: {name}"

    @property
    def on_gpu(self) -> bool:
        return self.machine.get("device") == "cuda"

    @property
    def stack(self) -> str:
        """Versions and commit in one line."""
        parts = [f"{key} {self.machine[key]}" for key in ("torch", "triton", "commit") if self.machine.get(key)]
        return ", ".join(parts) or "versions not recorded"

    def of(self, kind: str) -> list[Row]:
        """Rows of one kind, in the order of the file."""
        return [row for row in self.rows if row.kind == kind]

    def missing(self, kind: str) -> list[dict[str, Any]]:
        """Unavailable rows of one kind."""
        return [row for row in self.unavailable if row["kind"] == kind]


def cpu_name(machine: dict[str, Any]) -> str:
    """The processor; pytest-benchmark's own files hold a dictionary."""
    cpu = machine.get("cpu")
    if isinstance(cpu, dict):
        cpu = cpu.get("brand_raw")
    return str(cpu or "unknown")


def read(path: Path) -> Results:
    """A result file with whatever is missing left out.

    Raises:
        ResultsError: it is none.
    """
    content = load(path)
    benchmarks = content["benchmarks"] if isinstance(content["benchmarks"], list) else []
    rows = [row for bench in benchmarks if (row := _row(bench)) is not None]
    unavailable = [
        {**NOTHING_SAID, **{key: value for key, value in entry.items() if value is not None}}
        for entry in content.get("unavailable") or []
        if isinstance(entry, dict)
    ]
    return Results(
        path=path,
        machine=_dictionary(content["machine_info"]),
        ceilings=_dictionary(content.get("ceilings")),
        rows=rows,
        unavailable=unavailable,
        content=content,
        left_out=len(benchmarks) - len(rows),
    )


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _row(bench: Any) -> Row | None:
    bench = _dictionary(bench)
    info, stats = _dictionary(bench.get("extra_info")), _dictionary(bench.get("stats"))
    median = number(stats.get("median"))
    if median is None or median <= 0:
        return None
    shape = _dictionary(info.get("shape"))
    kind = info.get("kind") or ("model" if "agreement" in info else "other")
    tokens = number(info.get("tokens"))
    label = shape_label(shape, info)
    if not label:
        label = f"{tokens:,.0f} tokens" if tokens and kind == "long" else str(bench.get("name") or "unnamed")
    quartiles = number(stats.get("q1")), number(stats.get("q3"))
    width = number(stats.get("iqr"))
    if None in quartiles and width is not None:
        quartiles = max(0.0, median - width / 2), median + width / 2
    return Row(
        kind=str(kind),
        provider=str(info.get("provider") or bench.get("name") or "unknown"),
        label=label,
        dtype=str(info.get("dtype") or "unknown type"),
        timing=str(info.get("timing") or "unknown"),
        tokens=tokens,
        median=median,
        q1=quartiles[0],
        q3=quartiles[1],
        rounds=number(stats.get("rounds")),
        shape=shape,
        info=info,
    )


def known_shape(shape: Any) -> Shape | None:
    """The sweep's Shape for its dictionary; None if that is incomplete."""
    try:
        return Shape(**{key: value for key, value in _dictionary(shape).items() if key in Shape._fields})
    except TypeError:
        return None


def shape_label(shape: Any, info: dict[str, Any]) -> str:
    """ "Seg-S-Mask/16, 512x512, batch 8" as far as it is known; empty if nothing is."""
    found = known_shape(shape)
    name = str(info["model"]) if info.get("model") else found.name if found else ""
    classes = f"{found.n_cls} classes" if found and found.n_cls != USUAL_CLASSES else ""
    return ", ".join(filter(None, (name, input_label(found._asdict() if found else info), classes)))


def input_label(info: dict[str, Any]) -> str:
    """ "512x512, batch 8" of a dictionary with size, one number or height and width, and batch."""
    size, parts = info.get("size"), []
    if isinstance(size, list) and len(size) == 2:
        parts.append(f"{size[1]}x{size[0]}")
    elif number(size):
        parts.append(f"{size}x{size}")
    return ", ".join([*parts, *([f"batch {info['batch']}"] if number(info.get("batch")) else [])])


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def verdict(base: Row, row: Row) -> str:
    """Whether `row` is faster than `base`, by the rule of this module."""
    if base.iqr is None or row.iqr is None:
        return UNKNOWN
    apart = row.q3 < base.q1 or base.q3 < row.q1
    limit = max(math.log1p(LEAST_DIFFERENCE), math.hypot(base.iqr, row.iqr))
    change = math.log(base.median / row.median)
    if not apart or abs(change) <= limit:
        return SAME
    return FASTER if change > 0 else SLOWER


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row of the smallest median."""
    return min(rows, key=lambda row: row.median, default=None)


class Group:
    """Rows of one shape by provider, with what speed-ups refer to."""

    def __init__(self, rows: Iterable[Row]):
        self.by_provider = {row.provider: row for row in rows}
        self.eager = self.by_provider.get("eager") or self.by_provider.get("published")
        self.sdpa = fastest(row for row in self.by_provider.values() if row.provider.startswith("sdpa"))
        self.other = fastest(row for row in self.by_provider.values() if not row.ours)
        self.best = fastest(self.by_provider.values())


def speed(base: Row | None, row: Row | None) -> float | None:
    """How many times faster `row` is than `base`."""
    return None if base is None or row is None else base.median / row.median


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], Group]:
    """Groups in the order in which their first row was measured, which is the most telling first."""
    lists: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lists.setdefault(row.group, []).append(row)
    return {key: Group(found) for key, found in lists.items()}


@dataclass(frozen=True)
class Pair:
    """A row of both files. `speed`: how many times faster the second is."""

    before: Row
    after: Row
    speed: float
    verdict: str


@dataclass
class Comparison:
    """Two files, row by row: matched by kind, model and shape, provider and type, and then by how they were timed."""

    before: Results
    after: Results
    pairs: list[Pair]
    timed_differently: list[tuple[Row, Row]]
    only_before: list[Row]
    only_after: list[Row]

    @property
    def same_machine(self) -> bool:
        return self.before.device == self.after.device

    def differences(self) -> list[tuple[str, str, str]]:
        """(fact, before, after) for what differs between the machines, stacks and commits."""
        a, b = ({**result.machine, "cpu": cpu_name(result.machine)} for result in (self.before, self.after))
        keys = [key for key in {**a, **b} if not isinstance(a.get(key, b.get(key)), dict | list)]
        return [(key, str(a.get(key, NO_VALUE)), str(b.get(key, NO_VALUE))) for key in keys if a.get(key) != b.get(key)]

    def ceiling_ratios(self) -> list[tuple[str, float]]:
        """(ceiling, after over before): how much of a change is the machine's own."""
        names = {"matrix products": "flops_per_second", "copies": "bytes_per_second"}
        pairs = {k: (number(self.before.ceilings.get(v)), number(self.after.ceilings.get(v))) for k, v in names.items()}
        return [(name, b / a) for name, (a, b) in pairs.items() if a and b]

    def notes(self) -> list[str]:
        """What a reader has to know before believing a verdict."""
        found = []
        if not self.same_machine:
            found.append(
                f"Different machines: {self.before.device} against {self.after.device}. The ratios compare the "
                "machines as much as the code."
            )
        for name, ratio in self.ceiling_ratios():
            if self.same_machine and abs(math.log(ratio)) > math.log1p(LEAST_DIFFERENCE):
                found.append(
                    f"The machine itself was not the same: its {name} ran at {times(ratio)} of the first file's rate."
                )
        if not self.pairs:
            found.append("No row is in both files (kind, model and shape, provider, type, timing).")
        return found

    def counts(self) -> dict[str, dict[str, int]]:
        """Kind -> verdict -> number of rows."""
        found: dict[str, dict[str, int]] = {}
        for pair in self.pairs:
            kinds = found.setdefault(pair.after.kind, dict.fromkeys((FASTER, SAME, SLOWER, UNKNOWN), 0))
            kinds[pair.verdict] += 1
        return found


def compare(before: Results, after: Results) -> Comparison:
    """Matches the rows of two files; of rows that a file has twice the last counts."""

    def keyed(rows: list[Row]) -> dict[tuple, Row]:
        return {(row.kind, row.label, row.tokens, row.provider, row.dtype): row for row in rows}

    a, b = keyed(before.rows), keyed(after.rows)
    common = [(a[key], b[key]) for key in a if key in b]
    pairs = [Pair(x, y, x.median / y.median, verdict(x, y)) for x, y in common if x.timing == y.timing]
    differently = [(x, y) for x, y in common if x.timing != y.timing]
    only_before = [row for key, row in a.items() if key not in b]
    return Comparison(before, after, pairs, differently, only_before, [row for key, row in b.items() if key not in a])


# ---------------------------------------------------------------------------------------------------------------------
# Numbers for people


def or_dash(form: Callable[[float], str]) -> Callable[[float | None], str]:
    """`form`, and a dash for None."""

    @functools.wraps(form)
    def run(value: float | None) -> str:
        return NO_VALUE if value is None else form(value)

    return run


@or_dash
def significant(value: float, digits: int = 3) -> str:
    """ "1.23", "12.3", "1,230": three significant digits, no exponent unless tiny."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, digits - 1 - exponent)
    exponent = math.floor(math.log10(abs(rounded)))  # 9.999 is 10.0, not 10.00
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def _in_units(value: float, units: Sequence[tuple[str, float]]) -> str:
    """In the first unit of which there is one, or in the last."""
    unit, size = next((unit for unit in units if abs(value) >= 0.9995 * unit[1]), units[-1])
    return f"{significant(value / size)} {unit}"


@or_dash
def duration(seconds: float) -> str:
    """ "12.3 µs", "1.23 ms", "4.56 s"."""
    return _in_units(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))


@or_dash
def memory(count: float) -> str:
    """Bytes as "12.3 MiB" or "1.23 GiB"."""
    return _in_units(count, (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1)))


@or_dash
def times(ratio: float) -> str:
    """ "1.23x"."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{significant(ratio)}x"


@or_dash
def percent(value: float) -> str:
    """ "12.3 %", "101 %", "0.026 %"."""
    return f"{value:.0f} %" if value >= 99.95 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


@or_dash
def share(value: float) -> str:
    """A share of 1 as a percentage with two decimals, rounded down: "100.00 %" is never said of less."""
    return f"{math.floor(value * 1e4 + 1e-6) / 100:.2f} %"


@or_dash
def points(value: float) -> str:
    """mIoU, given in percent, with two decimals."""
    return f"{value:.2f}"


@or_dash
def whole(value: float) -> str:
    """ "16,385"."""
    return f"{value:,.0f}"


def counted(count: int, what: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def span(values: list[float]) -> str:
    """Median and range of ratios: "1.23x (0.90x to 2.10x)"."""
    if not values:
        return NO_VALUE
    middle, low, high = (times(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"
