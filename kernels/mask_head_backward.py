"""The gradient of the mask head, from its arguments and the gradient of the masks alone.

    dY (B, N, K), patches (B, N, d), classes (B, K, d), two projections (d, d), weight (K,)
    ->  gradients of the patches, of the classes, of both projections, of weight and bias

With p = x Wp and c = y Wc, their unit rows a = p / |p| and b = c / |c|, cosines s = a b^T and z the normalised s,
r = 1 / sqrt(var s + eps), masks z * w + bias; means and variance are over the K classes:

    dbias = sum of dY       dw = sum of dY * z       h = dY * w         ds = r (h - mean(h) - z mean(h z))
    da = ds b               dp = (da - a (a . da)) / |p|                dx = dp Wp^T        dWp = x^T dp
    db = ds^T a             dc = (db - b (b . db)) / |c|                dy = dc Wc^T        dWc = y^T dc

The products with the projections, da and db are plain: PyTorch multiplies. Between them run

- unit rows: p and c are divided by their norms where they lie.
- ds: a program takes the cosines of BLOCK_M patches with up to 128 classes and the LayerNorm's gradient on the same
  registers. Cosines and z are never in memory; ds is, in the tensors' type: both products read it. The ranges of a, b
  and ds are eager's: ds / |p|, which would save the unit rows, is too small for float16.
- dp and dc: the gradient of the division, row by row, where da and db lie.

dw and dbias are sums over rows: a bounded number of programs stride over the tiles of patches, each stores what it
added up, and kernels/partial_sums.py adds these in a fixed order. No atomics: a second run gives the same bits.

Above 128 classes a kernel in front finds mean, r, mean(h) and mean(h z) of each row, slab by slab, and a program of ds
has one slab of classes: the cosines are computed twice, and still not stored. (256 in one tile, as forward, are three
tiles of 64 registers a thread and spill.)

Cosines, statistics and sums are float32, the variance is of centred values. A zero patch or class gives NaN where it
does in the reference.

Limits: as the mask head's. Reference: `mask_head_backward_reference`. Test: tests/kernels/test_mask_head_backward.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from segmenter.kernels import configs, configs_backward, launch, partial_sums
from segmenter.kernels.blocks import load_tile
from segmenter.kernels.masks import check, check_shapes, class_padding
from segmenter.kernels.operators import define, forbid_forward_mode

PROGRAMS = 2 * configs.MULTIPROCESSORS  # that store sums of their own, at most
SLAB = 128  # classes of one tile, at most


@triton.jit
def _rows(row_0, n_rows, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets of whole dense rows, and which of them there are."""
    rows = row_0.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, D_PAD)
    mask = (rows < n_rows)[:, None]
    if D != D_PAD:
        mask = mask & (cols < D)[None, :]
    return rows, rows[:, None] * D + cols[None, :], mask


@triton.jit
def _unit_rows_kernel(
    X, Norm,  # (M, D), divided in place; (M,) float32
    n_rows,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows, offsets, mask = _rows(tl.program_id(0), n_rows, D, D_PAD, BLOCK_M)
    x = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    tl.store(Norm + rows, norm, mask=rows < n_rows)
    tl.store(X + offsets, (x * (1.0 / norm)[:, None]).to(X.dtype.element_ty), mask=mask)


@triton.jit
def _unit_rows_bwd_kernel(
    Unit, Norm, DX,  # (M, D), (M,) float32; (M, D), of the unit rows and in place of the rows
    n_rows,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows, offsets, mask = _rows(tl.program_id(0), n_rows, D, D_PAD, BLOCK_M)
    unit = tl.load(Unit + offsets, mask=mask, other=0.0).to(tl.float32)
    d_unit = tl.load(DX + offsets, mask=mask, other=0.0).to(tl.float32)
    norm = tl.load(Norm + rows, mask=rows < n_rows, other=1.0)
    dx = (d_unit - unit * tl.sum(unit * d_unit, 1)[:, None]) * (1.0 / norm)[:, None]
    tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit
def _cosines(A, C, b, m_0, k_0, n_patches, D: tl.constexpr, N_CLASSES: tl.constexpr, K_PAD: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """BLOCK_M x K_PAD products of unit rows of image b, float32; 0 beyond the patches and the classes."""
    rows_a = tl.arange(0, BLOCK_M).to(tl.int64)
    rows_c = tl.arange(0, K_PAD).to(tl.int64)
    if not DESCRIPTORS:
        A += tl.cast(b, tl.int64) * n_patches * D
        C += tl.cast(b, tl.int64) * N_CLASSES * D
    s = tl.zeros([BLOCK_M, K_PAD], tl.float32)
    for d_0 in tl.range(0, D, BLOCK_D):
        a = load_tile(A, (b, m_0, d_0), rows_a, D, n_patches, D, BLOCK_D, DESCRIPTORS)
        c = load_tile(C, (b, k_0, d_0), rows_c, D, N_CLASSES, D, BLOCK_D, DESCRIPTORS)
        s = tl.dot(a, c.T, s, input_precision=PRECISION)
    return s


@triton.jit
def _tile(X, row_0, offs_k, N_CLASSES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pointers to BLOCK_M rows of masks; within the tile offsets are 32 bits, which take half the registers."""
    rows = X + row_0 * N_CLASSES
    return rows + (tl.arange(0, BLOCK_M)[:, None] * N_CLASSES + offs_k[None, :])


@triton.jit
def _weighted(dy, NormWeight, offs_k, real):
    h = dy
    if NormWeight is not None:
        h = dy * tl.load(NormWeight + offs_k, mask=real, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit
def _mask_head_stats_kernel(
    A, C, DY, NormWeight, Stats,  # unit rows (B, N, D) and (B, K, D), (B, N, K), (K,) or None, (4, B * N) float32
    n_patches, n_blocks, n_rows, eps,
    D: tl.constexpr, N_CLASSES: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mean of the cosines of each row, r, mean(h) and mean(h z), of more classes than one tile holds."""
    b = tl.program_id(0) // n_blocks
    m_0 = tl.program_id(0) % n_blocks * BLOCK_M
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    rows = b.to(tl.int64) * n_patches + offs_m
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)  # sum of squared distances from the mean
    sum_h = tl.zeros([BLOCK_M], tl.float32)
    sum_hs = tl.zeros([BLOCK_M], tl.float32)  # of h times the distance from the mean
    for k_0 in tl.range(0, N_CLASSES, K_PAD):
        s = _cosines(A, C, b, m_0, k_0, n_patches, D, N_CLASSES, K_PAD, BLOCK_M, BLOCK_D, DESCRIPTORS, PRECISION)
        offs_k = k_0 + tl.arange(0, K_PAD)
        real = offs_k < N_CLASSES
        count = tl.minimum(N_CLASSES - k_0, K_PAD).to(tl.float32)
        slab_mean = tl.sum(s, 1) / count
        centred = tl.where(real[None, :], s - slab_mean[:, None], 0.0)
        pointers = _tile(DY, b.to(tl.int64) * n_patches + m_0, offs_k, N_CLASSES, BLOCK_M)
        mask = (offs_m < n_patches)[:, None] & real[None, :]
        dy = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        h = _weighted(dy, NormWeight, offs_k, real)
        slab_h = tl.sum(h, 1)
        step = slab_mean - mean
        moved = step * (count / (k_0 + count))
        squares += tl.sum(centred * centred, 1) + step * moved * k_0
        sum_hs += tl.sum(h * centred, 1) + slab_h * (step - moved) - sum_h * moved
        sum_h += slab_h
        mean += moved
    rstd = tl.rsqrt(squares * (1.0 / N_CLASSES) + eps)
    here = offs_m < n_patches
    tl.store(Stats + rows, mean, mask=here)
    tl.store(Stats + n_rows + rows, rstd, mask=here)
    tl.store(Stats + 2 * n_rows + rows, sum_h * (1.0 / N_CLASSES), mask=here)
    tl.store(Stats + 3 * n_rows + rows, sum_hs * rstd * (1.0 / N_CLASSES), mask=here)


@triton.jit
def _mask_head_bwd_kernel(
    A, C, DY, NormWeight, Stats,  # as above; Stats None if one tile holds all classes
    DS, Partials,  # (B, N, K) or None; (n_parts, 2, K) float32 or None: sums of dY * z, and of dY
    n_patches, n_blocks, n_rows, n_tiles, n_parts, n_slabs, eps,
    D: tl.constexpr, N_CLASSES: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) // n_slabs
    k_0 = tl.program_id(0) % n_slabs * K_PAD
    offs_k = k_0 + tl.arange(0, K_PAD)
    real = offs_k < N_CLASSES
    sum_dyz = tl.zeros([K_PAD], tl.float32)
    sum_dy = tl.zeros([K_PAD], tl.float32)
    for tile in tl.range(part, n_tiles, n_parts):
        b = tile // n_blocks
        m_0 = tile % n_blocks * BLOCK_M
        offs_m = m_0 + tl.arange(0, BLOCK_M)
        row_0 = tl.cast(b, tl.int64) * n_patches + m_0
        rows = row_0 + tl.arange(0, BLOCK_M)
        here = offs_m < n_patches
        mask = here[:, None] & real[None, :]
        s = _cosines(A, C, b, m_0, k_0, n_patches, D, N_CLASSES, K_PAD, BLOCK_M, BLOCK_D, DESCRIPTORS, PRECISION)
        # Rows beyond the patches get r = 0: without eps it would be infinite, and z NaN, which the sums take in.
        if Stats is not None:
            mean = tl.load(Stats + rows, mask=here, other=0.0)
            rstd = tl.load(Stats + n_rows + rows, mask=here, other=0.0)
            z = tl.where(real[None, :], s - mean[:, None], 0.0) * rstd[:, None]
        else:
            mean = tl.sum(s, 1) * (1.0 / N_CLASSES)  # what is beyond the classes is 0
            z = tl.where(real[None, :], s - mean[:, None], 0.0)
            rstd = tl.where(here, tl.rsqrt(tl.sum(z * z, 1) * (1.0 / N_CLASSES) + eps), 0.0)
            z = z * rstd[:, None]
        dy = tl.load(_tile(DY, row_0, offs_k, N_CLASSES, BLOCK_M), mask=mask, other=0.0).to(tl.float32)
        if Partials is not None:
            sum_dyz += tl.sum(dy * z, 0)
            sum_dy += tl.sum(dy, 0)
        if DS is not None:
            h = _weighted(dy, NormWeight, offs_k, real)
            if Stats is not None:
                mean_h = tl.load(Stats + 2 * n_rows + rows, mask=here, other=0.0)
                mean_hz = tl.load(Stats + 3 * n_rows + rows, mask=here, other=0.0)
            else:
                mean_h = tl.sum(h, 1) * (1.0 / N_CLASSES)
                mean_hz = tl.sum(h * z, 1) * (1.0 / N_CLASSES)
            ds = (h - mean_h[:, None] - z * mean_hz[:, None]) * rstd[:, None]
            tl.store(_tile(DS, row_0, offs_k, N_CLASSES, BLOCK_M), ds.to(DS.dtype.element_ty), mask=mask)
    if Partials is not None:
        mine = Partials + part * 2 * N_CLASSES + offs_k
        tl.store(mine, sum_dyz, mask=real)
        tl.store(mine + N_CLASSES, sum_dy, mask=real)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def _row_plan(kernel: Any, x: torch.Tensor, n_tensors: int) -> launch.Plan:
    """Of a kernel that takes the rows of x, (..., d) contiguous, whole."""
    n_rows, d = x.numel() // x.shape[-1], x.shape[-1]
    c, d_pad = configs_backward.unit_rows(launch.architecture(x)), triton.next_power_of_2(d)
    block_m = max(1, c.elements // d_pad)
    scalars = (n_rows, d, d_pad, block_m)
    options = {"num_warps": c.num_warps, "num_stages": 1}
    return launch.Plan(kernel, triton.cdiv(n_rows, block_m), (None,) * n_tensors, scalars, options)


def _unit_rows(x: torch.Tensor, projection: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x projection (..., d), each row divided by its norm, and the norms, float32."""
    unit = launch.contiguous(launch.call(torch.matmul, x, projection))
    norm = launch.empty(unit.shape[:-1], torch.float32, unit.device)
    if unit.numel() > 0:
        _row_plan(_unit_rows_kernel, unit, 2).run(unit, norm)
    return unit, norm


def _rows_gradient(ds: torch.Tensor, others: torch.Tensor, unit: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """The gradient of projected rows: of `unit` and `norm`, whose cosines with `others` have the gradient ds."""
    dx = launch.contiguous(launch.call(torch.matmul, ds, others))
    if dx.numel() > 0:
        _row_plan(_unit_rows_bwd_kernel, unit, 3).run(unit, norm, dx)
    return dx


def _weight_gradient(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """x^T dy over all rows of all images: of the weight of y = x @ weight."""
    return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


def _cosine_gradient(
    dy: torch.Tensor,
    units: tuple[torch.Tensor, torch.Tensor],
    norm_weight: torch.Tensor | None,
    eps: float,
    needed: tuple[bool, bool],
    config: configs_backward.MaskHeadBackwardConfig | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradient of the cosines (B, N, K), and those of weight and bias, (2, K) float32; None if not needed."""
    a, b = units
    (B, N, d), K = a.shape, b.shape[1]
    k_pad, precision = min(SLAB, class_padding(K)), launch.dot_precision(a.dtype)
    about = (launch.architecture(a), a.element_size(), k_pad, precision)
    c = config or configs_backward.mask_head_backward(*about)
    descriptors = c.descriptors and B * N > 0 and all(launch.fits_descriptor(t) for t in units)
    n_blocks, n_slabs = triton.cdiv(N, c.block_m), triton.cdiv(K, k_pad)
    n_tiles = B * n_blocks
    n_parts = min(n_tiles, PROGRAMS)
    ds = launch.empty((B, N, K), a.dtype, a.device) if needed[0] else None
    partials = launch.empty((n_parts, 2, K), torch.float32, a.device) if needed[1] else None
    stats = launch.empty((4, B * N), torch.float32, a.device) if n_slabs > 1 else None
    tiles: list[launch.Tiles | None] = [None] * 7
    if descriptors:
        for i, (unit, rows) in enumerate(zip(units, (c.block_m, k_pad), strict=True)):
            tiles[i] = launch.Tiles(tuple(unit.shape), unit.stride(), (1, rows, c.block_d))
    constants = (d, K, k_pad, c.block_m, c.block_d, descriptors, precision)
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    if n_tiles > 0:
        if stats is not None:
            scalars = (N, n_blocks, B * N, eps, *constants)
            plan = launch.Plan(_mask_head_stats_kernel, n_tiles, tuple(tiles[:5]), scalars, options)
            plan.run(a, b, dy, norm_weight, stats)
        scalars = (N, n_blocks, B * N, n_tiles, n_parts, n_slabs, eps, *constants)
        plan = launch.Plan(_mask_head_bwd_kernel, n_parts * n_slabs, tuple(tiles), scalars, options)
        plan.run(a, b, dy, norm_weight, stats, ds, partials)
    return ds, None if partials is None else partial_sums.add(partials, (2, K), torch.float32)


def _run(
    dy: torch.Tensor,
    patches: torch.Tensor,
    classes: torch.Tensor,
    proj_patch: torch.Tensor,
    proj_classes: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    needed: list[bool],
    config: configs_backward.MaskHeadBackwardConfig | None = None,
) -> tuple[torch.Tensor, ...]:
    """`mask_head_backward` of arguments that were checked.

    Args:
        config: of ds, instead of the table's choice.
    """
    of_patches, of_classes = needed[0] or needed[2], needed[1] or needed[3]
    found: list[torch.Tensor | None] = [None] * 5
    a, patch_norm = _unit_rows(patches, proj_patch)
    b, class_norm = _unit_rows(classes, proj_classes)
    dy = launch.contiguous(dy)
    norm_weight = None if norm_weight is None else launch.rows_contiguous(norm_weight)
    ds, found[4] = _cosine_gradient(dy, (a, b), norm_weight, eps, (of_patches or of_classes, needed[4]), config)
    if of_patches:
        dp = _rows_gradient(ds, b, a, patch_norm)
        found[0] = launch.call(torch.matmul, dp, proj_patch.T) if needed[0] else None
        found[2] = launch.call(_weight_gradient, patches, dp) if needed[2] else None
    if of_classes:
        dc = _rows_gradient(ds.transpose(1, 2), a, b, class_norm)
        found[1] = launch.call(torch.matmul, dc, proj_classes.T) if needed[1] else None
        found[3] = launch.call(_weight_gradient, classes, dc) if needed[3] else None
    device = patches.device
    return tuple(launch.empty((0,), _type(patches, i), device) if t is None else t for i, t in enumerate(found))


def _type(patches: torch.Tensor, index: int) -> torch.dtype:
    """Of the result of this number."""
    return torch.float32 if index == 4 else patches.dtype


def _mask_head_backward_kernel(dy, patches, classes, proj_patch, proj_classes, norm_weight, eps, needed) -> tuple:
    B, N, K, _ = check(patches, classes, proj_patch, proj_classes, norm_weight)
    launch.check_device(dy, patches)
    launch.check_floats("dy", dy, (patches.dtype,))
    if dy.shape != (B, N, K):
        raise ValueError(f"dy must be {(B, N, K)}, got {tuple(dy.shape)}")
    return _run(dy, patches, classes, proj_patch, proj_classes, norm_weight, eps, needed)


# ---------------------------------------------------------------------------------------------------------------------
# Operator


def mask_head_backward_reference(
    dy, patches, classes, proj_patch, proj_classes, norm_weight, eps, needed
) -> tuple[torch.Tensor, ...]:
    """The same in eager PyTorch, by the formulas at the top. Arguments and results as `mask_head_backward`'s."""
    check_shapes(patches, classes, proj_patch, proj_classes, norm_weight)
    wide = torch.promote_types(patches.dtype, torch.float32)
    p, c = patches @ proj_patch, classes @ proj_classes
    p_norm, c_norm = (t.norm(dim=-1, keepdim=True) for t in (p, c))
    a, b = p / p_norm, c / c_norm
    s = (a @ b.transpose(1, 2)).to(wide)
    centred = s - s.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    z, dy = centred * r, dy.to(wide)
    h = dy if norm_weight is None else dy * norm_weight.to(wide)
    ds = (r * (h - h.mean(-1, keepdim=True) - z * (h * z).mean(-1, keepdim=True))).to(patches.dtype)
    da, db = ds @ b, ds.transpose(1, 2) @ a
    dp = (da - a * (a * da).sum(-1, keepdim=True)) / p_norm
    dc = (db - b * (b * db).sum(-1, keepdim=True)) / c_norm
    norm = torch.stack([(dy * z).sum((0, 1)), dy.sum((0, 1))])
    weights = _weight_gradient(patches, dp), _weight_gradient(classes, dc)
    found = (dp @ proj_patch.T, dc @ proj_classes.T, *weights, norm)
    nothing = [torch.empty(0, dtype=t.dtype, device=t.device) for t in found]
    return tuple(t.contiguous() if n else e for t, e, n in zip(found, nothing, needed, strict=True))


def _mask_head_backward_fake(dy, patches, classes, proj_patch, proj_classes, norm_weight, eps, needed) -> tuple:
    _, _, K, _ = check_shapes(patches, classes, proj_patch, proj_classes, norm_weight)
    shapes = (patches.shape, classes.shape, proj_patch.shape, proj_classes.shape, (2, K))
    pairs = zip(shapes, needed, strict=True)
    return tuple(patches.new_empty(shape if n else 0, dtype=_type(patches, i)) for i, (shape, n) in enumerate(pairs))


def _mask_head_backward_flops(dy: Any, patches: tuple, classes: tuple, *args: Any, **kwargs: Any) -> int:
    """Two products for each of the forward pass, as PyTorch counts; what is computed again is no work."""
    (B, N, d), K = patches, classes[1]
    return 4 * B * d * (N * d + K * d + N * K)


MASK_HEAD_BACKWARD = define(
    "mask_head_backward(Tensor dy, Tensor patches, Tensor classes, Tensor proj_patch, Tensor proj_classes, "
    "Tensor? norm_weight, float eps, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_mask_head_backward_kernel,
    reference=mask_head_backward_reference,
    fake=_mask_head_backward_fake,
    flops=_mask_head_backward_flops,
    autocast=lambda dtype, args: args,  # what is saved has the types of the forward pass already
)


def mask_head_backward(
    dy: torch.Tensor,
    patches: torch.Tensor,
    classes: torch.Tensor,
    proj_patch: torch.Tensor,
    proj_classes: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float = 1e-5,
    needed: tuple[bool, ...] | list[bool] = (True,) * 5,
) -> tuple[torch.Tensor, ...]:
    """The gradient of the mask head; `mask_head` calls it by itself in a backward pass.

    Args:
        dy: of the masks, (B, N, K), the type of patches, any strides: a copy is made unless it is contiguous.
        patches, classes, proj_patch, proj_classes, norm_weight, eps: as for `mask_head`.
        needed: of patches, classes, proj_patch, proj_classes, and of weight and bias together; what is not needed is
            empty, and not computed.
    Returns:
        Gradients of patches (B, N, d), classes (B, K, d), proj_patch and proj_classes (d, d), the type of patches, and
        (2, K) float32, that of the LayerNorm's weight and that of its bias.
    Raises:
        KernelError: another type, width or device. ValueError: shapes that do not go together.
    """
    launch.check_device(dy, patches, classes, proj_patch, proj_classes, norm_weight)
    forbid_forward_mode()
    return MASK_HEAD_BACKWARD(dy, patches, classes, proj_patch, proj_classes, norm_weight, eps, list(needed))
