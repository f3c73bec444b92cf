"""`segmenter predict`: images to labels, overlays and class shares."""

import argparse
import contextlib
import errno
import fnmatch
import functools
import glob
import itertools
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from segmenter.classes import ClassSet
from segmenter.cli.errors import DEVICE, FAILURE, CommandError
from segmenter.cli.loading import choose_classes, load_for_labels
from segmenter.cli.report import FAILED, Tally, say, write_failed, write_json
from segmenter.cli.resume import image_facts, is_done, run_settings
from segmenter.cli.shards import Shard, run_part
from segmenter.eomt import Eomt
from segmenter.errors import cause
from segmenter.files import remove_leftovers, same_form, walk, write_atomically
from segmenter.inference.images import suffixes
from segmenter.inference.precision import compute_dtype
from segmenter.inference.read_ahead import Call, ReadAhead, usual_workers
from segmenter.inference.segment import refuse_options
from segmenter.inference.stream import ImageMemoryError, Result, results
from segmenter.model import Segmenter
from segmenter.visualize import class_shares, overlay, save_label_png, save_png, with_legend

WAITING = 4  # images whose results are being written, beside the one that the model is at
LABEL_FILES = {"png": "_labels.png", "raw": "_labels_raw.png", "npy": "_labels.npy"}


@dataclass(frozen=True)
class Job:
    """One image and what its results are called: output folder / f"{name}_overlay.png" ..."""

    source: Path
    name: str


@dataclass
class Batch:
    """What all images of a run share, and how far it is. `directories`: those that results have been put into."""

    args: argparse.Namespace
    model: Segmenter | Eomt
    classes: ClassSet
    settings: dict[str, Any]
    output: Path
    resume: bool
    tally: Tally = field(default_factory=Tally)
    directories: set[Path] = field(default_factory=set)

    def fail(self, place: int, job: Job, error: Exception) -> None:
        self.tally.failed[place] = {"image": str(job.source), "error": str(error)}


class JobError(Exception):
    """One image cannot be done; the others can."""


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    shard = Shard.of_this_process()
    jobs = plan(args.inputs, output)
    _refuse_to_overwrite(jobs, output, args)
    model = load_for_labels(args, shard.device(args.device), quiet=shard.rank > 0)
    _refuse_options(args, model)
    window = args.window_size or model.info.window_size
    if args.window_stride and args.window_stride > window:
        raise CommandError(f"--window-stride {args.window_stride} beyond the window of {window} would leave pixels out")
    try:
        compute_dtype(model, args.dtype)
    except ValueError as error:
        raise CommandError(f"--dtype {args.dtype}: {error}") from error
    classes = choose_classes(args.classes, model)
    settings = run_settings(args, model, classes)
    batch = Batch(args, model, classes, settings, output, args.resume or shard.restarts > 0)
    with shard.writing_into(output):
        return _run(jobs, batch, shard)


def _refuse_options(args: argparse.Namespace, model: Segmenter | Eomt) -> None:
    try:
        refuse_options(model, args.scales, args.flip, args.window_size, args.window_stride)
    except ValueError as error:
        raise CommandError(f"{args.model}: {error}") from error


def _run(jobs: list[Job], batch: Batch, shard: Shard) -> int:
    mine = shard.part(jobs)
    no_bar = shard.rank > 0 or None  # None: no bar unless on a terminal

    def do() -> None:
        try:
            with tqdm(total=len(mine), unit="image", file=sys.stderr, disable=no_bar) as bar:
                _do(mine, batch, bar)
        except BaseException:
            if shard.world == 1:
                with contextlib.suppress(OSError):  # show what stopped it instead
                    write_failed(batch.tally, batch.output)
            raise

    def report(tally: Tally, seconds: float) -> None:
        try:
            write_failed(tally, batch.output)
        finally:
            say(tally, len(jobs), seconds, batch.args.output, processes=shard.world)

    planned = [(str(job.source), job.name) for job in jobs]
    return run_part(shard, batch.args.output, planned, batch.settings, batch.tally, do, report)


def plan(inputs: Iterable[str], output: Path) -> list[Job]:
    """The images that the arguments mean, each once, with result names that differ.

    Images of a folder keep their sub-folders; other names are that of the file without its suffix. When taken, the
    suffix is added and then a number. An output folder inside an input folder is no input: it holds earlier results.
    Folders that cannot be entered, or were already, are warned of.

    Raises:
        CommandError: an input folder that is the output folder, where results and images could not be told apart;
            a folder without images; a glob that matches nothing. Missing files are kept: reading reports.
    """
    jobs: list[Job] = []
    seen: set[str] = set()
    taken = {Path(FAILED).stem}
    numbers: dict[str, int] = {}  # name with suffix -> the last number that was tried after it
    places = _Places()
    for path, relative in _expand(inputs, output.resolve()):
        if (target := places.target(path)) in seen:
            continue
        seen.add(target)
        name = relative.with_suffix("").as_posix()
        if _key(name) in taken:
            name = long = f"{name}_{relative.suffix[1:]}"
            number = numbers.get(_key(long), 1)
            while _key(name) in taken:
                number += 1
                name = f"{long}-{number}"
            numbers[_key(long)] = number
        taken.add(_key(name))
        jobs.append(Job(path, name))
    return jobs


def _expand(inputs: Iterable[str], output: Path) -> Iterable[tuple[Path, Path]]:
    """(path of an image, its path below the folder it was found in)."""
    told: set[str] = set()
    for text in inputs:
        path, problems = Path(text), []
        if os.path.isdir(path):  # Path.is_dir() raises for a name that is too long
            if path.resolve() == output:
                raise CommandError(f"{text}: the input folder is the output folder; choose another --output")
            images, problems = walk(path, suffixes(), output)
            found = [(p, p.relative_to(path)) for p in images]
            nothing = f"{text}: no images in this folder ({' '.join(sorted(suffixes()))})"
        elif glob.has_magic(text) and not os.path.exists(path):
            matches, problems = _matches(path)
            found, nothing = [(p, Path(p.name)) for p in matches], f"{text}: no file matches"
        else:
            found, nothing = [(path, Path(path.name))], ""
        for problem in problems:
            if problem not in told:
                told.add(problem)
                warnings.warn(problem, stacklevel=2)
        if not found:
            raise CommandError(nothing)
        yield from found


def _matches(pattern: Path) -> tuple[list[Path], list[str]]:
    """The files that a glob pattern means, sorted, and what could not be looked at for **."""
    before = list(itertools.takewhile(lambda part: part != "**", pattern.parts))
    after = pattern.parts[len(before) :]
    base = str(Path(*before))
    places = sorted(Path(p) for p in (glob.glob(base) if glob.has_magic(base) else [base]))
    if not after:
        return [p for p in places if not os.path.isdir(p)], []
    found, problems = [], []  # glob itself goes round in circles where links do
    for place in filter(os.path.isdir, places):
        files, untold = walk(place)
        found += [p for p in files if _fits(p.relative_to(place).parts, after)]
        problems += untold
    return found, problems


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether names of folders and a file are what the parts of a pattern mean, with ** for any number of folders."""
    if not pattern:
        return not parts
    if pattern == ("**",):
        return True
    if pattern[0] == "**":
        return any(_fits(parts[i:], pattern[1:]) for i in range(len(parts)))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _refuse_to_overwrite(jobs: Iterable[Job], output: Path, args: argparse.Namespace) -> None:
    """Raises CommandError if an image lies where a result, or the list of failures, would be written."""
    places = _Places()
    sources = {
        _key(place): job.source for job in jobs for place in (places.place(job.source), places.target(job.source))
    }
    names = (name for job in jobs for name in (*_files(job, args).values(), f"{job.name}.json"))
    for name in itertools.chain([FAILED], names):
        if (source := sources.get(_key(places.place(output / name)))) is not None:
            raise CommandError(f"{source}: a result would be written over this input; choose another --output")


class _Places:
    """Where paths really lie; each folder is looked up once."""

    def __init__(self):
        self._resolved = functools.cache(os.path.realpath)

    def place(self, path: Path) -> str:
        """With the links in its folder followed, but not the one that it may be itself."""
        return os.path.join(self._resolved(path.parent), path.name)

    def target(self, path: Path) -> str:
        """With all links followed."""
        return os.path.realpath(path) if os.path.islink(path) else self.place(path)


def _key(name: str) -> str:
    """The same for names that some file systems do not tell apart."""
    return same_form(same_form(name).casefold())


def _files(job: Job, args: argparse.Namespace) -> dict[str, str]:
    """Kind -> file name below the output folder, of the results that are asked for; the JSON is not among them."""
    files = {"overlay": f"{job.name}_overlay.png"} if args.overlay else {}
    return files | {kind: job.name + suffix for kind, suffix in LABEL_FILES.items() if kind in args.labels}


def _do(jobs: Iterable[tuple[int, Job]], batch: Batch, bar: tqdm) -> None:
    """Each image is skipped, done, or noted as failed."""
    args = batch.args
    taken: deque[tuple[int, Job, dict[str, int] | None]] = deque()  # those that the stream has, in its order
    stream = results(
        batch.model,
        _sources(jobs, batch, bar, taken),
        batch_size=args.images,
        scales=args.scales,
        flip=args.flip,
        window_size=args.window_size,
        window_stride=args.window_stride,
        window_batch_size=args.batch_size,
        dtype=args.dtype,
        cuda_graphs=args.cuda_graphs,
        workers=args.workers,
    )
    writer = _Writer(batch, bar)
    try:
        with writer, contextlib.closing(stream):
            for result in stream:
                writer.add(*taken.popleft(), result)
                del result
    except ImageMemoryError as error:
        text = f"{error.source}: not enough memory for one window at a time; use a smaller --window-size or --scales, "
        raise CommandError(f"{text}--dtype auto, or --device cpu", DEVICE) from error


def _sources(jobs: Iterable[tuple[int, Job]], batch: Batch, bar: tqdm, taken: deque) -> Iterator[Path]:
    """The images that are to be done; `taken` gets (place, job, facts) of each."""
    for place, job in jobs:
        if batch.resume and is_done(batch.output / f"{job.name}.json", job.source, batch.settings):
            batch.tally.skipped += 1
            bar.update()
            continue
        try:
            with _errors_of_writing(job, batch.output):
                _make_room(job, batch)
        except JobError as error:
            batch.fail(place, job, error)
            bar.update()
        else:
            # facts before reading: an image that changes meanwhile is done again
            taken.append((place, job, image_facts(job.source)))
            yield job.source


class _Writer:
    """Has results written by threads while the model runs on, and notes what became of them, in the order they came.

    Leaving it waits for what is being written: also after an error, so that nothing half-written is left behind.
    """

    def __init__(self, batch: Batch, bar: tqdm):
        self.batch, self.bar = batch, bar
        self.threads = ReadAhead(usual_workers())
        self.pending: deque[tuple[int, Job, Call]] = deque()

    def add(self, place: int, job: Job, facts: dict[str, int] | None, result: Result) -> None:
        """Writes the results of one image, or notes why there are none. Raises what an earlier one met."""
        call = Call(lambda result: self._write(job, result, facts), result)
        self.pending.append((place, job, self.threads.put(call)))
        while len(self.pending) > WAITING:
            self._note(*self.pending.popleft())

    def _write(self, job: Job, result: Result, facts: dict[str, int] | None) -> None:
        if result.error is not None:
            raise JobError(str(result.error)) from result.error
        with _errors_of_writing(job, self.batch.output):
            _write_results(job, self.batch, result.pixels, result.labels.numpy(), facts)

    def _note(self, place: int, job: Job, call: Call) -> None:
        try:
            self.threads.result(call)
        except JobError as error:
            self.batch.fail(place, job, error)
        else:
            self.batch.tally.done += 1
        self.bar.update()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        first = None  # the error to tell
        while self.pending:
            try:
                self._note(*self.pending.popleft())
            except BaseException as error:
                first = first or error
        self.threads.close()
        if first is not None and kind is None:
            raise first


@contextlib.contextmanager
def _errors_of_writing(job: Job, output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise JobError(f"{job.source}: the names of its results are too long; rename it") from error
        # whatever else it is, a full disk or a missing permission, the next image would meet it too
        raise CommandError(f"{output / job.name}: cannot write: {cause(error)}", FAILURE) from error


def _make_room(job: Job, batch: Batch) -> None:
    """Makes the folder, and raises OSError for names that are too long, before time is spent on the image."""
    directory = (batch.output / job.name).parent
    if directory not in batch.directories:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        batch.directories.add(directory)
    for name in (*_files(job, batch.args).values(), f"{job.name}.json"):
        with contextlib.suppress(FileNotFoundError):
            os.lstat(batch.output / name)


def _write_results(
    job: Job, batch: Batch, pixels: np.ndarray, labels: np.ndarray, facts: dict[str, int] | None
) -> None:
    """All files of one image; the JSON comes last, so that an image with a JSON is complete."""
    args, classes, files = batch.args, batch.classes, _files(job, batch.args)
    paths = {kind: batch.output / name for kind, name in files.items()}
    if "overlay" in paths:
        image = overlay(pixels, labels, classes, args.alpha)
        save_png(with_legend(image, labels, classes) if args.legend else image, paths["overlay"])
    if "png" in paths:
        save_label_png(labels, paths["png"], classes)
    if "raw" in paths:
        save_label_png(labels, paths["raw"])
    if "npy" in paths:
        write_atomically(paths["npy"], lambda file: np.save(file, labels))
    result = {
        "image": str(job.source),
        "picture": facts,
        "width": labels.shape[1],
        "height": labels.shape[0],
        "weights": batch.settings["weights"],
        "classes": class_shares(labels, classes),
        "files": files,
        "settings": batch.settings,
    }
    write_json(batch.output / f"{job.name}.json", result)
