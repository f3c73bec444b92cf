"""Bytes of images as operands of products: what pixels to tokens and the gradient of its weights share."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from segmenter.kernels import launch
from segmenter.kernels.reference import CENTRE


@triton.jit
def centred(x, dtype: tl.constexpr):
    """Bytes less 128, in units of 64, exactly; in half types one multiply-add for two of them.

    Not by the instructions that convert integers, which run at a quarter of the rate.
    """
    if dtype == tl.float32:  # the byte becomes the last bits of 2**23
        y = (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) * (1.0 / 64.0) - (131072.0 + 2.0)
    elif dtype == tl.float16:  # the last bits of 1024
        y = (x.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) * (1.0 / 64.0) - (16.0 + 2.0)
    else:  # all bits: b * 2**-133, half of them subnormal, which PTX's multiply-add of bfloat16 takes as what they are
        y = x.to(tl.int16).to(tl.bfloat16, bitcast=True) * 2.0**127 - 2.0
    return y


def readable(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The images themselves if the kernel reads them as they are, else an aligned copy, padded with 128s."""
    B, H, W, _ = pixels.shape
    height, width = H + -H % patch_size, W + -W % patch_size
    # The stride of one image counts nothing, whatever it is.
    offsets = (pixels.data_ptr(), pixels.stride(1), pixels.stride(0) if B > 1 else 0)
    if (height, width) == (H, W) and pixels.stride()[2:] == (3, 1) and all(n % 16 == 0 for n in offsets):
        return pixels
    return launch.call(_padded, pixels, height, width)


def _padded(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A copy (B, height, width, 3) whose rows begin at multiples of 16 bytes."""
    B, H, W, _ = pixels.shape
    row = 3 * width + -3 * width % 16
    copy = torch.empty(B, height, row, dtype=torch.uint8, device=pixels.device).fill_(CENTRE)
    copy = copy.as_strided((B, height, width, 3), (height * row, row, 3, 1))
    copy[:, :H, :W] = pixels
    return copy


def patches(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, N, 3 P^2) bytes in the order (row, column, channel), padded with 128s: for references."""
    (B, H, W, _), P = pixels.shape, patch_size
    x = F.pad(pixels, (0, 0, 0, -W % P, 0, -H % P), value=CENTRE)
    grid_h, grid_w = x.shape[1] // P, x.shape[2] // P
    return x.reshape(B, grid_h, P, grid_w, P, 3).transpose(2, 3).flatten(3).flatten(1, 2)
