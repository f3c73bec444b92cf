"""What all queries of an image attend to, in numbers: entropy, centre, distances, and what falls on no patch."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

from segmenter.analysis.attention_layers import Seen
from segmenter.analysis.subject import subject
from segmenter.kernels.reference_maps import STATISTICS


@dataclasses.dataclass(frozen=True)
class AttentionStatistics:
    """Of every query token, in one image. All tensors are (layers, heads, N) unless said, float32 on the CPU.

    Tokens are in the order of the model: in the encoder `first` others (class token, registers) and then the patches,
    row by row; in the decoder the patches and then a token a class. Means over patches are of the attention on patches
    alone, divided by its sum: `distance * (1 - extra)` leaves that division out.

    Attributes:
        entropy: of a query's attention to all tokens, in nats; log N if it is even, 0 if it is to one token.
        extra: the share on tokens that are no patches.
        centre: (layers, heads, N, 2), row and column of the centre of attention, in patches, 0 being the middle of the
            first one.
        distance: mean Euclidean distance from the query's own patch, in patches. squared_distance: mean of its square.
            Both are NaN for tokens that are no patches.
        part, layers: as in `AttentionMaps`. grid: rows and columns of patches. first: the token that is the first
            patch. patch_size: pixels.
    """

    entropy: torch.Tensor
    extra: torch.Tensor
    centre: torch.Tensor
    distance: torch.Tensor
    squared_distance: torch.Tensor
    part: str
    layers: tuple[int, ...]
    grid: tuple[int, int]
    first: int
    patch_size: int

    def of_patches(self, values: torch.Tensor) -> torch.Tensor:
        """One of the tensors (layers, heads, N) at the patches: (layers, heads, rows, columns)."""
        return values[..., self.first : self.first + math.prod(self.grid)].unflatten(-1, self.grid)

    @property
    def mean_distance(self) -> torch.Tensor:
        """(layers, heads): the mean over all patches of the distance, in pixels (Dosovitskiy et al., "An Image is Worth
        16x16 Words", 2021, figure 7, for one image)."""
        return self.of_patches(self.distance).mean((-2, -1)) * self.patch_size


def attention_statistics(
    model: nn.Module,
    image: Any,
    *,
    layers: Sequence[int] | int | None = None,
    part: str = "encoder",
    size: int | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Callable[[int], Any] | None = None,
) -> AttentionStatistics:
    """Numbers of the attention of every token of a whole image, of any size; memory grows with the number of tokens,
    not with its square.

    Args: as of `segmenter.analysis.maps.attention`.
    Returns:
        `AttentionStatistics`.
    Raises:
        AnalysisError, ImageError: as `attention`.
    """
    of = subject(model, image, part, size, dtype)
    numbers = of.chosen(layers)
    found: dict[int, torch.Tensor] = {}
    first = 0

    def visit(layer: int, seen: Seen, first_patch: int) -> None:
        nonlocal first
        first = first_patch
        found[layer] = seen.ops.attention_statistics(seen.q, seen.k, of.grid, first, seen.scale)[:, 0].float().cpu()
        if progress is not None:
            progress(layer)

    with torch.inference_mode():
        of.watch(numbers, visit)
    by_name = dict(zip(STATISTICS, torch.stack([found[layer] for layer in numbers], 1), strict=True))
    for name in ("distance", "squared_distance"):
        by_name[name] = by_name[name].clone()
        by_name[name][..., :first] = by_name[name][..., first + of.n_patches :] = math.nan
    centre = torch.stack([by_name.pop("y"), by_name.pop("x")], -1)
    return AttentionStatistics(
        **by_name, centre=centre, part=part, layers=numbers, grid=of.grid, first=first, patch_size=of.patch_size
    )
