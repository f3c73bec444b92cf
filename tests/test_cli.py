"""The command line, run in-process on a tiny model."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter.cli import loading, main
from segmenter.cli import predict as predict_module
from segmenter.cli.attention import square_input
from segmenter.images import normalize, read_image
from segmenter.model import Segmenter
from segmenter.pretrained import from_pretrained
from segmenter.visualize import enlarge, heat_colors, overlay, with_legend
from tests.tiny import tiny_model

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def trained():
    model = tiny_model(n_cls=11)
    model.info.weights, model.info.classes = "trained", "camvid"
    return model


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A saved model of 11 classes, said to be trained."""
    path = tmp_path_factory.mktemp("model")
    trained.save_pretrained(path)
    return str(path)


def picture(h=70, w=91, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC))


@pytest.fixture
def photos(tmp_path):
    """photos/{a,b}.png and photos/sub/a.png, all different."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/a.png")):
        Image.fromarray(picture(seed=i)).save(root / name)
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def files(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def load_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def labels_of(path):
    with Image.open(path) as image:
        return np.array(image)


# predict


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
    for name in ("a.webp", "A.bmp"):
        Image.fromarray(picture(seed=hash(name) % 1000)).save(photos / name)
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


# errors and exit status


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["predict", "x.png"], "required: -m/--model"),
        (["predict", "x.png", "-m", "M", "--alpha", "2"], "expected a number in 0..1, got '2'"),
        (["predict", "x.png", "-m", "M", "--labels", "png,tiff"], "expected none, or some of png, raw, npy"),
        (["predict", "x.png", "-m", "M", "--scales", "1,0"], "expected numbers such as"),
        (["predict", "x.png", "-m", "M", "--window-size", "0"], "expected an integer from 1"),
        (["predict", "{none}/*.png", "-m", "{model}"], "no file matches"),
        (["predict", "{none}", "-m", "{model}"], "no pictures in this folder"),
        (["predict", "x.png", "-m", "{model}", "--classes", "nothing"], "nothing: neither a file nor one of"),
        (["predict", "x.png", "-m", "{model}", "--classes", "ade20k"], "names 150 classes, the model has 11"),
        (["predict", "x.png", "-m", "{model}", "--window-stride", "65"], "beyond the window of 64"),
        (["attention", "{png}", "-m", "{model}"], "one of the arguments --cls --patch is required"),
        (
            ["attention", "{png}", "-m", "{model}", "--cls", "--layer", "2"],
            "--layer 2 is out of range: this model has 0..1",
        ),
        (["attention", "{png}", "-m", "{model}", "--cls", "--head", "1"], "--head 1 is out of range"),
        (["attention", "{png}", "-m", "{model}", "--cls", "Sky"], "the encoder knows no classes"),
        (["attention", "{png}", "-m", "{model}", "--cls", "11", "--part", "decoder"], "give an id in 0..10 or a name"),
        (["attention", "{png}", "-m", "{model}", "--patch", "4", "0"], "has 4 x 4 patches"),
        (["attention", "{png}", "-m", "{model}", "--patch", "-1", "0"], "integer from 0|expected 2 arguments"),
    ],
)
def test_usage_errors(argv, message, folder, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    names = {"{model}": folder, "{none}": str(tmp_path / "none"), "{png}": str(photos / "a.png")}
    for key, value in names.items():
        argv = [a.replace(key, value) for a in argv]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert any(part in err for part in message.split("|")), err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["predict", "attention", "info", "convert"])
def test_bad_checkpoints_end_with_status_4(command, photos, tmp_path, capsys):
    (tmp_path / "weights.pth").write_text("<html>404</html>")
    argv = {
        "predict": [str(photos / "a.png"), "-m"],
        "attention": [str(photos / "a.png"), "--patch", "0", "0", "-m"],
        "info": ["-m"],
        "convert": [],
    }[command]
    for model, message in (("weights.pth", "web page"), ("missing", "no such file")):
        target = ["--output", str(tmp_path / "o")] if command in ("predict", "attention") else []
        tail = [str(tmp_path / "o")] if command == "convert" else []
        assert main([command, *argv, str(tmp_path / model), *tail, *target]) == 4
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "o").exists()


def test_messages_speak_of_options(tmp_path, capsys):
    torch.save({"model": {"x": torch.zeros(1)}, "evil": shutil.rmtree}, tmp_path / "evil.pth")
    assert main(["info", "-m", str(tmp_path / "evil.pth")]) == 4
    assert "--allow-pickle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["--device", "meta"], "device 'meta'"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
    ],
)
def test_devices_that_are_not_there_end_with_status_5(option, message, folder, photos, capsys):
    assert main(["predict", str(photos), "-m", folder, *option]) == 5
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_implementation_that_cannot_run_ends_with_status_5(folder, photos, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise loading.ImplementationError('impl="triton": not here')

    monkeypatch.setattr(loading, "load_any", refuse)
    assert main(["predict", str(photos), "-m", folder, "--impl", "triton"]) == 5
    assert "not here" in capsys.readouterr().err


def test_out_of_gpu_memory_ends_with_status_5(folder, photos, out, monkeypatch, capsys):
    def exhausted(self, image, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot\nand more text")

    monkeypatch.setattr(Segmenter, "segment", exhausted)
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 5
    assert "a.png: not enough GPU memory; use a smaller --batch-size" in capsys.readouterr().err


def test_output_that_cannot_be_written(folder, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["predict", str(photos), "-m", folder, "-o", str(tmp_path / "file")]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path / 'file'}: File exists" in err
    assert err.count("\n") == 1


def test_unexpected_errors_are_one_line_unless_debug(folder, photos, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(loading, "load_any", broken)
    assert main(["predict", str(photos), "-m", folder]) == 1
    assert capsys.readouterr().err == "segmenter: error: ZeroDivisionError: two lines (--debug shows where)\n"
    assert main(["predict", str(photos), "-m", folder, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_random_weights_are_said_loudly(photos, out, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "random")
    model = ["-m", str(tmp_path / "random")]
    for argv in (
        ["predict", str(photos / "a.png"), *model, "-o", str(out)],
        ["attention", str(photos / "a.png"), *model, "-o", str(out), "--cls"],
        ["info", *model],
    ):
        assert main(argv) == 0
        assert "RANDOM WEIGHTS: the labels and maps mean nothing" in capsys.readouterr().err
    assert load_json(out / "a.json")["weights"] == "random"
    assert load_json(out / "a.json")["classes"][0]["name"].startswith("class ")


def test_classes_of_the_model_that_do_not_fit_are_replaced_with_a_warning():
    model = tiny_model()
    for wrong in ("ade20k", "no/such/file.json"):
        model.info.classes = wrong
        with pytest.warns(UserWarning, match="colours are generated instead"):
            assert loading.choose_classes(None, model).names == tuple(f"class {i}" for i in range(5))


# info and convert


def test_info_as_json(folder, capsys):
    assert main(["info", "--model", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    )
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert len(facts["cuda"]) == torch.cuda.device_count()
    assert facts["implementation"]["eager"] == {"runs": "eager", "why": "asked for"}
    assert set(facts["implementation"]) == {"auto", "eager", "triton"}
    assert facts["model"]["parameters"] == sum(p.numel() for p in tiny_model(n_cls=11).parameters())
    assert facts["model"]["weights"] == "trained"
    assert facts["model"]["config"]["n_cls"] == 11


def test_info_for_people(folder, capsys, monkeypatch):
    from segmenter.cli import info

    version = info.metadata.version

    def no_triton(name):
        if name == "triton":
            raise info.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(info.metadata, "version", no_triton)
    assert main(["info", "-m", folder]) == 0
    out = capsys.readouterr().out
    for text in (
        "triton          not installed",
        "impl auto",
        "threads",
        "model classes        camvid",
        "config d_model       64",
    ):
        assert text in out


def test_convert_says_what_it_recognised_and_keeps_the_weights(tmp_path, capsys):
    source = GOLDEN / "02_linear_p16_distilled" / "checkpoint.pth"
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    captured = capsys.readouterr()
    assert "segmenter" in captured.out
    assert "linear decoder, 5 classes" in captured.out
    assert captured.err == ""
    weights = torch.load(source, weights_only=True)["model"]
    for name, tensor in from_pretrained(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_convert_options(tmp_path, capsys):
    weights = tiny_model().encoder.state_dict()
    torch.save(dict(weights), tmp_path / "encoder.pth")
    argv = ["convert", str(tmp_path / "encoder.pth"), str(tmp_path / "ours")]
    assert main(argv) == 4
    assert "give --n-cls" in capsys.readouterr().err
    assert main([*argv, "--n-cls", "19", "--classes", "cityscapes", "--decoder", "linear", "--half"]) == 0
    assert "RANDOM DECODER" in capsys.readouterr().err
    model = from_pretrained(tmp_path / "ours")
    assert (model.n_cls, model.info.classes, model.info.weights) == (19, "cityscapes", "encoder")
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in model.parameters())
    assert main([*argv, "--n-cls", "19", "--classes", "no_such_set"]) == 2
    assert "neither a file nor one of" in capsys.readouterr().err


# attention


def expected_map(trained, photos, part, layer, row):
    """(heads, 4, 4) for photos/a.png on the 64 pixel model."""
    pixels = square_input(read_image(photos / "a.png"), 64, 16)
    im = normalize(pixels, "vit")[None]
    with torch.no_grad():
        if part == "encoder":
            return trained.get_attention_map_enc(im, layer)[0, :, row, 1:].reshape(-1, 4, 4).numpy()
        return trained.get_attention_map_dec(im, layer)[0, :, row, :16].reshape(-1, 4, 4).numpy()


@pytest.mark.parametrize(
    ("part", "options", "layer", "name", "row"),
    [
        ("encoder", ["--cls"], 1, "enc_layer1/cls", 0),
        ("encoder", ["--patch", "1", "2"], 0, "enc_layer0/patch_1_2", 1 + 4 * 2 + 1),
        ("decoder", ["--patch", "3", "0"], 0, "dec_layer0/patch_3_0", 3),
        ("decoder", ["--cls", "9"], 0, "dec_layer0/cls_9", 16 + 9),
        ("decoder", ["--cls", "road"], 0, "dec_layer0/cls_3", 16 + 3),
    ],
)
def test_attention_maps(trained, folder, photos, out, part, options, layer, name, row):
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--part", part, "--layer", str(layer)]
    assert main([*argv, *options]) == 0
    assert files(out) == [f"{name}/grid.png", f"{name}/head0.png", "input.png"]
    expected = enlarge(heat_colors(expected_map(trained, photos, part, layer, row)[0]), 16)
    got = read_image(out / name / "head0.png")
    assert got.shape == (64, 64, 3)
    assert len(np.unique(got.reshape(-1, 3), axis=0)) > 4
    np.testing.assert_array_equal(got, expected)
    grid = read_image(out / name / "grid.png")
    assert grid.shape[1] > 2 * 64
    assert any(
        (grid[y : y + 64, x : x + 64] == expected).all()
        for y in range(len(grid) - 63)
        for x in range(64, grid.shape[1] - 63)
    )
    shown = read_image(out / "input.png")
    plain = square_input(read_image(photos / "a.png"), 64, 16)
    if "--patch" in options:
        x, y = 16 * int(options[1]), 16 * int(options[2])
        assert (shown[y : y + 16, x : x + 16] == (255, 0, 0)).all()
        plain[y : y + 16, x : x + 16] = (255, 0, 0)
    np.testing.assert_array_equal(shown, plain)


def test_attention_of_all_layers_heads_and_classes(photos, out, tmp_path):
    model = tiny_model(d_model=128, n_heads=2, distilled=True)
    model.save_pretrained(tmp_path / "model")
    argv = ["attention", str(photos / "a.png"), "-m", str(tmp_path / "model"), "-o", str(out)]
    assert main([*argv, "--patch", "0", "3"]) == 0
    assert len(files(out)) == 1 + 2 * 3
    pixels = square_input(read_image(photos / "a.png"), 64, 16)
    with torch.no_grad():
        row = model.get_attention_map_enc(normalize(pixels, "vit")[None], 1)[0, 1, 2 + 12, 2:].reshape(4, 4)
    got = read_image(out / "enc_layer1" / "patch_0_3" / "head1.png")
    np.testing.assert_array_equal(got, enlarge(heat_colors(row.numpy()), 16))
    shutil.rmtree(out)
    assert main([*argv, "--part", "decoder", "--cls", "--head", "1"]) == 0
    assert files(out) == sorted(
        [f"dec_layer0/cls_{c}/{f}.png" for c in range(5) for f in ("grid", "head1")] + ["input.png"]
    )


def test_attention_input_is_the_top_left_square_at_the_models_size():
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:50, :50] = 255
    square = square_input(pixels, 40, 16)
    assert square.shape == (32, 32, 3), "whole patches"
    assert (square[:18, :18] == 255).all()
    assert (square[22:] == 0).all()
    assert (square[:, 22:] == 0).all()
    np.testing.assert_array_equal(square_input(picture(64, 64), 64, 16), picture(64, 64))


def test_attention_of_a_linear_decoder_and_of_a_bad_picture(folder, photos, out, tmp_path, capsys):
    tiny_model(decoder={"name": "linear"}).save_pretrained(tmp_path / "linear")
    argv = ["-m", str(tmp_path / "linear"), "-o", str(out), "--part", "decoder", "--cls"]
    assert main(["attention", str(photos / "a.png"), *argv]) == 2
    assert "the linear decoder has no attention" in capsys.readouterr().err
    assert main(["attention", str(tmp_path / "missing.png"), *argv]) == 3
    assert "missing.png: No such file" in capsys.readouterr().err
    assert not out.exists()


# the program itself


def test_help_needs_no_torch():
    code = "import sys; from segmenter.cli import main; main(['predict', '--help']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert result.returncode == 0, result.stderr
    assert "NAME_overlay.png" in result.stdout


def test_python_m_segmenter():
    command = [sys.executable, "-m", "segmenter", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert result.stdout.startswith("segmenter 0.")
    assert result.returncode == 0
