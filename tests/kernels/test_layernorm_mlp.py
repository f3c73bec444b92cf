"""The MLP half of a block: numbers, both strategies, configurations, limits.

What all operators share is in test_operators.py.
"""

import itertools

import pytest
import torch

from segmenter.kernels import configs, launch, reference
from segmenter.kernels import layernorm_mlp as kernel
from segmenter.kernels.layernorm_mlp import layernorm_mlp
from tests.support.huge_offsets import FAR, far_apart
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = configs.MlpConfig(32, 16, 4, 2, True)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def mlp_args(m, d, dtype, hidden=None, seed=0, stream=None):
    """x and LayerNorm's parameters in `stream`, the others in `dtype`; a hidden layer as large as the residual."""
    hidden, stream = hidden or 4 * d, stream or dtype
    x, gamma, beta = (2 * randn(m, d, seed=seed) + 1).to(stream), randn(d, seed=seed + 1), randn(d, seed=seed + 2)
    fc1, bias1 = randn(hidden, d, seed=seed + 3) / d**0.5, randn(hidden, seed=seed + 4)
    fc2, bias2 = 2 * randn(d, hidden, seed=seed + 5) / hidden**0.5, randn(d, seed=seed + 6)
    return x, gamma.to(stream), beta.to(stream), *(t.to(dtype) for t in (fc1, bias1, fc2, bias2))


def check(actual, args, eps=1e-5, **options):
    exact = reference.layernorm_mlp(*(t.double() for t in args), eps)
    assert_parity(actual, exact, reference.layernorm_mlp(*args, eps), **options)


def on_guarded(args, **options):
    """The result for copies between NaN guards, which must stay as they are."""
    copies = [guarded(t) for t in args]
    out = kernel.run(*copies, 1e-5, **options)
    for t in copies:
        check_guards(t)
    return out


@by_dtype
@pytest.mark.parametrize("strategy", ["single", "split"])
@pytest.mark.parametrize(("m", "d"), [(3, 16), (37, 48), (33, 64), (35, 80), (31, 192)])
def test_parity(m, d, strategy, dtype, guarded_outputs):
    args = mlp_args(m, d, dtype, hidden=2 * d, seed=m)
    check(on_guarded(args, strategy=strategy, config=SMALL), args)


@by_dtype
@pytest.mark.parametrize("strategy", ["single", "split"])
@pytest.mark.parametrize("scale", [None, torch.float32], ids=["its type", "float32"])
def test_layer_scale(strategy, scale, dtype, guarded_outputs):
    """Of the branch with its bias; a wider one makes the result wider."""
    for m, d in ((37, 48), (31, 64)):
        args, scale_ = mlp_args(m, d, dtype, hidden=2 * d, seed=m), randn(d, seed=7, dtype=scale or dtype)
        out = on_guarded(args, strategy=strategy, config=SMALL, layer_scale=guarded(scale_))
        exact = reference.layernorm_mlp(*(t.double() for t in args), 1e-5, scale_.double())
        assert_parity(out, exact, reference.layernorm_mlp(*args, 1e-5, scale_))


@by_dtype
@pytest.mark.parametrize("strategy", ["single", "split"])
def test_gelu_by_tanh(strategy, dtype, guarded_outputs):
    """The approximation itself, which the exact GELU is not."""
    args = mlp_args(37, 48, dtype, hidden=96)
    out = on_guarded(args, strategy=strategy, config=SMALL, tanh=True)
    exact = reference.layernorm_mlp(*(t.double() for t in args), 1e-5, None, True)
    assert_parity(out, exact, reference.layernorm_mlp(*args, 1e-5, None, True))
    if dtype == torch.float32:
        with pytest.raises(AssertionError, match="error"):
            check(out, args)


@pytest.mark.parametrize("strategy", ["single", "split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_stream_narrow_weights(strategy, dtype):
    """Under autocast x, and so the result, stays float32."""
    args = mlp_args(37, 48, dtype, stream=torch.float32)
    out = on_guarded(args, strategy=strategy, config=SMALL)
    assert out.dtype == torch.float32
    check(out, args)


def shipped_configs():
    """Every row of the table, and the first place that it is used for."""
    rows = {}
    for architecture, m in itertools.product(configs.ARCHITECTURES, (257, 8200, 16400, 65600)):
        rows.setdefault(configs.mlp(architecture, m), f"{architecture}-{m}")
    return rows


@pytest.mark.parametrize("config", shipped_configs(), ids=shipped_configs().values())
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
def test_shipped_configuration(config, stream):
    """Alone, at the width that it is for, on one block and a bit."""
    args = mlp_args(config.block_m + 5, 192, torch.bfloat16, hidden=2 * config.block_h, stream=stream)
    check(on_guarded(args, strategy="single", config=config), args)


def test_every_hidden_chunk_counts():
    """One hidden unit at a time reaches the output."""
    for unit in range(0, 64, 7):
        x, gamma, beta, fc1, bias1, fc2, bias2 = mlp_args(5, 16, torch.float32)
        only = torch.zeros(64, device=DEVICE).index_fill(0, torch.tensor([unit], device=DEVICE), 1)
        args = (x, gamma, beta, fc1, bias1, fc2 * only, bias2)
        check(kernel.run(*args, 1e-5, "single", SMALL), args)


@pytest.mark.parametrize("strategy", ["single", "split"])
def test_eps_counts(strategy):
    x, *parameters = mlp_args(20, 48, torch.float32)
    args = (1e-3 * x, *parameters)
    check(kernel.run(*args, 1e-3, strategy, SMALL), args, 1e-3)


@pytest.mark.parametrize("which", [0, 3, 5])
def test_misaligned_operands_take_pointers(which, monkeypatch):
    plans, run = [], launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", lambda self, *tensors: plans.append(self) or run(self, *tensors))
    args = list(mlp_args(9, 48, torch.bfloat16))
    want = kernel.run(*args, 1e-5, "single", SMALL)
    assert isinstance(plans[-1].tiles[1], launch.Tiles)
    flat = torch.empty(args[which].numel() + 1, dtype=torch.bfloat16, device=DEVICE)
    flat[1:] = args[which].flatten()
    args[which] = flat[1:].view(args[which].shape)
    assert_bitwise_equal(on_guarded(args, strategy="single", config=SMALL), want)
    assert plans[-1].tiles == (None,) * 14


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory that it does not touch")
def test_offsets_beyond_int32():
    args = list(mlp_args(3, 16, torch.float16))
    for config in (SMALL, configs.MlpConfig(16, 16, 4, 2)):
        want = kernel.run(*args, 1e-5, "single", config)
        far = far_apart((3, 16), (FAR, 1))
        far.copy_(args[0])
        assert_bitwise_equal(kernel.run(far, *args[1:], 1e-5, "single", config), want)
    far = far_apart((16, 64), (FAR // 4, 1))  # fc2: its last rows are beyond 2**31 elements
    far.copy_(args[5])
    args[5] = far
    assert_bitwise_equal(kernel.run(*args, 1e-5, "single", configs.MlpConfig(16, 16, 4, 2)), want)


@pytest.mark.parametrize("strategy", ["single", "split"])
def test_nan_stays_in_its_row(strategy):
    args = mlp_args(20, 48, torch.bfloat16)
    args[0][3, 5], args[0][7, 0] = float("nan"), float("inf")
    check(kernel.run(*args, 1e-5, strategy, SMALL), args)


def test_strategies(monkeypatch):
    """The table, written down here again on purpose, and that it is followed."""
    for architecture in configs.ARCHITECTURES:
        assert configs.layernorm_mlp(architecture, 2, 192) == "single"
        assert configs.layernorm_mlp(architecture, 4, 192) == "split"
        full = architecture in ("sm_80", "sm_86", "sm_89")
        assert configs.layernorm_mlp(architecture, 2, 192, scaled=True) == ("split" if full else "single")
        assert {configs.layernorm_mlp(architecture, 2, d) for d in (384, 768, 1024)} == {"split"}
    assert configs.layernorm_mlp("unknown", 2, 192) == "split"
    launched, run = [], launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", lambda self, *t: launched.append(self.kernel.fn.__name__) or run(self, *t))
    for d, hidden, dtype, kernels in (
        (192, 64, torch.bfloat16, ["_layernorm_mlp_fwd_kernel"]),
        (192, 40, torch.bfloat16, ["_layernorm_linear_rows_kernel", "_linear_fwd_kernel"]),
        (64, 64, torch.bfloat16, ["_layernorm_fwd_kernel", "_linear_fwd_kernel", "_linear_fwd_kernel"]),
        (192, 64, torch.float32, ["_layernorm_fwd_kernel", "_linear_fwd_kernel", "_linear_fwd_kernel"]),
    ):
        launched.clear()
        args = mlp_args(5, d, dtype, hidden=hidden)
        check(layernorm_mlp(*args), args)
        assert launched == kernels


def test_leading_dimensions_and_strides():
    x, *parameters = mlp_args(18, 48, torch.bfloat16)
    x = x.view(2, 9, 48)
    for view in (x[:, 1:], x.transpose(0, 1), x[:1].expand(3, 9, 48), x[0, 0]):
        check(layernorm_mlp(view, *parameters), (view, *parameters))


def test_errors():
    x, gamma, beta, fc1, bias1, fc2, bias2 = args = mlp_args(3, 16, torch.float32)
    with pytest.raises(launch.KernelError, match="x must be one of.*float64.*eager"):
        layernorm_mlp(x.double(), *args[1:])
    with pytest.raises(launch.KernelError, match="fc2_weight must be one of float32"):
        layernorm_mlp(x, gamma, beta, fc1, bias1, fc2.half(), bias2)
    with pytest.raises(launch.KernelError, match="fc2_bias must be one of float32"):
        layernorm_mlp(x, gamma, beta, fc1, bias1, fc2, bias2.half())
    with pytest.raises(launch.KernelError, match="bias must be one of float32"):
        layernorm_mlp(x, gamma, beta, fc1, bias1.half(), fc2, bias2)
    with pytest.raises(ValueError, match=r"fc2_weight and fc2_bias must be \(16, 64\) and \(16,\), got \(64, 16\)"):
        layernorm_mlp(x, gamma, beta, fc1, bias1, fc1, bias2)
    with pytest.raises(ValueError, match=r"fc1_weight must be"):
        layernorm_mlp(x, gamma, beta, fc2, bias1, fc2, bias2)
    with pytest.raises(ValueError, match="LayerNorm's weight"):
        layernorm_mlp(x, gamma[1:], beta, fc1, bias1, fc2, bias2)
    with pytest.raises(ValueError, match=r"layer_scale must be \(16,\), got \(64,\)"):
        layernorm_mlp(*args, layer_scale=bias1)
    with pytest.raises(launch.KernelError, match="layer_scale must be one of.*float64"):
        layernorm_mlp(*args, layer_scale=bias2.double())
