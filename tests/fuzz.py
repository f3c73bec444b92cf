"""Mutated files of every format that the project reads: each is refused as documented, or gives what it may give.

    python -m tests.fuzz                         a hundred files of each format
    python -m tests.fuzz --files 5000            5,000 of each, which takes a while
    python -m tests.fuzz --only png --start 1234 --files 1    one case again
    python -m tests.fuzz --only png --start 1234 --keep DIR   and its file, to look at

A case is known by format and number: the same number gives the same file. Cases run one after another in a forked
process with limits on time and memory; one that hangs or crashes costs its process, and the next goes on behind it.
Prints a table, and every finding. Exit status 1 if there is one.

A finding: another exception than the documented one, a message that cannot be printed, a hang, a crash, memory,
and, of formats that carry checksums, content that is not what was written.
"""

import argparse
import dataclasses
import faulthandler
import hashlib
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SECONDS = 20  # a case; most take a hundredth of one
MEMORY = 2 << 30  # bytes of address space that a case may add; an image may have 64 million pixels
RESIDENT = 1 << 30  # bytes of memory
HARMLESS = ("refused", "same", "other")
KINDS = ("silent", "hung", "crashed", "memory", "wrong exception")


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        write: makes a folder in which the file `file` is valid. load: reads it; what it returns is compared.
        errors: the documented exceptions. tokens: what is put into it, besides bytes. summed: it carries checksums, so
            it never gives anything else than what was written. inside: (unpack, pack), of content to mutate in it.
        plausible: of what is read, whether it can be what such a file holds.
    """

    name: str
    file: str
    write: Callable[[Path], None]
    load: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    tokens: tuple[bytes, ...] = ()
    summed: bool = False
    inside: tuple[Callable[[bytes], bytes], Callable[[bytes, bytes], bytes]] | None = None
    plausible: Callable[[Any], bool] = lambda result: True


@dataclasses.dataclass(frozen=True)
class Finding:
    format: str
    case: int
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.format} --start {self.case}: {self.what}"


# ---------------------------------------------------------------------------------------------------------------------
# What is done to a file

HUGE = (b"-1", b"0", b"1e999", b"2147483648", b"4294967296", b"9223372036854775808", b"9" * 40, b"9" * 6000, b"0.1")
WORDS = [
    bytes.fromhex(word) for word in ("ff" * 4, "ff" * 8, "00" * 8, "7fffffff", "ffffff7f", "00000080", "000010" * 2)
]


def mutated(content: bytes, rng: random.Random, tokens: tuple[bytes, ...] = ()) -> bytes:
    """`content` after one to three changes."""
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(MUTATIONS)(result, rng, tokens)
    return bytes(result)


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, the ends more often: that is where headers and directories are."""
    edge = min(len(data), 512)
    return rng.choice((rng.randint(0, edge), len(data) - rng.randint(0, edge), rng.randint(0, len(data))))


def _span(data: bytearray, rng: random.Random) -> slice:
    at = _place(data, rng)
    return slice(at, at + rng.choice((1, 4, 16, 100, 1000)))


def _flip(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    for _ in range(rng.choice((1, 1, 8, 64))):
        if data:
            data[min(_place(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)


def _truncate(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    del data[_place(data, rng) :]


def _insert(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    place = _place(data, rng)
    data[place:place] = rng.randbytes(rng.choice((1, 2, 8, 300)))


def _delete(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    del data[_span(data, rng)]


def _duplicate(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    chunk, place = data[_span(data, rng)], _place(data, rng)
    data[place:place] = chunk * rng.choice((1, 2, 50))


def _swap(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    a, b = _span(data, rng), _span(data, rng)
    data[a], data[b] = data[b], data[a]


def _token(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    place, token = _place(data, rng), rng.choice(tokens or WORDS)
    data[place : place + rng.choice((0, len(token)))] = token * rng.choice((1, 1, 1, 100))


def _word(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    place, word = _place(data, rng), rng.choice(WORDS)
    data[place : place + len(word)] = word


def _number(data: bytearray, rng: random.Random, tokens: tuple[bytes, ...]) -> None:
    """A number in text becomes another one."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", bytes(data[:100_000])))
    if not found:
        return _word(data, rng, tokens)
    match = rng.choice(found)
    data[match.start() : match.end()] = rng.choice(HUGE)


MUTATIONS = (_flip, _truncate, _insert, _delete, _duplicate, _swap, _token, _token, _word, _number, _number)


# ---------------------------------------------------------------------------------------------------------------------
# One case


def case_content(form: Format, original: bytes, case: int) -> bytes:
    rng = random.Random(f"{form.name} {case}")
    if form.inside is None:
        return mutated(original, rng, form.tokens)
    unpack, pack = form.inside
    return pack(original, mutated(unpack(original), rng, form.tokens))


def digest(value: Any) -> str:
    """Of plain values, tensors and arrays: equal for equal ones."""
    sha = hashlib.sha256()
    _digest(value, sha.update)
    return sha.hexdigest()


def _digest(value: Any, update: Callable[[bytes], None]) -> None:
    update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif dataclasses.is_dataclass(value):
        _digest({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, update)
    elif isinstance(value, dict):
        for key, item in value.items():
            _digest(key, update)
            _digest(item, update)
    elif isinstance(value, list | tuple):
        for item in value:
            _digest(item, update)
    else:
        update(repr(value).encode(errors="surrogatepass"))


def judge(form: Format, directory: Path, expected: str) -> tuple[str, str]:
    """(one of HARMLESS or KINDS, what it is) of the file in `directory`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = form.load(directory)
        same = digest(result) == expected
        verdict = ("same", "") if same else ("silent", "other content") if form.summed else ("other", "")
        if not form.plausible(result):
            verdict = ("silent", f"no such thing: {result!r:.200}")
    except Exception as error:
        verdict = _verdict(form, error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return ("memory", f"{grown >> 20} MB more, then {verdict}") if grown > RESIDENT else verdict


def _verdict(form: Format, error: Exception) -> tuple[str, str]:
    if no_memory := [e for e in _chain(error) if isinstance(e, MemoryError) or "allocate memory" in str(e)]:
        return "memory", f"{no_memory[-1]!r:.200} at {_where(no_memory[-1])}"
    text = str(error)
    if not isinstance(error, form.errors):
        return "wrong exception", f"{type(error).__name__}: {text[:200]!r} at {_where(error)}"
    if not text or not all(line.isprintable() for line in text.split("\n")):
        return "wrong exception", f"not printable: {text[:200]!r}"
    return "refused", ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "segmenter" in f.filename] or [None]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames[-1] else "?"


# ---------------------------------------------------------------------------------------------------------------------
# Many cases


def run(form: Format, cases: range, directory: Path, seconds: float = SECONDS) -> tuple[Counter, list[Finding]]:
    """(how many cases ended how, what is wrong) of some cases of a format, in an empty folder."""
    form.write(directory)
    expected, original = digest(form.load(directory)), (directory / form.file).read_bytes()
    counts, findings = Counter(), []
    first = cases.start
    while first < cases.stop:
        for case, kind, what in _in_a_child(form, range(first, cases.stop), directory, original, expected, seconds):
            counts[kind] += 1
            first = case + 1
            if kind not in HARMLESS:
                findings.append(Finding(form.name, case, kind, what))
    return counts, findings


def _in_a_child(
    form: Format, cases: range, directory: Path, original: bytes, expected: str, seconds: float
) -> Iterator[tuple[int, str, str]]:
    """(case, kind, what) of as many of the cases as one process survives."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(form, cases, directory, original, expected, writer)
    os.close(writer)
    case, ended = cases.start, False
    with os.fdopen(reader, "rb", buffering=0) as results:
        while not ended and case < cases.stop:
            ready = select.select([results], [], [], seconds)[0]
            if not ready:
                os.kill(child, signal.SIGKILL)
                yield case, "hung", f"no answer in {seconds} s"
                ended = True
            elif header := results.read(4):
                kind, what = pickle.loads(_exactly(results, struct.unpack("<I", header)[0]))
                yield case, kind, what
                case += 1
            else:
                status = os.waitpid(child, 0)[1]
                yield case, "crashed", f"signal {status & 127}, exit status {status >> 8}"
                return
    os.waitpid(child, 0)


def _exactly(file: Any, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def _work(form: Format, cases: range, directory: Path, original: bytes, expected: str, writer: int) -> None:
    """The child: never returns."""
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        faulthandler.disable()  # it would write of each crash
        warnings.simplefilter("ignore")
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch.set_num_threads(1)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for case in cases:
            (directory / form.file).write_bytes(case_content(form, original, case))
            answer = pickle.dumps(judge(form, directory, expected))
            os.write(writer, struct.pack("<I", len(answer)) + answer)
        status = 0
    finally:
        os._exit(status)


def table(counts: dict[str, Counter]) -> str:
    """Files tried, and how they ended, a line a format."""
    names = [*HARMLESS, *KINDS]
    rows = [["format", " files", *names]]
    for form, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        rows.append([form, str(sum(count.values())), *(str(count[name]) for name in names)])
    widths = [24, *(len(name) + 2 for name in rows[0][1:])]
    lines = ["".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)) for row in rows]
    return "\n".join(row[0].ljust(widths[0]) + line for row, line in zip(rows, lines, strict=True))


def main() -> int:
    from tests.support.fuzz_formats import FORMATS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=100, help="of each format (default: 100)")
    parser.add_argument("--start", type=int, default=0, help="the first case (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="FORMAT", choices=[f.name for f in FORMATS])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"a case may take (default: {SECONDS})")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the mutated files there and do not read them")
    args = parser.parse_args()
    counts, failed = {}, False
    for form in (f for f in FORMATS if not args.only or f.name in args.only):
        cases = range(args.start, args.start + args.files)
        with tempfile.TemporaryDirectory() as directory:
            if args.keep:
                keep(form, cases, Path(directory), args.keep)
                continue
            began = time.monotonic()
            counts[form.name], findings = run(form, cases, Path(directory), args.seconds)
            print(f"{form.name}: {args.files} files, {len(findings)} findings, {time.monotonic() - began:.0f} s")
        for finding in findings:
            print(f"  {finding}", flush=True)
        failed |= bool(findings)
    print(table(counts))
    return int(failed)


def keep(form: Format, cases: range, template: Path, target: Path) -> None:
    form.write(template)
    for case in cases:
        directory = target / f"{form.name}-{case}".replace(" ", "-")
        shutil.copytree(template, directory, dirs_exist_ok=True)
        (directory / form.file).write_bytes(case_content(form, (template / form.file).read_bytes(), case))


if __name__ == "__main__":
    sys.exit(main())
