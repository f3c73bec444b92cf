"""The two formats of torch.save, read without torch's unpickler: the zip archive and the older stream.

Both give (what was saved, a function that reads the bytes of a `Storage`); nothing but the pickle is read before.
"""

import io
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from segmenter.weights.unpickle import Global, Refused, Storage, StoredTensor, Unpickler, short, storage_of

ReadStorage = Callable[[Storage], torch.Tensor]
_TRUNCATED = "damaged or truncated, it ends before its last part; copy or download it again"
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # what the older stream begins with


def read_zip(file: BinaryIO, verify: bool) -> tuple[Any, ReadStorage]:
    """An archive of stored members. verify: compares the checksum of each member that is read."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise Refused("refused, two members of the archive have one name")
    pickles = [name for name in members if name.endswith("data.pkl")]
    if len(pickles) > 1:
        raise Refused(f"refused, it holds {len(pickles)} pickles")
    prefix = pickles[0].removesuffix("data.pkl")

    def read_member(name: str) -> torch.Tensor:
        member = members[name]
        header = bytes(read_bytes(file, member.header_offset, 30).numpy())
        # the lengths of name and extra field, which may differ from those in the directory
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        content = read_bytes(file, member.header_offset + 30 + sum(lengths), member.file_size)
        if verify and zlib.crc32(content.numpy()) != member.CRC:
            raise Refused(f"damaged, {name} fails its checksum; download it again (verify=False skips)")
        return content

    def find(pid: tuple[Any, ...]) -> Storage:
        storage = storage_of(pid)
        member = members.get(f"{prefix}data/{storage.key}")
        if member is None or member.file_size < storage.nbytes:
            held = "missing" if member is None else f"{member.file_size} bytes"
            raise Refused(f"refused, storage {storage.key} claims {storage.nbytes} bytes, its member is {held}")
        return storage

    def read_storage(storage: Storage) -> torch.Tensor:
        content = read_member(f"{prefix}data/{storage.key}")[: storage.nbytes]
        return content.view(-1, storage.dtype.itemsize).flip(1).flatten() if big_endian else content

    order = f"{prefix}byteorder"
    big_endian = order in members and bytes(read_member(order).numpy()) == b"big"
    data = Unpickler(find).load(io.BytesIO(read_member(pickles[0]).numpy().tobytes()))
    return data, read_storage


def read_stream(file: BinaryIO) -> tuple[Any, ReadStorage]:
    """Pickles in a row, then the storages; or one bare pickle, which has no storages."""
    storages: dict[str, Storage] = {}

    def find(pid: tuple[Any, ...]) -> Any:
        if pid[0] == "module" and isinstance(pid[1], Global):  # a class with its source text
            return pid[1]
        if len(pid) > 5 and pid[5] is not None:
            raise Refused("holds views of storages, as torch before 0.4 wrote them; save it anew")
        storage = storage_of(pid)
        return storages.setdefault(storage.key, storage)

    unpickler = Unpickler(find)
    data = unpickler.load(file)
    if data != _MAGIC_NUMBER:
        return data, _no_storage
    _, _, data, keys = (unpickler.load(file) for _ in range(4))  # protocol, system, content, storages
    places: dict[str, int] = {}
    for key in keys:
        storage, at = storages[short(key)], file.tell()
        n = int.from_bytes(bytes(read_bytes(file, at, 8).numpy()), "little")
        if n * storage.dtype.itemsize != storage.nbytes:
            raise Refused(f"damaged, storage {storage.key} has {n} elements, not those of the pickle")
        places[storage.key] = at + 8
        file.seek(at + 8 + storage.nbytes)
    _check_end(file)
    return data, lambda storage: read_bytes(file, places[storage.key], storage.nbytes)


def materialize(tensor: StoredTensor, read: ReadStorage, storages: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor itself, contiguous, with memory of its own. storages: those read so far, by key."""
    seen = tensor.storage.key in storages
    content = storages[tensor.storage.key] if seen else read(tensor.storage)
    storages[tensor.storage.key] = content
    flat = content[: len(content) // tensor.dtype.itemsize * tensor.dtype.itemsize].view(tensor.dtype)
    view = flat.as_strided(tensor.shape, tensor.stride, tensor.offset)
    whole = view.is_contiguous() and view.nbytes == view.untyped_storage().nbytes()
    return view if whole and not seen else view.clone(memory_format=torch.contiguous_format)


def read_bytes(file: BinaryIO, at: int, n: int) -> torch.Tensor:
    """`n` bytes from position `at`, as uint8; nothing is allocated for what the file does not hold."""
    if at + n > file.seek(0, io.SEEK_END):
        raise Refused(_TRUNCATED)
    content = torch.empty(n, dtype=torch.uint8)
    file.seek(at)
    rest = memoryview(content.numpy())
    while rest:
        count = file.readinto(rest)
        if not count:
            raise Refused("was cut short while it was read")
        rest = rest[count:]
    return content


def is_pickle(file: BinaryIO) -> bool:
    """Whether all of a small file is one pickle; those of protocols 0 and 1 begin with nothing particular."""
    file.seek(0)
    try:
        return all(True for _ in pickletools.genops(file)) and not file.read(1)
    except Exception:
        return False


def _check_end(file: BinaryIO) -> None:
    if file.tell() > file.seek(0, io.SEEK_END):
        raise Refused(_TRUNCATED)


def _no_storage(storage: Storage) -> torch.Tensor:
    raise Refused("damaged, it has no storages")
