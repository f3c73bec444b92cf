"""LayerNorm, linear layers, MLP and mask head at full sizes: widths of the model, shipped configurations, repeats."""

import pytest
import torch
import torch.nn.functional as F

from segmenter.kernels import configs, layernorm, layernorm_mlp, linear, mask_head, reference, reference_rotary
from segmenter.kernels.rotate import rotate
from segmenter.layers import fused_separate_attention
from segmenter.ops import EAGER, load_kernels
from tests.gpu.conftest import size
from tests.support.parity import assert_parity

TYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = size((192, 384, 768, 1024), (48, 192))
ROWS = size((1, 257, 1025, 8200, 12808), (1, 70))


def randn(*shape, device, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device) * scale


def mlp_inputs(rows, d, dtype, device, hidden=None):
    hidden = hidden or 4 * d
    x = randn(rows, d, device=device)
    norm = (1 + randn(d, device=device, seed=1, scale=0.2), randn(d, device=device, seed=2, scale=0.2))
    first = (randn(hidden, d, device=device, seed=3, scale=d**-0.5), randn(hidden, device=device, seed=4, scale=0.1))
    second = (randn(d, hidden, device=device, seed=5, scale=hidden**-0.5), randn(d, device=device, seed=6, scale=0.1))
    return [t.to(dtype) for t in (x, *norm, *first, *second)]


def check(actual, function, inputs, context="", repeats=None, again=None):
    """Parity with float64, and the same bits every time.

    Half types: where the library multiplies, ours is eager's result but for the LayerNorm's last bit, hence 1.1.
    float32: libraries add long sums in several parts, which is more exact than one after the other.
    """
    exact = function(*(t.double() for t in inputs))
    ratio = 2.5 if actual.dtype == torch.float32 else 1.1
    assert_parity(actual, exact, function(*inputs), frobenius=ratio, max_ratio=max(2.0, ratio), context=context)
    for _ in range(repeats or 0):
        assert torch.equal(again(), actual), f"{context} differs between runs"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_operators_at_the_widths_of_the_model(rows, d, dtype, device):
    inputs = mlp_inputs(rows, d, dtype, device)
    x, gamma, beta, w1, b1, w2, b2 = inputs
    context = f"rows={rows} d={d} {dtype}"
    check(layernorm.layernorm(x, gamma, beta), reference.layernorm, (x, gamma, beta), context)
    qkv = (x, gamma, beta, w1[: 3 * d], b1[: 3 * d])
    check(linear.layernorm_linear(*qkv), reference.layernorm_linear, qkv, context)
    check(linear.layernorm_linear(*qkv, gelu=True), lambda *a: reference.layernorm_linear(*a, gelu=True), qkv, context)
    proj = (x, w1[:d], b1[:d], x)
    check(linear.linear(*proj), reference.linear, proj, context)
    check(layernorm_mlp.layernorm_mlp(*inputs), reference.layernorm_mlp, inputs, context, size(3, 1),
          lambda: layernorm_mlp.layernorm_mlp(*inputs))  # fmt: skip


@pytest.mark.parametrize("scale", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("d", WIDTHS)
def test_layer_scale(d, dtype, scale, device):
    """A factor for each column of what is added, of the weights' type or, as under autocast, wider."""
    inputs = mlp_inputs(size(8200, 70), d, dtype, device)
    scale = randn(d, device=device, seed=7, scale=0.2).to(scale or dtype)
    proj = (inputs[0], inputs[3][:d], inputs[4][:d], inputs[0])

    def product(function):
        return lambda *a: function(*a[:-1], layer_scale=a[-1])

    context = f"d={d} {dtype} scale {scale.dtype}"
    for of, function, tensors in ((linear.linear, reference.linear, proj),
                                  (layernorm_mlp.layernorm_mlp, reference.layernorm_mlp, inputs)):  # fmt: skip
        tensors = (*tensors, scale)
        run = product(of)
        check(run(*tensors), product(function), tensors, context, size(3, 1), lambda r=run, t=tensors: r(*t))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_attention_of_separate_projections(dtype, scaled, device):
    """As in ViTs of transformers, with LayerScale as in DINOv2: three products, and the whole as one operator."""
    N, d, heads = size((1370, 768, 12), (27, 64, 2))
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.LayerNorm(d), *(torch.nn.Linear(d, d) for _ in range(4))]).to(device)
    x = randn(2, N, d, device=device).to(dtype)
    scale = randn(d, device=device, seed=1, scale=0.2).to(dtype) if scaled else None

    def half(ops, kind):
        norm, *projections, proj = layers.to(kind)
        factor = scale if scale is None else scale.to(kind)
        return fused_separate_attention(x.to(kind), norm, projections, heads, proj, ops, factor)

    with torch.inference_mode():
        layers.to(dtype)  # rounded once for all, as x and scale are
        found, exact = half(load_kernels(), dtype), half(EAGER, torch.float64)
        assert_parity(found, exact, half(EAGER, dtype), frobenius=1.1, context=f"{dtype} scaled={scaled}")
        for _ in range(size(20, 1)):
            assert torch.equal(half(load_kernels(), dtype), found)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("heads", size((3, 12, 16), (2,)))
def test_rotary_positions(heads, dtype, interleaved, device):
    """Queries and keys of packed qkv, after CLS and four registers, and their gradient."""
    B, n = size((8, 1024), (2, 9))
    qkv = randn(B, n + 5, 3 * heads * 64, device=device).to(dtype)
    angles = randn(n, 32, device=device, seed=1)
    angles = angles.repeat_interleave(2, 1) if interleaved else angles.repeat(1, 2)
    x = qkv.unflatten(2, (3 * heads, 64))[:, :, : 2 * heads]
    inputs = (x, angles.cos().to(dtype), angles.sin().to(dtype))
    for transposed in (False, True):
        run, of = ((lambda *a, f=f, t=transposed: f(*a, interleaved, t)) for f in (rotate, reference_rotary.rotate))
        check(run(*inputs), of, inputs, f"{dtype} transposed={transposed}", size(20, 1), lambda r=run: r(*inputs))


def runs_here(config, device):
    is_new = device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    return is_new or not getattr(config, "descriptors", False)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_linear_configuration(dtype, device):
    bytes_ = torch.empty(0, dtype=dtype).element_size()
    found = {
        configs.linear(architecture, bytes_, m, n, gelu, precision)
        for architecture in configs.ARCHITECTURES
        for m in (257, 8200, 65600)
        for n in (192, 384, 1024, 4096)
        for gelu in (False, True)
        for precision in (("ieee",) if bytes_ == 2 else ("ieee", "tf32"))
    }
    rows, d = size((1174, 768), (70, 48))
    x, gamma, beta, w, b, _, _ = mlp_inputs(rows, d, dtype, device)
    residual = randn(rows, len(w), device=device, seed=7).to(dtype)
    for config in sorted(filter(lambda c: runs_here(c, device), found), key=str):

        def run(config=config):
            return linear.product(x, w, b, residual, True, config=config)

        inputs = (x, w, b, residual)
        check(run(), lambda *a: reference.linear(*a, gelu=True), inputs, f"{config} {dtype}", size(100, 1), run)


@pytest.mark.parametrize("strategy", ["library", "separate", "fold", "rows"])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_every_way_to_normalise_and_multiply(strategy, dtype, device):
    rows = size(8200, 70)
    x, gamma, beta, w, b, _, _ = mlp_inputs(rows, 192, dtype, device)
    x = x + 3  # a mean for the fold to subtract
    gelu = strategy != "library"

    def run():
        return linear.normalised_product(x, gamma, beta, w, b, 1e-5, gelu, strategy)

    exact = reference.layernorm_linear(*(t.double() for t in (x, gamma, beta, w, b)), gelu=gelu)
    error = (run().double() - exact).norm() / exact.norm()
    eager = (reference.layernorm_linear(x, gamma, beta, w, b, gelu=gelu).double() - exact).norm() / exact.norm()
    assert error < 2 * eager  # folding rounds W a second time: the square root of two
    for _ in range(size(100, 1)):
        assert torch.equal(run(), run())


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_every_mlp_configuration(dtype, device):
    found = {configs.mlp(a, m) for a in configs.ARCHITECTURES for m in (257, 12000, 65600)}
    inputs = mlp_inputs(size(8200, 70), 192, dtype, device)
    for config in sorted(filter(lambda c: runs_here(c, device), found), key=str):

        def run(config=config):
            return layernorm_mlp.run(*inputs, 1e-5, "single", config)

        check(run(), reference.layernorm_mlp, inputs, f"{config} {dtype}", size(100, 1), run)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("K", [2, 19, 60, 150, 256, 300])
def test_mask_head(K, dtype, device):
    N, d = size((1024, 768), (70, 48))
    tokens = randn(2, N + K, d, device=device).to(dtype)
    projections = [randn(d, d, device=device, seed=s, scale=d**-0.5).to(dtype) for s in (1, 2)]
    affine = [randn(K, device=device, seed=s).to(dtype) for s in (3, 4)]
    inputs = (tokens[:, :-K], tokens[:, -K:], *projections, *affine)
    with pytest.warns(UserWarning) if K == 2 else _nothing():
        run = mask_head.mask_head(*inputs)
    check(run, reference.mask_head, inputs, f"K={K} {dtype}", 0 if K == 2 else size(20, 1),
          lambda: mask_head.mask_head(*inputs))  # fmt: skip


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_every_mask_head_configuration(dtype, device):
    N, d, K = *size((1024, 192), (70, 64)), 19
    found = {
        configs.mask_head(a, 2, 32, width, rows, "ieee")
        for a in configs.ARCHITECTURES
        for width in (192, 768)
        for rows in (1024, 65536)
    }
    patches, classes = randn(2, N, d, device=device).to(dtype), randn(2, K, d, device=device, seed=1).to(dtype)
    w_p, w_c = (randn(d, d, device=device, seed=s, scale=d**-0.5).to(dtype) for s in (2, 3))
    affine = [randn(K, device=device, seed=s).to(dtype) for s in (4, 5)]
    for config in sorted(filter(lambda c: runs_here(c, device), found), key=str):

        def run(config=config):
            return mask_head._masks(patches, classes, w_p, w_c, *affine, 1e-5, config)

        inputs = (patches, classes, w_p, w_c, *affine)
        check(run(), reference.mask_head, inputs, f"{config} {dtype}", size(100, 1), run)


@pytest.mark.card
def test_gelu_on_the_card(device):
    """The approximate reciprocal and exponential included: within 3e-5 of the exact form, as promised."""
    x = torch.linspace(-12, 12, 2**16, device=device).half().view(-1, 64)
    eye = torch.eye(64, device=device).half()
    got = linear.product(x, eye, None, gelu=True).double()
    want = F.gelu(x.double())
    rounding = want.abs() * 2**-11 + 2**-25
    assert ((got - want).abs() - rounding).max() < 3e-5
