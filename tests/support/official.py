"""Modules with the structure, names and signatures of the published Segmenter, written anew for tests.

`Attention` and `Block` take a mask (and ignore it), attention returns its map too, one stochastic depth serves both
halves, and the checkpoint's names fit. `load` builds one for a golden case.
"""

import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml


class DropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.drop_prob or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x / keep * (torch.rand(len(x), 1, 1, dtype=x.dtype) < keep)


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.attn = None
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))), attn


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_dim, dropout, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, dropout)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x, mask=None, return_attention=False):
        y, attn = self.attn(self.norm1(x), mask)
        if return_attention:
            return attn
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, im):
        return self.proj(im).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, image_size, patch_size, n_layers, d_model, n_heads, dropout, drop_path_rate, distilled):
        super().__init__()
        self.patch_embed = PatchEmbedding(patch_size, d_model)
        self.patch_size, self.distilled = patch_size, distilled
        self.grid = tuple(side // patch_size for side in image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, d_model))
            self.head_dist = nn.Linear(d_model, 1000)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + distilled + math.prod(self.grid), d_model))
        rates = torch.linspace(0, drop_path_rate, n_layers).tolist()
        self.blocks = nn.ModuleList(Block(d_model, n_heads, 4 * d_model, dropout, rate) for rate in rates)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, 1000)

    def embed(self, im):
        extra = [self.cls_token] + ([self.dist_token] if self.distilled else [])
        x = torch.cat([t.expand(len(im), -1, -1) for t in extra] + [self.patch_embed(im)], 1)
        pos, n = self.pos_embed, len(extra)
        if pos.shape[1] != x.shape[1]:
            grid = pos[:, n:].reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
            size = tuple(side // self.patch_size for side in im.shape[2:])
            grid = F.interpolate(grid, size, mode="bilinear")
            pos = torch.cat([pos[:, :n], grid.flatten(2).transpose(1, 2)], 1)
        return x + pos

    def forward(self, im, return_features=False):
        x = self.embed(im)
        for blk in self.blocks:
            x = blk(x)
        return self.norm(x) if return_features else self.head(self.norm(x)[:, 0])

    def get_attention_map(self, im, layer_id):
        x = self.embed(im)
        for blk in self.blocks[:layer_id]:
            x = blk(x)
        return self.blocks[layer_id](x, return_attention=True)


class DecoderLinear(nn.Module):
    def __init__(self, n_cls, patch_size, d_encoder):
        super().__init__()
        self.patch_size = patch_size
        self.head = nn.Linear(d_encoder, n_cls)

    def forward(self, x, im_size):
        return self.head(x).transpose(1, 2).unflatten(2, (im_size[0] // self.patch_size, -1))


class MaskTransformer(nn.Module):
    def __init__(self, n_cls, patch_size, d_model, n_layers, n_heads, drop_path_rate, dropout):
        super().__init__()
        self.patch_size, self.n_cls, self.scale = patch_size, n_cls, d_model**-0.5
        rates = torch.linspace(0, drop_path_rate, n_layers).tolist()
        self.blocks = nn.ModuleList(Block(d_model, n_heads, 4 * d_model, dropout, rate) for rate in rates)
        self.cls_emb = nn.Parameter(torch.randn(1, n_cls, d_model))
        self.proj_dec = nn.Linear(d_model, d_model)
        self.proj_patch = nn.Parameter(self.scale * torch.randn(d_model, d_model))
        self.proj_classes = nn.Parameter(self.scale * torch.randn(d_model, d_model))
        self.decoder_norm = nn.LayerNorm(d_model)
        self.mask_norm = nn.LayerNorm(n_cls)

    def tokens(self, x):
        return torch.cat((self.proj_dec(x), self.cls_emb.expand(x.size(0), -1, -1)), 1)

    def forward(self, x, im_size):
        x = self.tokens(x)
        for blk in self.blocks:
            x = blk(x)
        x = self.decoder_norm(x)
        patches, classes = x[:, : -self.n_cls] @ self.proj_patch, x[:, -self.n_cls :] @ self.proj_classes
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks.transpose(1, 2).unflatten(2, (im_size[0] // self.patch_size, -1))

    def get_attention_map(self, x, layer_id):
        x = self.tokens(x)
        for blk in self.blocks[:layer_id]:
            x = blk(x)
        return self.blocks[layer_id](x, return_attention=True)


class Segmenter(nn.Module):
    def __init__(self, encoder, decoder, n_cls):
        super().__init__()
        self.n_cls, self.patch_size = n_cls, encoder.patch_size
        self.encoder, self.decoder = encoder, decoder

    def forward(self, im):
        H, W = im.shape[2:]
        im = F.pad(im, (0, -W % self.patch_size, 0, -H % self.patch_size))
        x = self.encoder(im, return_features=True)[:, 1 + self.encoder.distilled :]
        masks = F.interpolate(self.decoder(x, im.shape[2:]), size=im.shape[2:], mode="bilinear")
        return masks[..., :H, :W]

    def get_attention_map_enc(self, im, layer_id):
        return self.encoder.get_attention_map(im, layer_id)

    def get_attention_map_dec(self, im, layer_id):
        x = self.encoder(im, return_features=True)[:, 1 + self.encoder.distilled :]
        return self.decoder.get_attention_map(x, layer_id)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node)))


def load(case: Path, dropout: float | None = None) -> Segmenter:
    """The model of a golden case with its weights, all of which must fit. In evaluation mode."""
    net = yaml.load((case / "variant.yml").read_text(), _Loader)["net_kwargs"]
    d, patch, drop = net["d_model"], net["patch_size"], net["dropout"] if dropout is None else dropout
    distilled = net.get("distilled", False)
    encoder = VisionTransformer(
        net["image_size"], patch, net["n_layers"], d, net["n_heads"], drop, net["drop_path_rate"], distilled
    )
    spec = net["decoder"]
    if spec["name"] == "linear":
        decoder = DecoderLinear(net["n_cls"], patch, d)
    else:
        drop = spec["dropout"] if dropout is None else dropout
        decoder = MaskTransformer(net["n_cls"], patch, d, spec["n_layers"], d // 64, spec["drop_path_rate"], drop)
    model = Segmenter(encoder, decoder, net["n_cls"])
    model.load_state_dict(torch.load(case / "checkpoint.pth", weights_only=True)["model"], strict=True)
    return model.eval()
