"""Writing files so that nothing is lost or mixed, locking folders, and finding the files in a folder. Standard library.

A file is written under a random name beside its place, brought onto the disk, and renamed. While it is written it is
locked, so that `remove_leftovers` can tell those of running processes from those of killed ones.
"""

import contextlib
import errno
import io
import os
import shutil
import stat
import time
import unicodedata
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from segmenter.errors import cause, printable

try:
    import fcntl
except ImportError:  # Windows: no locks there, and leftovers stay
    fcntl = None

_PREFIX, _SUFFIX = ".segmenter-", ".tmp"
_held: set[int] = set()  # descriptors of locked folders
_IN_USE = "another process is writing into this folder; wait for it to end, or choose another folder"


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, and renames it: at `path` lies the old file or the new.

    A link at `path` is replaced, not followed. On return the file is on the disk, power cuts included.

    Raises:
        OSError: its `filename` is `path`. Whatever else `write` raises.
    """
    path = Path(path)
    raw = None
    try:
        raw, temporary = _open_temporary(path.parent)
        try:
            with io.BufferedWriter(raw) as file:
                write(file)
                file.flush()
                if raw.error is not None:
                    raise raw.error
                os.fsync(raw.descriptor)
                if fcntl is None:
                    file.close()  # Windows renames no open file
                os.replace(temporary, path)  # before it is unlocked
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)
    except Exception as error:
        failed = getattr(raw, "error", None) or error
        if not isinstance(failed, OSError) or failed.errno is None:
            raise
        raise OSError(failed.errno, failed.strerror, str(path)) from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` of a text, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of a file, not followed if it is a link; all of it or, without room for all, nothing."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from error


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading. Raises OSError also for anything that is no file: pipes, devices, folders."""
    # O_NONBLOCK: opening a pipe would wait for its other end
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "is a folder" if code == errno.EISDIR else "is no regular file", str(path))
        return BoundedReader(io.FileIO(descriptor), lambda: os.fstat(descriptor).st_size)
    except BaseException:
        os.close(descriptor)
        raise


def flush(path: Path) -> None:
    """Forces a file, or the entries of a folder, onto the disk, where the file system can."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def directory_beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, for what is several files or is looked at before it is renamed to `path`.

    It is deleted at the end. An OSError about what is in it is raised again as one about `path`.
    """
    while True:
        temporary = _temporary_name(path.parent)
        try:
            temporary.mkdir()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        descriptor = None if fcntl is None else _open_to_lock(temporary)
        if descriptor is None or _lock_new(temporary, descriptor):
            break
        _release(descriptor)
    try:
        yield temporary
    except OSError as error:
        if error.errno is None or not str(error.filename or temporary).startswith(str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            _release(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Deletes the temporary files and folders in `directory` that a killed process left; those in use stay."""
    if fcntl is None:
        return
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # locked, or gone meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, wait: float = 0, shared: bool = False) -> Iterator[None]:
    """Keeps other processes, and other threads, that ask for the same lock out of a folder or file, which must exist.

    It ends with the process, however that ends; child processes do not hold it. File systems without locks, and
    Windows, have none.

    Args:
        wait: seconds until the other one has ended; then an OSError says that there is one. shared: keeps out only
            those who do not share.
    """
    if fcntl is None:
        yield
        return
    descriptor = _open_to_lock(path)
    end = time.monotonic() + wait
    try:
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise OSError(error.errno, _IN_USE, str(path)) from error
                time.sleep(0.02)
            except OSError:  # no locks on this file system
                break
        yield
    finally:
        _release(descriptor)


@contextlib.contextmanager
def writing_into(directory: Path, wait: float = 0, shared: bool = False) -> Iterator[None]:
    """Makes a folder of results, removes what killed processes left in it, and keeps others from writing into it.

    Args:
        wait, shared: as in `locked`.
    Raises:
        OSError: it cannot be made, or another process is writing into it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OSError(errno.ENOTDIR, "is no folder; choose another name", str(directory)) from error
    with locked(directory, wait, shared):
        remove_leftovers(directory)
        yield


def walk(
    directory: Path, suffixes: Collection[str] | None = None, skip: Path | None = None
) -> tuple[list[Path], list[str]]:
    """The files below `directory` with one of these (lower-case) extensions, or all, and what could not be looked at.

    Links are followed. Each folder is entered once, by its own path rather than by a link to it, so loops end; and no
    link leads to the folders above `directory`. Names that begin with a dot are passed over. What is told as a file may
    be anything that is no folder: a pipe, a link that leads nowhere.

    Args:
        skip: a folder (resolved) that is not entered.
    Returns:
        (paths that begin with `directory`, sorted; sentences, each with the path that it is about).
    """
    files: list[Path] = []
    problems: list[str] = []
    top = os.path.realpath(directory)
    entered: dict[str, str] = {}  # where a folder really lies -> the path that it was entered by
    real, linked = [(str(directory), top)], deque[tuple[str, str]]()
    while real or linked:
        place, resolved = real.pop() if real else linked.popleft()
        if resolved == str(skip):
            continue
        if (before := entered.get(resolved)) is not None:
            if not _is_below(place, before):  # else it leads back to where one comes from, a usual thing
                problems.append(f"{place}: left out, it is the same folder as {before}")
            continue
        if _is_below(top, resolved):
            problems.append(f"{place}: left out, it leads to a folder above {directory}")
            continue
        entered[resolved] = place
        try:
            with os.scandir(place) as entries:
                found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            problems.append(f"{place}: cannot be entered ({cause(error)})")
            continue
        for entry in found:
            path = os.path.join(place, entry.name)
            try:
                if _is_directory(entry) and entry.is_symlink():
                    linked.append((path, os.path.realpath(path)))
                elif _is_directory(entry):
                    real.append((path, os.path.join(resolved, entry.name)))
                elif suffixes is None or os.path.splitext(entry.name)[1].lower() in suffixes:
                    files.append(Path(path))
                elif entry.is_symlink():
                    os.stat(path)  # may have led to a folder
            except OSError as error:
                problems.append(f"{path}: cannot be followed ({cause(error)})")
    return sorted(files), [printable(problem) for problem in problems]


def same_form(name: str) -> str:
    """The form in which names are compared: Unicode has two for an accented letter, and macOS writes the other one."""
    return unicodedata.normalize("NFC", name)


def _is_directory(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(os.path.join(directory, ""))


class BoundedReader(io.BufferedReader):
    """Reserves no more memory than there is left to read: who reads may have the length from the file itself.

    Args:
        size: gives the bytes that there are.
    """

    def __init__(self, raw: io.RawIOBase, size: Callable[[], int]):
        super().__init__(raw)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, max(self._size() - self.tell(), io.DEFAULT_BUFFER_SIZE))
        return super().read(size)


class _Recording(io.FileIO):
    """A file that keeps the first error of writing, to be raised in the end, and drops what comes after it.

    Raised at once, torch would make another error of it, or end the process. The descriptor is hidden, because NumPy
    and Pillow would write past this class, and lose the cause of an error.
    """

    error: OSError | None = None

    def __init__(self, path: Path):
        super().__init__(path, "xb")
        self.descriptor = super().fileno()

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")

    def write(self, data: Any) -> int | None:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


def _open_temporary(directory: Path) -> tuple[_Recording, Path]:
    while True:
        path = _temporary_name(directory)
        raw = _Recording(path)
        if _lock_new(path, raw.descriptor):
            return raw, path
        raw.close()


def _temporary_name(directory: Path) -> Path:
    return directory / f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}"  # not made from a name: that may be as long as allowed


def _lock_new(path: Path, descriptor: int) -> bool:
    """Locks what was made at `path`. False: it was taken for a leftover before that, and is gone."""
    if fcntl is None:
        return True
    with contextlib.suppress(OSError):  # no locks on this file system
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return path.exists()


def _open_to_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    _held.add(descriptor)
    return descriptor


def _release(descriptor: int) -> None:
    if descriptor in _held:  # else this is a child process
        _held.remove(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    """In a forked child: the lock is the parent's, and ends with it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
