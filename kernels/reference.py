"""Eager PyTorch definition of every operation: the only definition of right.

The functions have the signatures of the public kernels (`attention`, `layernorm_mlp`, `mask_head`). They serve as
`impl="eager"`, as what tests compare a kernel with (run in float32 or float64), and as the baseline of benchmarks.
They run on any device and dtype that PyTorch has, and they are differentiable.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def packed_shape(qkv: torch.Tensor, n_heads: int) -> tuple[int, int, int]:
    """(B, N, 3*h*d) of packed qkv. Raises ValueError if it has another number of dimensions or columns."""
    if qkv.ndim != 3:
        raise ValueError(f"qkv must be (B, N, 3*h*d), got {tuple(qkv.shape)}")
    B, N, C = qkv.shape
    if n_heads < 1 or C % (3 * n_heads):
        raise ValueError(f"qkv has {C} columns, which is no multiple of 3 * n_heads = {3 * n_heads}")
    return B, N, C


def cross_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, int, int, int]:
    """(B, N, h, d) of q. Raises ValueError unless k and v are (B, M, h, d) with M >= 1."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[:1] + k.shape[2:] != q.shape[:1] + q.shape[2:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q must be (B, N, h, d) and k and v (B, M, h, d), got {shapes}")
    if k.shape[1] == 0:
        raise ValueError("there are no keys to attend to")
    return tuple(q.shape)


def split_heads(qkv: torch.Tensor, n_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the packed projection: (B, N, 3*h*d) -> three of (B, h, N, d). No copy."""
    B, N, C = packed_shape(qkv, n_heads)
    return qkv.view(B, N, 3, n_heads, C // (3 * n_heads)).permute(2, 0, 3, 1, 4).unbind(0)


def attention_probabilities(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) of packed qkv (B, N, 3*h*d), as (B, h, N, N): rows are queries and sum to one."""
    q, k, _ = split_heads(qkv, n_heads)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def explicit_attention(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    """`attention` written out, with the (B, h, N, N) score matrix in memory: what the published code does.

    Unlike `scaled_dot_product_attention` it passes NaN on everywhere, so it is the reference for tests.
    """
    _, _, v = split_heads(qkv, n_heads)
    out = attention_probabilities(qkv, n_heads) @ v  # (B, h, N, d)
    return out.transpose(1, 2).flatten(2)


def attention(qkv: torch.Tensor, n_heads: int, dropout_p: float = 0.0) -> torch.Tensor:
    """Non-causal multi-head attention, softmax(q k^T / sqrt(d)) v.

    Args:
        qkv: (B, N, 3*h*d), the output of the fused projection: q, k and v blocks, each split by head.
        n_heads: h.
        dropout_p: dropout of the attention probabilities (training only).
    Returns:
        (B, N, h*d), the dtype of qkv.
    Raises:
        ValueError: the columns of qkv are no multiple of 3 * n_heads.
    """
    q, k, v = split_heads(qkv, n_heads)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)  # (B, h, N, d)
    return out.transpose(1, 2).flatten(2)


def attention_lse(qkv: torch.Tensor, n_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, and the natural log-sum-exp of each row of scaled scores, (B, h, N) in float32 or wider."""
    q, k, _ = split_heads(qkv, n_heads)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return explicit_attention(qkv, n_heads), wide.logsumexp(dim=-1)


def cross_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * q k^T) v of q (B, N, h, d) and k, v (B, M, h, d), as (B, N, h*d)."""
    cross_shape(q, k, v)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2).flatten(2)


def explicit_cross_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`cross_attention` written out, as `explicit_attention` is `attention`."""
    cross_shape(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-2, -1) * scale).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def cross_attention_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cross_attention`, and the natural log-sum-exp of each row of scaled scores, as `attention_lse`."""
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return explicit_cross_attention(q, k, v, scale), wide.logsumexp(dim=-1)


def attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    n_heads: int,
) -> torch.Tensor:
    """The gradient of qkv (B, N, 3*h*d), from what `attention_lse` was given and returned.

    Args:
        grad: of o, (B, N, h*d). o: (B, N, h*d). lse: (B, h, N or more), float32 or wider; beyond N it is not looked at.
        grad_lse: of lse, or None for zeros.
    """
    B, N, C = packed_shape(qkv, n_heads)
    q, k, v = qkv.view(B, N, 3, n_heads, C // (3 * n_heads)).unbind(2)
    grads = _attention_backward(grad, q, k, v, o, lse, grad_lse, q.shape[-1] ** -0.5)
    return torch.stack(grads, 2).view(qkv.shape)


def cross_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    scale: float,
    need_q: bool = True,
    need_kv: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The gradients of q (B, N, h, d), k and v (B, M, h, d); what is not needed is empty. Otherwise as above.

    With S = scale q k^T and P = exp(S - lse): dV = P^T dO; dS = P (dO V^T - delta), where delta is the sum over a row
    of dO * O less the gradient of lse; dQ = scale dS K; dK = scale dS^T Q.
    """
    cross_shape(q, k, v)
    dq, dk, dv = _attention_backward(grad, q, k, v, o, lse, grad_lse, scale)
    nothing = torch.empty(0, dtype=q.dtype, device=q.device)
    return dq if need_q else nothing, *(t if need_kv else nothing.clone() for t in (dk, dv))


def _attention_backward(grad, q, k, v, o, lse, grad_lse, scale) -> tuple[torch.Tensor, ...]:
    N = q.shape[1]
    by_head = [t.unflatten(2, q.shape[2:]).transpose(1, 2) for t in (grad, o)]
    (do, o), (q, k, v) = by_head, (t.transpose(1, 2) for t in (q, k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    p = torch.exp((q @ k.transpose(-2, -1) * scale).to(wide) - lse[..., :N, None])
    delta = (do.to(wide) * o.to(wide)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse[..., :N]
    dv = p.to(q.dtype).transpose(-2, -1) @ do
    ds = (p * ((do @ v.transpose(-2, -1)).to(wide) - delta[..., None]) * scale).to(q.dtype)
    return tuple(t.transpose(1, 2).contiguous() for t in (ds @ k, ds.transpose(-2, -1) @ q, dv))


def layernorm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """LayerNorm over the last dimension: (..., d) -> (..., d), the dtype of x. weight, bias: (d,)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + layer_scale * act(x weight^T + bias), act the exact (erf) GELU or nothing.

    Args:
        x: (..., d_in). weight: (d_out, d_in). bias, layer_scale: (d_out,). residual: (..., d_out).
    Returns:
        (..., d_out), the widest dtype of residual and layer_scale if there is any, else that of x.
    """
    y = F.linear(x, weight, bias)
    y = F.gelu(y) if gelu else y
    y = y * layer_scale if layer_scale is not None else y
    return y if residual is None else residual + y


def layernorm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    gelu: bool = False,
) -> torch.Tensor:
    """act(layer_norm(x) weight^T + bias), the first half of an attention block (qkv) or of an MLP (fc1, with GELU).

    Args:
        x: (..., d). norm_weight, norm_bias: (d,). weight: (d_out, d). bias: (d_out,).
    Returns:
        (..., d_out), the dtype of weight.
    """
    return linear(layernorm(x, norm_weight, norm_bias, eps).to(weight.dtype), weight, bias, gelu=gelu)


def layernorm_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    eps: float = 1e-5,
    layer_scale: torch.Tensor | None = None,
    tanh: bool = False,
) -> torch.Tensor:
    """x + layer_scale * fc2(gelu(fc1(layer_norm(x)))), with the exact (erf) GELU or that by tanh: (..., d), as x.

    Args:
        x: (..., d). norm_weight, norm_bias: (d,). fc1_weight: (d_ff, d), fc1_bias: (d_ff,). fc2_weight: (d, d_ff),
        fc2_bias: (d,). eps: added to the variance. layer_scale: (d,) or None for ones.
    """
    h = layernorm_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps)
    h = F.gelu(h, approximate="tanh" if tanh else "none")
    return linear(h, fc2_weight, fc2_bias, residual=x, layer_scale=layer_scale)


CENTRE = 128  # the byte that the kernel multiplies as 0


def patch_grid(pixels: torch.Tensor, patch_size: int) -> tuple[int, int, int]:
    """(B, rows, columns) of patches of pixels (B, H, W, 3). Raises ValueError unless there is a pixel."""
    if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape[1:3] or patch_size < 1:
        raise ValueError(f"pixels must be (B, H, W, 3), H and W at least 1, got {tuple(pixels.shape)}")
    B, H, W, _ = pixels.shape
    return B, (H + patch_size - 1) // patch_size, (W + patch_size - 1) // patch_size


def check_positions(extra_tokens: torch.Tensor, pos_embed: torch.Tensor, n_patches: int, d: int) -> None:
    """Raises ValueError unless extra_tokens are (E, d), E >= 1, and pos_embed (E + n_patches, d)."""
    if extra_tokens.ndim != 2 or extra_tokens.shape[0] == 0 or extra_tokens.shape[1] != d:
        raise ValueError(f"extra_tokens must be (E, {d}), E at least 1, got {tuple(extra_tokens.shape)}")
    if pos_embed.shape != (extra_tokens.shape[0] + n_patches, d):
        wanted = (extra_tokens.shape[0] + n_patches, d)
        raise ValueError(f"pos_embed must be {wanted}, one row a token, got {tuple(pos_embed.shape)}")


def _of_channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """(3,). By full, not tensor: a copy from the host could not be captured in a CUDA graph."""
    return torch.stack([torch.full((), value, dtype=like.dtype, device=like.device) for value in values])


def normalized(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, patch_size: int = 1
) -> torch.Tensor:
    """(pixels / 255 - mean) / std as the network reads it: (B, H, W, 3) -> (B, 3, H, W) of `dtype`, contiguous.

    Computed in float32 (float64 if that is `dtype`), then rounded, then padded with zeros on the right and at the
    bottom to multiples of `patch_size`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = pixels.permute(0, 3, 1, 2).to(wide, memory_format=torch.contiguous_format)
    mean, std = (_of_channels(values, x).view(3, 1, 1) for values in (mean, std))
    x = x.div(255).sub_(mean).div_(std).to(dtype)
    return F.pad(x, (0, -x.shape[3] % patch_size, 0, -x.shape[2] % patch_size))


def pixels_to_tokens(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    extra_tokens: torch.Tensor,
    pos_embed: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Bytes of images to the encoder's tokens: normalisation, padding, patch embedding, extra tokens, positions.

    Args:
        pixels: (B, H, W, 3), 0 to 255, H and W from 1 on; padded with zeros once normalised, to multiples of P.
        weight: (d, 3, P, P). bias: (d,) or None. extra_tokens: (E, d), E >= 1: CLS, or CLS and DIST.
        pos_embed: (E + N, d), N = ceil(H/P) * ceil(W/P), resampled to the grid already.
        mean, std: of the three channels, in units of pixel / 255.
    Returns:
        (B, E + N, d), the widest type of the three.
    """
    B, grid_h, grid_w = patch_grid(pixels, weight.shape[-1])
    check_positions(extra_tokens, pos_embed, grid_h * grid_w, weight.shape[0])
    x = normalized(pixels, mean, std, weight.dtype, weight.shape[-1])
    x = F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([extra_tokens.expand(B, -1, -1), x], dim=1) + pos_embed


def fold_normalization(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    size: tuple[int, int],
    tf32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and biases of a patch embedding that takes bytes less 128, divided by 128, for normalised pixels.

    With q = (pixel - 128) / 128 the normalised pixel is (128 q + 128 - 255 mean) / (255 std), so

        W' = W * 128 / (255 std), rounded to `dtype`        b' = b - sum of W' * (255 mean - 128) / 128

    and W x + b = W' q + b'. 128 q is an integer of at most 8 bits: bfloat16 holds those up to 256 exactly, float16 up
    to 2,048. b' is made of the rounded W', in float64, so the error left is that of rounding W once: x itself is never
    rounded. The factor of 128 keeps W' as large as W, far from what float16 cannot resolve.

    Padding is 0 after normalisation, which is no byte. It is q = 0 for the product, and the sum in b' leaves it out:
    hence one row of biases for each kind of patch.

    Args:
        weight: (d, 3, P, P). bias: (d,) or None. mean, std: of the channels, in units of pixel / 255.
        dtype: what is multiplied. size: (H, W) of the images; only H mod P and W mod P count.
        tf32: round float32 weights to the ten bits of fraction that TF32 multiplies, so that b' fits these.
    Returns:
        (d, 3 P^2) of `dtype` in the order (row, column, channel), and (4, d) float32 (float64 with float64): for
        patches inside, in the last column, in the last row, in the corner of both.
    """
    height, width = (n % weight.shape[-1] or weight.shape[-1] for n in size)  # of padded patches, what is real
    with torch.autocast(weight.device.type, enabled=False):
        exact = weight.double().permute(0, 2, 3, 1)  # (d, P, P, 3)
        mean, std = _of_channels(mean, exact), _of_channels(std, exact)
        folded = (exact * (CENTRE / (255 * std))).to(dtype).contiguous()
        if tf32:
            bits = (folded.detach().view(torch.int32) + 0x1000) & ~0x1FFF
            folded = folded + (bits.view(torch.float32) - folded.detach())  # the sum is exact
        constant = (folded.double() * ((255 * mean - CENTRE) / CENTRE)).sum(3)  # (d, P, P)
        parts = (constant, constant[:, :, :width], constant[:, :height], constant[:, :height, :width])
        table = -torch.stack([part.sum((1, 2)) for part in parts])
        table = table if bias is None else table + bias
    return folded.flatten(1), table.to(torch.promote_types(dtype, torch.float32))


def class_cosines(
    patches: torch.Tensor, classes: torch.Tensor, proj_patch: torch.Tensor, proj_classes: torch.Tensor
) -> torch.Tensor:
    """Cosine of every projected patch with every projected class, (B, N, K): `mask_head` before its LayerNorm."""
    patches = patches @ proj_patch
    classes = classes @ proj_classes
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    return patches @ classes.transpose(1, 2)


def mask_head(
    patches: torch.Tensor,
    classes: torch.Tensor,
    proj_patch: torch.Tensor,
    proj_classes: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Class masks of the mask transformer: LayerNorm over classes of the cosine between patches and classes.

    There is no epsilon in the two L2 norms, as in the published code: a zero vector gives NaN.

    Args:
        patches: (B, N, d) decoded patch tokens. classes: (B, K, d) decoded class tokens.
        proj_patch, proj_classes: (d, d), applied as x @ proj.
        norm_weight, norm_bias: (K,) affine of the LayerNorm over the class axis.
        eps: added to the variance over classes.
    Returns:
        (B, N, K), class last.
    """
    cosine = class_cosines(patches, classes, proj_patch, proj_classes)  # (B, N, K)
    return F.layer_norm(cosine, (cosine.shape[-1],), norm_weight, norm_bias, eps)


def label_dtype(n_cls: int) -> torch.dtype:
    """The smallest type that holds the labels: uint8, int16 above 256 classes, int32 above 32,768."""
    return torch.uint8 if n_cls <= 256 else torch.int16 if n_cls <= 32_768 else torch.int32


def windows_scores(
    masks: torch.Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    size: tuple[int, int],
    window: tuple[int, int],
    shape: tuple[int, int],
) -> torch.Tensor:
    """Masks of windows, upsampled, cropped and averaged where windows overlap: (B, K, *shape), float32 or wider. Args:
    as for `windows_argmax`."""
    masks = masks if masks.dtype == torch.float64 else masks.float()
    B, n, _, _, K = masks.shape
    # contiguous: on a CPU, F.interpolate of class-last memory rounds the last classes unlike the others
    logits = F.interpolate(masks.flatten(0, 1).permute(0, 3, 1, 2).contiguous(), size, mode="bilinear")
    logits = logits.unflatten(0, (B, n))[..., : window[0], : window[1]]
    total, count = logits.new_zeros(B, K, *shape), logits.new_zeros(shape)
    for i, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        here = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        total[here] += logits[:, i]
        count[here] += 1
    return total / count


def windows_argmax(
    masks: torch.Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    size: tuple[int, int],
    window: tuple[int, int],
    shape: tuple[int, int],
) -> torch.Tensor:
    """Labels of images from the masks of overlapping windows, by way of full-resolution logits.

    Args:
        masks: (B, len(tops) * len(lefts), gh, gw, K), class last, windows row by row.
        tops, lefts: first row of each row of windows, first column of each column of windows, in pixels.
        size: (h, w) that a window's masks are upsampled to (bilinear, align_corners=False).
        window: (h, w) of a window; what `size` has more is padding. shape: (H, W) of the images.
    Returns:
        labels (B, H, W) of `label_dtype(K)`, the lowest index among equals.
    """
    logits = windows_scores(masks, tops, lefts, size, window, shape)
    return logits.argmax(1).to(label_dtype(logits.shape[1]))


def upsample_argmax(masks: torch.Tensor, size: tuple[int, int], crop: tuple[int, int] | None = None) -> torch.Tensor:
    """Labels of upsampled masks: F.interpolate(masks, size, mode="bilinear")[..., :H0, :W0].argmax.

    Args:
        masks: (B, h, w, K), class last. size: (H, W) to upsample to. crop: (H0, W0) to cut the result to, or None.
    Returns:
        labels (B, H0, W0); as `windows_argmax`.
    """
    crop = tuple(crop or size)
    return windows_argmax(masks.unsqueeze(1), (0,), (0,), tuple(size), crop, crop)


def upsampling_matrix(n: int, factor: int, like: torch.Tensor) -> torch.Tensor:
    """(n * factor, n), what F.interpolate (bilinear, align_corners=False) does along one side."""
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None], n * factor, mode="linear")[0].T.contiguous()


def check_loss(masks: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, patch_size: int) -> None:
    """Raises ValueError unless masks (B, h, w, K), labels (B, H, W) and weight (K,) belong together, TypeError unless
    labels are integers."""
    if masks.ndim != 4 or labels.ndim != 3 or masks.shape[0] != labels.shape[0]:
        shapes = f"{tuple(masks.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected masks (B, h, w, n_cls) and labels (B, H, W), got {shapes}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    (H, W), (h, w, K) = labels.shape[1:], masks.shape[1:]
    grid = -(-H // patch_size), -(-W // patch_size)
    if grid != (h, w):
        raise ValueError(
            f"labels of {H} x {W} pixels have {grid[0]} x {grid[1]} patches of {patch_size}, the masks {h} x {w}"
        )
    if weight is not None and weight.shape != (K,):
        raise ValueError(f"class weights must be ({K},), one for each class, got {tuple(weight.shape)}")


def upsample_cross_entropy(
    masks: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    patch_size: int,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    with_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F.cross_entropy(F.interpolate(masks), labels), summed, and its gradient, by way of full-resolution logits.

    Args:
        masks: (B, h, w, K), class last; upsampled bilinearly by patch_size and cut to the labels' size.
        labels: (B, H, W) integers, a class or ignore_index. weight: (K,), what a pixel of each class counts.
    Returns:
        sums: (2,) float32 or wider, the loss and the weights of the pixels that count. counts: (2,) int64, their
            number, and how many have their largest score at their label (the lowest index among equals).
        gradient: (B, h, w, K) of the loss by the masks, float32 or wider; no elements unless with_gradient.
    """
    check_loss(masks, labels, weight, patch_size)
    x = masks.permute(0, 3, 1, 2).to(torch.promote_types(masks.dtype, torch.float32)).contiguous()
    B, K, h, w = x.shape
    size, (H, W) = (h * patch_size, w * patch_size), labels.shape[1:]
    logits = F.interpolate(x, size, mode="bilinear")[..., :H, :W]
    weight = x.new_ones(K) if weight is None else weight.to(x.dtype)
    labels, counted = labels.long(), labels != ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "sum"}
    loss = F.cross_entropy(logits, labels, weight, **options)
    here = torch.where(counted, labels, 0)
    of_pixels = weight[here] * counted
    correct = (logits.argmax(1) == labels) & counted
    sums, counts = torch.stack([loss, of_pixels.sum()]), torch.stack([counted.sum(), correct.sum()])
    if not with_gradient:
        return sums, counts, x.new_zeros(0)
    own, each = (1 - label_smoothing) * of_pixels[:, None], label_smoothing / K * counted.to(x.dtype)[:, None]
    back = logits.detach().softmax(1) * (own + each * weight.sum()) - each * weight[:, None, None]
    back = back.scatter_add(1, here[:, None], -own)
    rows, columns = (upsampling_matrix(n, patch_size, x) for n in (h, w))
    return sums, counts, torch.einsum("bkyx,yi,xj->bijk", back, rows[:H], columns[:W]).contiguous()
