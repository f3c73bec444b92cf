"""A model and an image, ready to be looked at: what is called with what, and where in its tokens the patches are."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from segmenter.analysis.attention_layers import AnalysisError, Seen, attention_layers, watched
from segmenter.classes import fitting_classes
from segmenter.decoder import DecoderLinear
from segmenter.inference.images import read_image
from segmenter.inference.precision import compute_dtype
from segmenter.model import Segmenter

PARTS = ("encoder", "decoder")
Point = tuple[float, float]  # x, y in pixels of the image given


@dataclasses.dataclass(frozen=True)
class Subject:
    """One part of a model, and one image.

    Attributes:
        model, part: the model, and "encoder" or "decoder".
        layers: of the part, all of them, from the first on.
        pixels: (H, W, 3) uint8 as the model sees it; None where a model of another kind was given its own input.
        grid: rows and columns of patches, those at the borders padded. patch_size: in pixels.
        size: (height, width) of that image. scale: its pixels for one of the image given, along each axis.
        run: computes the model once.
    """

    model: nn.Module
    part: str
    layers: list[nn.Module]
    pixels: np.ndarray | None
    size: tuple[int, int]
    grid: tuple[int, int]
    patch_size: int
    scale: tuple[float, float]
    run: Callable[[], Any]

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def watch(self, layers: Sequence[int], visit: Callable[[int, Seen, int], None]) -> None:
        """Runs the model and calls `visit(layer, seen, first)`, `first` being the token that is the first patch."""

        def checked(layer: int, seen: Seen) -> None:
            others = seen.q.shape[1] - self.n_patches
            if seen.q.shape[0] != 1 or others < 0:
                raise AnalysisError(
                    f"layer {layer} has {seen.q.shape[0]} x {seen.q.shape[1]} tokens, the image {self.grid[0]} x "
                    f"{self.grid[1]} patches; models that merge or leave out patches, or cut windows, have no such maps"
                )
            visit(layer, seen, others if self.part == "encoder" else 0)

        with watched({layer: self.layers[layer] for layer in layers}, checked):
            self.run()

    def chosen(self, layers: Sequence[int] | int | None) -> tuple[int, ...]:
        """Numbers of layers, each once, all if None. Raises AnalysisError if one does not exist; negative ones count
        from the end."""
        n = len(self.layers)
        try:
            wanted = list(range(n)) if layers is None else [operator.index(layer) for layer in _several(layers)]
        except TypeError:
            raise AnalysisError(f"layers must be whole numbers, got {layers!r}") from None
        if not wanted or any(not -n <= layer < n for layer in wanted):
            raise AnalysisError(f"layers {wanted} are out of range: the {self.part} has layers 0..{n - 1}")
        return tuple(dict.fromkeys(layer % n for layer in wanted))

    def patch_at(self, point: Point) -> tuple[int, int]:
        """(row, column) of the patch that has a pixel of the image given. Raises AnalysisError if none has."""
        ((x, y),) = pairs([point])
        height, width = (round(side / scale) for side, scale in zip(self.size, self.scale, strict=True))
        if not (0 <= x < width and 0 <= y < height):
            raise AnalysisError(f"point ({x:g}, {y:g}) is outside the image of {width} x {height} pixels")
        row, column = (int(at * scale) // self.patch_size for at, scale in zip((y, x), self.scale, strict=True))
        return min(row, self.grid[0] - 1), min(column, self.grid[1] - 1)  # the product may be rounded up to the border

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the model's class set; none where it names none that fits."""
        key = getattr(getattr(self.model, "info", None), "classes", None)
        found = fitting_classes(key, getattr(self.model, "n_cls", 0))
        return found.names if found is not None else ()

    def class_name(self, class_id: int) -> str:
        """Of a class by id: the id itself where it has no name."""
        names = self.class_names
        return names[class_id] if class_id < len(names) else str(class_id)

    def class_ids(self, classes: Sequence[int | str] | int | str | None) -> list[int]:
        """Ids of classes by id or name, of None none. Raises AnalysisError for one that the model does not have."""
        names, n_cls, found = [name.casefold() for name in self.class_names], getattr(self.model, "n_cls", 0), []
        for wanted in () if classes is None else _several(classes):
            text = str(operator.index(wanted) if hasattr(wanted, "__index__") else wanted).casefold()
            if text in names:
                found.append(names.index(text))
            elif text.isdecimal() and int(text) < n_cls:
                found.append(int(text))
            else:
                known = f", or one of {', '.join(self.class_names)}" if names else ""
                raise AnalysisError(f"class {wanted!r}: give an id in 0..{n_cls - 1}{known}")
        return found

    def labels(self) -> torch.Tensor:
        """(rows, columns) int64 on the CPU: the class of the largest mask of each patch."""
        if not isinstance(self.model, Segmenter):
            raise AnalysisError(f"{type(self.model).__name__} labels no patches; give points, or a Segmenter")
        return self.run()[0].argmax(0).cpu()


def subject(
    model: nn.Module,
    image: Any,
    part: str = "encoder",
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
) -> Subject:
    """A model and an image, checked.

    Args:
        model: a Segmenter in evaluation mode; or another vision transformer, for which `image` is its own input.
        image: anything `read_image` takes; for another model a float tensor (1, 3, H, W) or (3, H, W), normalised.
        part: "encoder" or "decoder". size: pixels that the short side is brought to; None: the image as it is.
        dtype: compute type, as of `segment_image`.
    Raises:
        AnalysisError: the model has no such part, or is in training mode. ImageError: the image cannot be read.
    """
    if part not in PARTS:
        raise AnalysisError(f"part={part!r} is unknown; choose encoder or decoder")
    if model.training:
        raise AnalysisError("the model is in training mode: dropout would make attention random; call model.eval()")
    inner = getattr(model, part, model if part == "encoder" else None)
    if inner is None:
        raise AnalysisError(f"{type(model).__name__} has no decoder; ask for its encoder")
    if isinstance(inner, DecoderLinear):
        raise AnalysisError("the linear decoder has no attention; ask for the encoder's")
    layers = attention_layers(inner)
    P = _patch_size(model)
    if isinstance(model, Segmenter):
        pixels = read_image(image)
        given = pixels.shape[:2]
        pixels = _resized(pixels, size)
        device = next(model.parameters()).device

        def run() -> torch.Tensor:
            with compute_dtype(model, dtype), torch.inference_mode():
                return model.masks_of_pixels(torch.from_numpy(pixels)[None].to(device))

        shape = pixels.shape[:2]
    else:
        x = _input_of(model, image, size)
        pixels, given, shape = None, tuple(x.shape[2:]), tuple(x.shape[2:])

        def run() -> Any:
            with compute_dtype(model, dtype), torch.inference_mode():
                return model(x)

    grid = tuple(-(-side // P) for side in shape)
    scale = tuple(new / old for new, old in zip(shape, given, strict=True))
    return Subject(model, part, layers, pixels, shape, grid, P, scale, run)


def pairs(points: Sequence[Point] | None) -> list[Point]:
    """Points, also those of an array or a tensor (n, 2); of None none. Raises AnalysisError for what is no pairs of
    numbers."""
    try:
        found = np.asarray(() if points is None else points, float)
        if found.size and (found.ndim != 2 or found.shape[1] != 2):
            raise ValueError
    except (TypeError, ValueError):
        raise AnalysisError(f"points must be pairs (x, y) in pixels such as [(40, 60)], got {points!r}") from None
    return list(map(tuple, found.tolist()))


def _several(values: Any) -> Any:
    """Values of a sequence, or one alone, which may be a text."""
    return values if np.iterable(values) and not isinstance(values, str) else [values]


def _patch_size(model: nn.Module) -> int:
    for module in (model, getattr(model, "patch_embed", None), *model.modules()):
        size = getattr(module, "patch_size", None)
        if isinstance(size, (tuple, list)) and len(set(size)) == 1:
            size = size[0]
        if isinstance(size, int):
            return size
    raise AnalysisError(f"{type(model).__name__} says nowhere what its patch_size is, or its patches are no squares")


def _input_of(model: nn.Module, image: Any, size: int | None) -> torch.Tensor:
    if not isinstance(image, torch.Tensor) or not image.is_floating_point() or image.ndim not in (3, 4):
        raise AnalysisError(
            f"{type(model).__name__} is no Segmenter: give its own input, a float tensor (1, 3, H, W), normalised; or, "
            "of a plain ViT, segmenter.load_any(model, n_cls=1, decoder='linear'), which takes any image"
        )
    if size is not None:
        raise AnalysisError("size is for images; resize the tensor")
    x = image[None] if image.ndim == 3 else image
    if x.shape[0] != 1:
        raise AnalysisError(f"one image at a time, got {x.shape[0]}")
    parameter = next(model.parameters())
    return x.to(parameter.device, parameter.dtype)


def _resized(pixels: np.ndarray, size: int | None) -> np.ndarray:
    height, width = pixels.shape[:2]
    if size is None or min(height, width) == size:
        return pixels
    if size < 1:
        raise AnalysisError(f"size must be at least 1, got {size}")
    factor = size / min(height, width)
    new = max(1, round(width * factor)), max(1, round(height * factor))
    return np.array(Image.fromarray(pixels).resize(new, Image.Resampling.BILINEAR))
