"""Data sets of one's own: images/, annotations/ and a file dataset.yml, or .yaml, that says what the labels mean.

    name: my streets                      # default: the name of the folder
    classes: [road, car, person]          # or {name, color: [red, green, blue]} each, or a key such as cityscapes
    ignore_index: 255                     # value, or list of values, of pixels that do not count (default: 255)
    reduce_zero: false                    # true: 0 is no class, and 1 is the first class (default: false)
    splits: {train: 2019, val: val.txt}   # folder in images/ and annotations/, or text file with names of samples

No two splits may share a folder or a list. Without `splits`, the folders images/train, images/val and images/test are
the splits, or images/training, images/validation or valid, and images/testing; in annotations/ they may have the other
of these names. If there are none of them, all images are the split train.
"""

import itertools
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from segmenter.classes import CLASS_SETS, ClassSet, generic_classes, load_classes
from segmenter.data.label_files import DataError, Ids, ignore_index
from segmenter.data.layouts import Part, in_short, like_a_split
from segmenter.errors import cause
from segmenter.inference.images import suffixes
from segmenter.text_files import read_yaml

FILE = "dataset.yml"
_FILES = (FILE, "dataset.yaml")
_DIRECTORIES = {  # split -> what its folders may be called
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
_KEYS = ("name", "classes", "ignore_index", "reduce_zero", "splits")


@dataclass(frozen=True)
class CustomData:
    """What dataset.yml says. `splits`: split -> folder or text file; empty: all images are the split train."""

    classes: ClassSet
    ids: Ids
    splits: dict[str, str]

    def parts(self, root: Path) -> dict[str, Part]:
        """Every split there may be."""
        if not self.splits:
            return {"train": Part("train", root / "images", root / "annotations", undivided=True)}
        return {split: _part(root, split, where) for split, where in self.splits.items()}


def description(root: Path) -> Path | None:
    """The file that makes a folder a data set of one's own, if it has one.

    Raises:
        DataError: it has two.
    """
    found = [path for name in _FILES if os.path.lexists(path := root / name)]  # reading tells what is no file
    if len(found) > 1 and not (os.path.exists(found[0]) and os.path.exists(found[1]) and found[0].samefile(found[1])):
        raise DataError(f"{root}: has a {found[0].name} and a {found[1].name}; one of them has to go", root)
    return found[0] if found else None


def read_custom(root: Path, classes: ClassSet | None = None) -> CustomData:
    """Reads and checks the description in `root`, and finds the splits. `classes` are for a file that names none.

    Images that are in no split, where folders are the splits, are warned of.

    Raises:
        DataError: unreadable, unknown keys, or values of a wrong type or range, which are named; no classes; splits
            that overlap, or folders called as splits are of which it is not clear what they are.
    """
    path = description(root) or root / FILE
    try:
        custom = _parse(read_yaml(path, DataError), root, classes)
        custom = replace(custom, splits=custom.splits or _splits_by_name(root / "images"))
        _refuse_overlaps(root, custom.splits)
        return custom
    except DataError as error:
        raise DataError(str(error), path) from error
    except OSError as error:  # images/ or annotations/ cannot be entered
        raise DataError(f"{error.filename}: {cause(error)}", path) from error
    except ValueError as error:
        raise DataError(f"{path}: {error}", path) from error


class _Wrong(ValueError):
    """A value in the file; the message need not name the file."""


def _part(root: Path, split: str, where: str) -> Part:
    images, labels = root / "images", root / "annotations"
    if _is_list(where):
        return Part(split, images, labels, names=root / where)
    if not os.path.isdir(labels / where) and where.casefold() in _DIRECTORIES.get(split, ()):
        return Part(split, images / where, labels / _directories_of(labels).get(split, where))
    return Part(split, images / where, labels / where)


def _is_list(where: str) -> bool:
    return where.casefold().endswith(".txt")


def _splits_by_name(images: Path) -> dict[str, str]:
    """Split -> folder, of the folders that are called as splits are."""
    splits = _directories_of(images)
    if not splits:
        return {}
    with os.scandir(images) as entries:
        left = sorted(e.name for e in entries if e.name not in splits.values() and not e.name.startswith("."))
    if odd := [name for name in left if os.path.isdir(images / name) and like_a_split(name)]:
        raise _Wrong(
            f"in {images} {in_short(splits.values())} are splits, but what is {in_short(odd)}? Say it in `splits`, "
            "or move it away"
        )
    if lost := [name for name in left if os.path.isdir(images / name) or Path(name).suffix.lower() in suffixes()]:
        warnings.warn(f"{images}: in no split: {in_short(lost)}; `splits` in {FILE} could name them", stacklevel=2)
    return splits


def _directories_of(directory: Path) -> dict[str, str]:
    names = sorted(path.name for path in directory.iterdir() if os.path.isdir(path)) if os.path.isdir(directory) else []
    splits = {}
    for split, words in _DIRECTORIES.items():
        found = [name for name in names if name.casefold() in words]
        if len(found) > 1:
            raise _Wrong(
                f"{in_short(found)} in {directory} would all be the split {split}; say in `splits` which one is"
            )
        if found:
            splits[split] = found[0]
    return splits


def _refuse_overlaps(root: Path, splits: dict[str, str]) -> None:
    places = {
        split: os.path.realpath(root / where if _is_list(where) else root / "images" / where)
        for split, where in splits.items()
    }
    for (one, place), (other, another) in itertools.combinations(places.items(), 2):
        if Path(place) in (Path(another), *Path(another).parents) or Path(another) in Path(place).parents:
            raise _Wrong(
                f"the splits {one} ({splits[one] or 'all'}) and {other} ({splits[other] or 'all'}) overlap: what is "
                "trained on would be scored, too; give each its own folder or list"
            )


def _parse(data: Any, root: Path, classes: ClassSet | None) -> CustomData:
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
    return CustomData(classes, ids, _splits(data.get("splits", {})))


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
