"""Losses by name: each is its published formula, ignored pixels never count, and sums are weighted."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from segmenter.data.datasets import open_dataset
from segmenter.training import losses
from segmenter.training.distributed import Group
from segmenter.training.loop import Run, train
from segmenter.training.loss_terms import LOSSES, LossError, LossTerm, parse_loss
from segmenter.training.losses import SegmentationLoss, hard_cross_entropy
from segmenter.training.recipe import RecipeError
from tests.support.tiny_runs import differences, log_of, read_checkpoint, tiny_recipe

N_CLS, PATCH = 5, 4  # class 4 has no pixel


@pytest.fixture
def batch():
    """Masks, and labels whose bottom and right were cut off, with ignored pixels."""
    generator = torch.Generator().manual_seed(3)
    masks = 2 * torch.randn(2, N_CLS, 5, 6, generator=generator)
    labels = torch.randint(0, N_CLS - 1, (2, 18, 23), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    return masks, labels


def made(text, weight=None):
    return SegmentationLoss(255, weight, parse_loss(text), PATCH, "eager")


def value_of(text, masks, labels, weight=None):
    loss = made(text, weight)
    return loss(masks, labels, loss.denominator(labels))


def pixels_of(masks, labels):
    """Logits (pixels, classes) and labels of the pixels that count, in float64."""
    logits = F.interpolate(masks.double(), scale_factor=PATCH, mode="bilinear", align_corners=False)
    logits = logits[..., : labels.shape[1], : labels.shape[2]]
    return logits.movedim(1, -1)[labels != 255], labels[labels != 255]


def overlap(z, y, alpha, beta, smooth=0.0):
    """Tversky's index of each class: |py| / (|py| + alpha |p(1-y)| + beta |(1-p)y|)."""
    p, hot = z.softmax(1), F.one_hot(y, N_CLS).double()
    both, only_p, only_y = (p * hot).sum(0), (p * (1 - hot)).sum(0), ((1 - p) * hot).sum(0)
    return (both + smooth) / (both + alpha * only_p + beta * only_y + smooth), hot.sum(0) > 0


def mean_of_classes(losses, there):
    return (losses * there).sum() / N_CLS


def focal(z, y, gamma=2.0, alpha=None):
    """Lin et al., ICCV 2017, equations 4 and 5, of each class against the rest."""
    hot = F.one_hot(y, N_CLS).double()
    p = z.sigmoid()
    p_true = torch.where(hot == 1, p, 1 - p)
    weight = 1.0 if alpha is None else torch.where(hot == 1, alpha, 1 - alpha)
    return (-weight * (1 - p_true) ** gamma * p_true.log()).mean()


def lovasz(z, y):
    """Berman et al., CVPR 2018: sum over the sorted errors of what each adds to the Jaccard loss."""
    p, total = z.softmax(1), []
    for c in y.unique():
        errors, order = (p[:, c] - (y == c).double()).abs().sort(descending=True)
        truth = (y == c)[order].double()
        jaccard = [
            1 - (truth.sum() - truth[:k].sum()) / (truth.sum() + (1 - truth[:k]).sum()) for k in range(len(y) + 1)
        ]
        total.append(sum(e * (b - a) for e, a, b in zip(errors, jaccard, jaccard[1:], strict=False)))
    return sum(total) / len(total)


def ohem(z, y, threshold=0.7, min_share=1 / 16):
    p = z.softmax(1)[torch.arange(len(y)), y]
    hardest = p.sort().values[: max(int((p < threshold).sum()), round(min_share * len(y)))]
    return -hardest.log().mean()


FORMULAS = {
    "cross_entropy": F.cross_entropy,
    "cross_entropy(label_smoothing=0.2)": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    "ohem": ohem,
    "ohem(threshold=0.05, min_share=0.01)": lambda z, y: ohem(z, y, 0.05, 0.01),
    "ohem(threshold=0, min_share=0.25)": lambda z, y: ohem(z, y, 0.0, 0.25),
    "dice": lambda z, y: mean_of_classes(*(lambda t, there: (1 - t, there))(*overlap(z, y, 0.5, 0.5))),
    "dice(smooth=10)": lambda z, y: mean_of_classes(*(lambda t, there: (1 - t, there))(*overlap(z, y, 0.5, 0.5, 10))),
    "dice(log_loss=true)": lambda z, y: mean_of_classes(
        *(lambda t, there: (-torch.log(t.clamp_min(1e-7)), there))(*overlap(z, y, 0.5, 0.5))
    ),
    "jaccard": lambda z, y: mean_of_classes(*(lambda t, there: (1 - t, there))(*overlap(z, y, 1, 1))),
    "tversky(alpha=0.3, beta=0.7, gamma=0.75)": lambda z, y: (
        mean_of_classes(*(lambda t, there: (1 - t, there))(*overlap(z, y, 0.3, 0.7))) ** 0.75
    ),
    "focal": focal,
    "focal(gamma=1, alpha=0.25)": lambda z, y: focal(z, y, 1.0, 0.25),
    "lovasz": lovasz,
}


@pytest.mark.parametrize("text", FORMULAS)
def test_is_its_published_formula(text, batch):
    if text.split("(")[0] not in ("cross_entropy", "ohem"):
        pytest.importorskip("segmentation_models_pytorch")
    expected = FORMULAS[text](*pixels_of(*batch)).float()
    assert expected > 0.01
    torch.testing.assert_close(value_of(text, *batch), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_never_count(name, batch):
    pytest.importorskip("segmentation_models_pytorch")
    masks, labels = batch
    logits = F.interpolate(masks, scale_factor=PATCH)[..., :18, :23].contiguous().requires_grad_()
    ignored = (labels == 255)[:, None].expand_as(logits)
    loss = SegmentationLoss(255, None, parse_loss(name), 1, "eager")
    value = loss(logits, labels, loss.denominator(labels))
    value.backward()
    assert not logits.grad[ignored].any() and logits.grad[~ignored].any()
    other = torch.where(ignored, 50 * torch.randn(logits.shape), logits.detach())
    torch.testing.assert_close(loss(other, labels, loss.denominator(labels)), value.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_that_counts_is_no_loss_and_no_gradient(name, batch):
    pytest.importorskip("segmentation_models_pytorch")
    masks = batch[0].clone().requires_grad_()
    nothing = torch.full_like(batch[1], 255)
    value = value_of(name, masks, nothing)
    value.backward()
    assert value == 0 and masks.grad is not None and not masks.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, batch):
    pytest.importorskip("segmentation_models_pytorch")
    masks, labels = batch[0].bfloat16(), batch[1]
    with torch.autocast("cpu", torch.bfloat16):
        got = value_of(name, masks, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, value_of(name, masks.float(), labels), rtol=1e-6, atol=0)


def test_a_sum_is_weighted(batch):
    pytest.importorskip("segmentation_models_pytorch")
    parts = {"cross_entropy": 0.25, "dice": 0.5, "focal": 3.0}
    got = value_of(" + ".join(f"{w} {name}" for name, w in parts.items()), *batch)
    torch.testing.assert_close(got, sum(w * value_of(name, *batch) for name, w in parts.items()))
    loss = made("2 cross_entropy + 4 dice")  # of a part of the batch
    n = loss.denominator(batch[1])
    expected = 2 * value_of("cross_entropy", *batch) + 0.25 * 4 * value_of("dice", *batch)
    torch.testing.assert_close(loss(*batch, n, 0.25), expected)


def test_cross_entropy_of_a_sum_makes_no_logits(batch, monkeypatch):
    """It is the one of upsample_loss.py, on the masks, and the sum says what computes it."""
    shapes, compute = [], losses.upsample_cross_entropy

    def watched(masks, *args, **kwargs):
        shapes.append(tuple(masks.shape))
        return compute(masks, *args, **kwargs)

    monkeypatch.setattr(losses, "upsample_cross_entropy", watched)
    loss = made("cross_entropy + 0.5 ohem")
    loss(*batch, loss.denominator(batch[1]))
    assert shapes == [tuple(batch[0].shape)]
    assert loss.implementations(batch[0]) == "cross_entropy by PyTorch in chunks + 0.5 ohem by PyTorch of all logits"


def test_class_weights_are_of_hard_pixels_too(batch):
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])
    z, y = (t.float() if t.is_floating_point() else t for t in pixels_of(*batch))
    expected = F.cross_entropy(z, y, weight)  # every pixel is hard
    torch.testing.assert_close(value_of("ohem(threshold=1)", *batch, weight), expected)


def test_hard_pixels_alone_have_a_gradient():
    logits = torch.tensor([[[[8.0, 0.0, 8.0]], [[0.0, 1.0, 0.0]]]]).requires_grad_()
    labels = torch.tensor([[[0, 0, 255]]])
    hard_cross_entropy(logits, labels).backward()
    assert logits.grad.abs().sum(1).squeeze().gt(0).tolist() == [False, True, False]


def test_names_weights_and_arguments():
    dice = LossTerm("dice", 0.5, {"smooth": 1.0, "log_loss": True})
    for text in (
        "cross_entropy + 0.5 dice(smooth=1, log_loss=true)",
        "Cross_Entropy+.5*dice( smooth = 1.0,log_loss=True )",
    ):
        assert parse_loss(text) == (LossTerm("cross_entropy"), dice)
    assert parse_loss("1e-1 focal(gamma=1e+1)") == (LossTerm("focal", 0.1, {"gamma": 10.0}),)
    assert parse_loss(" + ".join(LOSSES)) == tuple(map(LossTerm, LOSSES))
    for term in (dice, LossTerm("dice", 0.123456789)):
        assert parse_loss(str(term)) == (term,)
    assert math.isclose(LossTerm("ohem").argument("min_share"), 1 / 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read at ''; write a name or a sum such as"),
        ("dice +", "cannot be read at ''"),
        ("dice dice", "cannot be read at 'dice dice'"),
        ("0.5", "cannot be read at '0.5'"),
        ("dice(smooth=1", "cannot be read"),
        ("dice - focal", "cannot be read at 'dice - focal'"),
        ("dice + dise", "'dise' is unknown; choose of cross_entropy, ohem, dice, jaccard, tversky, focal, lovasz"),
        ("dice + focal + 2 dice", "has dice twice"),
        ("0 dice", "weight of dice must be above 0, found 0"),
        ("-1 dice", "weight of dice must be above 0, found -1"),
        ("focal(gama=2)", "focal has no argument 'gama'; allowed are, with their defaults: gamma=2, alpha=none"),
        ("focal(2)", "focal has no argument '2'"),
        ("focal(gamma=1, gamma=2)", "gamma is given twice"),
        ("focal(gamma=much)", "gamma of focal must be a number, found 'much'"),
        ("focal(gamma=nan)", "gamma of focal must lie in 0..inf"),
        ("focal(alpha=2)", "alpha of focal must lie in 0..1, found 2"),
        ("dice(log_loss=1)", "log_loss of dice must be true or false, found '1'"),
        ("dice" * 1000, "longer than 1000 characters"),
    ],
)  # fmt: skip
def test_wrong_losses_are_named(text, message):
    with pytest.raises(LossError, match=message.replace("(", r"\(").replace("+", r"\+")):
        parse_loss(text)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(RecipeError, match=r"dice needs segmentation-models-pytorch: pip install 'segmenter-triton\[tr"):
        made("cross_entropy + dice")
    made("cross_entropy + ohem")


def test_a_run_that_is_cut_ends_as_one_that_was_not(tmp_path):
    """Bit for bit, with losses that are made of all probabilities, in parts, under autocast."""
    pytest.importorskip("segmentation_models_pytorch")
    recipe = tiny_recipe(
        tmp_path, epochs=1, loss="cross_entropy + 0.5 dice + ohem + 0.5 lovasz", accumulate=2, amp="bfloat16",
        val_split=None,
    )  # fmt: skip
    train(recipe, tmp_path / "whole", progress=False)
    (tmp_path / "cut").mkdir()
    dataset = open_dataset(recipe.data)
    run = Run(recipe.completed(dataset.key), dataset, tmp_path / "cut", Group())
    run.training_step(next(iter(run._batches())))
    run.save()
    train(recipe, tmp_path / "cut", progress=False)
    assert differences(*(read_checkpoint(tmp_path / name) for name in ("whole", "cut"))) == []
    assert log_of(tmp_path / "whole")[-1]["loss"] > 1.5, "of more than one term"
