"""What became of the images of a run: for people on stdout and stderr, for programs in failed.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segmenter.cli.output import err, out
from segmenter.files import write_text

FAILED = "failed.json"


@dataclass
class Tally:
    """How far a run is. `failed`: place among the planned images -> {"image", "error"}."""

    done: int = 0
    skipped: int = 0
    failed: dict[int, dict[str, str]] = field(default_factory=dict)

    def in_words(self, total: int) -> str:
        return f"{self.done} done, {self.skipped} skipped, {len(self.failed)} failed of {total}"


def say(tally: Tally, total: int, seconds: float, output: str, early: str = "", processes: int = 1) -> None:
    """Prints the failures on stderr, in the order of the images, and the summary on stdout."""
    for _, entry in sorted(tally.failed.items()):
        err(f"segmenter: failed: {' '.join(entry['error'].split())}")
    by = f" by {processes} processes" if processes > 1 else ""
    each = f", {seconds / tally.done:.2f} s each" if tally.done else ""
    out(f"{early}{tally.in_words(total)} in {seconds:.1f} s{each}{by} -> {output}")


def write_failed(tally: Tally, output: Path) -> None:
    """Lists the failures in failed.json; there is no such file if there are none."""
    if tally.failed:
        write_json(output / FAILED, [entry for _, entry in sorted(tally.failed.items())])
    else:
        (output / FAILED).unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2) + "\n"  # pure ASCII: file names need not be valid Unicode
    write_text(path, text)
