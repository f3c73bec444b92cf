"""The mask head against its definition: sizes, types, layouts, configurations, NaN, gradients, errors, warnings."""

import itertools
import math
import warnings

import pytest
import torch

from segmenter.kernels import configs, launch, mask_head, reference
from tests.support.layouts import LAYOUTS
from tests.support.parity import assert_bitwise_equal, assert_parity, check_guards, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.segmenter.mask_head.default

# Patch rows beyond the image are zeros, whose norm the interpreter divides by; they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def inputs(B=2, N=65, K=19, d=64, dtype=torch.float32, seed=0, scale=1.0, affine=True):
    """Arguments of the operator. As in the model, patches and classes are slices of one tensor."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    x = randn(B, N + K, d)
    x[:, N:] += 0.5 * x[:, N:].mean(1, keepdim=True)  # classes that resemble each other
    x[:, :N] *= scale
    projections = [(randn(d, d) * d**-0.5).to(dtype) for _ in range(2)]
    norm = [(1 + 0.3 * randn(K)).to(dtype), randn(K).to(dtype)] if affine else [None, None]
    x = x.to(dtype)
    return [x[:, :N], x[:, N:], *projections, *norm, 1e-5]


def wide(args):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in args]


def check(actual, args, **kwargs):
    assert actual.is_contiguous()
    assert_parity(actual, reference.mask_head(*wide(args)), reference.mask_head(*args), **kwargs)


def run(args):
    """The public function, without the warning about two classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return mask_head.mask_head(*args)


# The larger sizes of one kind with the smaller of the others.
SIZES = [
    (2, 65, 48), (3, 197, 64), (19, 64, 64), (60, 63, 48), (20, 1, 192), (150, 33, 48), (171, 17, 64),
    (256, 17, 48), (257, 17, 16), (300, 9, 48), (16, 128, 16), (17, 33, 80), (1, 5, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "N", "d"), SIZES)
def test_equals_reference(K, N, d, dtype, guarded_outputs):
    args = inputs(2, N, K, d, dtype, seed=K + N)
    # With two classes the variance is their squared gap, which magnifies chance: one patch makes most of the error.
    limits = {"frobenius": 2.5, "max_ratio": 3.0} if K == 2 else {}
    check(run(args), args, **limits, context=f"inputs(2, {N}, {K}, {d}, {dtype}, seed={K + N})")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "N", "d"), [(150, 64, 192), (150, 64, 384), (300, 33, 48)])
def test_better_than_eager_where_eager_rounds_more(K, N, d, dtype):
    """Right is 0.67 to 0.74; accumulators or cosines rounded to the half type would make it 0.85 or more."""
    args = inputs(1, N, K, d, dtype)
    check(run(args), args, frobenius=0.8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [3, 40, 260])
@pytest.mark.parametrize("present", ["neither", "weight", "bias"])
def test_norm_without_affine(present, K, dtype):
    args = inputs(2, 17, K, 48 if K < 256 else 16, dtype, affine=present != "neither")
    if present != "neither":
        args[5 if present == "weight" else 4] = None
    check(run(args), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_magnitude_of_patches_cancels(scale, dtype):
    args = inputs(2, 33, 19, 64, dtype, scale=scale)
    check(run(args), args)


def test_cosines_of_many_classes_are_not_rounded():
    args = inputs(1, 17, 300, 48, torch.bfloat16)
    projected = args[1] @ args[3]
    cosine = mask_head._run(args[0], projected.contiguous(), args[2], None, None, 1e-5, norm=False)
    patches = (args[0] @ args[2]).float()
    exact = torch.nn.functional.cosine_similarity(patches[:, :, None], projected.float()[:, None], -1)
    assert cosine.dtype == torch.float32
    torch.testing.assert_close(cosine, exact, rtol=0, atol=4e-4)  # rounded: 1e-3


def test_classes_almost_alike_keep_their_variance():
    """Cosines near 1 that differ by 1e-3: a variance of squares minus squared mean loses most of its digits."""
    args = inputs(1, 33, 60, 64)
    args[1] = args[0][:, :1] + 0.05 * args[1]
    args[0] = args[0][:, :1] + 0.05 * args[0]
    args[3] = args[2]
    check(run(args), args)


def test_epsilon():
    args = inputs(1, 17, 19, 48)
    args[-1] = 0.5
    check(run(args), args)
    assert not torch.allclose(run(args), run([*args[:-1], 1e-5]), atol=1e-2)


def almost_alike(args):
    """Classes so near each other that the variance of their cosines is below the usual eps."""
    args[1] = args[1][:, :1] + 1e-3 * args[1]
    return args


@pytest.mark.parametrize("kind", ["large eps", "classes almost alike"])
@pytest.mark.parametrize(("K", "d"), [(19, 48), (19, 192), (150, 144), (260, 80)])
def test_norm_of_the_patches(K, d, kind):
    """LayerNorm over classes cancels whatever a row is divided by, and with it a wrong norm, up to its eps."""
    args = inputs(2, 33, K, d, affine=False)
    args[0] = args[0] * torch.logspace(-1, 1, 33)[:, None]  # every row has a norm of its own, and every column a share
    args[2] = args[2] * torch.logspace(-1, 1, d)
    if kind == "large eps":
        args[-1] = 0.5
    else:
        args = almost_alike(args)
    want = reference.mask_head(*wide(args))
    doubled = reference.mask_head(*wide([*args[:-1], 4 * args[-1]]))  # as if every norm were twice as large
    assert (doubled - want).norm() > 0.3 * want.norm(), "the norm shows"
    check(run(args), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [19, 260])
def test_a_norm_of_another_type(K, dtype):
    args = inputs(2, 17, K, 48 if K < 256 else 16, dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    mixed = [*args[:4], args[4].to(other), args[5].to(other), args[6]]
    rounded = [*args[:4], mixed[4].to(dtype), mixed[5].to(dtype), args[6]]
    check(run(mixed), rounded)


# ---------------------------------------------------------------------------------------------------------------------
# NaN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [19, 260])
@pytest.mark.parametrize("bad", ["zero patch", "NaN patch", "zero class", "NaN class"])
def test_nan_is_where_the_reference_has_it(bad, K, dtype):
    args = inputs(2, 17, K, 48 if K < 256 else 16, dtype)
    x = args[1] if "class" in bad else args[0]
    x[1, 5] = 0 if "zero" in bad else math.nan
    y = run(args)
    check(y, args)
    rows = y.isnan().all(-1)
    assert rows.sum() == (17 if "class" in bad else 1) and y.isnan().any(-1).sum() == rows.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


# `huge_stride` is for a dimension of size 1, which a projection does not have.
WHICH = [(which, layout) for which in range(4) for layout in LAYOUTS if which < 2 or layout != "huge_stride"]


@pytest.mark.parametrize(("which", "layout"), WHICH)
def test_layouts(which, layout):
    args = inputs(2, 17, 19, 48, torch.bfloat16)
    args[which] = guarded(LAYOUTS[layout](args[which]))
    if args[which].shape[0] == 1:  # `huge_stride` keeps one image
        args[0], args[1] = args[0][:1], args[1][:1]
    y = run(args)
    check_guards(args[which])
    check(y, args)
    args[which] = args[which].contiguous()
    assert_bitwise_equal(run(args), y)


@pytest.mark.parametrize("layout", ["offset_by_one", "column_strided"])
def test_layouts_of_the_norm(layout):
    args = inputs(2, 17, 19, 48)
    y = run(args)
    args[4], args[5] = guarded(LAYOUTS[layout](args[4])), guarded(LAYOUTS[layout](args[5]))
    assert_bitwise_equal(run(args), y)


def test_slices_are_not_copied(monkeypatch):
    """Patches and projection reach the kernel as they are; it reads the slice with the batch stride of the whole."""
    args = inputs(2, 17, 19, 48)
    seen = []
    monkeypatch.setattr(launch.Plan, "run", lambda self, *tensors: seen.append(tensors))
    run(args)
    assert seen[0][0].data_ptr() == args[0].data_ptr() and seen[0][0].stride() == ((17 + 19) * 48, 48, 1)
    assert seen[0][1].data_ptr() == args[2].data_ptr()


def test_inputs_stay_as_they_are():
    args = inputs(2, 17, 19, 48)
    before = [t.clone() for t in args[:6]]
    run(args)
    for t, b in zip(args[:6], before, strict=True):
        assert_bitwise_equal(t, b)


@pytest.mark.parametrize("K", [19, 260])
@pytest.mark.parametrize(("B", "N"), [(0, 17), (2, 0)])
def test_empty(B, N, K):
    y = run(inputs(B, N, K, 48))
    assert y.shape == (B, N, K) and y.dtype == torch.float32


def test_all_programs_are_on_one_axis():
    """The others end at 65,535."""
    B = 70_000
    patches, classes, proj = torch.empty(1, 129, 16).expand(B, 129, 16), torch.empty(1, 300, 16), torch.empty(16, 16)
    plan = mask_head._plan(patches, classes, proj, 1e-5, False, "ieee", configs.MaskHeadConfig(64, 64, 64, 4, 3))
    assert plan.grid == (B * 3 * 2, 1, 1)


@pytest.mark.parametrize("offset", [0, 1])  # through descriptors, through pointers
@pytest.mark.parametrize("which", [0, 1])
def test_images_further_apart_than_32_bits_count(which, offset):
    args = inputs(3, 17, 19, 48, torch.bfloat16)
    stride = 2**30 + 64  # itself no 64-bit number, which would make its products 64-bit as well
    far = torch.empty(2 * stride + 2000, dtype=torch.bfloat16)  # pages that nobody touches cost nothing
    far = far.as_strided(args[which].shape, (stride, 48, 1), offset).copy_(args[which])
    y = run(args)
    args[which] = far
    assert_bitwise_equal(run(args), y)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def shipped():
    """Every configuration in the table, with an element size and a number of classes that it is for."""
    found = {}
    for architecture, (size, precision), k_pad, d, rows in itertools.product(
        (*configs.ARCHITECTURES, "unknown"),
        ((2, "ieee"), (4, "ieee"), (4, "tf32")),
        (16, 64, 128, 256),
        (48, 192, 384, 768, 1024),
        (1024, 65536),
    ):
        c = configs.mask_head(architecture, size, k_pad, d, rows, precision)
        found.setdefault((c, size, k_pad > 64))
    return list(found)


@pytest.mark.parametrize(("config", "size", "many"), shipped(), ids=str)
def test_every_configuration(config, size, many):
    args = inputs(1, 70, 150 if many else 19, 80, torch.float32 if size == 4 else torch.bfloat16)
    check(mask_head._masks(*args, config=config), args)


def test_descriptors_only_where_they_fit():
    x = inputs(2, 17, 19, 48, torch.bfloat16)
    for layout, fits in (("contiguous", True), ("row_padded", False), ("offset_by_one", False), ("expanded", False)):
        with launch.recorded("sm_90") as launches:
            mask_head._masks(LAYOUTS[layout](x[0]), *x[1:])
        assert (launches[0].plan.tiles[0] is not None) == fits, layout


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_float32_is_multiplied_as_torch_is_told(architecture):
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            with launch.recorded(architecture) as launches:
                run(inputs(1, 17, 19, 48))
            assert precision in launches[0].plan.scalars
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_new_precision_is_a_new_launch(monkeypatch):
    plans, original = [], mask_head._plan
    monkeypatch.setattr(mask_head, "_plan", lambda *args: plans.append(original(*args)) or plans[-1])
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            run(inputs(1, 17, 19, 48))
    finally:
        torch.set_float32_matmul_precision(before)
    assert [plan.scalars[-1] for plan in plans] == ["ieee", "tf32"]


# ---------------------------------------------------------------------------------------------------------------------
# As an operator


@pytest.mark.parametrize(("K", "affine"), [(3, True), (19, False), (260, True)])
def test_gradients_are_those_of_the_reference(K, affine):
    args = inputs(2, 9, K, 16, affine=affine)
    args[:4] = [t.clone() for t in args[:4]]
    tensors = [t.requires_grad_() for t in args if isinstance(t, torch.Tensor)]
    grad = torch.randn(2, 9, K, generator=torch.Generator().manual_seed(9))
    actual = torch.autograd.grad(run(args), tensors, grad)
    expected = torch.autograd.grad(reference.mask_head(*args), tensors, grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)  # more closely: test_mask_head_backward.py


def test_gradients_with_a_float32_norm():
    """As in training under autocast: half-precision tokens, float32 norm."""
    args = inputs(2, 9, 19, 48, torch.bfloat16)
    args[4], args[5] = args[4].float(), args[5].float()
    leaves = [t.clone().requires_grad_() for t in args[:6]]
    actual = torch.autograd.grad(run([*leaves, 1e-5]).square().sum(), leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(reference.mask_head(*doubles, 1e-5).square().sum(), doubles)
    for a, e, t in zip(actual, expected, leaves, strict=True):
        assert a.dtype == t.dtype
        torch.testing.assert_close(a.double(), e, rtol=0.05, atol=0.02 * e.abs().max().item())


def test_opcheck():
    args = inputs(2, 9, 3, 16)
    args[:6] = [t.clone().requires_grad_() for t in args[:6]]
    torch.library.opcheck(OP, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_strides_are_the_real_strides(layout):
    args = inputs(2, 9, 19, 48)
    args[0] = LAYOUTS[layout](args[0])
    args[1] = args[1][: args[0].shape[0]]
    real = OP(*args)
    mode = torch._subclasses.FakeTensorMode()
    fake = OP(*[mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args])
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_compiles_into_one_graph():
    args = inputs(2, 9, 2, 48)
    compiled = torch.compile(mask_head.mask_head, backend="aot_eager", fullgraph=True, dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        y = compiled(*args)
    assert_bitwise_equal(y, run(args))


def test_autocast_does_what_eager_does():
    args = inputs(2, 17, 19, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = run(args), reference.mask_head(*args)
    assert y.dtype == torch.float32  # eager's, too, on a GPU
    exact = reference.mask_head(*wide(args))
    assert (y - exact).norm() <= 1.2 * (eager - exact).norm()
    assert (y - exact).abs().max() > 1e-4  # it did round


def test_reference_of_the_operator_on_the_cpu():
    """What a traced program runs on a CPU without the interpreter."""
    args = inputs(2, 17, 19, 48)
    assert_bitwise_equal(mask_head._mask_head_reference(*args), reference.mask_head(*args))
    half = [t.bfloat16() if i < 4 else t for i, t in enumerate(args)]
    y = mask_head._mask_head_reference(*half)
    assert y.dtype == torch.bfloat16
    exact = reference.mask_head(*wide(half))
    assert (y - exact).norm() <= 0.01 * exact.norm()


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    args = inputs(2, 17, 19, 48)
    with FlopCounterMode(display=False) as counter:
        run(args)
    assert counter.get_total_flops() == 2 * 2 * 48 * (17 * 48 + 19 * 48 + 17 * 19)


# ---------------------------------------------------------------------------------------------------------------------
# Errors and warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 17, 64)}, r"got \(2, 17, 64\), \(2, 19, 48\), \(48, 48\), \(48, 48\)"),
        ({0: torch.zeros(3, 17, 48)}, r"patches must be \(B, N, d\)"),
        ({0: torch.zeros(17, 48)}, r"patches must be \(B, N, d\)"),
        ({1: torch.zeros(2, 1, 19, 48)}, r"classes \(B, K, d\)"),
        ({1: torch.zeros(2, 0, 48)}, "there are no classes"),
        ({2: torch.zeros(48, 64)}, r"proj_patch and proj_classes \(d, d\)"),
        ({3: torch.zeros(64, 48)}, r"\(64, 48\)"),
        ({4: torch.zeros(18)}, r"norm_weight must be \(19,\), one value a class, got \(18,\)"),
        ({5: torch.zeros(1, 19)}, r"norm_bias must be \(19,\)"),
    ],
)
def test_shapes_that_do_not_go_together(change, message):
    args = [change.get(i, t) for i, t in enumerate(inputs(2, 17, 19, 48))]
    for function in (run, lambda a: mask_head._mask_head_fake(*a), lambda a: mask_head._mask_head_reference(*a)):
        with pytest.raises(ValueError, match=message):
            function(args)


def test_width_must_be_a_multiple_of_16():
    with pytest.raises(launch.KernelError, match='multiple of 16, got 40; use impl="eager"'):
        run(inputs(2, 17, 19, 40))


@pytest.mark.parametrize(("which", "name"), [*enumerate(("patches", "classes", "proj_patch", "proj_classes"))])
def test_types(which, name):
    args = inputs(2, 17, 19, 48)
    args[which] = args[which].to(torch.bfloat16 if which else torch.float64)
    with pytest.raises(launch.KernelError, match=f'{name} must be one of .*use impl="eager"'):
        run(args)


def test_type_of_the_norm():
    args = inputs(2, 17, 19, 48)
    args[4] = args[4].double()
    with pytest.raises(launch.KernelError, match="norm_weight must be one of"):
        run(args)


def test_forward_mode_raises():
    args = inputs(2, 17, 19, 48)
    with pytest.raises(launch.KernelError, match="forward-mode"):
        torch.func.jvp(lambda x: mask_head.mask_head(x, *args[1:]), (args[0],), (args[0],))


def test_two_classes_warn_once_a_call_site():
    args = inputs(1, 5, 2, 48)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("default", UserWarning)
        for _ in range(3):
            mask_head.mask_head(*args)
    assert [w.category for w in caught] == [UserWarning]
    assert "two classes" in str(caught[0].message) and caught[0].filename == __file__


def test_other_numbers_of_classes_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for K in (1, 3, 16):
            mask_head.mask_head(*inputs(1, 5, K, 48))
