"""Reads weight files of any origin without running code from them: .pth, .pt, .bin, .safetensors, .npz.

What a file is, is decided by its content, never by its name. Whatever is wrong with it ends in one `CheckpointError`.
"""

import contextlib
import dataclasses
import errno
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from segmenter.errors import InputError, cause
from segmenter.files import open_regular
from segmenter.text_files import read_json
from segmenter.weights.torch_file import ReadStorage, is_pickle, materialize, read_stream, read_zip
from segmenter.weights.unpickle import MAX_NAMES, Refused, StoredTensor, listing
from segmenter.weights.wrappers import MAX_WEIGHTS, unwrap

__all__ = ["MAX_NAMES", "CheckpointError", "WeightFile", "listing", "read_state_dict", "read_weights"]

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8}
_DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
_MAGIC = {  # first bytes, lower case -> what it is
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run `git lfs pull`",
    b"<!doctype": "a web page, probably a failed download",
    b"<html": "a web page, probably a failed download",
    b"<?xml": "an XML document, probably a failed download",
    b"\x89hdf": "an HDF5 (Keras) file, which is not supported",
    b"\x93numpy": "a single numpy array (.npy); weights come as .npz",
    b"\x89png": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"%pdf": "a PDF document",
}


class CheckpointError(InputError):
    """A file that cannot be used as weights or configuration; the message has its path, the cause and what to do."""


@dataclasses.dataclass
class WeightFile:
    """What `read_weights` found.

    Attributes:
        state: names as in the file but for the prefixes of wrappers -> plain tensors on the CPU, in the file's dtype,
            contiguous, each with memory of its own.
        extra: what else the file holds ("epoch", "meta" ...): plain values, `Inert` for objects of other classes,
            `StoredTensor` for tensors, which are not read.
        notes: what was removed, left out or chosen, for people.
    """

    state: dict[str, torch.Tensor]
    extra: dict[str, Any]
    notes: list[str]


def read_weights(
    path: str | os.PathLike,
    *,
    averaged: bool | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> WeightFile:
    """Reads the weights of a file, whatever training tool left it.

    A state dict inside {"model": ...}, {"state_dict": ...} and the like is taken out. Prefixes of wrappers that all
    weights share (`module.`, `_orig_mod.`, `model.` ...), and those inside names, are dropped. Objects of other classes
    beside the weights are read as data, see `segmenter.weights.unpickle`.

    Args:
        path: a torch file (zip or the older stream), safetensors, or numpy .npz.
        averaged: where plain weights and their average are kept, which to take; None: see `wrappers.unwrap`.
        allow_pickle: "I trust this file": lets a torch file run the code that it names.
        verify: compares the checksums inside zip files (nothing else notices a flipped bit).
        allow_nonfinite: accepts NaN and infinite weights.
    Raises:
        CheckpointError: whatever is wrong with the file.
    """
    path = Path(path)
    file_format = "weight"
    try:
        with _opened(path) as file:
            file_format = _file_format(file)
            data, read_storage = _read(path, file, file_format, allow_pickle, verify)
            state, extra, notes = unwrap(data, averaged)
            state = _materialized(state, read_storage, _size(file))
        if not allow_nonfinite:
            _check_finite(state)
    except CheckpointError:
        raise
    except Refused as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # torch, zipfile, pickletools and numpy raise a dozen types on damaged files
        raise CheckpointError(f"{path}: damaged or truncated {file_format} file ({cause(error)})") from error
    return WeightFile(state, extra, notes)


def read_state_dict(path: str | os.PathLike, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state, extra) of `read_weights`, without its notes."""
    found = read_weights(path, **options)
    return found.state, found.extra


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file beside weights. Raises CheckpointError: it cannot be read, or holds something else than an object."""
    content = read_json(path, CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file; anything else is refused without waiting for it."""
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise Refused("no such file") from error
    except IsADirectoryError as error:
        raise Refused("is a folder; give the weight file in it") from error
    except OSError as error:
        raise Refused(
            "is no regular file" if error.errno == errno.EINVAL else f"cannot be read ({cause(error)})"
        ) from error
    except ValueError as error:  # a NUL character in the path
        raise Refused(f"no such file ({cause(error)})") from error
    with file:
        yield file


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _file_format(file: BinaryIO) -> str:
    """ "torch zip", "torch stream", "safetensors" or "npz", from the content."""
    try:
        head, size = file.read(512), _size(file)
    except OSError as error:
        raise Refused(f"cannot be read ({cause(error)})") from error
    if not head:
        raise Refused("is empty (0 bytes); copy or download it again")
    if head.startswith(b"PK"):
        return _zip_format(file, size)
    if size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05" or size <= 1_000_000 and is_pickle(file):
        return "torch stream"
    raise Refused(f"is no checkpoint; it looks like {_looks_like(head)}")


def _looks_like(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, description in _MAGIC.items():
        if text.startswith(magic):
            return description
    if head[8:9] == b"{":
        return "a truncated safetensors file; download it again"
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        return "JSON text" if text[:1] in b"{[" else "text (YAML?)"
    return f"an unknown binary format (first bytes {head[:4].hex()})"


def _zip_format(file: BinaryIO, size: int) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception as error:  # BadZipFile, struct.error, NotImplementedError ...
        raise Refused(f"damaged or truncated zip file of {size} bytes ({cause(error)}); download it again") from error
    names = [m.filename for m in members]
    if sum(m.file_size for m in members) > 4 * size:
        raise Refused(f"refused, unpacks to more than 4 times its {size} bytes (a zip bomb?)")
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.endswith("/constants.pkl") for name in names):
        raise Refused("is a TorchScript program; save its state_dict() instead")
    if not any(name.endswith("data.pkl") for name in names):
        raise Refused(f"is a zip archive without weights ({listing(names) or 'empty'})")
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise Refused(f"refused, compressed members ({listing(packed)}); torch.save writes none")
    return "torch zip"


def _read(
    path: Path, file: BinaryIO, file_format: str, allow_pickle: bool, verify: bool
) -> tuple[Any, ReadStorage | None]:
    file.seek(0)
    if file_format == "safetensors":
        return _read_safetensors(path), None
    if file_format == "npz":
        return _read_npz(file), None
    if allow_pickle:
        return _run_pickle(path, file, file_format, verify), None
    return read_zip(file, verify) if file_format == "torch zip" else read_stream(file)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = file.keys()
        if len(names) > MAX_WEIGHTS:
            raise Refused(f"refused, it has {len(names)} weights")
        return {name: file.get_tensor(name) for name in names}


def _read_npz(file: BinaryIO) -> dict[str, torch.Tensor]:
    tensors = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Refused(f"refused, {member.filename} is compressed in another way than numpy's")
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as content:  # the checksum is compared as it is read
                tensors[name] = _read_npy(name, content, member.file_size)
    return tensors


def _read_npy(name: str, content: BinaryIO, size: int) -> torch.Tensor:
    version = np.lib.format.read_magic(content)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(content)
    if dtype.hasobject:
        raise Refused(f"refused, {name} holds pickled objects (numpy's allow_pickle=False)")
    count = 1
    for side in shape:
        count *= side
    raw = content.read()
    if min(shape, default=0) < 0 or len(raw) != count * dtype.itemsize:
        raise Refused(f"refused, {name} claims {shape} of {dtype}, its member has {size} bytes")
    if dtype == np.dtype("V2"):  # numpy has no bfloat16
        array, kind = np.frombuffer(raw, np.int16), torch.bfloat16
    elif dtype.kind in "biuf" and dtype.itemsize <= 8:
        array, kind = np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=False), None
    else:
        raise Refused(f"has weights that are no tensors: {name} ({dtype})")
    tensor = torch.from_numpy(array.reshape(shape, order="F" if fortran else "C").copy(order="C"))
    return tensor if kind is None else tensor.view(kind)


def _run_pickle(path: Path, file: BinaryIO, file_format: str, verify: bool) -> Any:
    """torch.load of a file that is trusted."""
    if verify and file_format == "torch zip":
        with zipfile.ZipFile(file) as archive:
            if bad := archive.testzip():
                raise Refused(f"damaged, {bad} fails its checksum; download it again (verify=False skips)")
    try:
        return torch.load(path, weights_only=False, map_location="cpu", mmap=file_format == "torch zip")
    except ModuleNotFoundError as error:
        raise Refused(
            f"needs the module {error.name}, which is not installed; install it, or leave out allow_pickle=True, "
            f"without which only the weights are read"
        ) from error
    except (ImportError, AttributeError) as error:
        raise Refused(f"names something that is not there ({cause(error)})") from error
    except (EOFError, RuntimeError, pickle.UnpicklingError):
        raise
    except Exception as error:
        raise Refused(f"cannot be unpickled ({type(error).__name__}: {cause(error)})") from error


def _materialized(state: dict[str, Any], read_storage: ReadStorage | None, size: int) -> dict[str, torch.Tensor]:
    """Contiguous tensors, read or copied after checking that the file of `size` bytes holds what each one claims."""
    plain, total = {}, 0
    for name, tensor in state.items():
        if not isinstance(tensor, StoredTensor):
            plain[name] = tensor = _plain(name, tensor)
        if tensor.dtype not in _DTYPES:
            raise Refused(f"{name} has the unsupported dtype {tensor.dtype}; store float32 or float16")
        count = 1
        for side in tensor.shape:
            count *= side
        if not count:
            raise Refused(f"{name} is empty, of shape {tuple(tensor.shape)}")
        claimed = count * tensor.dtype.itemsize
        total += claimed
        held = tensor.storage.nbytes if isinstance(tensor, StoredTensor) else tensor.untyped_storage().nbytes()
        if max(claimed, _reach(tensor)) > held or total > 4 * size:
            raise Refused(f"refused, {name} claims {tuple(tensor.shape)} = {claimed} bytes, more than the file holds")
    storages: dict[str, torch.Tensor] = {}
    return {
        name: materialize(tensor, read_storage, storages)
        if isinstance(tensor, StoredTensor)
        else plain[name].clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Without a class and attributes of its own, which may say anything. Of trusted files and of safetensors."""
    tensor = torch.Tensor.detach(tensor)
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else tensor.layout
        raise Refused(f"{name} is no plain tensor ({kind} on {tensor.device})")
    return torch.Tensor.as_subclass(tensor, torch.Tensor)


def _reach(tensor: torch.Tensor | StoredTensor) -> int:
    """The bytes of its storage up to the last that a tensor of at least one element uses."""
    stored = isinstance(tensor, StoredTensor)
    offset, stride = (tensor.offset, tensor.stride) if stored else (tensor.storage_offset(), tensor.stride())
    last = offset + sum((side - 1) * step for side, step in zip(tensor.shape, stride, strict=True))
    return (last + 1) * tensor.dtype.itemsize


def _check_finite(state: dict[str, torch.Tensor]) -> None:
    bad = [name for name, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise Refused(
            f"NaN or infinite weights in {listing(bad)}; the training diverged or the file is damaged "
            f"(allow_nonfinite=True loads it all the same)"
        )
