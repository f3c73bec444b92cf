"""The two decoders of the paper: a linear layer per patch (3.2) and the mask transformer (3.2.1)."""

from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from segmenter.cache import Cache
from segmenter.guard import why_not_bypass
from segmenter.kernels import reference
from segmenter.layers import Block, init_weights, stochastic_depth
from segmenter.ops import OperatorModule, select


def to_grid(tokens: torch.Tensor, im_size: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Class-last masks of patches, row by row, (B, gh*gw, K) -> (B, K, gh, gw). A view."""
    return tokens.transpose(1, 2).unflatten(2, (im_size[0] // patch_size, im_size[1] // patch_size))


class DecoderLinear(nn.Module):
    """A linear classifier on every patch token.

    batch_norm: first normalises each column over all patches of the batch, as the linear head of DINOv2 does (Oquab et
        al., "DINOv2", TMLR 2024). In evaluation the two are one product: see `folded`.
    """

    def __init__(self, n_cls: int, patch_size: int, d_encoder: int, batch_norm: bool = False):
        super().__init__()
        self.n_cls = n_cls
        self.patch_size = patch_size
        self.d_encoder = d_encoder
        if batch_norm:
            self.norm, self.cache = nn.BatchNorm1d(d_encoder), Cache()
        self.head = nn.Linear(d_encoder, n_cls)
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        return set()

    def train(self, mode: bool = True) -> "DecoderLinear":
        """As of every module. What was computed from the weights is forgotten."""
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> "DecoderLinear":
        self._forget()
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        if "cache" in self.__dict__:
            self.cache.clear()

    def forward(self, x: torch.Tensor, im_size: tuple[int, int]) -> torch.Tensor:
        """Patch tokens (B, N, d_encoder) of a padded image of im_size (H, W) -> masks (B, n_cls, H/P, W/P)."""
        norm = self._modules.get("norm")
        if norm is None:
            masks = self.head(x)
        elif self.why_not_folded() is None:
            masks = F.linear(x, *self.folded())
        else:
            masks = self.head(norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return to_grid(masks, im_size, self.patch_size)

    def why_not_folded(self) -> str | None:
        """Why batch norm and head have to be called one after the other, or None: statistics of this batch, hooks,
        replaced layers."""
        norm, head = self._modules["norm"], self._modules["head"]
        reason = why_not_bypass(norm, _BATCH_NORM) or why_not_bypass(head, (nn.Linear,))
        if reason is None and (norm.training or norm.running_mean is None):
            return "statistics of the batch"
        return reason

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (n_cls, d) and bias (n_cls,) of the head for tokens that are not normalised.

        With s = gamma / sqrt(variance + eps): W diag(s) and b + W (beta - s mean), computed in float32 or wider and
        rounded to the type of W. Computed once, until anything it depends on changes (`segmenter.cache`). In half types
        the products are larger than those of normalised tokens by the ratio of a column's mean and deviation, and so is
        their rounding.
        """
        norm, head = self.norm, self.head
        read = (head.weight, head.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        tensors = tuple(t for t in (*read, norm.num_batches_tracked) if t is not None)

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            wide = torch.promote_types(head.weight.dtype, torch.float32)
            weight, bias, gamma, beta, mean, variance = (None if t is None else t.to(wide) for t in read)
            scale = (variance + norm.eps).rsqrt() * (1 if gamma is None else gamma)
            shift = -scale * mean if beta is None else beta - scale * mean
            offset = weight @ shift if bias is None else bias + weight @ shift
            return (weight * scale).to(head.weight.dtype), offset.to(head.weight.dtype)

        return self.cache(("folded", norm.eps), tensors, make)


_BATCH_NORM = (nn.BatchNorm1d, nn.SyncBatchNorm)  # the second is what PyTorch makes of the first for several processes


class MaskTransformer(OperatorModule):
    """Transformer over patch tokens and one learned token a class; a mask is the cosine of patch and class.

    With two classes the LayerNorm over the class axis leaves nothing but the sign of their difference and its
    gradient vanishes: use three classes or more, or the linear decoder, for binary tasks.

    Args:
        n_cls: classes. patch_size: of the encoder. d_encoder: width of the encoder's tokens.
        n_layers, n_heads, d_model, d_ff: of the decoder's own blocks. drop_path_rate, dropout: as in the encoder.
        impl: "eager", "triton" or "auto".
    """

    computes = "class masks"

    def __init__(
        self,
        n_cls: int,
        patch_size: int,
        d_encoder: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        d_ff: int,
        drop_path_rate: float = 0.0,
        dropout: float = 0.1,
        impl: str = "auto",
    ):
        super().__init__()
        self.ops = select(impl)
        self.n_cls = n_cls
        self.patch_size = patch_size
        self.d_encoder = d_encoder
        self.n_layers = n_layers
        self.d_model = d_model
        self.d_ff = d_ff
        self.scale = d_model**-0.5

        rates = stochastic_depth(drop_path_rate, n_layers)
        self.cls_emb = nn.Parameter(torch.zeros(1, n_cls, d_model))
        self.proj_patch = nn.Parameter(self.scale * torch.randn(d_model, d_model))
        self.proj_classes = nn.Parameter(self.scale * torch.randn(d_model, d_model))
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff, dropout, rate, ops=self.ops) for rate in rates)
        self.proj_dec = nn.Linear(d_encoder, d_model)
        self.decoder_norm = nn.LayerNorm(d_model)
        self.mask_norm = nn.LayerNorm(n_cls)

        self.apply(init_weights)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"cls_emb"}

    def implementations(self, parameter: torch.Tensor) -> Iterator[tuple[str, str]]:
        yield "mask_head", self.ops.on(parameter).name

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Encoder patches (B, N, d_encoder) -> decoder input (B, N + n_cls, d_model): patches first."""
        # [0]: DistributedDataParallel wants the gradient laid out as the parameter, which that of a slice is not
        return torch.cat([self.proj_dec(x), self.cls_emb[0].expand(x.shape[0], -1, -1)], dim=1)

    def forward(self, x: torch.Tensor, im_size: tuple[int, int]) -> torch.Tensor:
        """Patch tokens (B, N, d_encoder) of a padded image of im_size (H, W) -> masks (B, n_cls, H/P, W/P)."""
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        inputs = (x[:, : -self.n_cls], x[:, -self.n_cls :], self.proj_patch, self.proj_classes)
        norm = self.mask_norm
        if why_not_bypass(norm, (nn.LayerNorm,)) is None:
            masks = self.ops.on(x).mask_head(*inputs, norm.weight, norm.bias, norm.eps)
        else:
            masks = norm(reference.class_cosines(*inputs))
        return to_grid(masks, im_size, self.patch_size)

    def get_attention_map(self, x: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Softmax weights of block `layer_id` (from 0): (B, heads, T, T), T = patches + n_cls, patches first."""
        if not 0 <= layer_id < self.n_layers:
            raise ValueError(f"layer_id {layer_id} is out of range: the decoder has layers 0..{self.n_layers - 1}")
        x = self.tokens(x)
        for block in self.blocks[:layer_id]:
            x = block(x)
        return self.blocks[layer_id](x, return_attention=True)
