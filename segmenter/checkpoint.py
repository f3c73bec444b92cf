"""Reads weight files of any origin without running code from them: .pth, .pt, .bin, .safetensors, .npz.

What a file is, is decided by its content, never by its name. Whatever is wrong with it ends in one `CheckpointError`.
"""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from segmenter.errors import InputError

MAX_NAMES = 8  # of keys or tensors listed in a message
_WRAPPERS = ("model", "state_dict", "model_state_dict", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8}
_DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
_NUMPY_DTYPES = ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "str", "bytes")
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


def read_state_dict(
    path: str | os.PathLike, *, allow_pickle: bool = False, verify: bool = True, allow_nonfinite: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads the weights of a file, with the names that it uses.

    A state dict inside {"model": ...}, {"state_dict": ...} and the like is taken out; a common prefix `module.` or
    `_orig_mod.` is dropped. Tensors are contiguous copies on the CPU in the dtype of the file.

    Args:
        path: a torch file (zip or the older stream), safetensors, or numpy .npz.
        allow_pickle: "I trust this file": lets a torch file run the code that it names.
        verify: compares the checksums inside zip files (nothing else notices a flipped bit).
        allow_nonfinite: accepts NaN and infinite weights.
    Returns:
        (state dict, what else the file holds: "epoch", "meta" ...).
    Raises:
        CheckpointError: whatever is wrong with the file.
    """
    path = Path(path)
    file_format = _file_format(path)
    try:
        if file_format == "safetensors":
            from safetensors.torch import load_file

            data = load_file(path)
        elif file_format == "npz":
            data = _read_npz(path)
        else:
            data = _read_torch(path, file_format, allow_pickle, verify)
    except CheckpointError:
        raise
    except Exception as error:  # torch, zipfile, safetensors and numpy raise a dozen types on damaged files
        raise CheckpointError(f"{path}: damaged or truncated {file_format} file ({_first_line(error)})") from error
    state, extra = _unwrap(path, data)
    state = _owned(path, state)
    if not allow_nonfinite:
        _check_finite(path, state)
    return state, extra


def listing(names: list[str]) -> str:
    """The first names, comma-separated, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _file_format(path: Path) -> str:
    """ "torch zip", "torch stream", "safetensors" or "npz", from the content."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the weight file in it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: is no regular file")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    size = path.stat().st_size
    if not head:
        raise CheckpointError(f"{path}: is empty (0 bytes); copy or download it again")
    if head.startswith(b"PK"):
        return _zip_format(path, size)
    if size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "torch stream"
    raise CheckpointError(f"{path}: is no checkpoint; it looks like {_looks_like(head)}")


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


def _zip_format(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # BadZipFile, struct.error, NotImplementedError ...
        raise CheckpointError(
            f"{path}: damaged or truncated zip file of {size} bytes ({_first_line(error)}); download it again"
        ) from error
    names = [m.filename for m in members]
    if sum(m.file_size for m in members) > 4 * size:
        raise CheckpointError(f"{path}: refused, unpacks to more than 4 times its {size} bytes (a zip bomb?)")
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path}: is a TorchScript program; save its state_dict() instead")
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"{path}: is a zip archive without weights ({listing(names) or 'empty'})")
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"{path}: refused, compressed members ({listing(packed)}); torch.save writes none")
    return "torch zip"


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as archive:  # numpy checks the zip checksums as it reads
        return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}


def _read_torch(path: Path, file_format: str, allow_pickle: bool, verify: bool) -> Any:
    if verify and file_format == "torch zip":
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            raise CheckpointError(f"{path}: damaged, {bad} fails its checksum; download it again (verify=False skips)")
    # Mapped, a storage cannot reach beyond the file, whatever size the pickle claims for it.
    options = {"map_location": "cpu", "mmap": file_format == "torch zip"}
    if allow_pickle:
        return torch.load(path, weights_only=False, **options)
    with torch.serialization.safe_globals(_safe_globals()):
        try:
            return torch.load(path, weights_only=True, **options)
        except pickle.UnpicklingError as error:
            refused = _refused_globals(path, error)
            if not refused:
                raise
            raise CheckpointError(
                f"{path}: refused, it would run {listing(refused)}; if you trust this file pass allow_pickle=True"
            ) from error


def _safe_globals() -> list[Any]:
    """Beyond torch's own list: numpy numbers (under the names of numpy 1 and 2) and the arguments of a training."""
    multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
    scalars = [(multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    dtypes = [type(np.dtype(name)) for name in _NUMPY_DTYPES]
    already = torch.serialization.get_safe_globals()  # leaving the context would take them from whoever added them
    return [entry for entry in (*scalars, np.dtype, *dtypes, argparse.Namespace) if entry not in already]


def _refused_globals(path: Path, error: Exception) -> list[str]:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the older stream format has no such scan
        found = []
    return sorted(found) or re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]


def _unwrap(path: Path, data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    extra: dict[str, Any] = {}
    for _ in range(len(_WRAPPERS)):
        if isinstance(data, torch.nn.Module):  # only with allow_pickle
            data = data.state_dict()
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{path}: holds a {type(data).__name__}, not a state dict")
        wrapper = next((w for w in _WRAPPERS if isinstance(data.get(w), Mapping | torch.nn.Module)), None)
        if wrapper is None:
            break
        extra = {**{k: v for k, v in data.items() if k != wrapper}, **extra}
        data = data[wrapper]
    names = [str(name) for name in data]
    if not any(isinstance(v, torch.Tensor) for v in data.values()):
        raise CheckpointError(f"{path}: holds no weights; its keys are: {listing(names) or 'none'}")
    odd = [f"{k} ({type(v).__name__})" for k, v in data.items() if not isinstance(v, torch.Tensor)]
    if odd:
        raise CheckpointError(f"{path}: has weights that are no tensors: {listing(odd)}")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in names):
            names = [name[len(prefix) :] for name in names]
    return dict(zip(names, data.values(), strict=True)), extra


def _owned(path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies, after checking that the file really holds what each tensor claims."""
    total, limit = 0, 4 * path.stat().st_size
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is no plain tensor ({tensor.layout} on {tensor.device})")
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has the unsupported dtype {tensor.dtype}; store float32 or float16")
        claimed = tensor.numel() * tensor.element_size()
        total += claimed
        if claimed > tensor.untyped_storage().nbytes() or total > limit:
            raise CheckpointError(
                f"{path}: refused, {name} claims {tuple(tensor.shape)} = {claimed} bytes, more than the file holds"
            )
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in state.items()}


def _check_finite(path: Path, state: dict[str, torch.Tensor]) -> None:
    bad = [name for name, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {listing(bad)}; the training diverged or the file is damaged "
            f"(allow_nonfinite=True loads it all the same)"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines and lines[0] else type(error).__name__


class WeightFile(NamedTuple):
    """placeholder"""

    state: dict[str, torch.Tensor]
    extra: dict[str, Any]
    notes: list[str]


def read_weights(path: str | os.PathLike, *, averaged: bool | None = None, **options: bool) -> WeightFile:
    """placeholder"""
    return WeightFile(*read_state_dict(path, **options), [])
