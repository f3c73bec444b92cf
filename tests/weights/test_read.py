"""Reading weight files and variant.yml, above all hostile and broken ones: one clear error, no code run."""

import argparse
import functools
import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from segmenter.weights.read import CheckpointError, listing, read_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(8, 5 + i, generator=generator) for i in range(4)}


def same(state, expected):
    return list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in expected)


@pytest.fixture
def torch_file(tmp_path):
    torch.save({"model": weights(), "epoch": 3}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


# -- files that must be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    named = {prefix + name: tensor for name, tensor in weights().items()}
    torch.save({wrapper: named, "epoch": 7} if wrapper else named, tmp_path / "a.pth")
    state, extra = read_state_dict(tmp_path / "a.pth")
    assert same(state, weights())
    assert extra == ({"epoch": 7} if wrapper else {})


def test_prefix_stays_when_only_some_names_have_it(tmp_path):
    named = {"module.a": torch.ones(2), "b": torch.ones(3)}
    torch.save(named, tmp_path / "a.pth")
    assert same(read_state_dict(tmp_path / "a.pth")[0], named)


def test_nested_wrappers_collect_what_else_there_is(tmp_path):
    torch.save({"state_dict": {"model": weights(), "step": 5}, "meta": {"x": [1]}}, tmp_path / "a.pth")
    state, extra = read_state_dict(tmp_path / "a.pth")
    assert same(state, weights())
    assert extra == {"meta": {"x": [1]}, "step": 5}


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "misnamed.pth"])
def test_safetensors_whatever_its_name(tmp_path, name):
    from safetensors.torch import save_file

    save_file(weights(), tmp_path / name)
    assert same(dict(sorted(read_state_dict(tmp_path / name)[0].items())), weights())


def test_npz_plain_and_compressed(tmp_path):
    arrays = {name.replace(".", "/"): tensor.numpy() for name, tensor in weights().items()}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        state, _ = read_state_dict(tmp_path / "a.npz")
        assert all(np.array_equal(state[name].numpy(), array) for name, array in arrays.items())
        assert list(state) == list(arrays)


def test_older_torch_stream(tmp_path):
    torch.save({"model": weights()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same(read_state_dict(tmp_path / "a.pth")[0], weights())


def test_views_and_parameters_become_own_contiguous_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": base.T, "p": torch.nn.Parameter(base), "half": base.half()}, tmp_path / "a.pth")
    state, _ = read_state_dict(tmp_path / "a.pth")
    assert torch.equal(state["t"], base.T) and state["t"].is_contiguous()
    assert torch.equal(state["p"], base) and not state["p"].requires_grad
    assert state["half"].dtype == torch.float16
    assert state["t"].untyped_storage().nbytes() == 48  # no longer a window onto the file


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_numpy_numbers_under_both_names(tmp_path, core):
    buffer = io.BytesIO()
    torch.save({"model": weights(), "best": np.float64(0.5), "n": np.int64(3)}, buffer)
    other = {"numpy.core": "numpy._core", "numpy._core": "numpy.core"}[core]
    source, target = zipfile.ZipFile(buffer), zipfile.ZipFile(tmp_path / "a.pth", "w")
    for item in source.infolist():  # the pickle is protocol 2: names are plain lines
        data = source.read(item).replace(f"c{other}.multiarray\n".encode(), f"c{core}.multiarray\n".encode())
        assert not item.filename.endswith("data.pkl") or f"{core}.multiarray".encode() in data
        target.writestr(item.filename, data)
    target.close()
    state, extra = read_state_dict(tmp_path / "a.pth")
    assert same(state, weights()) and extra == {"best": 0.5, "n": 3}


def test_namespace_of_training_arguments(tmp_path):
    torch.save({"model": weights(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth")[1]["args"].lr == 0.1
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # not allowed to the whole process


def test_golden_training_snapshot():
    state, extra = read_state_dict(GOLDEN / "02_linear_p16_distilled" / "checkpoint.pth")
    assert state["encoder.dist_token"].shape == (1, 1, 64) and state["decoder.head.weight"].shape[0] == 5
    assert {"optimizer", "lr_scheduler", "epoch", "loss_scaler"} <= set(extra)


def test_what_the_user_allowed_stays_allowed(tmp_path):
    torch.save({"model": weights(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert read_state_dict(tmp_path / "a.pth")[1]["args"].lr == 0.1
        assert argparse.Namespace in torch.serialization.get_safe_globals()


# -- code in pickles ------------------------------------------------------------------------------------------------


class Evil:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def evil_objects(marker):
    import builtins
    import shutil
    import subprocess

    touch = f"open({marker!r}, 'w').close()"
    yield "os.system", Evil(os.system, f"touch {marker}")
    yield "builtins.exec", Evil(builtins.exec, touch)
    yield "builtins.eval", Evil(builtins.eval, touch)
    yield "subprocess.check_call", Evil(subprocess.check_call, ["touch", marker])
    yield "os.mkdir", Evil(os.mkdir, marker)
    yield "shutil.copytree", Evil(shutil.copytree, "/etc/ssl", marker)
    yield "functools.partial", Evil(functools.partial(os.mkdir, marker))
    yield "io.open", Evil(open, marker, "w")
    yield "builtins.getattr", Evil(getattr, "abc", "upper")
    yield "torch.load", Evil(torch.load, marker)
    yield "pathlib", Evil(Path.touch, Path(marker))


@pytest.mark.parametrize("index", range(11))
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, index, zipped):
    marker = tmp_path / "marker"
    _, evil = list(evil_objects(str(marker)))[index]
    torch.save({"model": weights(), "x": evil}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"a\.pth: refused, it would run .*allow_pickle=True"):
        read_state_dict(tmp_path / "a.pth")
    assert not marker.exists()


def test_every_refused_global_is_named(tmp_path):
    torch.save({"a": Evil(os.mkdir, "x"), "b": Evil(eval, "1"), "c": weights()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"it would run (__builtin__|builtins)\.eval, posix\.mkdir"):
        read_state_dict(tmp_path / "a.pth")


def test_opting_in_runs_the_code(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"model": weights(), "x": Evil(os.mkdir, str(marker))}, tmp_path / "a.pth")
    assert same(read_state_dict(tmp_path / "a.pth", allow_pickle=True)[0], weights())
    assert marker.is_dir()


def test_whole_module_only_when_trusted(tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*allow_pickle"):
        read_state_dict(tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth", allow_pickle=True)[0]) == ["weight", "bias"]


def test_bare_pickle_of_code(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Evil(os.mkdir, str(marker))))
    with pytest.raises(CheckpointError, match=r"a\.pkl: "):
        read_state_dict(tmp_path / "a.pkl")
    assert not marker.exists()


def test_object_arrays_in_npz_are_refused(tmp_path):
    marker = tmp_path / "marker"
    np.savez(tmp_path / "a.npz", x=np.array([Evil(os.mkdir, str(marker))], dtype=object))
    with pytest.raises(CheckpointError, match=r"a\.npz.*allow_pickle=False"):
        read_state_dict(tmp_path / "a.npz")
    assert not marker.exists()


# -- files that are something else ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n\n  <HTML>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-lfs pointer"),
        (b"net_kwargs:\n  n_cls: 3\n", r"text \(YAML\?\)"),
        (b'{"a": 1}', "JSON text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "JPEG"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"\x93NUMPY\x01\x00" + bytes(40), r"single numpy array"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (bytes(100), "unknown binary format"),
        (b"PK\x03\x04" + bytes(60), "damaged or truncated zip"),
        ((10**6).to_bytes(8, "little") + b'{"a":', "truncated safetensors"),
        ((5).to_bytes(8, "little") + b'{"a":', "damaged or truncated safetensors"),
        (b"\x80\x02" + bytes(20), "damaged or truncated torch stream"),
        (b"\x80\x02K\x05.", "damaged or truncated torch stream|not a state dict"),
    ],
)
def test_says_what_a_wrong_file_looks_like(tmp_path, content, message):
    (tmp_path / "checkpoint.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pth: .*({message})"):
        read_state_dict(tmp_path / "checkpoint.pth")


def test_folder_missing_and_fifo(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_state_dict(tmp_path / "nothing.pth")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="no regular file"):
            read_state_dict(tmp_path / "pipe")


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "holds no weights; its keys are: epoch"),
        ({}, "no weights"),
        ({"model": {}}, "no weights"),
        ({"a": torch.ones(2), "b": 5}, r"no tensors: b \(int\)"),
    ],
)
def test_torch_files_without_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "a.pth")


def test_other_zip_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("photo.jpg", b"x")
    with pytest.raises(CheckpointError, match="zip archive without weights .photo.jpg"):
        read_state_dict(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("b/data.pkl", b"x")
        archive.writestr("b/constants.pkl", b"x")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_state_dict(tmp_path / "b.pth")


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "stream", "safetensors", "npz"])
def test_truncation_anywhere_is_an_error(tmp_path, kind):
    from safetensors.torch import save_file

    path = tmp_path / "a"
    if kind == "safetensors":
        save_file(weights(), path)
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **{k: v.numpy() for k, v in weights().items()})
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for i in range(20):
        path.write_bytes(whole[: len(whole) * i // 20 + (i % 3)])
        with pytest.raises(CheckpointError, match=str(path)):
            read_state_dict(path)


def test_a_flipped_bit_is_noticed_or_harmless(torch_file):
    whole, expected = torch_file.read_bytes(), weights()
    generator, noticed = random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        torch_file.write_bytes(damaged)
        try:
            state, _ = read_state_dict(torch_file)
        except CheckpointError:
            noticed += 1
        else:
            assert same(state, expected)
    assert noticed > 30  # much of so small a file is padding


def test_a_bit_in_the_weights_fails_the_checksum(torch_file):
    data, needle = torch_file.read_bytes(), weights()["layer.1.weight"].numpy().tobytes()
    at = data.index(needle) + 4
    torch_file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(CheckpointError, match=r"data/1 fails its checksum.*verify=False"):
        read_state_dict(torch_file)
    state, _ = read_state_dict(torch_file, verify=False)
    assert not torch.equal(state["layer.1.weight"], weights()["layer.1.weight"])


# -- bombs ----------------------------------------------------------------------------------------------------------


def repack(source, target, compression, replace=None):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item.filename, (replace or {}).get(item.filename.split("/", 1)[1], data))


def test_compressed_members_are_refused(torch_file, tmp_path):
    repack(torch_file, tmp_path / "b.pth", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="refused, compressed members"):
        read_state_dict(tmp_path / "b.pth")


def test_zip_bombs_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "a.pth")
    repack(tmp_path / "a.pth", tmp_path / "b.pth", zipfile.ZIP_DEFLATED)
    np.savez_compressed(tmp_path / "c.npz", a=np.zeros(1_000_000))
    for name in ("b.pth", "c.npz"):
        with pytest.raises(CheckpointError, match="zip bomb"):
            read_state_dict(tmp_path / name)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    torch.save({"a": torch.ones(3), "big": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"refused, big claims \(1000000, 1000000\)"):
        read_state_dict(tmp_path / "a.pth")


def test_many_names_for_one_storage_are_refused(tmp_path):
    shared = torch.ones(100_000)
    torch.save({f"a{i}": shared for i in range(1000)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="more than the file holds"):
        read_state_dict(tmp_path / "a.pth")


def test_a_storage_larger_than_its_record_cannot_be_read(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        names = [n for n in archive.namelist() if n.endswith("data.pkl")]
        pickled = archive.read(names[0])
    claims = pickled.replace((1000).to_bytes(2, "little"), (60_000).to_bytes(2, "little"))
    assert claims != pickled
    repack(tmp_path / "a.pth", tmp_path / "b.pth", zipfile.ZIP_STORED, {"data.pkl": claims})
    with pytest.raises(CheckpointError, match=r"b\.pth: .*storage 0 claims 240000 bytes, its member is 4000"):
        read_state_dict(tmp_path / "b.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to(torch.float8_e4m3fn),
    ],
)
def test_odd_tensors_are_refused(tmp_path, tensor):
    torch.save({"odd": tensor}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="odd (is no plain tensor|has the unsupported dtype)"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(tmp_path, value):
    state = weights()
    state["layer.2.weight"][3, 4] = value
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in layer\.2\.weight;.*allow_nonfinite=True"):
        read_state_dict(tmp_path / "a.pth")
    loaded, _ = read_state_dict(tmp_path / "a.pth", allow_nonfinite=True)
    assert not torch.isfinite(loaded["layer.2.weight"][3, 4])


def test_listing_is_short():
    assert listing(["a", "b"]) == "a, b"
    assert listing([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def test_two_members_of_one_name(torch_file):
    with pytest.warns(UserWarning), zipfile.ZipFile(torch_file, "a") as archive:
        archive.writestr(archive.namelist()[0], b"\x80\x02}.")
    with pytest.raises(CheckpointError, match="two members of the archive have one name"):
        read_state_dict(torch_file)
