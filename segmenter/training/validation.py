"""Evaluation between epochs: single scale, each process a part of the images."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segmenter.data.datasets import DataError, Dataset, open_dataset
from segmenter.errors import printable
from segmenter.evaluation.charts import comparison
from segmenter.evaluation.evaluate import Protocol, outcomes
from segmenter.evaluation.metrics import ConfusionMatrix, percent
from segmenter.training.distributed import Group
from segmenter.training.recipe import Recipe
from segmenter.visualize import save_png


class Validation:
    """Scores a model on the recipe's val_split, and draws some of its images.

    Args:
        recipe: completed.
    """

    def __init__(self, recipe: Recipe, group: Group, progress: bool = True):
        try:
            self.dataset = open_dataset(recipe.data, recipe.val_split, recipe.kind)
        except DataError as error:
            raise DataError(f"{error}; val_split none trains without evaluation", error.file) from error
        windows = recipe.window_size, recipe.window_stride
        dtype = None if recipe.amp == "none" else recipe.amp
        self.protocol = Protocol(recipe.im_size, recipe.max_ratio, *windows, dtype=dtype)
        self.group, self.progress = group, progress and group.leads
        self.drawn = set(self.dataset.spread(recipe.overlays))
        self.bad_samples, self.reported = recipe.bad_samples, set[str]()

    def shared_with(self, training: Dataset) -> list[str]:
        """A warning if there are images that are trained on and scored."""
        n = len({s.image for s in self.dataset.samples} & {s.image for s in training.samples})
        text = f"{n} of the {len(self.dataset)} images of split {self.dataset.split} are trained on, too: their scores"
        return [f"{text} say nothing about other images"] if n else []

    def __call__(self, model: torch.nn.Module, directory: Path, step: int) -> dict[str, Any]:
        """Scores of all processes together, in percent: val_mIoU, val_mAcc, val_aAcc, val_IoU, and val_images.

        Args:
            model: is put into evaluation mode and back. directory: where overlays go, as STEP_NAME.png.
        Raises:
            DataError: a sample that cannot be read, unless bad ones are to be skipped.
        """
        training, group = model.training, self.group
        matrix, done = ConfusionMatrix(self.dataset.n_cls, self.dataset.ignore_index), 0
        samples = self.dataset.samples[group.rank :: group.world]
        error = None
        model.eval()
        try:
            found = outcomes(model, self.dataset, self.protocol, samples, boundary=False)
            for outcome in tqdm(found, "val", len(samples), leave=False, unit="image", disable=not self.progress):
                if outcome.error is not None and self.bad_samples == "stop":
                    error = outcome.error
                    break
                if outcome.error is not None:
                    report_bad([str(outcome.error)], self.reported)
                    continue
                matrix.merge(outcome.counts.matrix)
                done += 1
                if outcome.sample in self.drawn:
                    directory.mkdir(exist_ok=True)
                    facts = (outcome.pixels, outcome.label, outcome.prediction)
                    panel = comparison(*facts, self.dataset.classes, self.dataset.ignore_index)
                    save_png(panel, directory / f"{step:07d}_{outcome.sample.name.replace('/', '_')}.png")
        finally:
            model.train(training)
        if group.sums([error is not None])[0]:  # in every process: none waits for one that has ended
            raise error or DataError("another process has a sample of val that cannot be read")
        counts = group.sum_(torch.from_numpy(matrix.counts).to(group.device)).cpu().numpy()
        total = ConfusionMatrix(self.dataset.n_cls, self.dataset.ignore_index)
        total.add_counts(counts)
        scores = {f"val_{name}": np.asarray(value).tolist() for name, value in percent(total.scores()).items()}
        return {**scores, "val_pictures": int(group.sums([done])[0])}


def warn(texts: list[str]) -> None:
    """Says on stderr what is no error but worth a look."""
    for text in texts:
        tqdm.write(f"segmenter: warning: {printable(text)}", file=sys.stderr)


def report_bad(errors: list[str], reported: set[str]) -> None:
    """Says on stderr what was wrong with samples that are left out, once each; `reported` remembers."""
    for error in errors:
        if error not in reported:
            reported.add(error)
            tqdm.write(f"segmenter: left out: {error}", file=sys.stderr)
