"""Images to labels, for people: any image in, labels at the image's own size out.

A model of another kind than `Segmenter` runs here, and wherever this module is used (streams, `predict`), if it has
`labels_of_pixels` and `refuse`; `segmenter.eomt.model.Eomt` says what they are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from segmenter.config import NORMALIZATION
from segmenter.inference import pruned_argmax
from segmenter.inference.images import read_image
from segmenter.inference.merge import View, fill_labels, row_blocks
from segmenter.inference.network_graphs import network_of, release
from segmenter.inference.precision import compute_dtype
from segmenter.inference.transfers import Download, upload
from segmenter.inference.windows import (
    Windows,
    check_finite,
    check_sizes,
    masks_of,
    masks_of_images,
    predict_masks,
    resize_to,
    resized_shape,
    windows_of,
)
from segmenter.kernels.reference import label_dtype, normalized
from segmenter.kernels.upsample_tiles import windows_fit
from segmenter.ops import EAGER, Automatic

T = TypeVar("T")


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
    cuda_graphs: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Labels of an image.

    Args:
        model: a `Segmenter` in evaluation mode.
        image: a path, a PIL image, a uint8 array or a tensor; see `segmenter.inference.images.read_image`.
        scales: sizes to run at, relative to the image; probabilities are averaged over them.
        flip: also run mirrored left to right.
        window_size, window_stride: sliding windows in pixels; by default those of the checkpoint, a stride that is
            not given in the same proportion to window_size.
        batch_size: windows a forward call; by default 1 on a CPU, 8 elsewhere.
        dtype: compute type of the network: None for the model's own, "float32", "bfloat16", "float16", or "auto":
            half precision where the processor gains from it. Scores are merged in float32 always.
        return_probabilities: also return the probabilities, which are large: 4 * n_cls * H * W bytes.
        cuda_graphs: on a CUDA device, run batches of windows of a shape that comes again as a CUDA graph
            (`segmenter.inference.network_graphs`); the labels are the same. False: never.
    Returns:
        labels (H, W) on the CPU, uint8 (int16 above 256 classes, int32 above 32,768); with `return_probabilities`
        a pair (labels, probabilities (n_cls, H, W) float32).
    Raises:
        ImageError: the image cannot be read. RuntimeError: training mode. ValueError: arguments that make no sense,
            a scale that makes the image too large, or scores that are not finite.

    Memory: the (n_cls, H, W) scores are never held whole unless asked for. Beyond the weights and one batch of
    windows, the peak is about 7 bytes a pixel of the image (for each at another size 24 bytes a pixel of that size),
    4 * n_cls / P**2 bytes a pixel of all windows of all views (the masks), and a few blocks of 8 MB (256 MB on a GPU).
    Graphs keep, until the model is gone or changes, the working memory of the largest batch of windows, up to 8 shapes
    of inputs and masks, and with `dtype` a copy of the matrices in it; they give way to a call that needs the memory.
    """
    pixels = torch.from_numpy(read_image(image))[None]
    options = (scales, flip, window_size, window_stride, batch_size, dtype, return_probabilities, cuda_graphs)
    result = segment_pixels(model, pixels, *options)
    return (result[0][0], result[1][0]) if return_probabilities else result[0]


def segment_pixels(
    model: torch.nn.Module,
    pixels: torch.Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window_size: int | None = None,
    window_stride: int | None = None,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    return_probabilities: bool = False,
    cuda_graphs: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Labels of a batch of images of one size; see `segment_image` for the options.

    Args:
        pixels: (B, H, W, 3) uint8, on any device.
    Returns:
        labels (B, H, W) on the CPU; with `return_probabilities` also (B, n_cls, H, W) float32.
    """
    options = (scales, flip, window_size, window_stride, batch_size, dtype)
    if not return_probabilities:
        return enqueue(model, pixels, *options, cuda_graphs).fetch()
    refuse_options(model, return_probabilities=True)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        views = _views(model, pixels, *options, cuda_graphs)
        check_finite(largest_score(views))
        return _with_probabilities(views, tuple(pixels.shape[1:3]))

    return beside_graphs(model, run)


def enqueue(
    model: torch.nn.Module,
    pixels: torch.Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window_size: int | None = None,
    window_stride: int | None = None,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    cuda_graphs: bool = True,
    give_way: bool = True,
) -> Download:
    """`segment_pixels` that does not wait for the device: what it returns has the labels (B, H, W) to `fetch`.

    Args:
        give_way: whether graphs give way if memory does not suffice; False: it raises.
    """
    options = (scales, flip, window_size, window_stride)

    def run() -> Download:
        if hasattr(model, "labels_of_pixels"):
            return Download(*_labels_of_its_own(model, pixels, *options, batch_size, dtype))
        views = _views(model, pixels, *options, batch_size, dtype, cuda_graphs)
        with torch.inference_mode():
            return Download(labels_of_views(model, views, tuple(pixels.shape[1:3])), largest_score(views))

    return beside_graphs(model, run) if give_way else run()


def beside_graphs(model: torch.nn.Module, run: Callable[[], T]) -> T:
    """`run()`; again, without the graphs that the model's calls captured, if it did not fit beside them."""
    try:
        return run()
    except torch.OutOfMemoryError:
        if not release(model):
            raise
    return run()


def refuse_options(
    model: torch.nn.Module,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window_size: int | None = None,
    window_stride: int | None = None,
    return_probabilities: bool = False,
) -> None:
    """Raises ValueError if one of these options makes no sense, or is none of the model's.

    A `Segmenter` has all of them. A model of another kind is asked, by `model.refuse`, about those that differ from
    what is usual.
    """
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be positive and at least one, got {scales!r}")
    if hasattr(model, "refuse"):
        given = {"window_size": window_size, "window_stride": window_stride}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"scales": scales} if tuple(scales) != (1.0,) else {}
        given |= {name: True for name, on in (("flip", flip), ("return_probabilities", return_probabilities)) if on}
        model.refuse(given)


def _check(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    if model.training:
        raise RuntimeError("the model is in training mode: dropout would make the labels random; call model.eval()")
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != torch.uint8 or 0 in pixels.shape:
        raise ValueError(f"expected images (B, H, W, 3) uint8, got {pixels.dtype} {tuple(pixels.shape)}")


def _labels_of_its_own(
    model: torch.nn.Module,
    pixels: torch.Tensor,
    scales: Sequence[float],
    flip: bool,
    window_size: int | None,
    window_stride: int | None,
    batch_size: int | None,
    dtype: str | torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, largest score) of a model of another kind."""
    _check(model, pixels)
    refuse_options(model, scales, flip, window_size, window_stride)
    batch_size = usual_batch_size(next(model.parameters()).device) if batch_size is None else batch_size
    check_sizes(1, batch_size)
    with compute_dtype(model, dtype), torch.inference_mode():
        return model.labels_of_pixels(upload(pixels, next(model.parameters()).device), batch_size)


def _views(
    model: torch.nn.Module,
    pixels: torch.Tensor,
    scales: Sequence[float],
    flip: bool,
    window_size: int | None,
    window_stride: int | None,
    batch_size: int | None,
    dtype: str | torch.dtype | None,
    cuda_graphs: bool,
) -> "Views":
    _check(model, pixels)
    refuse_options(model, scales, flip, window_size, window_stride)
    device = next(model.parameters()).device
    window_size, window_stride = window_of(model, window_size, window_stride)
    batch_size = usual_batch_size(device) if batch_size is None else batch_size
    check_sizes(window_size, batch_size)

    pixels = upload(pixels, device)
    views = []
    with compute_dtype(model, dtype), torch.inference_mode():
        network = network_of(model, cuda_graphs)
        for scale in scales:
            for mirrored in (False, True) if flip else (False,):
                x = pixels.flip(2) if mirrored else pixels
                masks, windows = predict(model, x, window_size, window_stride, batch_size, scale, network)
                views.append((masks, windows, mirrored))
    return views


def largest_score(views: "Views") -> torch.Tensor:
    """A float32 number that is finite if all scores are; the network may give some that are not."""
    largest = [masks.abs().max().float() for masks, _, _ in views]
    return largest[0] if len(largest) == 1 else torch.stack(largest).max()


def usual_batch_size(device: torch.device) -> int:
    """Windows a forward call, or images a batch, unless said otherwise: a CPU gains nothing from batches."""
    return 1 if device.type == "cpu" else 8


def window_of(model: torch.nn.Module, window_size: int | None, window_stride: int | None) -> tuple[int, int]:
    """(window_size, window_stride) in pixels, where they are not given those of the checkpoint or in proportion."""
    info = model.info
    window_size = info.window_size if window_size is None else window_size
    if window_stride is None:
        window_stride = max(1, round(info.window_stride * window_size / info.window_size))
    return window_size, window_stride


def predict(
    model: torch.nn.Module,
    pixels: torch.Tensor,
    window_size: int,
    window_stride: int,
    batch_size: int,
    scale: float = 1.0,
    network: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Windows]:
    """Masks (B, windows, gh, gw, n_cls) of images (B, H, W, 3) at one scale, and how windows cut them.

    Args:
        network: what runs in place of `masks_of` the model.
    """
    network = network or functools.partial(masks_of, model)
    size = tuple(pixels.shape[1:3])
    scaled = _scaled_shape(size, scale)
    if size == scaled == resized_shape(*scaled, window_size):
        # no float image is made but of one batch of windows, and of that none by the kernels
        windows = windows_of(size, window_size, window_stride, model.patch_size)
        masks = predict_masks(network, pixels, windows, batch_size)
    else:
        mean, std = NORMALIZATION[model.info.normalization]
        masks = []
        for image in pixels.split(1):  # one by one: a float image is four times as large as its bytes
            im = normalized(image, mean, std, torch.float32)
            im = resize_to(im, scaled, f"by the scale {scale}; use a smaller one")
            of_image, windows = masks_of_images(model, im, window_size, window_stride, batch_size, network)
            masks.append(of_image)
        masks = torch.cat(masks)
    return masks, windows


Views = Sequence[tuple[torch.Tensor, Windows, bool]]  # masks (B, windows, gh, gw, n_cls), windows, mirrored


def labels_of_views(model: torch.nn.Module, views: Views, shape: tuple[int, int]) -> torch.Tensor:
    """Labels (B, *shape), on the device of the masks."""
    masks, windows, mirrored = views[0]
    if len(views) == 1 and windows.shape == shape and not mirrored:
        return labels_of_windows(model, masks, windows)
    labels = torch.empty(len(masks), *shape, dtype=label_dtype(masks.shape[-1]), device=masks.device)
    for b, of_image in enumerate(labels):
        fill_labels(of_image, _views_of(views, b))
    return labels


def _with_probabilities(views: Views, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels (B, *shape), probabilities (B, n_cls, *shape)), both on the CPU, where there is more memory."""
    B, n_cls = len(views[0][0]), views[0][0].shape[-1]
    labels, probabilities = torch.empty(B, *shape, dtype=label_dtype(n_cls)), torch.empty(B, n_cls, *shape)
    for b in range(B):
        for top, scores in row_blocks(_views_of(views, b), shape, probabilities=True):
            labels[b, top : top + len(scores)] = scores.argmax(-1)
            probabilities[b, :, top : top + len(scores)] = scores.permute(2, 0, 1)
    return labels, probabilities


def _views_of(views: Views, b: int) -> list[View]:
    return [View(masks[b].float(), windows, mirrored) for masks, windows, mirrored in views]


def labels_of_windows(model: torch.nn.Module, masks: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Labels (B, H, W) on the masks' device, by the kernel or in plain PyTorch, as the model's `impl` says.

    The kernel has limits (`segmenter.kernels.upsample_argmax`: 1,024 classes, 64 windows over one pixel); beyond them
    `impl="auto"` takes plain PyTorch, `impl="triton"` raises.
    """
    ops = model.ops.on(masks)
    automatic = isinstance(model.ops, Automatic)
    if automatic and ops.name == "triton" and not windows_fit(masks.shape[-1], *windows.geometry):
        ops = EAGER
    return pruned_argmax.operator(ops)(masks, *windows.geometry)


def _scaled_shape(shape: tuple[int, int], scale: float) -> tuple[int, int]:
    """Sides rounded half up, as the published multi-scale pipeline does."""
    h, w = (max(1, int(side * scale + 0.5)) for side in shape)
    return h, w
