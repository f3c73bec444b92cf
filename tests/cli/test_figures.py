"""`segmenter figures`."""

import numpy as np
import pytest
from PIL import Image

from segmenter import figures
from segmenter.analysis import attention_statistics
from segmenter.cli import main
from segmenter.cli.figures_arguments import NAMES
from segmenter.figures import attention_panels
from tests.cli.tools import files, image, load_json
from tests.support.tiny import tiny_model

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Pictures of few dots, which are quick; tests/figures/test_page.py counts them."""
    monkeypatch.setattr("segmenter.figures.page.DPI", 50)


@pytest.fixture
def argv(folder, photos, out):
    return ["figures", str(photos / "a.png"), "-m", folder, "-o", str(out), "--device", "cpu"]


def of(*names):
    return sorted(f"{name}.{kind}" for name in names for kind in ("json", "pdf", "png"))


def test_all_six(trained, folder, argv, photos, out, tmp_path, capsys):
    tiny_model(n_cls=11, patch_size=32).save_pretrained(tmp_path / "P32")
    assert main(["predict", str(photos / "a.png"), "-m", str(tmp_path / "P32"), "-o", str(tmp_path / "labels")]) == 0
    argv += ["--models", folder, str(tmp_path / "P32"), "--other", f"P32={tmp_path / 'labels'}"]
    assert main([*argv, "--images", str(photos), "--truth", str(tmp_path / "labels"), "--class", "road"]) == 0
    said = capsys.readouterr()
    assert f"figures: 6 -> {out}" in said.out
    assert "left out" not in said.err and "RANDOM" in said.err, "P32 is not trained"
    assert files(out) == of(*NAMES)
    for name in NAMES:
        data = load_json(out / f"{name}.json")
        assert (data["figure"], data["command"], data["image"], data["model"]) == (name, "figures", argv[1], folder)
        assert data["options"]["chosen"] == ["road"] and "torch" in data["versions"]
        with Image.open(out / f"{name}.png") as png:
            assert len(np.unique(np.asarray(png.convert("L")))) > 50
    distances = load_json(out / "distance-by-depth.json")
    images = [str(photos / name) for name in ("a.png", "b.png", "sub/a.png")]
    assert [row["image"] for row in distances["images"]] == images
    each = [attention_statistics(trained, path).mean_distance.numpy() for path in images]
    np.testing.assert_allclose(distances["mean_distance"], np.mean(each, 0), rtol=1e-5)
    assert [look["id"] for look in load_json(out / "class-embeddings.json")["looks"]] == [3]
    (other, ours) = load_json(out / "qualitative.json")["looks"]
    assert (other["by"], other["mIoU"], ours["by"]) == ("P32", 100, "ours") and ours["mIoU"] < 100
    assert [look["mIoU"] for look in load_json(out / "patch-size.json")["looks"]][0] == 100


def test_what_needs_more_is_left_out_and_said(argv, out, capsys):
    assert main(argv) == 0
    said = capsys.readouterr()
    assert files(out) == of(*NAMES[1:5])
    assert "left out: patch-size: give --models" in said.err
    assert "left out: qualitative: give label files" in said.err
    assert "figures: 4" in said.out


def test_the_image_is_labelled_once(argv, monkeypatch):
    calls, segment = [], attention_panels.segment_image
    monkeypatch.setattr(attention_panels, "segment_image", lambda *args, **kw: calls.append(1) or segment(*args, **kw))
    assert main([*argv, "--only", "attention-by-layer,field-of-view,class-embeddings"]) == 0
    assert len(calls) == 1


def test_the_command_gives_what_the_functions_give(trained, argv, photos, out):
    options = ["--only", "field-of-view,attention-by-layer", "--large", "20", "40", "--small", "85", "66"]
    assert main([*argv, *options, "--layer", "1,0", "--point", "3", "4", "--size", "50"]) == 0
    assert files(out) == of("attention-by-layer", "field-of-view")
    path = photos / "a.png"
    view = figures.field_of_view(trained, path, large=(20, 40), small=(85, 66), layer=0, size=50)
    layers = figures.attention_by_layer(trained, path, points=[(3, 4)], layers=[1, 0], size=50)
    for figure in (view, layers):
        found = load_json(out / f"{figure.name}.json")
        assert found["options"]["layer"] == [1, 0] and found["weights"] == "trained"
        for look, expected in zip(found["looks"], figure.data["looks"], strict=True):
            np.testing.assert_allclose(look.pop("map"), expected.pop("map"), rtol=1e-4, atol=1e-7)
            assert look.keys() == expected.keys() and look["patch"] == expected["patch"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--only", "patch-size"], 2, "patch-size: give --models"),
        (["--only", "qualitative"], 2, "qualitative: give label files"),
        (["--only", "nothing"], 2, "expected some of patch-size"),
        (["--other", "labels"], 2, "expected a name and a folder"),
        (["--point", "500", "3"], 2, "attention-by-layer: point (500, 3) is outside the image of 91 x 70 pixels"),
        (["--only", "field-of-view", "--small", "3", "70"], 2, "field-of-view: point"),
        (["--only", "field-of-view", "--layer", "2"], 2, "layers 0..1"),
        (["--only", "class-embeddings", "--class", "unicorn"], 2, "class-embeddings: class 'unicorn'"),
        (["--models", "x", "x"], 2, "--models x is given twice"),
        (["--other", "a=x", "--other", "a=y"], 2, "--other a is given twice"),
        (["--only", "qualitative", "--other", "ours=x"], 2, "cannot be called 'ours'"),
        (["--images", "nowhere"], 2, "--images nowhere: no such folder"),
        (["--only", "qualitative", "--truth", "nowhere"], 2, "nowhere: no such folder"),
        (["--models", "nowhere", "nothing"], 4, "nowhere"),
        (["--rows", "nowhere.png", "--truth", "."], 1, "nowhere.png"),
    ],
)
def test_bad_input_ends_with_one_line_and_no_files(argv, out, capsys, options, status, message):
    assert main([*argv, *options]) == status
    said = capsys.readouterr()
    assert message in said.err
    assert not out.exists()


def test_images_that_cannot_be_read(argv, out, tmp_path, capsys):
    assert main(["figures", str(tmp_path / "missing.png"), *argv[2:]]) == 3
    assert "missing.png: No such file" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert main([*argv, "--images", str(tmp_path / "folder")]) == 2
    assert "no images in it" in capsys.readouterr().err
    (tmp_path / "folder" / "broken.png").write_bytes(b"\x89PNG nothing")
    assert main([*argv, "--images", str(tmp_path / "folder"), "--only", "distance-by-depth"]) == 1
    assert "broken.png" in capsys.readouterr().err
    assert not out.exists()


def test_a_linear_decoder_has_all_but_class_embeddings(photos, out, tmp_path, capsys):
    model = tiny_model(decoder={"name": "linear"})
    model.save_pretrained(tmp_path / "linear")
    assert main(["figures", str(photos / "b.png"), "-m", str(tmp_path / "linear"), "-o", str(out)]) == 0
    said = capsys.readouterr().err
    assert "left out: class-embeddings: a linear decoder has no class tokens" in said
    assert "RANDOM WEIGHTS" in said
    assert "class-embeddings.png" not in files(out)


def test_an_image_of_one_pixel(folder, out, tmp_path, capsys):
    Image.fromarray(image(1, 1)).save(tmp_path / "dot.png")
    assert main(["figures", str(tmp_path / "dot.png"), "-m", folder, "-o", str(out)]) == 0
    assert files(out) == of("attention-by-layer", "class-embeddings", "distance-by-depth")
    said = capsys.readouterr().err
    assert "left out: field-of-view: the prediction has one region alone" in said
    assert "warning" not in said.lower()
