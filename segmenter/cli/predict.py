"""`segmenter predict`: pictures to labels, overlays and class shares."""

import argparse
import glob
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segmenter.classes import ClassSet
from segmenter.cli.errors import DEVICE, OK, SOME_FAILED, CommandError
from segmenter.cli.loading import choose_classes, choose_device, load
from segmenter.images import read_image
from segmenter.model import Segmenter
from segmenter.visualize import class_shares, overlay, save_label_png, save_png, with_legend, write_atomically

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".mpo"}
FAILED = "failed.json"


@dataclass(frozen=True)
class Job:
    """One picture and what its results are called: output folder / f"{name}_overlay.png" ..."""

    source: Path
    name: str


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    jobs = plan(args.inputs, output)
    model = load(args, choose_device(args.device))
    window = args.window_size or model.info.window_size
    if args.window_stride and args.window_stride > window:
        raise CommandError(f"--window-stride {args.window_stride} beyond the window of {window} would leave pixels out")
    classes = choose_classes(args.classes, model)
    settings = _settings(args, model, classes)
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    failed, skipped = [], 0
    for job in tqdm(jobs, unit="picture", file=sys.stderr, disable=None):  # None: no bar unless on a terminal
        if args.resume and _is_done(job, output, settings):
            skipped += 1
            continue
        try:
            pixels, labels = _segment(job, args, model)
        except torch.OutOfMemoryError as error:
            message = (
                f"{job.source}: not enough GPU memory; use a smaller --batch-size or --window-size, or --device cpu"
            )
            raise CommandError(message, DEVICE) from error
        except ValueError as error:  # ImageError is one; so is a picture too long and thin for a window
            text = str(error)
            failed.append(
                {"image": str(job.source), "error": text if str(job.source) in text else f"{job.source}: {text}"}
            )
            continue
        _write_results(job, output, pixels, labels, classes, settings)
    _report(args.output, len(jobs), skipped, failed, time.perf_counter() - start)
    return SOME_FAILED if failed else OK


def plan(inputs: Iterable[str], output: Path) -> list[Job]:
    """The pictures that the arguments mean, each once, with result names that differ.

    Pictures of a folder keep their sub-folders; other names are that of the file without its suffix. When taken, the
    suffix is added and then a number. Earlier results inside an input folder are no input.

    Raises:
        CommandError: a folder without pictures or a glob that matches nothing. Missing files are kept: reading reports.
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
        if path.is_dir():
            found = [(p, p.relative_to(path)) for p in _pictures(path, output)]
            nothing = f"{text}: no pictures in this folder ({' '.join(sorted(SUFFIXES))})"
        elif glob.has_magic(text) and not path.exists():
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


def _settings(args: argparse.Namespace, model: Segmenter, classes: ClassSet) -> dict[str, Any]:
    """All that the results depend on besides the picture; --resume compares it."""
    names = ("overlay", "legend", "alpha", "labels", "dtype", "window_size", "window_stride", "scales", "flip", "model")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"classes": classes.name, "n_cls": model.n_cls, "weights": model.info.weights, "impl": model.impl}
    return json.loads(json.dumps(settings))  # as it reads back


def _segment(job: Job, args: argparse.Namespace, model: Segmenter) -> tuple[np.ndarray, np.ndarray]:
    pixels = read_image(job.source)
    labels = model.segment(
        pixels,
        scales=args.scales,
        flip=args.flip,
        window_size=args.window_size,
        window_stride=args.window_stride,
        batch_size=args.batch_size,
        dtype=args.dtype,
    )
    return pixels, labels.numpy()


def _write_results(
    job: Job, output: Path, pixels: np.ndarray, labels: np.ndarray, classes: ClassSet, settings: dict[str, Any]
) -> None:
    """All files of one picture; the JSON comes last, so that a picture with a JSON is complete."""
    (output / job.name).parent.mkdir(parents=True, exist_ok=True)
    files = {}
    if settings["overlay"]:
        files["overlay"] = f"{job.name}_overlay.png"
        picture = overlay(pixels, labels, classes, settings["alpha"])
        save_png(with_legend(picture, labels, classes) if settings["legend"] else picture, output / files["overlay"])
    if "png" in settings["labels"]:
        files["png"] = f"{job.name}_labels.png"
        save_label_png(labels, output / files["png"], classes)
    if "raw" in settings["labels"]:
        files["raw"] = f"{job.name}_labels_raw.png"
        save_label_png(labels, output / files["raw"])
    if "npy" in settings["labels"]:
        files["npy"] = f"{job.name}_labels.npy"
        write_atomically(output / files["npy"], lambda file: np.save(file, labels))
    result = {
        "image": str(job.source),
        "width": labels.shape[1],
        "height": labels.shape[0],
        "weights": settings["weights"],
        "classes": class_shares(labels, classes),
        "files": files,
        "settings": settings,
    }
    _write_json(output / f"{job.name}.json", result)


def _is_done(job: Job, output: Path, settings: dict[str, Any]) -> bool:
    try:
        result = json.loads((output / f"{job.name}.json").read_text(encoding="utf-8"))
        same = (result["image"], result["settings"]) == (str(job.source), settings)
        return same and all((output / file).is_file() for file in result["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _report(output: str, total: int, skipped: int, failed: list[dict[str, str]], seconds: float) -> None:
    failed_file = Path(output, FAILED)
    if failed:
        _write_json(failed_file, failed)
        print(
            *(f"segmenter: failed: {' '.join(entry['error'].split())}" for entry in failed), sep="\n", file=sys.stderr
        )
    else:
        failed_file.unlink(missing_ok=True)
    done = total - skipped - len(failed)
    each = f", {seconds / done:.2f} s each" if done else ""
    print(f"{done} done, {skipped} skipped, {len(failed)} failed of {total} in {seconds:.1f} s{each} -> {output}")


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2) + "\n"  # pure ASCII: file names need not be valid Unicode
    write_atomically(path, lambda file: file.write(text.encode()))
