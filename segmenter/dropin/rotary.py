"""Rotary positions that a model hands to its blocks with every call: in which form, and how they turn queries and keys.

    joined: one tensor (..., n, 2 d), sines and then cosines      timm
    paired: a tuple of two (..., n, d), cosines and then sines    transformers

Neither names nor classes tell which it is, nor which columns are pairs: `segmenter.dropin.verify` tries it out.
"""

from typing import Any, NamedTuple

import torch

from segmenter.guard import PLAIN_TENSORS, is_fake
from segmenter.kernels.configs import FLOATS
from segmenter.layers import Rotation

FORMS = ((True, True), (False, False), (False, True), (True, False))  # (joined, sines first), the usual ones first


class Rotary(NamedTuple):
    """What a block does with the rotary positions that it is called with.

    Attributes:
        argument: what they are called, by the block and by its attention layer.
        joined: one tensor, else a pair of them. sines_first: before the cosines. interleaved: as in `Rotation`.
        heads, columns: how many, of each. extra: tokens in front that are not turned, where the layer says how many;
            None: as many as there are more than rows in the tables.
        by_head: tables (..., n, d) for each image and head are taken as well. needed: it cannot be called without.
    """

    argument: str
    joined: bool
    sines_first: bool
    interleaved: bool
    heads: int
    columns: int
    extra: int | None = None
    by_head: bool = False
    needed: bool = False

    def value(self, rotation: Rotation) -> Any:
        """The argument to call the block with."""
        tables = rotation[1::-1] if self.sines_first else rotation[:2]
        return torch.cat(tables, -1) if self.joined else tuple(tables)

    def read(self, value: Any, x: torch.Tensor) -> Rotation | str | None:
        """What an argument says about tokens x (B, N, d_model): None if nothing; or why it is not for the kernels."""
        if value is None:
            return f"no {self.argument}" if self.needed else None
        parts = self._tables(value)
        if parts is None or any(type(t) not in PLAIN_TENSORS and not is_fake(t) for t in parts):
            return f"{self.argument} of another kind than tables of sines and cosines"
        cos, sin = parts
        if cos.dtype not in FLOATS or sin.dtype not in FLOATS or not cos.device == sin.device == x.device:
            return f"{self.argument} of another type or on another device"
        if cos.ndim == 3:
            cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        shape, tokens = cos.shape, x.shape[1]
        fits = shape == sin.shape and shape[-1] == self.columns and shape[-2] <= tokens
        if len(shape) == 4:
            fits = fits and self.by_head and shape[0] in (1, x.shape[0]) and shape[1] in (1, self.heads)
        if not fits or len(shape) not in (2, 4) or (self.extra is not None and tokens - shape[-2] != self.extra):
            return f"{self.argument} of {tuple(shape)} for {tokens} tokens"
        return Rotation(cos, sin, self.interleaved)

    def _tables(self, value: Any) -> tuple[Any, Any] | None:
        """(cosines, sines) of an argument."""
        if self.joined:
            if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[-1] % 2:
                return None
            first, second = value.chunk(2, -1)
        else:
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                return None
            first, second = value
            if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)) or first.ndim < 2:
                return None
        return (second, first) if self.sines_first else (first, second)
