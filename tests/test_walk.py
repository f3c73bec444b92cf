"""The one walk through folders: links are followed, loops end, and what is left out is said."""

import os
from pathlib import Path

import pytest

from segmenter.files import same_form, walk

SUFFIXES = {".png", ".jpg"}


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root, **options):
    files, problems = walk(root, SUFFIXES, **options)
    return [path.relative_to(root).as_posix() for path in files], problems


def test_files_by_extension_hidden_ones_passed_over(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", "sub/c.png", "notes.txt", ".d.png", ".git/e.png", "folder.jpg/f.png", "png")
    assert found(tmp_path) == (["a.jpg", "b.PNG", "folder.jpg/f.png", "sub/c.png"], [])
    assert found(tmp_path, skip=tmp_path / "sub")[0] == ["a.jpg", "b.PNG", "folder.jpg/f.png"]
    assert [path.name for path in walk(tmp_path)[0]] == ["a.jpg", "b.PNG", "f.png", "notes.txt", "png", "c.png"]


def test_relative_folders_give_relative_paths(tmp_path, monkeypatch):
    touch(tmp_path, "in/a.png")
    monkeypatch.chdir(tmp_path)
    assert walk(Path("in"), SUFFIXES) == ([Path("in/a.png")], [])
    assert walk(Path("."), SUFFIXES) == ([Path("in/a.png")], [])


def test_links_are_followed_and_loops_end(tmp_path):
    touch(tmp_path, "in/a.png", "in/sub/b.png", "disk/day/c.png")
    (tmp_path / "in/day").symlink_to(tmp_path / "disk/day")
    for name in ("in/self1", "in/self2"):
        (tmp_path / name).symlink_to(".")
    (tmp_path / "in/sub/back").symlink_to("..")
    assert found(tmp_path / "in") == (["a.png", "day/c.png", "sub/b.png"], [])


def test_no_link_leads_to_what_lies_above_or_beside_without_a_word(tmp_path):
    """images/train/up -> images would make a part of train of val."""
    touch(tmp_path, "images/train/a.png", "images/val/b.png")
    (tmp_path / "images/train/up").symlink_to("..")
    names, problems = found(tmp_path / "images/train")
    assert names == ["a.png"]
    assert problems == [
        f"{tmp_path}/images/train/up: left out, it leads to a folder above {tmp_path}/images/train"
    ]  # fmt: skip


def test_a_folder_with_two_names_is_entered_by_its_own_and_that_is_said(tmp_path):
    touch(tmp_path, "z/a.png")
    (tmp_path / "link").symlink_to("z")
    assert found(tmp_path) == (["z/a.png"], [f"{tmp_path}/link: left out, it is the same folder as {tmp_path}/z"])


def test_links_that_make_a_million_paths_of_twenty_folders(tmp_path):
    for i in range(20):
        touch(tmp_path, f"d{i:02}/p.png")
        for name in "ab" if i else "":
            (tmp_path / f"d{i - 1:02}" / name).symlink_to(f"../d{i:02}")
    names, problems = found(tmp_path / "d00")
    assert len(names) == 20
    assert names[0] == "a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/p.png"
    assert len(problems) == 19


def test_what_cannot_be_entered_is_said(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png", "bad\x1b[31m/c.png")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name in ("locked", "bad\x1b[31m"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    names, problems = found(tmp_path)
    assert names == ["a.png"]
    assert sorted(problems) == [
        f"{tmp_path}/bad\\x1b[31m: cannot be entered (Permission denied)",
        f"{tmp_path}/locked: cannot be entered (Permission denied)",
    ]
    assert walk(tmp_path / "locked", SUFFIXES) == ([], [problems[0]] if "locked" in problems[0] else [problems[1]])
    assert walk(tmp_path / "none", SUFFIXES)[1] == [f"{tmp_path}/none: cannot be entered (No such file or directory)"]


def test_links_that_lead_nowhere(tmp_path):
    """By its extension one is an image that cannot be read; what else it was nobody knows."""
    for name in ("gone.png", "self.png", "day2", "self", "note.txt"):
        (tmp_path / name).symlink_to(name if "self" in name else "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    names, problems = found(tmp_path)
    assert names == ["gone.png", "pipe.png", "self.png"]
    assert [problem.split(": ")[0] for problem in problems] == [f"{tmp_path}/{n}" for n in ("day2", "note.txt", "self")]
    assert "cannot be followed (No such file" in problems[0]


@pytest.mark.parametrize("name", ["caf\u00e9", "cafe\u0301"])
def test_names_are_compared_in_one_form(name):
    assert same_form(name) == "caf\u00e9"
    assert same_form("\udce9") == "\udce9"
