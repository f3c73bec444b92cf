"""Labels that mean something else: what is odd about their values is said, with what to do, and before training."""

import re

import numpy as np
import pytest

from segmenter.cli import main
from segmenter.data.advice import advice, nothing_to_learn, value_counts
from segmenter.data.check import glance
from segmenter.data.datasets import DataError, open_dataset
from segmenter.data.label_files import Ids
from segmenter.training.loop import train
from tests.support.data_sets import SIZE, describe, make_data_set, save, smooth_noise
from tests.support.tiny_runs import tiny_recipe

TWO, THREE, FOUR, MANY = ["ground", "crack"], ["a", "b", "c"], list("abcd"), [f"c{i}" for i in range(150)]
VIEWED = "as of masks made to be looked at"
NOTHING_ELSE = "nothing else can be learned"
CASES = [  # values, reduce_zero, names -> parts of each text, in order
    ([0, 255], False, TWO, ["no class occurs but 'ground'", f"0, 255, {VIEWED}: .* 0..1, so write 1 for 255"]),
    ([0, 128], False, TWO, [NOTHING_ELSE, f"0, 128, {VIEWED}: .* write 1 for 128"]),
    ([0, 255], False, THREE, ["no class occurs but 'a'", "write 1 for 255"]),
    ([0, 85, 170, 255], False, FOUR, [NOTHING_ELSE, f"0, 85, 170 and 1 more, {VIEWED}.* 1 for 85, 2 for 170, 3 for"]),
    ([0, 127, 254], False, THREE, [NOTHING_ELSE, "write 1 for 127, 2 for 254"]),
    ([0, 128, 255], False, THREE, [NOTHING_ELSE, "write 1 for 128, 2 for 255"]),
    ([0, 255], True, TWO, ["no pixel is of a class, the values are 0, 255", "1..2, so write 1 for 255"]),
    ([255], False, TWO, ["no pixel is of a class, the values are 255"]),
    ([0], False, TWO, ["no class occurs but 'ground'"]),
    ([0, 1, 2, 3, 4], False, FOUR, ["of no class, as 4 are named: 4; .*, or, if 0 is .* reduce_zero: true"]),
    ([0, 1, 2, 7, 9], False, THREE, ["of no class, as 3 are named: 7, 9; .* into ignore_index$"]),
    ([1, 2, 3], False, FOUR, ["class 0 never occurs: if 0 is no class .* say reduce_zero: true"]),
    ([1, 2, 3], False, THREE, ["of no class, as 3 are named: 3; ", "class 0 never occurs"]),
    ([0, 1, 2], True, THREE, ["class 'c' .value 3. never .* ignored 0 does", "class 2 .*reduce_zero: false"]),
    ([0, 1, 255], False, THREE, ["class 'c' .value 2. never occurs, but the ignored 255 does: .* write 2 in"]),
    ([0, 2, 255], False, THREE, ["class 'b' .value 1. never occurs, but the ignored 255"]),
    ([0, 1], False, TWO, []),
    ([0, 1, 255], False, TWO, []),
    ([1, 2], True, TWO, []),
    ([0, 255], False, ["only"], []),
    ([0, 3, 9, 255], False, MANY, []),
    ([0, 85, 255], False, MANY, []),
    ([], False, TWO, []),
]  # fmt: skip


@pytest.mark.parametrize(("values", "reduce_zero", "names", "texts"), CASES)
def test_values_and_what_is_said_of_them(values, reduce_zero, names, texts):
    counts = value_counts(np.array([values, values], np.uint8))
    assert counts == dict.fromkeys(values, 2)
    told = advice(counts, Ids(reduce_zero), names, custom=True)
    assert len(told) == len(texts), told
    for text, pattern in zip(told, texts, strict=True):
        assert re.search(pattern, text), text


def test_of_some_files_or_of_known_data_sets_less_is_said():
    counts = {0: 5, 255: 5}
    known = advice(counts, Ids(), TWO, custom=False)
    assert known == ["no class occurs but 'ground' (value 0): nothing else can be learned"]
    assert advice({0: 1, 1: 1, 255: 1}, Ids(), THREE, custom=True, whole=False) == []


@pytest.mark.parametrize(
    ("values", "reduce_zero", "n_cls", "expected"),
    [([0, 255], False, 2, True), ([255], False, 2, True), ([255], False, 1, True), ([0], True, 1, True),
     ([0, 128], False, 2, True), ([7], False, 2, True), ([0], False, 2, False), ([0, 255], False, 1, False),
     ([0, 1, 255], False, 2, False), ([], False, 2, False)],
)  # fmt: skip
def test_when_there_is_nothing_to_learn(values, reduce_zero, n_cls, expected):
    assert nothing_to_learn(dict.fromkeys(values, 1), Ids(reduce_zero), n_cls) is expected


def masks(root, values, n=2, **entries):
    """A data set with a split train whose label files hold these values."""
    for i in range(n):
        save(root / f"images/train/{i}.png", smooth_noise(SIZE, i))
        save(root / f"annotations/train/{i}.png", np.resize(np.array(values, np.uint8), SIZE))
    describe(root, **{"classes": TWO, **entries})
    return root


def test_data_check_says_so(tmp_path, capsys):
    assert main(["data", "check", str(masks(tmp_path, [0, 255]))]) == 0
    err = capsys.readouterr().err
    assert "segmenter: warning: the values are 0, 255, as of masks made to be looked at: " in err
    assert "so write 1 for 255 in the label files\n" in err
    assert err.count("no class occurs but") == 1, "not for the one split again"
    save(tmp_path / "images/val/v.png", smooth_noise(SIZE, 9))
    save(tmp_path / "annotations/val/v.png", np.resize(np.array([0, 1], np.uint8), SIZE))
    assert main(["data", "check", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "segmenter: warning: train: the values are 0, 255" in err, "the other split does not hide it"
    assert main(["data", "check", str(masks(tmp_path / "bad", [0, 85, 170, 255], classes=FOUR))]) == 3
    assert "write 1 for 85, 2 for 170, 3 for 255" in capsys.readouterr().err, "of files that are bad, too"


def test_training_is_refused_when_nothing_can_be_learned(tmp_path):
    recipe = tiny_recipe(tmp_path, data=str(masks(tmp_path / "masks", [0, 255])), val_split=None, model="no model")
    with pytest.raises(DataError, match="split train, 2 of 2 label files looked at: no class .*; .*write 1 for 255"):
        train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_training_begins_with_what_is_odd(tmp_path, capsys):
    masks(tmp_path / "masks", [0, 1, 2, 3, 255], classes=list("abcde"))
    recipe = tiny_recipe(tmp_path, data=str(tmp_path / "masks"), val_split="train", epochs=1)
    outcome = train(recipe, tmp_path / "run", progress=False)
    err = capsys.readouterr().err
    assert outcome.step == outcome.total == 1
    assert "2 of 2 label files looked at: class 'e' (value 4) never occurs, but the ignored 255 does" in err
    assert "segmenter: warning: 2 of the 2 images of split train are trained on, too: their scores" in err
    train(recipe, tmp_path / "run", progress=False)
    assert "looked at" not in capsys.readouterr().err, "a run that goes on was told"
    train(tiny_recipe(tmp_path, epochs=1), tmp_path / "good", progress=False)
    assert capsys.readouterr().err == ""


def test_a_glance_is_bounded_and_passes_over_bad_files(tmp_path):
    data = open_dataset(masks(tmp_path, [0, 255], n=5))
    (told, *_) = glance(data, n=3)
    assert told.startswith(f"{tmp_path}: split train, 3 of 5 label files looked at: no class occurs but 'ground'")
    assert glance(data, seconds=-1) == []
    for sample in data.samples[:4]:
        sample.label.write_bytes(b"no image")
    with pytest.raises(DataError, match="5 of 5 label files looked at"):
        glance(data)
    make_data_set(tmp_path / "good")
    assert glance(open_dataset(tmp_path / "good")) == []
