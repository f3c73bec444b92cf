"""Is the shipped configuration of each kernel the best one on this machine? python -m bench.tune --out DIR --minutes 9

For each row of the tables in kernels/configs.py that this architecture takes: the configurations near it are compiled
ahead of time in a pool of processes; those that fit, do not spill and keep the tensor cores busy are checked against
the exact result and timed by events around CUDA graphs over rotating inputs. Rows that weigh most in a forward pass
come first. What wins by more than the spread is printed as a row to put into kernels/configs.py, which stays as it is.

The results file DIR/tune_*.json is saved after every configuration; the same command goes on where it ended. The exit
status is 1 if nothing can run here, or if a shipped configuration is wrong or fails.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import machine
from bench.compile import report
from bench.harness import rates, row_facts
from bench.results import ResultsError, ResultsFile
from bench.timing import Ceilings
from bench.tuning import measure
from bench.tuning.buckets import MAX_STEPS, Bucket, buckets, candidates
from bench.tuning.verdict import ResultRow, Verdict, judge, line, reason, row_text, runs, written
from bench.tuning.workers import Compilers, Device, OutOfTime
from segmenter.kernels import launch
from segmenter.kernels.configs import SHARED_MEMORY
from segmenter.kernels.configs_backward import TABLES

GRACE = 10.0  # seconds of the time that are kept for the end
REHEARSED = 2  # configurations of each bucket that a rehearsal tries
KEPT = ("registers", "spills", "shared", "programs_per_sm", "tensor_core", "serialised")  # of what the compiler made
CONFIRMED = 3  # candidates of a bucket that are timed again at most, because they were the fastest
REHEARSAL = "rehearsal, not a measurement: times are those of an interpreter on a CPU"


class Tuning:
    """Goes through buckets and candidates, and keeps what comes of it in a results file.

    Args:
        compile: (bucket, configuration) -> its kernel. measure: the same -> as `measure.measured`, or "error".
        rehearsal: a few candidates, on tiny inputs.
    """

    def __init__(
        self,
        file: ResultsFile,
        chosen: list[Bucket],
        compile: Callable[[Bucket, Any], report.Kernel],
        measure: Callable[[Bucket, Any], dict[str, Any]],
        deadline: float,
        rehearsal: bool = False,
    ):
        self.file, self.compile, self.measure = file, compile, measure
        self.deadline, self.rehearsal = deadline, rehearsal
        self.candidates = {bucket: candidates(bucket)[: REHEARSED if rehearsal else None] for bucket in chosen}

    def tasks(self) -> list[tuple[Bucket, Any]]:
        """What is to be compiled, in order: near the shipped rows first, of all buckets; and these rows themselves."""
        known, found = self._known(), []
        for steps in range(1, MAX_STEPS + 1):
            for bucket, near in self.candidates.items():
                found += [(bucket, config) for far, config in near if far == steps or (far == 0 and steps == 1)]
        return [(b, config) for b, config in found if config == b.row.config or _name(b, config) not in known]

    def run(self) -> None:
        """All of it, or as much as there is time for."""
        todo = len(self.not_reached())
        with contextlib.suppress(OutOfTime), tqdm(total=todo, unit="configuration", file=sys.stderr) as progress:
            for steps in range(1, MAX_STEPS + 1):
                for bucket in self.candidates:
                    self._pass(bucket, steps, progress)
        self.file.content |= {"not_reached": self.not_reached(), "complete": not self.not_reached()}
        self.file.save()

    def rows(self, bucket: Bucket) -> list[ResultRow]:
        return [row for row in self.file.content["benchmarks"] if row["group"] == bucket.name]

    def verdicts(self) -> dict[Bucket, Verdict]:
        """Of the buckets whose shipped configuration is timed."""
        return {bucket: found for bucket in self.candidates if (found := judge(self.rows(bucket)))}

    def refused(self, word: str) -> list[str]:
        """What is wrong ("wrong") or fails ("error"), and how."""
        return [f"{row['name']}: {row['reason']}" for row in self.file.content["unavailable"] if word in row]

    def broken(self) -> bool:
        """Whether a shipped configuration is wrong or fails."""
        return any(row["steps"] == 0 for row in self.file.content["unavailable"])

    def not_reached(self) -> list[str]:
        known = self._known()
        names = [_name(bucket, config) for bucket, found in self.candidates.items() for _, config in found]
        return [name for name in names if name not in known]

    def _known(self) -> set[str]:
        return {*self.file.names(), *(row["name"] for row in self.file.content["unavailable"])}

    def _pass(self, bucket: Bucket, steps: int, progress: tqdm) -> None:
        """Tries the candidates up to so many steps away, and then the shipped one again, which shows drift."""
        for distance, config in self.candidates[bucket]:
            if distance <= steps and _name(bucket, config) not in self._known():
                self._try(bucket, config, distance)
                progress.update()
            if judge(self.rows(bucket)) is None:
                return  # the shipped one is wrong or fails, so there is nothing to compare with
        if len(runs(judge(self.rows(bucket)).shipped)) <= steps:
            for _ in range(CONFIRMED):
                found = judge(self.rows(bucket))
                if found.best is None or len(runs(found.best)) > 1 or found.gain <= 0:
                    break
                self._again(bucket, found.best)
            self._again(bucket, found.shipped)

    def _try(self, bucket: Bucket, config: Any, steps: int) -> None:
        self._check_time()
        kernel = self.compile(bucket, config)
        found: dict[str, Any] = {"compiled": {key: getattr(kernel, key) for key in KEPT}}
        reasons = measure.infeasible(kernel, self.compile(bucket, bucket.row.config))
        if steps == 0 or not reasons:  # what ships runs, whatever is said of it
            found |= self.measure(bucket, config)
        else:
            found["infeasible"] = reasons
        self._add(bucket, config, steps, found)

    def _again(self, bucket: Bucket, row: ResultRow) -> None:
        self._check_time()
        config = next(config for _, config in self.candidates[bucket] if written(config) == row["name"])
        found = self.measure(bucket, config)
        if "median" in found:
            runs(row).append([found["median"], found["iqr"]])
            self.file.add(row)
        else:
            self.file.content["benchmarks"].remove(row)
            self._add(bucket, config, row["extra_info"]["steps"], found)

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _add(self, bucket: Bucket, config: Any, steps: int, found: dict[str, Any]) -> None:
        name, tried = _name(bucket, config), dataclasses.replace(bucket, tiny=self.rehearsal)
        facts = row_facts(bucket.table, "triton", name, tried.case.dtype, tried.work, None)
        facts |= {"config": dataclasses.asdict(config), "steps": steps, **found.pop("compiled", {})}
        if "median" in found:
            stats = {key: found.pop(key) for key in ("median", "iqr", "rounds")}
            facts |= {**found, "runs": [[stats["median"], stats["iqr"]]]}
            facts |= rates(tried.work, None, stats["median"], Ceilings(**self.file.content["ceilings"]))
            row = {"group": bucket.name, "name": written(config), "fullname": name, "params": {}}
            self.file.add({**row, "extra_info": facts, "stats": stats})
            return
        for word in ("wrong", "error"):
            if word in found:
                tqdm.write(f"{word.upper()}: {name}: {found[word]}", file=sys.stderr)
        what = next(found[word] for word in ("wrong", "error", "infeasible") if word in found)
        self.file.add_unavailable({**facts, **found, "shape": None, "name": name, "reason": what})


def _name(bucket: Bucket, config: Any) -> str:
    return f"{bucket.name}: {written(config)}"


def report_text(tuning: Tuning) -> str:
    """What came of it, for people: times, rows to put into kernels/configs.py, what is wrong, what was not reached."""
    verdicts, content = tuning.verdicts(), tuning.file.content
    lines = [REHEARSAL] if tuning.rehearsal else []
    lines += [line(bucket.name, verdict) for bucket, verdict in verdicts.items()]
    for word in ("wrong", "error"):
        lines += [f"{word.upper()}, never proposed: {text}" for text in tuning.refused(word)]
    if tuning.rehearsal:
        lines.append("no row is proposed by a rehearsal")
    else:
        winners = {bucket: verdict for bucket, verdict in verdicts.items() if verdict.wins}
        lines.append(f"{len(winners)} rows to put above those that they come from in kernels/configs.py:")
        for bucket, verdict in winners.items():
            why = reason(verdict, content["machine_info"]["name"], tuning.file.path.name)
            lines.append(row_text(bucket, type(bucket.row.config)(**verdict.best["extra_info"]["config"]), why))
    left = content["not_reached"]
    by_bucket = {bucket.name: sum(name.startswith(f"{bucket.name}: ") for name in left) for bucket in tuning.candidates}
    lines += [f"not reached: {count} of {name}" for name, count in by_bucket.items() if count]
    infeasible = sum("infeasible" in row for row in content["unavailable"])
    lines.append(f"{len(content['benchmarks'])} timed, {infeasible} not feasible, {len(left)} not reached")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it; default 9")
    parser.add_argument("--op", nargs="+", choices=TABLES, default=(), help="tables; default: all")
    parser.add_argument("--match", default="", help='expression to be found in "table architecture kind example"')
    parser.add_argument("--kind", choices=("half", "tf32", "fp32"), default="half", help="of operands; default half")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time; default: one a CPU")
    parser.add_argument("--rehearse", action="store_true", help="all of it without a GPU: some, interpreted")
    parser.add_argument("--arch", choices=SHARED_MEMORY, help="what a rehearsal compiles for; default sm_90")
    args = parser.parse_args(arguments)
    if args.arch and not args.rehearse:
        parser.error("--arch is for --rehearse; otherwise it is this GPU's")
    return args


def why_not_here() -> str:
    """Why nothing can be tuned on this machine, "" if it can."""
    if launch.INTERPRETED:
        return "TRITON_INTERPRET is set, so there is nothing to time; unset it for this command"
    if not torch.cuda.is_available():
        return "there is no GPU to tune for; --rehearse goes through all of it without one"
    architecture = launch.architecture(torch.empty(0, device="cuda"))
    return "" if architecture in SHARED_MEMORY else f"kernels/configs.py does not know the architecture {architecture}"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    deadline = time.monotonic() + 60 * args.minutes - GRACE
    device = torch.device("cpu" if args.rehearse else "cuda")
    if not args.rehearse and (why := why_not_here()):
        print(why, file=sys.stderr)
        return 1
    architecture = (args.arch or "sm_90") if args.rehearse else launch.architecture(torch.empty(0, device=device))
    chosen = [bucket for bucket in buckets(architecture, args.kind, args.op) if re.search(args.match, bucket.name)]
    if not chosen:
        print("no row is left to tune", file=sys.stderr)
        return 1
    dtype = "fp32" if args.kind != "half" else "fp16" if args.rehearse else "bf16"
    name = f"tune_{'rehearsal_' * args.rehearse}{args.kind}_{machine.results_name(device, machine.DTYPES[dtype])}"
    try:
        file = ResultsFile(args.out / name, machine.facts(device))
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 1
    worker = Device(device.type, deadline)
    tuning = Tuning(file, chosen, None, worker, deadline, args.rehearse)
    tuning.compile = compilers = Compilers(tuning.tasks(), args.jobs, deadline)
    try:
        if file.content["ceilings"] is None:
            file.content["ceilings"] = worker.run(measure.ceilings, device.type, dtype)
        tuning.run()
    except OutOfTime:
        print("the time was used up before anything was measured", file=sys.stderr)
        return 0
    except RuntimeError as error:
        print(f"nothing can be measured here: {error}", file=sys.stderr)
        return 1
    finally:
        compilers.close()
        worker.close()
    print(report_text(tuning))
    print(f"results in {file.path}")
    return int(tuning.broken())


if __name__ == "__main__":
    sys.exit(main())
