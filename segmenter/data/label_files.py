"""Label files: images whose pixel values are class ids -> labels 0..n_cls-1, or "does not count"."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from segmenter.errors import InputError
from segmenter.inference.image_files import ImageError, Samples, decode, has_several, open_image, samples_of

LABEL_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # the others lose values, hold colours only, or are scaled by Pillow
_WITH_ALPHA = ("LA", "La", "PA")
_SHOWN = 5


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
        ignored: values that do not count, as they are in the files.
    """

    reduce_zero: bool = False
    ignored: tuple[int, ...] = (255,)

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

    def _no_class(self) -> tuple[int, ...]:
        return (0, *self.ignored) if self.reduce_zero else self.ignored

    def _complaint(self, values: np.ndarray, wrong: np.ndarray, n_cls: int) -> str:
        found, counts = np.unique(values[wrong], return_counts=True)
        shown = [f"{v} ({c} px)" for v, c in list(zip(found.tolist(), counts.tolist(), strict=True))[:_SHOWN]]
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        row, column = np.argwhere(wrong)[0].tolist()
        first = int(self.reduce_zero)
        no_class = ", ".join(map(str, sorted(set(self._no_class())))) or "none"
        advice = self._advice(set(found.tolist()), n_cls)
        return (
            f"no class has the value {', '.join(shown)}{more}, first at row {row}, column {column}; "
            f"classes are {first}..{n_cls - 1 + first}, ignored are {no_class}{advice}"
        )

    def _advice(self, found: set[int], n_cls: int) -> str:
        if found == {255}:
            return "; did you mean ignore_index: 255 in dataset.yml?"
        if not self.reduce_zero and found - {255} == {n_cls}:
            return f"; value {n_cls} occurs and n_cls is {n_cls}: did you mean reduce_zero: true in dataset.yml?"
        return ""


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
