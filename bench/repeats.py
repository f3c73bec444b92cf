"""Calls the shipped configuration of every kernel many times: are its results right, and the same bit for bit?

python -m bench.repeats --out DIR --times 1000          on a GPU; DIR/repeats.json says which operators differ
python -m bench.repeats --out DIR --times 0 --tiny      small launches and no check, for compute-sanitizer
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from bench import gate, machine, providers, timing
from bench.tuning import measure
from bench.tuning.buckets import TINY, Bucket, buckets
from segmenter.files import write_text
from segmenter.kernels import launch

OUT_OF_TIME = 3  # exit status


def differing(fn: Any, arguments: tuple, times: int) -> int:
    """How many of so many further calls give other bits than the first. They are counted on the device.

    The result of `fn` is a tensor of any dtype, or several.
    """
    first = [bits.clone() for bits in _bits(fn(*arguments))]
    count = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(times):
        count += torch.stack([(a != b).any() for a, b in zip(_bits(fn(*arguments)), first, strict=True)]).any()
    return int(count)


def _bits(result: Any) -> list[torch.Tensor]:
    return [tensor.contiguous().view(torch.uint8) for tensor in tree_leaves(result)]


@torch.no_grad()
def found(bucket: Bucket, times: int, device: torch.device) -> str:
    """What is wrong with a bucket's shipped configuration, "" if nothing is. 0 times: one call, not checked."""
    fn = bucket.arguments()[0]
    with providers.float32_products(bucket.case.precision), bucket.in_force(bucket.row.config):
        try:
            arguments = measure.inputs(bucket, 0, device)
            with measure.poisoned():
                result = fn(*arguments)
            timing.synchronize(device)
            if not times:
                return ""
            measure.check(bucket, result, *measure.references(bucket, arguments))
            count = differing(fn, arguments, times)
        except gate.GateError as error:
            return f"wrong: {error}"
        except Exception as error:  # the others are to be looked at all the same
            return f"fails: {type(error).__name__}: {error}"
    return f"{count} of {times} repeats differ from the first call" if count else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of repeats.json; what stands in it is kept")
    parser.add_argument("--times", type=int, default=1000, help="calls that are compared with the first; default 1000")
    parser.add_argument("--tiny", action="store_true", help="small launches")
    parser.add_argument("--op", nargs="+", choices=TINY, default=(), help="tables; default: all")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time after which nothing is begun")
    parser.add_argument("--interpret", action="store_true", help="on a CPU, in Triton's interpreter")
    args = parser.parse_args(arguments)
    if args.interpret != launch.INTERPRETED:
        parser.error("set TRITON_INTERPRET=1 with --interpret, and not without")
    if not args.interpret and not torch.cuda.is_available():
        parser.error("there is no GPU here; --interpret with --tiny goes through it without one")
    device = torch.device("cpu" if args.interpret else "cuda")
    architecture = "sm_90" if args.interpret else launch.architecture(torch.empty(0, device=device))
    kinds = ("half",) if args.interpret else ("half", "tf32", "fp32")
    rows = [bucket for kind in kinds for bucket in buckets(architecture, kind, args.op)]
    rows = [Bucket(bucket.table, bucket.index, architecture, args.tiny) for bucket in dict.fromkeys(rows)]
    path, facts = args.out / "repeats.json", machine.facts(device)
    key = f"{facts['name']}, {facts['commit']}, {args.times} times{', tiny' * args.tiny}"
    kept = json.loads(path.read_text()) if path.exists() else {}
    known = kept.setdefault(key, {})
    for bucket in tqdm(rows, file=sys.stderr, unit="configuration"):
        name = f"{bucket.name} #{bucket.index}"
        if known.get(name) == "" and args.times:
            continue
        if time.time() > args.deadline:
            print(f"out of time: {len(known)} of {len(rows)} done")
            return OUT_OF_TIME
        known[name] = found(bucket, args.times, device)
        if known[name]:
            tqdm.write(f"{name}: {known[name]}", file=sys.stderr)
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(kept, indent=1))
    bad = sum(map(bool, known.values()))
    print(f"{len(known)} shipped configurations, {args.times} repeats each: {bad} wrong, failing or differing ({path})")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
