"""A saved model and images to label."""

import pytest
from PIL import Image

from tests.cli.tools import image
from tests.support.tiny import tiny_model

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID")


@pytest.fixture(scope="session")
def trained():
    model = tiny_model(n_cls=11)
    model.info.weights, model.info.classes = "trained", "camvid"
    return model


@pytest.fixture(scope="session")
def folder(trained, tmp_path_factory):
    """A saved model of 11 classes, said to be trained."""
    path = tmp_path_factory.mktemp("model")
    trained.save_pretrained(path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """photos/{a,b}.png and photos/sub/a.png, all different."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/a.png")):
        Image.fromarray(image(seed=i)).save(root / name)
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def process(monkeypatch):
    """Makes this process one of several, as torchrun does."""

    def become(rank, world=2, restarts=0):
        for name, value in zip(VARIABLES, (rank, world, rank, restarts, "run"), strict=True):
            monkeypatch.setenv(name, str(value))

    return become
