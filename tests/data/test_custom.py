"""Data sets of one's own: which images are in which split, whatever the folders and lists are called."""

import os
import shutil

import numpy as np
import pytest

from segmenter.data import layouts
from segmenter.data.check import check_dataset
from segmenter.data.datasets import DataError, find_source, open_dataset
from tests.support.data_sets import SIZE, describe, make_data_set, rectangles, save, smooth_noise

CLASSES = list("abcde")
E_ACUTE, E_AND_ACCENT = "caf\u00e9", "cafe\u0301"


@pytest.fixture
def root(tmp_path):
    """Two samples in each of train, val and test, and no description."""
    make_data_set(tmp_path)
    (tmp_path / "dataset.yml").unlink()
    return tmp_path


def rename(root, name, new, kinds=("images", "annotations")):
    for kind in kinds:
        (root / kind / name).rename(root / kind / new)


def sample(root, name, label_name=None, seed=0):
    save(root / f"images/{name}.png", smooth_noise(SIZE, seed))
    save(root / f"annotations/{label_name or name}.png", rectangles(SIZE, [*range(5)], seed))


def test_both_endings_of_the_description_count_alike(root):
    (root / "dataset.yaml").write_text("classes: [a, b, c, d, e]\n")
    assert (open_dataset(root).key, open_dataset(root).classes.names) == ("folder", tuple("abcde"))
    (root / "dataset.yml").symlink_to("dataset.yaml")
    assert len(open_dataset(root)) == 2
    (root / "dataset.yml").unlink()
    describe(root, classes=CLASSES[::-1])
    with pytest.raises(DataError, match="has a dataset.yml and a dataset.yaml; one of them has to go"):
        open_dataset(root)
    (root / "dataset.yml").unlink()
    (root / "dataset.yaml").write_text("classes: 3")
    with pytest.raises(DataError, match="dataset.yaml: classes must be a list"):
        open_dataset(root)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("training", "validation", "testing"), ("Train", "valid", "Test"), ("train", "VAL", "test")],
)
def test_folders_called_as_elsewhere_are_the_splits(root, train, val, test):
    """All images in one split train would be validated on what is trained on."""
    describe(root, classes=CLASSES)
    for split, name in (("train", train), ("val", val), ("test", test)):
        rename(root, split, name) if split != name else None
    assert find_source(root).present() == ["train", "val", "test"]
    for split in ("train", "val", "test"):
        assert [s.name for s in open_dataset(root, split).samples] == [f"{split}_0", f"{split}_1"]


def test_labels_may_lie_in_folders_with_the_other_name(root):
    describe(root, classes=CLASSES)
    rename(root, "train", "training", ["annotations"])
    rename(root, "val", "validation", ["images"])
    for split in ("train", "val"):
        assert [s.name for s in open_dataset(root, split).samples] == [f"{split}_0", f"{split}_1"]


def test_two_folders_for_one_split_are_refused(root):
    describe(root, classes=CLASSES)
    shutil.copytree(root / "images/val", root / "images/validation")
    with pytest.raises(DataError, match="val, validation in .*images would all be the split val"):
        open_dataset(root)
    describe(root, classes=CLASSES, splits={"train": "train", "val": "val"})
    assert len(open_dataset(root, "val")) == 2


@pytest.mark.parametrize("name", ["val2017", "my_validation", "dev", "eval", "test-set", "trainval"])
def test_a_folder_that_is_called_like_a_split_is_never_guessed_about(root, name):
    describe(root, classes=CLASSES)
    rename(root, "val", name)
    with pytest.raises(DataError, match=f"train, test are splits, but what is {name}"):
        open_dataset(root)
    for split in ("train", "test"):
        shutil.rmtree(root / "images" / split)
        shutil.rmtree(root / "annotations" / split)
    sample(root, "x/a")
    with pytest.raises(DataError, match=rf"all in it would be the split train, .*\({name}\); say in `splits`"):
        open_dataset(root)
    describe(root, classes=CLASSES, splits={"train": "x", "val": name})
    assert [[s.name for s in open_dataset(root, split).samples] for split in ("train", "val")] == [
        ["a"], ["val_0", "val_1"]]  # fmt: skip


def test_splits_below_other_folders_are_not_mixed(root):
    describe(root, classes=CLASSES)
    for kind in ("images", "annotations"):
        for split in ("train", "val", "test"):
            shutil.move(root / kind / split, root / kind / "day" / split)
    with pytest.raises(DataError, match=r"folders in it are called as other splits are \(test, train, val\)"):
        open_dataset(root)


def test_a_folder_that_cannot_be_entered_is_named(root, monkeypatch):
    describe(root, classes=CLASSES)
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(root / "images"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="images: Permission denied"):
        open_dataset(root)


def test_images_in_no_split_are_warned_of(root):
    describe(root, classes=CLASSES)
    sample(root, "extra/a")
    sample(root, "loose")
    (root / "images/notes.txt").touch()
    with pytest.warns(UserWarning, match=r"images: in no split: extra, loose.png; `splits` in dataset.yml"):
        assert len(open_dataset(root)) == 2


@pytest.mark.parametrize(
    "splits",
    [{"train": "train", "val": "train"}, {"train": "", "val": "val"}, {"train": ".", "val": "val"},
     {"a": "val", "b": "./val/"}, {"train": "link", "val": "val"}, {"train": "l.txt", "val": "./l.txt"}],
)  # fmt: skip
def test_splits_that_overlap_are_refused(root, splits):
    (root / "images/link").symlink_to("val")
    describe(root, classes=CLASSES, splits=splits)
    with pytest.raises(DataError, match=r"dataset.yml: the splits .* overlap: what is trained on would be scored"):
        open_dataset(root)
    (root / "images/link").unlink()
    for split in ("images/val", "annotations/val"):
        shutil.rmtree(root / split)
        (root / split).symlink_to("train")
    describe(root, classes=CLASSES)
    with pytest.raises(DataError, match=r"the splits train \(train\) and val \(val\) overlap"):
        open_dataset(root)


def test_folders_that_only_begin_alike_do_not_overlap(root):
    rename(root, "val", "train2")
    describe(root, classes=CLASSES, splits={"train": "train", "val": "train2"})
    assert [s.name for s in open_dataset(root, "val").samples] == ["val_0", "val_1"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_as_editors_write_them(tmp_path, encoding, end):
    names = ["a", f"x/{E_ACUTE}", "b.v2", "c d"]
    for i, name in enumerate(names):
        sample(tmp_path, name, seed=i)
    describe(tmp_path, classes=CLASSES, splits={"train": "train.TXT"})
    lines = ["./a.png  ", "", f"x\\{E_AND_ACCENT}.png", "\tb.v2", "c d", ""]
    (tmp_path / "train.TXT").write_bytes(end.join(lines).encode(encoding))
    assert [s.name for s in open_dataset(tmp_path).samples] == sorted(names)


def test_lists_that_cannot_be_read(tmp_path):
    sample(tmp_path, "a")
    describe(tmp_path, classes=CLASSES, splits={"train": "train.txt"})
    (tmp_path / "train.txt").write_bytes(b"\xff\xfa")
    with pytest.raises(DataError, match="train.txt: is no text in UTF-8 .*; it must list the samples"):
        open_dataset(tmp_path)
    (tmp_path / "train.txt").unlink()
    os.mkfifo(tmp_path / "train.txt")
    with pytest.raises(DataError, match="train.txt: cannot be read .is no regular file"):
        open_dataset(tmp_path)


def test_lists_may_be_long(tmp_path):
    names = [f"a_folder/frame_{i:06}" for i in range(80_000)]
    (tmp_path / "l.txt").write_text("\n".join(names))
    assert (tmp_path / "l.txt").stat().st_size > 1_000_000
    assert layouts._read_names(tmp_path / "l.txt", {}) == names


@pytest.mark.parametrize("image, label", [(E_ACUTE, E_AND_ACCENT), (E_AND_ACCENT, E_ACUTE)])
def test_names_from_another_system_are_the_same(tmp_path, image, label):
    sample(tmp_path, f"{image}/{image}", f"{label}/{label}")
    describe(tmp_path, classes=CLASSES)
    (found,) = open_dataset(tmp_path).samples
    assert (found.name, found.image.stem, found.label.stem) == (f"{E_ACUTE}/{E_ACUTE}", image, label)
    sample(tmp_path, f"{label}/{label}")
    with pytest.raises(DataError, match="has the same name; one of them has to go"):
        open_dataset(tmp_path)


def test_loops_end_and_other_folders_with_two_names_are_warned_of(root):
    describe(root, classes=CLASSES)
    for name in ("l1", "l2"):
        (root / "images/train" / name).symlink_to(".")
    assert len(open_dataset(root)) == 2
    (root / "images/train/up").symlink_to("..")
    with pytest.warns(UserWarning, match="images/train/up: left out, it leads to a folder above"):
        assert len(open_dataset(root)) == 2


def test_check_tells_of_samples_in_two_lists_and_of_splits_without_labels(tmp_path):
    for i, name in enumerate("abc"):
        sample(tmp_path, name, seed=i)
    (tmp_path / "t.txt").write_text("a\nb\n")
    (tmp_path / "v.txt").write_text("b\nc\n")
    describe(tmp_path, classes=CLASSES, splits={"train": "t.txt", "val": "v.txt", "more": "more", "less": "less.txt"})
    (tmp_path / "images/more").mkdir()
    report = check_dataset(find_source(tmp_path))
    assert report.duplicates == ((tmp_path / "images/b.png",),)
    assert f"same bytes in several splits, 1 times: {tmp_path / 'images/b.png'}" in report.warnings
    images = tmp_path / "images"
    assert f"more: left out, there is {images / 'more'} but no {tmp_path / 'annotations/more'}" in report.warnings
    assert f"less: left out, there is {images} but no {tmp_path / 'less.txt'}" in report.warnings
    report = check_dataset(find_source(tmp_path), ["train", "trainval"])
    assert report.duplicates == ((tmp_path / "images/b.png",),)
    (tmp_path / "v.txt").write_text("c\n")
    assert check_dataset(find_source(tmp_path)).duplicates == ()


def test_check_warns_of_label_files_that_are_images_or_say_nothing(tmp_path):
    for name in "abc":
        sample(tmp_path, name)
    grey = rectangles(SIZE, [*range(5)], 3)
    save(tmp_path / "images/a.png", grey)
    save(tmp_path / "annotations/a.png", grey)
    save(tmp_path / "annotations/b.png", np.full(SIZE, 255, np.uint8))
    describe(tmp_path, classes=CLASSES)
    report = check_dataset(find_source(tmp_path))
    assert "train: 1 label files hold ignored pixels alone" in report.warnings
    assert "train: 1 label files are the image itself once more, byte for byte" in report.warnings


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_description_that_is_no_file_is_named(root, make):
    make(root / "dataset.yaml")
    with pytest.raises(DataError, match="dataset.yaml: cannot be read"):
        find_source(root)
    describe(root, classes=CLASSES)
    with pytest.raises(DataError, match="one of them has to go"):
        find_source(root)
