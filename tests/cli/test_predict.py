"""`segmenter predict`."""

import errno
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter.cli import main
from segmenter.cli.arguments import build_parser
from segmenter.cli.commands import predict as predict_module
from segmenter.cli.errors import CommandError
from segmenter.cli.resume import model_fingerprint
from segmenter.inference import stream as stream_module
from segmenter.inference.images import read_image
from segmenter.visualize import overlay, with_legend
from tests.cli.tools import files, image, labels_of, load_json
from tests.support.tiny import tiny_model


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
    np.testing.assert_array_equal(read_image(out / "b_overlay.png"), image(seed=1))


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
        Image.fromarray(image(seed=seed)).save(photos / name)
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(image(seed=9)).save(other / "a.png")
    (photos / "notes.txt").write_text("no image, and not asked for by name")
    argv = ["predict", str(photos), str(other / "*.png"), str(photos / "b.png"), "-m", folder, "--no-overlay"]
    assert main([*argv, "-o", str(out)]) == 0
    names = [n for n in files(out) if n.endswith("_labels.png")]
    assert len(names) == 6, "five images of the folder and one of the glob; b.png counts once"
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


def test_linked_folders_are_labelled_and_loops_end(folder, photos, out, tmp_path, capsys):
    Image.fromarray(image(seed=3)).save(tmp_path / "c.png")
    (tmp_path / "disk").mkdir()
    (tmp_path / "c.png").rename(tmp_path / "disk/c.png")
    (photos / "day").symlink_to(tmp_path / "disk")
    (photos / "other").symlink_to("sub")
    for name in ("loop1", "sub/loop2"):
        (photos / name).symlink_to(photos)
    assert main(["predict", str(photos), str(photos), "-m", folder, "-o", str(out), "--no-overlay"]) == 0
    assert [n for n in files(out) if n.endswith(".json")] == ["a.json", "b.json", "day/c.json", "sub/a.json"]
    left_out = f"segmenter: warning: {photos}/other: left out, it is the same folder as {photos}/sub\n"
    assert capsys.readouterr().err == left_out


def test_every_extension_that_is_read_is_an_image(tmp_path):
    names = ["a.jfif", "b.jpe", "c.JPG", "d.tif", "e.TIFF", "f.mpo", "g.pnm", "h.bmp", "i.apng", "j.webp"]
    for name in (*names, "l.txt", "m.pdf", "n.eps"):
        (tmp_path / name).touch()
    assert [job.source.name for job in predict_module.plan([str(tmp_path)], tmp_path / "out")] == names


def test_a_folder_that_cannot_be_entered_is_named(folder, photos, out, monkeypatch, capsys):
    scandir = os.scandir

    def refusing(path):
        if Path(path) in (photos / "sub", photos / "empty"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    (photos / "empty").mkdir()
    monkeypatch.setattr(os, "scandir", refusing)
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert f"warning: {photos / 'sub'}: cannot be entered (Permission denied)" in captured.err
    assert "2 done, 0 skipped, 0 failed of 2" in captured.out
    assert main(["predict", str(photos / "empty"), "-m", folder, "-o", str(out)]) == 2
    assert "empty: cannot be entered (Permission denied)" in capsys.readouterr().err


def test_what_is_called_an_image_and_is_none_fails_alone(folder, photos, out):
    (photos / "gone.png").symlink_to("nowhere.png")
    (photos / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(photos / "pipe.png")
    (photos / "x.jpg").mkdir()
    (photos / "a.png").rename(photos / "x.jpg/a.png")
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 3
    failed = [Path(f["image"]).name for f in load_json(out / "failed.json")]
    assert failed == ["gone.png", "pipe.png", "self.jpg"]
    assert "x.jpg/a.json" in files(out)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.png", ["a.png", "b.png", "sub/a.png"]),
        ("**", ["a.png", "b.png", "sub/a.png", "sub/t.txt"]),
        ("**/sub/**/a.*", ["sub/a.png"]),
        ("s*/**/*.png", ["sub/a.png"]),
        ("s*/**/x.png", None),
        ("*/*.png", ["sub/a.png"]),
    ],
)
def test_patterns_with_two_stars_do_not_go_round_in_circles(photos, out, pattern, expected):
    (photos / "sub/t.txt").touch()
    for name in ("loop1", "loop2", "sub/loop3"):
        (photos / name).symlink_to(photos)
    if pattern[:2] != "**":  # else they are named
        for name in ("loop1", "loop2", "sub/loop3"):
            (photos / name).unlink()
    if expected is None:
        with pytest.raises(CommandError, match="no file matches"):
            predict_module.plan([f"{photos}/{pattern}"], out)
    else:
        jobs = predict_module.plan([f"{photos}/{pattern}"], out)
        assert [job.source.relative_to(photos).as_posix() for job in jobs] == expected


def test_names_differ_where_file_systems_know_one_unicode_form():
    jobs = predict_module.plan(["x/caf\u00e9.png", "y/cafe\u0301.png", "z/CAFE\u0301.png"], Path("out"))
    assert [job.name for job in jobs] == ["caf\u00e9", "cafe\u0301_png", "CAFE\u0301_png-2"]


def test_planning_does_the_same_for_each_image_however_many_there_are(tmp_path, monkeypatch):
    work = []
    for place, name in ((predict_module, "_key"), (os.path, "realpath")):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, f=original, n=name, **k: work.append(n) or f(*a, **k))
    args = build_parser().parse_args(["predict", "x", "-m", "M"])

    def counted(inputs):
        work.clear()
        jobs = predict_module.plan(inputs, tmp_path / "out")
        predict_module._refuse_to_overwrite(jobs, tmp_path / "out", args)
        assert len({job.name.casefold() for job in jobs}) == len(jobs)
        return len(jobs), work.count("_key"), work.count("realpath")

    for i in range(400):
        (tmp_path / "film").mkdir(exist_ok=True)
        (tmp_path / f"film/{i:03}.jpg").touch()
    n, keys, resolved = counted([str(tmp_path / "film")])
    assert (n, resolved) == (400, resolved) and resolved < 10
    assert keys < 10 * n
    n, keys, _ = counted([f"{i}/a.png" for i in range(400)])
    assert keys < 14 * n


def test_results_inside_the_input_folder_are_no_input(folder, photos):
    argv = ["predict", str(photos), "-m", folder, "-o", str(photos / "out")]
    assert main(argv) == 0
    before = files(photos)
    assert main(argv) == 0
    assert files(photos) == before
    assert len(before) == 3 + 9


@pytest.mark.parametrize("way", ["{photos}", "{photos}/sub/..", "{link}"])
def test_the_output_folder_is_no_input_folder(folder, photos, tmp_path, capsys, way):
    (tmp_path / "link").symlink_to(photos)
    output = way.format(photos=photos, link=tmp_path / "link")
    before = files(photos)
    assert main(["predict", str(photos / "sub"), str(photos), "-m", folder, "-o", output]) == 2
    assert "the input folder is the output folder; choose another --output" in capsys.readouterr().err
    assert files(photos) == before


@pytest.mark.parametrize(
    ("other", "options"),
    [("a_labels.png", []), ("A_overlay.png", []), ("a_labels_raw.png", ["--labels", "raw"]), ("failed.json", [])],
)
def test_no_result_is_written_over_an_input(folder, tmp_path, capsys, monkeypatch, other, options):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(image(seed=1)).save("a.jpg")
    Image.fromarray(image(seed=2)).save(other, format="PNG")
    before = Path(other).read_bytes()
    argv = ["predict", other, "a.jpg", "-m", folder]
    assert main([*argv, "-o", ".", *options]) == 2
    assert f"{other}: a result would be written over this input; choose another --output" in capsys.readouterr().err
    assert Path(other).read_bytes() == before
    assert files(tmp_path) == sorted([other, "a.jpg"])
    assert main([*argv, "-o", "out", *options]) == 0


def test_an_input_that_no_result_is_written_over_may_lie_in_the_output_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "a_labels.png"):
        Image.fromarray(image()).save(name)
    assert main(["predict", "a_labels.png", "a.jpg", "-m", folder, "-o", ".", "--labels", "raw"]) == 0
    assert "a_labels_labels_raw.png" in files(tmp_path)
    np.testing.assert_array_equal(read_image("a_labels.png"), image())


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


def test_an_image_called_failed_keeps_its_json(folder, photos, out):
    (photos / "a.png").rename(photos / "failed.png")
    (photos / "b.png").write_bytes(b"no image")
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 3
    assert load_json(out / "failed.json")[0]["image"].endswith("b.png")
    assert load_json(out / "failed_png.json")["classes"]


def test_an_image_too_thin_for_the_window_fails_alone(folder, photos, out, capsys):
    Image.new("L", (30_000, 1)).save(photos / "thin.png")
    assert main(["predict", str(photos), "-m", folder, "-o", str(out), "--window-size", "512"]) == 3
    assert "thin.png: " in load_json(out / "failed.json")[0]["error"]


def test_a_name_too_long_for_its_results_fails_alone(folder, photos, out, runs, capsys):
    long = "x" * 241 + ".png"  # its overlay fits in 255 bytes, its raw labels do not
    (photos / "a.png").rename(photos / long)
    given = str(photos / ("y" * 300 + ".png"))
    assert main(["predict", given, str(photos), "-m", folder, "-o", str(out), "--labels", "png,raw"]) == 3
    captured = capsys.readouterr()
    assert "2 done, 0 skipped, 2 failed of 4" in captured.out
    assert f"{long}: the names of its results are too long; rename it" in captured.err
    assert [f["image"] for f in load_json(out / "failed.json")] == [given, str(photos / long)]
    assert len(runs) == 2, "known before the model runs"
    assert {f.split("/")[-1][0] for f in files(out)} == {"a", "b", "f"}, "nothing left of it"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_stops_the_run_and_tells_what_was_done(folder, photos, out, monkeypatch, capsys, code):
    (photos / "a0.png").write_bytes(b"no image")
    save = predict_module.save_png

    def full(image, path):
        if path.name.startswith("b_"):
            raise OSError(code, os.strerror(code))
        save(image, path)

    monkeypatch.setattr(predict_module, "save_png", full)
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("stopped early, --resume goes on: 2 done, 0 skipped, 1 failed of 4 in ")
    failure, error = captured.err.splitlines()
    assert "a0.png: not an image" in failure
    advice = "; make room and try again" if code == errno.ENOSPC else ""
    assert error == f"segmenter: error: {out / 'b'}: cannot write: {os.strerror(code)}{advice}"
    assert [Path(f["image"]).name for f in load_json(out / "failed.json")] == ["a0.png"]


def test_a_report_that_cannot_be_written_hides_no_interrupt(folder, photos, out, monkeypatch, capsys):
    def interrupted(*args):
        (out / "failed.json").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(predict_module, "save_png", interrupted)
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 130
    captured = capsys.readouterr()
    assert "0 done, 0 skipped, 0 failed of 3" in captured.out
    assert captured.err == "segmenter: error: interrupted\n"


@pytest.fixture
def runs(monkeypatch):
    """How many images were segmented."""
    calls = []
    segment = stream_module.enqueue

    def counted(model, pixels, **kwargs):
        calls.extend(x.shape for x in pixels)
        return segment(model, pixels, **kwargs)

    monkeypatch.setattr(stream_module, "enqueue", counted)
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


def test_resume_does_not_take_another_image_for_done(folder, photos, out, runs):
    for i, name in enumerate(("a.png", "sub/a.png")):
        assert main(["predict", str(photos / name), "-m", folder, "-o", str(out), "--resume"]) == 0
        assert len(runs) == i + 1
        assert load_json(out / "a.json")["image"] == str(photos / name)


def change_image(photos):
    Image.fromarray(image(seed=7)).save(photos / "a.png")


def change_time_only(photos):
    status = (photos / "a.png").stat()
    os.utime(photos / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def change_size_only(photos):
    status = (photos / "a.png").stat()
    with (photos / "a.png").open("ab") as file:
        file.write(b"more")
    os.utime(photos / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [change_image, change_time_only, change_size_only])
def test_resume_does_a_changed_image_again(trained, folder, photos, out, runs, change):
    argv = ["predict", str(photos), "-m", folder, "-o", str(out), "--resume"]
    assert main(argv) == 0
    change(photos)
    assert main(argv) == 0
    assert len(runs) == 3 + 1
    assert main(argv) == 0
    assert len(runs) == 3 + 1
    expected = trained.segment(read_image(photos / "a.png")).numpy()
    np.testing.assert_array_equal(labels_of(out / "a_labels.png"), expected)
    (photos / "a.png").unlink()
    argv[1:2] = [str(photos / "a.png"), str(photos / "b.png")]
    assert main(argv) == 3, "an image that is gone is not done"


def test_resume_does_all_again_for_other_weights_at_the_same_path(photos, out, runs, tmp_path):
    argv = ["predict", str(photos), "-m", str(tmp_path / "model"), "-o", str(out), "--resume"]
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / "model")
        runs.clear()
        assert main(argv) == main(argv) == 0
        assert len(runs) == 3


def test_resume_does_all_again_for_other_classes_in_the_same_file(folder, photos, out, runs, tmp_path):
    own = [{"id": i, "name": f"thing {i}", "color": [i, 20 * i, 7]} for i in range(11)]
    argv = ["predict", str(photos), "-m", folder, "-o", str(out), "--resume", "--classes", str(tmp_path / "own.json")]
    for change in ({}, {"name": "other"}, {"color": [1, 2, 3]}):
        own[4].update(change)
        (tmp_path / "own.json").write_text(json.dumps(own))
        runs.clear()
        assert main(argv) == main(argv) == 0
        assert len(runs) == 3, change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_of_a_model_changes_with_every_tensor(dtype):
    model = tiny_model().to(dtype)
    seen = {model_fingerprint(model)}
    assert seen == {model_fingerprint(tiny_model().to(dtype))}
    tensors = list(model.state_dict().values())
    for tensor in tensors:
        tensor.view(-1)[-1] += 1
        seen.add(model_fingerprint(model))
    model.info.normalization = "deit"
    seen.add(model_fingerprint(model))
    assert len(seen) == len(tensors) + 2


def test_file_names_that_are_no_unicode(folder, tmp_path, out, capsys):
    path = os.path.join(tmp_path, "caf\udce9 ü.png")
    try:
        Image.fromarray(image()).save(path)
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
    assert captured.out.startswith("stopped early, --resume goes on: 2 done, 0 skipped, 0 failed of 3 in ")
    assert len(list(out.rglob("*.json"))) == 2, "what is being written is finished"
    assert not (out / "b.json").exists(), "the JSON comes last"
    assert main(["predict", str(photos), "-m", folder, "-o", str(out), "--resume"]) == 0
    assert "1 done, 2 skipped" in capsys.readouterr().out


def test_warnings_are_one_line(folder, out, tmp_path, capsys):
    frames = [Image.fromarray(image(seed=i)) for i in range(2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    showwarning = warnings.showwarning
    assert main(["predict", str(tmp_path / "moving.gif"), "-m", folder, "-o", str(out)]) == 0
    err = capsys.readouterr().err
    assert err.startswith("segmenter: warning: ")
    assert "only the first is used" in err
    assert err.count("\n") == 1
    assert warnings.showwarning is showwarning
