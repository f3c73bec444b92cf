"""Reads pickles as data: an interpreter that imports nothing and calls nothing that a file names.

The rule. Tensors, numpy numbers and plain containers become what they are. Any other class, whatever module it is from,
becomes an `Inert`: its name, arguments and state as data. What would run code is refused by name: calls of functions (a
name that does not begin with a capital, unless only classes can stand there) and every name of the standard library but
the harmless ones in `_INERT`.
Nothing is allocated beyond the size of the pickle.
"""

import argparse
import builtins
import dataclasses
import pickletools
import re
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from segmenter.errors import printable

MAX_NAMES = 8  # of keys or tensors listed in a message
MAX_STEPS = 1_000_000  # opcodes and copied elements of a pickle: seconds; training checkpoints take 50,000
_MAX_TEXT = 200  # characters of a name in a message
_MAX_RAW = 1000  # bytes of a number, or what else is decoded
_MAX_DIMENSIONS = 64  # torch takes no more
_MAX_KEY = 100  # parts of one key, nested ones included
_LARGE = 2**61 - 1  # whole numbers from here on have the hashes of others
_PLAIN_KEYS = (str, bytes, int, float, bool, type(None))
_ALIASES = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy._core": "numpy.core"}
_PYTHON_2 = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str", "builtins.xrange": "builtins.range"}
_INERT = {  # of the standard library, and functions: naming and calling these runs nothing of interest
    *(f"builtins.{name}" for name in (
        "object", "type", "int", "float", "str", "bytes", "bool", "list", "tuple", "dict", "slice", "range", "complex",
        "bytearray", "set", "frozenset", "getattr", "reduce", "Ellipsis", "NotImplemented",
    )),
    *(f"builtins.{name}" for name, found in vars(builtins).items() if isinstance(found, type(Exception))
      and issubclass(found, Exception)),
    *(f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter", "deque", "ChainMap")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"pathlib{part}.{kind}Path" for part in ("", "._local") for kind in (
        "", "Pure", "Posix", "PurePosix", "Windows", "PureWindows",
    )),
    *(f"{module}.{name}" for module, name in (  # annotations of types: Optional[int], int | None, list[int]
        ("_operator", "getitem"), ("_operator", "or_"), ("_functools", "reduce"), ("functools", "reduce"),
        ("types", "GenericAlias"),
    )),
    *(f"ipaddress.IPv{version}{kind}" for version in (4, 6) for kind in ("Address", "Network", "Interface")),
    "_io.BytesIO", "_io.StringIO", "array.array", "array._array_reconstructor", "http.HTTPStatus", "logging.getLogger",
    "os.stat_result", "time.struct_time", "zoneinfo.ZoneInfo._unpickle", "numpy.ma.core._mareconstruct",
    "_codecs.encode", "argparse.Namespace", "copyreg._reconstructor", "decimal.Decimal", "fractions.Fraction",
    "functools.partial", "io.BytesIO", "random.Random", "re._compile", "types.SimpleNamespace", "uuid.UUID",
    "zoneinfo.ZoneInfo", "numpy.dtype", "numpy.random._pickle.__randomstate_ctor",
    "numpy.random._pickle.__generator_ctor", "numpy.random._pickle.__bit_generator_ctor", "torch.device", "torch.dtype",
    "torch.serialization._get_layout",
    "numpy.core.numeric._frombuffer", "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_DTYPES = {f"torch.{name}": found for name in dir(torch) if isinstance(found := getattr(torch, name), torch.dtype)}


class Refused(ValueError):
    """What is wrong with a file, for people, without its path."""


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle imports."""

    name: str


@dataclasses.dataclass(eq=False, repr=False)
class Inert:
    """An object as data: of which class, made with which arguments and state, filled with which items."""

    name: str
    args: Any = ()
    state: Any = None
    items: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """Bytes beside the pickle: `key` tells where."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that has not been read: a view of a storage; offset and stride are in elements, not yet checked."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def type_name(value: Any) -> str:
    """The type of a value, for messages; that of what is inert as the file names it."""
    return value.name if isinstance(value, Inert | Global) else type(value).__name__


def listing(names: list[str]) -> str:
    """The first names, comma-separated, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(short(name) for name in names[:MAX_NAMES]) + more


def short(key: Any) -> str:
    """A name or key for a message, whatever it is, on at most 200 characters."""
    text = key if isinstance(key, str) else repr(key) if isinstance(key, int | float | None) else f"a {type_name(key)}"
    return printable(text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}...")


class Unpickler:
    """Interprets one pickle after the other; all opcodes of protocols 0 to 5.

    Args:
        persistent: what stands for the persistent id, a tuple, of a storage.
    Attributes:
        refused: the names met that would have run code.
    """

    def __init__(self, persistent: Callable[[tuple[Any, ...]], Any]):
        self._persistent = persistent
        self.refused: set[str] = set()
        self._steps = MAX_STEPS

    def load(self, file: BinaryIO) -> Any:
        """The object of the pickle that begins at the position of `file`, which is left behind it.

        Raises:
            Refused: it would run code, or takes too much. ValueError, TypeError, LookupError ...: no whole pickle.
        """
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self._spend(1)
                if opcode.name in _LITERALS:
                    if isinstance(argument, int) and argument.bit_length() > 1024:
                        raise Refused(f"refused, its pickle holds a number of {argument.bit_length()} bits")
                    self._stack.append(argument)
                else:
                    _OPCODES[opcode.name](self, argument)
            value = self._stack.pop()
        except Exception:
            if not self.refused:
                raise
        if self.refused:
            names = listing(sorted(self.refused))
            raise Refused(f"refused, it would run {names}; if you trust this file pass allow_pickle=True")
        return value

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise Refused(f"refused, its pickle takes more than {MAX_STEPS} steps")

    def _key(self, key: Any) -> Any:
        """The key itself, if hashing it, and comparing it with those of the same hash, takes no time to speak of.

        Nested tuples that share parts hash for ever. Those of numbers, and large numbers, can be made to have one hash;
        they cost so many steps that there are never enough of them to matter.
        """
        parts, seen = [key], 0
        while parts:
            part = parts.pop()
            seen += 1
            if type(part) in (tuple, frozenset) and len(part) + seen <= _MAX_KEY:
                parts.extend(part)
                self._spend(100 + 10 * len(part))
            elif type(part) is int and not -_LARGE < part < _LARGE:
                self._spend(100)
            elif seen > _MAX_KEY or not (type(part) in _PLAIN_KEYS or isinstance(part, Inert | Global | torch.dtype)):
                raise Refused(f"refused, its pickle has a {type_name(key)} as a key that is unhashable or too large")
        return key

    # -- the stack --

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _pop(self, n: int) -> list[Any]:
        items = self._stack[len(self._stack) - n :]
        del self._stack[len(self._stack) - n :]
        if len(items) != n:
            raise IndexError("the stack of the pickle is empty")
        return items

    def _push(self, value: Any) -> None:  # after what is popped, which may change the stack
        self._stack.append(value)

    def _push_dict(self, items: list[Any]) -> None:
        self._stack.append({})
        self._set(items)

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _fill(self, items: list[Any]) -> None:
        """Adds items to the list, set or inert object on top."""
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(map(self._key, items))
        elif isinstance(target, Inert):
            target.items += items
        else:
            list.extend(target, items)

    def _set(self, items: list[Any]) -> None:
        """Sets keys and values, in turn, of the dictionary or inert object on top."""
        target = self._stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, Inert):
            target.items += pairs
        else:
            dict.update(target, [(self._key(key), value) for key, value in pairs])

    def _build(self, state: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, argparse.Namespace) and isinstance(state, dict):
            vars(target).update((name, value) for name, value in state.items() if isinstance(name, str))
        elif isinstance(target, dict):
            _check_attributes(state, dict)

    # -- names and calls --

    def _global(self, module: Any, name: Any) -> Global | torch.dtype:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        if len(module) + len(name) > 500:
            raise Refused(f"refused, its pickle imports a name of {len(module) + len(name)} characters")
        for old, new in _ALIASES.items():
            if module == old or module.startswith(f"{old}."):
                module = new + module[len(old) :]
        full = short(f"{module}.{name}")
        full = _PYTHON_2.get(full, full)
        if module.partition(".")[0] in sys.stdlib_module_names and full not in _INERT and module != "typing":
            self.refused.add(full)
        return _DTYPES.get(full) or Global(full)

    def _call(self, what: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise TypeError("arguments that are no tuple")
        self._spend(len(args))
        name = type_name(what)
        if not isinstance(what, Global):
            self.refused.add(f"an object of {name}")
        elif name == "builtins.getattr":  # how older Pythons write members of an Enum, and methods
            if isinstance(args[0], Global):
                return self._global(args[0].name, args[1])
            self.refused.add(name)
        elif name in _CALLS:
            return _CALLS[name](self, *args)
        elif not _is_class(name):
            self.refused.add(name)
        return Inert(name, args)

    def _make(self, what: Any, args: Any, keywords: Any = None) -> Any:
        """An object of a class, whatever its name: Python, too, takes nothing else here."""
        if keywords and isinstance(args, tuple):
            args = (*args, keywords)
        if isinstance(what, Global) and isinstance(args, tuple) and what.name not in _CALLS:
            self._spend(len(args))
            return Inert(what.name, args)
        return self._call(what, args)

    def _push_object(self, what: Any, *args: Any) -> None:
        self._stack.append(self._call(what, args))

    # -- what is made for calls --

    def _dict(self, *args: Any) -> dict[Any, Any]:
        """OrderedDict, Counter; defaultdict, whose first argument is its factory."""
        pairs = args[0] if args and isinstance(args[0], list | dict) else []
        self._spend(len(pairs))
        return {self._key(key): value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)}

    def _elements(self, items: Any = ()) -> set[Any]:
        self._spend(len(items))
        return {self._key(item) for item in items}

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes | Inert:
        """How protocol 2 writes bytes. Long ones, those of arrays, stay text: a text could be encoded over and over."""
        if not isinstance(text, str) or len(text) > _MAX_RAW or encoding not in ("latin1", "latin-1"):
            return Inert("_codecs.encode", (text, encoding))
        self._spend(len(text) // 16)
        return text.encode(encoding)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *others: Any) -> StoredTensor | Inert:
        numbers = (offset, *shape, *stride)
        self._spend(len(numbers))
        if not isinstance(storage, Storage) or len(shape) != len(stride):
            return Inert("a tensor without storage")
        if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise Refused("refused, a tensor with an impossible shape, stride or offset")
        if any(isinstance(other, dict) and ("conj" in other or "neg" in other) for other in others[2:]):
            return Inert("a conjugate or negative view")
        dtype = next((other for other in others if isinstance(other, torch.dtype)), storage.dtype)
        return StoredTensor(storage, dtype, offset, tuple(shape), tuple(stride))

    def _parameter(self, tensor: Any, requires_grad: Any = None, hooks: Any = None, attributes: Any = None) -> Any:
        _check_attributes(attributes, torch.Tensor)
        return tensor

    def _typed_tensor(self, function: Any, kind: Any, args: Any, attributes: Any = None) -> Any:
        """A tensor with attributes of Python's, or of a subclass, which stays inert."""
        _check_attributes(attributes, torch.Tensor)
        tensor = self._call(function, args)
        plain = type_name(kind) in ("torch.Tensor", "torch.nn.parameter.Parameter")
        return tensor if plain else Inert(type_name(kind), (tensor,))

    def _number(self, dtype: Any, raw: Any = None) -> Any:
        """A numpy scalar as a number or text of Python; inert if it is something else."""
        spec = dtype.args[0] if isinstance(dtype, Inert) and dtype.name == "numpy.dtype" and dtype.args else ""
        order = dtype.state[1] if spec and isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
        raw = self._encode(raw) if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
        small = isinstance(spec, str) and len(spec) < 8 and isinstance(raw, bytes) and len(raw) <= _MAX_RAW
        if small and order in ("<", ">", "|", "="):
            if re.fullmatch(r"b1|[iu][1248]|f[248]", spec) and len(raw) == int(spec[1:]):
                return np.frombuffer(raw, (order if order != "|" else "=") + spec)[0].item()
            if re.fullmatch(r"U\d+", spec):
                return raw.decode("utf-32-be" if order == ">" else "utf-32-le").rstrip("\0")
        return Inert("numpy.generic", (dtype, raw))


def _check_attributes(state: Any, kind: type) -> None:
    """Attributes that tools set (_metadata of a state dict ...) are not needed; one that hides a method is a trap."""
    for part in state if isinstance(state, tuple) else (state,):
        for name in part if isinstance(part, dict) else ():
            if isinstance(name, str) and hasattr(kind, name):
                raise Refused(f"refused, an attribute {short(name)} in its pickle takes the place of {kind.__name__}'s")


def _is_class(name: str) -> bool:
    """Whether calling it makes an object, by the convention of names; what rebuilds odd tensors counts as such."""
    last = name.rpartition(".")[2].lstrip("_")
    return last[:1].isupper() or name in _INERT or name.startswith("torch._utils._rebuild_")


def storage_of(pid: tuple[Any, ...]) -> Storage:
    """The storage that torch's persistent id ("storage", type, key, location, number of elements) describes."""
    if pid[0] != "storage" or not isinstance(pid[1], Global) or type(pid[4]) is not int or pid[4] < 0:
        raise ValueError("a persistent id that is no storage")
    dtype = _STORAGES.get(pid[1].name.rpartition(".")[2])
    if dtype is None or not pid[1].name.startswith("torch."):
        raise Refused(f"holds tensors in a {pid[1].name}, which is not supported")
    return Storage(short(pid[2]), dtype, pid[4] * dtype.itemsize)


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "NONE", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_OPCODES: dict[str, Callable[[Unpickler, Any], Any]] = {
    "PROTO": lambda u, _: None,
    "FRAME": lambda u, _: None,
    "STOP": lambda u, _: None,
    "NEWTRUE": lambda u, _: u._stack.append(True),
    "NEWFALSE": lambda u, _: u._stack.append(False),
    "MARK": lambda u, _: u._mark(),
    "POP": lambda u, _: u._stack.pop() if u._stack else u._marked(),
    "POP_MARK": lambda u, _: u._marked(),
    "DUP": lambda u, _: u._stack.append(u._stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda u, at: u._memo.update({at: u._stack[-1]})),
    "MEMOIZE": lambda u, _: u._memo.update({len(u._memo): u._stack[-1]}),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda u, at: u._stack.append(u._memo[at])),
    "EMPTY_TUPLE": lambda u, _: u._stack.append(()),
    **{f"TUPLE{n}": lambda u, _, n=n: u._stack.append(tuple(u._pop(n))) for n in (1, 2, 3)},
    "TUPLE": lambda u, _: u._push(tuple(u._marked())),
    "EMPTY_LIST": lambda u, _: u._stack.append([]),
    "LIST": lambda u, _: u._push(list(u._marked())),
    "APPEND": lambda u, _: u._fill(u._pop(1)),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda u, _: u._fill(u._marked())),
    "EMPTY_DICT": lambda u, _: u._stack.append({}),
    "DICT": lambda u, _: u._push_dict(u._marked()),
    "SETITEM": lambda u, _: u._set(u._pop(2)),
    "SETITEMS": lambda u, _: u._set(u._marked()),
    "EMPTY_SET": lambda u, _: u._stack.append(set()),
    "FROZENSET": lambda u, _: u._push(frozenset(map(u._key, u._marked()))),
    "GLOBAL": lambda u, names: u._push(u._global(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda u, _: u._push(u._global(*u._pop(2))),
    "REDUCE": lambda u, _: u._push(u._call(*u._pop(2))),
    "NEWOBJ": lambda u, _: u._push(u._make(*u._pop(2))),
    "NEWOBJ_EX": lambda u, _: u._push(u._make(*u._pop(3))),
    "OBJ": lambda u, _: u._push_object(*u._marked()),
    "INST": lambda u, names: u._push_object(u._global(*names.split(" ", 1)), *u._marked()),
    "BUILD": lambda u, _: u._build(*u._pop(1)),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda u, code: u._push(u._global("copyreg", f"extension {code}"))),
    "PERSID": lambda u, pid: u._push(u._persistent((pid,))),
    "BINPERSID": lambda u, _: u._push(u._persistent(*u._pop(1))),
}
_CALLS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("collections.OrderedDict", "collections.Counter"), Unpickler._dict),
    "collections.defaultdict": lambda u, factory=None, *pairs: u._dict(*pairs),
    "builtins.set": Unpickler._elements,
    "builtins.frozenset": lambda u, *items: frozenset(u._elements(*items)),
    "builtins.bytes": lambda u: b"",  # how protocol 2 writes the empty one
    "_codecs.encode": Unpickler._encode,
    "argparse.Namespace": lambda u: argparse.Namespace(),
    "copyreg._reconstructor": lambda u, cls, base=None, state=None: u._make(cls, () if state is None else (state,)),
    "numpy.core.multiarray.scalar": Unpickler._number,
    "numpy.core.multiarray._reconstruct": lambda u, cls, *args: Inert(type_name(cls), args),
    "torch.Size": lambda u, sizes=(): tuple(sizes),
    **{f"torch._utils._rebuild_tensor{version}": Unpickler._tensor for version in ("", "_v2", "_v3")},
    **{f"torch._utils._rebuild_parameter{state}": Unpickler._parameter for state in ("", "_with_state")},
    "torch.nn.parameter.Parameter": lambda u, tensor, *_: tensor,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda u, tensor, *_: tensor,
    **dict.fromkeys(
        ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"), Unpickler._typed_tensor
    ),
}
