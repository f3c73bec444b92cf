"""`segmenter predict`."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmenter.cli import main
from segmenter.cli import predict as predict_module
from segmenter.images import read_image
from segmenter.model import Segmenter
from segmenter.visualize import overlay, with_legend
from tests.cli.tools import files, labels_of, load_json, picture


def test_predict_writes_what_the_model_says(trained, folder, photos, out, capsys):
    assert main(["predict", str(photos / "a.png"), "-m", folder, "-o", str(out), "--labels", "png,raw,npy"]) == 0
    assert files(out) == ["a.json", "a_labels.npy", "a_labels.png", "a_labels_raw.png", "a_overlay.png"]
    pixels, classes = read_image(photos / "a.png"), predict_module.choose_classes("camvid", trained)
    expected = trained.segment(pixels).numpy()
    assert len(np.unique(expected)) >= 3
    for name in ("a_labels.png", "a_labels_raw.png"):
        np.testing.assert_array_equal(labels_of(out / name), expected)
    np.testing.assert_array_equal(np.load(out / "a_labels.npy"), expected)
    with Image.open(out / "a_labels.png") as image:
        np.testing.assert_array_equal(np.array(image.convert("RGB")), classes.palette_array()[expected])
    shown = with_legend(overlay(pixels, expected, classes), expected, classes)
    np.testing.assert_array_equal(read_image(out / "a_overlay.png"), shown)

    result = load_json(out / "a.json")
    assert (result["width"], result["height"], result["weights"]) == (91, 70, "trained")
    assert sum(c["share"] for c in result["classes"]) == pytest.approx(1)
    counts = {i: n for i, n in enumerate(np.bincount(expected.flat)) if n}
    assert {c["id"]: c["pixels"] for c in result["classes"]} == counts
    assert all(c["name"] == classes.names[c["id"]] for c in result["classes"])
    captured = capsys.readouterr()
    assert "1 done, 0 skipped, 0 failed of 1" in captured.out
    assert captured.err == ""


def test_predict_hands_every_option_to_the_model(trained, folder, photos, out):
    options = ["--window-size", "48", "--window-stride", "30", "--scales", "0.75,1.5", "--flip", "--batch-size", "2"]
    options += ["--labels", "raw", "--no-overlay", "--dtype", "bfloat16"]
    assert main(["predict", str(photos / "b.png"), "-m", folder, "-o", str(out), *options]) == 0
    assert files(out) == ["b.json", "b_labels_raw.png"]
    kwargs = {"window_size": 48, "window_stride": 30, "scales": (0.75, 1.5), "flip": True, "dtype": "bfloat16"}
    expected = trained.segment(read_image(photos / "b.png"), batch_size=2, **kwargs).numpy()
    np.testing.assert_array_equal(labels_of(out / "b_labels_raw.png"), expected)
    for name in kwargs:
        others = {**kwargs, name: {"window_size": 64, "window_stride": 48, "scales": (1.0,)}.get(name)}
        if name not in ("flip", "dtype"):
            assert (trained.segment(read_image(photos / "b.png"), **others).numpy() != expected).any(), name


def test_predict_alpha_and_no_legend(trained, folder, photos, out):
    options = ["--alpha", "0", "--no-legend", "--labels", "none"]
    assert main(["predict", str(photos / "b.png"), "-m", folder, "-o", str(out), *options]) == 0
    assert files(out) == ["b.json", "b_overlay.png"]
    np.testing.assert_array_equal(read_image(out / "b_overlay.png"), picture(seed=1))


def test_predict_own_classes(folder, photos, out, tmp_path):
    own = [{"id": i, "name": f"thing {i}", "color": [i, 20 * i, 7]} for i in range(11)]
    (tmp_path / "own.json").write_text(json.dumps(own))
    argv = ["predict", str(photos / "b.png"), "-m", folder, "-o", str(out), "--palette", str(tmp_path / "own.json")]
    assert main(argv) == 0
    assert all(c["name"] == f"thing {c['id']}" for c in load_json(out / "b.json")["classes"])
    with Image.open(out / "b_labels.png") as image:
        assert image.getpalette()[30:33] == [10, 200, 7]


def test_folders_globs_and_names_that_clash(trained, folder, photos, out, tmp_path, capsys):
    for seed, name in ((11, "a.webp"), (12, "A.bmp")):
        Image.fromarray(picture(seed=seed)).save(photos / name)
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(picture(seed=9)).save(other / "a.png")
    (photos / "notes.txt").write_text("no picture, and not asked for by name")
    argv = ["predict", str(photos), str(other / "*.png"), str(photos / "b.png"), "-m", folder, "--no-overlay"]
    assert main([*argv, "-o", str(out)]) == 0
    names = [n for n in files(out) if n.endswith("_labels.png")]
    assert len(names) == 6, "five pictures of the folder and one of the glob; b.png counts once"
    assert "sub/a_labels.png" in names
    assert len({n.lower() for n in names}) == 6
    sources = set()
    for name in names:
        result = load_json(out / name.replace("_labels.png", ".json"))
        sources.add(result["image"])
        np.testing.assert_array_equal(labels_of(out / name), trained.segment(result["image"]).numpy())
    assert len(sources) == 6


def test_names_differ_where_file_systems_ignore_case():
    names = [job.name for job in predict_module.plan(["a.png", "A.jpg", "x/a.png", "y/a.png", "a.png"], Path("out"))]
    assert names == ["a", "A_jpg", "a_png", "a_png-2"]


def test_results_inside_the_input_folder_are_no_input(folder, photos):
    argv = ["predict", str(photos), "-m", folder, "-o", str(photos / "out")]
    assert main(argv) == 0
    before = files(photos)
    assert main(argv) == 0
    assert files(photos) == before
    assert len(before) == 3 + 9


def test_unreadable_files_are_reported_and_the_rest_is_done(folder, photos, out, capsys):
    (photos / "bad.png").write_bytes((photos / "a.png").read_bytes()[:100])
    argv = ["predict", str(photos), str(photos / "missing.png"), "-m", folder, "-o", str(out)]
    assert main(argv) == 3
    captured = capsys.readouterr()
    assert "3 done, 0 skipped, 2 failed of 5" in captured.out
    assert "bad.png: " in captured.err
    assert "missing.png: No such file" in captured.err
    assert "Traceback" not in captured.err
    failed = load_json(out / "failed.json")
    assert [Path(f["image"]).name for f in failed] == ["bad.png", "missing.png"]
    assert "b_labels.png" in files(out)
    assert not any(f.startswith("bad") for f in files(out))
    (photos / "bad.png").unlink()
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 0
    assert not (out / "failed.json").exists()


def test_a_picture_called_failed_keeps_its_json(folder, photos, out):
    (photos / "a.png").rename(photos / "failed.png")
    (photos / "b.png").write_bytes(b"no picture")
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 3
    assert load_json(out / "failed.json")[0]["image"].endswith("b.png")
    assert load_json(out / "failed_png.json")["classes"]


def test_a_picture_too_thin_for_the_window_fails_alone(folder, photos, out, capsys):
    Image.new("L", (30_000, 1)).save(photos / "thin.png")
    assert main(["predict", str(photos), "-m", folder, "-o", str(out), "--window-size", "512"]) == 3
    assert "thin.png: " in load_json(out / "failed.json")[0]["error"]


@pytest.fixture
def runs(monkeypatch):
    """How many pictures were segmented."""
    calls = []
    segment = Segmenter.segment

    def counted(self, image, **kwargs):
        calls.append(image.shape)
        return segment(self, image, **kwargs)

    monkeypatch.setattr(Segmenter, "segment", counted)
    return calls


def test_resume_skips_what_is_done_and_only_that(folder, photos, out, runs, capsys):
    argv = ["predict", str(photos), "-m", folder, "-o", str(out), "--resume"]
    assert main(argv) == 0
    assert len(runs) == 3
    assert main(argv) == 0
    assert len(runs) == 3
    assert "0 done, 3 skipped, 0 failed of 3" in capsys.readouterr().out
    (out / "a_overlay.png").unlink()
    (out / "b.json").write_text("{ half")
    assert main(argv) == 0
    assert len(runs) == 5
    assert (out / "a_overlay.png").exists()
    assert main([*argv, "--flip"]) == 0, "other settings: all again"
    assert len(runs) == 8
    assert main(argv[:-1]) == 0, "without --resume: all again"
    assert len(runs) == 11


def test_resume_does_not_take_another_picture_for_done(folder, photos, out, runs):
    for i, name in enumerate(("a.png", "sub/a.png")):
        assert main(["predict", str(photos / name), "-m", folder, "-o", str(out), "--resume"]) == 0
        assert len(runs) == i + 1
        assert load_json(out / "a.json")["image"] == str(photos / name)


def test_file_names_that_are_no_unicode(folder, tmp_path, out, capsys):
    path = os.path.join(tmp_path, "caf\udce9 ü.png")
    try:
        Image.fromarray(picture()).save(path)
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    argv = ["predict", path, "-m", folder, "-o", str(out), "--resume"]
    assert main(argv) == main(argv) == 0
    assert "0 done, 1 skipped" in capsys.readouterr().out
    assert load_json(out / "caf\udce9 ü.json")["image"] == path


def test_interrupted_run_leaves_whole_results_and_resumes(folder, photos, out, runs, monkeypatch, capsys):
    save = predict_module.save_label_png
    with monkeypatch.context() as patch:

        def interrupted(labels, path, *args):
            if path.name.startswith("b_"):
                raise KeyboardInterrupt
            save(labels, path, *args)

        patch.setattr(predict_module, "save_label_png", interrupted)
        assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 130
    captured = capsys.readouterr()
    assert captured.err == "segmenter: error: interrupted\n"
    assert (out / "a.json").exists()
    assert not (out / "b.json").exists(), "the JSON comes last"
    assert main(["predict", str(photos), "-m", folder, "-o", str(out), "--resume"]) == 0
    assert "2 done, 1 skipped" in capsys.readouterr().out


def test_warnings_are_one_line(folder, out, tmp_path, capsys):
    frames = [Image.fromarray(picture(seed=i)) for i in range(2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    showwarning = warnings.showwarning
    assert main(["predict", str(tmp_path / "moving.gif"), "-m", folder, "-o", str(out)]) == 0
    err = capsys.readouterr().err
    assert err.startswith("segmenter: warning: ")
    assert "only the first is used" in err
    assert err.count("\n") == 1
    assert warnings.showwarning is showwarning
