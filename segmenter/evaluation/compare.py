"""Models beside each other on one image: labels, scores and time of each, and where they differ most.

The paper and its poster (Strudel et al., ICCV 2021) do this for patch sizes 32, 16 and 8: the smaller the patch, the
sharper the boundaries. `segmenter.evaluation.comparison_figure` draws what is found here.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from segmenter.data.label_files import ignore_index
from segmenter.evaluation.boundary import DILATION_RATIO
from segmenter.evaluation.evaluate import Counts, Protocol, predict_labels
from segmenter.evaluation.metrics import percent
from segmenter.inference.precision import resolve_dtype
from segmenter.inference.windows import resized_shape, windows_of

MEANINGLESS = {  # `ModelInfo.weights` -> what to say of the labels
    "random": "random weights: labels mean nothing",
    "encoder": "random decoder: labels mean nothing",
}
SCORES = ("bF", "bIoU", "mIoU", "aAcc")


@dataclass(frozen=True)
class Compared:
    """One model on the image.

    Attributes:
        name: what it is called. patch_size: pixels. parameters: how many.
        windows, tokens: how many an image is cut into, and the patches of all of them; class tokens are not counted.
        dtype: compute type, such as "float32". weights: of `ModelInfo`. warning: of MEANINGLESS, or None.
        milliseconds: of each timed run, from bytes to labels in the host's memory.
        labels: (H, W). scores: SCORES of this image alone, in percent with two decimals; None where 0/0; empty
            without truth.
    """

    name: str
    patch_size: int
    parameters: int
    impl: str
    window_size: int
    window_stride: int
    windows: int
    tokens: int
    dtype: str
    weights: str
    warning: str | None
    milliseconds: tuple[float, ...]
    labels: np.ndarray
    scores: dict[str, float | None]

    @property
    def median(self) -> float:
        """Milliseconds, the median of the timed runs."""
        return float(np.median(self.milliseconds))


def compare(
    name: str,
    model: torch.nn.Module,
    pixels: np.ndarray,
    truth: np.ndarray | None = None,
    protocol: Protocol | None = None,
    repeats: int = 5,
) -> Compared:
    """Runs a model on an image to warm up, until graphs are captured, and `repeats` times by the clock.

    Args:
        model: a `Segmenter` in evaluation mode. pixels: (H, W, 3) uint8 RGB.
        truth: labels (H, W), those of `ignore_index(n_cls)` do not count; None: nothing to compare with.
        protocol: windows and compute type; by default the model's.
    Raises:
        RuntimeError: training mode. ValueError: see `predict_labels`, or a truth of another size.
    """
    protocol = (protocol or Protocol()).of_model(model)
    for _ in range(2 if next(model.parameters()).is_cuda else 1):
        labels = predict_labels(model, pixels, protocol)
    milliseconds = []
    for _ in range(repeats):  # labels come back to the host, so each run has ended when the clock is read, on a GPU too
        began = time.perf_counter()
        predict_labels(model, pixels, protocol)
        milliseconds.append(1000 * (time.perf_counter() - began))
    parameter = next(model.parameters())
    shape = resized_shape(*pixels.shape[:2], protocol.window_size)
    cut = windows_of(shape, protocol.window_size, protocol.window_stride, model.patch_size)
    return Compared(
        name=name,
        patch_size=model.patch_size,
        parameters=sum(p.numel() for p in model.parameters()),
        impl=model.impl,
        window_size=protocol.window_size,
        window_stride=protocol.window_stride,
        windows=cut.count,
        tokens=cut.tokens(model.patch_size),
        dtype=str(resolve_dtype(protocol.dtype, parameter.device, parameter.dtype)).removeprefix("torch."),
        weights=model.info.weights,
        warning=MEANINGLESS.get(model.info.weights),
        milliseconds=tuple(milliseconds),
        labels=labels,
        scores={} if truth is None else image_scores(labels, truth, model.n_cls),
    )


def image_scores(labels: np.ndarray, truth: np.ndarray, n_cls: int) -> dict[str, float | None]:
    """SCORES of one image, labels and truth (H, W), in percent with two decimals; None where 0/0."""
    counts = Counts(n_cls, ignore_index(n_cls))
    counts.update(labels, truth)
    scores = percent(counts.scores())
    return {name: None if math.isnan(scores[name]) else float(scores[name]) for name in SCORES}


def telling_part(
    predictions: Sequence[np.ndarray], truth: np.ndarray | None, ignored: int, size: tuple[int, int]
) -> tuple[int, int]:
    """Where the predictions differ most along boundaries; a single one is compared with the truth.

    Counted are the pixels near a border of the truth (or, without one, of the last prediction) where the maps are not
    all the same. Near is the width of boundary IoU's region. If they are the same everywhere, all pixels near a border.

    Args:
        predictions: (H, W) each. truth: (H, W) or None. ignored: the label of its pixels that do not count.
        size: (h, w) of the part, at most (H, W).
    Returns:
        (top, left) of the part with the most such pixels, the first if there are several.
    """
    reference = predictions[-1] if truth is None else truth
    counted = np.ones(reference.shape, bool) if truth is None else truth != ignored
    maps = [*predictions, *([truth] if truth is not None and len(predictions) == 1 else [])]
    differ = np.any([labels != maps[0] for labels in maps], axis=0)
    radius = max(1, round(DILATION_RATIO * math.hypot(*reference.shape)))
    edges = np.pad(border_pixels(reference, counted), radius)
    near = (_box_sums(edges, 2 * radius + 1, 2 * radius + 1) > 0) & counted
    sums = _box_sums(near & differ if (near & differ).any() else near, *size)
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(top), int(left)


def border_pixels(labels: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose left or upper neighbour has another label, if both are `counted` (H, W)."""
    edges = np.zeros(labels.shape, bool)
    edges[:, 1:] |= (labels[:, 1:] != labels[:, :-1]) & counted[:, 1:] & counted[:, :-1]
    edges[1:] |= (labels[1:] != labels[:-1]) & counted[1:] & counted[:-1]
    return edges


def _box_sums(mask: np.ndarray, h: int, w: int) -> np.ndarray:
    """How many are True in each h x w box: (H, W) -> (H - h + 1, W - w + 1)."""
    sums = np.pad(mask, ((1, 0), (1, 0))).astype(np.int64).cumsum(0).cumsum(1)
    return sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]


def as_json(model: Compared) -> dict[str, Any]:
    """All but the labels, and the median time, for a JSON file."""
    data = {name: value for name, value in vars(model).items() if name not in ("labels", "milliseconds", "scores")}
    each = [round(value, 3) for value in model.milliseconds]
    return data | model.scores | {"milliseconds": round(model.median, 3), "milliseconds_each": each}
