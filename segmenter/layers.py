"""The parts that encoder and decoder share, with the parameter names of the published checkpoints (and of timm)."""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from segmenter.guard import decision, why_not_bypass
from segmenter.kernels import reference
from segmenter.ops import Automatic, OperatorModule, Operators, select, what_computes

RECOMPUTE = 1  # what blocks compute again in a backward pass, unless they are told otherwise


def init_weights(m: nn.Module) -> None:
    """Linear: truncated normal of std 0.02, bias 0. LayerNorm: 1 and 0. For `Module.apply`."""
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif isinstance(m, nn.LayerNorm):
        nn.init.ones_(m.weight)
        nn.init.zeros_(m.bias)


def stochastic_depth(rate: float, n_layers: int) -> list[float]:
    """Drop rates of the layers, rising linearly from 0 to `rate`."""
    return [rate * i / max(n_layers - 1, 1) for i in range(n_layers)]


def pad_to_multiple(im: torch.Tensor, patch_size: int, value: float = 0.0) -> torch.Tensor:
    """Pads (B, C, H, W) on the right and at the bottom so that H and W are multiples of `patch_size`."""
    H, W = im.shape[-2:]
    # Not -H % patch_size: of sizes that vary, PyTorch's compiler fails at Python's remainder of a negative number.
    pad_h, pad_w = -(-H // patch_size) * patch_size - H, -(-W // patch_size) * patch_size - W
    return F.pad(im, (0, pad_w, 0, pad_h), value=value) if pad_h or pad_w else im


def resize_pos_embed(
    pos_embed: torch.Tensor,
    grid_old: tuple[int, int] | None,
    grid_new: tuple[int, int],
    n_extra: int,
    mode: str = "bilinear",
) -> torch.Tensor:
    """Resamples a position embedding (1, n_extra + gh*gw, d) to another grid.

    The leading `n_extra` rows (CLS, DIST) are kept. `grid_old=None` means square. Resampling has align_corners=False.

    mode: "bilinear", as the published Segmenter; "bicubic", as mmsegmentation and Hugging Face's ViT, DeiT and DINOv2;
        "bicubic_antialias", in float32, as timm and Hugging Face's DINOv2 with registers.
    """
    extra, grid = pos_embed[:, :n_extra], pos_embed[:, n_extra:]
    if grid_old is None:
        side = round(grid.shape[1] ** 0.5)
        grid_old = (side, side)
    if grid_old[0] * grid_old[1] != grid.shape[1]:
        raise ValueError(f"the position embedding has {grid.shape[1]} patches, which is not a {grid_old} grid")
    grid = grid.reshape(1, *grid_old, -1).permute(0, 3, 1, 2)
    if mode == "bicubic_antialias":
        resized = F.interpolate(grid.float(), size=grid_new, mode="bicubic", align_corners=False, antialias=True)
        grid = resized.to(grid.dtype)
    else:
        grid = F.interpolate(grid, size=grid_new, mode=mode, align_corners=False)
    return torch.cat([extra, grid.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: (B, C, H, W) -> (B, H/P * W/P, d), row by row."""

    def __init__(self, image_size: tuple[int, int], patch_size: int, embed_dim: int, channels: int = 3):
        super().__init__()
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise ValueError(f"image_size {tuple(image_size)} must be divisible by patch_size {patch_size}")
        self.image_size = tuple(image_size)
        self.patch_size = patch_size
        self.grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, im: torch.Tensor) -> torch.Tensor:
        return self.proj(im).flatten(2).transpose(1, 2)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the residual branch of a whole sample with probability `drop_prob`."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    @property
    def drops(self) -> bool:
        """Whether it does anything now."""
        return self.training and self.drop_prob > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._keep(x) / (1 - self.drop_prob) if self.drops else x

    def between(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x + self(y - x), of a branch that has been added to x already; the same samples are dropped."""
        return torch.lerp(x.to(y.dtype), y, self._keep(x).to(y.dtype) / (1 - self.drop_prob)) if self.drops else y

    def _keep(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)


class LayerScale(nn.Module):
    """A learned factor for each column of what a residual branch adds: (..., d) -> (..., d).

    1e-5 at first, as in DINOv2; weights of every kind bring their own.
    """

    def __init__(self, dim: int, value: float = 1e-5):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Attention(OperatorModule):
    """Multi-head self-attention with a fused qkv projection.

    Calling it is the published layer: (B, N, d) -> ((B, N, d), attention weights (B, heads, N, N)), weights in memory.
    A `Block` uses `attend`, which gives the tokens alone and needs no weights.

    Attributes:
        heads: how many. scale: of the scores; another value than (d / heads) ** -0.5 is honoured.
        attn: None; in the published code, too.
    """

    def __init__(self, dim: int, heads: int, dropout: float, ops: Operators | Automatic | None = None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"d_model {dim} must be divisible by n_heads {heads}")
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.attn = None
        self.ops = ops or select("auto")
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    @property
    def unwrapped(self) -> "Attention":
        return self

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, rotation: "Rotation | None" = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, N, d) -> (tokens (B, N, d), attention weights (B, heads, N, N) after their dropout).

        As in the published code a mask changes nothing; here that is warned of. rotation: of queries and keys.
        """
        if mask is not None:
            warnings.warn("Attention ignores its mask, as the published code does", stacklevel=2)
        return self._written_out(self._projected(x, rotation))

    def _projected(self, x: torch.Tensor, rotation: "Rotation | None") -> torch.Tensor:
        """Queries, keys and values (B, N, 3 d), the first two turned by `rotation` if there is one."""
        qkv = self.qkv(x)
        if rotation is None:
            return qkv
        qk, v = qkv.unflatten(2, (3 * self.heads, -1)).split((2 * self.heads, self.heads), 2)
        return torch.cat([self.ops.on(qk).rotate(qk, *rotation), v], dim=2).flatten(2)

    def attend(self, x: torch.Tensor, rotation: "Rotation | None" = None) -> torch.Tensor:
        """The tokens of `forward`, by an operator that keeps no weights unless these have to be written out.

        Dropout of the weights (`attn_drop` in training with a rate above 0) exists in the eager definition only, which
        is then what runs, whatever `ops` is.
        """
        qkv = self._projected(x, rotation)  # (B, N, 3 d)
        if self.why_written_out(qkv.shape[-1]) is not None:
            return self._written_out(qkv)[0]
        drop = self.attn_drop
        if drop.training and (rate := getattr(drop, "p", 0.0)) > 0:
            x = reference.attention(qkv, self.heads, dropout_p=rate)
        else:
            x = self.ops.on(qkv).attention(qkv, self.heads)
        return self.proj_drop(self.proj(x))

    def probabilities(self, x: torch.Tensor, rotation: "Rotation | None" = None) -> torch.Tensor:
        """The attention map (B, heads, N, N) of `forward`, without the tokens."""
        return self._weights(self._projected(x, rotation))

    def why_written_out(self, columns: int) -> str | None:
        """Why no operator can stand for the weights and their product with the values at the moment, or None.

        columns: of qkv, 3 d.
        """
        if self.scale != (columns // (3 * self.heads)) ** -0.5:
            return "another scale of the scores"
        return why_not_bypass(self._modules["attn_drop"], _DROPOUT)

    def _written_out(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attn = self._weights(qkv)
        x = attn @ reference.split_heads(qkv, self.heads)[2]  # (B, heads, N, d / heads)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2))), attn

    def _weights(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, _ = reference.split_heads(qkv, self.heads)
        return self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the exact GELU."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float, out_dim: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim)
        self.drop = nn.Dropout(dropout)

    @property
    def unwrapped(self) -> "Mlp":
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Rotation(NamedTuple):
    """Rotary positions of queries and keys, as `kernels.reference_rotary.rotate` takes them.

    Attributes:
        cos, sin: (n, d) of the last n tokens, or (b, t, n, d). interleaved: which columns are pairs.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


def fused_attention(
    x: torch.Tensor,
    norm: nn.LayerNorm,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    heads: int,
    proj: nn.Linear,
    ops: Operators,
    keep_qkv: bool = True,
    layer_scale: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """The first half of every pre-norm block, ours or not: x + attention(norm(x)), (B, N, d), in three operators.

    Reads the parameters of the layers and calls none: whoever calls it has asked whether that is right.

    keep_qkv: for the backward pass of kernels, which compute it again otherwise. layer_scale: (d,), a factor for each
    column of what is added to x (Touvron et al., "Going deeper with image transformers", 2021), or None. rotation: of
    queries and keys, a fourth operator.
    """
    parameters = (*_weight_and_bias(norm), qkv_weight, qkv_bias, *_weight_and_bias(proj))
    if rotation is not None:
        return ops.compose(_rotary_half, x, *parameters, heads, norm.eps, layer_scale, *rotation)
    return ops.compose(attention_half, x, *parameters, heads, norm.eps, keep_qkv, layer_scale)


def attention_half(
    ops, x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, eps=1e-5, keep_qkv=True, layer_scale=None
) -> torch.Tensor:
    """The formula of it, by these operators; with gradients, as one operator where there is one."""
    of_qkv, of_proj = (norm_weight, norm_bias, qkv_weight, qkv_bias), (weight, bias)
    if ops.attention_half is not None and torch.is_grad_enabled():
        return ops.attention_half(x, *of_qkv, *of_proj, heads, eps, keep_qkv, layer_scale)
    o = ops.attention(ops.layernorm_linear(x, *of_qkv, eps), heads)
    return ops.linear(o, *of_proj, residual=x, layer_scale=layer_scale)


def _rotary_half(
    ops, x, norm_weight, norm_bias, qkv_weight, qkv_bias, weight, bias, heads, eps, layer_scale, cos, sin, interleaved
) -> torch.Tensor:
    qkv = ops.layernorm_linear(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps).unflatten(2, (3 * heads, -1))
    qk, v = qkv.split((2 * heads, heads), 2)
    q, k = ops.rotate(qk, cos, sin, interleaved).split(heads, 2)
    o = ops.cross_attention(q, k, v, q.shape[-1] ** -0.5)
    return ops.linear(o, weight, bias, residual=x, layer_scale=layer_scale)


def fused_separate_attention(
    x: torch.Tensor,
    norm: nn.LayerNorm,
    projections: Sequence[nn.Linear],
    heads: int,
    proj: nn.Linear,
    ops: Operators,
    layer_scale: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """`fused_attention` for layers that project q, k and v each by itself: three products.

    One product of packed weights would need a copy of them: made on every call it costs what it saves, and kept it is a
    quarter of the block's memory, and stale in a CUDA graph as soon as a weight changes in place.
    """
    of_qkv = (tensor for layer in projections for tensor in _weight_and_bias(layer))
    parameters = (*_weight_and_bias(norm), *of_qkv, *_weight_and_bias(proj))
    return ops.compose(_separate_attention_half, x, *parameters, heads, norm.eps, layer_scale, *(rotation or ()))


def _separate_attention_half(
    ops, x, norm_weight, norm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, weight, bias, heads, eps,
    layer_scale, cos=None, sin=None, interleaved=False,
) -> torch.Tensor:  # fmt: skip
    normed = ops.layernorm(x, norm_weight, norm_bias, eps)
    pairs = (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)
    q, k, v = (ops.linear(normed, *pair).unflatten(2, (heads, -1)) for pair in pairs)
    if cos is not None:
        q, k = (ops.rotate(t, cos, sin, interleaved) for t in (q, k))
    o = ops.cross_attention(q, k, v, q.shape[-1] ** -0.5)
    return ops.linear(o, weight, bias, residual=x, layer_scale=layer_scale)


def fused_mlp(
    x: torch.Tensor,
    norm: nn.LayerNorm,
    fc1: nn.Linear,
    fc2: nn.Linear,
    ops: Operators,
    keep_hidden: bool = False,
    layer_scale: torch.Tensor | None = None,
    tanh: bool = False,
) -> torch.Tensor:
    """The second half: x + fc2(gelu(fc1(norm(x)))), in one operator. keep_hidden: for the backward pass of kernels, of
    the exact GELU; layer_scale: as above; tanh: with the GELU by tanh."""
    parameters = (*_weight_and_bias(norm), *_weight_and_bias(fc1), *_weight_and_bias(fc2))
    if keep_hidden and ops.layernorm_mlp_hidden is not None and torch.is_grad_enabled():
        return ops.layernorm_mlp_hidden(x, *parameters, norm.eps, layer_scale)[0]
    return ops.compose(_mlp_half, x, *parameters, norm.eps, layer_scale, tanh)


def _weight_and_bias(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Not by `layer.weight`: looking up an attribute of a module takes a microsecond, a dozen times a block."""
    held = layer._parameters
    return (held["weight"], held["bias"]) if len(held) == 2 else (layer.weight, layer.bias)


def _mlp_half(ops: Operators, x: torch.Tensor, *arguments) -> torch.Tensor:
    return ops.layernorm_mlp(x, *arguments)


class Block(OperatorModule):
    """Pre-norm transformer block: x += attn(norm1(x)); x += mlp(norm2(x)), what is added by `ls1` and `ls2` if there
    is a LayerScale.

    Each half runs as fused operators that read the parameters of its layers, or layer by layer where that would pass
    something over: active dropout, hooks, replaced or adapted layers, without kernels stochastic depth (see
    `why_not_fused`).

    Attributes:
        recompute: what a backward pass computes again, see `Segmenter.recompute`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        dropout: float,
        drop_path: float,
        eps: float = 1e-5,
        ops: Operators | Automatic | None = None,
        layer_scale: bool = False,
    ):
        super().__init__()
        self.ops = ops or select("auto")
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, dropout, self.ops)
        self.mlp = Mlp(dim, mlp_dim, dropout)
        if layer_scale:
            self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.recompute = RECOMPUTE

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        return_attention: bool = False,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """(B, N, d) -> (B, N, d), or the attention map (B, heads, N, N) of this block.

        mask: for `attn`. rotation: rotary positions of queries and keys.
        """
        if return_attention:
            return self._attended(self.norm1(x), mask, True, rotation)
        if self.recompute > 2 and torch.is_grad_enabled():
            return checkpoint(self._run, x, mask, rotation, use_reentrant=False)
        return self._run(x, mask, rotation)

    def _run(self, x: torch.Tensor, mask: torch.Tensor | None, rotation: Rotation | None) -> torch.Tensor:
        ops, attention, mlp, drops = decision(self, x)
        layers = self._modules  # not self.attn and so on: attribute look-ups of modules are slow
        ls1, ls2 = layers.get("ls1"), layers.get("ls2")
        if attention is None and mask is None:
            attn, before = layers["attn"], x
            qkv, proj = _weight_and_bias(attn._modules["qkv"]), attn._modules["proj"]
            keep, gamma = self.recompute < 2, None if ls1 is None else ls1._parameters["gamma"]
            x = fused_attention(x, layers["norm1"], *qkv, attn.heads, proj, ops, keep, gamma, rotation)
            x = self.drop_path.between(before, x) if drops else x
        else:
            y = self._attended(self.norm1(x), mask, False, rotation)
            x = x + self.drop_path(y if ls1 is None else ls1(y))
        if mlp is None:
            inner, gamma = layers["mlp"]._modules, None if ls2 is None else ls2._parameters["gamma"]
            y = fused_mlp(x, layers["norm2"], inner["fc1"], inner["fc2"], ops, self.recompute < 1, gamma)
            return self.drop_path.between(x, y) if drops else y
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if ls2 is None else ls2(y))

    def _attended(
        self, x: torch.Tensor, mask: torch.Tensor | None, weights: bool, rotation: Rotation | None
    ) -> torch.Tensor:
        """The attention layer's tokens, or its weights. It is called itself if it may be more than its type says."""
        attn = self.attn
        kind = type(attn) if getattr(type(attn), "forward", None) is Attention.forward else Attention
        if mask is None and why_not_bypass(attn, (kind,)) is None:
            return attn.probabilities(x, rotation) if weights else attn.attend(x, rotation)
        more = () if mask is None and rotation is None else (mask,) if rotation is None else (mask, rotation)
        y = attn(x, *more)
        if weights:
            return y[1]
        return y[0] if isinstance(y, tuple) else y

    def decide(self, x: torch.Tensor) -> tuple[Operators, str | None, str | None, bool]:
        """For `guard.decision`: operators for x, why attention and why the MLP have to run layer by layer or None, and
        whether there is stochastic depth."""
        ops = self.ops.on(x)
        reasons = (self.why_not_fused(half, ops.name) for half in ("attention", "mlp"))
        return ops, *reasons, getattr(self.drop_path, "drops", False)

    def implementations(self, parameter: torch.Tensor) -> Iterator[tuple[str, str]]:
        name = self.ops.on(parameter).name
        yield "attention", name
        yield "layernorm_linear", what_computes(name, self.why_not_fused("attention", name))
        yield "layernorm_mlp", what_computes(name, self.why_not_fused("mlp", name))

    def obstacles(self) -> list[str]:
        return [reason for half in ("attention", "mlp") if (reason := self.why_not_fused(half))]

    def why_not_fused(self, half: str, name: str = "triton") -> str | None:
        """Why the "attention" or the "mlp" half has to run layer by layer at the moment, or None if it need not.

        name: of the operators. Eager ones drop the branch itself, in the order of the published code.
        """
        if name != "triton" and getattr(self.drop_path, "drops", False):
            return "stochastic depth"
        layers = self._modules
        inner = layers["attn" if half == "attention" else "mlp"]
        if any(layer.training and getattr(layer, "p", 0) > 0 for layer in inner._modules.values()):
            return "dropout"
        norm, scale = (layers.get(name + ("1" if half == "attention" else "2")) for name in ("norm", "ls"))
        asked = ((inner, _HALVES), (norm, _NORM), (layers["drop_path"], _DROP_PATH))
        for module, kinds in asked if scale is None else (*asked, (scale, _LAYER_SCALE)):
            reason = why_not_bypass(module, kinds)
            if reason is not None:
                return reason
        for name, layer in inner._modules.items():
            reason = why_not_bypass(layer, _LAYERS[name]) if name in _LAYERS else f"an extra layer {name}"
            if reason is not None:
                return reason
        return inner.why_written_out(inner.qkv.weight.shape[0]) if half == "attention" else None


_HALVES, _NORM, _DROP_PATH = (Attention, Mlp), (nn.LayerNorm,), (DropPath, nn.Identity)
_LAYER_SCALE = (LayerScale,)
_LINEAR, _DROPOUT = (nn.Linear,), (nn.Dropout, nn.Identity)
_LAYERS = {
    **dict.fromkeys(("qkv", "proj", "fc1", "fc2"), _LINEAR),
    **dict.fromkeys(("attn_drop", "proj_drop", "drop"), _DROPOUT),
    "act": (nn.GELU,),
}
