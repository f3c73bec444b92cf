"""The comparison itself: it accepts a good kernel and rejects what a bug would do."""

import math

import pytest
import torch

from segmenter.kernels import reference
from tests.support.layouts import LAYOUTS
from tests.support.parity import GUARD, IN_TURN, assert_bitwise_equal, assert_parity, check_guards, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
N, H = 129, 2


def qkv(dtype):
    return torch.randn(2, N, 3 * H * 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def flash(x, keys=N):
    """What a right kernel computes: float32 inside, rounded once at the end; optionally without the last keys."""
    q, k, v = (t.float() for t in reference.split_heads(x, H))
    p = (q @ k[:, :, :keys].transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (p @ v[:, :, :keys]).transpose(1, 2).flatten(2).to(x.dtype)


def check(actual, x, **kwargs):
    exact, eager = reference.explicit_attention(x.double(), H), reference.explicit_attention(x, H)
    assert_parity(actual, exact, eager, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_good_result_and_eager_itself_pass(dtype):
    x = qkv(dtype)
    check(flash(x), x)
    check(reference.explicit_attention(x, H), x)


def drop_a_key(o, x):
    return flash(x, N - 1)


def zero_a_row(o, x):
    o[1, 70] = 0
    return o


def one_entry_too_large(o, x):
    o[0, 3, int(o[0, 3].abs().argmax())] *= 1.5
    return o


def nan_row(o, x):
    o[1, -1] = math.nan
    return o


def infinity(o, x):
    o[0, 0, 0] = math.inf
    return o


def zeros(o, x):
    return torch.zeros_like(o)


def two_rows_exchanged(o, x):
    return o.index_select(1, torch.tensor([1, 0, *range(2, N)]))


BUGS = [drop_a_key, zero_a_row, one_entry_too_large, nan_row, infinity, zeros, two_rows_exchanged]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_result_fails(dtype, bug):
    x = qkv(dtype)
    with pytest.raises(AssertionError, match="run me again"):
        check(bug(flash(x), x), x, context="run me again")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_accumulator_fails(dtype):
    x = qkv(dtype)
    q, k, v = reference.split_heads(x, H)
    p = (q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).to(dtype)
    acc = torch.zeros(q.shape, dtype=dtype)
    for key in range(N):  # rounded to the half type after every key
        acc = acc + p[..., key : key + 1] * v[..., key : key + 1, :]
    with pytest.raises(AssertionError):
        check(acc.transpose(1, 2).flatten(2), x, frobenius=0.65)
    check(flash(x), x, frobenius=0.65)


def test_type_and_shape_are_compared():
    x = qkv(torch.float16)
    with pytest.raises(AssertionError, match=r"type torch.float32, expected torch.float16"):
        check(flash(x).float(), x)
    with pytest.raises(AssertionError, match=r"shape \(2, 129, 63\)"):
        check(flash(x)[..., :63], x)


def test_nan_must_be_where_the_reference_has_it():
    x = qkv(torch.float32)
    x[0, 5, 0] = math.nan  # a query
    check(flash(x), x)
    with pytest.raises(AssertionError, match=r"differ in NaN, first \(0, 5, 0\): got 0, expected nan"):
        check(flash(x).nan_to_num(0), x)
    assert_parity(*[torch.tensor([1.0, math.inf, -math.inf])] * 3)
    with pytest.raises(AssertionError, match="in -inf"):
        assert_parity(torch.tensor([1.0, -math.inf]), torch.ones(2), torch.ones(2))


def test_where_eager_overflows_the_result_is_still_compared():
    exact, eager = torch.full((4,), 2.0, dtype=torch.float64), torch.full((4,), math.nan, dtype=torch.float16)
    assert_parity(torch.full((4,), 2.0, dtype=torch.float16), exact, eager)
    with pytest.raises(AssertionError, match="worst element"):
        assert_parity(torch.full((4,), 2.01, dtype=torch.float16), exact, eager)


def test_message_names_the_worst_place():
    x = qkv(torch.float32)
    o = flash(x)
    o[1, 17, 4] += 0.25
    with pytest.raises(AssertionError, match=r"worst element \(1, 17, 4\): got .* error 2\.500e-01"):
        check(o, x)


def test_exactly_rounded_results_pass_even_if_eager_is_exact():
    for dtype in DTYPES:
        exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        assert_parity(exact.to(dtype), exact, exact.to(dtype), max_ratio=0.0, frobenius=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guards(dtype, layout):
    t = LAYOUTS[layout](torch.randn(2, 5, 24).to(dtype))
    g = guarded(t)
    assert g.stride() == t.stride() and g.data_ptr() % 16 == t.data_ptr() % 16
    assert_bitwise_equal(g, t)
    check_guards(g)
    g[0, 0, 0] = 3.0
    check_guards(g)
    memory = torch.empty(0, dtype=dtype).set_(g.untyped_storage())
    for place in (0, g.storage_offset() - 1, memory.numel() - GUARD, memory.numel() - 1):
        memory[place] = 0.0
        with pytest.raises(AssertionError, match="1 elements written outside a tensor"):
            check_guards(g)
        memory[place] = math.nan


def test_gaps_between_rows_are_guarded():
    g = guarded(LAYOUTS["row_padded"](torch.randn(3, 8)))
    torch.empty(0).set_(g.untyped_storage())[GUARD + 9] = 1.0
    with pytest.raises(AssertionError, match="the first at 9 from its start"):
        check_guards(g)
    with pytest.raises(AssertionError, match="not made by guarded"):
        check_guards(torch.zeros(3))


def test_layouts_hold_the_same_values():
    t = torch.randn(2, 5, 24)
    strides = {name: f(t).stride() for name, f in LAYOUTS.items()}
    assert strides == {
        "contiguous": (120, 24, 1), "packed_slice": (360, 72, 1), "transposed": (24, 48, 1), "row_padded": (135, 27, 1),
        "offset_by_one": (120, 24, 1), "expanded": (0, 24, 1), "huge_stride": (3331333, 24, 1),
        "column_strided": (240, 48, 2),
    }  # fmt: skip
    for name, f in LAYOUTS.items():
        same = f(t)
        assert_bitwise_equal(same, t[: same.shape[0]] if name != "expanded" else t[:1].expand(2, 5, 24), name)
    assert LAYOUTS["offset_by_one"](t).data_ptr() % 16 == 4


def test_bitwise_equality():
    a = torch.tensor([1.0, math.nan])
    assert_bitwise_equal(a, a.clone())
    with pytest.raises(AssertionError, match="1 of 2 elements differ, first .0,.: got 1.0, expected 2.0"):
        assert_bitwise_equal(a, torch.tensor([2.0, math.nan]))


@pytest.mark.parametrize("terms", [16, 192, 1024])
def test_the_limit_of_sums_in_turn_is_that_of_their_errors(terms):
    """One multiply-add after the other, with one rounding each: within the limit, and not far below it."""
    torch.manual_seed(terms)
    x, y = torch.randn(2, terms, 4000)
    total, exact = torch.zeros(4000), torch.zeros(4000, dtype=torch.float64)
    for a, b in zip(x.double(), y.double(), strict=True):
        total, exact = (total.double() + a * b).float(), exact + a * b
    assert_parity(total, exact, exact.float(), frobenius=1e9, terms=terms)
    eps, rms = torch.finfo(torch.float32).eps, exact.square().mean().sqrt()
    error = (total - exact).abs() / (eps * terms**0.5 * rms)
    assert 0.1 < error.square().mean().sqrt() < 0.2 and IN_TURN / 3 < error.max() < IN_TURN
