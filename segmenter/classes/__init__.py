"""Class names and colours, of the usual data sets or from a file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segmenter.errors import InputError
from segmenter.text_files import read_json, read_yaml

CLASS_SETS = (
    "ade20k",
    "pascal_context",
    "pascal_context_59",
    "cityscapes",
    "camvid",
    "voc2012",
    "coco_stuff",
    "mapillary_v1.2",
    "mapillary_v2.0",
    "loveda",
    "potsdam",
)


class ClassesError(InputError):
    """Class names and colours that cannot be used; the message names the file and the cause."""


@dataclass(frozen=True)
class ClassSet:
    """Names and RGB colours by class id. `name` is the key of the set or the stem of its file."""

    name: str
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.names)

    def palette_array(self, n: int = 256) -> np.ndarray:
        """Colours of the labels 0..n-1: (n, 3) uint8. Labels beyond the classes (255: ignored) are black."""
        table = np.zeros((n, 3), np.uint8)
        k = min(n, len(self.palette))
        table[:k] = self.palette[:k]
        return table


def load_classes(key_or_path: str | Path) -> ClassSet:
    """A class set by its key (one of CLASS_SETS), or from a file.

    A file is YAML or JSON: a list of {id, name, color: [red, green, blue]}, in any order, ids from 0 without gaps;
    other keys are ignored, as in the class files of the published code.

    Raises:
        ClassesError: neither a key nor a readable file, or an entry is wrong.
    """
    key = str(key_or_path)
    if key == "pascal_context_59":
        full = load_classes("pascal_context")
        return ClassSet(key, full.names[1:], full.palette[1:])
    if key in CLASS_SETS:
        return _read(Path(__file__).with_name(f"{key}.yml"))
    if not os.path.isfile(key):  # Path.is_file() raises for names that are too long
        raise ClassesError(f"{key}: neither a file nor one of {', '.join(CLASS_SETS)}")
    return _read(Path(key))


def fitting_classes(key_or_path: str | Path | None, n_cls: int) -> ClassSet | None:
    """The class set that a model of `n_cls` classes names, if it can be read and has as many; else None."""
    try:
        found = load_classes(key_or_path) if key_or_path else None
    except ClassesError:
        return None
    return found if found is not None and len(found) == n_cls else None


def generic_classes(n: int) -> ClassSet:
    """Names "class 0" ... and generated colours for models with no class set.

    Each colour is the one farthest from all before it and from black and white; after 341 they repeat.
    """
    levels = np.linspace(0, 255, 7).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)  # black ... white
    picked = []
    nearest = np.minimum(*(np.linalg.norm(candidates - candidates[end], axis=1) for end in (0, -1)))
    for _ in range(min(n, len(candidates) - 2)):
        picked.append(tuple(int(c) for c in candidates[nearest.argmax()]))
        nearest = np.minimum(nearest, np.linalg.norm(candidates - picked[-1], axis=1))
    return ClassSet("generic", tuple(f"class {i}" for i in range(n)), tuple(picked[i % len(picked)] for i in range(n)))


def _read(path: Path) -> ClassSet:
    entries = (read_json if path.suffix == ".json" else read_yaml)(path, ClassesError)
    try:
        return _parse(path.stem, entries)
    except ClassesError as error:
        raise ClassesError(f"{path}: {error}") from error


def _parse(name: str, entries: Any) -> ClassSet:
    if not isinstance(entries, list) or not entries:
        raise ClassesError("expected a list of {id, name, color}")
    names, palette = [""] * len(entries), [(0, 0, 0)] * len(entries)
    seen = set()
    for entry in entries:
        if not isinstance(entry, dict) or not {"id", "name", "color"} <= entry.keys():
            raise ClassesError(f"expected {{id, name, color}}, found {entry!r:.80}")
        i, color = entry["id"], entry["color"]
        if type(i) is not int or not 0 <= i < len(entries) or i in seen:
            raise ClassesError(f"ids must be 0..{len(entries) - 1}, each once, found {i!r:.80}")
        if not isinstance(color, list) or len(color) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in color):
            raise ClassesError(f"color of class {i} must be three integers 0..255, found {color!r:.80}")
        seen.add(i)
        names[i], palette[i] = str(entry["name"]), tuple(color)
    return ClassSet(name, tuple(names), tuple(palette))
