"""How a result is compared with its reference, and how reads and writes outside a tensor are found.

A fixed tolerance hides bugs: at N = 1025 a dropped key changes bfloat16 attention by less than 1e-2. So the error is
compared with the error that eager PyTorch makes in the same precision, three ways: the worst element, the worst row,
and the whole (Frobenius norm). The last is what finds a half-precision accumulator, which the first two pass.
"""

import math

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a sum in turn, in eps * sqrt(terms) * RMS: 13 times the RMS error (tests/kernels/test_parity.py).
IN_TURN = 2.0
GUARD = 512  # elements before and after a guarded tensor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normally distributed numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_parity(
    actual: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    *,
    max_ratio: float = 2.0,
    frobenius: float | None = None,
    terms: int = 0,
    context: str = "",
) -> None:
    """Raises AssertionError unless `actual` is as good as `eager`, both measured by `reference`.

    Nothing is asked that rounding the exact result once to its type (half types) or adding in another order (float32)
    would miss: every limit is at least that.

    Args:
        actual: what the code under test returned.
        reference: the exact result, float64 (or float32).
        eager: the result of plain PyTorch in the type of `actual`.
        max_ratio: largest error, in units of eager's largest.
        frobenius: Frobenius norm of the error, in units of eager's; by default 1.5 for float32, 1.0 for half types.
        terms: float32 products that are added for one element. Compiled for a GPU without TF32 they are added one after
            the other, by one multiply-add each, whose errors add up like a random walk's; eager PyTorch and Triton's
            interpreter add many partial sums, whose errors are smaller.
        context: the end of the message; says how to run the case again.
    """
    where = f"\n  {context}" if context else ""
    assert actual.dtype == eager.dtype, f"type {actual.dtype}, expected {eager.dtype}{where}"
    assert actual.shape == reference.shape == eager.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(reference.shape)}{where}"
    )
    if actual.numel() == 0:
        return
    exact = reference.detach().double()
    ours, theirs = actual.detach().double(), eager.detach().double()
    _assert_same_special(ours, exact, where)
    finite = exact.isfinite()
    error = torch.where(finite, (ours - exact).abs(), 0.0)
    eager_error = torch.where(finite & theirs.isfinite(), (theirs - exact).abs(), 0.0)  # it overflows where we do not
    exact = torch.where(finite, exact, 0.0)
    half = actual.dtype in (torch.float16, torch.bfloat16)
    eps = torch.finfo(actual.dtype).eps
    size = exact.abs().max().item()
    # Rounding to nearest is off by eps / 2 at most; a float32 sum in another order by a few eps.
    rounding = (0.51 if half else 4.0) * eps * size
    if terms and not half:
        rounding = max(rounding, IN_TURN * eps * math.sqrt(terms) * exact.square().mean().sqrt().item())

    limit = max(max_ratio * eager_error.max().item(), rounding)
    if not error.max().item() <= limit:
        raise AssertionError(_worst(error, ours, exact, theirs, limit, where))

    rows, eager_rows = (
        e.reshape(-1, e.shape[-1] if e.ndim else 1).square().mean(-1).sqrt() for e in (error, eager_error)
    )
    limit = max(4 * eager_rows.max().item(), rounding)
    if not rows.max().item() <= limit:
        row = int(rows.argmax())
        message = f"row {_index(row, error.shape[:-1])}: RMS error {rows[row]:.3e} > {limit:.3e}; "
        raise AssertionError(message + _worst(error, ours, exact, theirs, limit, where))

    if frobenius is None:
        frobenius = 1.0 if half else 1.5
    norm = exact.norm().item() or 1.0
    ours_f, eager_f = error.norm().item() / norm, eager_error.norm().item() / norm
    # Rounding alone gives a relative error of 0.2 eps on average.
    limit = max(frobenius * eager_f, (0.3 if half else 2.0) * eps)
    if not ours_f <= limit:
        message = (
            f"relative Frobenius error {ours_f:.3e} > {limit:.3e} ({ours_f / max(eager_f, 1e-30):.2f} x eager's); "
        )
        raise AssertionError(message + _worst(error, ours, exact, theirs, limit, where))


def _assert_same_special(ours: torch.Tensor, exact: torch.Tensor, where: str) -> None:
    """NaN and infinities must be in the same places."""
    for name, a, b in (
        ("NaN", ours.isnan(), exact.isnan()),
        ("+inf", ours == math.inf, exact == math.inf),
        ("-inf", ours == -math.inf, exact == -math.inf),
    ):
        wrong = a != b
        if wrong.any():
            i = _index(int(wrong.flatten().int().argmax()), wrong.shape)
            raise AssertionError(
                f"{int(wrong.sum())} of {wrong.numel()} places differ in {name}, first {i}: "
                f"got {ours[i].item():g}, expected {exact[i].item():g}{where}"
            )


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))


def _worst(
    error: torch.Tensor,
    ours: torch.Tensor,
    exact: torch.Tensor,
    theirs: torch.Tensor,
    limit: float,
    where: str,
) -> str:
    i = _index(int(error.flatten().argmax()), error.shape)
    return (
        f"worst element {i}: got {ours[i].item():.6g}, expected {exact[i].item():.6g}, eager {theirs[i].item():.6g}, "
        f"error {error[i].item():.3e}, limit {limit:.3e}{where}"
    )


def _poison(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _places(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with every address once: expanded dimensions are cut to one."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same sizes, strides and 16-byte alignment, and NaN everywhere else in its memory.

    That is 512 elements before and after it and the gaps between its rows. A kernel that reads there gives NaN; one
    that writes there is found by `check_guards`.
    """
    offset = GUARD + tensor.data_ptr() % 16 // tensor.element_size()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    buffer = torch.full(
        (offset + max(span, 0) + GUARD,), _poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device
    )
    copy = buffer.as_strided(tensor.shape, tensor.stride(), offset)
    _places(copy).copy_(_places(tensor.detach()))
    assert copy.data_ptr() % 16 == tensor.data_ptr() % 16
    return copy


def check_guards(tensor: torch.Tensor, context: str = "") -> None:
    """Raises AssertionError if anything but a guarded tensor itself was written in its memory."""
    start = tensor.storage_offset()
    assert start >= GUARD, "not made by guarded()"
    rest = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.detach().untyped_storage()).clone()
    poison = _poison(tensor.dtype)
    _places(rest.as_strided(tensor.shape, tensor.stride(), start)).fill_(poison)
    written = ~rest.isnan() if tensor.dtype.is_floating_point else rest != poison
    if written.any():
        first = int(written.int().argmax()) - start
        message = f"{int(written.sum())} elements written outside a tensor, the first at {first} from its start"
        raise AssertionError(f"{message} {context}")


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor, context: str = "") -> None:
    """Equal in type, shape and every bit, except that any NaN equals any NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)} {context}"
    )
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not same.all():
        i = _index(int((~same).flatten().int().argmax()), same.shape)
        raise AssertionError(
            f"{int((~same).sum())} of {same.numel()} elements differ, first {i}: "
            f"got {actual[i].item()!r}, expected {expected[i].item()!r} {context}"
        )
