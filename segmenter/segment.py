"""Pictures to labels, for people: any picture in, labels at the picture's own size out."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from segmenter.images import normalize, read_image
from segmenter.inference import View, bands, predict_view, resize_to

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def segment_image(
    model: torch.nn.Module,
    image: Any,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window_size: int | None = None,
    window_stride: int | None = None,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    return_probabilities: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Labels of a picture.

    Args:
        model: a `Segmenter` in evaluation mode.
        image: a path, a PIL image, a uint8 array or a tensor; see `segmenter.images.read_image`.
        scales: sizes to run at, relative to the picture; probabilities are averaged over them.
        flip: also run mirrored left to right.
        window_size, window_stride: sliding windows in pixels; by default those of the checkpoint, a stride that is
            not given in the same proportion to window_size.
        batch_size: windows a forward call; by default 1 on a CPU, 8 elsewhere.
        dtype: compute type of the network: None for the model's own, "float32", "bfloat16", "float16", or "auto":
            half precision where the processor gains from it. Scores are merged in float32 always.
        return_probabilities: also return the probabilities, which are large: 4 * n_cls * H * W bytes.
    Returns:
        labels (H, W) on the CPU, uint8 (int16 above 256 classes, int32 above 32,768); with `return_probabilities`
        a pair (labels, probabilities (n_cls, H, W) float32).
    Raises:
        ImageError: the picture cannot be read. RuntimeError: training mode. ValueError: arguments that make no sense,
            a scale that makes the picture too large, or scores that are not finite.

    Memory: the (n_cls, H, W) scores are never held whole unless asked for. Beyond the weights and one batch of
    windows, the peak is about 20 bytes a pixel of the picture (as much again, 12 bytes each, for a copy at another
    scale and for a mirrored one), 4 * n_cls / P**2 bytes a pixel of all windows of all views (the masks), and a few
    bands of 8 MB (256 MB on a GPU).
    """
    if model.training:
        raise RuntimeError("the model is in training mode: dropout would make the labels random; call model.eval()")
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be positive and at least one, got {scales!r}")
    info = model.info
    device = next(model.parameters()).device
    if window_size is None:
        window_size = info.window_size
    if window_stride is None:
        window_stride = max(1, round(info.window_stride * window_size / info.window_size))
    if batch_size is None:
        batch_size = 1 if device.type == "cpu" else 8

    pixels = read_image(image)
    shape = pixels.shape[:2]
    im = normalize(pixels, info.normalization)[None].to(device)
    del pixels
    views: list[View] = []
    with compute_dtype(model, dtype):
        for scale in scales:
            scaled = _rescale(im, scale)
            for mirrored in (False, True) if flip else (False,):
                x = scaled.flip(3) if mirrored else scaled
                views.append(predict_view(model, x, mirrored, window_size, window_stride, batch_size))
    del im, scaled, x

    n_cls = views[0].masks.shape[-1]
    labels = torch.empty(shape, dtype=_label_dtype(n_cls))
    probabilities = torch.empty(n_cls, *shape) if return_probabilities else None
    with torch.inference_mode():
        for top, scores in bands(views, shape, return_probabilities):
            labels[top : top + len(scores)] = scores.argmax(-1)
            if probabilities is not None:
                probabilities[:, top : top + len(scores)] = scores.permute(2, 0, 1)
    return labels if probabilities is None else (labels, probabilities)


def compute_dtype(model: torch.nn.Module, dtype: str | torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast for the `dtype` argument of `segment_image`; nothing where the model already has that type.

    Raises:
        ValueError: an unknown name, or another type than that of a model that is not float32.
    """
    parameter = next(model.parameters())
    dtype = resolve_dtype(dtype, parameter.device, parameter.dtype)
    if dtype == parameter.dtype:
        return contextlib.nullcontext()
    if parameter.dtype != torch.float32:
        raise ValueError(
            f"the model holds {parameter.dtype} weights and cannot run in {dtype}; call model.float() first"
        )
    return torch.autocast(parameter.device.type, dtype=dtype)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, default: torch.dtype) -> torch.dtype:
    """The compute type that a `dtype` argument means on `device`.

    Raises:
        ValueError: an unknown name.
    """
    if dtype is None:
        return default
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":  # a model that was converted stays what it is
        return (_fastest_dtype(device) if default == torch.float32 else None) or default
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so absence counts as no
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _fastest_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bfloat16() else None


def _label_dtype(n_cls: int) -> torch.dtype:
    return torch.uint8 if n_cls <= 256 else torch.int16 if n_cls <= 32_768 else torch.int32


def _rescale(im: torch.Tensor, scale: float) -> torch.Tensor:
    """Bilinear, sides rounded half up, as the published multi-scale pipeline does."""
    h, w = (max(1, int(side * scale + 0.5)) for side in im.shape[-2:])
    return resize_to(im, (h, w), f"by the scale {scale}; use a smaller one")
