"""What the report knows about result files: rows of any age or completeness, groups, and the verdict.

`RULE` is that of every verdict, also of "slower" inside one file. Anything else is "no difference"; a row without
quartiles gives "spread unknown". Exchanging the two rows exchanges "faster" and "slower". 3 % is for what changes
between two sessions and no single one can see.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
OURS = ("triton", "pruned", "bands")
USUAL_CLASSES = 150  # not worth saying in a label


def number(value: Any) -> float | None:
    """`value` if something measured can have it, else None: files may be partial or of another version."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def dictionary(value: Any) -> dict[str, Any]:
    """`value` if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def dictionaries(value: Any) -> list[dict[str, Any]]:
    """The dictionaries of a list; none if `value` is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


class Row:
    """A row of a file: measured, or without a median and with the reason. Times are seconds a call, None if not said.

    Attributes:
        label: model, image and batch, for people. shape: of the sweep, None if that is not said.
        info: `extra_info`, or all that the file says of a missing row. Of a peer also what was published: im_s, ss
            and ms (mIoU in percent), params_m, crop, source, gpu.
        group: the measured rows of its shape. key: what a row of another file has in common with this one.
        order, first, before: of a waterfall's step, its place, the first measured step and the last one before it.
    """

    group: "Group"
    order: float = 0
    first: "Row | None" = None
    before: "Row | None" = None

    def __init__(self, name: Any, info: Any, stats: Any):
        info, stats = dictionary(info), dictionary(stats)
        self.info = {**dictionary(info.get("published")), **info}
        self.shape = shape = known_shape(info.get("shape"))
        self.tokens = number(info.get("tokens")) or (shape and shape.tokens)
        self.median, self.q1, self.q3, self.rounds = map(number, map(stats.get, ("median", "q1", "q3", "rounds")))
        self.name, self.reason = str(name or "unnamed"), f"not measured: {info.get('reason') or 'no reason recorded'}"
        self.kind = str(info.get("kind") or ("model" if "agreement" in info else "other"))
        self.provider = str(info.get("provider") or name or "unknown")
        self.dtype, self.timing = str(info.get("dtype") or "unknown type"), str(info.get("timing") or "unknown")
        self.model = str(info.get("model") or (shape.name if shape else ""))
        size = input_label(shape._asdict() if shape else info) or (f"{self.tokens:,.0f} tokens" if self.tokens else "")
        classes = f"{shape.n_cls} classes" if shape and shape.n_cls != USUAL_CLASSES else ""
        self.label = ", ".join(filter(None, (self.model, size, classes))) or self.name
        self.peak = number(info.get("peak_bytes"))
        self.ours = self.provider in OURS or info.get("ours") is True
        self.key = self.kind, self.label, self.provider, self.dtype

    def get(self, name: str) -> float | None:
        """A number of `extra_info`, or None."""
        return number(self.info.get(name))

    @property
    def iqr(self) -> float | None:
        """Interquartile range relative to the median."""
        return None if self.q1 is None or self.q3 is None else (self.q3 - self.q1) / self.median


class Group:
    """Measured rows of one kind, shape and type, and those of them that speed-ups refer to."""

    def __init__(self, rows: Sequence[Row]):
        for row in rows:
            row.group = self
        by_provider = {row.provider: row for row in rows}
        self.rows, get = list(by_provider.values()), by_provider.get
        self.label, self.dtype = rows[0].label, rows[0].dtype
        self.eager, self.compile = get("eager") or get("published"), get("compile")
        self.sdpa = fastest(row for row in self.rows if row.provider.startswith("sdpa"))
        self.ours = next((by_provider[name] for name in OURS if name in by_provider), None)
        self.other = fastest(row for row in self.rows if not row.ours)
        self.best = fastest(self.rows)


class Results:
    """One result file, read for the report, with whatever is missing left out.

    Attributes:
        left_out: how many rows have no usable median. device: name of the GPU, or "CPU" and which.
        stack: versions and commit in one line. facts: what the file says of machine and software, one value each.

    Raises:
        ResultsError: it is none.
    """

    def __init__(self, path: Path):
        self.path, self.content = path, load(path)
        self.machine = dictionary(self.content["machine_info"])
        self.ceilings = dictionary(self.content["ceilings"])
        found = dictionaries(self.content["benchmarks"])
        rows = [Row(bench.get("name"), bench.get("extra_info"), bench.get("stats")) for bench in found]
        self.rows = [row for row in rows if row.median]
        self.left_out = len(rows) - len(self.rows)
        self.unavailable = [Row(entry.get("name"), entry, {}) for entry in dictionaries(self.content["unavailable"])]
        self.on_gpu = self.machine.get("device") == "cuda"
        cpu = self.machine.get("cpu")  # a dictionary in files of pytest-benchmark alone
        facts = {**self.machine, "cpu": dictionary(cpu).get("brand_raw", cpu)}
        self.facts = {key: value for key, value in facts.items() if value and not isinstance(value, dict | list)}
        name = self.facts.get("name") or self.facts.get("cpu", "unknown")
        self.device = str(name) if self.on_gpu else f"CPU: {name}"
        versions = [f"{key} {self.facts[key]}" for key in ("torch", "triton", "commit") if key in self.facts]
        self.stack = ", ".join(versions) or "versions not recorded"
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.label, row.dtype), []).append(row)
        for rows in groups.values():
            Group(rows)

    def of(self, kind: str) -> list[Row]:
        """Measured rows of one kind, in the order of the file."""
        return [row for row in self.rows if row.kind == kind]

    def missing(self, kind: str) -> list[Row]:
        """Unavailable rows of one kind."""
        return [row for row in self.unavailable if row.kind == kind]

    def waterfalls(self) -> dict[str, list[Row]]:
        """What was timed -> steps in order."""
        found: dict[str, list[Row]] = {}
        for row in (*self.of("waterfall"), *self.missing("waterfall")):
            place = re.fullmatch(r"waterfall-(\d+)", row.name)  # as the benchmark names its rows
            row.order = float(place[1]) if place else row.get("step") or 0
            found.setdefault(row.label, []).append(row)
        for steps in found.values():
            steps.sort(key=lambda row: row.order)
            first = before = None
            for row in steps:
                first = first or (row if row.median else None)
                row.first, row.before, before = first, before, row if row.median else before
        return found


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Groups in the order in which their first row was measured, which is the most telling first."""
    return list(dict.fromkeys(row.group for row in rows))


def known_shape(shape: Any) -> Shape | None:
    """The sweep's Shape for its dictionary; None if that is incomplete."""
    given = {key: value for key, value in dictionary(shape).items() if key in Shape._fields}
    complete = "model" in given and all(number(given.get(key)) for key in ("patch", "size", "batch"))
    return Shape(**given) if complete else None


def input_label(info: dict[str, Any]) -> str:
    """ "512x512, batch 8" of a dictionary with size, one number or height and width, and batch."""
    size, parts = info.get("size"), []
    if isinstance(size, list) and len(size) == 2:
        parts.append(f"{size[1]}x{size[0]}")
    elif number(size):
        parts.append(f"{size}x{size}")
    return ", ".join([*parts, *([f"batch {info['batch']}"] if number(info.get("batch")) else [])])


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
    return base.median / row.median if base and row and base.median and row.median else None


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row of the smallest median."""
    return min(rows, key=lambda row: row.median, default=None)


class Pair(NamedTuple):
    """A row of both files. `verdict`: what the second is."""

    before: Row
    after: Row
    verdict: str


class Comparison:
    """Two files, row by row: matched by kind, model and shape, provider and type, and then by how they were timed.

    Of rows that a file has twice the last counts. `apart`: why rows are not compared -> those rows.
    """

    def __init__(self, before: Results, after: Results):
        self.before, self.after = before, after
        a, b = ({row.key: row for row in result.rows} for result in (before, after))
        common = [(a[key], b[key]) for key in a if key in b]
        self.pairs = [Pair(x, y, verdict(x, y)) for x, y in common if x.timing == y.timing]
        self.apart = {
            "only in A": [a[key] for key in a if key not in b],
            "only in B": [b[key] for key in b if key not in a],
            "timed differently, not compared": [x for x, y in common if x.timing != y.timing],
        }

    def notes(self) -> list[str]:
        """What a reader has to know before believing a verdict."""
        a, b, found = self.before, self.after, []
        if a.device != b.device:
            machines = f"Different machines: {a.device} against {b.device}."
            found.append(f"{machines} The ratios compare the machines as much as the code.")
        for what, key in (("matrix products", "flops_per_second"), ("copies", "bytes_per_second")):
            rates = number(a.ceilings.get(key)), number(b.ceilings.get(key))
            ratio = rates[1] / rates[0] if a.device == b.device and all(rates) else 1
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
        a, b = self.before.facts, self.after.facts
        changed = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        found += [f"{key}: {a.get(key, NO_VALUE)} -> {b.get(key, NO_VALUE)}" for key in changed]
        for kind in dict.fromkeys(pair.after.kind for pair in self.pairs):
            verdicts = [pair.verdict for pair in self.pairs if pair.after.kind == kind]
            counts = [f"{verdicts.count(said)} {said}" for said in (FASTER, SAME, SLOWER, UNKNOWN) if said in verdicts]
            found.append(f"{kind}: {', '.join(counts)}")
        for why, rows in self.apart.items():
            kinds = [f"{kind} {count}" for kind, count in Counter(row.kind for row in rows).items()]
            found += [f"{counted(len(rows), 'row')} {why}: {', '.join(kinds)}"] if rows else []
        return found


def or_dash(form: Callable[[float], str]) -> Callable[[float | None], str]:
    """`form`, but a dash for None."""
    return lambda value: NO_VALUE if value is None else form(value)


@or_dash
def significant(value: float) -> str:
    """ "1.23", "12.3", "1,230": three significant digits, no exponent unless tiny."""
    digits = f"{value:#.3g}"
    return f"{float(digits):,.0f}" if not value or digits.endswith(".") or "e+" in digits else digits


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
