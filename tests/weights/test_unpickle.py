"""Pickles read as data: training checkpoints of any tool load, code is refused by name, small files stay small."""

import argparse
import collections
import datetime
import enum
import functools
import os
import pickle
import resource
import struct
import sys
import types
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from segmenter.weights.read import CheckpointError, read_weights
from segmenter.weights.unpickle import Inert, StoredTensor


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(8, 5 + i, generator=generator) for i in range(3)}


def same(state, expected):
    return list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in expected)


def write(path, pickled):
    """A file of torch.save around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def refusal(path, **options):
    with pytest.raises(CheckpointError) as caught:
        read_weights(path, **options)
    return str(caught.value).removeprefix(f"{path}: ")


class Module:
    """Puts a module that is not installed in place while a file is written."""

    def __init__(self, name, *classes):
        self.name, self.classes = name, classes

    def __enter__(self):
        parts = self.name.split(".")
        self.added = [".".join(parts[: i + 1]) for i in range(len(parts))]
        for name in self.added:
            sys.modules[name] = types.ModuleType(name)
        for kind in self.classes:
            kind.__module__ = self.name
            kind.__qualname__ = kind.__name__
            for member in vars(kind).values():
                if isinstance(member, types.FunctionType):
                    member.__module__, member.__qualname__ = self.name, f"{kind.__name__}.{member.__name__}"
            setattr(sys.modules[self.name], kind.__name__, kind)

    def __exit__(self, *_):
        for name in self.added:
            del sys.modules[name]


# -- training checkpoints -------------------------------------------------------------------------------------------


class HistoryBuffer:
    """As mmengine's: arrays, and functions of its own in its state."""

    def mean(self):
        return 0

    def __init__(self):
        self._log_history, self._count_history = np.array([1.0, 0.5]), np.array([1, 1])
        self._statistics_methods = collections.OrderedDict(mean=HistoryBuffer.mean)


class AttributeDict(dict):
    pass


class Fitting(enum.Enum):
    NOW = "now"


class Precision(enum.IntFlag):
    HALF = 2


class DictConfig:
    def __setstate__(self, state):
        raise AssertionError("run")

    def __init__(self):
        self._content = {"a": [1]}


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_training_checkpoints_load_without_the_classes_in_them(tmp_path, zipped, protocol):
    parts = (HistoryBuffer, AttributeDict, Fitting, Precision, DictConfig, Point)
    with Module("some_tool.logging.buffer", *parts):
        content = {
            "state_dict": weights(),
            "message_hub": {"log_scalars": collections.OrderedDict(loss=HistoryBuffer()), "runtime_info": {}},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
            "cfg": [AttributeDict(a=1), DictConfig(), {Fitting.NOW: Precision.HALF}, Point(1, 2)],
            "args": argparse.Namespace(lr=0.1, out=Path("x")),
            "times": [datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(1), uuid.UUID(int=3)],
            "sets": [{1, 2}, frozenset("a"), collections.deque([1]), collections.Counter("aab"), slice(1)],
            "lazy": collections.defaultdict(list, a=[1]),
            "layer": functools.partial(torch.nn.LayerNorm, eps=1e-6),
            "act": [torch.nn.functional.gelu, torch.optim.AdamW, torch.float16, torch.device("cpu"), torch.Size([2])],
            "rng": [np.random.RandomState(0), np.random.default_rng(0), np.random.get_state(), torch.get_rng_state()],
            "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.str_("ä"), np.arange(3.0), np.dtype("f4")],
            "plain": [None, True, -5, 2**70, 1.5, b"ab", b"", bytearray(b"c"), "x" * 300, (), (1, 2, 3, 4), 1j],
        }  # fmt: skip
        options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
        torch.save(content, tmp_path / "a.pth", **options)
    found = read_weights(tmp_path / "a.pth")
    assert same(found.state, weights())
    extra = found.extra
    assert extra["args"].lr == 0.1 and extra["args"].out.name.endswith("Path")
    assert extra["numpy"][:4] == [0.5, 3, True, "ä"] and extra["sets"][:2] == [{1, 2}, frozenset("a")]
    assert extra["sets"][3] == {"a": 2, "b": 1} and extra["lazy"] == {"a": [1]}
    assert extra["plain"][:7] == content["plain"][:7] and extra["plain"][8:11] == content["plain"][8:11]
    assert extra["act"][2] == torch.float16
    assert extra["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
    moment = extra["optimizer"]["state"][0]["exp_avg"]
    assert type(moment) is StoredTensor and moment.shape == (3,)  # not read
    history = extra["message_hub"]["log_scalars"]["loss"]
    assert type(history) is Inert and history.name == "some_tool.logging.buffer.HistoryBuffer"
    assert extra["cfg"][0].items == [("a", 1)] and extra["cfg"][1].state == {"_content": {"a": [1]}}


@pytest.mark.parametrize("old, new", [("numpy.core", "numpy._core"), ("numpy._core", "numpy.core")])
def test_numbers_of_any_numpy_are_read_by_name(tmp_path, monkeypatch, old, new):
    monkeypatch.delattr(np, "_core", raising=False)  # numpy 1.24 has none, 1.26 an incomplete one
    pickled = pickle.dumps({"model": {}, "n": np.float64(0.25)}, 2)
    write(tmp_path / "a.pth", pickled.replace(f"c{old}.".encode(), f"c{new}.".encode()))
    assert "no weights" in refusal(tmp_path / "a.pth")
    torch.save({"model": weights(), "n": [np.float64(0.25), np.int16(-3)]}, tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "b.pth") as source, zipfile.ZipFile(tmp_path / "c.pth", "w") as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item).replace(f"c{old}.".encode(), f"c{new}.".encode()))
    found = read_weights(tmp_path / "c.pth")
    assert found.extra["n"] == [0.25, -3] and same(found.state, weights())


def test_objects_in_the_place_of_weights_are_named(tmp_path):
    with Module("some_tool", HistoryBuffer):
        torch.save({"model": {"a": torch.ones(2), "b": HistoryBuffer()}}, tmp_path / "a.pth")
        torch.save({"model": HistoryBuffer(), "epoch": 3}, tmp_path / "b.pth")
        torch.save(HistoryBuffer(), tmp_path / "c.pth")
    assert refusal(tmp_path / "a.pth") == "has weights that are no tensors: b (some_tool.HistoryBuffer)"
    assert "allow_pickle=True makes model (some_tool.HistoryBuffer)" in refusal(tmp_path / "b.pth")
    assert "an object of some_tool.HistoryBuffer, not a state dict" in refusal(tmp_path / "c.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_missing_module_is_named_and_not_called_damage(tmp_path, zipped):
    path = tmp_path / "a.pth"
    with Module("some_tool.buffer", HistoryBuffer):
        torch.save({"model": weights(), "x": HistoryBuffer()}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path, allow_pickle=True)
    assert "needs the module some_tool, which is not installed" in message and "damaged" not in message
    torch.save(weights(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or truncated" in refusal(path, allow_pickle=True)


# -- code -----------------------------------------------------------------------------------------------------------

CALL = b"\x85R."  # of what is on the stack with one argument
GADGETS = {
    "INST": (b"(S'true'\nios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\nS'true'\no.", "os.system"),
    "protocol 0": (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    "only named": (b"\x80\x02cposix\nsystem\n.", "posix.system"),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true" + CALL, "os.system"),
    "memoized": (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x04true" + CALL, "os.system"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\nX\x04\0\0\0true\x85\x81.", "subprocess.Popen"),
    "NEWOBJ_EX": (b"\x80\x04csubprocess\nPopen\n)}\x92.", "subprocess.Popen"),
    "EXT1": (b"\x80\x02\x82\x01.", "copyreg.extension 1"),
    "EXT4": (b"\x80\x02\x84\x01\0\0\0.", "copyreg.extension 1"),
    "dotted": (b"\x80\x04\x8c\x07pathlib\x8c\nPath.touch\x93\x8c\x01x" + CALL, "pathlib.Path.touch"),
    "getattr": (b"\x80\x02c__builtin__\ngetattr\ncpathlib\nPath\nX\x05\0\0\0touch\x86R.", "pathlib.Path.touch"),
    "getattr of a value": (b"\x80\x02c__builtin__\ngetattr\nX\x01\0\0\0aX\x05\0\0\0upper\x86R.", "builtins.getattr"),
    "partial": (b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R)R.", "os.system"),
    "called object": (b"\x80\x02ca_tool\nMaker\n)R)R.", "an object of a_tool.Maker"),
    "function of a tool": (b"\x80\x02ca_tool.run\nrunstring\nX\x01\0\0\0x" + CALL, "a_tool.run.runstring"),
    "torch": (b"\x80\x02ctorch.hub\nload\nX\x01\0\0\0x" + CALL, "torch.hub.load"),
    "nested pickle": (b"\x80\x02ctorch.storage\n_load_from_bytes\nX\x01\0\0\0x" + CALL, "_load_from_bytes"),
    "after it is cut": (b"\x80\x02cos\nsystem\nX\x04\0\0\0tr", "os.system"),
    "in BUILD": (b"\x80\x02ca_tool\nThing\n)\x81cos\nsystem\nb.", "os.system"),
    "as a key": (b"\x80\x02}cos\nsystem\nK\x01s.", "os.system"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GADGETS)
def test_code_is_refused_by_name(tmp_path, kind):
    pickled, name = GADGETS[kind]
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickled)
    files = [write(tmp_path / "a.pth", pickled)] + ([bare] if kind != "after it is cut" else [])
    for path in files:
        message = refusal(path)
        assert message.startswith("refused, it would run ") and name in message and "damaged" not in message
        assert message.endswith("if you trust this file pass allow_pickle=True")


def test_nothing_named_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    body = b"\x80\x02}X\x01\0\0\0actrap_module\nThing\n)\x81sX\x01\0\0\0bctrap_module\nOther\ns."
    assert "allow_pickle=True makes a (trap_module.Thing)" in refusal(write(tmp_path / "a.pth", body))
    assert "trap_module" not in sys.modules


def test_names_are_printable(tmp_path):
    path = write(tmp_path / "a.pth", b"\x80\x02cos\nsys\x1b[2Jtem\n.")
    assert "os.sys\\x1b[2Jtem" in refusal(path)


# -- small files stay small and quick ---------------------------------------------------------------------------------


def shared(n):
    """A tuple of a tuple of ..., each twice: 2**n parts."""
    return b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(n))


LARGE = [b"\x8a\x0b" + ((2**61 - 1) * k).to_bytes(11, "little") for k in range(1, 60_000)]  # all have the hash 0
LONG_NAME = b"X" + struct.pack("<I", 300_000) + b"a" * 300_000
BOMBS = {
    "keys of one hash": (b"\x80\x02}(" + b"N".join(LARGE) + b"Nu.", "steps"),
    "set of one hash": (b"\x80\x04\x8f(" + b"".join(LARGE) + b"\x90.", "steps"),
    "nested key": (b"\x80\x02" + shared(60) + b"}h\x3cNs.", "tuple as a key"),
    "nested key of SETITEMS": (b"\x80\x02" + shared(60) + b"}(h\x3cNu.", "as a key"),
    "nested key of DICT": (b"\x80\x02" + shared(60) + b"0(h\x3cNd.", "as a key"),
    "nested member": (b"\x80\x04" + shared(60) + b"\x8f(h\x3c\x90.", "as a key"),
    "nested member of frozenset": (b"\x80\x04" + shared(60) + b"0(h\x3c\x91.", "as a key"),
    "nested key of OrderedDict": (
        b"\x80\x02" + shared(60) + b"0ccollections\nOrderedDict\n](h\x3cK\x01\x86e\x85R.", "as a key"
    ),
    "nested key of set()": (b"\x80\x02" + shared(60) + b"0c__builtin__\nset\n](h\x3ce\x85R.", "as a key"),
    "list as a key": (b"\x80\x02}]Ns.", "list as a key"),
    "nested value": (b"\x80\x02" + shared(60) + b".", "holds a tuple, not a state dict"),
    "nested weight": (b"\x80\x02" + shared(60) + b"0}X\x01\0\0\0ah\x3cs.", "holds no weights; its keys are: a"),
    "numpy scalar": (
        b"\x80\x02(" + (b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x0b\0\0\0V2147483647\x89\x88\x87R\x85R" * 30)
        + b"l.", "holds a list",
    ),
    "numpy text": (
        b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x0b\0\0\0U2147483647\x89\x88\x87RX\x01\0\0\0a\x86R.",
        "an object of numpy.generic",
    ),
    "array": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85X\x01\0\0\0b\x87R.",
        "an object of numpy.ndarray",
    ),
    "bytearray": (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "an object of builtins.bytearray"),
    "range": (b"\x80\x02c__builtin__\nset\nc__builtin__\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.", "damaged"),
    "long number": (b"\x80\x02\x8b" + struct.pack("<i", 100_000) + b"\1" * 100_000 + b".", "number of 799993 bits"),
    "claimed number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "damaged"),
    "claimed text": (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.", "damaged"),
    "claimed bytes": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.", "damaged"),
    "claimed array": (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.", "damaged"),
    "decimal number": (b"\x80\x02L" + b"9" * 4000 + b"L\n.", "bits"),
    "many steps": (b"\x80\x02(" + b"N" * 1_000_001 + b"l.", "more than 1000000 steps"),
    "one text encoded over and over": (
        b"\x80\x02" + LONG_NAME + b"q\x00c_codecs\nencode\nq\x010(" + b"h\x01h\x00\x85R" * 20_000 + b"l.", "a list",
    ),
    "one list copied over and over": (
        b"\x80\x02](" + b"N" * 10_000 + b"eq\x00c__builtin__\nset\nq\x01" + b"h\x01h\x00\x85R0" * 10_000 + b".", "steps"
    ),
    "one name over and over": (
        b"\x80\x04" + LONG_NAME + b"q\x00" + b"h\x00h\x00\x930" * 10_000 + b".", "a name of 600000 characters"
    ),
    "dictionaries in each other": (
        b"\x80\x02}q\x00(" + b"".join(b"X" + struct.pack("<I", len(k)) + k + b"h\x00" for k in (b"model", b"state_dict",
        b"net", b"module", b"ema", b"params", b"network", b"average", b"model_ema")) + b"u.", "holds no weights",
    ),
    "deep": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
    "deep objects": (b"\x80\x02" + b"ca\nB\n)\x81" + b"\x85q\x000ca\nB\nh\x00\x81" * 50_000 + b".", "object of a.B"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused(tmp_path, kind):
    pickled, message = BOMBS[kind]
    path = write(tmp_path / "a.pth", pickled)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def tensor_pickle(numel=4, offset=0, size=(2, 2), stride=(2, 1), key=b"0"):
    def number(n):
        raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key + b"X\x03\0\0\0cpu" + number(numel) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(size) + numbers(stride)
    return b"\x80\x02}X\x01\0\0\0a" + tensor + b"\x89}tRs."


@pytest.mark.parametrize(
    "claims, message",
    [
        ({}, None),
        ({"size": (3, 2)}, r"a claims (3, 2) = 24 bytes, more than the file holds"),
        ({"offset": 1}, "more than the file holds"),
        ({"stride": (3, 1)}, "more than the file holds"),
        ({"stride": (0, 0), "size": (10**9, 10**9)}, "more than the file holds"),
        ({"stride": (0, 0), "size": (2**61, 2**61)}, "more than the file holds"),
        ({"stride": (0, 0), "size": (2**62, 2)}, "an impossible shape"),
        ({"stride": (-1, 1)}, "an impossible shape"),
        ({"offset": -1}, "an impossible shape"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "an impossible shape"),
        ({"size": (10**12, 0), "stride": (1, 1)}, "a is empty, of shape (1000000000000, 0)"),
        ({"size": (2,)}, "a is no plain tensor"),
        ({"numel": 2**40}, "storage 0 claims 4398046511104 bytes, its member is 16 bytes"),
        ({"numel": -4}, "damaged"),
        ({"key": b"1"}, "storage 1 claims 16 bytes, its member is missing"),
    ],
)
def test_what_tensors_claim(tmp_path, claims, message):
    path = write(tmp_path / "a.pth", tensor_pickle(**claims))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
        archive.writestr("archive/byteorder", "little")
    if message is None:
        assert read_weights(path).state["a"].tolist() == [[0, 1], [2, 3]]
    else:
        assert message in refusal(path)


def test_a_member_larger_than_its_storage_is_not_kept(tmp_path):
    path = write(tmp_path / "a.pth", tensor_pickle())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", np.arange(100, dtype="<f4").tobytes())
    read = read_weights(path).state["a"]
    assert read.tolist() == [[0, 1], [2, 3]] and read.untyped_storage().nbytes() == 16


def test_big_endian_files(tmp_path):
    path = write(tmp_path / "a.pth", tensor_pickle())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", np.arange(4, dtype=">f4").tobytes())
        archive.writestr("archive/byteorder", "big")
    assert read_weights(path).state["a"].tolist() == [[0, 1], [2, 3]]


def test_torch_agrees_on_every_kind_of_tensor(tmp_path):
    base = torch.randn(4, 6)
    state = {
        "view": base[1:3, ::2], "turned": base.T, "again": base, "slice": base[2], "scalar": torch.tensor(3.0),
        "parameter": torch.nn.Parameter(base), "half": base.half(), "brain": base.bfloat16(), "double": base.double(),
        "long": torch.arange(3), "bool": base > 0, "byte": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    state["named"] = base.clone()
    state["named"].some_attribute = 5
    for zipped in (True, False):
        torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        theirs = torch.load(tmp_path / "a.pth", weights_only=True)
        ours = read_weights(tmp_path / "a.pth").state
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            assert type(tensor) is torch.Tensor and not tensor.requires_grad and tensor.is_contiguous()
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert len({tensor.data_ptr() for tensor in ours.values()}) == len(ours)  # memory of their own


def test_attributes_cannot_take_the_place_of_methods(tmp_path):
    state = collections.OrderedDict(weights())
    state.__dict__["get"] = 5
    torch.save(state, tmp_path / "a.pth")
    assert "an attribute get in its pickle takes the place of dict's" in refusal(tmp_path / "a.pth")
    tensor = torch.ones(3)
    tensor.numel = 5
    torch.save({"a": tensor}, tmp_path / "b.pth")
    assert "an attribute numel in its pickle takes the place of Tensor's" in refusal(tmp_path / "b.pth")
    assert read_weights(tmp_path / "b.pth", allow_pickle=True).state["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        lambda: torch.ones(3, dtype=torch.uint16),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_named(tmp_path, make, trusted):
    torch.save({"fine": torch.ones(2), "odd": make()}, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth", allow_pickle=trusted)
    assert message.startswith("odd ") and ("is no plain tensor" in message or "unsupported dtype" in message)


def test_a_negative_view_is_refused_or_resolved(tmp_path):
    tensor = torch.complex(torch.ones(3), torch.ones(3)).conj().imag  # -1, kept as 1 and a bit
    assert tensor.is_neg()
    torch.save({"odd": tensor}, tmp_path / "a.pth")
    assert "odd is no plain tensor (a conjugate or negative view)" in refusal(tmp_path / "a.pth")
    read = read_weights(tmp_path / "a.pth", allow_pickle=True).state["odd"]
    assert read.tolist() == [-1, -1, -1] and not read.is_neg()


@pytest.mark.parametrize("name", [5, b"a", (1, 2), "x" * 501])
def test_names_of_weights_are_text(tmp_path, name):
    torch.save({"fine": torch.ones(1), name: torch.ones(1)}, tmp_path / "a.pth")
    assert "whose name is no text of at most 500 characters" in refusal(tmp_path / "a.pth")


# -- other formats --------------------------------------------------------------------------------------------------


def write_npy(path, shape, raw, descr="<f4"):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + raw)
    return path


def test_arrays_of_npz_are_as_large_as_they_say(tmp_path):
    raw = np.arange(4, dtype="<f4").tobytes()
    path = tmp_path / "a.npz"
    assert read_weights(write_npy(path, (2, 2), raw)).state["a"].tolist() == [[0, 1], [2, 3]]
    for shape in ((10**9,), (10**6, 10**6), (3,), (5,), (-1, -4), (2**70,)):
        assert "refused, a claims" in refusal(write_npy(path, shape, raw))
    assert "a is empty" in refusal(write_npy(path, (10**12, 0), b""))
    big_endian = np.arange(4, dtype=">f4").tobytes()
    assert read_weights(write_npy(path, (4,), big_endian, ">f4")).state["a"].tolist() == [0, 1, 2, 3]
    brain = torch.tensor([1.0, -2.5], dtype=torch.bfloat16)
    read = read_weights(write_npy(path, (2,), brain.view(torch.int16).numpy().tobytes(), "|V2")).state["a"]
    assert read.dtype == torch.bfloat16 and torch.equal(read, brain)
    assert "no tensors: a" in refusal(write_npy(path, (4,), raw, "<U1"))
    np.savez(path, a=np.asfortranarray(np.arange(6).reshape(2, 3)))
    assert read_weights(path).state["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_empty_weights_of_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.empty(10**12, 0, 1, 1), "b": torch.ones(1)}, tmp_path / "m.safetensors")
    assert "a is empty, of shape (1000000000000, 0, 1, 1)" in refusal(tmp_path / "m.safetensors")


def test_paths_that_cannot_be_opened(tmp_path):
    assert "no such file" in refusal(tmp_path / "a\0b")
    assert "cannot be read" in refusal(tmp_path / ("a" * 5000))
    assert "is no regular file" in refusal(Path("/dev/zero"))
    os.symlink("loop", tmp_path / "loop")
    assert "cannot be read" in refusal(tmp_path / "loop")


def test_a_file_cut_short_while_it_is_read(tmp_path, monkeypatch):
    import segmenter.weights.torch_file as torch_file

    torch.save({"a": torch.ones(10_000)}, tmp_path / "a.pth")
    real = torch_file.read_bytes

    def cut(file, at, n):
        if n == 40_000:
            with open(tmp_path / "a.pth", "r+b") as other:
                other.truncate(at + 10_000)
        return real(file, at, n)

    monkeypatch.setattr(torch_file, "read_bytes", cut)
    assert "damaged or truncated, it ends before" in refusal(tmp_path / "a.pth")
