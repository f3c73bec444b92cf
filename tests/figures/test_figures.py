"""The six figures: their numbers are those of the functions that they are made with, and stand in the picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter import figures
from segmenter.analysis import AnalysisError, attention, attention_statistics
from segmenter.classes import load_classes
from segmenter.data.label_files import DataError
from segmenter.evaluation.boundary import boundary_scores
from segmenter.evaluation.metrics import mean_iou
from segmenter.figures import FigureError, MissingInput
from segmenter.figures.attended_distance import RESNETS, STAGES, receptive_fields
from segmenter.figures.attention_panels import even_distances
from segmenter.inference.segment import segment_image
from segmenter.visualize import save_label_png
from tests.cli.tools import image
from tests.support.tiny import tiny_model

pytest.importorskip("matplotlib")
PIXELS = image(70, 91)


@pytest.fixture(scope="module")
def model():
    """Of 11 classes, two heads and two layers, said to be trained."""
    model = tiny_model(d_model=128, n_heads=2, n_cls=11)
    model.info.weights, model.info.classes = "trained", "camvid"
    return model


def texts(figure):
    found = [text.get_text() for text in figure.picture.texts]
    return found + [t.get_text() for axes in figure.picture.axes for t in (*axes.texts, axes.title)]


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def test_attention_by_layer(model):
    figure = figures.attention_by_layer(model, PIXELS, points=[(20, 68.5), (90, 3)], layers=[-1, 0])
    maps = attention(model, PIXELS, points=[(20, 68.5), (90, 3)], layers=[1, 0])
    looks = figure.data["looks"]
    assert [(look["patch"]["row"], look["patch"]["column"], look["layer"]) for look in looks] == [
        (4, 1, 1), (4, 1, 0), (0, 5, 1), (0, 5, 0),
    ]  # fmt: skip
    labels, names = segment_image(model, PIXELS), load_classes("camvid").names
    for i, look in enumerate(looks):
        expected = maps.mean[i % 2, i // 2]
        close(look["map"], expected)
        assert look["largest"] == pytest.approx(float(expected.max()))
        assert look["class"] == names[int(labels[(69, 24) if i < 2 else (8, 88)])]
        assert f"largest {100 * float(expected.max()):.2g} %" in texts(figure)
    assert {"a: layer 1", "a: layer 0", "b: layer 1", "b: layer 0", "a", "b"} <= set(texts(figure))
    assert {"image", "prediction", "segmentation map"} <= set(texts(figure))
    assert figure.data["image_size"] == {"height": 70, "width": 91, "unit": "pixels"}
    assert figure.data["grid"] == {"rows": 5, "columns": 6, "unit": "patches"}
    for i in np.unique(labels):
        assert f"{i} {names[i]}" in texts(figure), "the legend"


def test_a_scene_stands_for_its_image(model):
    scene = figures.scene(model, PIXELS, size=50)
    for make in (figures.attention_by_layer, figures.field_of_view, figures.class_embeddings):
        assert make(model, scene).data == make(model, PIXELS, size=50).data
    with pytest.raises(figures.FigureError, match="another model"):
        figures.field_of_view(tiny_model(), scene)


def test_the_framed_patch_is_the_one_that_looks(model):
    figure = figures.attention_by_layer(model, PIXELS, points=[(20, 40)], layers=[0])
    for axes in (figure.picture.axes[0], figure.picture.axes[3]):
        assert {patch.get_bbox().bounds for patch in axes.patches} == {(16, 32, 16, 16)}


def test_points_count_in_the_image_given(model):
    figure = figures.attention_by_layer(model, PIXELS, points=[(90, 69)], layers=[1], size=35)
    maps = attention(model, PIXELS, points=[(90, 69)], layers=[1], size=35)
    assert figure.data["image_size"]["height"] == 35
    assert figure.data["looks"][0]["patch"] == {"row": 2, "column": 2}
    close(figure.data["looks"][0]["map"], maps.mean[0, 0])


def test_layers_and_points_are_chosen(model):
    found = figures.attention_by_layer(model, PIXELS).data
    assert found["layers_of_encoder"] == 2
    assert {look["layer"] for look in found["looks"]} == {0, 1}
    for points, layers, match in (
        ([(91, 3)], None, "outside the image"),
        ([(3, 3)] * 5, None, "at most 4"),
        (None, [2], "layers 0..1"),
    ):
        with pytest.raises((AnalysisError, FigureError), match=match):
            figures.attention_by_layer(model, PIXELS, points=points, layers=layers)
    with pytest.raises(FigureError, match="no Segmenter"):
        figures.attention_by_layer(torch.nn.Identity(), PIXELS)


def test_points_may_be_arrays_and_must_be_pairs(model):
    scene = figures.scene(model, PIXELS)
    found = figures.attention_by_layer(model, scene, points=np.array([[20, 40]]), layers=[0]).data
    assert found["looks"][0]["patch"] == {"row": 2, "column": 1}
    found = figures.field_of_view(model, scene, large=np.array([20, 40]), small=torch.tensor([85, 66])).data
    assert [look["patch"]["column"] for look in found["looks"]] == [1, 5]
    for make in (
        lambda: figures.attention_by_layer(model, scene, points=(20, 40)),
        lambda: figures.field_of_view(model, scene, large=(1, 2, 3), small=(3, 3)),
    ):
        with pytest.raises(AnalysisError, match="points must be pairs"):
            make()


def test_field_of_view(model):
    figure = figures.field_of_view(model, PIXELS, large=(20, 40), small=(85, 66), layer=0)
    numbers = attention_statistics(model, PIXELS, layers=0)
    maps = attention(model, PIXELS, points=[(20, 40), (85, 66)], layers=0)
    distances = numbers.of_patches(numbers.distance)[0] * 16
    for i, (look, (row, column)) in enumerate(zip(figure.data["looks"], [(2, 1), (4, 5)], strict=True)):
        assert look["patch"] == {"row": row, "column": column}
        close(look["map"], maps.mean[0, i])
        close(look["mean_distance_by_head"], distances[:, row, column])
        assert look["mean_distance"] == pytest.approx(float(distances[:, row, column].mean()))
        assert any(f"mean distance {look['mean_distance']:.0f} pixels" in text for text in texts(figure))
        rings = [patch for patch in figure.picture.axes[2 + i].patches if hasattr(patch, "center")]
        assert {ring.radius for ring in rings} == {look["mean_distance"]}
        assert {ring.center for ring in rings} == {(24, 40) if i == 0 else (85.5, 67)}, "what is left of the patch"
    assert [look["object"] for look in figure.data["looks"]] == ["large", "small"]


def test_field_of_view_of_one_class_alone():
    model = tiny_model(n_cls=1, decoder={"name": "linear"})
    with pytest.raises(MissingInput, match="one region alone"):
        figures.field_of_view(model, PIXELS)
    found = figures.field_of_view(model, PIXELS, large=(1, 1), small=(90, 69))
    assert [look["share_of_region"] for look in found.data["looks"]] == [1, 1]


def test_distances_of_even_attention():
    places = torch.cartesian_prod(torch.arange(5.0), torch.arange(7.0)).double()
    close(even_distances((5, 7)), torch.cdist(places, places).mean(1).reshape(5, 7))


def test_class_embeddings(model):
    figure = figures.class_embeddings(model, PIXELS, chosen=["road", 8])
    maps = attention(model, PIXELS, part="decoder", classes=["road", 8])
    with torch.no_grad():
        masks = model.masks_of_pixels(torch.from_numpy(PIXELS.copy())[None])[0].softmax(0)
    labels = segment_image(model, PIXELS)
    for i, (look, class_id) in enumerate(zip(figure.data["looks"], (3, 8), strict=True)):
        assert (look["id"], look["class"]) == (class_id, load_classes("camvid").names[class_id])
        close(look["map"], maps.mean[0, i])
        close(look["mask"], masks[class_id])
        inside = labels[[8, 24, 40, 56, 69]][:, [8, 24, 40, 56, 72, 88]] == class_id
        expected = maps.mean[0, i]
        assert look["attention_on_its_patches"] == pytest.approx(float(expected[inside].sum() / expected.sum()))
        assert look["share_of_patches"] == pytest.approx(float(inside.double().mean()))
    assert {"3 Road", "8 Car", "its mask"} <= set(texts(figure))
    largest = figures.class_embeddings(model, PIXELS).data["looks"]
    assert largest[0]["id"] == int(labels.flatten().mode().values) and len(largest) <= 3


def test_class_embeddings_that_are_not_there(model):
    with pytest.raises(MissingInput, match="linear decoder"):
        figures.class_embeddings(tiny_model(decoder={"name": "linear"}), PIXELS)
    with pytest.raises(AnalysisError, match="one of Sky, Building"):
        figures.class_embeddings(model, PIXELS, chosen=["unicorn"])
    with pytest.raises(FigureError, match="at most 4"):
        figures.class_embeddings(model, PIXELS, chosen=[0, 1, 2, 3, 4])


def test_random_weights_are_told_in_the_picture():
    assert texts(figures.attention_by_layer(tiny_model(), PIXELS))[0] == "random weights: labels mean nothing"
    figure = figures.distance_by_depth(tiny_model(), [PIXELS])
    assert figure.picture.get_suptitle() == "random weights: labels mean nothing"


# ---------------------------------------------------------------------------------------------------------------------
# Distances


def test_distance_by_depth(model, tmp_path):
    Image.fromarray(image(40, 50, seed=1)).save(tmp_path / "b.png")
    figure = figures.distance_by_depth(model, [PIXELS, tmp_path / "b.png"])
    each = [attention_statistics(model, im).mean_distance for im in (PIXELS, tmp_path / "b.png")]
    mean = torch.stack(each).mean(0)
    close(figure.data["mean_distance"], mean)
    for row, expected, name in zip(figure.data["images"], each, ("image 0", str(tmp_path / "b.png")), strict=True):
        assert row["image"] == name
        close(row["mean_distance"], expected)
    dots = figure.picture.axes[0].collections[0].get_offsets()
    close(dots[:, 1], mean.flatten())
    places = np.asarray(dots[:, 0])
    assert len(set(places)) == 4, "heads that are equally far do not hide each other"
    close(places.round(), [0, 0, 1, 1])
    even = [even_distances(grid).mean() * 16 for grid in ((5, 6), (3, 4))]
    assert figure.data["mean_distance_if_even"] == pytest.approx(np.mean(even))
    lines = {line.get_label(): line.get_ydata() for line in figure.picture.axes[1].lines}
    close(lines["ResNet-50"], [3, 5, 17, 45, 133, 213])
    with pytest.raises(FigureError, match="no images"):
        figures.distance_by_depth(model, [])


def test_receptive_fields_as_published(model):
    """ResNet-50 of Araujo et al. has its strides elsewhere; these are torchvision's, and DeepLab's at stride 8."""
    found = figures.distance_by_depth(model, [PIXELS]).data["receptive_field"]
    assert found["stages"] == STAGES
    assert found["ResNet-50"] == [7, 11, 35, 91, 267, 427]
    assert found["ResNet-101"] == [7, 11, 35, 91, 811, 971]
    assert found["ResNet-152"] == [7, 11, 35, 155, 1291, 1451]
    assert found["ResNet-101, stride 8"] == [7, 11, 35, 91, 827, 1019]


def test_receptive_fields_are_what_gradients_reach():
    """Of convolutions as they are, all weights 1, in one dimension."""
    for blocks, strides, dilations in [((2, 3), (1, 2), (1, 1)), ((2, 2, 2), (1, 1, 2), (1, 2, 4)), *RESNETS.values()]:
        x = torch.zeros(1, 1, 3001, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.conv1d(x, torch.ones(1, 1, 7).double(), stride=2, padding=3)
        y = torch.nn.functional.conv1d(y, torch.ones(1, 1, 3).double(), stride=2, padding=1)
        for n, stride, dilation in zip(blocks, strides, dilations, strict=True):
            for block in range(n):
                options = {"stride": stride if block == 0 else 1, "padding": dilation, "dilation": dilation}
                y = torch.nn.functional.conv1d(
                    y / y.detach().max().clamp(min=1), torch.ones(1, 1, 3).double(), **options
                )
        reached = torch.autograd.grad(y[0, 0, y.shape[2] // 2], x)[0][0, 0].nonzero()[:, 0]
        assert int(reached.max() - reached.min()) + 1 == receptive_fields(blocks, strides, dilations)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Labels


@pytest.fixture(scope="module")
def sisters():
    return {f"P{p}": tiny_model(seed=p, n_cls=11, patch_size=p) for p in (8, 32, 16)}


def test_patch_size(sisters):
    truth = segment_image(sisters["P8"], PIXELS).numpy().copy()
    truth[:9] = 255
    figure = figures.patch_size(sisters, PIXELS, truth=truth)
    looks = figure.data["looks"]
    assert [(look["model"], look["patch_size"]) for look in looks] == [("P32", 32), ("P16", 16), ("P8", 8)]
    for look in looks:
        labels = segment_image(sisters[look["model"]], PIXELS)
        assert sum(look["pixels_by_class"].values()) == 70 * 91
        assert look["pixels_by_class"] == {f"class {i}": int((labels == i).sum()) for i in labels.unique()}
        miou = 100 * mean_iou([labels.numpy()], [truth], 11)["mIoU"]
        assert look["mIoU"] == pytest.approx(miou, abs=0.006)
        assert look["bF"] == pytest.approx(100 * boundary_scores(labels.numpy(), truth, 11)["bF"], abs=0.006)
        assert any(f"mIoU {look['mIoU']:.1f} %" in text for text in texts(figure))
    assert {"patch 32", "patch 16", "patch 8", "ground truth"} <= set(texts(figure))
    assert any("Black: not labelled" in text for text in texts(figure))
    box, zoom = figure.data["enlarged"], figure.picture.axes[5].images[0].get_array()
    np.testing.assert_array_equal(zoom, PIXELS[box["top"] :, box["left"] :][: box["height"], : box["width"]])


def test_patch_size_of_models_that_do_not_go_together(sisters):
    with pytest.raises(MissingInput, match="one model alone"):
        figures.patch_size({"P8": sisters["P8"]}, PIXELS)
    with pytest.raises(FigureError, match="numbers of classes differ: P8 11, other 5"):
        figures.patch_size({"P8": sisters["P8"], "other": tiny_model()}, PIXELS)
    with pytest.raises(FigureError, match="the truth has 91 x 69 pixels, the image 91 x 70"):
        figures.patch_size(sisters, PIXELS, truth=np.zeros((69, 91), np.uint8))
    with pytest.raises(FigureError, match="at most 3"):
        figures.patch_size({**sisters, "P4": sisters["P8"]}, PIXELS, truth=np.zeros((70, 91), np.uint8))


@pytest.fixture
def folders(tmp_path):
    """photos/{a,b}.png, and label files of them in other/ and truth/."""
    for name in ("photos", "other", "truth"):
        (tmp_path / name).mkdir()
    labels = np.random.default_rng(0).integers(0, 11, (2, 7, 9)).repeat(10, 1).repeat(10, 2)
    for i, name in enumerate("ab"):
        Image.fromarray(image(70, 90, seed=i)).save(tmp_path / "photos" / f"{name}.png")
        save_label_png(labels[i], tmp_path / "other" / f"{name}_labels.png", load_classes("camvid"))
        truth = labels[1 - i].copy()
        truth[:30] = 255
        save_label_png(truth, tmp_path / "truth" / f"{name}.png")
    return tmp_path


def test_qualitative(model, folders):
    paths = [folders / "photos" / f"{name}.png" for name in "ab"]
    figure = figures.qualitative(model, paths, others={"UperNet": folders / "other"}, truth=folders / "truth")
    looks = figure.data["looks"]
    assert [(look["image"], look["by"]) for look in looks] == [
        (str(path), by) for path in paths for by in ("UperNet", "ours")
    ]
    for look, path in zip(looks, [paths[0], paths[0], *[paths[1]] * 2], strict=True):
        truth = np.array(Image.open(folders / "truth" / path.name))
        ours = segment_image(model, path).numpy()
        other = np.array(Image.open(folders / "other" / f"{path.stem}_labels.png"))
        labels = ours if look["by"] == "ours" else other
        assert look["mIoU"] == pytest.approx(100 * mean_iou([labels], [truth], 11)["mIoU"], abs=0.006)
        names = load_classes("camvid").names
        assert look["pixels_by_class"] == {names[i]: int((labels == i).sum()) for i in np.unique(labels)}
    assert {"image", "UperNet", "ours", "ground truth"} <= set(texts(figure))
    assert len(figure.picture.axes) >= 8
    first_truth = figure.picture.axes[3].images[0].get_array()
    assert (first_truth[:30] < 110).all(), "what is not labelled is dark"
    without = figures.qualitative(model, paths, others={"UperNet": folders / "other"})
    assert "mIoU" not in without.data["looks"][0] and "ground truth" not in texts(without)


def test_label_files_that_do_not_fit(model, folders):
    path = folders / "photos" / "a.png"
    with pytest.raises(MissingInput, match="nothing to show beside"):
        figures.qualitative(model, [path])
    with pytest.raises(FigureError, match=r"no such folder"):
        figures.qualitative(model, [path], truth=folders / "nowhere")
    with pytest.raises(FigureError, match=r"no label file of .*c\.png; wanted c\.png or c_labels\.png"):
        Image.fromarray(image()).save(folders / "photos" / "c.png")
        figures.qualitative(model, [folders / "photos" / "c.png"], truth=folders / "truth")
    with pytest.raises(FigureError, match="1 to 4 images"):
        figures.qualitative(model, [path] * 5, truth=folders / "truth")
    save_label_png(np.zeros((3, 4), np.uint8), folders / "truth" / "a.png")
    with pytest.raises(FigureError, match="4 x 3 pixels, the image 90 x 70"):
        figures.qualitative(model, [path], truth=folders / "truth")
    save_label_png(np.full((70, 90), 77, np.uint8), folders / "truth" / "a.png")
    with pytest.raises(DataError, match="no class has the value 77"):
        figures.qualitative(model, [path], truth=folders / "truth")
