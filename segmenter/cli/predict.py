"""`segmenter predict`: pictures to labels, overlays and class shares."""

import argparse
import contextlib
import errno
import glob
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segmenter.classes import ClassSet
from segmenter.cli.errors import DEVICE, FAILURE, OK, SOME_FAILED, CommandError
from segmenter.cli.loading import choose_classes, choose_device, load
from segmenter.cli.resume import is_done, picture_facts, run_settings
from segmenter.images import read_image
from segmenter.model import Segmenter
from segmenter.visualize import class_shares, overlay, save_label_png, save_png, with_legend, write_atomically

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".mpo"}
FAILED = "failed.json"
LABEL_FILES = {"png": "_labels.png", "raw": "_labels_raw.png", "npy": "_labels.npy"}


@dataclass(frozen=True)
class Job:
    """One picture and what its results are called: output folder / f"{name}_overlay.png" ..."""

    source: Path
    name: str


@dataclass
class Batch:
    """What all pictures of a run share, and how far it is."""

    args: argparse.Namespace
    model: Segmenter
    classes: ClassSet
    settings: dict[str, Any]
    output: Path
    done: int = 0
    skipped: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)


class PictureError(Exception):
    """One picture cannot be done; the others can."""


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    jobs = plan(args.inputs, output)
    _refuse_to_overwrite(jobs, output, args)
    model = load(args, choose_device(args.device))
    window = args.window_size or model.info.window_size
    if args.window_stride and args.window_stride > window:
        raise CommandError(f"--window-stride {args.window_stride} beyond the window of {window} would leave pixels out")
    classes = choose_classes(args.classes, model)
    batch = Batch(args, model, classes, run_settings(args, model, classes), output)
    output.mkdir(parents=True, exist_ok=True)
    start, finished = time.perf_counter(), False
    try:
        with tqdm(jobs, unit="picture", file=sys.stderr, disable=None) as bar:  # None: no bar unless on a terminal
            for job in bar:
                _do(job, batch)
        finished = True
    finally:  # also after Ctrl-C or a full disk: say what there is
        _report(batch, len(jobs), time.perf_counter() - start, finished)
    return SOME_FAILED if batch.failed else OK


def plan(inputs: Iterable[str], output: Path) -> list[Job]:
    """The pictures that the arguments mean, each once, with result names that differ.

    Pictures of a folder keep their sub-folders; other names are that of the file without its suffix. When taken, the
    suffix is added and then a number. An output folder inside an input folder is no input: it holds earlier results.

    Raises:
        CommandError: an input folder that is the output folder, where results and pictures could not be told apart;
            a folder without pictures; a glob that matches nothing. Missing files are kept: reading reports.
    """
    jobs: list[Job] = []
    seen: set[str] = set()
    taken = {Path(FAILED).stem}
    for path, relative in _expand(inputs, output.resolve()):
        if (key := os.path.realpath(path)) in seen:
            continue
        seen.add(key)
        stem = relative.with_suffix("").as_posix()
        candidates = [stem, f"{stem}_{relative.suffix[1:]}"]
        candidates += [f"{candidates[1]}-{i}" for i in range(2, len(seen) + 2)]
        name = next(c for c in candidates if c.casefold() not in taken)  # some file systems ignore case
        taken.add(name.casefold())
        jobs.append(Job(path, name))
    return jobs


def _expand(inputs: Iterable[str], output: Path) -> Iterable[tuple[Path, Path]]:
    """(path of a picture, its path below the folder it was found in)."""
    for text in inputs:
        path = Path(text)
        if os.path.isdir(path):  # Path.is_dir() raises for a name that is too long
            if path.resolve() == output:
                raise CommandError(f"{text}: the input folder is the output folder; choose another --output")
            found = [(p, p.relative_to(path)) for p in _pictures(path, output)]
            nothing = f"{text}: no pictures in this folder ({' '.join(sorted(SUFFIXES))})"
        elif glob.has_magic(text) and not os.path.exists(path):
            matches = (Path(p) for p in sorted(glob.glob(text, recursive=True)))
            found = [(p, Path(p.name)) for p in matches if not p.is_dir()]
            nothing = f"{text}: no file matches"
        else:
            found, nothing = [(path, Path(path.name))], ""
        if not found:
            raise CommandError(nothing)
        yield from found


def _pictures(folder: Path, output: Path) -> list[Path]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and Path(root, f).resolve() != output]
        found += [p for f in files if (p := Path(root, f)).suffix.lower() in SUFFIXES and not f.startswith(".")]
    return sorted(found)


def _refuse_to_overwrite(jobs: Iterable[Job], output: Path, args: argparse.Namespace) -> None:
    """Raises CommandError if a picture lies where a result, or the list of failures, would be written."""
    sources = {_place(job.source): job.source for job in jobs}
    names = [FAILED, *(name for job in jobs for name in [*_files(job, args).values(), f"{job.name}.json"])]
    for name in names:
        if (source := sources.get(_place(output / name))) is not None:
            raise CommandError(f"{source}: a result would be written over this input; choose another --output")


def _place(path: Path) -> str:
    return os.path.realpath(path).casefold()  # some file systems ignore case


def _files(job: Job, args: argparse.Namespace) -> dict[str, str]:
    """Kind -> file name below the output folder, of the results that are asked for; the JSON is not among them."""
    files = {"overlay": f"{job.name}_overlay.png"} if args.overlay else {}
    return files | {kind: job.name + suffix for kind, suffix in LABEL_FILES.items() if kind in args.labels}


def _do(job: Job, batch: Batch) -> None:
    """One picture: skipped, done, or noted as failed."""
    if batch.args.resume and is_done(batch.output / f"{job.name}.json", job.source, batch.settings):
        batch.skipped += 1
        return
    try:
        with _errors_of_writing(job, batch.output):
            _make_room(job, batch)
        facts = picture_facts(job.source)  # before reading: a picture that changes meanwhile is done again
        pixels, labels = _segment(job, batch)
        with _errors_of_writing(job, batch.output):
            _write_results(job, batch, pixels, labels, facts)
    except PictureError as error:
        batch.failed.append({"image": str(job.source), "error": str(error)})
    else:
        batch.done += 1


@contextlib.contextmanager
def _errors_of_writing(job: Job, output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PictureError(f"{job.source}: the names of its results are too long; rename it") from error
        # whatever else it is, a full disk or a missing permission, the next picture would meet it too
        raise CommandError(f"{output / job.name}: cannot write: {error.strerror or error}", FAILURE) from error


def _make_room(job: Job, batch: Batch) -> None:
    """Makes the folder, and raises OSError for names that are too long, before time is spent on the picture."""
    (batch.output / job.name).parent.mkdir(parents=True, exist_ok=True)
    for name in (*_files(job, batch.args).values(), f"{job.name}.json"):
        with contextlib.suppress(FileNotFoundError):
            os.lstat(batch.output / name)


def _segment(job: Job, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    args = batch.args
    try:
        pixels = read_image(job.source)
        labels = batch.model.segment(
            pixels,
            scales=args.scales,
            flip=args.flip,
            window_size=args.window_size,
            window_stride=args.window_stride,
            batch_size=args.batch_size,
            dtype=args.dtype,
        )
    except torch.OutOfMemoryError as error:
        text = f"{job.source}: not enough GPU memory; use a smaller --batch-size or --window-size, or --device cpu"
        raise CommandError(text, DEVICE) from error
    except ValueError as error:  # ImageError is one; so is a picture too long and thin for a window
        text = str(error)
        raise PictureError(text if str(job.source) in text else f"{job.source}: {text}") from error
    return pixels, labels.numpy()


def _write_results(
    job: Job, batch: Batch, pixels: np.ndarray, labels: np.ndarray, facts: dict[str, int] | None
) -> None:
    """All files of one picture; the JSON comes last, so that a picture with a JSON is complete."""
    args, classes, files = batch.args, batch.classes, _files(job, batch.args)
    paths = {kind: batch.output / name for kind, name in files.items()}
    if "overlay" in paths:
        picture = overlay(pixels, labels, classes, args.alpha)
        save_png(with_legend(picture, labels, classes) if args.legend else picture, paths["overlay"])
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
    _write_json(batch.output / f"{job.name}.json", result)


def _report(batch: Batch, total: int, seconds: float, finished: bool) -> None:
    """Says on stdout what was done, on stderr what failed, and lists that in failed.json."""
    for entry in batch.failed:
        print(f"segmenter: failed: {' '.join(entry['error'].split())}", file=sys.stderr)
    each = f", {seconds / batch.done:.2f} s each" if batch.done else ""
    counts = f"{batch.done} done, {batch.skipped} skipped, {len(batch.failed)} failed of {total}"
    early = "" if finished else "stopped early, --resume goes on: "
    print(f"{early}{counts} in {seconds:.1f} s{each} -> {batch.args.output}")
    with contextlib.nullcontext() if finished else contextlib.suppress(OSError):  # what stopped it is the error to show
        if batch.failed:
            _write_json(batch.output / FAILED, batch.failed)
        else:
            (batch.output / FAILED).unlink(missing_ok=True)


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2) + "\n"  # pure ASCII: file names need not be valid Unicode
    write_atomically(path, lambda file: file.write(text.encode()))
