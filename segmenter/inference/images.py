"""Images in: any file, PIL image, array or tensor -> RGB bytes; and RGB bytes -> the network's input."""

import functools
import os
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms

from segmenter.config import NORMALIZATION
from segmenter.errors import cause
from segmenter.inference.image_files import (
    FORMATS,
    MAX_PIXELS,
    ImageError,
    Samples,
    decode,
    has_several,
    open_image,
    samples_of,
)

_TENSORS = {torch.uint8, torch.uint16, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64}
_WANTED = "give uint8, uint16, bool or floats in 0..1"


@functools.cache
def suffixes() -> frozenset[str]:
    """Extensions of image files, in lower case with the dot: all that Pillow knows of FORMATS, such as ".jfif"."""
    kinds = (*FORMATS, "MPO")  # which opens as JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


def read_image(source: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image as RGB bytes, upright (EXIF or TIFF orientation applied), whatever it comes as.

    Transparent pixels are laid over white. What becomes of samples of other kinds than 8-bit ones:

        1, 2, 4 bits, palettes       0..255, or the palette's colour
        12, 16 bits, grey            divided by 16.06 or 257 and rounded, so that nothing saturates
        16 bits, colours             their high byte
        32 bits, or signed           refused: their range is unknown; but PIL images in memory of mode "I": values up to
                                     255 count as 8-bit, up to 65,535 as 16-bit, others are stretched to 0..255
        floating point               files and PIL images are refused; arrays and tensors must lie in 0..1
        0 is white (TIFF)            inverted
        CMYK, YCbCr, LAB             converted; colour profiles are not applied

    Of a file with several images (animation, pages) the first is taken, with a warning. Texts in the file do not
    matter, however large.

    Args:
        source: one of
            path of a regular file, str or Path: JPEG, PNG, WebP, BMP, TIFF, GIF or PPM, told by content, not by name;
            PIL image of any mode but "F";
            array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16, bool, or floating point in 0..1, in any
            byte order; with a mask only if nothing is masked;
            tensor of these dtypes, dense, on any device, (H, W), (3, H, W), (1, H, W), (H, W, 3) ...: when the first
            axis has length 1 or 3 it is the channel, whatever the last one is.
        max_pixels: larger files are refused before they are decoded. Pillow's own limit (179 Mpx) holds as well.
    Returns:
        (H, W, 3) uint8, C-contiguous, not shared with `source`.
    Raises:
        ImageError: unreadable, truncated, too large, or of a kind not listed above. Nothing else, whatever `source` is.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(source, max_pixels)
    what = "PIL image" if isinstance(source, Image.Image) else "image"
    try:
        if isinstance(source, Image.Image):
            return _from_pil(source, max_pixels)
        if isinstance(source, torch.Tensor):
            return _from_array(_channels_last(source))
        if isinstance(source, np.ndarray):
            return _from_array(source)
    except ImageError:
        raise
    except Exception as error:  # an image opened lazily is decoded only now; tensors and arrays have subclasses
        raise ImageError(f"cannot decode the {what}: {cause(error)}") from error
    raise ImageError(f"an image must be a path, PIL image, array or tensor, not {type(source).__name__}")


def normalize(image: np.ndarray, stats: str, rounded: bool = False) -> torch.Tensor:
    """RGB bytes (H, W, 3) -> the network's input (3, H, W), float32.

    Args:
        image: uint8. stats: a key of NORMALIZATION.
        rounded: False as in the published demo: image / 255, then exact statistics. True as in the published training
            and evaluation: statistics times 255, rounded to two decimals, applied to the bytes.
    Raises:
        ValueError: another shape, dtype or key.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}; read_image() makes it")
    if stats not in NORMALIZATION:
        raise ValueError(f"normalization {stats!r} is unknown; choose one of {', '.join(NORMALIZATION)}")
    mean, std = np.array(NORMALIZATION[stats])[:, :, None, None]
    pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")).float()
    if rounded:  # in place throughout: images can be large
        mean, std = np.round(mean * 255, 2), np.round(std * 255, 2)
        return pixels.sub_(torch.from_numpy(mean).float()).mul_(torch.from_numpy(1 / std).float())
    return pixels.div_(255).sub_(torch.from_numpy(mean).float()).div_(torch.from_numpy(std).float())


def _read_file(path: str | os.PathLike, max_pixels: int) -> np.ndarray:
    try:
        path = os.fsdecode(path)
    except Exception as error:
        raise ImageError(f"no path: {cause(error)}") from error
    with open_image(path, max_pixels) as image:
        pixels, several = _from_pil(image, max_pixels), has_several(image)
    if several:
        warnings.warn(f"{path}: an animation or several pages, only the first is used", stacklevel=3)
    return pixels


def _from_pil(image: Image.Image, max_pixels: int) -> np.ndarray:
    samples = samples_of(image)
    return np.array(_to_rgb(decode(image, max_pixels), samples))


def _to_rgb(image: Image.Image, samples: Samples) -> Image.Image:
    if image.mode == "F":
        raise ImageError('float images (mode "F") have no known range; convert to 8 or 16 bit')
    if samples.signed or samples.bits == 32:
        kind = "signed" if samples.signed else "32-bit"
        raise ImageError(f"{kind} integers have no known range; convert to 8 or 16 bit, unsigned")
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = _to_depth_8(values) if samples.bits is None else _shrink(values, samples.bits)
        if samples.min_is_white and samples.bits == 16:  # which Pillow inverts of fewer bits only
            grey = 255 - grey
        if isinstance(clear, int):
            grey = np.where(values == clear, 255, grey).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode in ("1", "L") and isinstance(clear, int):
        grey = np.asarray(image.convert("L"))
        values = grey // (255 // (2**samples.bits - 1))  # as they are in the file
        clear = bool(clear) if image.mode == "1" else clear
        return Image.fromarray(np.where(values == clear, 255, grey).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and samples.bits == 16 and clear is not None:
        raise ImageError("16-bit colours of which one is transparent cannot be read; save the image with alpha")
    if image.mode == "La":  # premultiplied; converts to nothing else
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or clear is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_depth_8(values: np.ndarray) -> np.ndarray:
    """int32 of unknown depth -> uint8; see `read_image`."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        return np.round((values.astype(np.float64) - low) * (255 / (high - low or 1))).astype(np.uint8)
    return values.astype(np.uint8) if high <= 255 else _shrink(values, 16)


def _shrink(values: np.ndarray, bits: int) -> np.ndarray:
    """0..2**bits-1 -> 0..255, rounded."""
    highest = 2**bits - 1
    return ((values.astype(np.uint32) * 255 + highest // 2) // highest).astype(np.uint8)


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "nested, sparse or quantised"
        raise ImageError(f"a {kind} tensor is no image; give a dense one that holds its values")
    if tensor.dtype not in _TENSORS:
        raise ImageError(f"dtype {tensor.dtype} is ambiguous; {_WANTED}")
    tensor = tensor.detach().cpu().resolve_neg()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    array = tensor.numpy()
    if array.ndim == 3 and (array.shape[0] in (1, 3) or (array.shape[0] == 4 and array.shape[2] not in (1, 3, 4))):
        array = array.transpose(1, 2, 0)
    return array


def _from_array(array: np.ndarray) -> np.ndarray:
    if np.ma.is_masked(array):
        raise ImageError("the array has masked pixels; fill them first")
    array = np.asarray(array)  # of subclasses the plain array
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(f"one image (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) is needed, got shape {shape}")
    array = _to_bytes(array)
    if array.shape[2] == 4:
        return np.array(_to_rgb(Image.fromarray(np.ascontiguousarray(array)), Samples(8)))
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.newbyteorder("=") == np.uint16:
        return _shrink(array, 16)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"dtype {array.dtype} is ambiguous; {_WANTED}")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ImageError(f"float images must lie in 0..1, found {low:g}..{high:g}; give uint8, and do not normalise")
    return np.round(array.astype(np.float32) * 255).astype(np.uint8)
