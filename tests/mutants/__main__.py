"""Plants bugs in a copy of the kernels and shows that the tests find them.

    python -m tests.mutants                  every mutant
    python -m tests.mutants --sample 4       four, other ones each day
    python -m tests.mutants --only lost_tail wrong_eps

A mutant is killed if one of its test files fails (a crash or a time-out counts); a survivor has to carry its reason in
`tests/mutants/planted.py`. Exit status 1 if a mutant without a reason survives, or fewer than 95 % are killed.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.mutants.planted import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("kernels", "segmenter", "bench", "tests", "pyproject.toml")
TIME_LIMIT = 600  # seconds a mutant: a bug may well make a loop endless
REQUIRED = 0.95


@dataclasses.dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    killed: bool
    how: str  # the test that failed, or what else ended it
    seconds: float


def plant(mutant: Mutant, root: Path) -> None:
    """Makes the edit in the tree under `root`. Raises ValueError unless the text occurs exactly once."""
    path = root / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))


def try_mutant(mutant: Mutant | None, tests: tuple[str, ...]) -> tuple[int | None, str]:
    """(pytest's exit status or None after a time-out, its output) in a copy of the project with the bug in it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root / name)
        if mutant is not None:
            plant(mutant, root)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        try:
            result = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired:
            return None, ""
        return result.returncode, result.stdout + result.stderr


def judge(mutant: Mutant) -> Outcome:
    start = time.monotonic()
    status, output = try_mutant(mutant, mutant.tests)
    lines = [line for line in output.splitlines() if line.startswith("FAILED ")]
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in lines]
    if status == 0:
        how = "survived"
    elif status is None:
        how = "time-out"
    elif failed:
        how = failed[0]
    elif status == 1 or status < 0 or status > 5:
        how = f"exit status {status}"
    else:  # a collection or usage error of pytest: nothing was tested, so nothing was shown
        raise RuntimeError(f"{mutant.name}: pytest ended with {status}\n{output[-2000:]}")
    return Outcome(mutant, status != 0, how, time.monotonic() - start)


def line(o: Outcome) -> str:
    verdict, note = ("killed  ", o.how) if o.killed else ("SURVIVED", o.mutant.reason or "no reason given")
    return f"{verdict} {o.mutant.file:<26} {o.mutant.name:<38} {o.seconds:5.0f} s  {note}"


def report(outcomes: list[Outcome]) -> int:
    """Prints the survivors and the count, and returns the exit status."""
    for outcome in outcomes:
        if not outcome.killed:
            print(line(outcome))
    killed = sum(o.killed for o in outcomes)
    unexplained = [o.mutant.name for o in outcomes if not o.killed and not o.mutant.reason]
    print(f"{killed} of {len(outcomes)} mutants killed" + (f"; without a reason: {unexplained}" if unexplained else ""))
    return int(bool(unexplained) or killed < REQUIRED * len(outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[m.name for m in MUTANTS])
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants, chosen by today's date")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(default: one a core)")
    parser.add_argument("--skip-baseline", action="store_true", help="the tests are known to pass without any bug")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if not args.only or m.name in args.only]
    if args.sample:
        mutants = random.Random(datetime.date.today().toordinal()).sample(mutants, min(args.sample, len(mutants)))
    if not args.skip_baseline:
        status, output = try_mutant(None, tuple(sorted({test for m in mutants for test in m.tests})))
        if status != 0:
            print(f"the tests fail without any bug planted:\n{output[-3000:]}", file=sys.stderr)
            return 2
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        for outcome in tqdm(pool.map(judge, mutants), total=len(mutants), unit="mutant"):
            outcomes.append(outcome)
            tqdm.write(line(outcome))
    return report(outcomes)


if __name__ == "__main__":
    sys.exit(main())
