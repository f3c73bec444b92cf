"""The two decoders of the paper: a linear layer per patch (3.2) and the mask transformer (3.2.1)."""

from collections.abc import Iterator

import torch
import torch.nn as nn

from segmenter.guard import why_not_bypass
from segmenter.kernels import reference
from segmenter.layers import Block, init_weights, stochastic_depth
from segmenter.ops import OperatorModule, select


def to_grid(tokens: torch.Tensor, im_size: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Class-last masks of patches, row by row, (B, gh*gw, K) -> (B, K, gh, gw). A view."""
    return tokens.transpose(1, 2).unflatten(2, (im_size[0] // patch_size, im_size[1] // patch_size))


class DecoderLinear(nn.Module):
    """A linear classifier on every patch token."""

    def __init__(self, n_cls: int, patch_size: int, d_encoder: int):
        super().__init__()
        self.n_cls = n_cls
        self.patch_size = patch_size
        self.d_encoder = d_encoder
        self.head = nn.Linear(d_encoder, n_cls)
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        return set()

    def forward(self, x: torch.Tensor, im_size: tuple[int, int]) -> torch.Tensor:
        """Patch tokens (B, N, d_encoder) of a padded image of im_size (H, W) -> masks (B, n_cls, H/P, W/P)."""
        return to_grid(self.head(x), im_size, self.patch_size)


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
