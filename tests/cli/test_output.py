"""What is printed, and what becomes of a command that cannot print."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from segmenter.cli import main
from segmenter.cli.output import Lasting, err, lasting, out
from segmenter.files import writing_into
from segmenter.weights.pretrained import CONFIG
from tests.cli.tools import files, image, load_json

ESCAPES = "\x1b]0;x\x07\x1b[2J"
SHOWN = r"\x1b]0;x\x07\x1b[2J"
ROOT = Path(__file__).parents[2]
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def test_out_and_err_print_lines_that_steer_no_terminal(capsys):
    out("na\u00efve  table", f"a{ESCAPES}\nb", 5)
    err("\rc\td")
    assert capsys.readouterr() == (f"na\u00efve  table\na{SHOWN}\\nb\n5\n", "\\rc\\td\n")


def test_names_texts_and_errors_of_a_command_are_escaped(folder, tmp_path, out, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{ESCAPES}.png").write_bytes(b"no image")
    assert main(["predict", f"{ESCAPES}.png", "-m", folder, "-o", str(out)]) == 3
    assert main(["info", ESCAPES]) == main(["predict", "x", "-m", ESCAPES, "--dtype", ESCAPES]) == 2
    assert main(["info", "-m", ESCAPES]) == 4
    content = json.loads(Path(folder, CONFIG).read_text())
    content["info"]["source"] = f"{ESCAPES}\nimpl fake"
    del content["config_sha256"]
    model = tmp_path / "model"
    model.mkdir()
    (model / CONFIG).write_text(json.dumps(content))
    (model / "model.safetensors").symlink_to(Path(folder) / "model.safetensors")
    assert main(["info", "-m", str(model)]) == 0
    printed = capsys.readouterr()
    assert f"model source         {SHOWN}\\nimpl fake\n" in printed.out
    assert "\x1b" not in printed.out + printed.err
    assert printed.err.count(SHOWN) >= 4


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_unexpected_errors_and_warnings_are_escaped(folder, debug, capsys, monkeypatch):
    import warnings

    from segmenter.cli import loading

    def broken(*args, **kwargs):
        warnings.warn(f"beware {ESCAPES}", stacklevel=1)
        raise ZeroDivisionError(ESCAPES)

    monkeypatch.setattr(loading, "load_any", broken)
    assert main(["info", "-m", folder, *debug]) == 1
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert f"warning: beware {SHOWN}" in printed
    assert f"ZeroDivisionError: {SHOWN}" in printed


class Broken(io.TextIOBase):
    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = lambda self: False


@pytest.mark.parametrize("error", [OSError(28, "No space left"), BrokenPipeError(32, "x"), ValueError("closed"), None])
def test_a_stream_that_cannot_be_written_ends_nothing(error):
    stream = Lasting(None if error is None else Broken(error))
    print("a", file=stream, flush=True)
    tqdm.write("b", file=stream)
    for _ in tqdm(range(3), file=stream):
        pass
    assert isinstance(stream.failure, OSError if error is None else type(error))
    assert not stream.isatty()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_the_encoding_lacks_is_escaped(encoding):
    raw = io.BytesIO()
    stream = Lasting(io.TextIOWrapper(raw, encoding))
    print("a \u0444\u00e9 \udce9", file=stream, flush=True)
    expected = rb"a \u0444" + (rb"\xe9" if encoding == "ascii" else b"\xe9") + rb" \udce9" + b"\n"
    assert (raw.getvalue(), stream.failure) == (expected, None)


def test_the_streams_are_put_back(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), lasting():
        assert sys.stdout is not before[0]
        raise KeyError
    assert (sys.stdout, sys.stderr) == before


@full
@pytest.mark.parametrize("broken", [True, False])
def test_failures_are_written_though_nothing_can_be_printed(folder, photos, out, monkeypatch, broken):
    if broken:
        (photos / "b.png").write_bytes(b"no image")
    with open("/dev/full", "w") as stdout, open("/dev/full", "w") as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        status = main(["predict", str(photos), "-m", folder, "-o", str(out)])
    assert status == (3 if broken else 1)
    assert "a_labels.png" in files(out)
    assert (out / "failed.json").exists() == broken


@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        (">&-", 1, "standard output cannot be written: it is closed"),
        (">/dev/full", 1, "standard output cannot be written: No space left on device; make room and try again"),
        (">&- 2>&-", 1, ""),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
    ],
)
def test_the_program_when_its_streams_are_closed_or_full(redirection, status, message, tmp_path):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    command = ["bash", "-c", f'"$0" -m segmenter --version {redirection}', sys.executable]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == status
    assert result.stderr == (f"segmenter: error: {message}\n" if message else "")


def test_interrupted_within_an_exec(tmp_path):
    """After which CPython would end by the signal."""
    code = (
        "import sys, types; from segmenter import cli\n"
        "def interrupted(args): exec('raise KeyboardInterrupt')\n"
        "sys.modules['segmenter.cli.commands.info'] = types.SimpleNamespace(run=interrupted)\n"
        "sys.exit(cli.main(['info']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "segmenter: error: interrupted\n")


def test_interrupted_within_an_import_that_loses_exceptions():
    code = (
        "import os, signal, sys; from segmenter import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells ignore it for what runs in the background
        "def load(name):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT); sum(range(10**6))\n"
        "    except BaseException: os._exit(9)\n"
        "cli.importlib.import_module = load\n"
        "sys.exit(cli.main(['info']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "segmenter: error: interrupted\n")


def test_interrupted_when_all_is_done():
    code = (
        "import atexit, os, runpy, signal, sys\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['segmenter', '--version']\n"
        "runpy.run_module('segmenter', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_has_seen_enough_is_told_nothing():
    command = ["bash", "-c", '"$0" -m segmenter --help | head -1; echo "${PIPESTATUS[0]}"', sys.executable]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[0].startswith("usage: segmenter")
    assert result.stdout.splitlines()[-1] in ("0", "1")
    assert result.stderr == ""


def test_one_command_at_a_time_writes_into_a_folder(folder, photos, out, process, capsys):
    image = str(photos / "a.png")
    commands = [["predict", image], ["attention", image, "--cls"]]
    with writing_into(out):
        for command in commands:
            assert main([*command, "-m", folder, "-o", str(out)]) == 1
            assert f"error: {out}: another process is writing into this folder; wait" in capsys.readouterr().err
        process(0)
        assert main([*commands[0], "-m", folder, "-o", str(out)]) == 1
    assert files(out) == []


def test_processes_of_one_run_share_a_folder_and_those_of_another_run_do_not(folder, photos, out, process, capsys):
    from segmenter.cli.shards import Shard

    argv = ["predict", str(photos), "-m", folder, "-o", str(out)]
    with Shard(0, 2, run="one").writing_into(out):
        process(1)
        assert main(argv) == 0, "another process of the same run"
        process(0)
        assert main(argv) == 1, "a first process of another run"
        assert "another process is writing into this folder" in capsys.readouterr().err
        assert torch.cuda.is_available() or main([*argv, "--device", "cpu"]) == 1


def test_leftovers_in_all_folders_of_results_are_removed(folder, photos, out):
    for name in ("", "sub/"):
        (out / name).mkdir(exist_ok=True)
        (out / f"{name}.segmenter-1.tmp").write_bytes(b"half")
    (out / ".segmenter-report").mkdir()
    (out / ".segmenter-report" / "rank-1.json").write_text("{}")
    assert main(["predict", str(photos), "-m", folder, "-o", str(out)]) == 0
    assert [name for name in files(out) if "segmenter-" in name] == []
    assert load_json(out / "sub/a.json")["width"] == 91


def test_a_pipe_in_place_of_a_result_is_not_waited_for(folder, photos, out):
    argv = ["predict", str(photos / "a.png"), "-m", folder, "-o", str(out), "--resume"]
    out.mkdir()
    os.mkfifo(out / "a.json")
    assert main(argv) == 0
    assert load_json(out / "a.json")["width"] == 91
    Image.fromarray(image()).save(photos / "a.png")
