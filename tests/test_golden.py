"""Every golden case, through the adapter that the stand-alone checker uses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import golden_adapter
from tests.golden import check

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
