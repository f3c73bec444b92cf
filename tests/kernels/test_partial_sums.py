"""Sums of what several programs stored: right, in a fixed order, into any type."""

import pytest
import torch

from segmenter.kernels import partial_sums
from tests.support.parity import assert_bitwise_equal, check_guards, guarded, randn


@pytest.mark.parametrize(
    ("S", "shape"), [(0, (3,)), (1, (2, 150)), (31, (128,)), (32, (1,)), (33, (2, 129)), (264, (7,))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_a_sum(S, shape, dtype, guarded_outputs):
    partials = guarded(randn(S, *shape, seed=S)) if S else randn(S, *shape)
    before = partials.clone()
    y = partial_sums.add(partials, shape, dtype, scale=0.5)
    want = 0.5 * partials.double().sum(0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), want, rtol=eps, atol=2e-5)
    assert y.dtype == dtype and y.shape == shape
    assert_bitwise_equal(partials, before)
    assert_bitwise_equal(partial_sums.add(partials, shape, dtype, scale=0.5), y, "again")
    if S:
        check_guards(partials)


def test_nothing_to_add():
    assert partial_sums.add(randn(3, 0), (0,), torch.float32).shape == (0,)
