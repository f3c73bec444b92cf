"""Weights in eight bits: how a folder of ours holds a model in a quarter of float32's bytes.

Tensors with a first dimension of outputs (those of linear layers and of the patch embedding) are stored under their
names as int8, with a scale for each output, a row, under NAME.scale:

    scale = bfloat16(max |row| / 127),   q = round(row / scale),   weight = scale * q

Everything else is float16: biases, norms, what has a first dimension of 1, which are tokens and positions, and weights
that were asked to be kept. Worth keeping is a matrix behind a norm that lets one channel through far larger than the
others, which then multiplies rounding (Sun et al., "Massive Activations in Large Language Models", COLM 2024, find such
channels in vision transformers, too).

Why bfloat16: then nothing is ever rounded again. scale * q has at most 8 + 7 bits, so it is exact in float32. And
bfloat16 moves 127 steps by at most a quarter of one, so every row has a q of 127 or -127, which gives back its scale: a
model that was read is stored as the same bytes. float16 could do neither for rows below 0.008, which its normal numbers
end at, and float32 products would be rounded.
"""

from collections.abc import Mapping

import torch

from segmenter.weights.read import CheckpointError

SCALE = ".scale"
STEPS = 127  # on either side of zero
_SMALLEST = torch.finfo(torch.bfloat16).tiny  # rows of smaller scales, below 1.5e-36, are stored as zeros


def quantised(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored of a tensor on the CPU: int8 and scales (rows,) bfloat16, or nothing if it is no matrix.

    Raises:
        CheckpointError: it holds NaN or infinity, which int8 has not.
    """
    if tensor.ndim < 2 or tensor.shape[0] == 1:
        return {}
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} has NaN or infinite weights, which int8 cannot hold; store float32")
    rows = tensor.float().flatten(1)
    scale = (rows.abs().amax(1) / STEPS).bfloat16()
    scale[scale < _SMALLEST] = 0
    steps = torch.where(scale[:, None] > 0, rows / scale[:, None].float(), 0.0)
    return {name: steps.round().to(torch.int8).view(tensor.shape), name + SCALE: scale}


def restored(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `quantised` and float16 made of a state dict, with its names again: matrices are float32.

    Raises:
        CheckpointError: a scale is missing, belongs to nothing, or is none; the message names it.
    """
    matrices = {name: tensor for name, tensor in stored.items() if tensor.dtype == torch.int8}
    scales = {name + SCALE: stored.get(name + SCALE) for name in matrices}
    state = {name: tensor for name, tensor in stored.items() if name not in matrices and name not in scales}
    if stray := [name for name in state if name.endswith(SCALE)]:
        raise CheckpointError(f"{stray[0]} is a scale of no int8 weights")
    for name, matrix in matrices.items():
        scale, rows = scales[name + SCALE], matrix.shape[:1]
        if scale is None:
            raise CheckpointError(f"{name} is int8, but its scales, {name + SCALE}, are missing")
        if scale.dtype != torch.bfloat16 or scale.shape != rows:
            found = f"{tuple(scale.shape)} {scale.dtype}"
            raise CheckpointError(f"{name + SCALE} must be {tuple(rows)} torch.bfloat16, one a row, found {found}")
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise CheckpointError(f"{name + SCALE} has scales that are negative, infinite or no number")
        state[name] = matrix * scale.float().view(-1, *[1] * (matrix.ndim - 1))
    return {name: state[name] for name in stored if name in state}
