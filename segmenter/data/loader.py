"""Batches for training whose contents follow from (seed, step) alone.

Which samples a step sees, and how each is augmented, depends on the seed, the epoch and the sample, and not on workers,
on processes, or on what ran before. So a run that is resumed at any step, on any number of processes, sees the same.
"""

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from segmenter.data.augment import Augmentation
from segmenter.data.datasets import DataError, Dataset

WORKER_TIMEOUT = 300  # seconds without a sample before a worker counts as hanging


class Batch(NamedTuple):
    """images (b, 3, S, S) float32, labels (b, S, S) int64, names of the samples, and what was wrong with some."""

    images: torch.Tensor
    labels: torch.Tensor
    names: list[str]
    errors: list[str]


class Steps:
    """For each step the keys (epoch, index, lap) of this process's share of the batch: a batch sampler.

    An epoch is a permutation of the samples; the last batch is filled up from its beginning, in another lap.

    Args:
        n_samples: in the data set. batch_size: of all processes together, a multiple of `world`.
        begin, end: the first step, from 0, and that after the last. rank, world: this process, and how many.
    """

    def __init__(self, n_samples: int, batch_size: int, seed: int, begin: int, end: int, rank: int = 0, world: int = 1):
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {world} processes that share it")
        self.n_samples, self.batch_size, self.seed = n_samples, batch_size, seed
        self.begin, self.end, self.rank, self.world = begin, end, rank, world

    @staticmethod
    def per_epoch(n_samples: int, batch_size: int) -> int:
        """Steps of an epoch."""
        return -(-n_samples // batch_size)

    def __len__(self) -> int:
        return self.end - self.begin

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        per_epoch = self.per_epoch(self.n_samples, self.batch_size)
        order, of_epoch = np.empty(0, int), -1
        for step in range(self.begin, self.end):
            epoch, i = divmod(step, per_epoch)
            if epoch != of_epoch:
                order, of_epoch = np.random.default_rng([self.seed, epoch]).permutation(self.n_samples), epoch
            places = range(i * self.batch_size, (i + 1) * self.batch_size)
            laps = (divmod(p, self.n_samples) for p in places[self.rank :: self.world])
            yield [(epoch, int(order[p]), lap) for lap, p in laps]


class TrainingSamples(torch.utils.data.Dataset):
    """Augmented samples by key (epoch, index, lap). One that cannot be read counts for nothing and says why."""

    def __init__(self, dataset: Dataset, augmentation: Augmentation, seed: int):
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, str, str | None]:
        epoch, index, lap = key
        sample = self.dataset.samples[index]
        try:
            pixels, labels = self.dataset.read(sample)
        except DataError as error:
            return *self.augmentation.nothing(), sample.name, str(error)
        rng = np.random.default_rng([self.seed, epoch, index, lap] if lap else [self.seed, epoch, index])
        return *self.augmentation(pixels, labels, rng), sample.name, None


def load_batches(samples: TrainingSamples, steps: Steps, workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """The batches of `steps`, read by `workers` processes (0: by this one).

    Raises, while iterating: RuntimeError, if a worker dies or gives nothing for five minutes.
    """
    return DataLoader(
        samples,
        batch_sampler=steps,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        timeout=WORKER_TIMEOUT if workers else 0,
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(worker: int) -> None:
    """Terminals, torchrun and batch systems signal all processes at once, but the step under way needs its samples.

    Ctrl-C is left to the process that trains; so is the first SIGTERM, and a second one ends a worker that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _collate(items: list[tuple[torch.Tensor, torch.Tensor, str, str | None]]) -> Batch:
    images, labels, names, errors = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.stack(labels), list(names), [e for e in errors if e is not None])
