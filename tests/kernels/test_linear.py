"""Products with bias, GELU, residual and LayerNorm: numbers, configurations, limits.

What all operators share is in test_operators.py.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from segmenter.kernels import blocks, configs, launch, reference
from segmenter.kernels import linear as kernel
from segmenter.kernels.linear import layernorm_linear, linear
from tests.support.huge_offsets import FAR, far_apart
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = (192, 384, 768, 1024)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def linear_args(m, k, n, dtype, residual=None, seed=0):
    """x, weight, bias, and a residual of its own type or None."""
    x, weight, bias = randn(m, k, dtype=dtype, seed=seed), randn(n, k, seed=seed + 1) / k**0.5, randn(n, seed=seed + 2)
    added = None if residual is None else randn(m, n, dtype=residual, seed=seed + 3)
    return x, weight.to(dtype), bias.to(dtype), added


def norm_args(m, k, n, dtype, seed=0, stream=None):
    """x, LayerNorm's weight and bias, weight, bias."""
    x, weight, bias, _ = linear_args(m, k, n, dtype, seed=seed)
    stream = stream or dtype
    x = (2 * x.float() + 1).to(stream)
    return x, randn(k, seed=seed + 4, dtype=stream), randn(k, seed=seed + 5, dtype=stream), weight, bias


def check(actual, function, args, **options):
    exact = function(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
    assert_parity(actual, exact, function(*args), **options)


def on_guarded(function, *args, **options):
    """The result for copies between NaN guards, which must stay as they are."""
    copies = [guarded(t) if isinstance(t, torch.Tensor) else t for t in args]
    out = function(*copies, **options)
    for t in copies:
        if isinstance(t, torch.Tensor):
            check_guards(t)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# GELU


@triton.jit
def _gelu_kernel(X, Y, n, BLOCK: tl.constexpr, FORM: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + offs, mask=offs < n, other=0.0)
    tl.store(Y + offs, blocks.gelu(x, FORM), mask=offs < n)


def gelu(x, dtype):
    y = torch.empty_like(x)
    form = blocks.gelu_form(dtype, launch.architecture(x))
    _gelu_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), 4096, form)
    return y


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 3.3e-6)])
def test_gelu_error(dtype, limit):
    """Over a grid as dense as bfloat16 is near 1, and what is beyond it."""
    x = torch.cat([torch.arange(-9, 9, 1 / 4096), torch.logspace(-30, 38, 500), -torch.logspace(-30, 38, 500)])
    x = x.float().to(DEVICE)
    exact = torch.nn.functional.gelu(x.double())
    error = (gelu(x, dtype).double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() <= limit, f"{error.max():.2e} at {x[error.argmax()]:g}"


@by_dtype
def test_gelu_of_special_values(dtype):
    """As eager PyTorch: -inf * 0 is NaN."""
    x = torch.tensor([0.0, float("inf"), float("-inf"), float("nan"), 3e38, -3e38], device=DEVICE)
    assert_bitwise_equal(gelu(x, dtype), torch.nn.functional.gelu(x.double()).float())


def test_gelu_form():
    """The reciprocal instruction where it exists, erf where float32 wants it."""
    assert blocks.gelu_form(torch.float32, "sm_90") == "erf"
    assert blocks.gelu_form(torch.float16, "gfx942") == "divide"
    assert blocks.gelu_form(torch.bfloat16, "sm_90") == ("divide" if launch.INTERPRETED else "rcp")


# ---------------------------------------------------------------------------------------------------------------------
# linear


@by_dtype
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 16, 48), (37, 48, 80), (65, 80, 31), (66, 192, 64), (64, 384, 24), (7, 208, 67), (31, 13, 40)],
)
def test_parity(m, k, n, gelu, dtype, guarded_outputs):
    for bias, residual in itertools.product((True, False), (None, dtype, torch.float32)):
        args = linear_args(m, k, n, dtype, residual, seed=m)
        args = (*args[:2], args[2] if bias else None, args[3], gelu)
        options = {"context": f"{m} x {k} x {n}, {bias=}, {residual=}"}
        check(on_guarded(kernel.product, *args), reference.linear, args, **options)


@by_dtype
@pytest.mark.parametrize(("m", "k", "n"), [(37, 48, 80), (65, 80, 31), (7, 208, 67)])
def test_layer_scale(m, k, n, dtype, guarded_outputs):
    """Of the branch with its bias and GELU, not of the residual; of its own type."""
    wide = torch.float32
    for residual, scale, gelu in (
        (dtype, wide, False),
        (wide, wide, True),
        (dtype, dtype, False),
        (None, dtype, False),
    ):
        args = linear_args(m, k, n, dtype, residual, seed=m)
        args = (*args, gelu, randn(n, seed=m + 9, dtype=scale))
        check(on_guarded(kernel.product, *args), reference.linear, args, context=f"{residual=}, {scale=}, {gelu=}")


@pytest.mark.parametrize("descriptors", [False, True])
def test_layer_scale_is_not_rounded(descriptors):
    """A float32 one with half weights: products that float32 holds exactly, of factors that a half type does not."""
    x, weight, bias = (randn(*shape, seed=i).round() for i, shape in enumerate(((40, 104), (24, 104), (24,))))
    x, residual = x * (torch.arange(104, device=DEVICE) % 9 == 0), randn(40, 24, seed=4).round()
    scale = 1 + torch.arange(24, device=DEVICE) / 1024
    half = [t.bfloat16() for t in (x, weight, bias)]
    config = configs.LinearConfig(32, 32, 32, 2, 4, 2, descriptors)
    out = kernel.product(*half, residual, layer_scale=scale, config=config)
    assert_bitwise_equal(out, reference.linear(*(t.double() for t in (*half, residual)), False, scale).float())


@pytest.mark.parametrize("descriptors", [False, True])
@by_dtype
def test_integers_are_exact(dtype, descriptors):
    """Sums of products of small integers have one right result in every order, to the last bit."""
    x, weight, bias, residual = (
        torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(i)).to(dtype).to(DEVICE)
        for i, shape in enumerate(((40, 104), (24, 104), (24,), (40, 24)))
    )
    x = x * (torch.arange(104, device=DEVICE) % 5 == 0)  # so that the results fit bfloat16's 8 bits
    config = configs.LinearConfig(32, 32, 32, 2, 4, 2, descriptors)
    signs = bias.sign()
    for b, r, s in ((None, None, None), (bias, residual, None), (bias, residual, signs)):
        exact = reference.linear(*(None if t is None else t.double() for t in (x, weight, b, r)), False, s)
        assert exact.abs().max() <= 256
        assert_bitwise_equal(kernel.product(x, weight, b, r, False, s, config=config), exact.to(dtype))


def shipped_linear_configs():
    """Every row of the table, and the first place that it is used for."""
    rows = {}
    for architecture in (*configs.ARCHITECTURES, "unknown"):
        for size, precision in ((2, "ieee"), (4, "ieee"), (4, "tf32")):
            for m, n, gelu in itertools.product((257, 3000, 8200, 65600), (192, 768, 1024, 4096), (False, True)):
                config = configs.linear(architecture, size, m, n, gelu, precision)
                rows.setdefault((config, size), f"{architecture}-{size}-{m}x{n}")
    return rows


@pytest.mark.parametrize(("config", "size"), shipped_linear_configs(), ids=shipped_linear_configs().values())
def test_shipped_configuration(config, size):
    """Alone, on one block and a bit each way, through descriptors where it uses them."""
    dtype = torch.bfloat16 if size == 2 else torch.float32
    m, n, k = config.block_m + 9, config.block_n + 8, 2 * config.block_k + 8
    args = linear_args(m, k, n, dtype, torch.float32)
    check(on_guarded(kernel.product, *args, True, config=config), reference.linear, (*args, True))
    args = (args[0], args[1], None, args[3].to(dtype))
    check(on_guarded(kernel.product, *args, config=config), reference.linear, args)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 3), (8, 2), (3, 7)])
def test_every_block_has_one_program(m, n):
    """Grouped order: whatever the numbers of blocks, each is computed; outputs are NaN before."""
    args = linear_args(16 * m - 3, 16, 16 * n, torch.float32)[:3]
    config = configs.LinearConfig(16, 16, 16, 4, 1, 1)
    check(kernel.product(*args, config=config), reference.linear, args)


@pytest.mark.parametrize("which", range(4))
def test_misaligned_operands_take_pointers(which, monkeypatch):
    """An address that descriptors cannot take, in each matrix in turn."""
    plans, run = [], launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", lambda self, *tensors: plans.append(self) or run(self, *tensors))
    args = list(linear_args(33, 64, 48, torch.bfloat16, torch.bfloat16))
    kernel.product(*args)
    assert isinstance(plans[-1].tiles[0], launch.Tiles)
    if which != 2:  # the bias is read by pointers anyway
        flat = torch.empty(args[which].numel() + 1, dtype=torch.bfloat16, device=DEVICE)
        flat[1:] = args[which].flatten()
        args[which] = flat[1:].view(args[which].shape)
        check(on_guarded(kernel.product, *args), reference.linear, args)
        assert plans[-1].tiles == (None,) * 9


def test_leading_dimensions_and_strides():
    x, weight, bias, residual = linear_args(2 * 9, 48, 64, torch.float16, torch.float32)
    x, residual = x.view(2, 9, 48)[:, 1:], residual.view(2, 9, 64)[:, :8]
    args = (x, weight, bias, residual, True)
    check(linear(*args), reference.linear, args)
    args = (x[0, 0], weight, bias, residual[0, 0])
    check(linear(*args), reference.linear, args)
    dense = torch.ones(64, 48, dtype=torch.float16, device=DEVICE)
    assert_bitwise_equal(linear(x, dense.t().contiguous().t(), None, None, True), linear(x, dense, None, None, True))


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory that it does not touch")
@pytest.mark.parametrize("which", [0, 1, 3])
def test_offsets_beyond_int32(which):
    args = list(linear_args(3, 16, 3, torch.float16, torch.float16))
    config = configs.LinearConfig(16, 16, 16, 8, 4, 2)
    want = kernel.product(*args, config=config)
    far = far_apart(args[which].shape, (FAR, 1))
    far.copy_(args[which])
    args[which] = far
    assert_bitwise_equal(kernel.product(*args, config=config), want)


def test_nan_stays_in_its_row():
    args = linear_args(20, 192, 64, torch.bfloat16, torch.bfloat16)
    args[0][3, 5] = float("nan")
    for gelu in (False, True):
        check(kernel.product(*args, gelu), reference.linear, (*args, gelu))


def test_plain_products_are_the_librarys(monkeypatch):
    """And only those."""
    ours = []
    monkeypatch.setattr(kernel, "product", lambda x, w, *_, **__: ours.append(w) or launch.call(torch.matmul, x, w.t()))
    x, weight, bias, residual = linear_args(5, 16, 32, torch.float32, torch.float32)
    assert_bitwise_equal(linear(x, weight, bias), reference.linear(x, weight, bias))
    assert_bitwise_equal(
        layernorm_linear(x, bias[:16], bias[:16], weight, None).isnan(), torch.zeros(5, 32, device=DEVICE) > 0
    )
    assert not ours
    linear(x, weight, bias, gelu=True)
    linear(x, weight, bias, residual)
    linear(x, weight, bias, layer_scale=bias)
    layernorm_linear(x, bias[:16], bias[:16], weight, bias, gelu=True)
    assert len(ours) == 4


# ---------------------------------------------------------------------------------------------------------------------
# layernorm_linear


@by_dtype
@pytest.mark.parametrize("strategy", ["library", "separate", "fold", "rows"])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 16, 48), (37, 48, 80), (65, 80, 31), (66, 192, 67), (19, 384, 24)])
def test_layernorm_linear(m, k, n, strategy, dtype, guarded_outputs):
    for gelu, bias in ((False, True), (True, False)) if strategy != "library" else ((False, True), (False, False)):
        args = norm_args(m, k, n, dtype, seed=m)
        args = (*args[:4], args[4] if bias else None, 1e-5, gelu)
        out = on_guarded(kernel.normalised_product, *args, strategy=strategy)
        # As many roundings as in eager PyTorch, so equal up to chance; the fold rounds the weights instead of the rows.
        # In float32 chance is the order in which NumPy and PyTorch add on this processor: 1.06 has been seen.
        plain = 1.15 if dtype == torch.float32 else 1.05
        check(out, reference.layernorm_linear, args, frobenius=1.15 if strategy == "fold" else plain, max_ratio=2.5)


@pytest.mark.parametrize("strategy", ["library", "separate", "rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_stream_narrow_weights(strategy, dtype):
    """Under autocast x stays float32."""
    args = norm_args(37, 192, 72, dtype, stream=torch.float32)
    out = on_guarded(kernel.normalised_product, *args, 1e-5, False, strategy=strategy)
    check(out, reference.layernorm_linear, (*args, 1e-5, False))


@pytest.mark.parametrize("strategy", ["separate", "fold", "rows"])
@pytest.mark.parametrize(("ratio", "outlier"), [(0.0, 100.0), (3.0, 1.0), (30.0, 1.0), (30.0, 100.0)])
def test_mean_and_outlier_channels(strategy, ratio, outlier):
    """What bfloat16 networks have: a common offset, and channels far larger than the others."""
    x, gamma, beta, weight, bias = norm_args(64, 192, 96, torch.bfloat16)
    x = x.float() + ratio
    x[:, ::48] *= outlier
    args = (x.bfloat16(), gamma, beta, weight, bias, 1e-5, True)
    out = kernel.normalised_product(*args, strategy=strategy)
    check(out, reference.layernorm_linear, args, frobenius=1.3 if strategy == "fold" else None, max_ratio=3.0)


@pytest.mark.parametrize("strategy", ["separate", "fold", "rows"])
def test_eps_counts(strategy):
    x, *parameters = norm_args(20, 48, 32, torch.float32)
    args = (1e-3 * x, *parameters, 1e-3, True)
    check(kernel.normalised_product(*args, strategy=strategy), reference.layernorm_linear, args)


def shipped_rows_configs():
    rows = {}
    for architecture in (*configs.ARCHITECTURES, "unknown"):
        for m, n in itertools.product((64, 257, 8200, 65600), (576, 768)):
            rows.setdefault(configs.rows(architecture, m, n), f"{architecture}-{m}x{n}")
    return rows


@pytest.mark.parametrize("config", shipped_rows_configs(), ids=shipped_rows_configs().values())
def test_shipped_rows_configuration(config):
    args = (*norm_args(config.block_m + 9, 192, 3 * config.block_n + 8, torch.bfloat16), 1e-5, True)
    out = on_guarded(kernel.normalised_product, *args, strategy="rows", config=config)
    check(out, reference.layernorm_linear, args)


def test_folding_is_done_anew_on_every_call():
    """Weights that change in place are seen, as a CUDA graph needs."""
    args = norm_args(9, 48, 16, torch.bfloat16)
    for i in range(2):
        args[1].mul_(-0.5 + i)
        out = kernel.normalised_product(*args, 1e-5, False, strategy="fold")
        check(out, reference.layernorm_linear, (*args, 1e-5, False), frobenius=1.15)


def test_strategies():
    """The table, written down here again on purpose."""
    assert configs.layernorm_linear("sm_90", 2, 8200, 192, False, True) == "rows"
    assert configs.layernorm_linear("sm_90", 2, 8200, 192, True, False) == "rows"
    assert configs.layernorm_linear("unknown", 2, 8200, 192, False, True) == "library"
    assert configs.layernorm_linear("sm_90", 4, 8200, 192, True, True) == "separate"
    for k in WIDTHS[1:]:
        assert configs.layernorm_linear("sm_90", 2, 65600, k, False, True) == "library"
        assert configs.layernorm_linear("sm_90", 2, 65600, k, True, False) == "separate"
        assert configs.layernorm_linear("sm_90", 2, 65600, k, True, True) == ("separate" if k == 384 else "fold")
        assert configs.layernorm_linear("sm_90", 2, 8200, k, True, True) == "separate"


def test_widths_that_are_one_or_two_tiles():
    assert [k for k in range(16, 400, 16) if blocks.fits_rows(k)] == [
        16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256, 272, 288, 320, 384
    ]  # fmt: skip
    assert blocks.fits_rows(768) and blocks.fits_rows(1024) and not blocks.fits_rows(8)
    assert [blocks.power_of_two_columns(k) for k in (16, 192, 384, 1023, 1024)] == [16, 128, 256, 512, 1024]


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors():
    x, weight, bias, residual = linear_args(3, 16, 32, torch.float32, torch.float32)
    for args, message in (
        ((x.double(), weight.double(), bias.double()), "float64.*eager"),
        ((x, weight.bfloat16(), bias), "x must be one of bfloat16, got torch.float32"),
        ((x, weight, bias.bfloat16()), "bias must be one of float32"),
        ((x, weight, bias, residual.double()), "residual must be one of"),
        ((x, weight, bias, residual, False, bias.double()), "layer_scale must be one of.*float64.*eager"),
    ):
        with pytest.raises(launch.KernelError, match=message):
            linear(*args)
    for args, message in (
        ((x[:, 1:], weight, bias), r"weight must be \(d_out, d_in\).* got \(32, 16\), \(3, 15\)"),
        ((x, weight[0], None), "weight must be"),
        ((x[:, :0], weight[:, :0], None), "weight must be"),
        ((x, weight, bias[1:]), r"bias must be \(32,\), got \(31,\)"),
        ((x, weight, bias, residual[:1]), r"residual must be \(3, 32\), got \(1, 32\)"),
        ((x, weight, bias, residual, False, bias[:1]), r"layer_scale must be \(32,\), got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(*args)
    with pytest.raises(ValueError, match=r"LayerNorm's weight must be \(16,\), got \(32,\)"):
        layernorm_linear(x, bias, bias, weight, bias)
    with pytest.raises(launch.KernelError, match="norm_bias must be one of"):
        layernorm_linear(x, bias[:16], bias[:16].double(), weight, bias)
    with pytest.raises(launch.KernelError, match="2147483648 rows"):
        linear(x[:1].expand(2**31, 16), weight, bias, gelu=True)
