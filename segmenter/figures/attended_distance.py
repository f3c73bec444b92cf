"""The figure of attended distance by depth, beside the receptive field of ResNet."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from segmenter.analysis.statistics import attention_statistics
from segmenter.evaluation.compare import MEANINGLESS
from segmenter.figures.attention_panels import even_distances
from segmenter.figures.page import GREY, RED, TEXT, TITLE, WIDTH, Figure, FigureError, new_figure
from segmenter.model import Segmenter

RESNETS = {  # name -> (bottlenecks in each stage, strides of the stages, dilations of the stages)
    "ResNet-50": ((3, 4, 6, 3), (1, 2, 2, 2), (1, 1, 1, 1)),
    "ResNet-101": ((3, 4, 23, 3), (1, 2, 2, 2), (1, 1, 1, 1)),
    "ResNet-152": ((3, 8, 36, 3), (1, 2, 2, 2), (1, 1, 1, 1)),
    "ResNet-101, stride 8": ((3, 4, 23, 3), (1, 2, 1, 1), (1, 1, 2, 4)),  # as DeepLab has it
}
STAGES = ("conv 1", "pool", "stage 1", "stage 2", "stage 3", "stage 4")
SOURCE = (
    "He et al., Deep Residual Learning for Image Recognition, 2016, table 1; the stride of a stage in its first 3x3 "
    "convolution, as in torchvision. Field and stride of layers on top of each other: Araujo et al., Computing "
    "Receptive Fields of Convolutional Neural Networks, Distill 2019. The effective field is a fraction of it: Luo et "
    "al., Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, 2016."
)
_DRAWN = {"ResNet-50": ("o", "-"), "ResNet-101": ("s", "-"), "ResNet-101, stride 8": ("^", "--")}


def receptive_fields(blocks: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """The theoretical receptive field of a ResNet of bottlenecks after each of STAGES: pixels from side to side.

    A 3x3 convolution widens the field by 2 x dilation x the stride of all before it; 1x1 ones do nothing.
    """
    fields, step = [7, 7 + 2 * 2], 4  # 7x7 by 2, then 3x3 by 2
    for n, stride, dilation in zip(blocks, strides, dilations, strict=True):
        fields.append(fields[-1] + 2 * dilation * step * (1 + (n - 1) * stride))
        step *= stride
    return fields


def distance_by_depth(
    model: Segmenter,
    images: Iterable[Any],
    *,
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
) -> Figure:
    """The mean attention distance of each head of the encoder by layer, over images, beside ResNet's receptive field.

    The distance is that between a patch and what it attends to, weighted by attention on patches, the mean over all
    patches of an image and then over images (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, figure 7). Of
    ResNet half the field is drawn, which is how far it sees to each side at most.

    Args:
        model: a `Segmenter` in evaluation mode. images: anything that `read_image` takes, one at a time.
        size: pixels that the short sides of the images are brought to first. dtype: compute type.
    Raises:
        FigureError: no images. AnalysisError, ImageError: as `attention_statistics`.
    """
    means, even, names = [], [], []
    for number, image in enumerate(images):
        found = attention_statistics(model, image, size=size, dtype=dtype)
        means.append(found.mean_distance.numpy())
        even.append(float(even_distances(found.grid).mean()) * found.patch_size)
        names.append(str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else f"image {number}")
    if not means:
        raise FigureError("there are no images to measure distances on")
    mean = np.mean(means, 0)  # (layers, heads)
    fields = {name: receptive_fields(*shape) for name, shape in RESNETS.items()}
    data = {
        "weights": model.info.weights,
        "unit": "pixels",
        "mean_distance": mean.tolist(),  # layers, heads
        "mean_distance_if_even": float(np.mean(even)),
        "images": [
            {"image": name, "mean_distance": values.tolist()} for name, values in zip(names, means, strict=True)
        ],
        "receptive_field": {"unit": "pixels from side to side", "stages": STAGES, "source": SOURCE, **fields},
    }
    warning = MEANINGLESS.get(model.info.weights)
    return Figure("distance-by-depth", _drawn(mean, float(np.mean(even)), len(means), fields, warning), data)


def _drawn(mean: np.ndarray, even: float, n_images: int, fields: dict[str, list[int]], warning: str | None) -> Any:
    """Two charts with one axis of pixels, in the logarithm: fields grow a hundred times from stem to end."""
    figure = new_figure()
    figure.set_size_inches(WIDTH, 3.9)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
    layers = np.arange(len(mean))
    beside = layers[:, None] + np.linspace(-0.25, 0.25, mean.shape[1] + 2)[1:-1]  # heads may be equally far
    left.scatter(beside.ravel(), mean.ravel(), s=18, color="#0072b2", edgecolor="white", linewidth=0.5, zorder=3)
    left.plot(layers, mean.mean(1), color="#0072b2", linewidth=1.2, zorder=2)
    left.axhline(even, color=GREY, linewidth=1, linestyle=":")
    left.text(layers[-1] + 0.25, even * 1.08, f"even attention: {even:.0f}", fontsize=TEXT, color=GREY, ha="right")
    of = f"mean of {n_images} images" if n_images > 1 else "one image"
    left.set_title(f"Segmenter, a dot a head ({of})", fontsize=TITLE)
    left.set_xlabel("layer of the encoder (line: mean of heads)", fontsize=TEXT)
    left.set_ylabel("mean attention distance (pixels)", fontsize=TEXT)
    left.set_xlim(-0.4, layers[-1] + 0.4)
    left.set_xticks(layers[:: max(1, len(layers) // 12)])
    for name, (marker, line) in _DRAWN.items():
        half = (np.array(fields[name]) - 1) / 2
        color = {"ResNet-50": "#d55e00", "ResNet-101": "#000000"}.get(name, "#009e73")
        right.plot(STAGES, half, marker=marker, linestyle=line, color=color, markersize=5, linewidth=1.2, label=name)
    right.set_title("ResNet: half its receptive field", fontsize=TITLE)
    right.set_xlabel("after", fontsize=TEXT)
    right.tick_params(axis="x", labelrotation=30)
    right.legend(fontsize=TEXT, frameon=False, loc="upper left", handlelength=1.6, borderaxespad=0.2)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.tick_params(labelsize=TEXT)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    ticks = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    left.set_yticks(ticks, [str(t) for t in ticks], minor=False)
    left.set_yticks([], minor=True)
    left.set_ylim(min(2.5, max(0.8 * mean.min(), 0.1)), max(1600, 1.3 * mean.max()))
    if warning:
        figure.suptitle(warning, fontsize=TITLE, color=RED)
    return figure
