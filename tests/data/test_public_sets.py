"""VOC 2012, COCO-Stuff, Mapillary Vistas, LoveDA and Potsdam: what their files hold, and what is said of odd ones."""

import json
import resource

import numpy as np
import pytest
from PIL import Image

from segmenter.classes import load_classes
from segmenter.cli import main
from segmenter.cli.train_arguments import DATA_KINDS
from segmenter.data import label_files
from segmenter.data.check import check_dataset, glance
from segmenter.data.datasets import IDS, DataError, find_source, open_dataset
from segmenter.data.datasets import KINDS as ALL_KINDS
from segmenter.data.label_files import read_colors
from segmenter.data.layouts import LAYOUTS
from segmenter.evaluation.evaluate import Protocol, evaluate, predict_labels
from tests.support.data_sets import COLORS, N_CLS, UNUSED, make_data_set, paths, save, smooth_noise
from tests.support.tiny import tiny_model

KINDS = ("voc2012", "coco_stuff", "mapillary_v1.2", "mapillary_v2.0", "loveda", "potsdam")


def first(root, kind):
    """Files of the first sample of train: image, label."""
    return [root / path for path in paths(kind, "train", 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_command_reads_them(tmp_path, capsys, kind):
    make_data_set(tmp_path, kind)
    assert main(["data", "check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["n_cls"]) == (kind, N_CLS[kind])
    assert set(report["splits"]) == {"train", "val"}
    assert sum(row["pixels"] for row in report["splits"]["train"]["classes"]) > 0


@pytest.mark.parametrize("kind", [*KINDS, "voc2012_aug", "potsdam_no_boundary"])
def test_a_wrong_folder_is_told_what_was_looked_for(tmp_path, kind):
    wanted = {
        "voc2012": r"JPEGImages/\*\.\* and SegmentationClass/\*\.png with ImageSets/Segmentation/train\|val\.txt",
        "voc2012_aug": r"SegmentationClassAug/\*\.png with ImageSets/Segmentation/trainaug\|val\.txt",
        "coco_stuff": r"images/train2017\|val2017/\*\.\* and annotations/train2017\|val2017/\*\.png",
        "mapillary_v1.2": r"training\|validation/images/\*\.\* and training\|validation/v1\.2/labels/\*\.png",
        "mapillary_v2.0": r"training\|validation/images/\*\.\* and training\|validation/v2\.0/labels/\*\.png",
        "loveda": r"Train\|Val/\*/images_png/\*\.\* and Train\|Val/\*/masks_png/\*\.png",
        "potsdam": r"2_Ortho_RGB/\*_RGB\.\* and 5_Labels_all/\*_label\.tif",
        "potsdam_no_boundary": r"5_Labels_all_noBoundary/\*_label_noBoundary\.tif",
    }
    with pytest.raises(DataError, match=f"no {kind}, neither here nor in .*looked for {kind}: .*{wanted[kind]}"):
        open_dataset(tmp_path, kind=kind)
    (tmp_path / "Train").mkdir()  # as many a folder is called
    with pytest.raises(DataError, match="no data set of a known kind"):
        open_dataset(tmp_path)


def encoded(kind, labels):
    """Labels as the files of `kind` hold them, with ignored pixels in the upper left."""
    values = np.array(labels)
    values[:4, :6] = 255
    if kind.startswith("potsdam"):
        return np.array([*COLORS, *[(0, 0, 0)] * 250], np.uint8)[values]
    if kind == "coco_stuff":
        used = [i for i in range(182) if i not in UNUSED]
        return np.array([*used, *[255] * 85], np.uint8)[values]
    if kind.startswith("mapillary"):
        return np.where(values == 255, N_CLS[kind], values).astype(np.uint8)
    return (values + 1).astype(np.uint8) if kind == "loveda" else values  # 255 becomes 0


@pytest.mark.parametrize("kind", [*KINDS, "potsdam_no_boundary"])
def test_a_model_that_is_right_scores_so_whatever_the_files_hold(tmp_path, kind):
    make_data_set(tmp_path, kind, n=1)
    model = tiny_model(n_cls=N_CLS[kind], image_size=(32, 32))
    data = open_dataset(tmp_path, "val", kind)
    protocol = Protocol().of_model(model)
    for sample in data.samples:
        save(sample.label, encoded(kind, predict_labels(model, data.read_pixels(sample), protocol)))
        assert (data.read_labels(sample) == 255).sum() == 4 * 6
    scores = evaluate(model, data, protocol, boundary=False)
    assert scores["aAcc"] == 1 and scores["mIoU"] == 1


def test_flags_name_every_kind():
    assert DATA_KINDS.split(", ") == list(ALL_KINDS)


class TestVoc:
    def test_pascal_context_in_the_folder_of_voc_2010_is_not_voc_2012(self, tmp_path):
        make_data_set(tmp_path, "pascal_context")
        label = tmp_path / "SegmentationClass/2008_000000.png"
        save(label, np.zeros((24, 32), np.uint8))
        assert open_dataset(tmp_path).key == "pascal_context"

    def test_palettes_are_indices(self, tmp_path):
        make_data_set(tmp_path, "voc2012")
        image, label = first(tmp_path, "voc2012")
        values = np.array(Image.open(label))
        coloured = Image.fromarray(values)
        coloured.putpalette([c for color in load_classes("voc2012").palette for c in color])
        coloured.save(label)
        data = open_dataset(tmp_path)
        np.testing.assert_array_equal(data.read_labels(data.samples[0]), values)

    def test_labels_of_sbd_are_asked_for(self, tmp_path):
        """The list trainaug.txt and SegmentationClassAug for train; VOC's own labels for val."""
        make_data_set(tmp_path, "voc2012", n=1)
        make_data_set(tmp_path, "voc2012_aug", n=3)
        assert len(open_dataset(tmp_path)) == 1
        train, val = (open_dataset(tmp_path, split, "voc2012_aug") for split in ("train", "val"))
        assert len(train) == 3 and all(s.label.parent.name == "SegmentationClassAug" for s in train.samples)
        assert all(s.label.parent.name == "SegmentationClass" for s in val.samples)
        train.samples[0].label.unlink()
        with pytest.raises(DataError, match="SegmentationClassAug must hold the labels of VOC's own training images"):
            open_dataset(tmp_path, kind="voc2012_aug")


class TestCocoStuff:
    def test_the_numbers_of_labels_txt_are_counted_through(self, tmp_path):
        """Value i is line i + 1 of labels.txt; these are from there."""
        make_data_set(tmp_path, "coco_stuff", n=1)
        lines = {0: "person", 10: "fire hydrant", 12: "stop sign", 26: "backpack", 89: "toothbrush", 91: "banner",
                 109: "desk-stuff", 148: "road", 168: "tree", 181: "wood"}  # fmt: skip
        save(first(tmp_path, "coco_stuff")[1], np.resize(np.array([*lines, 255], np.uint8), (24, 32)))
        data = open_dataset(tmp_path)
        labels = data.read_labels(data.samples[0]).ravel()[: len(lines) + 1].tolist()
        assert [data.classes.names[i] for i in labels[:-1]] == list(lines.values()) and labels[-1] == 255

    @pytest.mark.parametrize("value", [11, 90, 182, 254])
    def test_numbers_without_class_are_named(self, tmp_path, value):
        make_data_set(tmp_path, "coco_stuff", n=1)
        values = np.zeros((24, 32), np.uint8)
        values[5, 7:9] = value
        save(first(tmp_path, "coco_stuff")[1], values)
        data = open_dataset(tmp_path)
        message = (
            rf"value {value} \(2 px\), first at row 5, column 7; classes are 0..181 but for {UNUSED[0]}, 25, .*255"
        )
        with pytest.raises(DataError, match=message):
            data.read(data.samples[0])
        (error,) = check_dataset(find_source(tmp_path), ["train"]).bad
        assert str(error).startswith(str(data.samples[0].label))

    def test_converted_labels_beside_them_are_left_alone(self, tmp_path):
        make_data_set(tmp_path, "coco_stuff", n=1)
        before = open_dataset(tmp_path)
        label = first(tmp_path, "coco_stuff")[1]
        save(label.with_name(f"{label.stem}_labelTrainIds.png"), np.zeros((24, 32), np.uint8))
        assert open_dataset(tmp_path) == before


def test_both_versions_of_mapillary_in_one_folder(tmp_path):
    for kind in ("mapillary_v1.2", "mapillary_v2.0"):
        make_data_set(tmp_path, kind)
    with pytest.raises(DataError, match=r"mapillary_v1.2 in .*mapillary_v2.0 in .*give its kind"):
        open_dataset(tmp_path)
    assert [open_dataset(tmp_path, kind=k).n_cls for k in ("mapillary_v1.2", "mapillary_v2.0")] == [65, 123]
    with pytest.raises(DataError, match="labels of mapillary_v1.2's split test are not public"):
        open_dataset(tmp_path, "test", "mapillary_v1.2")


def test_loveda_has_folders_in_folders(tmp_path):
    make_data_set(tmp_path, "loveda", n=4)
    names = [sample.name for sample in open_dataset(tmp_path).samples]
    assert names == ["Rural/0", "Rural/2", "Urban/1", "Urban/3"]
    save(tmp_path / "Train/Rural/preview/0.png", smooth_noise((24, 32), 0))
    assert [sample.name for sample in open_dataset(tmp_path).samples] == names
    (tmp_path / "Train/Urban/masks_png/1.png").unlink()
    with pytest.raises(DataError, match="1 files lack their partner"):
        open_dataset(tmp_path)


class TestPotsdam:
    def test_colours_are_those_of_the_classes(self):
        assert IDS["potsdam"].colors[:-1] == load_classes("potsdam").palette == tuple(COLORS)

    def test_the_tiles_are_those_of_the_challenge(self):
        """38 tiles, of which 24 had public labels while it ran."""
        listed = next(layout.listed for layout in LAYOUTS if layout.key == "potsdam")
        train, val = ({tuple(map(int, n.split("_")[2:])) for n in listed[split]} for split in ("train", "val"))
        assert (len(train), len(val), len(train | val)) == (24, 14, 38)
        assert {j for i, j in train if i == 6} == {7, 8, 9, 10, 11, 12} and {j for i, j in val if i == 6} == {
            13,
            14,
            15,
        }
        assert (7, 13) in val and (2, 13) in val and (2, 15) not in val

    def test_colours_a_little_off_are_taken_and_others_named(self, tmp_path):
        pixels = np.full((5, 4, 3), 255, np.uint8)
        pixels[1, 2] = 252, 255, 3
        save(tmp_path / "label.tif", pixels)
        assert read_colors(tmp_path / "label.tif", IDS["potsdam"].colors).tolist()[1] == [0, 0, 4, 0]
        pixels[3, 1] = 128, 0, 0
        save(tmp_path / "label.tif", pixels)
        message = r"label.tif: no class has the colour \(128, 0, 0\), first at row 3, column 1; colours are \(255, 255,"
        with pytest.raises(DataError, match=message):
            read_colors(tmp_path / "label.tif", IDS["potsdam"].colors)

    def test_rows_are_looked_up_in_parts(self, tmp_path, monkeypatch):
        values = np.random.default_rng(0).integers(0, 7, (11, 13))
        save(tmp_path / "label.png", np.array(IDS["potsdam"].colors, np.uint8)[values])
        for rows in (1, 4, 11, 100):
            monkeypatch.setattr(label_files, "_ROWS", rows)
            np.testing.assert_array_equal(read_colors(tmp_path / "label.png", IDS["potsdam"].colors), values)

    @pytest.mark.parametrize("how", ["grey", "jpeg", "alpha", "text"])
    def test_what_holds_no_colours_is_named(self, tmp_path, how):
        path, pixels = tmp_path / "label.tif", np.zeros((5, 4, 3), np.uint8)
        if how == "text":
            path.write_text("no image")
        elif how == "jpeg":
            Image.fromarray(pixels).save(path, "JPEG")
        else:
            save(path, pixels[..., 0] if how == "grey" else np.concatenate([pixels, pixels[..., :1]], -1))
        wanted = {"grey": "one colour a pixel .*mode is L", "alpha": "mode is RGBA", "jpeg": "JPEG does not keep"}
        with pytest.raises(DataError, match=wanted.get(how, "not an image")) as caught:
            read_colors(path, IDS["potsdam"].colors)
        assert str(caught.value).startswith(str(path))

    def test_a_glance_and_missing_tiles(self, tmp_path):
        make_data_set(tmp_path, "potsdam")
        assert glance(open_dataset(tmp_path)) == []
        image, label = first(tmp_path, "potsdam")
        label.unlink()
        with pytest.raises(DataError, match=r"top_potsdam_2_10_label\.tif is missing"):
            open_dataset(tmp_path)
        image.unlink()
        with pytest.raises(DataError, match=r"top_potsdam_2_10_RGB\.\*: no such image, but its name is listed"):
            open_dataset(tmp_path)

    def test_archives_may_have_a_folder_of_their_own(self, tmp_path):
        make_data_set(tmp_path, "potsdam")
        before = [sample.name for sample in open_dataset(tmp_path).samples]
        (tmp_path / "2_Ortho_RGB").rename(tmp_path / "inner")
        (tmp_path / "2_Ortho_RGB").mkdir()
        (tmp_path / "inner").rename(tmp_path / "2_Ortho_RGB/2_Ortho_RGB")
        data = open_dataset(tmp_path)
        assert [sample.name for sample in data.samples] == before
        save(tmp_path / "2_Ortho_RGB/top_potsdam_2_10_RGB.tif", smooth_noise((24, 32), 0))
        with pytest.raises(DataError, match=r"top_potsdam_2_10_RGB\.tif: .* has the same name; one of them has to go"):
            open_dataset(tmp_path)

    @pytest.mark.more
    def test_memory_of_a_whole_tile(self, tmp_path):
        """6000 x 6000 pixels of three bytes are 108 MB; looking them up takes 36 MB for the result and little else."""
        values = np.random.default_rng(0).integers(0, 6, (60, 60)).repeat(100, 0).repeat(100, 1)
        save(tmp_path / "label.tif", np.array(COLORS, np.uint8)[values])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        np.testing.assert_array_equal(read_colors(tmp_path / "label.tif", IDS["potsdam"].colors), values)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KB"
