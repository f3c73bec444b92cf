"""The file of results: what is measured, and the facts about the machine that it carries (bench/machine.py).

The schema is that of pytest-benchmark's JSON with additions, saved after every row, so that an interruption loses the
row that is being measured and nothing else:

    machine_info  `facts`                              ceilings     what the machine reached, bench/timing.py
    benchmarks    one row each; `extra_info` as bench/harness.py fills it
    unavailable   what could not be measured and why   steps        of bench/run_all.py, bench/first_hour.py
"""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from segmenter.files import write_text

SAME = ("device", "name", "torch", "triton", "commit")  # what rows of one file have in common
Row = dict[str, Any]


class ResultsError(RuntimeError):
    """A results file cannot be used; the message says why."""


class ResultsFile:
    """Rows of one machine, stack and commit. Opening an existing file continues it: rows of equal name are replaced.

    Raises:
        ResultsError: the file is no results file, or is of another machine, stack or commit.
    """

    def __init__(self, path: Path, machine: Row):
        self.path = path
        self.content: Row = {"machine_info": machine, "ceilings": None, "benchmarks": [], "unavailable": []}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        self.content = load(path)
        was = self.content["machine_info"]
        other = [f"{key} {was.get(key)}, not {machine[key]}" for key in SAME if not _same(was.get(key), machine[key])]
        if other:
            raise ResultsError(f"{path} holds results of {'; '.join(other)}: name another file")

    def add(self, row: Row) -> None:
        """Adds a measured row and saves."""
        self._replace("benchmarks", row, "fullname")
        gone = row["extra_info"]["row"]
        self.content["unavailable"] = [r for r in self.content["unavailable"] if r["name"] != gone]
        self.save()

    def add_unavailable(self, row: Row) -> None:
        """Notes a row that could not be measured: kind, provider, shape, name, reason, what `extra_info` would hold."""
        if row["name"] not in self.names():
            self._replace("unavailable", row, "name")
            self.save()

    def names(self) -> frozenset[str]:
        """Names of the rows that are measured."""
        return frozenset(row["extra_info"]["row"] for row in self.content["benchmarks"])

    def save(self) -> None:
        """Replaces the file as a whole."""
        self.content["datetime"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_text(self.path, json.dumps(self.content, indent=1))

    def _replace(self, part: str, row: Row, key: str) -> None:
        self.content[part] = [*(other for other in self.content[part] if other[key] != row[key]), row]


def _same(a: Any, b: Any) -> bool:
    """Equal, or the same commit with and without changes that are not committed: files edited during a long run."""
    return str(a).removesuffix("-dirty") == str(b).removesuffix("-dirty")


def load(path: Path) -> Row:
    """The content of a results file.

    Raises:
        ResultsError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not {"machine_info", "benchmarks"} <= set(content):
        raise ResultsError(f"{path} is no results file: it has no machine_info and benchmarks")
    return {"ceilings": None, "unavailable": [], **content}
