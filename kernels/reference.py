"""Eager PyTorch definition of every operation: the only definition of right.

The functions have the signatures of the public kernels (`attention`, `layernorm_mlp`, `mask_head`). They serve as
`impl="eager"`, as what tests compare a kernel with (run in float32 or float64), and as the baseline of benchmarks.
They run on any device and dtype that PyTorch has, and they are differentiable.
"""

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


def layernorm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """LayerNorm over the last dimension: (..., d) -> (..., d), the dtype of x. weight, bias: (d,)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
) -> torch.Tensor:
    """residual + act(x weight^T + bias), act the exact (erf) GELU or nothing.

    Args:
        x: (..., d_in). weight: (d_out, d_in). bias: (d_out,). residual: (..., d_out).
    Returns:
        (..., d_out), the dtype of the residual if there is one, else of x.
    """
    y = F.linear(x, weight, bias)
    y = F.gelu(y) if gelu else y
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
) -> torch.Tensor:
    """x + fc2(gelu(fc1(layer_norm(x)))), with the exact (erf) GELU.

    Args:
        x: (..., d).
        norm_weight, norm_bias: (d,). fc1_weight: (d_ff, d), fc1_bias: (d_ff,). fc2_weight: (d, d_ff), fc2_bias: (d,).
        eps: added to the variance.
    Returns:
        (..., d), the dtype of x.
    """
    h = layernorm_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps, gelu=True)
    return linear(h, fc2_weight, fc2_bias, residual=x)


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
