"""Which configuration of a bucket wins, by the rows of a results file, and how that is said."""

import dataclasses
import json
import textwrap
from typing import Any, NamedTuple

from bench.tuning.buckets import Bucket

ResultRow = dict[str, Any]


class Verdict(NamedTuple):
    """Of one bucket. Seconds: the shipped row's best run, the other's worst, and what they would have to differ by."""

    shipped: ResultRow
    best: ResultRow | None  # the fastest other one
    seconds: tuple[float, float]
    spread: float

    @property
    def wins(self) -> bool:
        """Whether the other one is faster by more than the spread, and each was timed twice."""
        again = self.best is not None and all(len(runs(row)) > 1 for row in (self.shipped, self.best))
        return again and self.seconds[0] - self.seconds[1] > self.spread

    @property
    def gain(self) -> float:
        """What the other one saves, of the shipped one's time."""
        return 1 - self.seconds[1] / self.seconds[0]


def runs(row: ResultRow) -> list[list[float]]:
    """[median, interquartile range] of each time that a configuration was timed, in seconds."""
    return row["extra_info"]["runs"]


def slowest(row: ResultRow) -> float:
    return max(median for median, _ in runs(row))


def judge(rows: list[ResultRow]) -> Verdict | None:
    """The verdict on one bucket's rows; None before its shipped configuration is timed.

    The spread is the largest interquartile range of both, or how far the shipped one has drifted if that is more.
    """
    shipped = next((row for row in rows if row["extra_info"]["steps"] == 0), None)
    if shipped is None:
        return None
    best = min((row for row in rows if row is not shipped), key=slowest, default=None)
    medians = [median for median, _ in runs(shipped)]
    ranges = [iqr for row in (shipped, best) if row for _, iqr in runs(row)]
    seconds = min(medians), slowest(best or shipped)
    return Verdict(shipped, best, seconds, max(*ranges, max(medians) - min(medians)))


# ---------------------------------------------------------------------------------------------------------------------
# In words


def written(config: Any) -> str:
    """As in `segmenter.kernels.configs`: "AttentionConfig(64, 64, 4, 2, True)"."""
    values = [str(value) for value in dataclasses.astuple(config)]
    return f"{type(config).__name__}({', '.join(values[:-1] if values[-1] == 'False' else values)})"


def row_text(bucket: Bucket, config: Any, why: str) -> str:
    """The row for `segmenter.kernels.configs`, of this architecture alone, to be put above the one it comes from."""
    row = bucket.row
    example = "{" + ", ".join(f"{json.dumps(name)}: {value!r}" for name, value in row.example.items()) + "}"
    head = f'Row(("{bucket.architecture}",), "{row.kind}", "{row.when}", {written(config)}, {example},'
    lines = textwrap.wrap(why, 109, break_long_words=False)  # 120 columns with indentation and quotes
    quoted = [json.dumps(line + " ") for line in lines[:-1]] + [json.dumps(lines[-1])]
    return "\n".join([f"    {head}", *(f"        {line}" for line in quoted)]) + "),"


def reason(verdict: Verdict, machine: str, file: str) -> str:
    """The `why` of a proposed row: the figures, and where they are from."""
    facts = verdict.best["extra_info"]
    return (
        f"{1e6 * verdict.seconds[1]:.2f} us on {machine}, {100 * verdict.gain:.1f} % less than "
        f"{verdict.shipped['name']}, with a spread of {100 * verdict.spread / verdict.seconds[0]:.1f} %; the floor is "
        f"{facts['percent_of_floor']:.0f} % of that. {facts['registers']} registers, "
        f"{facts['shared'] / 1024:.0f} KB, {facts['programs_per_sm']} on a multiprocessor. {file}."
    )


def line(name: str, verdict: Verdict) -> str:
    """One bucket for people."""
    shipped, best = verdict.seconds
    text = f"{name:52} {1e6 * shipped:10.2f} us  {verdict.shipped['name']}"
    if verdict.best is not None:
        said = "faster" if verdict.wins else "not faster by more than the spread"
        text += f"\n{'':52} {1e6 * best:10.2f} us  {verdict.best['name']}: {100 * verdict.gain:+.1f} %, {said}"
    return f"{text} (spread {100 * verdict.spread / shipped:.1f} %)"
