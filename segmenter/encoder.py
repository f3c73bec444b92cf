"""The encoder: a plain ViT or distilled DeiT (paper section 3.1; facebookresearch/deit and timm for the names)."""

import torch
import torch.nn as nn

from segmenter.implementation import select
from segmenter.layers import Block, PatchEmbed, init_weights, resize_pos_embed, stochastic_depth


class VisionTransformer(nn.Module):
    """Pre-norm vision transformer with a class token and, if `distilled`, a distillation token.

    Args:
        image_size: (height, width) in pixels that the position embedding is made for; a multiple of patch_size.
        patch_size, n_layers, d_model, n_heads: as named. d_ff: hidden width of the MLP (4 * d_model in every preset).
        n_cls: classes of the ImageNet head, which segmentation does not use but checkpoints hold.
        dropout: one rate for positions, attention probabilities and both projections. drop_path_rate: stochastic
            depth of the last layer; layers before it get a linear share.
        norm_eps: LayerNorm epsilon. 1e-5 in released Segmenter weights, 1e-6 in timm, mmsegmentation and DINOv2.
        pos_embed_mode: resampling of the position embedding, "bilinear" (published) or "bicubic".
        pos_embed_check: when to resample. "tokens", as the published code: only when the number of tokens differs,
            so 256x1024 on a 512x512 model reads its 32x32 grid as 16x64. "grid": whenever the grid differs.
        impl: "eager", "triton" or "auto".
    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        n_layers: int,
        d_model: int,
        d_ff: int,
        n_heads: int,
        n_cls: int = 1000,
        dropout: float = 0.1,
        drop_path_rate: float = 0.0,
        distilled: bool = False,
        channels: int = 3,
        norm_eps: float = 1e-5,
        pos_embed_mode: str = "bilinear",
        pos_embed_check: str = "tokens",
        impl: str = "auto",
    ):
        super().__init__()
        if pos_embed_check not in ("tokens", "grid"):
            raise ValueError(f"pos_embed_check={pos_embed_check!r} is unknown; choose tokens or grid")
        ops = select(impl)
        self.patch_embed = PatchEmbed(image_size, patch_size, d_model, channels)
        self.channels = channels
        self.patch_size = patch_size
        self.n_layers = n_layers
        self.d_model = d_model
        self.d_ff = d_ff
        self.n_heads = n_heads
        self.n_cls = n_cls
        self.distilled = distilled
        self.pos_embed_mode = pos_embed_mode
        self.pos_embed_check = pos_embed_check
        self.dropout = nn.Dropout(dropout)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, d_model))
            self.head_dist = nn.Linear(d_model, n_cls)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.n_extra_tokens + self.patch_embed.num_patches, d_model))
        rates = stochastic_depth(drop_path_rate, n_layers)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff, dropout, rate, norm_eps, ops) for rate in rates)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.head = nn.Linear(d_model, n_cls)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if distilled:
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        self.apply(init_weights)

    @property
    def n_extra_tokens(self) -> int:
        """Tokens before the patches: 1 (CLS) or 2 (CLS, DIST)."""
        return 1 + self.distilled

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone."""
        return {"pos_embed", "cls_token", "dist_token"}

    def embed(self, im: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), H and W multiples of the patch -> tokens with positions (B, n_extra + H/P * W/P, d)."""
        B, _, H, W = im.shape
        P = self.patch_size
        x = self.patch_embed(im)
        extra = [self.cls_token] + ([self.dist_token] if self.distilled else [])
        x = torch.cat([token.expand(B, -1, -1) for token in extra] + [x], dim=1)
        pos_embed, grid = self.pos_embed, (H // P, W // P)
        differs = (
            x.shape[1] != pos_embed.shape[1]
            if self.pos_embed_check == "tokens"
            else (grid != self.patch_embed.grid_size)
        )
        if differs:
            pos_embed = resize_pos_embed(
                pos_embed, self.patch_embed.grid_size, grid, self.n_extra_tokens, self.pos_embed_mode
            )
        return x + pos_embed

    def forward(self, im: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Normalised image (B, C, H, W), H and W multiples of the patch size.

        Returns:
            All tokens after the last norm, (B, n_extra + patches, d), if `return_features`; else ImageNet logits
            (B, n_cls), for a distilled model the mean of both heads.
        """
        x = self.dropout(self.embed(im))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if return_features:
            return x
        if self.distilled:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0])

    def get_attention_map(self, im: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Softmax weights of block `layer_id` (from 0): (B, heads, T, T), T = n_extra + patches.

        As in the published code the image is not padded: rows and columns beyond the last whole patch are ignored.
        """
        if not 0 <= layer_id < self.n_layers:
            raise ValueError(f"layer_id {layer_id} is out of range: the encoder has layers 0..{self.n_layers - 1}")
        x = self.embed(im)
        for block in self.blocks[:layer_id]:
            x = block(x)
        return self.blocks[layer_id](x, return_attention=True)
