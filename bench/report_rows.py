"""What the report knows about result files: rows of any age or completeness, groups, and the verdict.

The rule of every verdict, also of "slower" inside one file: two medians differ only if

1. their quartile boxes [q1, q3] do not overlap, and
2. their ratio is beyond 3 % and beyond both relative interquartile ranges together (root of the sum of squares).

Anything else is "no difference"; a row without quartiles gives "spread unknown". The rule is symmetric: exchanging the
two rows exchanges "faster" and "slower". 3 % is for what changes between two sessions and no single one can see.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.report_page import NO_VALUE
from bench.results import load
from bench.shapes import Shape

LEAST_DIFFERENCE = 0.03  # relative
FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no difference", "spread unknown"
RULE = (
    "Rule: faster or slower only if the quartile boxes do not overlap and the ratio of medians is beyond 3 % and "
    "beyond both relative interquartile ranges together (root of the sum of squares)."
)
MACHINES = "The ratios compare the machines as much as the code."
OURS = ("triton", "pruned", "bands")
USUAL_CLASSES = 150  # not worth saying in a label
NOTHING_SAID = {"kind": "other", "provider": "unknown", "name": "", "reason": "no reason recorded"}


def number(value: Any) -> float | None:
    """`value` if something measured can have it, else None: files may be partial or of another version."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def dictionary(value: Any) -> dict[str, Any]:
    """`value` if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Row:
    """A measured row. Times are seconds a call; None where the file does not say.

    Attributes:
        label: model, image and batch, for people. info: `extra_info` as it stands in the file.
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
    info: dict[str, Any] = field(hash=False)

    def get(self, name: str) -> float | None:
        """A number of `extra_info`, or None."""
        return number(self.info.get(name))

    @property
    def shape(self) -> dict[str, Any]:
        return dictionary(self.info.get("shape"))

    @property
    def iqr(self) -> float | None:
        """Interquartile range relative to the median."""
        return None if self.q1 is None or self.q3 is None else (self.q3 - self.q1) / self.median

    @property
    def group(self) -> tuple[str, str, str]:
        """What rows have in common that are compared with each other."""
        return self.kind, self.label, self.dtype

    @property
    def key(self) -> tuple[str, ...]:
        """What a row of another file has in common that is compared with this one."""
        return self.kind, self.label, self.provider, self.dtype

    @property
    def ours(self) -> bool:
        return self.provider in OURS or self.info.get("ours") is True


class Results:
    """One result file, read for the report, with whatever is missing left out.

    Attributes:
        left_out: how many rows have no usable median.

    Raises:
        ResultsError: it is none.
    """

    def __init__(self, path: Path):
        self.path, self.content = path, load(path)
        self.machine = dictionary(self.content["machine_info"])
        self.ceilings = dictionary(self.content.get("ceilings"))
        found = self.content["benchmarks"] if isinstance(self.content["benchmarks"], list) else []
        self.rows = [row for bench in found if (row := _row(dictionary(bench))) is not None]
        self.left_out = len(found) - len(self.rows)
        self.unavailable = [
            {**NOTHING_SAID, **{key: value for key, value in entry.items() if value is not None}}
            for entry in self.content.get("unavailable") or []
            if isinstance(entry, dict)
        ]

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
        return said(self.machine, "torch", "triton", "commit") or "versions not recorded"

    def of(self, kind: str) -> list[Row]:
        """Rows of one kind, in the order of the file."""
        return [row for row in self.rows if row.kind == kind]

    def missing(self, kind: str) -> list[dict[str, Any]]:
        """Unavailable rows of one kind."""
        return [row for row in self.unavailable if row["kind"] == kind]


def said(facts: dict[str, Any], *keys: str) -> str:
    """ "torch 2.9, commit abc": those that are there."""
    return ", ".join(f"{key} {facts[key]}" for key in keys if facts.get(key))


def cpu_name(machine: dict[str, Any]) -> str:
    """The processor; pytest-benchmark's own files hold a dictionary."""
    cpu = machine.get("cpu")
    return str((cpu.get("brand_raw") if isinstance(cpu, dict) else cpu) or "unknown")


def _row(bench: dict[str, Any]) -> Row | None:
    info, stats = dictionary(bench.get("extra_info")), dictionary(bench.get("stats"))
    median, q1, q3, iqr, rounds = (number(stats.get(key)) for key in ("median", "q1", "q3", "iqr", "rounds"))
    if not median:
        return None
    if None in (q1, q3) and iqr is not None:
        q1, q3 = max(0.0, median - iqr / 2), median + iqr / 2
    kind = str(info.get("kind") or ("model" if "agreement" in info else "other"))
    tokens = number(info.get("tokens"))
    label = shape_label(info.get("shape"), info)
    if not label:
        label = f"{tokens:,.0f} tokens" if tokens and kind == "long" else str(bench.get("name") or "unnamed")
    provider = str(info.get("provider") or bench.get("name") or "unknown")
    dtype, timing = str(info.get("dtype") or "unknown type"), str(info.get("timing") or "unknown")
    return Row(kind, provider, label, dtype, timing, tokens, median, q1, q3, rounds, info)


def known_shape(shape: Any) -> Shape | None:
    """The sweep's Shape for its dictionary; None if that is incomplete."""
    try:
        return Shape(**{key: value for key, value in dictionary(shape).items() if key in Shape._fields})
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


def speed(base: Row | None, row: Row | None) -> float | None:
    """How many times faster `row` is than `base`."""
    return None if base is None or row is None else base.median / row.median


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


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], Group]:
    """Groups in the order in which their first row was measured, which is the most telling first."""
    lists: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lists.setdefault(row.group, []).append(row)
    return {key: Group(found) for key, found in lists.items()}


class Pair(NamedTuple):
    """A row of both files. `verdict`: what the second is."""

    before: Row
    after: Row
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

    def notes(self) -> list[str]:
        """What a reader has to know before believing a verdict."""
        a, b, found = self.before, self.after, []
        if a.device != b.device:
            found.append(f"Different machines: {a.device} against {b.device}. {MACHINES}")
        for what, key in (("matrix products", "flops_per_second"), ("copies", "bytes_per_second")):
            rates = number(a.ceilings.get(key)), number(b.ceilings.get(key))
            if a.device == b.device and all(rates):
                ratio = rates[1] / rates[0]
                if abs(math.log(ratio)) > math.log1p(LEAST_DIFFERENCE):
                    slower = f"its {what} ran at {times(ratio)} of the first file's rate"
                    found.append(f"The machine itself was not the same: {slower}.")
        if not self.pairs:
            found.append("No row is in both files (kind, model and shape, provider, type, timing).")
        return found

    def facts(self) -> list[str]:
        """The files, what differs between machines, stacks and commits, verdicts by kind, and what has no verdict."""
        files = {"A": self.before, "B": self.after}
        found = [f"{x}  {one.path.name}: {one.device}, {one.stack}" for x, one in files.items()]
        a, b = ({**one.machine, "cpu": cpu_name(one.machine)} for one in files.values())
        keys = [key for key in {**a, **b} if not isinstance(a.get(key, b.get(key)), dict | list)]
        found += [
            f"{key}: {a.get(key, NO_VALUE)} -> {b.get(key, NO_VALUE)}" for key in keys if a.get(key) != b.get(key)
        ]
        for kind in dict.fromkeys(pair.after.kind for pair in self.pairs):
            verdicts = [pair.verdict for pair in self.pairs if pair.after.kind == kind]
            counts = [f"{verdicts.count(said)} {said}" for said in (FASTER, SAME, SLOWER, UNKNOWN) if said in verdicts]
            found.append(f"{kind}: {', '.join(counts)}")
        found += [
            f"timed differently, not compared: {x.kind}, {x.label}, {x.provider}: {x.timing} and {y.timing}"
            for x, y in self.timed_differently
        ]
        only = {"A": self.only_before, "B": self.only_after}
        return found + [f"{counted(len(rows), 'row')} only in {which}" for which, rows in only.items() if rows]


def compare(before: Results, after: Results) -> Comparison:
    """Matches the rows of two files; of rows that a file has twice the last counts."""
    a, b = ({(*row.key, row.tokens): row for row in result.rows} for result in (before, after))
    common = [(a[key], b[key]) for key in a if key in b]
    pairs = [Pair(x, y, verdict(x, y)) for x, y in common if x.timing == y.timing]
    differently = [(x, y) for x, y in common if x.timing != y.timing]
    only_before, only_after = ([x[key] for key in x if key not in y] for x, y in ((a, b), (b, a)))
    return Comparison(before, after, pairs, differently, only_before, only_after)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers for people


def or_dash(form: Callable[[float], str]) -> Callable[[float | None], str]:
    """`form`, but a dash for None."""
    return functools.wraps(form)(lambda value: NO_VALUE if value is None else form(value))


@or_dash
def significant(value: float) -> str:
    """ "1.23", "12.3", "1,230": three significant digits, no exponent unless tiny."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4:
        return f"{value:.2e}"
    rounded = round(value, 2 - exponent)
    exponent = math.floor(math.log10(abs(rounded)))  # 9.999 is 10.0, not 10.00
    return f"{rounded:,.{max(0, 2 - exponent)}f}"


def _in_units(value: float, units: dict[str, float]) -> str:
    """In the first unit of which there is one, or in the last."""
    name = next((name for name, size in units.items() if abs(value) >= 0.9995 * size), list(units)[-1])
    return f"{significant(value / units[name])} {name}"


duration = or_dash(lambda seconds: _in_units(seconds, {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}))  # "1.23 ms"
memory = or_dash(lambda count: _in_units(count, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}))  # "12.3 MiB"
times = or_dash(lambda ratio: f"{ratio:.2f}x" if ratio < 10 else f"{significant(ratio)}x")  # "1.23x"
percent = or_dash(lambda n: f"{n:.0f} %" if n >= 99.95 else f"{n:.1f} %" if n >= 1 else f"{n:.2g} %")
share = or_dash(lambda n: f"{math.floor(n * 1e4 + 1e-6) / 100:.2f} %")  # rounded down: never "100.00 %" of less than 1
points = or_dash("{:.2f}".format)  # mIoU, given in percent
whole = or_dash("{:,.0f}".format)  # "16,385"


def counted(count: int, what: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def span(values: list[float]) -> str:
    """Median and range of ratios: "1.23x (0.90x to 2.10x)"."""
    if not values:
        return NO_VALUE
    middle, low, high = (times(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"
