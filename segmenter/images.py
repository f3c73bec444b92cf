"""Pictures in: any file, PIL image, array or tensor -> RGB bytes; and RGB bytes -> the network's input."""

import functools
import os
import stat
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

from segmenter.errors import InputError

# Pillow knows more than 40 formats, some of which start other programs (EPS calls Ghostscript). JPEG covers MPO.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 64 * 1024 * 1024

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

NORMALIZATION = {
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@functools.cache
def suffixes() -> frozenset[str]:
    """Extensions of picture files, in lower case with the dot: all that Pillow knows of FORMATS, such as ".jfif"."""
    kinds = (*FORMATS, "MPO")  # which opens as JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


class ImageError(InputError):
    """A picture that cannot be used; the message names the file and the cause."""


def read_image(source: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as RGB bytes, upright (EXIF rotation applied), whatever it comes as.

    Transparent pixels are laid over white. 16-bit samples are divided by 257, so that nothing saturates. Pillow's
    32-bit mode "I" does not tell its depth: values up to 255 count as 8-bit, up to 65,535 as 16-bit, and others are
    stretched from their own range to 0..255. Of a file with several pictures (animation, pages) the first is taken,
    with a warning.

    Args:
        source: one of
            path of a regular file, str or Path: JPEG, PNG, WebP, BMP, TIFF, GIF or PPM, told by content, not by name;
            PIL image of any mode but "F";
            array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16, bool, or floating point in 0..1;
            tensor of these dtypes, (H, W), (3, H, W), (1, H, W), (H, W, 3) ...: when the first axis has length 1 or 3
            it is the channel, whatever the last one is.
        max_pixels: larger files are refused before they are decoded. Pillow's own limit (179 Mpx) holds as well.
    Returns:
        (H, W, 3) uint8, C-contiguous, not shared with `source`.
    Raises:
        ImageError: unreadable, truncated, too large, or of a kind not listed above.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(os.fspath(source), max_pixels)
    if isinstance(source, Image.Image):
        try:
            return _from_pil(source, max_pixels)
        except ImageError:
            raise
        except Exception as error:  # an image opened lazily is decoded only now
            raise ImageError(f"cannot decode the PIL image: {_cause(error)}") from error
    if isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source.detach().cpu()))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise ImageError(f"a picture must be a path, PIL image, array or tensor, not {type(source).__name__}")


def normalize(image: np.ndarray, stats: str, rounded: bool = False) -> torch.Tensor:
    """RGB bytes (H, W, 3) -> the network's input (3, H, W), float32.

    Args:
        image: uint8. stats: "vit" or "deit", a key of NORMALIZATION.
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
    if rounded:  # in place throughout: pictures can be large
        mean, std = np.round(mean * 255, 2), np.round(std * 255, 2)
        return pixels.sub_(torch.from_numpy(mean).float()).mul_(torch.from_numpy(1 / std).float())
    return pixels.div_(255).sub_(torch.from_numpy(mean).float()).div_(torch.from_numpy(std).float())


def _read_file(path: str, max_pixels: int) -> np.ndarray:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ImageError("not a regular file")
        if status.st_size == 0:
            raise ImageError("the file is empty")
        # Pillow may warn of a decompression bomb besides our own error. It is left to: warnings.catch_warnings changes
        # what the whole process does with warnings, and pictures are read in threads.
        with Image.open(path, formats=FORMATS) as image:
            pixels = _from_pil(image, max_pixels)
            several = image.format != "MPO" and getattr(image, "is_animated", False)  # an MPO's others are previews
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture, or not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise nearly every exception there is on damaged files
        raise ImageError(f"{path}: {_cause(error)}") from error
    if several:
        warnings.warn(f"{path}: an animation or several pages, only the first is used", stacklevel=3)
    return pixels


def _from_pil(image: Image.Image, max_pixels: int) -> np.ndarray:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than the limit of {max_pixels}; shrink the picture")
    if 0 in image.size:
        raise ImageError("the picture has no pixels")
    image.load()
    return np.array(_to_rgb(_upright(image)))


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF rotation. (ImageOps.exif_transpose also rewrites the EXIF, which fails when it is damaged.)"""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a damaged EXIF block is no reason to refuse good pixels
        return image
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError('float pictures (mode "F") have no known range; convert to 8 or 16 bit')
    if image.mode.startswith("I;16"):
        return Image.fromarray(_shrink(np.asarray(image))).convert("RGB")
    if image.mode == "I":
        return Image.fromarray(_to_depth_8(np.asarray(image))).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode == "La":  # premultiplied; converts to nothing else
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_depth_8(values: np.ndarray) -> np.ndarray:
    """int32 of unknown depth -> uint8; see `read_image`."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        return np.round((values.astype(np.float64) - low) * (255 / (high - low or 1))).astype(np.uint8)
    return values.astype(np.uint8) if high <= 255 else _shrink(values)


def _shrink(values: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded; 257 is 65535 / 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    array = tensor.numpy()
    if array.ndim == 3 and (array.shape[0] in (1, 3) or (array.shape[0] == 4 and array.shape[2] not in (1, 3, 4))):
        array = array.transpose(1, 2, 0)
    return array


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ImageError(f"one picture (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) is needed, got shape {array.shape}")
    array = _to_bytes(array)
    if array.shape[2] == 4:
        return np.array(_to_rgb(Image.fromarray(np.ascontiguousarray(array))))
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return _shrink(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"dtype {array.dtype} is ambiguous; give uint8, uint16, bool or floats in 0..1")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ImageError(f"float pictures must lie in 0..1, found {low:g}..{high:g}; give uint8, and do not normalise")
    return np.round(array.astype(np.float32) * 255).astype(np.uint8)


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
