"""The mask head's arguments, checked: what it and its gradient share on the host's side."""

import torch
import triton

from segmenter.kernels import launch

MAX_CLASSES = 256  # whose cosines one program keeps in registers


def class_padding(n_classes: int) -> int:
    """Columns of the tile of cosines: a power of two from 16, the least tl.dot takes, to MAX_CLASSES."""
    return min(MAX_CLASSES, max(16, triton.next_power_of_2(n_classes)))


def check_shapes(patches, classes, proj_patch, proj_classes, *norm: torch.Tensor | None) -> tuple[int, int, int, int]:
    """(B, N, K, d). Raises ValueError unless the shapes go together and there is a class.

    Args:
        norm: weight and, if that is an argument, bias of the LayerNorm.
    """
    if (
        patches.ndim != 3
        or classes.ndim != 3
        or patches.shape[::2] != classes.shape[::2]
        or proj_patch.shape != patches.shape[2:] * 2
        or proj_classes.shape != patches.shape[2:] * 2
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (patches, classes, proj_patch, proj_classes))
        raise ValueError(
            f"patches must be (B, N, d), classes (B, K, d), proj_patch and proj_classes (d, d), got {shapes}"
        )
    (B, N, d), K = patches.shape, classes.shape[1]
    if K == 0:
        raise ValueError(f"there are no classes: classes is {tuple(classes.shape)}")
    for name, tensor in zip(("norm_weight", "norm_bias"), norm, strict=False):
        if tensor is not None and tensor.shape != (K,):
            raise ValueError(f"{name} must be ({K},), one value a class, got {tuple(tensor.shape)}")
    return B, N, K, d


def check(patches, classes, proj_patch, proj_classes, *norm: torch.Tensor | None) -> tuple[int, int, int, int]:
    """As `check_shapes`; besides raises KernelError unless the kernels take these types, width and device."""
    launch.check_device(patches, classes, proj_patch, proj_classes, *norm)
    launch.check_floats("patches", patches)
    for name, tensor in (("classes", classes), ("proj_patch", proj_patch), ("proj_classes", proj_classes)):
        launch.check_floats(name, tensor, (patches.dtype,))
    for name, tensor in zip(("norm_weight", "norm_bias"), norm, strict=False):
        if tensor is not None:
            launch.check_floats(name, tensor)
    B, N, K, d = check_shapes(patches, classes, proj_patch, proj_classes, *norm)
    if d % 16:
        raise launch.KernelError(f'the width must be a multiple of 16, got {d}; use impl="eager"')
    return B, N, K, d
