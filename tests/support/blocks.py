"""Transformer blocks of the structures that `accelerate` knows, for tests: of width 32 with two heads."""

import copy

import torch
import torch.nn as nn

from segmenter.dropin.accelerate import accelerate, restore
from tests.support import mmseg_like, official

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIGHT = {"atol": 1e-4, "rtol": 1e-4}
WIDTH = 32
ATTENTION, MLP = ["layernorm_linear", "attention", "linear"], ["layernorm_mlp"]
OF_THREE = ["cross_attention", "attention", "linear"]  # the operator, and its kernel
SEPARATE = ["layernorm", *3 * ["linear"], *OF_THREE]
ROTARY, SEPARATE_ROTARY = ["layernorm_linear", "rotate", *OF_THREE], [*SEPARATE[:4], *2 * ["rotate"], *OF_THREE]
HALVES = {
    "packed": ATTENTION, "packed rotary": ROTARY, "packed normed": ["layernorm_linear", *OF_THREE],
    "separate": SEPARATE, "separate rotary": SEPARATE_ROTARY,
}  # fmt: skip


def assert_same_gradients(module, twin, frozen):
    """Of two blocks of the same weights, in training, of which the layer `frozen` (or None) gets no gradient."""
    x, grads = tokens(batch=2), []
    for m in (module, twin):
        if frozen:
            m.get_submodule(frozen).requires_grad_(False)
        y = m(x.requires_grad_())
        (y * tokens(batch=2, seed=9)).sum().backward()
        grads.append({"x": x.grad.clone(), **{n: p.grad for n, p in m.named_parameters()}})
        x.grad = None
    for name, want in grads[1].items():
        assert (want is None) == (frozen is not None and name.startswith(frozen))
        if want is not None:
            torch.testing.assert_close(grads[0][name], want, atol=1e-4, rtol=1e-3, msg=name)
            assert want.abs().max() > 0.01


class PlainAttention(nn.Module):
    """As timm's: returns the tokens alone, takes a mask."""

    def __init__(self, dim=WIDTH, num_heads=2, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)

    def forward(self, x, attn_mask=None, is_causal=False):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q * self.scale @ k.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.full((N, N), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        scores = scores if attn_mask is None else scores + attn_mask
        x = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class LayerScale(nn.Module):
    """As timm's and DINOv2's: a factor for each column."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return x * self.gamma


class PlainBlock(official.Block):
    """As timm's: masks reach the attention."""

    def __init__(self, dropout=0.0, drop_path=0.0):
        super().__init__(WIDTH, 2, 2 * WIDTH, dropout, drop_path)
        self.attn = PlainAttention(attn_drop=dropout, proj_drop=dropout)

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ScaledBlock(PlainBlock):
    """With a LayerScale in each half."""

    def __init__(self, dropout=0.0, drop_path=0.0):
        super().__init__(dropout, drop_path)
        self.ls1, self.ls2 = LayerScale(), LayerScale()

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Settings:
    """As the configuration that layers of transformers hold: how scores become probabilities."""

    def __init__(self):
        self.probabilities, self.labels = "softmax", {0: "a"}


class SeparateAttention(nn.Module):
    """As transformers': a layer each for q, k (without bias) and v; returns the attention map too."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.config, self.num_attention_heads, self.attention_dropout = Settings(), 2, dropout
        self.k_proj, self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, attention_mask=None, is_causal=False):
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(hidden_states).unflatten(2, (2, -1)).transpose(1, 2) for layer in layers)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores if attention_mask is None else scores + attention_mask
        weights = scores.softmax(-1) if self.config.probabilities == "softmax" else scores.sigmoid()
        weights = nn.functional.dropout(weights, self.attention_dropout, self.training)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2)), weights


class SeparateMlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.activation_fn = config, nn.GELU()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SeparateBlock(nn.Module):
    """As transformers'."""

    def __init__(self, dropout=0.0, drop_path=0.0):
        super().__init__()
        self.attention = SeparateAttention(dropout)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = SeparateMlp(self.attention.config)
        self.layer_scale1, self.layer_scale2 = LayerScale(), LayerScale()
        self.dropout = official.DropPath(drop_path) if drop_path else nn.Dropout(dropout)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = self.dropout(self.layer_scale1(attended)) + hidden_states
        return self.dropout(self.layer_scale2(self.mlp(self.layernorm_after(hidden_states)))) + hidden_states


KINDS = {  # the structures: (block, where its layers are)
    "packed": (PlainBlock, {}),
    "scaled": (ScaledBlock, {}),
    "separate": (
        SeparateBlock,
        {
            "attn": "attention", "attn.qkv": "attention.k_proj", "attn.proj": "attention.o_proj",
            "mlp.act": "mlp.activation_fn", "norm1": "layernorm_before", "norm2": "layernorm_after",
        },
    ),
    "tuple": (lambda **kw: official.Block(WIDTH, 2, 2 * WIDTH, kw.get("dropout", 0.0), kw.get("drop_path", 0.0)), {}),
    "wrapped": (
        lambda **kw: mmseg_like.TransformerEncoderLayer(WIDTH, 2, kw.get("dropout", 0.0), kw.get("drop_path", 0.0)),
        {
            "norm1": "ln1", "norm2": "ln2", "attn.proj": "attn.attn.out_proj", "attn.proj_drop": "attn.proj_drop",
            "mlp": "ffn", "mlp.fc1": "ffn.layers.0.0", "mlp.act": "ffn.layers.0.1", "mlp.fc2": "ffn.layers.1",
            "mlp.drop": "ffn.layers.2",
        },
    ),
}  # fmt: skip


def block(kind="packed", accelerated=True, seed=0, **kwargs):
    torch.manual_seed(seed)
    made = KINDS[kind][0](**kwargs).to(DEVICE).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    if accelerated:
        assert accelerate(made).swapped
    return made


def tokens(seed=1, batch=1, **kwargs):
    return torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE, **kwargs)


def original(module):
    """A copy with the original classes."""
    twin = copy.deepcopy(module)
    restore(twin)
    return twin


def replace(module, path, make):
    parent, _, name = path.rpartition(".")
    parent = module.get_submodule(parent)
    setattr(parent, name, make(getattr(parent, name)))


def attention_of(kind):
    """What runs where the attention half of a block of this structure is fused."""
    return SEPARATE if kind == "separate" else ATTENTION


def where(kind, path):
    return KINDS[kind][1].get(path, path)
