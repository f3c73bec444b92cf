"""The encoder: a plain ViT or distilled DeiT (paper section 3.1; facebookresearch/deit and timm for the names).

The options that no published Segmenter has are those of encoders that were trained since: LayerScale (Touvron et al.,
"Going deeper with image transformers", ICCV 2021: DeiT-III, DINOv2), registers (Darcet et al., "Vision transformers
need registers", ICLR 2024), positions of patches alone, and rotary ones (Simeoni et al., "DINOv3", 2025). Their
parameters have timm's names.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from segmenter.cache import Cache
from segmenter.config import POSITIONS
from segmenter.guard import why_not_bypass
from segmenter.kernels import reference
from segmenter.layers import Block, PatchEmbed, Rotation, init_weights, resize_pos_embed, stochastic_depth
from segmenter.ops import OperatorModule, select, what_computes

EXTRA_TOKENS = ("cls_token", "dist_token", "reg_token")  # in the order of the tokens


class VisionTransformer(OperatorModule):
    """Pre-norm vision transformer. Its tokens: class, distillation if `distilled`, registers, then the patches.

    Args:
        image_size: (height, width) in pixels that the position embedding is made for; a multiple of patch_size.
        patch_size, n_layers, d_model, n_heads: as named. d_ff: hidden width of the MLP (4 * d_model in every preset).
        n_cls: classes of the ImageNet head, which segmentation does not use but checkpoints hold.
        dropout: one rate for positions, attention probabilities and both projections. drop_path_rate: stochastic
            depth of the last layer; layers before it get a linear share.
        norm_eps: LayerNorm epsilon. 1e-5 in released Segmenter weights, 1e-6 in timm, mmsegmentation and DINOv2.
        pos_embed_mode: resampling of the position embedding, see `layers.resize_pos_embed`.
        pos_embed_check: when to resample. "tokens", as the published code: only when the number of tokens differs,
            so 256x1024 on a 512x512 model reads its 32x32 grid as 16x64. "grid": whenever the grid differs.
        layer_scale: factors for what each half of a block adds. n_registers: learned tokens that nobody reads.
        class_token: False: there is none, as in models of timm that were trained on the mean of their patches.
        final_norm: False: no norm after the blocks, as in those. pos_embed: which tokens have learned positions, "all"
            or "patches"; or "rotary": none, queries and keys of patches are turned, see `rotary_positions`.
        rope_theta: the longest period of these. What pos_embed_mode and _check say is for learned ones.
        impl: "eager", "triton" or "auto".
    Raises:
        ValueError: sizes that do not fit together.
    """

    computes = "bytes to tokens"

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
        layer_scale: bool = False,
        n_registers: int = 0,
        class_token: bool = True,
        final_norm: bool = True,
        pos_embed: str = "all",
        rope_theta: float = 100.0,
        impl: str = "auto",
    ):
        super().__init__()
        if pos_embed_check not in ("tokens", "grid"):
            raise ValueError(f"pos_embed_check={pos_embed_check!r} is unknown; choose tokens or grid")
        if pos_embed not in POSITIONS:
            raise ValueError(f"pos_embed={pos_embed!r} is unknown; choose one of {', '.join(POSITIONS)}")
        self.ops = ops = select(impl)
        self.patch_embed = PatchEmbed(image_size, patch_size, d_model, channels)
        self.channels = channels
        self.patch_size = patch_size
        self.n_layers = n_layers
        self.d_model = d_model
        self.d_ff = d_ff
        self.n_heads = n_heads
        self.n_cls = n_cls
        self.distilled = distilled
        self.n_registers = n_registers
        self.n_extra_tokens = class_token + distilled + n_registers  # tokens before the patches
        self.pos_embed_mode = pos_embed_mode
        self.pos_embed_check = pos_embed_check
        self.dropout = nn.Dropout(dropout)
        self.cache = Cache()

        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, d_model))
            self.head_dist = nn.Linear(d_model, n_cls)
        if n_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, n_registers, d_model))
        self.rope_theta = rope_theta if pos_embed == "rotary" else None
        self.n_extra_positions = self.n_extra_tokens if pos_embed == "all" else 0  # rows before those of the patches
        n_positions = self.n_extra_positions + self.patch_embed.num_patches
        learned = None if pos_embed == "rotary" else nn.Parameter(torch.zeros(1, n_positions, d_model))
        self.register_parameter("pos_embed", learned)
        sizes = (d_model, n_heads, d_ff, dropout)
        rates = stochastic_depth(drop_path_rate, n_layers)
        self.blocks = nn.ModuleList(Block(*sizes, rate, norm_eps, ops, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps) if final_norm else nn.Identity()
        self.head = nn.Linear(d_model, n_cls)
        self.pre_logits = nn.Identity()  # part of the published class; neither calls it

        for tokens in (*([] if learned is None else [learned]), *self.extra_tokens()):
            nn.init.trunc_normal_(tokens, std=0.02)
        self.apply(init_weights)

    def extra_tokens(self) -> list[torch.Tensor]:
        """The learned tokens before the patches, each (1, n, d), in their order."""
        return [getattr(self, name) for name in EXTRA_TOKENS if hasattr(self, name)]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone."""
        return {"pos_embed", "cls_token", "dist_token"} | ({"reg_token"} if self.n_registers else set())

    def load_pretrained(self, checkpoint_path: str | os.PathLike, prefix: str = "") -> None:
        """Takes the weights of an encoder from a file of any kind that `segmenter convert` reads, .npz of JAX included.

        The position embedding is resized to this encoder's grid. An ImageNet head that the file lacks, or of another
        number of classes, stays as it is.

        Args:
            checkpoint_path: the file. prefix: only names that begin so are read, without it.
        Raises:
            CheckpointError: the file is unusable, or does not fit. The encoder is then unchanged.
        """
        from segmenter.weights.build import load_state
        from segmenter.weights.convert import convert
        from segmenter.weights.read import CheckpointError, read_state_dict

        weights, _ = read_state_dict(checkpoint_path)
        weights = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if not weights:
            raise CheckpointError(f"{checkpoint_path}: no name in it begins with {prefix!r}")
        state = convert(weights, n_cls=1, decoder="linear", image_size=self.patch_embed.image_size).state
        state = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
        for head in ("head", "head_dist") if self.distilled else ("head",):
            found = state.get(f"{head}.weight")
            if found is None or found.shape != self._modules[head].weight.shape or not found.any():  # zeros: made up
                state |= {f"{head}.{name}": p.detach() for name, p in self._modules[head].named_parameters()}
        load_state(self, state, str(checkpoint_path))

    def train(self, mode: bool = True) -> "VisionTransformer":
        """As of every module. What was computed from the parameters is forgotten."""
        self.cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> "VisionTransformer":
        self.cache.clear()
        return super()._apply(fn, recurse)

    def _cached(self, key: tuple, tensors: Sequence[torch.Tensor], make: Callable) -> Any:
        if self.training or torch.compiler.is_compiling():
            return make()
        return self.cache(key, tensors, make)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """What is added to the tokens for a grid of patches, (1, n_extra + patches, d), resampled if need be; zeros for
        tokens without positions.

        In evaluation, while no gradients are recorded, each grid is resampled once: see `segmenter.cache`.
        """
        if self.pos_embed is None:
            n, like = self.n_extra_tokens + grid[0] * grid[1], self.patch_embed.proj.weight
            return self._cached(("none", n), (like,), lambda: like.new_zeros(1, n, self.d_model))
        differs = (
            self.n_extra_positions + grid[0] * grid[1] != self.pos_embed.shape[1]
            if self.pos_embed_check == "tokens"
            else (grid != self.patch_embed.grid_size)
        )
        missing = self.n_extra_tokens - self.n_extra_positions
        if not differs and not missing:
            return self.pos_embed
        options = (self.patch_embed.grid_size, grid, self.n_extra_positions, self.pos_embed_mode)

        def make() -> torch.Tensor:
            positions = resize_pos_embed(self.pos_embed, *options) if differs else self.pos_embed
            return F.pad(positions, (0, 0, missing, 0)) if missing else positions

        return self._cached(("positions", *options, differs), (self.pos_embed,), make)

    def rotation(self, grid: tuple[int, int] | None) -> Rotation | None:
        """Rotary positions of a grid of patches; None for an encoder with learned ones."""
        if self.rope_theta is None:
            return None
        if grid is None:
            raise ValueError("this encoder has rotary positions: give the grid of patches")
        like = next(self.parameters())
        options = (grid, self.d_model // self.n_heads, self.rope_theta)
        return Rotation(*self._cached(("rotary", *options), (like,), lambda: rotary_positions(*options, like.device)))

    def embed(self, im: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), H and W multiples of the patch -> tokens with positions (B, n_extra + H/P * W/P, d)."""
        B, _, H, W = im.shape
        x = self.patch_embed(im)
        # token[0]: DistributedDataParallel wants gradients laid out as their parameters, which those of slices are not
        x = torch.cat([token[0].expand(B, -1, -1) for token in self.extra_tokens()] + [x], dim=1)
        return x if self.pos_embed is None else x + self.positions(self._grid(H, W))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        P = self.patch_size
        return (height - P) // P + 1, (width - P) // P + 1  # of the convolution, letter by letter, for torch.export

    def embed_pixels(self, pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
        """Tokens with positions of images as bytes: `embed` of the normalised and padded image.

        Args:
            pixels: (B, H, W, 3) uint8, on the model's device, any H and W from 1 on.
            mean, std: of the three channels, in units of pixel / 255.
        Returns:
            (B, n_extra + ceil(H/P) * ceil(W/P), d).
        Raises:
            TypeError: pixels are no bytes. ValueError: another shape.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"expected images as bytes, got {pixels.dtype}; for normalised images use embed()")
        P = self.patch_size
        _, *grid = reference.patch_grid(pixels, P)
        if self.why_not_bytes() is not None:
            return self.embed(reference.normalized(pixels, mean, std, next(self.parameters()).dtype, P))
        proj = self.patch_embed.proj
        tokens = [token[0] for token in self.extra_tokens()]
        extra = torch.cat(tokens) if len(tokens) > 1 else tokens[0]
        operators, positions = self.ops.on(proj.weight), self.positions(tuple(grid))[0]
        arguments = (pixels, proj.weight, proj.bias, extra, positions, mean, std)
        return operators.pixels_to_tokens(*arguments, cached=self._cached)

    def why_not_bytes(self) -> str | None:
        """Why the patch embedding has to be called with a normalised image, or None if its weights may be used."""
        if not self.n_extra_tokens:
            return "no token before the patches"
        proj, P = self.patch_embed._modules.get("proj"), self.patch_size
        for module, kinds in ((self.patch_embed, (PatchEmbed,)), (proj, (nn.Conv2d,))):
            reason = why_not_bypass(module, kinds)
            if reason is not None:
                return reason
        plain = (proj.kernel_size, proj.stride, proj.padding, proj.dilation, proj.groups, proj.in_channels)
        return None if plain == ((P, P), (P, P), (0, 0), (1, 1), 1, 3) else "another convolution"

    def implementations(self, parameter: torch.Tensor) -> Iterator[tuple[str, str]]:
        yield "pixels_to_tokens", what_computes(self.ops.on(parameter).name, self.why_not_bytes())
        if self.rope_theta is not None:
            yield "rotate", self.ops.on(parameter).name

    def forward(self, im: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Normalised image (B, C, H, W), H and W multiples of the patch size.

        Returns:
            All tokens after the last norm, (B, n_extra + patches, d), if `return_features`; else ImageNet logits
            (B, n_cls), for a distilled model the mean of both heads.
        Raises:
            ValueError: logits of an encoder without a class token.
        """
        return self.forward_tokens(self.embed(im), return_features, self._grid(*im.shape[2:]))

    def forward_tokens(
        self, x: torch.Tensor, return_features: bool = False, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """`forward` from tokens with positions on, which `embed` and `embed_pixels` make.

        grid: rows and columns of patches, which rotary positions need.
        """
        x, rotation = self.dropout(x), self.rotation(grid)
        for block in self.blocks:
            x = block(x) if rotation is None else block(x, rotation=rotation)
        x = self.norm(x)
        if return_features:
            return x
        if not hasattr(self, "cls_token"):
            raise ValueError("this encoder has no class token to classify by; ask for return_features=True")
        if self.distilled:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0])

    def get_attention_map(self, im: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Softmax weights of block `layer_id` (from 0): (B, heads, T, T), T = n_extra + patches.

        As in the published code the image is not padded: rows and columns beyond the last whole patch are ignored.
        """
        if not 0 <= layer_id < self.n_layers:
            raise ValueError(f"layer_id {layer_id} is out of range: the encoder has layers 0..{self.n_layers - 1}")
        x, rotation = self.embed(im), self.rotation(self._grid(*im.shape[2:]))
        more = {} if rotation is None else {"rotation": rotation}
        for block in self.blocks[:layer_id]:
            x = block(x, **more)
        return self.blocks[layer_id](x, return_attention=True, **more)


def rotary_positions(
    grid: tuple[int, int], head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of DINOv3, (rows * columns, head_dim) float32 each, for `kernels.reference_rotary.rotate`.

    The centres of the patches lie in -1 to 1 along each axis, whatever the grid. A quarter of a head's columns has the
    angles 2 pi y / period, the next 2 pi x / period, with periods from 1 up to theta, and the other half the same
    again: pairs are columns i and i + head_dim / 2. Trained models have periods rounded to bfloat16; as in timm and
    Hugging Face they are float32 here. In training those may draw other coordinates at random; nothing here does.
    """
    quarter = head_dim // 4
    periods = theta ** (torch.arange(quarter, device=device) * (2 / (head_dim // 2)))
    y, x = (2 * math.pi * (2 * (torch.arange(n, device=device) + 0.5) / n - 1)[:, None] / periods for n in grid)
    rows, columns = grid
    angles = torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], dim=-1).flatten(0, 1)
    angles = angles.repeat(1, 2)
    return angles.cos(), angles.sin()
