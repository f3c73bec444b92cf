"""Data sets are found, paired and read as they are, and what is wrong with them is named."""

import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from segmenter.classes import generic_classes
from segmenter.data.check import check_dataset
from segmenter.data.datasets import IDS, PUBLISHED, DataError, find_source, open_dataset
from segmenter.data.label_files import read_ids
from tests.support.data_sets import (
    COLORS,
    N_CLS,
    SIZE,
    UNUSED,
    describe,
    make_data_set,
    paths,
    save,
    smooth_noise,
)

PLACES = {  # as published, and as the published code's $DATASET folder has it
    "ade20k": ("", "ADEChallengeData2016", "ade20k/ADEChallengeData2016"),
    "pascal_context": ("", "VOCdevkit/VOC2010", "pcontext/VOCdevkit/VOC2010"),
    "cityscapes": ("", "cityscapes"),
    "camvid": ("", "camvid"),
    "segnet": ("", "CamVid"),
    "folder": ("",),
    "voc2012": ("", "VOC2012", "VOCdevkit/VOC2012"),
    "voc2012_aug": ("", "VOCdevkit/VOC2012"),
    "coco_stuff": ("", "coco_stuff164k", "dataset"),
    "mapillary_v1.2": ("", "mapillary"),
    "mapillary_v2.0": ("", "mapillary"),
    "loveda": ("", "LoveDA"),
    "potsdam": ("", "Potsdam"),
    "potsdam_no_boundary": ("",),
}
ON_DEMAND = ("voc2012_aug", "potsdam_no_boundary")  # another kind lies in the same folders
N = {"potsdam": (24, 14), "potsdam_no_boundary": (24, 14)}
NAMES = {
    "ade20k": ("ADE_train_00000001", "ADE_val_00000001"),
    "pascal_context": ("2008_000000", "2009_000000"),
    "cityscapes": ("aachen/aachen_000000_000019", "lindau/lindau_000000_000019"),
    "camvid": ("0001TP_00000", "0001TP_00000"),
    "segnet": ("0001TP_00000", "0001TP_00000"),
    "folder": ("train_0", "val_0"),
    "voc2012": ("2011_000000", "2012_000000"),
    "voc2012_aug": ("2011_000000", "2012_000000"),
    "coco_stuff": ("000000000000", "000000000000"),
    "mapillary_v1.2": ("0" * 22, "0" * 22),
    "mapillary_v2.0": ("0" * 22, "0" * 22),
    "loveda": ("Rural/0", "Rural/0"),
    "potsdam": ("top_potsdam_2_10", "top_potsdam_2_13"),
    "potsdam_no_boundary": ("top_potsdam_2_10", "top_potsdam_2_13"),
}


def stored(path):
    with Image.open(path) as image:
        return np.array(image)


def expected(kind, values):
    """What labels must be, written down for each kind apart."""
    values = values.astype(int)
    if kind.startswith("potsdam"):
        classes = {color: i for i, color in enumerate(COLORS)} | {(0, 0, 0): 255}
        return np.array([[classes[tuple(color)] for color in row] for row in values.tolist()])
    if kind == "coco_stuff":
        return np.vectorize(lambda v: 255 if v == 255 else v - sum(unused < v for unused in UNUSED))(values)
    if kind.startswith("mapillary"):
        return np.where(values == N_CLS[kind], 255, values)
    if kind in ("ade20k", "pascal_context_59", "loveda"):
        return np.where((values == 0) | (values == 255), 255, values - 1)
    return np.where(values == 11, 255, values) if kind in ("camvid", "segnet") else values


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in PLACES.items() for place in places])
def test_layouts_are_recognised_and_read(tmp_path, kind, place):
    base = make_data_set(tmp_path / place, kind)
    key = "camvid" if kind == "segnet" else kind
    for split, name, n in zip(("train", "val"), NAMES[kind], N.get(kind, (2, 2)), strict=True):
        data = open_dataset(tmp_path, split, kind if kind in ON_DEMAND else None)
        assert (data.key, data.split, data.n_cls, data.ignore_index, len(data)) == (key, split, N_CLS[key], 255, n)
        assert data.root == base
        first = data.samples[0]
        assert (first.name, first.image, first.label) == (name, *(base / path for path in paths(kind, split, 0)))
        for sample in data.samples:
            pixels, labels = data.read(sample)
            assert (pixels.dtype, labels.dtype, labels.shape) == (np.uint8, np.uint8, SIZE)
            np.testing.assert_array_equal(pixels, stored(sample.image))
            np.testing.assert_array_equal(labels, expected(kind, stored(sample.label)))
    assert pickle.loads(pickle.dumps(data)) == data  # processes that load data get it so


def test_pascal_context_of_59_classes_ignores_background(tmp_path):
    make_data_set(tmp_path, "pascal_context_59")
    data = open_dataset(tmp_path, kind="pascal_context_59")
    assert (data.key, data.n_cls, data.classes.names[0]) == ("pascal_context_59", 59, "aeroplane")
    values = stored(data.samples[0].label)
    assert {0, 255} & set(values.ravel().tolist())
    np.testing.assert_array_equal(data.read(data.samples[0])[1], expected("pascal_context_59", values))


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes", "camvid", "segnet", "folder", "voc2012", "loveda"])
def test_trainval_is_train_and_val_with_names_that_differ(tmp_path, kind):
    make_data_set(tmp_path, kind)
    names = [s.name for s in open_dataset(tmp_path, "trainval").samples]
    assert names == [f"{split}/{s.name}" for split in ("train", "val") for s in open_dataset(tmp_path, split).samples]
    assert len(set(names)) == 4


def test_splits_that_cannot_be(tmp_path):
    for kind in ("ade20k", "pascal_context", "cityscapes"):
        make_data_set(tmp_path / kind, kind)
    for kind in ("ade20k", "cityscapes"):
        with pytest.raises(DataError, match="labels of .*test are not public"):
            open_dataset(tmp_path / kind, "test")
    with pytest.raises(DataError, match="has no split 'trainval', only train, val"):
        open_dataset(tmp_path / "pascal_context", "trainval")
    (tmp_path / "pascal_context/ImageSets/SegmentationContext/val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt: No such file.*one name a line"):
        open_dataset(tmp_path / "pascal_context", "val")


def test_only_listed_samples_of_pascal_context_count(tmp_path):
    make_data_set(tmp_path, "pascal_context", n=3)
    listed = tmp_path / "ImageSets/SegmentationContext/train.txt"
    listed.write_text("2008_000002\n\n  2008_000000.jpg\n")
    assert [s.name for s in open_dataset(tmp_path).samples] == ["2008_000000", "2008_000002"]
    listed.write_text("2008_000001\n2008_000001\n")
    with pytest.raises(DataError, match="named twice: 2008_000001"):
        open_dataset(tmp_path)
    listed.write_text("2008_000001\n2010_9\n")
    with pytest.raises(DataError, match=r"2010_9\.\*: no such image, but its name is listed"):
        open_dataset(tmp_path)


def test_nothing_and_too_much_are_told(tmp_path):
    with pytest.raises(DataError, match="ade20k: .*pascal_context: .*cityscapes: .*camvid: .*of your own: dataset.yml"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="no cityscapes, neither here nor in cityscapes; looked for cityscapes: left"):
        open_dataset(tmp_path, kind="cityscapes")
    with pytest.raises(DataError, match="'imagenet' is unknown; choose one of ade20k"):
        open_dataset(tmp_path, kind="imagenet")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere")
    make_data_set(tmp_path / "cityscapes", "cityscapes")
    make_data_set(tmp_path / "camvid", "camvid")
    with pytest.raises(DataError, match="several data sets .*cityscapes in .*camvid in .*give its kind"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, kind="camvid").key == "camvid"


def test_own_images_are_not_taken_for_camvid(tmp_path):
    """They would get its classes without a word."""
    make_data_set(tmp_path)
    (tmp_path / "dataset.yml").unlink()
    with pytest.raises(DataError, match="of your own: dataset.yml"):
        open_dataset(tmp_path)


def test_images_and_labels_without_partner(tmp_path):
    make_data_set(tmp_path, n=6)
    for i in range(5):
        (tmp_path / paths("folder", "train", i)[1]).unlink()
    (tmp_path / paths("folder", "train", 5)[0]).unlink()
    first = r"\S+train_0.png: the image has no label, \S+annotations/train/train_0.png is missing"
    with pytest.raises(DataError, match=f"6 files lack their partner in split train: {first}.* and 3 more"):
        open_dataset(tmp_path)
    make_data_set(tmp_path / "city", "cityscapes", n=1)
    (tmp_path / "city" / paths("cityscapes", "val", 0)[1]).unlink()
    with pytest.raises(DataError, match="csCreateTrainIdLabelImgs"):
        open_dataset(tmp_path / "city", "val")
    save(tmp_path / "images/val/val_0.bmp", smooth_noise(SIZE, 0))
    with pytest.raises(DataError, match=r"val_0.png: val_0.bmp has the same name"):
        open_dataset(tmp_path, "val")


def grey_png(depth, row, width):
    """A grey PNG of one row, of a depth that Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, 0, 0, 0, 0)
    packed = zlib.compress(b"\0" + row)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("depth", "row", "ids"), [(1, b"\xa0", [1, 0, 1]), (2, b"\x1b", [0, 1, 2, 3]),
                                                   (4, b"\x0b\xf1", [0, 11, 15, 1])])  # fmt: skip
def test_ids_of_packed_greys(tmp_path, depth, row, ids):
    path = tmp_path / "label.png"
    path.write_bytes(grey_png(depth, row, len(ids)))
    assert read_ids(path).tolist() == [ids]


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_ids_are_never_converted(tmp_path, suffix):
    ids = np.arange(256, dtype=np.uint8).reshape(8, 32)
    image = Image.fromarray(ids)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(tmp_path / f"label.{suffix}")
    np.testing.assert_array_equal(read_ids(tmp_path / f"label.{suffix}"), ids)


def test_more_than_255_classes_take_16_bits(tmp_path):
    describe(tmp_path, classes=[f"c{i}" for i in range(300)], reduce_zero=True, ignore_index=[65535, 400])
    values = np.array([[0, 1, 256, 300, 65535, 400]], np.uint16)
    save(tmp_path / "images/a.png", smooth_noise((1, 6), 0))
    save(tmp_path / "annotations/a.png", values)
    data = open_dataset(tmp_path)
    _, labels = data.read(data.samples[0])
    assert (data.ignore_index, labels.dtype) == (65535, np.uint16)
    assert labels.tolist() == [[65535, 0, 255, 299, 65535, 65535]]
    describe(tmp_path, classes=[f"c{i}" for i in range(255)], reduce_zero=True, ignore_index=[300, 400, 256, 65535])
    data = open_dataset(tmp_path)
    _, labels = data.read(data.samples[0])
    assert (data.ignore_index, labels.dtype) == (255, np.uint8)
    assert labels.tolist() == [[255, 0, 255, 255, 255, 255]]


def broken(path, how):
    """Makes the label file at `path` wrong."""
    values = stored(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "text":
        path.write_text("not an image")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "colours":
        save(path, np.stack([values] * 3, -1))
    elif how == "jpeg":
        Image.fromarray(values).save(path, "JPEG")
    elif how == "pages":
        Image.fromarray(values).save(path, "GIF", save_all=True, append_images=[Image.fromarray(values[::-1])])
    elif how == "small":
        save(path, values[:-1])
    elif how == "turned":
        save(path, np.ascontiguousarray(values.T))
    elif how == "range":
        values = values.copy()
        values[3, 7], values[3, 8:10] = 77, 99
        save(path, values)


BROKEN = {
    "truncated": "truncated|broken",
    "text": "not an image, or not one of PNG",
    "empty": "the file is empty",
    "colours": r"this one holds colours \(mode RGB\); replace each colour by its id",
    "jpeg": "JPEG does not keep label values; store labels as PNG",
    "pages": "2 pages",
    "small": r"32 x 23 pixels, but \S+train_0.png has 32 x 24$",
    "turned": r"24 x 32 pixels, but \S+train_0.png has 32 x 24$",
    "range": r"no class has the value 77 \(1 px\), 99 \(2 px\), first at row 3, column 7; classes are 0..4, ignored",
}


@pytest.mark.parametrize("how", BROKEN)
def test_bad_labels_are_named(tmp_path, how):
    make_data_set(tmp_path)
    data = open_dataset(tmp_path)
    sample = data.samples[0]
    broken(sample.label, how)
    with pytest.raises(DataError, match=BROKEN[how]) as caught:
        data.read(sample)
    assert str(caught.value).startswith(f"{sample.label}: ")
    assert caught.value.file == sample.label
    data.read(data.samples[1])


def test_bad_images_are_named_and_turned_ones_explained(tmp_path):
    make_data_set(tmp_path)
    data = open_dataset(tmp_path)
    first, second = data.samples
    first.image.write_bytes(first.image.read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        data.read(first)
    assert str(caught.value).startswith(f"{first.image}: ")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored(second.image)).save(second.image, exif=exif)
    with pytest.raises(DataError, match=r"has 24 x 32 once turned upright \(EXIF orientation 6\); .*turn them, too"):
        data.read(second)


def test_advice_on_values_that_are_counted_wrongly(tmp_path):
    make_data_set(tmp_path)
    label = open_dataset(tmp_path).samples[0].label
    save(label, np.resize(np.arange(1, 6, dtype=np.uint8), SIZE))
    data = open_dataset(tmp_path)
    with pytest.raises(DataError, match="value 5 occurs and n_cls is 5: did you mean reduce_zero: true"):
        data.read(data.samples[0])
    describe(tmp_path, classes=list("abc"), reduce_zero=True)
    data = open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"value 4 \(\d+ px\), 5 .*classes are 1..3, ignored are 0, 255$"):
        data.read(data.samples[0])
    describe(tmp_path, classes=list("abcde"), ignore_index=200)
    save(label, np.resize(np.array([0, 255], np.uint8), SIZE))
    data = open_dataset(tmp_path)
    with pytest.raises(DataError, match="classes are 0..4, ignored are 200; did you mean ignore_index: 255"):
        data.read(data.samples[0])


def test_own_data_set_with_colours_sub_folders_and_splits(tmp_path):
    for name in ("x/a", "x/y/b", "c"):
        save(tmp_path / f"images/{name}.jpg", smooth_noise(SIZE, 0))
        save(tmp_path / f"annotations/{name}.png", np.full(SIZE, 1, np.uint8))
    save(tmp_path / "images/.hidden.jpg", smooth_noise(SIZE, 0))
    colours = [{"name": "no", "color": [1, 2, 3]}, {"name": "yes", "color": [4, 5, 6]}]
    describe(tmp_path, name="mine", classes=colours)
    data = open_dataset(tmp_path)
    assert [s.name for s in data.samples] == ["c", "x/a", "x/y/b"]
    assert (data.classes.name, data.classes.names, data.classes.palette) == (
        "mine",
        ("no", "yes"),
        ((1, 2, 3), (4, 5, 6)),
    )
    with pytest.raises(DataError, match="folder has no split 'val', only train"):
        open_dataset(tmp_path, "val")
    describe(tmp_path, classes="camvid", splits={"train": "x", "small": "lists/small.txt"})
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/small.txt").write_text("c\n")
    assert [s.name for s in open_dataset(tmp_path).samples] == ["a", "y/b"]
    assert [s.name for s in open_dataset(tmp_path, "small").samples] == ["c"]
    assert open_dataset(tmp_path).classes.name == "camvid"


def test_classes_from_outside(tmp_path):
    make_data_set(tmp_path)
    assert open_dataset(tmp_path, classes=generic_classes(5)).classes == generic_classes(5)
    with pytest.raises(DataError, match="has 5 classes, camvid names 11"):
        open_dataset(tmp_path, classes="camvid")
    with pytest.raises(DataError, match="neither a file nor one of"):
        open_dataset(tmp_path, classes="nothing")
    describe(tmp_path)
    assert open_dataset(tmp_path, classes=generic_classes(7)).n_cls == 7
    with pytest.raises(DataError, match="names no classes"):
        open_dataset(tmp_path)


WRONG = {
    "[1, 2]": "expected keys and values",
    "{classes: [a], palette: x}": "unknown key 'palette'; keys are name, classes",
    "{classes: [a], 3: x}": "unknown key 3",
    "{name: 3, classes: [a]}": "name must be text, found 3",
    "{classes: cityscape}": "'cityscape' is none of ade20k",
    "{classes: []}": "must be a list of names",
    "{classes: [yes, no]}": "name of class 0 must be text, found True; put it in quotes",
    "{classes: [a, a]}": "two classes are called 'a'",
    "{classes: [a, {name: b, color: [1, 2, 3]}]}": "class 1 is .*give all classes a name and a color",
    "{classes: [{name: b}]}": "class 0 must have the keys name and color",
    "{classes: [{name: b, color: [1, 2, 3], id: 0}]}": "and no others",
    "{classes: [{name: b, color: [1, 2, 300]}]}": "three integers 0..255, found .1, 2, 300.",
    "{classes: [a], ignore_index: -1}": "ignore_index must be an integer 0..65535",
    "{classes: [a], ignore_index: [true]}": "ignore_index must be",
    "{classes: [a], ignore_index: 0}": "ignore_index 0 is also class 'a'; .*reduce_zero: true",
    "{classes: [a, b], reduce_zero: true, ignore_index: [0, 2]}": "ignore_index 2 is also class 'b'$",
    "{classes: [a], reduce_zero: 1}": "reduce_zero must be true or false, found 1",
    "{classes: [a], splits: [train]}": "splits must be split: folder",
    "{classes: [a], splits: {train: 3}}": "found 'train': 3",
    "{classes: [a], splits: {train: ../x}}": "train must lie in the folder of the data set, found '../x'",
    "{classes: [a": "expected ',' or ']'",
    "!!python/object/apply:os.getcwd []": "could not determine a constructor",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_descriptions_are_named(tmp_path, text):
    (tmp_path / "dataset.yml").write_text(text)
    with pytest.raises(DataError, match=WRONG[text]) as caught:
        open_dataset(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'dataset.yml'}: ")


def test_linked_folders_are_followed(tmp_path):
    make_data_set(tmp_path / "real", "cityscapes")
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / "links" / folder / "train").mkdir(parents=True)
        os.symlink(tmp_path / "real" / folder / "train/aachen", tmp_path / "links" / folder / "train/aachen")
    assert len(open_dataset(tmp_path / "links")) == 2


def test_check_counts_pixels_and_images(tmp_path):
    make_data_set(tmp_path, "camvid", n=3)
    report = check_dataset(find_source(tmp_path), workers=2)
    assert [s.split for s in report.splits] == ["train", "val", "test"]
    for split in report.splits:
        values = np.stack([stored(s.label) for s in open_dataset(tmp_path, split.split).samples])
        np.testing.assert_array_equal(split.pixels, [(values == i).sum() for i in range(11)])
        np.testing.assert_array_equal(split.images, [(values == i).any((1, 2)).sum() for i in range(11)])
        assert split.ignored == (values == 11).sum() > 0
        assert (split.samples, dict(split.sizes), split.bad) == (3, {(32, 24): 3}, [])
        np.testing.assert_allclose(split.shares(), [(values == i).mean() for i in range(12)])
    assert (report.warnings, report.bad, report.duplicates) == ((), [], ())


def test_check_lists_every_bad_file_and_goes_on(tmp_path):
    make_data_set(tmp_path, n=12)
    samples = open_dataset(tmp_path).samples
    for sample, how in zip(samples, BROKEN, strict=False):
        broken(sample.label, how)
    for sample in (samples[0], samples[9]):
        sample.image.write_text("no image")
    samples[10].image.unlink()
    report = check_dataset(find_source(tmp_path), ["train"], workers=3)
    (train,) = report.splits
    both = [samples[0].image, samples[0].label]
    lonely = tmp_path / "images/train" / samples[10].name
    assert [e.file for e in train.bad] == [lonely, *both, *(s.label for s in samples[1:9]), samples[9].image]
    assert (train.samples, dict(train.sizes)) == (11, {(32, 24): 1})
    assert train.pixels.sum() + train.ignored == SIZE[0] * SIZE[1]


def test_check_warns_of_the_same_image_in_two_splits_and_of_odd_labels(tmp_path):
    make_data_set(tmp_path)
    train, val = (open_dataset(tmp_path, split).samples for split in ("train", "val"))
    val[1].image.write_bytes(train[0].image.read_bytes())
    for sample in train:
        save(sample.label, np.where(np.arange(32) < 20, 255, 2).astype(np.uint8) * np.ones((24, 1), np.uint8))
    describe(tmp_path, classes=list("abcde"), reduce_zero=True)
    report = check_dataset(find_source(tmp_path), ["train", "val"])
    assert report.duplicates == ((train[0].image, val[1].image),)
    assert f"same bytes in several splits, 1 times: {train[0].image} = {val[1].image}" in report.warnings
    assert "train: 62 % of the pixels are ignored" in report.warnings
    assert any(
        "class 4 never occurs: if 0 is a class in the label files, say reduce_zero: false" in w for w in report.warnings
    )
    describe(tmp_path, classes=list("abcde"))
    report = check_dataset(find_source(tmp_path), ["train"])
    assert report.never() == [0, 1, 3, 4]
    assert any("class 0 never occurs" in w and "reduce_zero: true" in w for w in report.warnings)
    report = check_dataset(find_source(tmp_path), ["train", "trainval", "train"])
    assert [s.split for s in report.splits] == ["train", "trainval"]
    assert report.duplicates == ((train[0].image, val[1].image),), "a file is no duplicate of itself"
    val[0].image.write_bytes(val[1].image.read_bytes())
    assert check_dataset(find_source(tmp_path), ["val"]).duplicates == (), "two in one split do not leak"


def test_published_settings_are_those_of_known_data_sets():
    assert PUBLISHED.keys() < IDS.keys()
    ade, context, city = (PUBLISHED[key] for key in ("ade20k", "pascal_context", "cityscapes"))
    assert PUBLISHED["pascal_context_59"] == context
    assert (ade.im_size * ade.max_ratio, context.im_size * context.max_ratio, city.im_size * city.max_ratio) == (
        2048,
        4160,
        2048,
    )
    iterations = [n // p.batch_size * p.epochs for n, p in ((20210, ade), (4996, context), (2975, city))]
    assert [round(i / 1000) for i in iterations] == [162, 80, 80]  # the paper: 160k, 80k, 80k
    assert [p.learning_rate for p in (ade, context, city)] == [1e-3, 1e-3, 1e-2]
    assert [(p.crop_size, p.window_size, p.window_stride) for p in (ade, context, city)] == [
        (512, 512, 512), (480, 480, 320), (768, 768, 512)]  # fmt: skip
