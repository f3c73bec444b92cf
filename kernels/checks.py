"""Rows as kernels take them, and what LayerNorm and linear layers ask of their arguments, forward and backward."""

import functools
import math

import torch

from segmenter.kernels import launch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., N) as (M, N) with a dense last dimension: a view if the rows lie at one distance, else a copy.

    Raises:
        KernelError: 2**31 rows or more, whose numbers do not fit.
    """
    n_rows = math.prod(x.shape[:-1])
    if n_rows >= 2**31:
        raise launch.KernelError(f"{n_rows} rows are more than 2**31 - 1; split the batch")
    x = launch.rows_contiguous(x)
    try:
        return x.view(n_rows, x.shape[-1])
    except RuntimeError:  # rows at several distances
        return launch.contiguous(x).view(n_rows, x.shape[-1])


def check_affine(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    """Raises ValueError unless x has a last dimension and weight and bias, where given, are of its size."""
    if x.ndim == 0:
        raise ValueError("x has no dimension to normalise over")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"LayerNorm's {name} must be ({x.shape[-1]},), got {tuple(tensor.shape)}")


def check_linear(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises ValueError unless x (..., d_in), weight (d_out, d_in) and bias (d_out,) or None fit together."""
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[1] == 0:
        raise ValueError(f"{name} must be (d_out, d_in), x (..., d_in), got {tuple(weight.shape)}, {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}'s bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_layer_scale(layer_scale: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Raises ValueError unless layer_scale is None or has a factor for each row of weight (d_out, d_in)."""
    if layer_scale is not None and layer_scale.shape != weight.shape[:1]:
        raise ValueError(f"layer_scale must be ({weight.shape[0]},), got {tuple(layer_scale.shape)}")


def check_types(weight: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises KernelError unless all are of supported types; those named x or bias must have weight's."""
    launch.check_floats("weight", weight)
    for name, tensor in others.items():
        if tensor is not None:
            launch.check_floats(name, tensor, (weight.dtype,) if name in ("x", "bias") else launch.FLOATS)


def result_type(*tensors: torch.Tensor | None) -> torch.dtype:
    """The type of a sum of these: the widest. None is skipped."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


def check_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
) -> None:
    """Raises KernelError or ValueError unless these are arguments of an MLP half of a block."""
    launch.check_floats("x", x)
    check_types(fc1_weight, bias=fc1_bias, norm_weight=norm_weight, norm_bias=norm_bias)
    launch.check_floats("fc2_weight", fc2_weight, (fc1_weight.dtype,))
    check_affine(x, norm_weight, norm_bias)
    check_linear("fc1_weight", x, fc1_weight, fc1_bias)
    if fc2_weight.shape != fc1_weight.shape[::-1]:
        raise ValueError(f"fc2_weight must be {tuple(fc1_weight.shape[::-1])}, got {tuple(fc2_weight.shape)}")
