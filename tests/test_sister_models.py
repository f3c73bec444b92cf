"""The three models of examples/camvid-sisters: they differ in their patch alone, and every page has their figures."""

import json

import numpy as np
import pytest
import yaml

from bench import patch_sizes
from segmenter.classes import load_classes
from segmenter.cli.resume import model_fingerprint
from segmenter.evaluation.compare import image_scores
from segmenter.figures.label_panels import labels_beside
from segmenter.weights.load import from_pretrained
from tests.support.pages import ROOT

SISTERS = patch_sizes.SISTERS
PAGE = (ROOT / "docs" / "patch-size.md").read_text(encoding="utf-8")
NAMES = load_classes("camvid").names
pytestmark = pytest.mark.skipif(
    not all((folder / "model.safetensors").exists() for folder in patch_sizes.FOLDERS),
    reason="the source archive holds no weights; the repository does",
)
by_folder = pytest.mark.parametrize("folder", patch_sizes.FOLDERS, ids=lambda folder: folder.name)


def text_of(folder, name):
    return (folder / name).read_text(encoding="utf-8")


def scores_of(folder, name="scores.yml"):
    return yaml.safe_load(text_of(folder, name))


@by_folder
def test_scores_are_of_these_weights_on_the_whole_test_set(folder):
    result, model = scores_of(folder), from_pretrained(folder)
    assert (result["data"]["split"], result["data"]["pictures"], result["data"]["failed"]) == ("test", 233, 0)
    assert result["model"]["source"] == model.info.source
    assert result["model"]["crc32"] == model_fingerprint(model)
    assert result["protocol"]["window_size"] == result["protocol"]["window_stride"] == model.info.window_size == 288
    assert (result["protocol"]["dtype"], result["protocol"]["flip"], result["protocol"]["scales"]) == (
        "float32",
        False,
        [1.0],
    )


@by_folder
def test_eight_bits_cost_less_than_a_tenth_of_a_point(folder):
    stored, before = scores_of(folder), scores_of(folder, "scores_float32.yml")
    assert stored["protocol"] == before["protocol"] and stored["data"] == before["data"]
    assert stored["model"]["crc32"] != before["model"]["crc32"]
    assert abs(stored["scores"]["mIoU"] - before["scores"]["mIoU"]) <= 0.1


def test_they_differ_in_their_patch_alone():
    configs = [json.loads(text_of(folder, "config.json")) for folder in patch_sizes.FOLDERS]
    assert [config["model"].pop("patch_size") for config in configs] == [32, 16, 8]
    assert {config["storage"] for config in configs} == {"int8"}
    for config in configs:
        assert config["model"] == configs[0]["model"] and config["info"] == configs[0]["info"]


def test_together_they_are_small():
    sizes = [path.stat().st_size for path in SISTERS.rglob("*") if path.is_file()]
    assert 20e6 < sum(sizes) < 30e6


@by_folder
def test_the_card_has_the_scores_that_eval_wrote(folder):
    result, card = scores_of(folder), text_of(folder, "README.md")
    scores, columns = result["scores"], ("IoU", "Acc", "bF", "bIoU")
    total = [f"**{scores[name]:.2f}**" for name in ("mIoU", "mAcc", "bF", "bIoU")]
    assert f"| **all (mean)** | {' | '.join(total)} |" in card
    for row in result["classes"]:
        assert f"| {row['name']} | {' | '.join(f'{row[column]:.2f}' for column in columns)} |" in card
    assert f"Pixel accuracy: {scores['aAcc']:.2f}." in card
    parameters = sum(p.numel() for p in from_pretrained(folder).parameters())
    assert f"{parameters / 1e6:.1f} M parameters" in card


def test_page_and_card_have_the_table_that_the_command_prints():
    table = patch_sizes.table(SISTERS, patch_sizes.RESULTS)
    assert table in PAGE and table in text_of(SISTERS, "README.md")
    costs = json.loads(patch_sizes.RESULTS.read_text(encoding="utf-8"))
    assert str(costs["machine"]["threads"]) in PAGE and set(costs["models"]) == {f.name for f in patch_sizes.FOLDERS}


def test_the_finest_sees_the_street():
    labels = from_pretrained(patch_sizes.FOLDERS[-1]).segment(ROOT / "examples" / "street.jpg").numpy()
    height, width = labels.shape
    sky, road = labels[: height // 8, width // 5 : width * 3 // 5], labels[height * 3 // 4 :, width // 2 :]
    assert np.mean(sky == NAMES.index("Sky")) > 0.9
    assert np.mean(road == NAMES.index("Road")) > 0.8


def test_the_pages_have_the_scores_of_the_photograph():
    """Of its ground truth, in which what CamVid has no class for does not count."""
    truth, photograph = labels_beside("street.jpg", ROOT / "examples", 11), ROOT / "examples" / "street.jpg"
    assert truth.shape == (300, 400) and set(np.unique(truth)) == {*range(7), 8, 255}
    labels = [from_pretrained(folder).segment(photograph).numpy() for folder in patch_sizes.FOLDERS]
    each = [image_scores(found, truth, 11) for found in labels]
    first, second, third = (f"{scores['bF']:.0f}" for scores in each)
    assert f"{first}, {second} and {third}" in PAGE
    figures = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    assert f"goes from {first} to {second} to {third}" in figures
    assert min(each, key=lambda scores: scores["mIoU"]) is each[2] and "the lowest mIoU here" in figures
