"""Weights in the layouts of other projects, made from random numbers."""

import re

import torch

D, LAYERS, PATCH, SIDE = 128, 2, 16, 64  # two heads of 64, a 4 x 4 grid
HF = {
    "embeddings.patch_embeddings.projection.weight": torch.zeros(64, 3, 16, 16),
    "embeddings.position_embeddings": torch.zeros(1, 17, 64),
    "embeddings.cls_token": torch.zeros(1, 1, 64),
}


def random_tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {n: t + 1 if re.search(r"(norm\w*|ln\d)\.weight$|scale$", n) else t for n, t in tensors.items()}


def jax_arrays(prefix="", **others):
    shapes = {
        "embedding/kernel": (PATCH, PATCH, 3, D),
        "embedding/bias": (D,),
        "cls": (1, 1, D),
        "Transformer/posembed_input/pos_embedding": (1, 17, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
        "head/kernel": (D, 1000),
        "head/bias": (1000,),
        **others,
    }
    for i in range(LAYERS):
        block = f"Transformer/encoderblock_{i}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}{norm}/scale": (D,), f"{block}{norm}/bias": (D,)}
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            shapes |= {f"{attention}{name}/kernel": (D, 2, D // 2), f"{attention}{name}/bias": (2, D // 2)}
        shapes |= {f"{attention}out/kernel": (2, D // 2, D), f"{attention}out/bias": (D,)}
        shapes |= {f"{block}MlpBlock_3/Dense_0/kernel": (D, 4 * D), f"{block}MlpBlock_3/Dense_0/bias": (4 * D,)}
        shapes |= {f"{block}MlpBlock_3/Dense_1/kernel": (4 * D, D), f"{block}MlpBlock_3/Dense_1/bias": (D,)}
    return {prefix + name: tensor for name, tensor in random_tensors(shapes).items()}


def to_mmseg(state, n_cls):
    """The inverse map, written independently as plain replacements."""
    theirs = {}
    for name, tensor in state.items():
        if name.startswith("encoder.head"):
            continue
        if name in ("decoder.proj_patch", "decoder.proj_classes"):
            part = name.removeprefix("decoder.proj_")
            theirs[f"decode_head.{part}_proj.weight"] = tensor.T.clone()
            continue
        if name == "decoder.head.weight":
            tensor = tensor[:, :, None, None]
        for ours, mm in [
            ("encoder.patch_embed.proj.", "backbone.patch_embed.projection."), ("encoder.norm.", "backbone.ln1."),
            ("decoder.head.", "decode_head.conv_seg."), ("decoder.proj_dec.", "decode_head.dec_proj."),
            ("encoder.", "backbone."), ("decoder.", "decode_head."), (".blocks.", ".layers."), (".norm1.", ".ln1."),
            (".norm2.", ".ln2."), (".attn.qkv.", ".attn.attn.in_proj_"), (".attn.proj.", ".attn.attn.out_proj."),
            (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."),
        ]:  # fmt: skip
            name = name.replace(ours, mm)
        theirs[name] = tensor.clone()
    if "decode_head.cls_emb" in theirs:
        theirs["decode_head.conv_seg.weight"] = torch.ones(n_cls, 64, 1, 1)
        theirs["decode_head.conv_seg.bias"] = torch.ones(n_cls)
    return theirs
