"""Data sets of one's own: images/, annotations/ and a file dataset.yml that says what the labels mean.

    name: my streets                      # default: the name of the folder
    classes: [road, car, person]          # or {name, color: [red, green, blue]} each, or a key such as cityscapes
    ignore_index: 255                     # value, or list of values, of pixels that do not count (default: 255)
    reduce_zero: false                    # true: 0 is no class, and 1 is the first class (default: false)
    splits: {train: 2019, val: val.txt}   # folder in images/ and annotations/, or text file with names of samples

Without `splits`, the folders images/train, images/val and images/test are the splits; if there are none of them, all
pictures are the split train.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from segmenter.classes import CLASS_SETS, ClassSet, generic_classes, load_classes
from segmenter.data.labels import DataError, Ids, ignore_index
from segmenter.data.layouts import SPLITS, Part
from segmenter.text_files import read_yaml

FILE = "dataset.yml"
_KEYS = ("name", "classes", "ignore_index", "reduce_zero", "splits")


@dataclass(frozen=True)
class OwnData:
    """What dataset.yml says. `splits`: split -> folder or text file; empty: by the folders there are."""

    classes: ClassSet
    ids: Ids
    splits: dict[str, str]

    def parts(self, root: Path) -> dict[str, Part]:
        """Every split there may be."""
        splits = self.splits or {split: split for split in SPLITS if (root / "images" / split).is_dir()}
        return {split: _part(root, split, where) for split, where in (splits or {"train": ""}).items()}


def read_own(root: Path, classes: ClassSet | None = None) -> OwnData:
    """Reads and checks `root`/dataset.yml. `classes` are for a file that names none.

    Raises:
        DataError: unreadable, unknown keys, or values of a wrong type or range, which are named; no classes.
    """
    path = root / FILE
    try:
        return _parse(read_yaml(path, DataError), root, classes)
    except DataError as error:
        raise DataError(str(error), path) from error
    except ValueError as error:
        raise DataError(f"{path}: {error}", path) from error


class _Wrong(ValueError):
    """A value in the file; the message need not name the file."""


def _part(root: Path, split: str, where: str) -> Part:
    images, labels = root / "images", root / "annotations"
    if where.endswith(".txt"):
        return Part(split, images, labels, names=root / where)
    return Part(split, images / where, labels / where)


def _parse(data: Any, root: Path, classes: ClassSet | None) -> OwnData:
    if not isinstance(data, dict):
        raise _Wrong(f"expected keys and values ({', '.join(_KEYS)}), found {_shown(data)}")
    if unknown := [key for key in data if key not in _KEYS]:
        raise _Wrong(f"unknown key {', '.join(map(_shown, unknown))}; keys are {', '.join(_KEYS)}")
    name = _typed(data, "name", str, root.resolve().name, "text")
    if "classes" in data:
        classes = _classes(data["classes"], name)
    if classes is None:
        raise _Wrong("names no classes; add `classes`, a list of their names")
    ignored = data.get("ignore_index", ignore_index(len(classes)))
    ids = Ids(_typed(data, "reduce_zero", bool, False, "true or false"), _ignored(ignored))
    of_class = {i + int(ids.reduce_zero): class_name for i, class_name in enumerate(classes.names)}
    for value in ids.ignored:
        if value in of_class:
            hint = "; if 0 is no class and 1 the first one, say reduce_zero: true" if value == 0 else ""
            raise _Wrong(f"ignore_index {value} is also class {of_class[value]!r}{hint}")
    return OwnData(classes, ids, _splits(data.get("splits", {})))


def _typed(data: dict[Any, Any], key: str, kind: type, default: Any, wanted: str) -> Any:
    value = data.get(key, default)
    if type(value) is not kind:
        raise _Wrong(f"{key} must be {wanted}, found {_shown(value)}")
    return value


def _ignored(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(type(v) is int and 0 <= v <= 65535 for v in values):
        raise _Wrong(f"ignore_index must be an integer 0..65535 or a list of them, found {_shown(value)}")
    return tuple(values)


def _classes(value: Any, name: str) -> ClassSet:
    if isinstance(value, str):
        if value not in CLASS_SETS:
            raise _Wrong(f"classes {value!r} is none of {', '.join(CLASS_SETS)}; give a list of names")
        return load_classes(value)
    if not isinstance(value, list) or not value:
        raise _Wrong(f"classes must be a list of names or of {{name, color}}, or a key, found {_shown(value)}")
    colored = isinstance(value[0], dict)
    entries = [_entry(i, entry, colored) for i, entry in enumerate(value)]
    names = tuple(entry["name"] for entry in entries)
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise _Wrong(f"two classes are called {twice!r}")
    palette = tuple(tuple(entry["color"]) for entry in entries) if colored else generic_classes(len(names)).palette
    return ClassSet(name, names, palette)


def _entry(i: int, entry: Any, colored: bool) -> dict[str, Any]:
    """One class as {name, color}; without colours if the first class has none."""
    if isinstance(entry, dict) != colored:
        raise _Wrong(f"class {i} is {_shown(entry)}: give all classes a name and a color, or all a name only")
    if colored and entry.keys() != {"name", "color"}:
        raise _Wrong(f"class {i} must have the keys name and color and no others, found {_shown(entry)}")
    entry = entry if colored else {"name": entry}
    if type(entry["name"]) is not str or not entry["name"].strip():  # YAML reads no, on, 1 as other things than text
        raise _Wrong(f"the name of class {i} must be text, found {_shown(entry['name'])}; put it in quotes")
    color = entry.get("color", [0, 0, 0])
    if not isinstance(color, list) or len(color) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in color):
        raise _Wrong(f"color of class {i} must be three integers 0..255, found {_shown(color)}")
    return entry


def _splits(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Wrong(f"splits must be split: folder or file.txt, found {_shown(value)}")
    for split, where in value.items():
        if type(split) is not str or type(where) is not str:
            raise _Wrong(f"splits must be split: folder or file.txt, found {_shown(split)}: {_shown(where)}")
        if PurePosixPath(where).is_absolute() or ".." in PurePosixPath(where).parts:
            raise _Wrong(f"split {split} must lie in the folder of the data set, found {_shown(where)}")
    return value


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
