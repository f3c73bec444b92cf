"""`segmenter figures`: what a model sees in an image, as figures for print and as numbers."""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from segmenter import figures
from segmenter.analysis.subject import AnalysisError
from segmenter.cli.commands.info import machine_facts
from segmenter.cli.errors import DEVICE, OK, SOME_FAILED, CommandError
from segmenter.cli.figures_arguments import NAMES
from segmenter.cli.loading import (
    choose_classes,
    choose_device,
    errors_of_loading,
    load,
    loading_options,
    warn_unless_trained,
)
from segmenter.cli.output import err, out
from segmenter.errors import is_out_of_memory
from segmenter.figures.label_panels import labels_beside
from segmenter.files import walk, write_atomically, writing_into
from segmenter.inference.images import ImageError, read_image, suffixes
from segmenter.weights.load import load_any


def run(args: argparse.Namespace) -> int:
    _check(args)
    names = args.only or NAMES
    try:
        pixels = read_image(args.image)
    except ImageError as error:
        raise CommandError(str(error), SOME_FAILED) from error
    images = _images(args) if "distance-by-depth" in names else []
    makers, made = _makers(args, pixels, images), []
    for name in (bar := tqdm(names, unit="figure", file=sys.stderr, disable=None)):
        bar.set_description(name)
        try:
            made.append(makers[name]())
        except figures.MissingInput as error:
            if args.only:
                raise CommandError(f"{name}: {error}") from error
            err(f"segmenter: left out: {name}: {error}")
        except (figures.FigureError, AnalysisError) as error:
            raise CommandError(f"{name}: {error}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise CommandError("not enough memory; use a smaller --size, --dtype, or --device cpu", DEVICE) from error
    output, facts = Path(args.output), _facts(args)
    contents = {name: content for figure in made for name, content in figure.files(facts).items()}
    with writing_into(output):  # all at the end: after an error there is no figure, rather than some
        for name, content in contents.items():
            write_atomically(output / name, lambda file, content=content: file.write(content))
    out(f"figures: {len(made)} -> {args.output}")
    return OK


def _check(args: argparse.Namespace) -> None:
    for option, names in (("--models", args.models), ("--other", [name for name, _ in args.other or ()])):
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise CommandError(f"{option} {twice[0]} is given twice")


def _images(args: argparse.Namespace) -> list[Path | str]:
    """The images of --images, or the one that there is."""
    if args.images is None:
        return [args.image]
    if not Path(args.images).is_dir():
        raise CommandError(f"--images {args.images}: no such folder")
    found, problems = walk(Path(args.images), suffixes())
    for problem in problems:
        err(f"segmenter: warning: {problem}")
    if not found:
        raise CommandError(f"--images {args.images}: no images in it")
    return found


def _makers(args: argparse.Namespace, pixels: np.ndarray, images: list) -> dict[str, Callable[[], figures.Figure]]:
    """What makes each figure. Models are loaded here, with a warning unless they are trained."""
    device = choose_device(args.device)
    model = load(args, device)
    classes = choose_classes(args.classes, model)
    dtype = {"dtype": args.dtype}
    look = {**dtype, "size": args.size}

    @functools.cache
    def scene() -> figures.Scene:
        return figures.scene(model, pixels, classes=classes, **look)

    def patch_size() -> figures.Figure:
        if len(args.models) < 2:
            raise figures.MissingInput("give --models, two or more, of several patch sizes")
        with errors_of_loading():
            options = {"impl": args.impl, "device": device, **loading_options(args)}
            models = {name: load_any(name, **options) for name in args.models}
        for other in models.values():
            warn_unless_trained(other.info.weights)
        first = next(iter(models.values()))
        truth = args.truth and labels_beside(args.image, args.truth, first.n_cls)
        palette = choose_classes(args.classes, first)
        return figures.patch_size(models, pixels, truth=truth, classes=palette, **dtype)

    def qualitative() -> figures.Figure:
        if not (args.other or args.truth):
            raise figures.MissingInput("give label files to show beside, --other NAME=DIR or --truth DIR")
        rows = args.rows or [args.image]
        return figures.qualitative(
            model, rows, others=dict(args.other or ()), truth=args.truth, classes=classes, **dtype
        )

    def field_of_view() -> figures.Figure:
        layer = args.layer[-1] if args.layer else -1
        points = {"large": args.large, "small": args.small}
        return figures.field_of_view(model, scene(), **points, layer=layer)

    def by_layer() -> figures.Figure:
        return figures.attention_by_layer(model, scene(), points=args.point, layers=args.layer)

    def distance() -> figures.Figure:
        several = tqdm(images, unit="image", file=sys.stderr, disable=None, leave=False)
        return figures.distance_by_depth(model, several, **look)

    return {
        "patch-size": patch_size,
        "attention-by-layer": by_layer,
        "field-of-view": field_of_view,
        "class-embeddings": lambda: figures.class_embeddings(model, scene(), chosen=args.chosen),
        "distance-by-depth": distance,
        "qualitative": qualitative,
    }


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """What stands first in each JSON file: the command with its options, and what it ran on."""
    options = {name: value for name, value in vars(args).items() if value not in (None, (), False)}
    first = {name: options.pop(name) for name in ("command", "image", "model")}
    return {**first, "options": options, "versions": machine_facts()["versions"]}
