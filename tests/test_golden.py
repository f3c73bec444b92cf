"""Every golden case, through the adapter that the stand-alone checker uses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from segmenter import load_model
from segmenter.inference.segment import labels_of_views
from segmenter.inference.windows import predict_masks, resize, windows_of
from tests import golden_adapter
from tests.golden import check
from tests.support.parity import DEVICE

CASES = sorted(p.parent for p in (Path(__file__).parent / "golden").glob("*/data.npz"))


def test_all_cases_are_here():
    assert [c.name[:2] for c in CASES] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case):
    rows = check.check_case(str(case), golden_adapter, rtol=1e-4, quiet=True)
    assert len(rows) >= 6
    assert [r for r in rows if r["status"] != "PASS"] == []


@pytest.mark.parametrize("case", CASES[3:], ids=lambda c: c.name)
def test_published_way_agrees_too(case):
    """bench/published.py is what benchmarks compare with, so it has to be right as well."""
    from bench.published import published_inference

    data = np.load(case / "data.npz")
    model = golden_adapter.load_model(case / "checkpoint.pth")
    ims = [torch.from_numpy(data[f"im_{i}"]) for i in range(int(data["n_ims"]))]
    sizes = (int(data["window_size"]), int(data["window_stride"]), int(data["batch_size"]))
    got = published_inference(model, ims, list(data["flips"]), tuple(data["ori_shape"].tolist()), *sizes)
    np.testing.assert_allclose(got.numpy(), data["seg_map"], rtol=0, atol=1e-5)


def assert_labels(labels, scores):
    """Equal to the best of scores (K, H, W), except where the two best are as close as rounding may bring them."""
    best = np.sort(scores, axis=0)
    clear = best[-1] - best[-2] > 2e-4 * np.abs(scores).max()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels.numpy()[clear], scores.argmax(0)[clear])


BOTH = ["eager", pytest.param("triton", marks=[] if torch.cuda.is_available() else pytest.mark.more)]


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_labels_without_logits(case, impl):
    """From the model's masks straight to labels: those of the golden logits."""
    if impl == "triton" and not torch.cuda.is_available():
        pytest.importorskip("triton")
    data = np.load(case / "data.npz")
    model, _ = load_model(case / "checkpoint.pth", impl=impl, device=DEVICE)
    im = torch.from_numpy(data["im"]).to(DEVICE)
    with torch.inference_mode():
        masks = model.masks(im).permute(0, 2, 3, 1)
    size = tuple(n * model.patch_size for n in masks.shape[1:3])
    shape = tuple(im.shape[2:])
    labels = model.ops.on(masks).windows_argmax(masks.unsqueeze(1), (0,), (0,), size, shape, shape)
    for image, logits in zip(labels.cpu(), data["logits"], strict=True):
        assert_labels(image, logits)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("case", CASES[3:], ids=lambda c: c.name)
def test_labels_of_windows_and_views(case, impl):
    """Overlapping windows, scales and mirrored views: labels of the golden score maps."""
    data = np.load(case / "data.npz")
    model, _ = load_model(case / "checkpoint.pth", impl=impl, device=DEVICE)
    views = []
    for i, flip in enumerate(data["flips"]):
        im = resize(torch.from_numpy(data[f"im_{i}"]).to(DEVICE), int(data["window_size"]))
        sizes = int(data["window_size"]), int(data["window_stride"])
        windows = windows_of(tuple(im.shape[2:]), *sizes, model.patch_size)
        views.append((predict_masks(model.masks, im, windows, int(data["batch_size"])), windows, bool(flip)))
    labels = labels_of_views(model, views, tuple(data["ori_shape"].tolist()))
    assert_labels(labels[0].cpu(), data["seg_map"])


def test_checker_rejects_a_wrong_model():
    """The gate itself: one percent more on one bias must not pass."""

    class Wrong:
        def __getattr__(self, name):
            return getattr(golden_adapter, name)

        def load_model(self, path):
            model = golden_adapter.load_model(path)
            with torch.no_grad():
                model.encoder.blocks[0].norm1.weight[0] *= 1.01
            return model

    rows = check.check_case(str(CASES[0]), Wrong(), rtol=1e-4, quiet=True)
    assert any(r["status"] == "FAIL" for r in rows)
