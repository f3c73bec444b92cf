"""Evaluation on a data set: the published test pipeline image by image, and integer counts that are summed.

What is kept of an image is how often each label met each prediction, and the same for boundaries. These are integers,
so scores come out the same in whatever order, and by however many processes, the images are done.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from segmenter.data.augment import resized
from segmenter.data.datasets import PUBLISHED, DataError, Dataset, Sample
from segmenter.evaluation.boundary import BoundaryCounts
from segmenter.evaluation.metrics import ConfusionMatrix
from segmenter.inference.images import normalize, read_image
from segmenter.inference.network_graphs import network_of
from segmenter.inference.precision import compute_dtype
from segmenter.inference.read_ahead import Call, ReadAhead, behind, usual_workers
from segmenter.inference.segment import (
    beside_graphs,
    enqueue,
    labels_of_views,
    largest_score,
    usual_batch_size,
    window_of,
)
from segmenter.inference.transfers import Download, upload
from segmenter.inference.windows import check_sizes, masks_of_images, window_anchors

OVERLAP = 32  # pixels; of the published evaluation's windows
MULTISCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the published scales; they go with flip=True


@dataclass(frozen=True)
class Protocol:
    """How an image is brought to the model.

    Attributes:
        im_size: the short side in pixels that the image is resized to, or None: its own size, nothing is resized.
        max_ratio: the long side gets at most max_ratio * im_size pixels; then the short side is below im_size.
        window_size, window_stride: sliding windows in pixels; None: see `of_model`.
        scales: sizes to average over, relative to im_size. flip: each also mirrored left to right.
        batch_size: windows a forward call; None: 1 on a CPU, else 8.
        dtype: compute type, as of `segment_image`; None: the model's own.
    Raises:
        ValueError: numbers that make no sense.
    """

    im_size: int | None = None
    max_ratio: float = 4.0
    window_size: int | None = None
    window_stride: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.im_size is not None and (self.im_size < 1 or self.max_ratio < 1):
            raise ValueError(f"need im_size and max_ratio of at least 1, got {self.im_size} and {self.max_ratio}")
        if not self.scales or not all(scale > 0 for scale in self.scales):
            raise ValueError(f"scales must be positive and at least one, got {self.scales!r}")

    def of_model(self, model: torch.nn.Module, key: str | None = None) -> "Protocol":
        """With windows and a batch size where they are not given.

        The window is the model's. On the data sets of PUBLISHED windows overlap by OVERLAP pixels, as in the published
        eval/miou.py, whatever stride the checkpoint's variant.yml names (which is that of evaluation during training);
        on others the stride is the model's, as of `segmenter.inference.segment.window_of`.

        Args:
            key: of the data set; None: with `im_size` the one that the model's classes are of, else none.
        Raises:
            ValueError: the windows leave pixels out, or the model cannot run in dtype.
        """
        window_size, window_stride = window_of(model, self.window_size, self.window_stride)
        key = model.info.classes if key is None and self.im_size is not None else key
        if self.window_stride is None and key in PUBLISHED and window_size > OVERLAP:
            window_stride = window_size - OVERLAP
        usual = usual_batch_size(next(model.parameters()).device)
        batch_size = usual if self.batch_size is None else self.batch_size
        check_sizes(window_size, batch_size)
        window_anchors(window_size, window_size, window_stride)
        compute_dtype(model, self.dtype)
        return replace(self, window_size=window_size, window_stride=window_stride, batch_size=batch_size)

    def resized(self, h: int, w: int, scale: float) -> tuple[int, int]:
        """Size of an image (h, w) at one of the scales: the largest with its proportions inside the two limits."""
        return resized((h, w), scale * self.im_size, scale * (self.max_ratio * self.im_size))


def predict_labels(
    model: torch.nn.Module, pixels: np.ndarray, protocol: Protocol, cuda_graphs: bool = True
) -> np.ndarray:
    """Labels of one image at its own size, by the published evaluation (mmsegmentation's MultiScaleFlipAug).

    The image is resized as bytes (bilinear, no antialiasing) to `protocol.resized`, normalised with the rounded
    statistics, mirrored if asked for, enlarged to the window if it is smaller, and cut into windows. Windows are
    averaged as logits at that size, resized to the image's, and several views averaged as probabilities.

    Resizing differs from OpenCV's, with which the published figures were made, by at most one grey level: ours rounds
    once, from floats. Without `im_size` the result is that of `model.segment`, which normalises with exact statistics;
    the difference lies below 0.02 grey levels.

    Args:
        model: a `Segmenter` in evaluation mode. pixels: (H, W, 3) uint8 RGB. cuda_graphs: as of `segment_image`.
    Returns:
        (H, W) uint8 (int16 above 256 classes, int32 above 32,768), on the CPU.
    Raises:
        RuntimeError: training mode. ValueError: an image that would grow too large, or scores that are not finite.
    """
    return enqueue_labels(model, pixels, protocol, cuda_graphs).fetch()[0].numpy()


def enqueue_labels(model: torch.nn.Module, pixels: np.ndarray, protocol: Protocol, cuda_graphs: bool) -> Download:
    """`predict_labels` that does not wait for the device: what it returns has the labels (1, H, W) to `fetch`."""
    protocol = protocol.of_model(model)
    sizes = protocol.window_size, protocol.window_stride, protocol.batch_size
    if protocol.im_size is None:
        image = torch.from_numpy(read_image(pixels))[None]
        return enqueue(model, image, protocol.scales, protocol.flip, *sizes, protocol.dtype, cuda_graphs)
    if model.training:
        raise RuntimeError("the model is in training mode: dropout would make the labels random; call model.eval()")
    shape, device = pixels.shape[:2], next(model.parameters()).device

    def run() -> Download:
        with compute_dtype(model, protocol.dtype), torch.inference_mode():
            views, network = [], network_of(model, cuda_graphs)
            for scale in protocol.scales:
                im = normalize(_resize_bytes(pixels, protocol.resized(*shape, scale)), model.info.normalization, True)
                for mirrored in (False, True) if protocol.flip else (False,):
                    images = upload((im.flip(2) if mirrored else im)[None], device)
                    views.append((*masks_of_images(model, images, *sizes, network), mirrored))
            return Download(labels_of_views(model, views, shape), largest_score(views))

    return beside_graphs(model, run)


def _resize_bytes(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of bytes (H, W, 3), rounded to bytes; on the CPU, so that every device gets the same ones."""
    if shape == pixels.shape[:2]:
        return pixels
    im = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    im = F.interpolate(im, shape, mode="bilinear", align_corners=False)  # of bytes its result depends on the processor
    return im.add_(0.5).byte()[0].permute(1, 2, 0).numpy()


class Counts:
    """What is summed over images: the confusion matrix, and the boundary counts if `boundary`."""

    def __init__(self, n_cls: int, ignore_index: int = 255, boundary: bool = True):
        self.images = 0
        self.matrix = ConfusionMatrix(n_cls, ignore_index)
        self.boundary = BoundaryCounts(n_cls, ignore_index) if boundary else None

    def update(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Adds one image: two (H, W) integer arrays."""
        self.images += 1
        for part in self._parts.values():
            part.update(prediction, label)

    def merge(self, other: "Counts") -> None:
        """Adds the counts of other images."""
        self.images += other.images
        for part, theirs in zip(self._parts.values(), other._parts.values(), strict=True):
            part.merge(theirs)

    def scores(self) -> dict[str, Any]:
        """As fractions: `ConfusionMatrix.scores`, `BoundaryCounts.scores`, and "images", their number."""
        return {name: value for part in self._parts.values() for name, value in part.scores().items()} | {
            "pictures": self.images
        }

    def to_json(self) -> dict[str, Any]:
        """The counts other than zero, as [places, values] of each part."""
        parts = {}
        for name, part in self._parts.items():
            flat = part.counts.ravel()
            places = np.flatnonzero(flat)
            parts[name] = [places.tolist(), flat[places].tolist()]
        return {"pictures": self.images, **parts}

    def add_json(self, data: dict[str, Any]) -> None:
        """Adds what `to_json` of counts with the same arguments gave.

        Raises:
            ValueError, KeyError, TypeError, IndexError: it is something else.
        """
        self.images += data["pictures"]
        for name, part in self._parts.items():
            counts = np.zeros(part.counts.shape, np.int64)
            places, values = data[name]
            counts.ravel()[places] = values
            part.add_counts(counts)

    @property
    def _parts(self) -> dict[str, Any]:
        return {"confusion": self.matrix} | ({} if self.boundary is None else {"boundary": self.boundary})


@dataclass(frozen=True)
class Outcome:
    """What became of one sample: either `error`, or all the others.

    Attributes:
        pixels: (H, W, 3) uint8. label, prediction: (H, W). counts: of this image alone.
    """

    sample: Sample
    pixels: np.ndarray | None = None
    label: np.ndarray | None = None
    prediction: np.ndarray | None = None
    counts: Counts | None = None
    error: DataError | None = None


def evaluate(
    model: torch.nn.Module,
    dataset: Dataset,
    protocol: Protocol | None = None,
    *,
    boundary: bool = True,
    workers: int | None = None,
    cuda_graphs: bool = True,
    progress: bool | None = False,
) -> dict[str, Any]:
    """Scores of a model on a data set; nothing but the sums is kept in memory.

    Args:
        model: a `Segmenter` in evaluation mode, with the data set's number of classes.
        protocol: by default, single scale at the images' own size, with the windows of `Protocol.of_model`.
        boundary: also the boundary scores. workers: threads that read and count; by default one a processor, at most 4.
        cuda_graphs: as of `segment_image`.
        progress: a progress bar on stderr; None: if that is a terminal.
    Returns:
        fractions: "aAcc", "mAcc", "mIoU"; "Acc", "IoU" (n_cls,); with `boundary` those of `BoundaryCounts.scores`;
        and "images", their number.
    Raises:
        DataError: a sample that cannot be used. ValueError: numbers of classes that differ, or see `predict_labels`.
        RuntimeError: training mode.
    """
    total = Counts(dataset.n_cls, dataset.ignore_index, boundary)
    stream = outcomes(
        model, dataset, protocol or Protocol(), boundary=boundary, workers=workers, cuda_graphs=cuda_graphs
    )
    bar = tqdm(total=len(dataset), unit="image", disable=None if progress is None else not progress)
    with contextlib.closing(stream), bar:
        for outcome in stream:
            if outcome.error is not None:
                raise outcome.error
            total.merge(outcome.counts)
            bar.set_postfix_str(f"mIoU {100 * total.matrix.scores()['mIoU']:.2f}", refresh=False)
            bar.update()
    return total.scores()


def outcomes(
    model: torch.nn.Module,
    dataset: Dataset,
    protocol: Protocol,
    samples: Iterable[Sample] | None = None,
    *,
    boundary: bool = True,
    workers: int | None = None,
    cuda_graphs: bool = True,
    also: Callable[[Outcome], Any] = lambda outcome: None,
) -> Iterator[Outcome]:
    """What became of each sample, in order; by default of all. Arguments as of `evaluate`; `also` is called by a thread
    with each outcome that is no error, before it is given out.

    While the model runs, threads read the samples that come next, wait for the labels of those before, and count;
    2 * workers images wait to be run and `workers` to be given out. Close the generator, or exhaust it, to end the
    threads.
    """
    if model.n_cls != dataset.n_cls:
        raise ValueError(f"the model has {model.n_cls} classes and the data set {dataset.key} {dataset.n_cls}")
    protocol = protocol.of_model(model, dataset.key)
    workers = usual_workers() if workers is None else workers
    samples = dataset.samples if samples is None else samples
    return _outcomes(model, dataset, protocol, samples, boundary, workers, cuda_graphs, also)


def _outcomes(
    model: torch.nn.Module,
    dataset: Dataset,
    protocol: Protocol,
    samples: Iterable[Sample],
    boundary: bool,
    workers: int,
    cuda_graphs: bool,
    also: Callable[[Outcome], Any],
) -> Iterator[Outcome]:
    def complete(begun: tuple[Outcome, Download]) -> Outcome:
        outcome, labels = begun
        with _named(outcome.sample):
            prediction = labels.fetch()[0].numpy()
        counts = Counts(dataset.n_cls, dataset.ignore_index, boundary)
        counts.update(prediction, outcome.label)
        outcome = replace(outcome, prediction=prediction, counts=counts)
        also(outcome)
        return outcome

    def run(reading: Call) -> Call | Outcome:
        sample = reading.source
        try:
            pixels, label = threads.result(reading)
        except DataError as error:
            return Outcome(sample, error=error)
        with _named(sample):
            labels = enqueue_labels(model, pixels, protocol, cuda_graphs)
        return threads.put(Call(complete, (Outcome(sample, pixels, label), labels)))

    with contextlib.closing(ReadAhead(workers)) as threads:
        reading = behind((threads.put(Call(dataset.read, sample)) for sample in samples), 2 * workers)
        for begun in behind(map(run, reading), workers):
            yield threads.result(begun) if isinstance(begun, Call) else begun


@contextlib.contextmanager
def _named(sample: Sample) -> Iterator[None]:
    """Errors of the scores or sizes of an image name it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{sample.image}: {error}") from error
