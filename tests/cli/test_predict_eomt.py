"""`segmenter predict` and `segmenter info` of a folder of EoMT."""

import json

import numpy as np
import pytest
from PIL import Image

from segmenter.cli import main
from segmenter.eomt import load_eomt
from segmenter.inference.images import read_image
from segmenter.visualize import overlay, with_legend
from tests.cli.tools import files, labels_of, load_json
from tests.support import eomt

if (reason := eomt.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

NAMES = ("grass", "sky", "water", "road", "roof", "tree")


@pytest.fixture(scope="module")
def eomt_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "eomt"
    eomt.write(folder, id2label=dict(enumerate(NAMES)))
    return str(folder)


def test_predict_writes_what_the_model_says(eomt_folder, photos, out):
    assert main(["predict", str(photos), "-m", eomt_folder, "-o", str(out), "--images", "2", "--dtype", "float32"]) == 0
    model = load_eomt(eomt_folder)
    for name in ("a", "b"):
        pixels = read_image(photos / f"{name}.png")
        expected = model.segment(pixels).numpy()
        np.testing.assert_array_equal(labels_of(out / f"{name}_labels.png"), expected)
        shown = with_legend(overlay(pixels, expected, model.classes), expected, model.classes)
        np.testing.assert_array_equal(read_image(out / f"{name}_overlay.png"), shown)
        with Image.open(out / f"{name}_labels.png") as image:
            palette = model.classes.palette_array()
            np.testing.assert_array_equal(np.array(image.convert("RGB")), palette[expected])
        result = load_json(out / f"{name}.json")
        assert {c["name"] for c in result["classes"]} == {NAMES[i] for i in np.unique(expected)}
        assert result["weights"] == "trained"
    assert "a_overlay.png" in files(out)


def test_resume_tells_other_preprocessing(eomt_folder, photos, out, tmp_path, capsys):
    command = ["predict", str(photos / "a.png"), "-m", eomt_folder, "-o", str(out), "--resume"]
    assert main(command) == main(command) == 0
    assert "0 done, 1 skipped" in capsys.readouterr().out
    settings = eomt_folder + "/preprocessor_config.json"
    with open(settings) as file:
        before = file.read()
    try:
        with open(settings, "w") as file:
            json.dump({**json.loads(before), "image_mean": [0.5, 0.5, 0.5]}, file)
        assert main(command) == 0
    finally:
        with open(settings, "w") as file:
            file.write(before)
    assert "1 done, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scales", "0.5,1"], "EoMT has no scales: its windows are those that it was trained with (32 pixels)"),
        (["--flip"], "EoMT has no flip"),
        (["--window-size", "64"], "EoMT has no window_size"),
        (["--n-cls", "3"], "is EoMT, which has no --n-cls"),
        (["--no-verify", "--allow-pickle"], "is EoMT, which has no --allow-pickle, --no-verify"),
    ],
    ids=str,
)
def test_options_of_other_models_are_refused(options, message, eomt_folder, photos, out, capsys):
    assert main(["predict", str(photos), "-m", eomt_folder, "-o", str(out), *options]) != 0
    assert message in capsys.readouterr().err
    assert not out.exists() or not files(out)


def test_other_commands_say_that_they_take_none(eomt_folder, photos, out, capsys):
    assert main(["attention", str(photos / "a.png"), "-m", eomt_folder, "-o", str(out)]) != 0
    assert "segmenter.load_eomt and `segmenter predict` take it" in capsys.readouterr().err


def test_broken_folders_are_errors_of_loading(tmp_path, photos, out, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "eomt"}')
    assert main(["predict", str(photos), "-m", str(tmp_path / "model"), "-o", str(out)]) != 0
    assert "has no preprocessor_config.json" in capsys.readouterr().err


def test_info(eomt_folder, capsys):
    assert main(["info", "-m", eomt_folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["model"]
    assert facts["impl"] == "eager" and facts["window_size"] == 32 and facts["weights"] == "trained"
    assert facts["config"]["num_queries"] == 9
    assert facts["config"]["preprocessing"]["do_split_image"] is True
    assert main(["info", "-m", eomt_folder]) == 0
    assert "eomt" in capsys.readouterr().out
