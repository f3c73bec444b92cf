import numpy as np
import pytest
import torch

from segmenter.training.schedule import PolynomialLR
from tests import golden_adapter


def rates(steps, base=1e-3, step_size=1, warmup=0, total=100, power=0.9, min_lr=1e-5):
    return golden_adapter.poly_lr(base, step_size, warmup, total, power, min_lr, steps).numpy()


def test_published_figures():
    got = rates(1, total=161_728)
    assert got[0] == 1e-3
    assert got[1] == pytest.approx(0.00099999449, abs=5e-12)


def test_formula_floor_and_freeze():
    got, t = rates(103), np.arange(101)
    np.testing.assert_allclose(got[:101], (1e-3 - 1e-5) * (1 - t / 100) ** 0.9 + 1e-5, rtol=1e-12)
    np.testing.assert_allclose(got[101:], 1e-5)


def test_step_size_keeps_the_rate_between_multiples():
    got = rates(20, step_size=5)
    assert len(set(got.tolist())) == 5
    np.testing.assert_array_equal(got[5:10], got[5])
    np.testing.assert_allclose(got[15], rates(15)[15])


@pytest.mark.parametrize("warmup", [0, 10])
def test_decay_of_a_rate_of_ones_own(warmup):
    """By the published method, between multiples of step_size too."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule, want = PolynomialLR(optimizer, 50, warmup, 100, 0.9, 1e-5), rates(30, warmup=warmup, base=2e-3)
    for t in range(1, 31):
        optimizer.step()
        schedule.step()
        assert schedule.polynomial_decay(2e-3) == pytest.approx(want[t], rel=1e-12)


def test_warm_up():
    got = rates(12, warmup=10)
    np.testing.assert_allclose(got[5], (1e-3 - 1e-5) * 0.5 * 0.9**0.9 + 1e-5)
    np.testing.assert_allclose(got[10], rates(10)[10])


def test_warm_up_rises_linearly_to_the_decay_that_follows():
    got, t = rates(20, warmup=10), np.arange(21)
    factor = np.where(t < 10, t / 10 * 0.9**0.9, (1 - t / 100) ** 0.9)
    np.testing.assert_allclose(got[1:], (1e-3 - 1e-5) * factor[1:] + 1e-5, rtol=1e-12)
    assert got[0] == 1e-3  # as published: the first update is at the full rate
    assert got.argmax() == 0 and got[1:].argmax() == 9


def test_resumes_where_it_stopped():
    def build():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        return optimizer, PolynomialLR(optimizer, 1, 0, 10, 0.9, 1e-3)

    optimizer, scheduler = build()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    other, resumed = build()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for a, b in ((optimizer, scheduler), (other, resumed)):
        a.step()
        b.step()
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] < 0.1


def test_iter_max_and_iter_warmup_are_truncated_as_published():
    """The published class takes int() of both, and its scripts may give floats such as epochs * images / batch."""
    np.testing.assert_array_equal(rates(103, total=100.9), rates(103, total=100))
    np.testing.assert_array_equal(rates(103, total=100.9, warmup=10.7), rates(103, total=100, warmup=10))
    np.testing.assert_array_equal(rates(103, warmup=0.9), rates(103))
    assert rates(1, total=100.9)[1] == (1e-3 - 1e-5) * (1 - 1 / 100) ** 0.9 + 1e-5


@pytest.mark.parametrize(
    ("name", "value"),
    [("step_size", 0), ("total", 0), ("total", 0.9), ("total", float("inf")), ("total", float("nan")),
     ("warmup", -1), ("warmup", 101), ("warmup", float("nan"))],
)  # fmt: skip
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match="need step_size >= 1 and 0 <= iter_warmup <= iter_max"):
        rates(1, **{name: value})
