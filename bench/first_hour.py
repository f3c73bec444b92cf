"""The first hour on a card as one command: python -m bench.first_hour --out DIR --minutes 9

In this order: ceilings, tests of the kernels, golden cases, 1,000 bitwise repeats of every shipped configuration,
compute-sanitizer on small launches, attention by every backend, blocks, whole models, waterfall, peers, long sequences,
and tuning with what is left. A step that fails or runs out of time does not keep the others from running. All files are
whole after each step, and the report is made anew. The same command goes on: what is done is skipped, what was cut
short continues. --rehearse goes through all steps on a CPU with tiny inputs, in DIR/rehearsal; its times mean nothing.
"""

import argparse
import glob
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import machine, report, steps, timing
from bench.harness import OUT_OF_TIME as ROW_OUT_OF_TIME
from bench.repeats import OUT_OF_TIME as REPEATS_OUT_OF_TIME
from bench.results import ResultsError, ResultsFile
from bench.run_all import TESTS_FAILED, add_long_rows, commands, red_gate
from bench.steps import DEADLINE, GRACE, MINUTES, module
from segmenter.files import write_text

CUT_SHORT = "cut short: the same command goes on"
ABSENT = "not run: no compute-sanitizer; it comes with the CUDA toolkit, or: pip install nvidia-cuda-sanitizer-api"
CUT = re.compile(rf"{re.escape(ROW_OUT_OF_TIME)}|^not reached: |^the time was used up", re.MULTILINE)  # in a log
_IN_WHEELS = f"{sys.prefix}/lib/python*/site-packages/nvidia/**/compute-sanitizer"
SANITIZER = ("/usr/local/cuda*/bin/compute-sanitizer", _IN_WHEELS)
FOUND = 9  # exit status of compute-sanitizer where it found something
CANNOT_SHOW = (
    "A rehearsal cannot show: whether kernels compile and are right on a card; any time or memory of one; races and "
    "bad accesses; what differs from run to run between multiprocessors; SDPA's CUDA backends; CUDA graphs."
)
NO_CARD = "not run: a rehearsal launches nothing on a card"
BEGUN = "begun, and not ended"
FAILED = re.compile("failed|tests failed|found errors")  # states


class Step(NamedTuple):
    """A step: its command (None: there is none), the share of the time left that it may use, what to look at."""

    name: str
    command: list[str] | None
    share: float
    look: str
    environment: dict[str, str] = {}
    reason: str = ""  # why there is no command


def sanitizer() -> str | None:
    """The path of compute-sanitizer, where it is installed."""
    found = [path for pattern in SANITIZER for path in sorted(glob.glob(pattern, recursive=True))]
    return shutil.which("compute-sanitizer") or next(filter(shutil.which, found), None)


def plan(out: Path, rehearse: bool) -> list[Step]:
    """The steps, in order. `out` is absolute."""
    device, dtype = ("cpu", "fp32") if rehearse else ("cuda", "bf16")
    of_run_all = commands(out, device, dtype, None)
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    at = ["--device", device, "--dtype", dtype]
    timed = module("pytest", "bench", "--no-header", "-q", "-rs", "-p", "no:cacheprovider", *at, "--missing")
    timed += ["--results", str(out), "--deadline", DEADLINE, "--row-seconds", "0.02" if rehearse else "0.3"]
    timed += ["--sweep", "smoke" if rehearse else "core", "-k"]
    small = ["--op", "layernorm"] if rehearse else []
    repeats = module("bench.repeats", *small, *(["--interpret", "--tiny"] if rehearse else []))
    repeats += ["--times", "1" if rehearse else "1000", "--deadline", DEADLINE, "--out", str(out)]
    launches = module("bench.repeats", "--tiny", "--times", "0", "--deadline", DEADLINE, "--out", str(out / "launches"))
    golden = [sys.executable, "tests/golden/check.py", "tests/golden", "--adapter", "tests/golden_adapter.py"]
    golden += ["--quiet", *(["--case", "02"] if rehearse else [])]
    on_kernels = {"GOLDEN_IMPL": "triton", "PYTHONPATH": str(machine.ROOT)} | interpreted
    tool = sanitizer()
    absent = NO_CARD if rehearse else "" if tool else ABSENT
    checked = {
        kind: [tool, "--tool", kind, "--error-exitcode", str(FOUND), *launches] if not absent else None
        for kind in ("memcheck", "racecheck")
    }
    long = [*of_run_all["long"], *(["--tokens", "26", "--size", "40", "--providers", "eager"] if rehearse else [])]
    tune = module("bench.tune", "--out", str(out), "--minutes", MINUTES)
    tune += ["--rehearse", "--op", "layernorm", "--match", "n=(192|768)$"] if rehearse else []
    # torch.compile takes a minute a model, also of a tiny one
    few = " and not compile" if rehearse else ""
    whole = [*timed[:-1], "--benchmark-disable", "-k"] if rehearse else timed  # else a CPU takes minutes
    return [
        Step("ceilings", None, 0.0, "the percentages of all rows are of these"),
        Step("parity", of_run_all["gate"], 0.4, "FAILED lines name kernels that are wrong"),
        Step("golden", golden, 0.3, "all cases PASS", on_kernels),
        Step("repeats", repeats, 0.3, "repeats.json names what differs", interpreted),
        Step("memcheck", checked["memcheck"], 0.2, "ERROR SUMMARY: 0 errors", {}, absent),
        Step("racecheck", checked["racecheck"], 0.2, "RACECHECK SUMMARY: 0 hazards", {}, absent),
        Step("attention", [*timed, "bench_attention" + few], 0.4, "triton against each sdpa-*"),
        Step("block", [*timed, "bench_operations and not bench_attention" + few], 0.4, "triton against compile"),
        Step("models", [*timed, "(bench_model or bench_train_step)" + few], 0.5, "images/s"),
        Step("waterfall", [*whole, "bench_waterfall" + few], 0.5, "which step gains nothing"),
        Step("peers", [*whole, "bench_peers and not bench_whole" + few], 0.5, "ours beside theirs"),
        Step("long", long, 0.5, "long/report.html"),
        Step("tuning", tune, 0.3 if rehearse else 1.0, "rows for kernels/configs.py, in tuning.log"),
    ]  # fmt: skip


def ceilings(file: ResultsFile, device: torch.device, dtype: str) -> dict[str, Any]:
    """The step that is done in this process: measures the ceilings into the file. Returns its entry."""
    start, state = time.monotonic(), "done"
    try:
        found = timing.measure_ceilings(device, machine.DTYPES[dtype], small=device.type == "cpu")
        file.content["ceilings"] = found._asdict()
    except RuntimeError as error:
        state = f"failed: {error}"
    timing.release(device)
    return {"name": "ceilings", "state": state, "seconds": round(time.monotonic() - start, 1)}


def ended(step: Step, entry: dict[str, Any], log: Path) -> dict[str, Any]:
    """The entry with what the log says of it: cut short, or found something."""
    sanitized = step.name in ("memcheck", "racecheck")
    codes = {REPEATS_OUT_OF_TIME: CUT_SHORT} if sanitized or step.name == "repeats" else {}
    codes |= {FOUND: f"found errors: see {log.name}"} if sanitized else {}
    codes |= {TESTS_FAILED: red_gate(log)[0]} if step.name == "parity" else {}
    for code, state in codes.items():
        if entry["state"] == f"failed with exit status {code}":
            entry["state"] = state
    if entry["state"] == "done" and CUT.search(log.read_text(errors="replace")):
        entry["state"] = CUT_SHORT
    return entry


def table(entries: list[dict[str, Any]], todo: list[Step]) -> str:
    """A line for each step: its state, seconds of all calls, what to look at."""
    known = {entry["name"]: entry for entry in entries}
    lines = []
    for step in todo:
        entry = known.get(step.name, {"state": steps.NOT_STARTED, "seconds": 0.0})
        lines.append(f"{step.name:10} {entry['seconds']:7.1f} s  {entry['state']}  [{step.look}]")
    return "\n".join(lines)


class Hour:
    """The steps of one DIR, whose states are kept in its results file."""

    def __init__(self, out: Path, rehearse: bool, end: float):
        self.out, self.rehearse, self.end = out, rehearse, end
        self.device, self.dtype = torch.device("cpu" if rehearse else "cuda"), "fp32" if rehearse else "bf16"
        self.todo = plan(out, rehearse)
        self.path = out / machine.results_name(self.device, machine.DTYPES[self.dtype])
        self.facts = machine.facts(self.device)
        out.mkdir(parents=True, exist_ok=True)
        self.entries: list[dict[str, Any]] = self._file().content.get("steps", [])

    def _file(self) -> ResultsFile:
        return ResultsFile(self.path, self.facts)  # read anew: steps write into it

    def done(self, name: str) -> bool:
        return any(entry["name"] == name and entry["state"] in ("done", "nothing to do") for entry in self.entries)

    def _state(self, name: str) -> str:
        return next((entry["state"] for entry in self.entries if entry["name"] == name), steps.NOT_STARTED)

    def left(self) -> list[Step]:
        """What is to be run: what was not tried or was cut short, and then what failed before."""
        found = [step for step in self.todo if not self.done(step.name)]
        return sorted(found, key=lambda step: bool(FAILED.match(self._state(step.name))))

    def run(self) -> None:
        """All that is not done, as far as there is time."""
        for step in self.left():
            if step.reason or self.end - time.monotonic() > steps.LEAST:
                self._note(self._one(step))
            else:
                self._note({"name": step.name, "state": self._state(step.name), "seconds": 0.0})

    def _one(self, step: Step) -> dict[str, Any]:
        left, log = self.end - time.monotonic(), self.out / f"{step.name}.log"
        if step.reason:
            return {"name": step.name, "state": step.reason, "seconds": 0.0}
        options = []
        if FAILED.match(self._state("parity")) and not self.rehearse:
            options = red_gate(self.out / "parity.log")[1]
        self._note({"name": step.name, "state": BEGUN, "seconds": 0.0})
        if step.command is None:
            file = self._file()
            entry = ceilings(file, self.device, self.dtype)
            file.save()
            return entry
        command = step.command + (options if "--missing" in step.command else [])
        entry = steps.run(step.name, command, max(step.share * left, steps.LEAST), log, step.environment)
        return ended(step, entry, log)

    def _note(self, entry: dict[str, Any]) -> None:
        """Keeps the entry, with the seconds of earlier calls, and makes the report anew."""
        before = next((old["seconds"] for old in self.entries if old["name"] == entry["name"]), 0.0)
        entry["seconds"] = round(entry["seconds"] + before, 1)
        self.entries = [*(old for old in self.entries if old["name"] != entry["name"]), entry]
        file, scaling = self._file(), self.out / "long" / "scaling.csv"
        if entry["name"] == "long" and scaling.exists() and not self.rehearse:
            add_long_rows(file, scaling, self.device.type, self.dtype)
        complete = all(self.done(other.name) for other in self.todo)
        file.content |= {"steps": self.entries, "complete": complete, "rehearsal": self.rehearse}
        file.save()
        if entry["state"] != BEGUN:
            self._report()

    def _report(self) -> None:
        tables = self.out / "tables.md"
        names = "".join(f"<!-- bench:{name}:start -->\n<!-- bench:{name}:end -->\n\n" for name in report.BLOCKS)
        head = "# Rehearsal on a CPU: no figure means anything\n\n" if self.rehearse else "# Tables\n\n"
        write_text(tables, head + names)
        if report.main([str(self.path), "--out", str(self.out / "report.html"), "--readme", str(tables)]):
            print("the report could not be made; the results file is whole", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; keep it between calls")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this call; default 9")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny inputs: no figure means anything")
    args = parser.parse_args(arguments)
    end = time.monotonic() + 60 * args.minutes - GRACE
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU here; --rehearse goes through all steps without one")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in bench.run_all
    out = args.out.resolve() / "rehearsal" if args.rehearse else args.out.resolve()
    try:
        hour = Hour(out, args.rehearse, end)
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 1
    if args.rehearse:
        print(f"REHEARSAL, no measurement. {CANNOT_SHOW}")
    print("to run:", ", ".join(step.name for step in hour.left()) or "nothing, all is done")
    hour.run()
    print(table(hour.entries, hour.todo))
    print(f"results in {hour.path}; tables.md, report.html and logs beside it")
    again = ["--out", str(args.out), "--minutes", f"{args.minutes:g}", *(["--rehearse"] if args.rehearse else [])]
    print(f"to go on: python -m bench.first_hour {shlex.join(again)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
