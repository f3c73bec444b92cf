"""`segmenter train`: one run, from flags or a YAML recipe, on one process or on those that torchrun starts."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from segmenter.cli.errors import FAILURE, OK, USAGE, CommandError
from segmenter.cli.loading import errors_of_loading
from segmenter.cli.output import err, out
from segmenter.cli.shards import Shard
from segmenter.data.datasets import DataError
from segmenter.training.distributed import Group
from segmenter.training.initial_model import PRESET
from segmenter.training.loop import TrainingError, train
from segmenter.training.recipe import Recipe, RecipeError, make_recipe, read_recipe

TERMINATED = 143


def run(args: argparse.Namespace) -> int:
    shard = Shard.of_this_process()
    group = Group(shard.rank, shard.world, shard.device(args.device))
    try:
        recipe = recipe_of(args)
        if recipe.model.startswith(PRESET) and not os.path.exists(Path(recipe.model)) and group.leads:
            text = "is RANDOM WEIGHTS; the published recipe starts from ImageNet's: --model timm/NAME, or a file"
            err(f"segmenter: WARNING: {recipe.model} {text}")
        group.join()
        with errors_of_loading():
            outcome = train(recipe, args.output, group)
    except RecipeError as error:
        raise CommandError(str(error), USAGE) from error
    except (DataError, TrainingError) as error:
        raise CommandError(str(error), FAILURE) from error
    finally:
        group.leave()
    best = "" if outcome.best is None else f", best mIoU on val {outcome.best:.2f}"
    if outcome.stopped:
        if group.leads:
            out(f"stopped and saved after step {outcome.step} of {outcome.total}; the same command goes on{best}")
        return TERMINATED
    if group.leads:
        out(f"{outcome.total} steps done{best} -> {args.output}")
    return OK


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe file, if there is one, with the flags that were given put over it."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return read_recipe(args.recipe, **given) if args.recipe else make_recipe(given)
