"""`segmenter compare`: several models on one image, as a figure and as JSON."""

import argparse
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segmenter.classes import ClassSet
from segmenter.cli.commands.info import machine_facts
from segmenter.cli.errors import DEVICE, FAILURE, OK, SOME_FAILED, CommandError
from segmenter.cli.loading import choose_classes, choose_device, errors_of_loading, loading_options
from segmenter.cli.output import err, out
from segmenter.cli.report import write_json
from segmenter.data.datasets import DataError, Dataset, open_dataset
from segmenter.data.label_files import Ids, ignore_index, read_ids
from segmenter.evaluation.compare import Compared, as_json, compare
from segmenter.evaluation.comparison_figure import choose_part, comparison_figure
from segmenter.evaluation.evaluate import Protocol
from segmenter.files import remove_leftovers
from segmenter.inference.images import ImageError, read_image
from segmenter.model import Segmenter
from segmenter.visualize import save_png
from segmenter.weights.load import load_any


@dataclass(frozen=True)
class Subject:
    """The image, (H, W, 3) uint8, its true labels (H, W) if they are known, and the data set it is from, if any."""

    path: Path
    pixels: np.ndarray
    truth: np.ndarray | None = None
    dataset: Dataset | None = None


def run(args: argparse.Namespace) -> int:
    _check(args)
    device = choose_device(args.device)
    subject = _read_sample(args) if args.data else _read_image(args)
    models = _load(args, device)
    _check_classes(args, models, subject.dataset)
    if args.truth:
        subject = replace(subject, truth=_read_truth(Path(args.truth), models[0].n_cls, subject))
    named = next((model for model in models if model.info.classes), models[0])
    from_model = subject.dataset is None or args.classes
    classes = choose_classes(args.classes, named) if from_model else subject.dataset.classes
    compared = _compare(args, models, subject)
    data = report(args, subject, classes, compared, device)
    write(Path(args.output), subject, classes, compared, data)
    for model in compared:
        scores = "".join(f"  {key} {model.scores[key]}" for key in ("bF", "mIoU") if model.scores)
        out(f"patch {model.patch_size:>2} {model.median:10.1f} ms{scores}  {model.name}")
    out(f"{len(compared)} models on {data['device']} -> {args.output}")
    return OK


def _check(args: argparse.Namespace) -> None:
    if bool(args.image) == bool(args.data):
        raise CommandError("give either an image, or --data and --sample")
    if bool(args.data) != bool(args.sample):
        raise CommandError("--data and --sample go together: a folder, and the name of one of its samples")
    if args.data and args.truth:
        raise CommandError("--truth is for an image of your own; a sample of --data has its labels")
    if Path(args.output).suffix.lower() != ".png":
        raise CommandError(f"-o {args.output}: the figure is a PNG, give a name that ends in .png")


def _read_sample(args: argparse.Namespace) -> Subject:
    try:
        dataset = open_dataset(args.data, args.split, args.kind)
    except DataError as error:
        raise CommandError(str(error)) from error
    sample = next((sample for sample in dataset.samples if sample.name == args.sample), None)
    if sample is None:
        first = ", ".join(sample.name for sample in dataset.samples[:3])
        raise CommandError(
            f"{dataset.root}: none of the {len(dataset)} samples of {args.split} is called {args.sample!r}; the first "
            f"are {first}"
        )
    try:
        return Subject(sample.image, *dataset.read(sample), dataset)
    except DataError as error:
        raise CommandError(str(error), SOME_FAILED) from error


def _read_image(args: argparse.Namespace) -> Subject:
    try:
        return Subject(Path(args.image), read_image(args.image))
    except ImageError as error:
        raise CommandError(str(error), SOME_FAILED) from error


def _read_truth(path: Path, n_cls: int, subject: Subject) -> np.ndarray:
    try:
        truth = Ids(ignored=(ignore_index(n_cls),)).to_labels(read_ids(path), n_cls, path)
    except DataError as error:
        text = f"{error} (--data and --sample read label files as their data set means them)"
        raise CommandError(text, SOME_FAILED) from error
    if truth.shape != subject.pixels.shape[:2]:
        (height, width), (h, w) = subject.pixels.shape[:2], truth.shape
        raise CommandError(
            f"{path}: {w} x {h} pixels, but {subject.path} has {width} x {height}; they must be the same"
        )
    return truth


def _load(args: argparse.Namespace, device: torch.device) -> list[Segmenter]:
    with errors_of_loading():
        return [load_any(name, impl=args.impl, device=device, **loading_options(args)) for name in args.models]


def _check_classes(args: argparse.Namespace, models: list[Segmenter], dataset: Dataset | None) -> None:
    """One legend and one truth are for all, so all must have the same number of classes."""
    counts = list(zip(args.models, (model.n_cls for model in models), strict=True))
    if dataset is not None:
        counts.append((f"the data set {args.data}", dataset.n_cls))
    if len({n for _, n in counts}) > 1:
        each = ", ".join(f"{name} {n}" for name, n in counts)
        raise CommandError(f"numbers of classes differ: {each}; --n-cls gives the number for presets and encoders")


def _compare(args: argparse.Namespace, models: list[Segmenter], subject: Subject) -> list[Compared]:
    protocol = Protocol(window_size=args.window_size, window_stride=args.window_stride, dtype=args.dtype)
    compared = []
    try:
        for model in models:  # all before the first is run: nothing is waited for in vain
            protocol.of_model(model)
        for name, model in zip(args.models, tqdm(models, unit="model", file=sys.stderr, disable=None), strict=True):
            compared.append(compare(_short_name(name), model, subject.pixels, subject.truth, protocol, args.repeats))
            if compared[-1].warning:
                err(f"segmenter: WARNING: {name}: {compared[-1].warning.upper()}")
    except torch.OutOfMemoryError as error:
        raise CommandError("not enough memory; use a smaller --window-size, or --device cpu", DEVICE) from error
    except ValueError as error:  # windows that leave pixels out, an image that grows too large, scores not finite
        raise CommandError(str(error), FAILURE) from error
    return compared


def _short_name(name: str) -> str:
    """A preset as it is; a folder by its own name, a file with its folder's."""
    path = Path(name)
    if not os.path.exists(path):
        return name
    path = path.resolve()
    return path.name if os.path.isdir(path) else "/".join(path.parts[-2:])


def report(
    args: argparse.Namespace, subject: Subject, classes: ClassSet, compared: list[Compared], device: torch.device
) -> dict[str, Any]:
    """All numbers, for JSON; scores are percentages with two decimals, of this image alone."""
    height, width = subject.pixels.shape[:2]
    sample = {"root": args.data, "split": args.split, "sample": args.sample}
    return {
        "image": str(subject.path),
        "width": width,
        "height": height,
        "truth": args.truth,
        "data": sample if args.data else None,
        "classes": classes.name,
        "n_cls": len(classes),
        "device": _in_words(device),
        "repeats": args.repeats,
        "models": [{"path": path} | as_json(model) for path, model in zip(args.models, compared, strict=True)],
        "versions": machine_facts()["versions"],
    }


def write(output: Path, subject: Subject, classes: ClassSet, compared: list[Compared], data: dict[str, Any]) -> None:
    """Writes the figure, and the numbers with the place of the enlarged part in a JSON file of its name beside it."""
    part = choose_part([model.labels for model in compared], subject.truth, len(classes))
    types = " and ".join(dict.fromkeys(model.dtype for model in compared))
    notes = [
        f"Time: from bytes to labels, {types}, {data['device']}; runs: {data['repeats']} after a first one, median.",
        "Tokens: patches in all windows.",
        f"Lower row: the framed part, {part.factor} times as large, where the predictions differ most along borders.",
    ]
    if subject.truth is not None:
        notes.append("White lines: borders of the ground truth. Scores are of this image alone.")
    figure = comparison_figure(subject.pixels, compared, subject.truth, classes, part, notes)
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output.parent)
    save_png(figure, output)
    write_json(output.with_suffix(".json"), data | {"enlarged": asdict(part)})


def _in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, threads: {torch.get_num_threads()}" if device.type == "cpu" else device.type
