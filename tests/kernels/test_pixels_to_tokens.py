"""Bytes of images to tokens: the algebra of folding, and the kernel against its definition.

What all operators share is in test_operators.py, the encoder's part in test_embed_pixels.py.
"""

import itertools

import pytest
import torch

from segmenter.inference.images import NORMALIZATION, normalize
from segmenter.kernels import configs, launch, reference
from segmenter.kernels import pixels_to_tokens as kernel
from segmenter.kernels.pixels import readable
from segmenter.layers import pad_to_multiple
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded
from tests.support.tiny import tiny_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEIT = NORMALIZATION["deit"]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def image(*shape, seed=0):
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(seed)).byte().to(DEVICE)


def inputs(B, H, W, P, E=1, d=48, dtype=torch.float32, stream=None, bias=True, seed=0):
    """Arguments of the definition."""
    stream, n = stream or dtype, -(-H // P) * -(-W // P)
    weight = (randn(d, 3, P, P, seed=seed) / (3 * P * P) ** 0.5).to(dtype)
    bias = randn(d, seed=seed + 1, dtype=dtype) if bias else None
    extra, positions = randn(E, d, seed=seed + 2, dtype=stream), randn(E + n, d, seed=seed + 3, dtype=stream)
    return [image(B, H, W, seed=seed), weight, bias, extra, positions, *DEIT]


def wide(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def check(actual, args, **options):
    assert actual.is_contiguous()
    assert_parity(actual, reference.pixels_to_tokens(*wide(args)), reference.pixels_to_tokens(*args), **options)


def folded(args, dtype=None):
    """Arguments of the operator."""
    pixels, weight, bias, extra, positions, mean, std = args
    size = pixels.shape[1:3]
    fold = reference.fold_normalization(weight, bias, mean, std, dtype or weight.dtype, size)
    return [pixels, *fold, extra, positions, weight.shape[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# The definition and the folding


@pytest.mark.parametrize("stats", NORMALIZATION)
@pytest.mark.parametrize(("H", "W"), [(16, 32), (17, 30)])
def test_definition_is_the_published_path(H, W, stats):
    """The bits of `images.normalize`, padding, the encoder's layers and sums."""
    encoder = tiny_model(distilled=True, image_size=(32, 32)).encoder
    pixels = image(2, H, W).cpu()
    im = torch.stack([normalize(p.numpy(), stats) for p in pixels])
    want = encoder.embed(pad_to_multiple(im, 16))
    assert_bitwise_equal(encoder.embed_pixels(pixels, *NORMALIZATION[stats]), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stats", NORMALIZATION)
@pytest.mark.parametrize(("H", "W", "P"), [(16, 32, 16), (17, 31, 8), (16, 30, 16), (1, 1, 14), (9, 5, 4)])
def test_folding_is_exact(H, W, P, stats, bias):
    """In float64: also the constants of patches on the right, at the bottom and in the corner."""
    args = wide([*inputs(2, H, W, P, E=2, d=16, bias=bias)[:5], *NORMALIZATION[stats]])
    got = kernel._pixels_to_tokens_reference(*folded(args))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, reference.pixels_to_tokens(*args), rtol=1e-13, atol=1e-13)


@by_dtype
def test_bias_belongs_to_the_rounded_weights(dtype):
    """The constant part cancels exactly, and each weight is rounded once."""
    args = inputs(1, 16, 16, 16, dtype=dtype, bias=False)
    _, weight, table, *_ = folded(args)
    mean, std = (torch.tensor(values, dtype=torch.float64, device=DEVICE) for values in DEIT)
    w = weight.double().view(-1, 16, 16, 3)
    exact = -(w * (255 * mean - 128) / 128).sum((1, 2, 3))
    torch.testing.assert_close(table[0].double(), exact, rtol=1e-6, atol=1e-6)
    unfolded = w * 255 * std / 128
    error = (unfolded - args[1].double().permute(0, 2, 3, 1)).abs()
    limits = torch.finfo(dtype)
    assert (error <= 0.51 * limits.eps * unfolded.abs().clamp(min=2 * limits.smallest_normal)).all()


def test_weights_for_tf32_have_ten_bits():
    args = inputs(1, 17, 16, 16)
    weight, table = reference.fold_normalization(*args[1:3], *DEIT, torch.float32, (17, 16), tf32=True)
    assert (weight.view(torch.int32) & 0x1FFF == 0).all()
    full, _ = reference.fold_normalization(*args[1:3], *DEIT, torch.float32, (17, 16))
    assert ((weight - full).abs() <= full.abs() * 2.0**-11).all()
    exact = kernel._pixels_to_tokens_reference(args[0], weight.double(), table.double(), *wide(args[3:5]), 16)
    eager = reference.pixels_to_tokens(*wide(args))
    assert (exact - eager).norm() <= 3e-4 * eager.norm()


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

SIZES = [  # B, H, W, P, E, d
    (2, 32, 48, 16, 1, 48), (3, 29, 35, 16, 2, 64), (2, 17, 23, 8, 1, 80), (1, 64, 33, 32, 2, 32),
    (2, 29, 42, 14, 1, 48), (5, 3, 5, 1, 2, 16), (1, 1, 1, 16, 1, 192), (2, 13, 7, 5, 1, 31), (70, 8, 8, 8, 1, 16),
]  # fmt: skip


@by_dtype
@pytest.mark.parametrize(("B", "H", "W", "P", "E", "d"), SIZES)
def test_parity(B, H, W, P, E, d, dtype, guarded_outputs):
    args = inputs(B, H, W, P, E, d, dtype, seed=H)
    copies = [guarded(t) if isinstance(t, torch.Tensor) else t for t in args]
    y = kernel.normalized_pixels_to_tokens(*copies)
    for t, before in zip(copies[:5], args[:5], strict=True):
        check_guards(t)
        assert_bitwise_equal(t, before)
    check(y, args, context=f"inputs({B}, {H}, {W}, {P}, {E}, {d}, {dtype}, seed={H})")


@by_dtype
def test_every_byte_is_exact(dtype):
    """Identity as weights: a GPU that took bfloat16 numbers below 2**-126 for zero would lose half of the bytes."""
    pixels = (torch.arange(768) % 256).byte().reshape(1, 16, 16, 3).to(DEVICE)
    weight, zeros = torch.eye(768, dtype=dtype, device=DEVICE), torch.zeros(4, 768, device=DEVICE)
    tokens = kernel.pixels_to_tokens(pixels, weight, zeros, zeros[:1].to(dtype), zeros[:2].to(dtype), 16)
    assert_bitwise_equal(tokens[0, 1], ((pixels.flatten().float() - 128) / 128).to(dtype))


@by_dtype
def test_better_than_eager(dtype):
    """Pixels are exact. Half types: rounded pixels make about 0.8 of the error 1; float32: 0.25, uncentred 0.5."""
    args = inputs(2, 64, 64, 16, dtype=dtype, stream=torch.float32)
    check(kernel.normalized_pixels_to_tokens(*args), args, frobenius=0.4 if dtype == torch.float32 else 0.9)


@pytest.mark.parametrize("kind", ["black", "white", "checkerboard", "white with a black border"])
@by_dtype
def test_extreme_images(dtype, kind):
    args = inputs(1, 34, 40, 16, dtype=dtype)
    pixels = args[0].fill_(0 if kind == "black" else 255)
    if kind == "checkerboard":
        pixels[:, ::2, ::2] = pixels[:, 1::2, 1::2] = 0
    elif "border" in kind:
        pixels[:, -1] = pixels[:, :, -1] = 0
    check(kernel.normalized_pixels_to_tokens(*args), args, max_ratio=2.5, frobenius=1.5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "stream"), list(itertools.product(DTYPES, DTYPES)))
def test_types_of_the_stream(dtype, stream, bias):
    """As under autocast: half weights, float32 tokens and positions."""
    args = inputs(2, 16, 20, 8, dtype=dtype, stream=stream, bias=bias)
    y = kernel.normalized_pixels_to_tokens(*args)
    assert y.dtype == torch.promote_types(dtype, stream)
    check(y, args, frobenius=1.1)
    args[3] = args[3].float()
    assert kernel.normalized_pixels_to_tokens(*args).dtype == torch.float32


def crop(pixels, height, width, top, left):
    """The same bytes as a view of a larger image of 77."""
    B, H, W, _ = pixels.shape
    large = torch.full((B, height, width, 3), 77, dtype=torch.uint8, device=pixels.device)
    view = large[:, top : top + H, left : left + W]
    view.copy_(pixels)
    return view


@pytest.mark.parametrize(
    ("height", "width", "top", "left", "in_place"),
    [(40, 64, 3, 16, True), (33, 48, 1, 0, True), (40, 64, 3, 5, False), (40, 61, 0, 0, False)],
)
def test_crops(height, width, top, left, in_place):
    args = inputs(2, 32, 48, 16)
    dense = kernel.normalized_pixels_to_tokens(*args)
    args[0] = view = crop(args[0], height, width, top, left)
    assert (readable(view, 16) is view) == in_place
    assert_bitwise_equal(kernel.normalized_pixels_to_tokens(*args), dense)


def test_other_strides_are_copied():
    args = inputs(2, 32, 48, 16)
    dense = kernel.normalized_pixels_to_tokens(*args)
    for dims in ((0, 3, 1, 2), (0, 2, 1, 3)):  # channels first; columns first
        args[0] = args[0].permute(dims).contiguous().permute([dims.index(i) for i in range(4)])
        assert_bitwise_equal(kernel.normalized_pixels_to_tokens(*args), dense)
    args[0] = args[0][:1].contiguous().expand(2, -1, -1, -1)
    assert readable(args[0], 16) is args[0]
    y = kernel.normalized_pixels_to_tokens(*args)
    assert_bitwise_equal(kernel.normalized_pixels_to_tokens(args[0].contiguous(), *args[1:]), y)
    odd = args[0][:1].as_strided((1, 32, 48, 3), (7, 144, 3, 1))  # of one image, which PyTorch allows
    assert readable(odd, 16) is odd


@pytest.mark.parametrize(("shape", "far"), [((3, 16, 16), 2**30 + 2**28), ((1, 24, 16), 2**27)])
def test_pixels_further_apart_than_32_bits_count(shape, far):
    B, H, W = shape
    args = inputs(B, H, W, 8)
    want = kernel.normalized_pixels_to_tokens(*args)
    strides = (far, 48, 3, 1) if B > 1 else (far * H, far, 3, 1)
    memory = torch.empty((B - 1) * far + 1000 if B > 1 else H * far, dtype=torch.uint8)  # untouched pages cost nothing
    args[0] = memory.as_strided(args[0].shape, strides).copy_(args[0])
    assert readable(args[0], 8) is args[0]
    assert_bitwise_equal(kernel.normalized_pixels_to_tokens(*args), want)


def test_no_images_and_no_pixels():
    args = inputs(1, 16, 16, 16)
    args[0] = args[0][:0]
    for function in (kernel.normalized_pixels_to_tokens, reference.pixels_to_tokens):
        assert function(*args).shape == (0, 2, 48)
        with pytest.raises(ValueError, match=r"pixels must be \(B, H, W, 3\), H and W at least 1, got \(2, 0, 5, 3\)"):
            function(torch.zeros(2, 0, 5, 3, dtype=torch.uint8), *args[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def shipped():
    """Every configuration in the table, with an element size and a patch size that it is for."""
    found = {}
    for architecture, (size, precision), d, rows, padded, patch in itertools.product(
        (*configs.ARCHITECTURES, "unknown"),
        ((2, "ieee"), (4, "ieee"), (4, "tf32")),
        (192, 384, 768, 1024),
        (196, 65536),
        (False, True),
        (16, 14),
    ):
        found[configs.pixels_to_tokens(architecture, size, rows, d, patch, padded, precision), size] = patch
    return [(*key, patch) for key, patch in found.items()]


@pytest.mark.parametrize(("config", "size", "patch"), shipped(), ids=str)
def test_every_configuration(config, size, patch):
    args = inputs(3, 3 * patch - 2, 3 * patch, patch, 2, 80, torch.float32 if size == 4 else torch.bfloat16)
    check(kernel._run(*folded(args), config=config), args)


def test_descriptors_only_where_they_fit():
    for patch, fits in ((16, True), (14, False)):  # 588 bfloat16 numbers are no multiple of 16 bytes
        with launch.recorded("sm_90") as launches:
            kernel._run(*folded(inputs(1, 32, 32, patch, dtype=torch.bfloat16)))
        assert (launches[0].plan.tiles[1] is not None) == fits


@pytest.mark.parametrize(("architecture", "exact"), [("sm_80", "ieee"), ("sm_90", "ieee"), ("sm_100", "tf32x3")])
def test_float32_is_multiplied_as_torch_is_told(architecture, exact):
    before, args = torch.get_float32_matmul_precision(), folded(inputs(1, 16, 16, 16))
    try:
        for setting, precision in (("highest", exact), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            with launch.recorded(architecture) as launches:
                kernel._run(*args)
            assert launches[0].plan.scalars[-1] == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_all_programs_are_on_one_axis():
    pixels, weight = torch.empty(1, 16, 16, 3, dtype=torch.uint8).expand(70_000, -1, -1, -1), torch.empty(32, 192)
    config = configs.LinearConfig(64, 16, 64, 8, 4, 3)
    plan = kernel._plan(pixels, weight, torch.empty(1, 32), 8, False, "ieee", config)
    assert plan.grid == (-(-70_000 * 4 // 64) * 2, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# As an operator


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 16, 16, 4, dtype=torch.uint8)}, r"pixels must be \(B, H, W, 3\)"),
        ({1: torch.zeros(48, 3, 16, 16)}, r"weight must be \(d, 768\) and bias_table \(4, d\)"),
        ({1: torch.zeros(48, 192)}, r"weight must be \(d, 768\)"),
        ({2: torch.zeros(48)}, r"bias_table \(4, d\)"),
        ({3: torch.zeros(0, 48)}, r"extra_tokens must be \(E, 48\), E at least 1, got \(0, 48\)"),
        ({3: torch.zeros(1, 1, 48)}, "extra_tokens must be"),
        ({4: torch.zeros(3, 48)}, r"pos_embed must be \(2, 48\), one row a token, got \(3, 48\)"),
        ({5: 0}, "pixels must be"),
    ],
)
def test_shapes_that_do_not_go_together(change, message):
    args = [change.get(i, x) for i, x in enumerate(folded(inputs(2, 16, 16, 16)))]
    args = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]
    for function in (kernel.pixels_to_tokens, kernel._pixels_to_tokens_fake, kernel._pixels_to_tokens_reference):
        with pytest.raises(ValueError, match=message):
            function(*args)


@pytest.mark.parametrize(
    ("i", "dtype", "name"),
    [(0, torch.float32, "pixels"), (1, torch.float64, "weight"), (2, torch.bfloat16, "bias_table"),
     (3, torch.float64, "extra_tokens"), (4, torch.int64, "pos_embed")],
)  # fmt: skip
def test_types(i, dtype, name):
    args = folded(inputs(1, 16, 16, 16))
    args[i] = args[i].to(dtype)
    with pytest.raises(launch.KernelError, match=f"{name} must be one of"):
        kernel.pixels_to_tokens(*args)


def test_gradients_of_the_raw_weights():
    """Through folding and operator: those of the published path."""
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        args = inputs(2, 20, 32, 16, E=2, dtype=dtype)
        grad = randn(2, 6, 48, seed=9, dtype=dtype)
        leaves = [t.clone().requires_grad_() for t in args[1:5]]
        ours = torch.autograd.grad(kernel.normalized_pixels_to_tokens(args[0], *leaves, *DEIT), leaves, grad)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        want = torch.autograd.grad(reference.pixels_to_tokens(args[0], *exact, *DEIT), exact, grad.double())
        for a, e in zip(ours, want, strict=True):
            assert a.dtype == dtype and (a.double() - e).norm() <= limit * e.norm()


def test_folded_for_autocast():
    """The weights are rounded once, to the autocast type, with the bias that goes with these."""
    args = inputs(2, 20, 32, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, eager = kernel.normalized_pixels_to_tokens(*args), reference.pixels_to_tokens(*args)
    assert y.dtype == eager.dtype == torch.float32
    assert_parity(y, reference.pixels_to_tokens(*wide(args)), eager, frobenius=0.9)
    assert (y - kernel.normalized_pixels_to_tokens(*args)).abs().max() > 1e-4  # it did round
