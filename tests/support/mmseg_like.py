"""Modules with the structure, names and signatures of mmsegmentation's Segmenter (1.2) and mmcv's layers (2.1), written
anew for tests: norms behind properties, a wrapper around nn.MultiheadAttention that adds the residual, feed-forward
layers in nested Sequentials, linear layers of a class of their own.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class Linear(nn.Linear):
    """A subclass that computes the same."""

    def forward(self, x):
        return super().forward(x)


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x.div(keep) * (keep + torch.rand(len(x), 1, 1, dtype=x.dtype)).floor()


class MultiheadAttention(nn.Module):
    def __init__(self, embed_dims, num_heads, attn_drop=0.0, proj_drop=0.0, batch_first=True):
        super().__init__()
        self.init_cfg, self._is_init = None, False
        self.embed_dims, self.num_heads, self.batch_first = embed_dims, num_heads, batch_first
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dropout_layer = nn.Dropout(0.0)

    def forward(self, query, key=None, value=None, identity=None, query_pos=None, attn_mask=None, **kwargs):
        key = query if key is None else key
        value = key if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        out = self.attn(query=query, key=key, value=value, attn_mask=attn_mask)[0]
        out = out.transpose(0, 1) if self.batch_first else out
        return identity + self.dropout_layer(self.proj_drop(out))


class FFN(nn.Module):
    def __init__(self, embed_dims, hidden, ffn_drop=0.0, drop_path=0.0):
        super().__init__()
        self.init_cfg, self.add_identity = None, True
        first = nn.Sequential(Linear(embed_dims, hidden), nn.GELU(), nn.Dropout(ffn_drop))
        self.layers = nn.Sequential(first, Linear(hidden, embed_dims), nn.Dropout(ffn_drop))
        self.dropout_layer = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma2 = nn.Identity()

    def forward(self, x, identity=None):
        out = self.gamma2(self.layers(x))
        if not self.add_identity:
            return self.dropout_layer(out)
        return (x if identity is None else identity) + self.dropout_layer(out)


class TransformerEncoderLayer(nn.Module):
    def __init__(self, embed_dims, num_heads, drop_rate=0.0, drop_path_rate=0.0, eps=1e-6):
        super().__init__()
        self.norm1_name, self.norm2_name = "ln1", "ln2"
        self.add_module(self.norm1_name, nn.LayerNorm(embed_dims, eps=eps))
        self.attn = MultiheadAttention(embed_dims, num_heads, proj_drop=drop_rate)
        self.add_module(self.norm2_name, nn.LayerNorm(embed_dims, eps=eps))
        self.ffn = FFN(embed_dims, 4 * embed_dims, drop_rate, drop_path_rate)
        self.with_cp = False

    norm1 = property(lambda self: getattr(self, self.norm1_name))
    norm2 = property(lambda self: getattr(self, self.norm2_name))

    def forward(self, x):
        def inner(x):
            x = self.attn(self.norm1(x), identity=x)
            return self.ffn(self.norm2(x), identity=x)

        return checkpoint(inner, x, use_reentrant=False) if self.with_cp and x.requires_grad else inner(x)


class SegmenterMaskTransformerHead(nn.Module):
    def __init__(self, in_channels, num_classes, num_layers, num_heads, embed_dims):
        super().__init__()
        self.in_index, self.num_classes = -1, num_classes
        self.init_cfg = {"type": "Normal"}
        self.layers = nn.ModuleList(TransformerEncoderLayer(embed_dims, num_heads, eps=1e-5) for _ in range(num_layers))
        self.dec_proj = nn.Linear(in_channels, embed_dims)
        self.cls_emb = nn.Parameter(torch.randn(1, num_classes, embed_dims))
        self.patch_proj = nn.Linear(embed_dims, embed_dims, bias=False)
        self.classes_proj = nn.Linear(embed_dims, embed_dims, bias=False)
        self.decoder_norm = nn.LayerNorm(embed_dims)
        self.mask_norm = nn.LayerNorm(num_classes)

    def _transform_inputs(self, inputs):
        return inputs[self.in_index]

    def forward(self, inputs):
        x = self._transform_inputs(inputs)
        b, c, h, w = x.shape
        x = self.dec_proj(x.permute(0, 2, 3, 1).contiguous().view(b, -1, c))
        x = torch.cat((x, self.cls_emb.expand(x.size(0), -1, -1)), 1)
        for layer in self.layers:
            x = layer(x)
        x = self.decoder_norm(x)
        patches = F.normalize(self.patch_proj(x[:, : -self.num_classes]), dim=2, p=2)
        classes = F.normalize(self.classes_proj(x[:, -self.num_classes :]), dim=2, p=2)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks.permute(0, 2, 1).contiguous().view(b, -1, h, w)


class Model(nn.Module):
    """Layers on a map of tokens, then the head."""

    def __init__(self, width=64, heads=1, layers=2, num_classes=5, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(TransformerEncoderLayer(width, heads, **kwargs) for _ in range(layers))
        self.decode_head = SegmenterMaskTransformerHead(width, num_classes, 1, heads, width)

    def forward(self, maps):
        x = maps.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.decode_head([x.transpose(1, 2).reshape(maps.shape)])
