"""Batches of training: which samples, in which order, by whom, and what becomes of bad ones."""

import numpy as np
import pytest
import torch

from segmenter.data import loader
from segmenter.data.augment import Augmentation
from segmenter.data.datasets import open_dataset
from segmenter.data.loader import Steps, TrainingSamples, load_batches
from tests.support.data_sets import make_data_set

N = 7


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(make_data_set(tmp_path_factory.mktemp("data"), n=N))


def samples_of(dataset, seed=0, **fields):
    return TrainingSamples(dataset, Augmentation(**{"crop_size": 16, "im_size": 24, **fields}), seed)


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.names == b.names


def test_every_sample_once_an_epoch_and_the_last_batch_is_filled_from_its_beginning():
    assert Steps.per_epoch(N, 3) == 3
    steps = list(Steps(N, 3, seed=0, begin=0, end=6))
    assert [len(step) for step in steps] == [3] * 6
    for epoch in range(2):
        keys = [key for step in steps[3 * epoch : 3 * epoch + 3] for key in step]
        assert {e for e, _, _ in keys} == {epoch}
        assert [lap for _, _, lap in keys] == [0] * N + [1] * (9 - N), "which are augmented once more"
        order = [index for _, index, _ in keys]
        assert sorted(order[:N]) == list(range(N))
        assert order[N:] == order[: 9 - N]
    first, second = ([i for step in steps[a : a + 3] for _, i, _ in step] for a in (0, 3))
    assert first != second and first[:N] != list(range(N)), "another order each epoch"
    assert list(Steps(N, 3, seed=1, begin=0, end=3)) != steps[:3]


def test_an_epoch_that_the_batch_divides_repeats_nothing():
    assert Steps.per_epoch(6, 3) == 2
    assert sorted(i for step in Steps(6, 3, 0, 0, 2) for _, i, _ in step) == list(range(6))


def test_a_batch_larger_than_the_data_set():
    ((step),) = Steps(2, 5, 0, 0, 1)
    order = [index for _, index, _ in step]
    assert [lap for _, _, lap in step] == [0, 0, 1, 1, 2]
    assert len(order) == 5 and order[:2] == order[2:4] and set(order) == {0, 1}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_each_batch(world):
    whole = list(Steps(N, 4, 3, 0, 5))
    parts = [list(Steps(N, 4, 3, 0, 5, rank, world)) for rank in range(world)]
    for i, step in enumerate(whole):
        assert all(len(part[i]) == 4 // world for part in parts)
        assert sorted(key for part in parts for key in part[i]) == sorted(step)


def test_a_batch_that_processes_cannot_share():
    with pytest.raises(ValueError, match="batch_size 4 must be a multiple of the 3 processes"):
        Steps(N, 4, 0, 0, 1, world=3)


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_start_in_the_middle_is_the_tail_of_all(start):
    tail = Steps(N, 3, 0, start, 6)
    assert list(tail) == list(Steps(N, 3, 0, 0, 6))[start:]
    assert len(tail) == 6 - start


def test_batches_are_the_augmented_samples(dataset):
    samples = samples_of(dataset)
    (batch,) = load_batches(samples, Steps(N, 3, 0, 1, 2))
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, 16, 16), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((3, 16, 16), torch.int64)
    assert batch.errors == []
    for i, (epoch, index, _) in enumerate(next(iter(Steps(N, 3, 0, 1, 2)))):
        sample = dataset.samples[index]
        rng = np.random.default_rng([0, epoch, index])
        image, labels = samples.augmentation(*dataset.read(sample), rng)
        assert batch.names[i] == sample.name
        assert torch.equal(batch.images[i], image) and torch.equal(batch.labels[i], labels)
    assert len(batch.labels.unique()) > 2 and batch.images.std() > 0.1


def test_a_sample_is_augmented_anew_each_epoch_and_for_each_seed(dataset):
    samples = samples_of(dataset)
    first = samples[0, 0, 0][0]
    assert torch.equal(first, samples[0, 0, 0][0])
    assert not torch.equal(first, samples[1, 0, 0][0])
    assert not torch.equal(first, samples[0, 0, 1][0])
    assert not torch.equal(first, samples_of(dataset, seed=1)[0, 0, 0][0])


def test_processes_that_read_change_nothing(dataset):
    batches = [list(load_batches(samples_of(dataset), Steps(N, 3, 0, 1, 4), workers)) for workers in (0, 2)]
    assert len(batches[0]) == 3
    assert all(same(a, b) for a, b in zip(*batches, strict=True))


def test_a_sample_that_cannot_be_read_counts_nowhere_and_says_why(tmp_path):
    dataset = open_dataset(make_data_set(tmp_path, n=2))
    bad = dataset.samples[1]
    bad.image.write_bytes(b"no image")
    image, labels, name, error = samples_of(dataset)[0, 1, 0]
    assert not image.any() and (labels == 255).all()
    assert name == bad.name and str(bad.image) in error
    (batch,) = load_batches(samples_of(dataset), Steps(2, 2, 0, 0, 1))
    assert len(batch.errors) == 1 and sorted(batch.names) == sorted(sample.name for sample in dataset.samples)
    assert (batch.labels[batch.names.index(bad.name)] == 255).all()
    assert (batch.labels[1 - batch.names.index(bad.name)] != 255).any()


@pytest.mark.more
def test_a_process_that_hangs_is_not_waited_for(dataset, monkeypatch):
    monkeypatch.setattr(loader, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr(TrainingSamples, "__getitem__", lambda self, key: __import__("time").sleep(60))
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(iter(load_batches(samples_of(dataset), Steps(N, 3, 0, 0, 1), workers=1)))
