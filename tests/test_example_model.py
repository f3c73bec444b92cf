"""The model shipped in examples/: it loads, says what it is, and labels the shipped photographs sensibly."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segmenter.classes import load_classes
from segmenter.weights.load import from_pretrained

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "camvid-seg-s-mask-16"
NAMES = load_classes("camvid").names
pytestmark = pytest.mark.skipif(
    not (MODEL / "model.safetensors").exists(), reason="the source archive holds no weights; the repository does"
)


@pytest.fixture(scope="module")
def model():
    return from_pretrained(MODEL)


@pytest.fixture(scope="module")
def street(model):
    """Labels of street.jpg."""
    return model.segment(EXAMPLES / "street.jpg").numpy()


def share(labels: np.ndarray, *names: str) -> float:
    """Fraction of the pixels that have one of these classes."""
    return float(np.isin(labels, [NAMES.index(name) for name in names]).mean())


def test_info_tells_what_the_model_is(model):
    assert model.info.weights == "trained"
    assert model.info.classes == "camvid"
    assert (model.info.normalization, model.config.decoder["name"]) == ("vit", "mask_transformer")
    assert model.info.source.startswith("camvid trainval, 468 pictures; started from ")
    assert model.n_cls == len(NAMES) == 11
    assert not model.training


def test_card_readme_and_page_have_the_scores_that_eval_wrote():
    result = yaml.safe_load((MODEL / "scores.yml").read_text(encoding="utf-8"))
    scores, card = result["scores"], (MODEL / "README.md").read_text(encoding="utf-8")
    assert (result["data"]["split"], result["data"]["pictures"], result["data"]["failed"]) == ("test", 233, 0)
    assert result["model"]["source"] == from_pretrained(MODEL).info.source
    columns = ("IoU", "Acc", "bF", "bIoU")
    total = [f"**{scores[name]:.2f}**" for name in ("mIoU", "mAcc", "bF", "bIoU")]
    assert f"| **all (mean)** | {' | '.join(total)} |" in card
    for row in result["classes"]:
        assert f"| {row['name']} | {' | '.join(f'{row[column]:.2f}' for column in columns)} |" in card
    assert f"Pixel accuracy: {scores['aAcc']:.2f}." in card
    readme, page = (EXAMPLES.parent / name for name in ("README.md", "docs/evaluate.md"))
    assert f"mIoU {scores['mIoU']:.2f} on its test set" in readme.read_text(encoding="utf-8")
    assert f"mIoU {scores['mIoU']:.2f}, boundary F {scores['bF']:.2f}" in page.read_text(encoding="utf-8")


def test_weights_are_stored_in_half_precision_and_stay_small():
    size = sum(path.stat().st_size for path in MODEL.iterdir())
    assert 20e6 < size < 30e6


def test_weights_are_finite_and_no_encoder_tensor_is_empty(model):
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.any() or name.startswith("encoder.head."), name  # the unused ImageNet head is zero


def test_street_has_the_size_of_the_photograph_and_many_classes(street):
    width, height = Image.open(EXAMPLES / "street.jpg").size
    assert street.shape == (height, width)
    assert street.dtype == np.uint8
    assert len(np.unique(street)) >= 6


def test_street_has_sky_above_road_and_things_between(street):
    height, width = street.shape
    top, bottom = street[: height // 8, width // 5 : width * 3 // 5], street[height * 3 // 4 :, width // 2 :]
    assert share(top, "Sky") > 0.9
    assert share(bottom, "Road") > 0.8
    assert share(street[: height // 2], "Road", "Pavement") < 0.1
    assert share(street[height * 3 // 4 :], "Sky", "Tree") < 0.02


def test_house_is_a_building_under_the_sky(model):
    labels = model.segment(EXAMPLES / "house.jpg").numpy()
    height, width = labels.shape
    assert share(labels[: height // 4, : width // 4], "Sky") > 0.9
    assert share(labels[height // 2 : height * 2 // 3, width // 4 :], "Building") > 0.6
