"""What the values in label files tell about labels that mean something else than they are taken for."""

from collections.abc import Mapping, Sequence

import numpy as np

from segmenter.data.label_files import Ids
from segmenter.data.layouts import in_short


def value_counts(values: np.ndarray) -> dict[int, int]:
    """Value -> pixels, of a label file (H, W), unsigned as `read_ids` gives it."""
    counts = np.bincount(values.ravel())
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


def nothing_to_learn(values: Mapping[int, int], ids: Ids, n_cls: int) -> bool:
    """Whether no pixel is of a class, or of no class but one although there are other values and other classes."""
    of_class, ignored, unknown = _sorted_out(values, ids, n_cls)
    return bool(values) and (not of_class or len(of_class) == 1 < n_cls and bool(ignored or unknown))


def advice(values: Mapping[int, int], ids: Ids, names: Sequence[str], custom: bool, whole: bool = True) -> list[str]:
    """What is odd about the values, and what to do, in words.

    Args:
        values: value in the label files, as it is there -> pixels that have it, in all files together.
        ids: what the values are taken for. names: of the classes. own: the data set has a dataset.yml to change.
        whole: these are all label files there are, so that it says something if a class does not occur.
    """
    of_class, ignored, unknown = _sorted_out(values, ids, len(names))
    if not values:
        return []
    first, found = int(ids.reduce_zero), in_short(sorted(values))
    above = [value for value in sorted(values) if value]
    texts = []
    if not of_class:
        texts.append(f"no pixel is of a class, the values are {found}: nothing can be learned from these labels")
    elif len(of_class) == 1 < len(names):
        texts.append(f"no class occurs but {_class(of_class[0], ids, names)}: nothing else can be learned")
    if not custom:
        return texts
    never = [value for value in range(first, first + len(names)) if value not in of_class]
    if 0 in values and above and not set(above) & set(of_class) and len(names) > 1 and _evenly_spread(above):
        texts.append(
            f"the values are {in_short([0, *above])}, as of masks made to be looked at: give the classes the values "
            f"{first}..{first + len(names) - 1}, so write {_rewritten(above)} in the label files"
        )
    elif unknown:
        text = f"of no class, as {len(names)} are named: {in_short(unknown)}; name more, or put that into ignore_index"
        zero = ", or, if 0 is no class, say reduce_zero: true" if unknown == [len(names)] and not first else ""
        texts.append(text + zero)
    elif whole and ignored and len(never) == 1 < len(names):
        texts.append(
            f"class {_class(never[0], ids, names)} never occurs, but the ignored {in_short(ignored)} does: if that is "
            f"the class, write {never[0]} in the label files"
        )
    if whole and of_class and not first and 0 in never:
        texts.append(
            "class 0 never occurs: if 0 is no class in the label files and 1 the first one, say reduce_zero: true"
        )
    if whole and of_class and first and len(names) in never:
        texts.append(f"class {len(names) - 1} never occurs: if 0 is a class in the label files, say reduce_zero: false")
    return texts


def _sorted_out(values: Mapping[int, int], ids: Ids, n_cls: int) -> tuple[list[int], list[int], list[int]]:
    """The values that are of a class, that are ignored, and that are neither; each sorted."""
    no_class = {*ids.ignored, *([0] if ids.reduce_zero else [])}
    ignored = [value for value in sorted(values) if value in no_class]
    rest = [value for value in sorted(values) if value not in no_class]
    last = n_cls - 1 + int(ids.reduce_zero)
    return [v for v in rest if v <= last], ignored, [v for v in rest if v > last]


def _class(value: int, ids: Ids, names: Sequence[str]) -> str:
    return f"{names[value - int(ids.reduce_zero)]!r} (value {value})"


def _evenly_spread(above: Sequence[int]) -> bool:
    """Whether values, with 0, are about equally far from each other, and not neighbours."""
    step = above[-1] / len(above)
    return step > 1.5 and all(abs(value - step * i) <= 1 for i, value in enumerate(above, 1))


def _rewritten(above: Sequence[int]) -> str:
    return in_short(f"{i} for {value}" for i, value in enumerate(above, 1))
