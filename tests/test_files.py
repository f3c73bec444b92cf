"""The one writer of files, the locks, and what killed processes leave."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter import files
from segmenter.files import (
    append,
    directory_beside,
    locked,
    open_regular,
    remove_leftovers,
    write_atomically,
    write_text,
    writing_into,
)

resource = pytest.importorskip("resource", reason="limits and locks of Unix")
CUT = b"left by a kill"


@contextlib.contextmanager
def room(size):
    """Limits how large a file may become; the error is that of a full disk but for its number.

    No fixture: pytest writes its own output before it ends one, and that may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(os.listdir(folder))


def in_child(act):
    """What `act` ends with in a forked process: 0 fine, 1 an exception, -9 killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TestWriting:
    def test_the_old_file_or_the_new(self, tmp_path):
        path = tmp_path / "a"
        write_text(path, "old")

        def fail(file):
            file.write(b"half")
            file.flush()
            assert len(names(tmp_path)) == 2
            raise KeyError("why")

        with pytest.raises(KeyError, match="why"):
            write_atomically(path, fail)
        assert (names(tmp_path), path.read_text()) == (["a"], "old")
        write_text(path, "n\u00e9w")
        assert (names(tmp_path), path.read_bytes()) == (["a"], b"n\xc3\xa9w")

    def test_on_the_disk_before_it_is_renamed_and_then_the_folder(self, tmp_path, monkeypatch):
        """In another order, a power cut may leave an empty file in place of the old one."""
        done = []
        sync, replace = os.fsync, os.replace

        def synced(descriptor):
            sync(descriptor)
            kind = "folder" if os.path.isdir(f"/dev/fd/{descriptor}") else "file"
            done.append((kind, os.fstat(descriptor).st_size if kind == "file" else None))

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), done.append(("renamed", None))))
        write_text(tmp_path / "a", "four")
        assert done == [("file", 4), ("renamed", None), ("folder", None)]

    def test_links_are_replaced_and_not_followed(self, tmp_path):
        (tmp_path / "precious").write_text("old")
        (tmp_path / "a").symlink_to("precious")
        write_text(tmp_path / "a", "new")
        assert (tmp_path / "precious").read_text() == "old"
        assert not (tmp_path / "a").is_symlink()

    def test_as_readable_as_other_files(self, tmp_path):
        before = os.umask(0o027)
        try:
            write_text(tmp_path / "a", "")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640

    @pytest.mark.parametrize(
        "write",
        [
            lambda file: file.write(bytes(100_000)),
            lambda file: np.save(file, np.zeros(100_000, np.uint8)),
            lambda file: torch.save({"a": torch.zeros(100_000)}, file),
            lambda file: Image.effect_noise((500, 500), 90).save(file, format="PNG"),
        ],
        ids=["bytes", "numpy", "torch", "pillow"],
    )
    @pytest.mark.parametrize("size", [0, 100, 50_000])
    def test_no_room(self, tmp_path, write, size):
        """Every library's own error, and what C++ makes of it, gives way to the cause."""
        write_text(tmp_path / "a", "old")
        with room(size), pytest.raises(OSError, match="File too large") as raised:
            write_atomically(tmp_path / "a", write)
        assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "a"))
        assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")

    @pytest.mark.parametrize(
        ("path", "code"),
        [
            ("none/a", errno.ENOENT),
            ("file/a", errno.ENOTDIR),
            ("x" * 300, errno.ENAMETOOLONG),
            ("dir", errno.EISDIR),
        ],
    )
    def test_errors_name_the_path_and_not_the_temporary_file(self, tmp_path, path, code):
        (tmp_path / "file").touch()
        (tmp_path / "dir").mkdir()
        with pytest.raises(OSError) as raised:
            write_text(tmp_path / path, "x")
        assert (raised.value.errno, raised.value.filename) == (code, str(tmp_path / path))
        assert names(tmp_path) == ["dir", "file"]

    def test_a_name_as_long_as_names_can_be(self, tmp_path):
        write_text(tmp_path / ("x" * 255), "long")
        assert (tmp_path / ("x" * 255)).read_text() == "long"

    def test_appended_whole_or_not_at_all(self, tmp_path):
        append(tmp_path / "log", b"one\n")
        append(tmp_path / "log", b"two\n")
        with room(10), pytest.raises(OSError) as raised:
            append(tmp_path / "log", b"three\n")
        assert raised.value.filename == str(tmp_path / "log")
        assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"

    def test_several_files_before_one_is_renamed(self, tmp_path):
        with directory_beside(tmp_path / "a") as folder:
            assert folder.parent == tmp_path
            (folder / "x").write_text("x")
            remove_leftovers(tmp_path)
            assert (folder / "x").exists(), "in use"
        assert names(tmp_path) == []
        too_large = pytest.raises(OSError, match="File too large")
        with room(10), too_large as raised, directory_beside(tmp_path / "a") as folder:
            write_atomically(folder / "x", lambda file: file.write(bytes(100)))
        assert raised.value.filename == str(tmp_path / "a")
        with pytest.raises(OSError) as raised, directory_beside(tmp_path / "none" / "a"):
            pass
        assert raised.value.filename == str(tmp_path / "none" / "a")


class TestLeftovers:
    def test_of_killed_processes_go_and_those_in_use_stay(self, tmp_path):
        def killed():
            with directory_beside(tmp_path / "a") as folder:
                (folder / "half").write_bytes(CUT)
                write_atomically(tmp_path / "a", lambda file: (file.write(CUT), file.flush(), os.kill(os.getpid(), 9)))

        assert in_child(killed) == -9
        assert len(names(tmp_path)) == 2
        (tmp_path / "keep.tmp").touch()

        def while_writing(file):
            (own,) = set(names(tmp_path)) - set(before)
            remove_leftovers(tmp_path)
            assert names(tmp_path) == sorted(["keep.tmp", own])
            file.write(b"whole")

        before = names(tmp_path)
        write_atomically(tmp_path / "a", while_writing)
        assert (names(tmp_path), (tmp_path / "a").read_bytes()) == (["a", "keep.tmp"], b"whole")

    def test_links_and_pipes_among_them_do_no_harm(self, tmp_path):
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "a").touch()
        (tmp_path / ".segmenter-link.tmp").symlink_to("precious")
        os.mkfifo(tmp_path / ".segmenter-pipe.tmp")
        remove_leftovers(tmp_path)
        assert (tmp_path / "precious" / "a").exists()
        remove_leftovers(tmp_path / "none")


class TestLocks:
    def test_keeps_others_out_until_it_ends(self, tmp_path):
        run = tmp_path / "new" / "run"
        with writing_into(run):
            with pytest.raises(OSError, match="another process is writing into this folder; wait for it to") as raised:
                writing_into(run).__enter__()
            assert raised.value.filename == str(run)
            with locked(tmp_path):
                pass
            assert in_child(lambda: locked(run).__enter__()) == 1
        assert in_child(lambda: locked(run).__enter__()) == 0

    def test_waits_as_long_as_it_is_told(self, tmp_path):
        order, holds = [], threading.Event()

        def other():
            with locked(tmp_path):
                holds.set()
                ended.wait(5)
                order.append("other")

        ended, thread = threading.Event(), threading.Thread(target=other)
        thread.start()
        holds.wait(5)
        with pytest.raises(OSError, match="another process"), locked(tmp_path, wait=0.05):
            pass
        ended.set()
        with locked(tmp_path, wait=5):
            order.append("this")
        thread.join()
        assert order == ["other", "this"]

    def test_shared(self, tmp_path):
        with locked(tmp_path, shared=True), locked(tmp_path, shared=True), pytest.raises(OSError, match="another"):
            locked(tmp_path).__enter__()

    def test_ends_with_the_process_though_its_children_live_on(self, tmp_path):
        """Those that read samples outlive a killed training for a while."""
        code = (
            "import os, sys, time; from pathlib import Path; from segmenter.files import locked\n"
            "lock = locked(Path(sys.argv[1])); lock.__enter__()\n"
            "if os.fork() == 0: print('child', flush=True); time.sleep(60)\n"
            "time.sleep(60)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        root = Path(files.__file__).parents[1]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, start_new_session=True) as process:
            try:
                assert process.stdout.readline() == b"child\n"
                with pytest.raises(OSError, match="another process"), locked(tmp_path):
                    pass
                process.kill()
                process.wait()
                with locked(tmp_path, wait=1):
                    pass
            finally:
                os.killpg(process.pid, 9)

    def test_a_child_that_goes_on_does_not_end_it(self, tmp_path):
        with locked(tmp_path):

            def leaves():
                raise SystemExit

            assert in_child(leaves) == 1
            with pytest.raises(OSError, match="another process"), locked(tmp_path):
                pass

    @pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
    def test_file_systems_without_locks(self, tmp_path, monkeypatch, code):
        def none(*args):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files.fcntl, "flock", none)
        with writing_into(tmp_path), writing_into(tmp_path):
            write_text(tmp_path / "a", "written")
        assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "written")


class TestReading:
    def test_only_files(self, tmp_path):
        (tmp_path / "a").write_bytes(b"bytes")
        with open_regular(tmp_path / "a") as file:
            assert file.read() == b"bytes"
        os.mkfifo(tmp_path / "pipe")
        before = len(os.listdir("/dev/fd"))
        for path, reason in (("pipe", "is no regular file"), ("/dev/zero", "is no regular file"), (".", "is a folder")):
            with pytest.raises(OSError, match=reason):
                open_regular(tmp_path / path)
        assert len(os.listdir("/dev/fd")) == before, "none stays open"

    def test_a_length_that_is_made_up_reserves_nothing(self, tmp_path):
        (tmp_path / "a").write_bytes(b"bytes" * 10_000)
        with open_regular(tmp_path / "a") as file:
            assert file.read(2**62) == b"bytes" * 10_000  # io.BufferedReader reserves it first, and fails
            file.seek(10)
            assert file.read(20_000) == b"bytes" * 4_000


def test_a_file_in_place_of_a_folder_of_results_is_called_that(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="is no folder; choose another name"), writing_into(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
