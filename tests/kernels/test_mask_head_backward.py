"""The gradient of the mask head by kernels: numbers, memory, what runs. Second derivatives are in test_operators.py."""

import itertools
import math

import pytest
import torch

from segmenter.kernels import configs, configs_backward, launch, mask_head, reference
from segmenter.kernels import mask_head_backward as kernel
from segmenter.kernels.launch import KernelError
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

NAMES = ("patches", "classes", "proj_patch", "proj_classes", "norm_weight", "norm_bias")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNITS = ["_unit_rows_kernel"] * 2
SUMS = ["_mask_head_bwd_kernel", "_partial_sums_kernel"]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Patch rows beyond the image are zeros, whose norm the interpreter divides by; they are not stored.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def inputs(B=2, N=33, K=19, d=48, dtype=torch.float32, seed=0, affine=True, norm_dtype=None):
    """Tensors of the mask head. As in the model, patches and classes are slices of one tensor."""
    x = randn(B, N + K, d, seed=seed)
    x[:, N:] += 0.5 * x[:, N:].mean(1, keepdim=True)  # classes that resemble each other
    x = x.to(dtype)
    projections = [(randn(d, d, seed=seed + i) * d**-0.5).to(dtype) for i in (1, 2)]
    norm = [1 + 0.3 * randn(K, seed=seed + 3), randn(K, seed=seed + 4)] if affine else []
    norm = [t.to(norm_dtype or dtype) for t in norm] or [None, None]
    return [x[:, :N], x[:, N:], *projections, *norm]


def gradients(function, tensors, upstream, eps=1e-5):
    """Of all that are there, by name."""
    leaves = {
        name: t.detach().clone().requires_grad_() for name, t in zip(NAMES, tensors, strict=True) if t is not None
    }
    out = function(*(leaves.get(name) for name in NAMES), eps)
    return dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], upstream.to(out.dtype)), strict=True))


def wide(tensors):
    return [None if t is None else t.double() for t in tensors]


def check(tensors, upstream, eps=1e-5, frobenius=None, **where):
    """Every gradient by the rule of parity. Few numbers are a matter of chance."""
    ours = gradients(mask_head.mask_head, tensors, upstream, eps)
    exact = gradients(reference.mask_head, wide(tensors), upstream, eps)
    eager = gradients(reference.mask_head, tensors, upstream, eps)
    for name, gradient in ours.items():
        limits = {"frobenius": frobenius or (1.0 if gradient.dtype != torch.float32 else 2.0)}
        if gradient.numel() < 1024 or len(tensors[1][0]) < 4:
            limits = {"max_ratio": 3.0, "frobenius": 1.5 * limits["frobenius"]}
        terms = 900 if gradient.dtype == torch.float32 else 0
        assert_parity(gradient, exact[name], eager[name], **limits, terms=terms, context=f"{name} {where}")
    return ours


def masks_gradient(tensors, seed=9):
    (B, N, _), K = tensors[0].shape, tensors[1].shape[1]
    return randn(B, N, K, seed=seed, dtype=tensors[0].dtype)


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels as they are launched."""
    names, run = [], launch.Plan.run

    def spy(plan, *tensors):
        names.append(plan.kernel.fn.__name__)
        return run(plan, *tensors)

    monkeypatch.setattr(launch.Plan, "run", spy)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    ("K", "N", "d"),
    [(1, 5, 32), (3, 67, 48), (16, 64, 16), (19, 65, 48), (60, 1, 48), (150, 17, 80), (128, 17, 48), (257, 17, 16),
     (330, 9, 32)],
)  # fmt: skip
@by_dtype
def test_parity(dtype, K, N, d, guarded_outputs):
    tensors = inputs(2, N, K, d, dtype, seed=K + N)
    check(tensors, masks_gradient(tensors), K=K, N=N, d=d)


@pytest.mark.parametrize("K", [19, 130])
@pytest.mark.parametrize("present", ["neither", "weight", "bias"])
def test_norm_without_affine(present, K):
    tensors = inputs(2, 17, K, 32, torch.float32 if K < 100 else torch.float16, affine=present != "neither")
    if present != "neither":
        tensors[5 if present == "weight" else 4] = None
    check(tensors, masks_gradient(tensors), present=present)


@pytest.mark.parametrize("K", [19, 130])
def test_a_norm_of_another_type(K):
    """As in training under autocast; eager has no such LayerNorm, so its norm is rounded."""
    tensors = inputs(2, 17, K, 32, torch.bfloat16, norm_dtype=torch.float32)
    upstream = masks_gradient(tensors)
    ours = gradients(mask_head.mask_head, tensors, upstream)
    exact = gradients(reference.mask_head, wide(tensors), upstream)
    eager = gradients(reference.mask_head, [t.bfloat16() for t in tensors], upstream)
    for name, gradient in ours.items():
        assert gradient.dtype == dict(zip(NAMES, tensors, strict=True))[name].dtype
        assert_parity(gradient, exact[name], eager[name].to(gradient.dtype), frobenius=1.5, context=name)


@pytest.mark.parametrize("K", [19, 130])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_epsilon(eps, K, guarded_outputs):
    """Large, it leaves patches a gradient along themselves; 0, rows beyond the last patch must not reach the sums."""
    tensors = inputs(2, 17, K, 32, torch.float16 if K < 100 else torch.float32)
    check(tensors, masks_gradient(tensors), eps)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@by_dtype
def test_magnitude_of_patches(dtype, scale):
    """In float16 a gradient of cosines divided by norms of 7000 would be lost; that of the patches just is so small."""
    tensors = inputs(2, 33, 19, 64, torch.float32)
    tensors = [(t * scale if i == 0 else t).to(dtype) for i, t in enumerate(tensors)]
    check(tensors, masks_gradient(tensors) * (1.0 if scale < 1 else 0.05), scale=scale)


@pytest.mark.parametrize("K", [60, 300])  # float32 keeps what is looked for
def test_classes_almost_alike_keep_their_variance(K):
    """Cosines near 1 that differ by 1e-3, also from slab to slab."""
    tensors = inputs(1, 17, K, 32)
    tensors[1] = tensors[0][:, :1] + 0.05 * tensors[1]
    tensors[0] = tensors[0][:, :1] + 0.05 * tensors[0]
    tensors[3] = tensors[2]
    check(tensors, masks_gradient(tensors))


@pytest.mark.parametrize("K", [19, 130])
@pytest.mark.parametrize("bad", ["zero patch", "NaN patch", "zero class", "NaN class", "NaN upstream"])
def test_nan_is_where_the_reference_has_it(bad, K):
    tensors = inputs(2, 17, K, 16, torch.float32 if K < 100 else torch.bfloat16)
    upstream = masks_gradient(tensors)
    x = upstream if "upstream" in bad else tensors[1] if "class" in bad else tensors[0]
    x[1, 5, slice(None) if "upstream" not in bad else 3] = 0 if "zero" in bad else math.nan
    ours = gradients(mask_head.mask_head, tensors, upstream)
    for name, want in gradients(reference.mask_head, wide(tensors), upstream).items():
        assert_bitwise_equal(ours[name].isnan(), want.isnan(), name)
    assert ours["patches"][1].isnan().any() and not ours["patches"][0].isnan().any()


# ---------------------------------------------------------------------------------------------------------------------
# What runs, and what is stored


def test_what_is_launched(launched):
    """Nothing without gradients; and what no gradient asks for is left out."""
    tensors = inputs(2, 5, 7, 16)
    with torch.no_grad():
        mask_head.mask_head(*tensors)
    assert launched == ["_mask_head_fwd_kernel"]
    expected = {
        0: [*UNITS, SUMS[0], "_unit_rows_bwd_kernel"], 1: [*UNITS, SUMS[0], "_unit_rows_bwd_kernel"],
        2: [*UNITS, SUMS[0], "_unit_rows_bwd_kernel"], 3: [*UNITS, SUMS[0], "_unit_rows_bwd_kernel"],
        4: [*UNITS, *SUMS], 5: [*UNITS, *SUMS],
    }  # fmt: skip
    upstream = masks_gradient(tensors)
    want = gradients(mask_head.mask_head, tensors, upstream)
    for wanted in [(i,) for i in range(6)] + [(0, 4), (1, 2, 5)]:
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        out = mask_head.mask_head(*leaves)
        launched.clear()
        out.backward(upstream)
        for i, leaf in enumerate(leaves):
            if i in wanted:
                assert_bitwise_equal(leaf.grad, want[NAMES[i]], NAMES[i])
            else:
                assert leaf.grad is None
        if len(wanted) == 1:
            assert launched == expected[wanted[0]]
    launched.clear()
    gradients(mask_head.mask_head, inputs(1, 5, 130, 16), randn(1, 5, 130))
    assert launched[1:] == [*UNITS, "_mask_head_stats_kernel", *SUMS, *["_unit_rows_bwd_kernel"] * 2]


@pytest.mark.parametrize("K", [100, 330])
def test_one_intermediate_of_the_size_of_the_masks(K, guarded_outputs):
    tensors = [t.to(torch.float16) for t in inputs(2, 20, K, 16)]
    upstream = masks_gradient(tensors)
    forward = mask_head.mask_head(*tensors)
    guarded_outputs.clear()
    kernel.mask_head_backward(upstream, *tensors[:5])
    assert [t.dtype for t in guarded_outputs if t.numel() >= forward.numel()] == [torch.float16]


@pytest.mark.parametrize("K", [19, 130])
def test_few_programs_take_turns(K, monkeypatch, guarded_outputs):
    """As many partial sums as programs, however many tiles there are."""
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    tensors = inputs(2, 70, K, 16, torch.float16)
    check(tensors, masks_gradient(tensors))
    assert {t.shape[0] for t in guarded_outputs if t.shape[1:] == (2, K)} == {3}


def test_the_number_of_partial_sums_is_bounded():
    assert kernel.PROGRAMS == 264
    with launch.recorded("sm_90") as launches:
        dy, x, classes = (
            torch.empty(1, 1).expand(500, 64).unsqueeze(2),
            torch.empty(500, 64, 16),
            torch.empty(500, 1, 16),
        )
        kernel._cosine_gradient(dy, (x, classes), None, 1e-5, (True, True), None)
    assert [one.plan.grid[0] for one in launches][0] == 264


def test_half_precision_by_autocast():
    tensors = inputs(2, 17, 19, 32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    upstream = randn(2, 17, 19, seed=1)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = mask_head.mask_head(*leaves)
        inside = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    outside = torch.autograd.grad(out, leaves, upstream)
    rounded = [t.bfloat16() if i < 4 else t for i, t in enumerate(tensors)]
    want = gradients(mask_head.mask_head, rounded, upstream).values()
    for i, o, w in zip(inside, outside, want, strict=True):
        assert i.dtype == torch.float32
        assert_bitwise_equal(i, o)
        assert_bitwise_equal(i, w.float())


def test_reference_is_the_gradient_of_the_definition():
    for dtype, K, affine in ((torch.float64, 7, True), (torch.float64, 19, False), (torch.float32, 3, True)):
        tensors = [None if t is None else t.to(dtype) for t in inputs(2, 9, K, 16, affine=affine)]
        upstream = masks_gradient(tensors)
        want = gradients(reference.mask_head, tensors, upstream)
        *found, norm = kernel.mask_head_backward_reference(upstream, *tensors[:5], 1e-5, [True] * 5)
        for got, expected in zip((*found, *norm), want.values(), strict=False):
            torch.testing.assert_close(got, expected, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_upstream_gradients(layout, guarded_outputs):
    tensors = inputs(2, 17, 19, 16, torch.bfloat16)
    placed = LAYOUTS[layout](masks_gradient(tensors))
    tensors[:2] = [t[: len(placed)] for t in tensors[:2]]
    upstream = guarded(placed)
    leaves = [t.clone().requires_grad_() for t in tensors]
    ours = torch.autograd.grad(mask_head.mask_head(*leaves), leaves, upstream)
    assert_bitwise_equal(upstream, placed, "gradients are never written")
    check_guards(upstream)
    want = gradients(mask_head.mask_head, tensors, placed.contiguous()).values()
    for o, w in zip(ours, want, strict=True):
        assert_bitwise_equal(o, w)
        assert o.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_arguments(layout, guarded_outputs):
    dtype = torch.bfloat16
    tensors = inputs(2, 17, 19, 32, dtype)
    placed = [LAYOUTS[layout](t) if i not in (2, 3) or layout != "huge_stride" else t for i, t in enumerate(tensors)]
    upstream = masks_gradient(placed)
    held = [guarded(t) for t in placed]
    ours = kernel.mask_head_backward(upstream, *held[:5])
    for t, original in zip(held, placed, strict=True):
        assert_bitwise_equal(t, original, "arguments are never written")
        check_guards(t)
    want = kernel.mask_head_backward(upstream, *(t.contiguous() for t in placed[:5]))
    for o, w in zip(ours, want, strict=True):
        torch.testing.assert_close(o, w, rtol=2e-2, atol=2e-2 * w.abs().max().item())  # a library multiplies
        assert o.is_contiguous()


@pytest.mark.parametrize("K", [19, 130])
@pytest.mark.parametrize(("B", "N"), [(0, 17), (2, 0)])
def test_empty(B, N, K):
    tensors = inputs(B, N, K, 32)
    for _ in range(3):  # from notes, too
        for name, gradient in gradients(mask_head.mask_head, tensors, randn(B, N, K)).items():
            assert_bitwise_equal(gradient, torch.zeros_like(dict(zip(NAMES, tensors, strict=True))[name]), name)


@by_dtype
def test_backward_twice_is_equal_and_touches_nothing(dtype):
    leaves = [t.clone().requires_grad_() for t in inputs(2, 67, 19, 32, dtype)]
    upstream = masks_gradient(leaves)
    before = [t.detach().clone() for t in (*leaves, upstream)]
    out = mask_head.mask_head(*leaves)
    first, second = (torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_bitwise_equal(a, b)
    for t, was in zip((*leaves, upstream), before, strict=True):
        assert_bitwise_equal(t.detach(), was)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations and errors


def shipped():
    """Every configuration that some call chooses, with an element size and whether it is for many classes."""
    found = {}
    for architecture, (size, precision), k_pad in itertools.product(
        (*configs.ARCHITECTURES, "unknown"), ((2, "ieee"), (4, "ieee"), (4, "tf32")), (16, 64, 128, 256)
    ):
        config = configs_backward.mask_head_backward(architecture, size, k_pad, precision)
        found.setdefault((config, size, k_pad > 64))
    return list(found)


@pytest.mark.parametrize(("config", "size", "many"), shipped(), ids=str)
def test_every_configuration(config, size, many, guarded_outputs):
    dtype, K = torch.float32 if size == 4 else torch.float16, 150 if many else 19
    tensors = inputs(1, config.block_m + 3, K, 48, dtype)
    upstream = masks_gradient(tensors)
    *found, norm = kernel._run(upstream, *tensors[:5], 1e-5, [True] * 5, config)
    exact, eager = (gradients(reference.mask_head, t, upstream) for t in (wide(tensors), tensors))
    for name, gradient in zip(NAMES, (*found, *norm.to(dtype)), strict=True):
        assert_parity(gradient, exact[name], eager[name], frobenius=2.5, terms=900 * (size == 4), context=name)


def test_descriptors_and_pointers_agree():
    tensors = inputs(2, 67, 19, 48, torch.float16)
    tiles = [configs_backward.MaskHeadBackwardConfig(32, 32, 4, 2, descriptors) for descriptors in (True, False)]
    ours, theirs = (kernel._run(masks_gradient(tensors), *tensors[:5], 1e-5, [True] * 5, c) for c in tiles)
    for a, b in zip(ours, theirs, strict=True):
        assert_bitwise_equal(a, b)


BAD_CALLS = [
    (0, lambda t: t.half(), KernelError, "dy must be one of float32, got torch.float16"),
    (0, lambda t: t[:, 1:], ValueError, r"dy must be .2, 9, 7., got .2, 8, 7."),
    (1, lambda t: t.double(), KernelError, "patches must be one of"),
    (2, lambda t: t[:, :, 1:], ValueError, "patches must be .B, N, d., classes .B, K, d."),
    (5, lambda t: t[1:], ValueError, r"norm_weight must be .7,., one value a class, got .6,."),
    (1, lambda t: t.to("meta"), KernelError, "one device"),
]


@pytest.mark.parametrize(("at", "change", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(at, change, error, message):
    tensors = inputs(2, 9, 7, 16)
    args = [masks_gradient(tensors), *tensors[:5]]
    args[at] = change(args[at])
    with pytest.raises(error, match=message):
        kernel.mask_head_backward(*args)
