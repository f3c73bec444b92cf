"""Evaluation between epochs: single scale, each process a part of the pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segmenter.charts import comparison
from segmenter.data.datasets import open_dataset
from segmenter.evaluate import Protocol, outcomes
from segmenter.metrics import ConfusionMatrix, percent
from segmenter.training.distributed import Group
from segmenter.training.recipe import Recipe
from segmenter.visualize import save_png


class Validation:
    """Scores a model on the recipe's val_split, and draws some of its pictures.

    Args:
        recipe: completed.
    """

    def __init__(self, recipe: Recipe, group: Group, progress: bool = True):
        self.dataset = open_dataset(recipe.data, recipe.val_split, recipe.kind)
        self.protocol = Protocol(recipe.im_size, recipe.max_ratio, recipe.window_size, recipe.window_stride)
        self.group, self.progress, self.n_overlays = group, progress and group.leads, recipe.overlays
        self.bad_samples = recipe.bad_samples

    def __call__(self, model: torch.nn.Module, folder: Path, step: int) -> dict[str, Any]:
        """Scores of all processes together, in percent: val_mIoU, val_mAcc, val_aAcc, val_IoU, and val_pictures.

        Args:
            model: is put into evaluation mode and back. folder: where overlays go, as STEP_NAME.png.
        Raises:
            DataError: a sample that cannot be read, unless bad ones are to be skipped.
        """
        training, group = model.training, self.group
        matrix, done = ConfusionMatrix(self.dataset.n_cls, self.dataset.ignore_index), 0
        samples = self.dataset.samples[group.rank :: group.world]
        drawn = self._drawn()
        model.eval()
        try:
            found = outcomes(model, self.dataset, self.protocol, samples, boundary=False)
            for outcome in tqdm(found, "val", len(samples), leave=False, unit="picture", disable=not self.progress):
                if outcome.error is not None:
                    if self.bad_samples == "stop":
                        raise outcome.error
                    continue
                matrix.merge(outcome.counts.matrix)
                done += 1
                if outcome.sample in drawn:
                    folder.mkdir(exist_ok=True)
                    facts = (outcome.pixels, outcome.label, outcome.prediction)
                    panel = comparison(*facts, self.dataset.classes, self.dataset.ignore_index)
                    save_png(panel, folder / f"{step:07d}_{outcome.sample.name.replace('/', '_')}.png")
        finally:
            model.train(training)
        counts = group.sum_(torch.from_numpy(matrix.counts).to(group.device)).cpu().numpy()
        total = ConfusionMatrix(self.dataset.n_cls, self.dataset.ignore_index)
        total.add_counts(counts)
        scores = {f"val_{name}": np.asarray(value).tolist() for name, value in percent(total.scores()).items()}
        return {**scores, "val_pictures": int(group.sums([done])[0])}

    def _drawn(self) -> set:
        """Pictures spread evenly over the split."""
        n = min(self.n_overlays, len(self.dataset))
        return {self.dataset.samples[i * len(self.dataset) // n] for i in range(n)}
