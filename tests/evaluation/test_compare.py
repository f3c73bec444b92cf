"""`segmenter compare` and what is behind it: figures, the part that is enlarged, the image, the command."""

import json

import numpy as np
import pytest
from PIL import Image

from segmenter.classes import ClassSet
from segmenter.cli import main
from segmenter.evaluation.boundary import boundary_scores
from segmenter.evaluation.compare import border_pixels, compare, telling_part
from segmenter.evaluation.comparison_figure import COLUMN, MAX_COLUMNS, choose_part, comparison_figure, make_panels
from segmenter.evaluation.evaluate import Protocol
from segmenter.evaluation.metrics import mean_iou, percent
from segmenter.visualize import enlarge, overlay
from tests.support.data_sets import make_data_set, paths, rectangles, save, smooth_noise
from tests.support.tiny import tiny_model

SIZE = (48, 80)
CLASSES = ClassSet(
    "five",
    ("road", "car", "person", "tree", "sky"),
    ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 90, 90)),
)


def small_model(patch_size, **overrides):
    model = tiny_model(seed=patch_size, patch_size=patch_size, image_size=(32, 32), n_layers=1, **overrides)
    model.info.weights = "random" if patch_size == 8 else "trained"
    return model


@pytest.fixture(scope="module")
def models():
    return {patch_size: small_model(patch_size) for patch_size in (32, 16, 8)}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Saved models of patch 32, 16 and 8; the last is not trained."""
    root = tmp_path_factory.mktemp("models")
    for patch_size, model in models.items():
        model.save_pretrained(root / f"p{patch_size}")
    return [str(root / f"p{patch_size}") for patch_size in models]


@pytest.fixture
def files(tmp_path):
    """An image and its labels, some of which do not count."""
    save(tmp_path / "a.png", smooth_noise(SIZE, 0))
    save(tmp_path / "truth.png", rectangles(SIZE, [*range(5), 255], 0))
    return tmp_path


@pytest.fixture(scope="module")
def subject(models):
    """pixels, truth, and what `compare` says of the three models."""
    pixels, truth = smooth_noise(SIZE, 0), rectangles(SIZE, [*range(5), 255], 0)
    return pixels, truth, [compare(f"p{p}", model, pixels, truth, repeats=1) for p, model in models.items()]


def expected_scores(labels, truth):
    scores = percent(mean_iou([labels], [truth], 5) | boundary_scores(labels, truth, 5))
    return {name: float(scores[name]) for name in ("bF", "bIoU", "mIoU", "aAcc")}


def test_figures_are_those_of_the_models_own_labels(models, subject):
    pixels, truth, compared = subject
    for (patch_size, model), got in zip(models.items(), compared, strict=True):
        labels = model.segment(pixels).numpy()
        assert len(np.unique(labels)) > 1
        np.testing.assert_array_equal(got.labels, labels)
        assert got.scores == expected_scores(labels, truth)
        assert got.patch_size == patch_size
        assert got.parameters == sum(p.numel() for p in model.parameters())
        assert (got.warning is None) == (patch_size != 8)
    # windows of 32 over 48 x 80: 2 rows of 3
    assert [(c.windows, c.tokens) for c in compared] == [(6, 6), (6, 6 * 4), (6, 6 * 16)]
    assert len({c.scores["bF"] for c in compared}) == 3


def test_windows_and_repeats_are_arguments_and_the_time_is_the_median(models, monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])
    monkeypatch.setattr("segmenter.evaluation.compare.time.perf_counter", lambda: next(clock))
    pixels = smooth_noise((20, 40), 1)
    got = compare("a", models[16], pixels, protocol=Protocol(window_size=40, dtype="float32"), repeats=3)
    assert got.milliseconds == (1000, 3000, 2000)
    assert got.median == 2000
    assert (got.windows, got.tokens) == (2, 2 * 9), "20 x 40 is run at 40 x 80, windows are padded to 48"
    assert got.scores == {}
    np.testing.assert_array_equal(got.labels, models[16].segment(pixels, window_size=40).numpy())


def test_part_is_where_predictions_differ_near_a_border():
    truth = np.zeros((100, 200), np.uint8)
    truth[:, 100:] = 1
    ours, theirs = truth.copy(), truth.copy()
    ours[70:90, 97:103] = 2  # at the border
    theirs[5:60, 10:80] = 2  # more, but far from it
    top, left = telling_part([ours, theirs], truth, 255, (30, 40))
    assert 60 <= top <= 70
    assert 63 <= left <= 97
    ignored = truth.copy()
    ignored[70:90] = 255
    ours[10:14, 100:102] = 2
    top, _ = telling_part([ours, theirs], ignored, 255, (30, 40))
    assert top <= 10, "what does not count is no difference"
    top, _ = telling_part([ours], truth, 255, (30, 40))
    assert 60 <= top <= 70, "a single model is compared with the truth"
    _, left = telling_part([truth, truth], None, 255, (30, 40))
    assert 50 < left < 110, "no difference: the border"


def test_border_pixels_are_between_classes_that_count():
    labels = np.uint8([[0, 0, 1, 255], [0, 0, 1, 255], [2, 2, 2, 255]])
    got = border_pixels(labels, labels != 255)
    np.testing.assert_array_equal(got, [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0]])


def test_panels_hold_image_predictions_and_truth(subject):
    pixels, truth, compared = subject
    part = choose_part([c.labels for c in compared], truth, 5)
    panels = make_panels(pixels, compared, truth, CLASSES, part)
    assert [p.title for p in panels] == ["photograph", "patch 32", "patch 16", "patch 8", "ground truth"]
    assert [p.warning for p in panels] == [None, None, None, "random weights: labels mean nothing", None]
    assert part.width * part.factor <= COLUMN
    rows, columns = slice(part.top, part.top + part.height), slice(part.left, part.left + part.width)
    np.testing.assert_array_equal(panels[0].zoom, enlarge(pixels[rows, columns], part.factor))
    assert {p.image.shape for p in panels} == {(288, 480, 3)}
    corner = np.zeros(SIZE, bool)
    corner[
        (slice(None, 8), slice(None, 8)) if part.top >= 8 or part.left >= 8 else (slice(-8, None), slice(-8, None))
    ] = 1
    inside = enlarge(corner, 6)  # a place that the frame does not cross
    shown = [*(c.labels for c in compared), np.where(truth == 255, 5, truth)]
    for panel, labels in zip(panels[1:], shown, strict=True):
        whole = enlarge(overlay(pixels, labels, CLASSES, 0.6), 6)
        np.testing.assert_array_equal(panel.image[inside], whole[inside])
        small = enlarge(overlay(pixels, labels, CLASSES, 0.7)[rows, columns], part.factor)
        lines = (panel.zoom == 255).all(2)
        assert 0 < lines.mean() < 0.5
        np.testing.assert_array_equal(panel.zoom[~lines], small[~lines])
    lines = [(panel.zoom == 255).all(2) for panel in panels[1:]]
    for other in lines[1:]:
        np.testing.assert_array_equal(other, lines[0], "the lines are those of the truth in every panel")
    assert dict(panels[3].facts)["boundary F"] == f"{compared[2].scores['bF']:.1f} %"
    assert dict(panels[3].facts)["tokens"] == "96"
    assert dict(panels[4].facts)["not labelled (dark)"] == f"{100 * np.mean(truth == 255):.1f} %"


def test_image_has_all_panels_banners_and_the_legend(subject):
    pixels, truth, compared = subject
    part = choose_part([c.labels for c in compared], truth, 5)
    got = comparison_figure(pixels, compared, truth, CLASSES, part, ["a note"])
    panels = make_panels(pixels, compared, truth, CLASSES, part)
    top, left = find(got, panels[0].image)
    step = COLUMN + (got.shape[1] - 2 * left - 5 * COLUMN) // 4
    places = [left + i * step for i in range(5)]
    for x, panel in zip(places, panels, strict=True):
        high = len(panel.image) - 40 * (panel.warning is not None)  # above the banner
        np.testing.assert_array_equal(got[top : top + high, x : x + COLUMN], panel.image[:high])
    red = (got == (200, 0, 0)).all(2)
    banner = np.flatnonzero(red.sum(0) > 30)
    assert places[3] <= banner[0] <= banner[-1] < places[4], "over the random model alone"
    below = got[top + len(panels[0].image) + len(panels[0].zoom) + 60 :]
    present = {*np.unique(np.concatenate([truth[truth != 255], *(c.labels.ravel() for c in compared)])).tolist()}
    for i, color in enumerate(CLASSES.palette):
        assert ((below == color).all(2).sum() > 400) == (i in present)
    assert (got[:, [0, -1]] == 255).all()
    assert (got[[0, -1]] == 255).all()


def find(image, part):
    """(top, left) of `part` in `image`."""
    corner = (image[: len(image) - len(part) + 1] == part[0, 0]).all(2)
    for y, x in zip(*np.nonzero(corner), strict=True):
        crop = image[y : y + len(part), x : x + part.shape[1]]
        if crop.shape == part.shape and (crop[0] == part[0]).all() and (crop == part).all():
            return int(y), int(x)
    raise AssertionError("the panel is not in the image")


def test_more_panels_than_fit_are_wrapped_and_thin_images_stay_small(subject):
    pixels, truth, compared = subject
    part = choose_part([compared[0].labels], truth, 5)
    one = comparison_figure(pixels, compared[:1], truth, CLASSES, part, ["a note"])
    six = comparison_figure(pixels, [compared[0]] * (MAX_COLUMNS - 1), truth, CLASSES, part, ["a note"])
    assert six.shape[1] == one.shape[1], "six in two rows are as wide as three in one"
    assert six.shape[0] > 1.6 * one.shape[0]
    thin = np.zeros((3000, 2), np.uint8)
    thin[1500:] = 1
    part = choose_part([thin], None, 5)
    panels = make_panels(np.zeros((3000, 2, 3), np.uint8), [], thin, CLASSES, part)
    for panel in panels:
        assert max(panel.image.shape) <= 720
        assert max(panel.zoom.shape) <= COLUMN
    assert panels[1].image[0, 0].argmax() == 0, "red above"
    assert panels[1].image[-1, 0].argmax() == 1, "green below"


def run(files, folders, *options):
    argv = ["compare", str(files / "a.png"), "-m", *folders, "--device", "cpu", "--repeats", "1"]
    return main([*argv, "-o", str(files / "out" / "c.png"), *options])


def test_command_with_a_truth_file(models, folders, files, capsys):
    assert run(files, folders, "--truth", str(files / "truth.png"), "--window-size", "48") == 0
    out, err = capsys.readouterr()
    assert f"WARNING: {folders[2]}: RANDOM WEIGHTS: LABELS MEAN NOTHING" in err
    assert err.count("WARNING") == 1
    data = json.loads((files / "out" / "c.json").read_text())
    pixels, truth = smooth_noise(SIZE, 0), rectangles(SIZE, [*range(5), 255], 0)
    assert (data["width"], data["height"], data["n_cls"], data["repeats"]) == (80, 48, 5, 1)
    assert data["device"].startswith("cpu, ")
    assert data["versions"]["torch"]
    for row, folder, (patch_size, model) in zip(data["models"], folders, models.items(), strict=True):
        labels = model.segment(pixels, window_size=48).numpy()
        assert {name: row[name] for name in ("bF", "bIoU", "mIoU", "aAcc")} == expected_scores(labels, truth)
        assert (row["path"], row["patch_size"], row["window_size"]) == (folder, patch_size, 48)
        assert (row["dtype"], row["name"]) == ("float32", f"p{patch_size}")
        assert row["milliseconds"] == row["milliseconds_each"][0] > 0
        assert f"bF {row['bF']}" in out
    assert [row["weights"] for row in data["models"]] == ["trained", "trained", "random"]
    assert data["models"][2]["warning"] == "random weights: labels mean nothing"
    with Image.open(files / "out" / "c.png") as image:
        assert image.width > 5 * COLUMN
    assert sorted(p.name for p in (files / "out").iterdir()) == ["c.json", "c.png"]


def test_command_with_a_sample_of_a_data_set(folders, models, files, capsys):
    root = make_data_set(files / "data", "folder", n=1, size=SIZE)
    image, label = (root / path for path in paths("folder", "test", 0))
    argv = ["compare", "-d", str(root), "--split", "test", "--sample", "test_0", "-m", folders[1], "--repeats", "1"]
    assert main([*argv, "--device", "cpu", "-o", str(files / "b.png")]) == 0
    data = json.loads((files / "b.json").read_text())
    assert data["image"] == str(image)
    assert data["data"] == {"root": str(root), "split": "test", "sample": "test_0"}
    labels = models[16].segment(np.asarray(Image.open(image))).numpy()
    assert data["models"][0]["bF"] == expected_scores(labels, np.asarray(Image.open(label)))["bF"]
    argv[argv.index("test_0")] = "test_9"
    assert main(argv) == 2
    assert "none of the 1 samples of test is called 'test_9'; the first are test_0" in capsys.readouterr().err


def test_command_without_truth_and_with_a_preset(folders, files, capsys):
    assert run(files, folders[:1]) == 0
    row = json.loads((files / "out" / "c.json").read_text())["models"][0]
    assert "bF" not in row
    assert "WARNING" not in capsys.readouterr().err
    assert run(files, [folders[0], "Seg-T-Mask/16"]) == 2
    err = capsys.readouterr().err
    assert f"numbers of classes differ: {folders[0]} 5, Seg-T-Mask/16 150; --n-cls" in err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--truth", "small.png"], 2, "small.png: 40 x 30 pixels, but"),
        (["--truth", "wrong.png"], 3, "wrong.png: no class has the value 7"),
        (["--truth", "missing.png"], 3, "missing.png: No such file"),
        (["--data", "."], 2, "give either an image, or --data and --sample"),
        (["--window-size", "32", "--window-stride", "33"], 1, "would leave pixels out"),
        (["-o", "c.jpg"], 2, "c.jpg: the figure is a PNG"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(folders, files, capsys, monkeypatch, options, status, message):
    monkeypatch.chdir(files)
    save(files / "small.png", rectangles((30, 40), [0, 1], 0))
    save(files / "wrong.png", rectangles(SIZE, [0, 7], 0))
    assert run(files, folders[:1], *options) == status
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (files / "out").exists()
