"""Our own folder format: exact, checked, never half-written."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from segmenter.classes import load_classes
from segmenter.config import ModelInfo
from segmenter.model import Segmenter
from segmenter.weights import pretrained
from segmenter.weights.load import from_pretrained, load_any, load_model, save_pretrained
from segmenter.weights.pretrained import CLASSES, CONFIG, WEIGHTS
from segmenter.weights.read import CheckpointError
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def logits(model):
    with torch.no_grad():
        return model(torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(3)))


def test_files_are_as_readable_as_any_other(tmp_path):
    """safetensors by itself writes files that only their owner may read."""
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / CONFIG).stat().st_mode


# -- our folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"decoder": {"name": "linear"}, "n_cls": 2, "distilled": True, "normalization": "deit"},
        {"image_size": (32, 80), "norm_eps": 1e-6, "pos_embed_mode": "bicubic", "pos_embed_check": "grid"},
    ],
)
def test_save_and_load_are_exact(tmp_path, overrides):
    model = tiny_model(**overrides)
    model.info = ModelInfo(model.config.normalization, 48, 32, None, "trained", "a test")
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = Segmenter.from_pretrained(tmp_path / "new" / "folder", impl="eager", device="cpu")
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    assert (loaded.config, loaded.info) == (model.config, model.info)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [CONFIG, WEIGHTS]
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / WEIGHTS):
        again, settings = load_model(path)
        assert torch.equal(logits(again), logits(model)) and again.info == model.info
        assert settings["inference_kwargs"]["window_stride"] == 32


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_storage(tmp_path, dtype, tolerance):
    model = tiny_model()
    save_pretrained(model, tmp_path / "full")
    save_pretrained(model, tmp_path / "half", dtype=dtype)
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.52 * sizes[1]
    loaded = from_pretrained(tmp_path / "half")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_overflow_and_missing_configuration_write_nothing(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.encoder.norm.weight[0] = 1e6
    with pytest.raises(ValueError, match=r"encoder\.norm\.weight overflows in torch\.float16"):
        save_pretrained(model, tmp_path / "a", dtype=torch.float16)
    model.config = None
    with pytest.raises(ValueError, match="model.config is None"):
        save_pretrained(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_classes_travel_with_the_model(tmp_path):
    entries = [{"id": i, "name": f"thing {i}", "color": [i, 2 * i, 3 * i]} for i in range(5)]
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    save_pretrained(tiny_model(), tmp_path / "a", classes=tmp_path / "mine.json")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["info"]["classes"] == CLASSES  # no path of this machine
    moved = shutil.move(tmp_path / "a", tmp_path / "b")
    loaded = from_pretrained(moved)
    assert json.loads(Path(loaded.info.classes).read_text()) == entries
    save_pretrained(loaded, tmp_path / "c")  # from the file that info names
    assert json.loads((tmp_path / "c" / CLASSES).read_text()) == entries
    city = tiny_model(n_cls=19)
    save_pretrained(city, tmp_path / "d", classes="cityscapes")
    assert from_pretrained(tmp_path / "d").info.classes == "cityscapes" and not (tmp_path / "d" / CLASSES).exists()
    with pytest.raises(ValueError, match="cityscapes has 19 classes, the model 5"):
        save_pretrained(tiny_model(), tmp_path / "e", classes="cityscapes")


def test_one_flipped_bit_is_noticed(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1000] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged, its sha256 differs.*verify=False"):
        from_pretrained(tmp_path)
    assert isinstance(from_pretrained(tmp_path, verify=False), Segmenter)


def test_one_flipped_bit_of_the_configuration_or_the_classes_is_noticed(tmp_path):
    """Each bit of config.json, as far as it changes what is loaded; and one of classes.json."""
    model = tiny_model()
    model.info.classes = str(tmp_path / "own.json")
    (tmp_path / "own.json").write_text(json.dumps(entries_of("abcde")))
    save_pretrained(model, tmp_path / "model")
    path, expected = tmp_path / "model" / CONFIG, from_pretrained(tmp_path / "model")
    good, silent = path.read_bytes(), 0
    for bit in range(0, 8 * len(good), 61):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            found = from_pretrained(tmp_path / "model")
            silent += (found.config, found.info) != (expected.config, expected.info)
    assert silent == 0
    path.write_bytes(good)
    (tmp_path / "model" / CLASSES).write_text(json.dumps(entries_of("abcdE"), indent=2) + "\n")
    with pytest.raises(CheckpointError, match=r"classes\.json: damaged"):
        from_pretrained(tmp_path / "model")
    assert from_pretrained(tmp_path / "model", verify=False).info == expected.info


def test_a_damaged_name_of_a_sum_is_noticed(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"config_sha256"', '"config_sha257"')
    (tmp_path / "config.json").write_text(text.replace('"backbone"', '"backbonf"'))
    with pytest.raises(CheckpointError, match="config.json: has unknown entries: config_sha257"):
        from_pretrained(tmp_path)
    from_pretrained(tmp_path, verify=False)


def test_edited_configuration(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    edit(tmp_path, info={"window_stride": 48})
    with pytest.raises(CheckpointError, match="does not fit its config_sha256; if you have edited it, delete"):
        from_pretrained(tmp_path)
    assert from_pretrained(tmp_path, verify=False).info.window_stride == 48
    edit(tmp_path, config_sha256=None)  # as in folders of older versions
    assert from_pretrained(tmp_path).info.window_stride == 48


def edit(directory, **changes):
    content = json.loads((directory / CONFIG).read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (directory / CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "other"}, "was not written by save_pretrained of segmenter"),
        ({"schema": "x"}, "was not written by save_pretrained of segmenter"),
        ({"schema": 3}, "schema 3 is newer than this version reads"),
        ({"sha256": None}, "sha256 differs"),
        ({"model": None}, "net_kwargs must be a mapping"),
        ({"model": {"n_cls": 10**12}}, "n_cls 1000000000000 is out of range"),
        ({"model": {"n_cls": 6}}, "5 classes in the file, 6 asked for"),
        ({"info": {"normalization": "x"}}, "values under info are wrong"),
        ({"info": {"window_size": -1}}, "values under info are wrong"),
        ({"info": {"weights": "good"}}, "values under info are wrong"),
        ({"info": {"classes": 5}}, "values under info are wrong"),
    ],
)
def test_wrong_configuration(tmp_path, changes, message):
    save_pretrained(tiny_model(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000, '{"a": 1}' + " " * 1_000_001])
def test_damaged_configuration_is_never_guessed_around(tmp_path, text):
    save_pretrained(tiny_model(), tmp_path)
    (tmp_path / CONFIG).write_text(text, encoding="latin-1")
    for load in (from_pretrained, load_model, load_any):
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            load(tmp_path)


def test_missing_parts(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder; hub=True would look for it"):
        from_pretrained(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        from_pretrained(tmp_path)
    save_pretrained(tiny_model(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        from_pretrained(tmp_path)


def test_hub_only_on_demand(tmp_path, monkeypatch):
    save_pretrained(model := tiny_model(), tmp_path / "snapshot")
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            asked.append((name, tuple(allow_patterns)))
            return str(tmp_path / "snapshot")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="hub=True"):
        from_pretrained("owner/name")
    assert asked == []
    assert torch.equal(logits(from_pretrained("owner/name", hub=True)), logits(model))
    assert torch.equal(logits(load_any("owner/name", hub=True)), logits(model))
    assert asked == [("owner/name", (CONFIG, WEIGHTS, CLASSES))] * 2
    from_pretrained("snapshot", hub=True)  # a local folder comes first
    assert len(asked) == 2
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install segmenter-triton\[hub\]"):
        from_pretrained("owner/name", hub=True)


def test_hub_failure_is_one_error(monkeypatch):
    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(
        CheckpointError, match=r"owner/name: no such folder, and the hub did not give it \(no network\)"
    ):
        from_pretrained("owner/name", hub=True)


# -- interrupted saves ----------------------------------------------------------------------------------------------


def killed_at(nth, model, directory):
    """Saves in a process that dies at its nth os.replace; nothing after it runs, no clean-up either."""
    pid = os.fork()
    if pid == 0:
        real, calls = os.replace, []

        def replace(source, target):
            calls.append(target)
            if len(calls) == nth:
                os._exit(9)
            real(source, target)

        os.replace = replace
        save_pretrained(model, directory)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def entries_of(names):
    return [{"id": i, "name": name, "color": [i, 0, 0]} for i, name in enumerate(names)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("nth, expected", [(1, "old"), (2, "old"), (3, "old"), (4, "new"), (5, "new")])
def test_killed_between_the_steps_reads_as_before_or_after(tmp_path, nth, expected):
    """The steps: weights and classes beside the old ones, config.json, weights, classes."""
    models = {"old": tiny_model(0), "new": tiny_model(1, decoder={"name": "linear"})}
    for name, model in models.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries_of(f"{name} {i}" for i in range(5))))
        model.info.classes = str(tmp_path / f"{name}.json")
    directory = tmp_path / "model"
    save_pretrained(models["old"], directory)
    killed_at(nth, models["new"], directory)
    for verify in (True, False):
        found = from_pretrained(directory, verify=verify)
        assert torch.equal(logits(found), logits(models[expected]))
        assert load_classes(found.info.classes).names[4] == f"{expected} 4"
    # A third save, killed while it writes its weights, must not have destroyed the second.
    killed_at(1, tiny_model(2), directory)
    assert torch.equal(logits(from_pretrained(directory)), logits(models[expected]))
    save_pretrained(third := tiny_model(3), directory)
    assert torch.equal(logits(from_pretrained(directory)), logits(third))
    assert {CONFIG, WEIGHTS} <= set(os.listdir(directory)) <= {CONFIG, WEIGHTS, CLASSES}, "leftovers are removed"


def test_full_disk_leaves_the_old_save_and_is_said_of_the_file_that_has_no_room(tmp_path, monkeypatch):
    save_pretrained(model := tiny_model(0), tmp_path)
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save_pretrained(tiny_model(1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(tmp_path / WEIGHTS)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_ctrl_c_just_after_the_commit_keeps_the_new_save(tmp_path, monkeypatch):
    save_pretrained(tiny_model(0), tmp_path)
    real = os.replace

    def replace(source, target):
        real(source, target)
        if Path(target).name == CONFIG:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(model := tiny_model(1), tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_sigkill_while_saving_leaves_a_readable_model(tmp_path):
    models = [tiny_model(0), tiny_model(1)]
    save_pretrained(models[0], tmp_path / "a")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.support.tiny import tiny_model\n"
        "from segmenter.weights.load import save_pretrained\n"
        "models = [tiny_model(0), tiny_model(1)]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for model in reversed(models):\n"
        "        save_pretrained(model, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            for i in range(12):  # stopped, the process is frozen where a kill would have ended it
                time.sleep(0.003 * (i + 1))
                os.kill(process.pid, signal.SIGSTOP)
                shutil.copytree(tmp_path / "a", tmp_path / f"copy{i}")
                os.kill(process.pid, signal.SIGCONT)
        finally:
            process.send_signal(signal.SIGKILL)
    for directory in [tmp_path / "a", *(tmp_path / f"copy{i}" for i in range(12))]:
        found = logits(from_pretrained(directory))
        assert any(torch.equal(found, logits(model)) for model in models)


# -- several at once ------------------------------------------------------------------------------------------------


def saving(model, directory, times):
    """The id of a process that saves a model again and again."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        for _ in range(times):
            save_pretrained(model, directory)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_saves_at_once_leave_one_whole_model_and_readers_always_find_one(tmp_path):
    models = {n_cls: tiny_model(n_cls, n_cls=n_cls) for n_cls in (3, 4, 5)}
    save_pretrained(models[3], tmp_path / "model")
    pids, reads = {saving(models[n_cls], tmp_path / "model", times=15) for n_cls in (4, 5)}, 0
    while pids or reads < 3:
        found = from_pretrained(tmp_path / "model")
        assert torch.equal(logits(found), logits(models[found.n_cls]))
        reads += 1
        for pid, status in [os.waitpid(pid, os.WNOHANG) for pid in pids]:
            pids -= {pid}
            assert status == 0
    assert sorted(os.listdir(tmp_path / "model")) == [CONFIG, WEIGHTS]


def test_a_reader_begins_again_when_a_save_came_between(tmp_path, monkeypatch):
    """Between config.json and the weights, where it would find the weights damaged."""
    save_pretrained(tiny_model(0), tmp_path)
    new, read, came = tiny_model(1, n_cls=7), pretrained.read_json_object, []

    def and_then_a_save(path):
        content = read(path)
        if not came:
            came.append(path)
            save_pretrained(new, tmp_path)
        return content

    monkeypatch.setattr(pretrained, "read_json_object", and_then_a_save)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(new))
