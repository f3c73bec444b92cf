"""Public data sets (`IDS` names them) and folders of one's own as samples of pixels and labels.

`open_dataset("ADEChallengeData2016", "val")` finds and pairs the files; `read` gives one sample as arrays.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from segmenter.classes import ClassesError, ClassSet, load_classes
from segmenter.data.custom import FILE, description, read_custom
from segmenter.data.label_files import DataError, Ids, ignore_index
from segmenter.data.layouts import LAYOUTS, Layout, Part, Sample, in_short, pair
from segmenter.inference.image_files import ImageError, orientation
from segmenter.inference.images import read_image

# The 171 of 0..181 that occur in COCO-Stuff's label files: of the first 91, the things of COCO, 11 have never been
# labelled (README.md and labels.txt of github.com/nightrome/cocostuff).
_COCO_STUFF = tuple(i for i in range(182) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90))
# The last one, of boundaries that the labels without boundaries leave out, is no class.
_POTSDAM = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0), (0, 0, 0))

IDS = {  # kind of data set -> what the values in its label files mean
    "ade20k": Ids(reduce_zero=True),  # 0 is "other"
    "pascal_context": Ids(),
    "pascal_context_59": Ids(reduce_zero=True),  # background does not count
    "cityscapes": Ids(),
    "camvid": Ids(ignored=(11,)),  # 11 is "unlabelled"
    "voc2012": Ids(),
    "voc2012_aug": Ids(),
    "coco_stuff": Ids(stored=_COCO_STUFF),
    "mapillary_v1.2": Ids(ignored=(65,)),  # "Unlabeled"
    "mapillary_v2.0": Ids(ignored=(123,)),  # "Unlabeled"
    "loveda": Ids(reduce_zero=True),  # 0 is "no data"
    "potsdam": Ids(ignored=(6,), colors=_POTSDAM),
    "potsdam_no_boundary": Ids(ignored=(6,), colors=_POTSDAM),
}
CUSTOM = "folder"
KINDS = (*IDS, CUSTOM)
_LAYOUT = {"pascal_context_59": "pascal_context"}  # kinds that lie on the disk as another does
_CLASSES = {"voc2012_aug": "voc2012", "potsdam_no_boundary": "potsdam"}  # kinds that have the classes of another


@dataclass(frozen=True)
class Published:
    """The published settings of training and evaluation on a data set.

    Attributes:
        epochs: passes over the training split. eval_freq: epochs from one evaluation to the next.
        batch_size: images a step, of all processes together. learning_rate: the initial one, of SGD.
        im_size: pixels of an image's short side, to which it is resized, its long side at most max_ratio times that.
        crop_size, window_size, window_stride: pixels; of training crops, and of the windows of evaluation.
    """

    epochs: int
    eval_freq: int
    batch_size: int
    learning_rate: float
    im_size: int
    max_ratio: int
    crop_size: int
    window_size: int
    window_stride: int


# config.yml of the published code (`dataset:`); max_ratio is that of the scales (2048, 512), (4160, 520), (2048, 1024).
PUBLISHED = {
    "ade20k": Published(64, 2, 8, 1e-3, 512, 4, 512, 512, 512),
    "pascal_context": Published(256, 8, 16, 1e-3, 520, 8, 480, 480, 320),
    "cityscapes": Published(216, 4, 8, 1e-2, 1024, 2, 768, 768, 512),
}
PUBLISHED["pascal_context_59"] = PUBLISHED["pascal_context"]


@dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes:
        key: its kind, one of KINDS. root: the folder where it lies. split: train, val, test, trainval ...
        classes: names and colours. samples: in the order of their names. ids: what the values in label files mean.
    """

    key: str
    root: Path
    split: str
    classes: ClassSet
    samples: tuple[Sample, ...]
    ids: Ids

    @property
    def n_cls(self) -> int:
        return len(self.classes)

    @property
    def ignore_index(self) -> int:
        """The label of pixels that do not count: 255, or 65535 for more than 255 classes."""
        return ignore_index(self.n_cls)

    def __len__(self) -> int:
        return len(self.samples)

    def spread(self, n: int) -> tuple[Sample, ...]:
        """`n` samples, or all if there are fewer, evenly spread over their order."""
        n = min(n, len(self))
        return tuple(self.samples[i * len(self) // n] for i in range(n))

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The image, upright, and its labels.

        Returns:
            pixels (H, W, 3) uint8 RGB; labels (H, W) uint8 (uint16 for more than 255 classes): 0..n_cls-1 or
            `ignore_index`.
        Raises:
            DataError: a file is unreadable, the sizes differ, or a value is no class; the message names the file.
        """
        pixels, labels = self.read_pixels(sample), self.read_labels(sample)
        self.check_sizes(sample, pixels, labels)
        return pixels, labels

    def read_pixels(self, sample: Sample) -> np.ndarray:
        """The image alone, as of `read`."""
        try:
            return read_image(sample.image)
        except ImageError as error:
            raise DataError(str(error), sample.image) from error

    def read_labels(self, sample: Sample) -> np.ndarray:
        """The labels alone, as of `read`; the size is not compared with the image's."""
        return self.ids.to_labels(self.ids.read(sample.label), self.n_cls, sample.label)

    def check_sizes(self, sample: Sample, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Raises DataError: the image (H, W, 3) and the labels (H, W) of a sample are not of the same size."""
        if labels.shape != pixels.shape[:2]:
            raise DataError(_sizes_differ(sample, pixels, labels), sample.label)


@dataclass(frozen=True)
class Source:
    """A data set that was found, before its files are listed.

    Attributes:
        splits: split -> its parts, whether they are there or not. unlabelled: splits whose labels are not public.
    """

    key: str
    base: Path
    classes: ClassSet
    ids: Ids
    splits: dict[str, tuple[Part, ...]]
    unlabelled: tuple[str, ...] = ()

    def present(self) -> list[str]:
        """The splits that are there and are not put together from others."""
        return [split for split, parts in self.splits.items() if len(parts) == 1 and parts[0].exists()]

    def listing(self, split: str) -> tuple[Dataset, list[DataError]]:
        """The samples of a split, and a problem for each image or label without partner.

        Raises:
            DataError: no such split, or a folder of it is missing or empty.
        """
        if split in self.unlabelled:
            raise DataError(f"{self.base}: the labels of {self.key}'s split {split} are not public", self.base)
        if split not in self.splits:
            raise DataError(f"{self.base}: {self.key} has no split {split!r}, only {', '.join(self.splits)}", self.base)
        samples, problems = [], []
        for part in self.splits[split]:
            found, missing = pair(part)
            if len(self.splits[split]) > 1:  # train and val may use the same names
                found = [replace(sample, name=f"{part.split}/{sample.name}") for sample in found]
            samples += found
            problems += missing
        samples.sort(key=lambda sample: sample.name)
        return Dataset(self.key, self.base, split, self.classes, tuple(samples), self.ids), problems


def open_dataset(
    root: str | Path, split: str = "train", kind: str | None = None, classes: ClassSet | str | Path | None = None
) -> Dataset:
    """A split of the data set in a folder, with every image and label paired.

    Args:
        root: the folder of the data set as published, or one above it as in the published code; see LAYOUTS, and
            `segmenter.data.custom` for folders of one's own.
        split: train, val, test or trainval, which is both with "train/" or "val/" before the names; or one of
            dataset.yml. Some data sets have no public labels for test.
        kind: one of KINDS; None: recognised by its folders. Pascal Context is taken as that of 60 classes unless
            "pascal_context_59" is said, VOC 2012 without the labels of SBD unless "voc2012_aug" is, and Potsdam with
            boundaries unless "potsdam_no_boundary" is.
        classes: other names and colours: a ClassSet, or what `load_classes` takes.
    Raises:
        DataError: not found or of several kinds, no such split, images without label, labels without image.
    """
    dataset, problems = find_source(root, kind, classes).listing(split)
    if problems:
        text = f"{len(problems)} files lack their partner in split {split}: {in_short(problems)}"
        raise DataError(text, dataset.root)
    return dataset


def find_source(root: str | Path, kind: str | None = None, classes: ClassSet | str | Path | None = None) -> Source:
    """Finds a data set, listing no files yet; arguments and errors are those of `open_dataset`."""
    root = Path(root)
    if kind is not None and kind not in KINDS:
        raise DataError(f"kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder", root)
    if kind == CUSTOM or (kind is None and description(root)):
        return _custom_source(root, _load(classes))
    layout, base = _find_layout(root, kind)
    key = kind or layout.key
    names = _fitting(_load(classes), load_classes(_CLASSES.get(key, key)), base)
    return Source(key, base, names, IDS[key], _with_trainval(layout.parts(base), key), layout.unlabelled)


def _find_layout(root: Path, kind: str | None) -> tuple[Layout, Path]:
    wanted = _LAYOUT.get(kind, kind)
    layouts = [layout for layout in LAYOUTS if wanted in (None, layout.key)]
    tried = [layout for layout in layouts if kind or not layout.on_demand]
    found = [(layout, base) for layout in tried for base in layout.bases(root, recognise=kind is None)]
    if not found:
        looked = "; ".join(f"{layout.key}: {layout.in_words()}" for layout in layouts)
        custom = f"; of your own: {FILE} beside images/ and annotations/" if kind is None else ""
        places = ", ".join(dict.fromkeys(place for layout in layouts for place in layout.places if place))
        what = kind or "data set of a known kind"
        raise DataError(f"{root}: no {what}, neither here nor in {places}; looked for {looked}{custom}", root)
    if len(found) > 1:
        several = ", ".join(f"{layout.key} in {base}" for layout, base in found)
        raise DataError(f"{root}: several data sets ({several}); open the folder of one, or give its kind", root)
    return found[0]


def _custom_source(root: Path, classes: ClassSet | None) -> Source:
    custom = read_custom(root, classes)
    return Source(
        CUSTOM, root, _fitting(classes, custom.classes, root), custom.ids, _with_trainval(custom.parts(root), CUSTOM)
    )


def _with_trainval(parts: dict[str, Part], key: str) -> dict[str, tuple[Part, ...]]:
    splits = {split: (part,) for split, part in parts.items()}
    if {"train", "val"} <= parts.keys() and _LAYOUT.get(key, key) != "pascal_context":  # which has never had one
        splits.setdefault("trainval", (parts["train"], parts["val"]))
    return splits


def _load(classes: ClassSet | str | Path | None) -> ClassSet | None:
    if classes is None or isinstance(classes, ClassSet):
        return classes
    try:
        return load_classes(classes)
    except ClassesError as error:
        raise DataError(str(error)) from error


def _fitting(asked: ClassSet | None, found: ClassSet, base: Path) -> ClassSet:
    if asked is not None and len(asked) != len(found):
        raise DataError(f"{base}: the data set has {len(found)} classes, {asked.name} names {len(asked)}", base)
    return asked or found


def _sizes_differ(sample: Sample, pixels: np.ndarray, labels: np.ndarray) -> str:
    (height, width), (label_height, label_width) = pixels.shape[:2], labels.shape
    text = f"{sample.label}: {label_width} x {label_height} pixels, but {sample.image} has {width} x {height}"
    try:
        turned = orientation(sample.image)
    except ImageError:
        turned = 1
    if turned not in range(5, 9):  # those that swap the sides
        return text
    return f"{text} once turned upright (EXIF orientation {turned}); labels are not: turn them, too"
