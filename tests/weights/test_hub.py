"""What is uploaded to the hub, and what it says when it refuses. Nothing here opens a connection."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import segmenter
from segmenter.classes import ClassSet, load_classes
from segmenter.cli import main
from segmenter.weights.hub import HubError, model_card, push_to_hub
from segmenter.weights.load import load_any
from segmenter.weights.read import CheckpointError
from tests.support.tiny import tiny_model

hub = pytest.importorskip("huggingface_hub")
hub_errors = pytest.importorskip("huggingface_hub.errors")


class FakeHub:
    """Keeps what it is told in the order in which it comes. `fails`: call -> the error that it raises."""

    def __init__(self):
        self.calls, self.files, self.fails, self.public, self.there = [], {}, {}, False, set()

    def called(self, name, **facts):
        self.calls.append((name, facts))
        if name in self.fails:
            raise self.fails[name]

    def __call__(self, token=None, library_name=None, library_version=None):
        self.called("login", token=token, library=library_name)
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.called("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def model_info(self, repo_id):
        return SimpleNamespace(private=not self.public)

    def file_exists(self, repo_id, name):
        return name in self.there

    def create_commit(self, repo_id, operations, commit_message):
        self.called("create_commit", repo_id=repo_id, message=commit_message)
        for added in operations:
            with added.as_file() as file:
                self.files[added.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def card(self):
        """Header and text."""
        _, header, text = self.files["README.md"].decode().split("---\n", 2)
        return yaml.safe_load(header), text


@pytest.fixture
def api(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


@pytest.fixture
def model():
    made = tiny_model(n_cls=11)
    made.info.weights, made.info.classes, made.info.source = "trained", "camvid", "trained on streets"
    return made


@pytest.fixture
def folder(model, tmp_path):
    path = tmp_path / "model"
    model.save_pretrained(path)
    return path


def test_the_files_of_the_folder_and_no_others(folder, api):
    for name in ("notes.txt", "checkpoint.pth", ".env", "model.safetensors.bak", "classes.json"):
        (folder / name).write_text("not for everybody")  # the model has the classes of a key, so no classes.json
    (folder / "sub").mkdir()
    url = segmenter.push_to_hub(folder, "me/streets", private=True, token="secret", message="Streets")
    assert url == "https://hub/me/streets/commit/1"
    assert api.files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert all(api.files[name] == (folder / name).read_bytes() for name in ("config.json", "model.safetensors"))
    assert api.calls == [
        ("login", {"token": "secret", "library": "segmenter"}),
        ("create_repo", {"repo_id": "me/streets", "private": True, "exist_ok": True}),
        ("create_commit", {"repo_id": "me/streets", "message": "Streets"}),
    ]


def test_what_is_uploaded_is_read_back(model, api, tmp_path, monkeypatch):
    """A live model with classes of its own, by its method; and the folder of what came is pushed as the same bytes."""
    classes = ClassSet("mine", tuple("abcdefghijk"), load_classes("camvid").palette)
    model.push_to_hub("me/streets", dtype=torch.float16, classes=classes)
    assert api.files.keys() == {"config.json", "model.safetensors", "classes.json", "README.md"}
    assert "a, b, c" in api.card()[1]
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name, content in api.files.items():
        (snapshot / name).write_bytes(content)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(snapshot))
    back = load_any("me/streets", hub=True)
    assert load_classes(back.info.classes).names == classes.names
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(back.masks(image), model.masks(image), rtol=0.02, atol=0.02)
    before, api.files = api.files, {}
    push_to_hub(snapshot, "me/streets")
    assert api.files == before


def test_an_interrupted_save_is_pushed_under_its_names(folder, api):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.rename(folder / "model.safetensors.new")
    weights.write_bytes(b"of the save before")
    push_to_hub(folder, "me/streets")
    assert api.files["model.safetensors"] == content and len(api.files) == 3


class TestCard:
    def test_is_made_of_the_model(self, folder, api):
        """Of a name alone the owner is the account."""
        assert push_to_hub(folder, "streets", license="mit") == "https://hub/me/streets/commit/1"
        header, text = api.card()
        assert header == {
            "library_name": "segmenter", "pipeline_tag": "image-segmentation", "license": "mit",
            "tags": ["semantic-segmentation", "vision-transformer", "segmenter"],
        }  # fmt: skip
        for part in ("2 blocks of width 64, patch 16", "| classes | 11 |", "trained; trained on streets", "| mit |",
                     "Sky, Building, Pole", 'load_any("me/streets", hub=True)'):  # fmt: skip
            assert part in text

    def test_says_no_licence_that_is_not_known(self, folder, api):
        push_to_hub(folder, "me/streets")
        header, text = api.card()
        assert "license" not in header and "| licence | not stated |" in text

    def test_of_the_folder_gets_the_header(self, folder, api):
        (folder / "README.md").write_text("# Streets\n\nTerms: research.\n")
        push_to_hub(folder, "me/streets", license="other")
        header, text = api.card()
        assert header["license"] == "other" and header["pipeline_tag"] == "image-segmentation"
        assert text.strip() == "# Streets\n\nTerms: research."
        assert (folder / "README.md").read_text().startswith("# Streets"), "the folder stays as it is"

    def test_with_a_header_of_its_own_stays(self, folder, api):
        own = "---\nlicense: mit\n---\n# Streets\n"
        (folder / "README.md").write_text(own)
        push_to_hub(folder, "me/streets")
        assert api.files["README.md"].decode() == own
        with pytest.raises(HubError, match=r"README.md: has a header of its own; say the licence there"):
            push_to_hub(folder, "me/streets", license="mit")

    def test_on_the_hub_is_not_replaced_by_one_that_is_made(self, folder, api):
        api.there.add("README.md")
        push_to_hub(folder, "me/streets")
        assert "README.md" not in api.files
        (folder / "README.md").write_text("# Mine\n")
        push_to_hub(folder, "me/streets")
        assert "# Mine" in api.files["README.md"].decode()

    def test_breaks_at_no_name(self, model):
        model.info.source = "a | b\nc"
        assert "| weights | trained; a \\| b c |" in model_card(model, "me/x")


class Refused(Exception):
    def __init__(self, status):
        super().__init__(f"{status} Client Error")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("create_repo", Refused(401), r"me/x: the hub refused \(401 Client Error\); log in with `hf auth login`"),
        ("create_repo", hub_errors.LocalTokenNotFoundError("no token"), r"\(no token\); log in with"),
        ("create_commit", Refused(403), r"\(403 Client Error\); the token or its account may not write there"),
        ("create_commit", ConnectionError("no\nnetwork"), r"me/x: the hub refused \(no network\)$"),
    ],
)
def test_what_the_hub_says_is_one_error(folder, api, call, error, message):
    api.fails[call] = error
    with pytest.raises(HubError, match=message):
        push_to_hub(folder, "me/x")


def test_names_that_cannot_be(folder):
    """The library's own check, before it opens a connection."""
    with pytest.raises(HubError, match="the hub refused"):
        push_to_hub(folder, "a/b/c", token="none")


def test_nothing_private_goes_where_everybody_reads(folder, api):
    api.public = True
    with pytest.raises(HubError, match="me/x: exists and is public; make it private first"):
        push_to_hub(folder, "me/x", private=True)
    assert not api.files
    push_to_hub(folder, "me/x")


def test_nothing_damaged_is_uploaded(folder, api, tmp_path):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        push_to_hub(folder, "me/x")
    with pytest.raises(CheckpointError, match="no such folder"):
        push_to_hub(tmp_path / "none", "me/x")
    assert api.calls == []
    with pytest.raises(ValueError, match="dtype, keep and classes are for a model"):
        push_to_hub(folder, "me/x", dtype=torch.float16)


def test_without_the_library(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"the hub needs huggingface_hub: pip install 'segmenter-triton\[hub\]'"):
        push_to_hub(folder, "me/x")


def test_the_command(folder, api, tmp_path, capsys):
    assert main(["push", str(folder), "me/streets", "--private", "--license", "mit"]) == 0
    assert capsys.readouterr().out == f"{folder} -> https://hub/me/streets/commit/1\n"
    assert api.card()[0]["license"] == "mit" and api.calls[1][1]["private"] is True
    api.fails["create_repo"] = Refused(401)
    assert main(["push", str(folder), "me/streets"]) == 1
    assert "segmenter: error: me/streets: the hub refused (401 Client Error); log in" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "none"), "me/streets"]) == 4
    assert main(["push", str(folder)]) == 2
    assert Path(folder, "config.json").exists()
