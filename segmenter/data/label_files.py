"""Label files: images whose pixel values or colours stand for classes -> labels 0..n_cls-1, or "does not count"."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from segmenter.errors import InputError
from segmenter.inference.image_files import ImageError, Samples, decode, has_several, open_image, samples_of

LABEL_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # the others lose values, hold colours only, or are scaled by Pillow
_WITH_ALPHA = ("LA", "La", "PA")
_SHOWN = 5
COLOR_TOLERANCE = 8  # levels of a channel: some published labels are a little off
_ROWS = 256  # of a label file whose colours are looked up at a time: tiles of 36 million pixels are usual


class DataError(InputError):
    """A data set or sample that cannot be used; the message names the file, the value, and what to do.

    Attributes:
        file: the file or folder that is meant, if it is one.
    """

    def __init__(self, message: str, file: Path | None = None):
        super().__init__(message)
        self.file = file


@dataclass(frozen=True)
class Ids:
    """What the values in the label files of a data set mean.

    Attributes:
        reduce_zero: value 0 means "no class" and value i class i - 1; else value i is class i.
        ignored: values that do not count, as `read` gives them.
        stored: what is stored in the files for value 0, 1 ..., where numbers are left out; empty: the value itself.
        colors: the RGB colour that is stored for value 0, 1 ..., where label files hold colours.
    """

    reduce_zero: bool = False
    ignored: tuple[int, ...] = (255,)
    stored: tuple[int, ...] = ()
    colors: tuple[tuple[int, int, int], ...] = ()

    def read(self, file: Path) -> np.ndarray:
        """The values in a label file: those stored, or what `stored` or `colors` says of them.

        Returns:
            (H, W) uint8 or uint16.
        Raises:
            DataError: as `read_ids` or `read_colors`; or a value that is neither in `stored` nor ignored.
        """
        if self.colors:
            return read_colors(file, self.colors)
        ids = read_ids(file)
        return self._counted_through(ids, file) if self.stored else ids

    def to_labels(self, values: np.ndarray, n_cls: int, file: Path) -> np.ndarray:
        """Values (H, W) of `file`, unsigned -> labels (H, W): 0..n_cls-1, or `ignore_index(n_cls)`, in its type.

        Raises:
            DataError: values that are neither a class nor ignored: which, how often, where the first is.
        """
        ignored = np.isin(values, self._no_class())
        labels = values.astype(np.int32) - int(self.reduce_zero)
        if (wrong := (labels >= n_cls) & ~ignored).any():
            raise DataError(f"{file}: {self._complaint(values, wrong, n_cls)}", file)
        index = ignore_index(n_cls)
        labels[ignored] = index
        return labels.astype(np.min_scalar_type(index))

    def _counted_through(self, ids: np.ndarray, file: Path) -> np.ndarray:
        table = np.full(65536, -1, np.int32)
        table[list(self.stored)] = np.arange(len(self.stored))
        table[list(self.ignored)] = self.ignored
        values = table[ids]
        if (wrong := values < 0).any():
            left_out = sorted(set(range(max(self.stored))) - set(self.stored))
            raise DataError(
                f"{file}: {_unknown(ids, wrong)}; classes are {min(self.stored)}..{max(self.stored)} but for "
                f"{', '.join(map(str, left_out))}, ignored are {', '.join(map(str, self.ignored))}",
                file,
            )
        return values.astype(ids.dtype)

    def _no_class(self) -> tuple[int, ...]:
        return (0, *self.ignored) if self.reduce_zero else self.ignored

    def _complaint(self, values: np.ndarray, wrong: np.ndarray, n_cls: int) -> str:
        first = int(self.reduce_zero)
        no_class = ", ".join(map(str, sorted(set(self._no_class())))) or "none"
        advice = self._advice(set(np.unique(values[wrong]).tolist()), n_cls)
        return f"{_unknown(values, wrong)}; classes are {first}..{n_cls - 1 + first}, ignored are {no_class}{advice}"

    def _advice(self, found: set[int], n_cls: int) -> str:
        if found == {255}:
            return "; did you mean ignore_index: 255 in dataset.yml?"
        if not self.reduce_zero and found - {255} == {n_cls}:
            return f"; value {n_cls} occurs and n_cls is {n_cls}: did you mean reduce_zero: true in dataset.yml?"
        return ""


def _unknown(values: np.ndarray, wrong: np.ndarray) -> str:
    """Which of `values` (H, W) are `wrong`, how often, and where the first is."""
    found, counts = np.unique(values[wrong], return_counts=True)
    shown = [f"{v} ({c} px)" for v, c in list(zip(found.tolist(), counts.tolist(), strict=True))[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    row, column = np.argwhere(wrong)[0].tolist()
    return f"no class has the value {', '.join(shown)}{more}, first at row {row}, column {column}"


def ignore_index(n_cls: int) -> int:
    """The label of pixels that do not count: 255, or 65535 for more than 255 classes."""
    return 255 if n_cls <= 255 else 65535


def read_ids(path: Path) -> np.ndarray:
    """The pixel values as they are stored in a label file: indices of a palette, or greys of 1 to 32 bits.

    Values are never converted: of a grey PNG with 4 bits they are 0..15, of a float TIFF whole numbers. If the file
    itself says how it is to be turned (EXIF or TIFF orientation), the ids are turned upright, as an image is.

    Returns:
        (H, W) uint8 or uint16.
    Raises:
        DataError: unreadable, or an image of another kind: colours, not of LABEL_FORMATS, several samples a pixel or
            pages, values that are not whole or beyond 0..65535, a TIFF where 0 is white: programs do not agree whether
            its values are those stored or their inverse.
    """
    try:
        with open_image(path, wanted=LABEL_FORMATS) as image:
            _refuse_other_formats(image)
            samples = samples_of(image)
            _refuse_what_holds_no_ids(image, samples)
            return _values(decode(image), samples)
    except ImageError as error:
        raise DataError(str(error), path) from error


def read_colors(path: Path, colors: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """The index in `colors` of each pixel of a label file in RGB; colours may be off by COLOR_TOLERANCE a channel.

    Returns:
        (H, W) uint8, upright.
    Raises:
        DataError: unreadable, no RGB of 8 bits, of a format that loses colours, several pages, or a colour that is not
            among `colors`: which, and where the first is.
    """
    try:
        with open_image(path, wanted=LABEL_FORMATS) as image:
            _refuse_other_formats(image)
            if has_several(image) or image.mode != "RGB" or samples_of(image).per_pixel not in (None, 3):
                raise ImageError(f"a label file must hold one colour a pixel (RGB, one page); its mode is {image.mode}")
            pixels = np.asarray(decode(image))
    except ImageError as error:
        raise DataError(str(error), path) from error
    values = np.empty(pixels.shape[:2], np.uint8)
    for top in range(0, len(pixels), _ROWS):
        rows = pixels[top : top + _ROWS]
        values[top : top + _ROWS], far = _nearest(rows, colors)
        if far.any():
            row, column = np.argwhere(far)[0].tolist()
            raise DataError(
                f"{path}: no class has the colour {tuple(rows[row, column].tolist())}, first at row {top + row}, "
                f"column {column}; colours are {', '.join(map(str, colors))}",
                path,
            )
    return values


def _nearest(pixels: np.ndarray, colors: tuple[tuple[int, int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Index of the first of `colors` within the tolerance of each pixel, and where there is none."""
    values, far = np.zeros(pixels.shape[:2], np.uint8), np.ones(pixels.shape[:2], bool)
    for i, color in enumerate(colors):
        bounds = [(max(c - COLOR_TOLERANCE, 0), min(c + COLOR_TOLERANCE, 255)) for c in color]
        near = far.copy()
        for channel, (low, high) in enumerate(bounds):
            near &= (pixels[..., channel] >= low) & (pixels[..., channel] <= high)
        values[near] = i
        far &= ~near
    return values, far


def _refuse_other_formats(image: Image.Image) -> None:
    if image.format not in LABEL_FORMATS:
        raise ImageError(f"{image.format} does not keep label values; store labels as {', '.join(LABEL_FORMATS)}")


def _refuse_what_holds_no_ids(image: Image.Image, samples: Samples) -> None:
    if has_several(image):
        raise ImageError("2 pages or more; a label file must have one")
    if samples.min_is_white:
        raise ImageError(
            "a TIFF where 0 is white: ids could be the values that are stored or their inverse, and programs do not "
            "agree; save it as grey PNG"
        )
    if image.mode in ("1", "L", "P", "F") or image.mode.startswith("I"):
        several = samples.per_pixel not in (None, 1)
        holds = f"{samples.per_pixel} samples (mode {image.mode})" if several else ""
    else:
        holds = f"colours (mode {image.mode})" if image.mode not in _WITH_ALPHA else f"alpha (mode {image.mode})"
    if holds:
        raise ImageError(
            f"a label file must hold one id a pixel (grey or palette), this one holds {holds}; "
            "replace each colour by its id, or keep one channel if all are the same, and save as grey PNG"
        )
    if image.format == "GIF" and tuple(image.tile[0][1]) != (0, 0, *image.size):
        raise ImageError("a GIF that does not store all of its pixels; save it as grey PNG")


def _values(image: Image.Image, samples: Samples) -> np.ndarray:
    values = np.array(image)
    if image.mode == "F":
        if not np.array_equal(values, np.floor(values)):  # also true of NaN
            raise ImageError("floating point values that are not whole numbers; ids must be 0..65535")
        values = values.astype(np.float64)
    elif not image.mode.startswith("I"):
        spread = 255 // (2**samples.bits - 1) if image.mode == "L" else 1  # Pillow spreads greys over 0..255
        values = values.astype(np.uint8) // spread
        if not samples.signed:
            return values
        values = values.view(np.int8)
    elif samples.bits == 32 and not samples.signed:
        values = values.view(np.uint32)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"values {values.min()}..{values.max()} are beyond 16 bits; ids must be 0..65535")
    return values.astype(np.uint16)
