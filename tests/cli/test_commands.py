"""Errors and exit status of all commands; `info`, `convert`, and the program itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segmenter.cli import loading, main
from segmenter.inference import stream
from segmenter.weights.load import from_pretrained
from tests.cli.tools import load_json
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


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
        (["predict", "{none}", "-m", "{model}"], "no images in this folder"),
        (["predict", "x.png", "-m", "{model}", "--classes", "nothing"], "nothing: neither a file nor one of"),
        (["predict", "x.png", "-m", "{model}", "--classes", "ade20k"], "names 150 classes, the model has 11"),
        (["predict", "x.png", "-m", "{model}", "--window-stride", "65"], "beyond the window of 64"),
        (["attention", "{png}", "-m", "{model}", "--square"], "one of the arguments --cls --patch is required"),
        (["attention", "{png}", "-m", "{model}", "--square", "--cls", "--npz"], "--npz is for whole images"),
        (
            ["attention", "{png}", "-m", "{model}", "--square", "--cls", "--class", "road"],
            "--class is for whole images",
        ),
        (["attention", "{png}", "-m", "{model}", "--square", "--cls", "--head", "mean"], "--head mean is for whole"),
        (["attention", "{png}", "-m", "{model}", "--square", "--cls", "--view", "heat"], "--view is for whole images"),
        (["attention", "{png}", "-m", "{model}", "--patch", "1", "0"], "--patch counts the patches of --square"),
        (["attention", "{png}", "-m", "{model}", "--cls", "--point", "1", "0"], "--cls looks from class tokens alone"),
        (["attention", "{png}", "-m", "{model}", "--point", "91", "0"], "outside the image of 91 x 70 pixels"),
        (["attention", "{png}", "-m", "{model}", "--point", "nan", "0"], "expected a number of pixels, got 'nan'"),
        (["attention", "{png}", "-m", "{model}", "--class", "zebra"], "class 'zebra': give an id in 0..10, or one of"),
        (["attention", "{png}", "-m", "{model}", "--layer", "0,x"], "expected an integer from 0, several with commas"),
        (["attention", "{png}", "-m", "{model}", "--rollout", "--head", "0"], "a rollout is of the mean over heads"),
        (["attention", "{png}", "-m", "{model}", "--window-size", "64"], "give it with --point alone"),
        (
            ["attention", "{png}", "-m", "{model}", "--point", "1", "1", "--window-size", "64", "--size", "64"],
            "--size is for whole images",
        ),
        (
            ["attention", "{png}", "-m", "{model}", "--point", "1", "1", "--window-size", "71"],
            "length 70 is smaller than the window 71; use another --window-size",
        ),
        (
            ["attention", "{png}", "-m", "{model}", "--point", "1", "71", "--window-size", "64"],
            "point 1 71 is outside the image of 91 x 70 pixels",
        ),
        (
            ["attention", "{png}", "-m", "{model}", "--cls", "--layer", "2"],
            "--layer 2 is out of range: this model has 0..1",
        ),
        (["attention", "{png}", "-m", "{model}", "--cls", "--head", "1"], "--head 1 is out of range"),
        (["attention", "{png}", "-m", "{model}", "--cls", "Sky"], "the encoder knows no classes"),
        (["attention", "{png}", "-m", "{model}", "--cls", "11", "--part", "decoder"], "give an id in 0..10"),
        (["attention", "{png}", "-m", "{model}", "--square", "--patch", "4", "0"], "has 4 x 4 patches"),
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
        "attention": [str(photos / "a.png"), "--point", "0", "0", "-m"],
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


def test_out_of_memory_ends_with_status_5(folder, photos, out, monkeypatch, capsys):
    def exhausted(model, pixels, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot\nand more text")

    monkeypatch.setattr(stream, "enqueue", exhausted)
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 5
    captured = capsys.readouterr()
    assert "a.png: not enough memory for one window at a time; use a smaller --window-size" in captured.err
    assert captured.out.startswith("stopped early, --resume goes on: 0 done, 0 skipped, 0 failed of 3 in ")


def test_output_that_cannot_be_written(folder, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["predict", str(photos), "-m", folder, "-o", str(tmp_path / "file")]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path / 'file'}: is no folder; choose another name" in err
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
    from segmenter.cli.commands import info

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


def test_convert_does_not_write_over_a_file(tmp_path, capsys):
    source = GOLDEN / "02_linear_p16_distilled" / "checkpoint.pth"
    (tmp_path / "notes").write_text("mine")
    assert main(["convert", str(source), str(tmp_path / "notes")]) == 2
    assert capsys.readouterr().err == f"segmenter: error: {tmp_path / 'notes'}: is a file; give a folder\n"
    assert (tmp_path / "notes").read_text() == "mine"


def test_help_says_where_the_stride_comes_from(capsys):
    assert main(["predict", "--help"]) == 0
    assert "default: the model's, scaled with --window-size" in " ".join(capsys.readouterr().out.split())


def test_help_needs_no_torch():
    code = "import sys; from segmenter.cli import main; main(['predict', '--help']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "NAME_overlay.png" in result.stdout


def test_python_m_segmenter():
    command = [sys.executable, "-m", "segmenter", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.startswith("segmenter 0.")
    assert result.returncode == 0
