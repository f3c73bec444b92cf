"""Writing files so that nothing is lost or mixed, locking folders, and finding the files in a folder. Standard library.

A file is written under a random name beside its place, brought onto the disk, and renamed. While it is written it is
locked, so that `remove_leftovers` can tell those of running processes from those of killed ones.
"""

import contextlib
import io
import os
import stat
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
        OSError: its `filename` is `path`; also where `write` turned the OSError of its file into another exception.
        Whatever else `write` raises.
    """
    path = Path(path)
    raw = None
    try:
        raw, temporary = _open_temporary(path.parent)
        try:
            with io.BufferedWriter(raw) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # before it is unlocked
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)
    except Exception as error:
        failed = error if isinstance(error, OSError) else getattr(raw, "error", None)
        if failed is None or failed.errno is None:
            raise
        raise type(failed)(failed.errno, failed.strerror, str(path)) from error


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError; ValueError: a pipe, folder or device, or no possible name."""
    # O_NONBLOCK: opening a pipe would wait for its other end
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` of a text, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


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


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files in `folder` that a killed process left; those still being written stay."""
    if fcntl is None:
        return
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # locked, or gone meanwhile
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Keeps other processes, and other threads, that ask for the same lock out of `folder`, which must exist.

    It ends with the process, however that ends; child processes do not hold it. File systems without locks, and
    Windows, have none.

    Args:
        wait: until the other one has ended; else an OSError that says so.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise OSError(error.errno, _IN_USE, str(folder)) from error
        except OSError:  # no locks on this file system
            yield
            return
        _held.add(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def walk(
    folder: Path, suffixes: Collection[str] | None = None, skip: Path | None = None
) -> tuple[list[Path], list[str]]:
    """The files below `folder` with one of these (lower-case) extensions, or all, and what could not be looked at.

    Links are followed. Each folder is entered once, by its own path rather than by a link to it, so loops end; and no
    link leads to the folders above `folder`. Names that begin with a dot are passed over. What is told as a file may
    be anything that is no folder: a pipe, a link that leads nowhere.

    Args:
        skip: a folder (resolved) that is not entered.
    Returns:
        (paths that begin with `folder`, sorted; sentences, each with the path that it is about).
    """
    files: list[Path] = []
    problems: list[str] = []
    top = os.path.realpath(folder)
    entered: dict[str, str] = {}  # where a folder really lies -> the path that it was entered by
    real, linked = [(str(folder), top)], deque[tuple[str, str]]()
    while real or linked:
        place, resolved = real.pop() if real else linked.popleft()
        if resolved == str(skip):
            continue
        if (before := entered.get(resolved)) is not None:
            if not _is_below(place, before):  # else it leads back to where one comes from, a usual thing
                problems.append(f"{place}: left out, it is the same folder as {before}")
            continue
        if _is_below(top, resolved):
            problems.append(f"{place}: left out, it leads to a folder above {folder}")
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
                if _is_folder(entry) and entry.is_symlink():
                    linked.append((path, os.path.realpath(path)))
                elif _is_folder(entry):
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


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


class _Recording(io.FileIO):
    """A file that keeps the first error of writing; torch and others turn it into one that says nothing."""

    error: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def _open_temporary(folder: Path) -> tuple[_Recording, Path]:
    while True:
        path = folder / f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}"  # not from the name: that may be at the limit
        raw = _Recording(path, "xb")
        if fcntl is None:
            return raw, path
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(raw, fcntl.LOCK_EX)
        if path.exists():
            return raw, path
        raw.close()  # taken for a leftover before it was locked


def _let_go() -> None:
    """In a forked child: the lock is the parent's, and ends with it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
