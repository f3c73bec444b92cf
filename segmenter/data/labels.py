"""Label files: pictures whose pixel values are class ids -> labels 0..n_cls-1, or "does not count"."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from segmenter.errors import InputError
from segmenter.images import FORMATS, MAX_PIXELS

LABEL_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # the others lose values, hold colours only, or are scaled by Pillow
_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads greys of 2 and 4 bits over 0..255
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
    """The pixel values of a label file, never converted: indices of a palette, or greys of 1 to 16 bits.

    Returns:
        (H, W) uint8 or uint16.
    Raises:
        DataError: unreadable, or a picture of another kind: colours, not of LABEL_FORMATS, values beyond 65535.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _refuse_what_holds_no_ids(image)
            spread = _SPREAD.get(_raw_mode(image), 1)
            return _values(image) // spread
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a picture, or not one of {', '.join(LABEL_FORMATS)}", path) from error
    except Exception as error:  # decoders raise nearly every exception there is on damaged files
        cause = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise DataError(f"{path}: {cause or type(error).__name__}", path) from error


def _refuse_what_holds_no_ids(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
    if image.format not in LABEL_FORMATS:
        raise DataError(f"{image.format} does not keep label values; store labels as {', '.join(LABEL_FORMATS)}")
    if getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{image.n_frames} pages; a label file must have one")
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise DataError(
            f"a label file must hold one id a pixel (grey or palette), this one holds colours (mode {image.mode}); "
            "replace each colour by its id, or keep one channel if all are the same, and save as grey PNG"
        )


def _raw_mode(image: Image.Image) -> str:
    """How the pixels are packed in the file; known until it is decoded."""
    packing = image.tile[0][3]
    return packing if isinstance(packing, str) else packing[0]


def _values(image: Image.Image) -> np.ndarray:
    values = np.array(image)
    if not image.mode.startswith("I"):
        return values.astype(np.uint8)
    if values.min() < 0 or values.max() > 65535:  # 16-bit files are "I;16", or 32-bit "I" in older versions of Pillow
        raise DataError(f"values {values.min()}..{values.max()} are beyond 16 bits; ids must be 0..65535")
    return values.astype(np.uint16)
