"""Image files: the one place where they are opened and decoded, for images and for labels.

Pillow decodes. What it would read wrongly without a word is known from the header, and is refused by `samples_of`.
"""

import bisect
import contextlib
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from segmenter.errors import InputError, cause
from segmenter.files import BoundedReader, open_regular

# Pillow knows more than 40 formats, some of which start other programs (EPS calls Ghostscript). JPEG covers MPO.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 64 * 1024 * 1024

_ORIENTATION = 0x0112  # the tag, in EXIF as in TIFF
_TRANSPOSE = {  # orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
_PNG_TEXTS = ("Raw profile type exif", "XML:com.adobe.xmp")  # where some programs write the orientation
_MAX_CHUNKS = 1_000_000
_MAX_TEXT = 16 * 1024 * 1024
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6


class ImageError(InputError):
    """An image that cannot be used; the message names the file and the cause."""


@dataclass(frozen=True)
class Samples:
    """What the numbers in an image are, before Pillow changes them.

    Attributes:
        bits: of a sample; None: unknown, for images of 32-bit integers in memory.
        per_pixel: samples a pixel, those included that Pillow leaves out; None: as the mode says.
        signed: integers that may be negative. min_is_white: a TIFF of greys where 0 is white.
    """

    bits: int | None
    per_pixel: int | None = None
    signed: bool = False
    min_is_white: bool = False


@contextlib.contextmanager
def open_image(
    path: str | os.PathLike, max_pixels: int = MAX_PIXELS, wanted: Sequence[str] = FORMATS
) -> Iterator[Image.Image]:
    """An image file, opened and checked by its header but not decoded: `with open_image(path) as image:`.

    Args:
        wanted: formats that the message names if it is of none of FORMATS.
    Raises:
        ImageError: unreadable, no regular file, not of FORMATS, too large; or whatever goes wrong in the `with` block.
            The message names the file.
    """
    try:
        # Pillow gets the file, not its name: by name it maps uncompressed TIFFs into memory, and those that are to be
        # turned wrongly. It may warn of a decompression bomb besides our own error. It is left to:
        # warnings.catch_warnings changes what the whole process does with warnings, and images are read in threads.
        with open_regular(path) as file:
            magic = file.read(len(_PNG))
            if not magic:
                raise ImageError("the file is empty")
            source, texts = _without_texts(file) if magic == _PNG else (file, {})
            file.seek(0)
            with _identified(source, magic, wanted) as image:
                image.info.update(texts)
                _check_size(image, max_pixels)
                yield image
    except Exception as error:  # decoders raise nearly every exception there is on damaged files
        reason = str(error) if isinstance(error, InputError) else cause(error)
        raise ImageError(f"{os.fsdecode(path)}: {reason}") from error


def decode(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image upright, in Pillow's mode. Raises ImageError: too large or empty; and whatever Pillow raises."""
    _check_size(image, max_pixels)
    name = getattr(image, "filename", "")
    try:
        if name:  # or it would be mapped into memory, see `open_image`
            image.filename = ""
        image.load()
    finally:
        if name:
            image.filename = name
    _mend_palette(image)
    return _upright(image)


def has_several(image: Image.Image) -> bool:
    """Whether it is an animation or has several pages. The others of an MPO are previews."""
    return image.format != "MPO" and getattr(image, "is_animated", False)


def orientation(path: str | os.PathLike) -> int:
    """What the file's own tag says about how it is to be turned, 1 (not at all) to 8. Raises ImageError."""
    with open_image(path) as image:
        return _orientation(image)


def samples_of(image: Image.Image) -> Samples:
    """What the numbers of an image are. To be called before it is decoded.

    Raises:
        ImageError: a kind of file that Pillow would read wrongly.
    """
    if image.format == "TIFF" and hasattr(image, "tag_v2"):
        return _samples_of_tiff(image, image.tag_v2)
    packing = _packing(image)
    if image.format == "BMP" and packing:
        _check_bmp(image, packing)
    bits = re.search(r";(\d+)", packing)
    if image.mode == "I" and image.format != "PPM" and not bits:
        return Samples(None)
    return Samples(int(bits[1]) if bits else {"1": 1, "F": 32}.get(image.mode, 16 if image.mode.startswith("I") else 8))


def _identified(source: BinaryIO, magic: bytes, wanted: Sequence[str]) -> Image.Image:
    try:
        return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        if magic.startswith(_TIFF):
            raise ImageError("a damaged TIFF, or one of a rare kind; convert it to PNG") from error
        raise ImageError(f"not an image, or not one of {', '.join(wanted)}") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than the limit of {max_pixels}; shrink the image")
    if 0 in image.size:
        raise ImageError("the image has no pixels")


def _upright(image: Image.Image) -> Image.Image:
    turn = _TRANSPOSE.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """(ImageOps.exif_transpose also rewrites the EXIF, which fails when it is damaged.)"""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block is no reason to refuse good pixels
        return 1


def _packing(image: Image.Image) -> str:
    """How pixels are packed in the file, such as "L;4"; known until it is decoded."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    packing = tiles[0][3]
    packing = packing[0] if isinstance(packing, tuple) else packing
    return packing if isinstance(packing, str) else ""


def _check_bmp(image: Image.Image, packing: str) -> None:
    """Pillow takes a palette that is a ramp of greys for greys of 8 bits or 1, whatever the bits in the file are."""
    at = image.fp.tell()
    image.fp.seek(14)
    header = image.fp.read(16)
    image.fp.seek(at)
    bits = int.from_bytes(header[10:12] if header[0] == 12 else header[14:16], "little")
    if bits != {"1": 1, "L": 8}.get(packing, bits) or (packing == "1" and image.tile[0][0] == "bmp_rle"):
        raise ImageError("a BMP with a ramp of few greys as its palette, which cannot be read; save it as PNG")


def _samples_of_tiff(image: Image.Image, tags: Any) -> Samples:
    """For TIFF the tags tell. What is listed was compared with files made by hand (tests/inference/test_tiff.py)."""
    photometric, per_pixel = tags.get(262), tags.get(277, 1)
    bits, kind = max(tags.get(258, (1,))), max(tags.get(339, (1,)))  # kind: 1 unsigned, 2 signed, 3 floating point
    raw, planar = tags.get(259, 1) == 1, tags.get(284, 1) == 2
    refused = {
        "does not say whether 0 is black or white": photometric is None,
        "has numbers of the other byte order, compressed": (
            not raw and tags.prefix == b"MM" and (kind != 1 or bits > 16)
        ),
        "keeps its channels apart": planar and not _planar_is_right(tags, photometric, per_pixel, bits, raw),
        "has uncompressed YCbCr colours of fewer samples than pixels": (
            raw and photometric == _YCBCR and per_pixel > 1 and tuple(tags.get(530, (2, 2))) != (1, 1)
        ),
        "has YCbCr colours of limited range": (
            raw and photometric == _YCBCR and tuple(map(float, tags.get(532, _FULL_RANGE))) != _FULL_RANGE
        ),
        "has a part that is missing": raw and not _is_covered(image, per_pixel if planar else 1),
    }
    for what, is_so in refused.items():
        if is_so:
            raise ImageError(f"a TIFF that {what}, which cannot be read; save it as PNG")
    return Samples(bits, per_pixel, kind == 2, photometric == _MIN_IS_WHITE)


_FULL_RANGE = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)


def _planar_is_right(tags: Any, photometric: int, per_pixel: int, bits: int, raw: bool) -> bool:
    """Pillow takes the first letter of a packing such as "L;4" for how the first channel is packed."""
    if per_pixel == 1:
        plain = (bits, photometric) in ((1, _MIN_IS_BLACK), (8, _MIN_IS_BLACK), (8, _PALETTE))
        return not raw or (plain and tags.get(266, 1) == 1)
    return photometric in (_RGB, _CMYK) and (not raw or (bits == 8 and tags.get(266, 1) == 1))


def _mend_palette(image: Image.Image) -> None:
    """Colour maps of TIFFs have 16 bits; some programs write 8, which Pillow takes for black (libtiff sees it, too)."""
    colors = image.tag_v2.get(320) if image.format == "TIFF" and hasattr(image, "tag_v2") else None
    if colors and image.mode in ("P", "PA") and 0 < max(colors) < 256:
        n = len(colors) // 3
        image.putpalette([channel for color in zip(colors[:n], colors[n : 2 * n], colors[2 * n :], strict=False)
                          for channel in color])  # fmt: skip


def _is_covered(image: Image.Image, layers: int) -> bool:
    """Whether the parts of an uncompressed file make up the image; Pillow leaves black what is not there."""
    tiles = getattr(image, "tile", None) or []
    area = sum((right - left) * (lower - upper) for _, (left, upper, right, lower), *_ in tiles)
    return not tiles or (area == image.size[0] * image.size[1] * layers and min(tile[2] for tile in tiles) >= 8)


def _without_texts(file: BinaryIO) -> tuple[BinaryIO, dict[str, str]]:
    """A PNG as if it had only the chunks that make its pixels, and those of its texts that may tell its orientation.

    Large texts and profiles make Pillow refuse an image, and are of no use here.
    """
    parts, texts = [(0, len(_PNG))], {}
    size, at, kind = os.fstat(file.fileno()).st_size, len(_PNG), b""
    for n in itertools.count():
        file.seek(at)
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        end = at + 12 + length
        if kind in _PNG_CHUNKS or not kind.isalpha():  # Pillow is to say what is wrong
            end = end if kind.isalpha() else size
            parts.append((at, min(end, size)))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            texts.update(_text(kind, file.read(min(length, _MAX_TEXT))))
        if kind == b"IEND" or end >= size:
            kept = _Parts(file, parts)
            return BoundedReader(kept, kept.size), texts
        if n == _MAX_CHUNKS:
            raise ImageError(f"a PNG of more than {_MAX_CHUNKS} chunks, which no image has")
        at = end


def _text(kind: bytes, data: bytes) -> dict[str, str]:
    key, _, text = data[:80].partition(b"\0")
    if key.decode("latin-1") not in _PNG_TEXTS:
        return {}
    text = data[len(key) + 1 :]
    if kind == b"iTXt":  # compressed or not, method, language, translated key
        compressed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    else:
        compressed, text = kind == b"zTXt", text[1:] if kind == b"zTXt" else text
    with contextlib.suppress(zlib.error):
        text = zlib.decompressobj().decompress(text, _MAX_TEXT) if compressed else text
        return {key.decode("latin-1"): text.decode("latin-1")}
    return {}


class _Parts(io.RawIOBase):
    """Parts (begin, end) of a file as if they were one file."""

    def __init__(self, file: BinaryIO, parts: list[tuple[int, int]]):
        self._file, self._parts, self._at = file, parts, 0
        self._ends = list(itertools.accumulate(end - begin for begin, end in parts))

    def size(self) -> int:
        return self._ends[-1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size()}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        i = bisect.bisect_right(self._ends, self._at)
        if i == len(self._parts):
            return 0
        left = self._ends[i] - self._at
        self._file.seek(self._parts[i][1] - left)
        data = self._file.read(min(left, len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
