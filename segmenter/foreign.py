"""Names of other projects -> ours; the only place that knows them. See `segmenter.convert` for the whole conversion."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn

from segmenter.checkpoint import CheckpointError, listing
from segmenter.model import ENCODER_HEAD_CLASSES

State = dict[str, torch.Tensor]
KINDS = ("segmenter", "mmseg", "timm", "npz", "hf")
# How each project builds its encoder: LayerNorm epsilon, and the resampling of the position embedding.
DEFAULTS = {
    "segmenter": {"norm_eps": 1e-5, "pos_embed_mode": "bilinear"},
    "mmseg": {"norm_eps": 1e-6, "pos_embed_mode": "bicubic"},
    "timm": {"norm_eps": 1e-6, "pos_embed_mode": "bilinear"},
    "npz": {"norm_eps": 1e-6, "pos_embed_mode": "bilinear"},
    "hf": {"norm_eps": 1e-12, "pos_embed_mode": "bicubic"},
}
_MARKS = {  # a name that only this kind has
    "segmenter": r"encoder\.patch_embed\.proj\.weight$",
    "mmseg": r"(backbone\.)?patch_embed\.projection\.weight$",
    "hf": r"((vit|deit)\.)?embeddings\.patch_embeddings\.projection\.weight$",
    "npz": r"(opt/target/)?embedding/kernel$",
    "timm": r"patch_embed\.proj\.weight$",
}
_BLOCK = r"blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
_OURS = re.compile(
    rf"(encoder|decoder)\.{_BLOCK}$|encoder\.(cls_token|dist_token|pos_embed)$"
    r"|encoder\.(patch_embed\.proj|norm|head|head_dist)\.(weight|bias)$"
    r"|decoder\.(cls_emb|proj_patch|proj_classes)$|decoder\.(head|proj_dec|decoder_norm|mask_norm)\.(weight|bias)$"
)
_UNSUPPORTED = {  # what the Segmenter encoder has not, by a part of the name
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    "q_norm.": "qk-norm",
    "fc_norm.": "a norm after pooling (fc_norm) in place of the final norm",
    "norm_pre.": "a norm before the blocks (CLIP)",
    "relative_position": "relative positions (BEiT)",
    "mlp.w12.": "a gated MLP (SwiGLU)",
    "conv_root/": "a ResNet stem (hybrid)",
    "attn_pool.": "attention pooling",
}


def recognise(names: Iterable[str]) -> str | None:
    """The kind (one of KINDS) that weights with these names are, or None."""
    names = [str(name) for name in names]
    return next((kind for kind, mark in _MARKS.items() if any(re.match(mark, name) for name in names)), None)


def to_ours(weights: Mapping[str, torch.Tensor], kind: str) -> tuple[State, dict[str, Any], list[str]]:
    """Renames, transposes, folds and completes the weights of a `kind` of project.

    Returns:
        (state dict with the names of the published Segmenter, new tensors in float32; ModelConfig fields that only
        the foreign layout tells; notes for people). Weights of kind "segmenter" come back as they are.
    Raises:
        CheckpointError: a feature that the Segmenter encoder has not, or names that do not belong to the kind.
    """
    if kind == "segmenter":
        return dict(weights), {}, []
    for part, feature in _UNSUPPORTED.items():
        if any(part in name for name in weights):
            raise CheckpointError(f"these {kind} weights have {feature}, which the Segmenter encoder has not")
    notes: list[str] = []
    fields: dict[str, Any] = {}
    ours = {k: v.to(torch.float32, copy=True) for k, v in weights.items() if v.is_floating_point()}
    try:
        if kind == "mmseg":
            ours = _mmseg(ours, notes)
        elif kind == "timm":
            ours = _timm(ours, notes)
        elif kind == "npz":
            ours = _npz(ours, fields)
        else:
            ours = _hf(ours)
        odd = [name for name in ours if not _OURS.match(name)]
        if odd:
            raise CheckpointError(f"these {kind} weights have parts that a Segmenter has not: {listing(odd)}")
        _complete(ours, notes)
    except KeyError as error:
        raise CheckpointError(f"these {kind} weights lack {error.args[0]}") from error
    return ours, fields, notes


def live_timm(model: nn.Module) -> tuple[State, dict[str, Any]]:
    """State dict of a live timm VisionTransformer, and what only the live model tells (ModelConfig fields).

    Raises:
        CheckpointError: the model is no plain ViT.
    """
    try:
        block, eps = model.blocks[0], getattr(model.norm, "eps", None)  # no norm: its absence is told by the names
        heads, acts = block.attn.num_heads, [b.mlp.act for b in model.blocks]
    except (AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{type(model).__name__} is no plain VisionTransformer of timm ({error})") from error
    if not all(isinstance(act, nn.GELU) and act.approximate == "none" for act in acts):
        raise CheckpointError(f"the MLP uses {type(acts[0]).__name__}; the Segmenter encoder needs the exact GELU")
    fields = {"n_heads": heads, "norm_eps": eps}
    mean = (getattr(model, "pretrained_cfg", None) or {}).get("mean")
    if mean is not None:
        fields["normalization"] = "vit" if tuple(mean) == (0.5, 0.5, 0.5) else "deit"
    return dict(model.state_dict()), fields


def hugging_face_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a Hugging Face ViT tells beyond its weights, as ModelConfig fields.

    Raises:
        CheckpointError: the MLP does not use the exact GELU.
    """
    act = config.get("hidden_act", "gelu")
    if act != "gelu":
        raise CheckpointError(f"hidden_act is {act!r}; the Segmenter encoder needs the exact gelu")
    fields = {"norm_eps": config.get("layer_norm_eps"), "n_heads": config.get("num_attention_heads")}
    return {name: value for name, value in fields.items() if value is not None}


def _rename(weights: State, rules: list[tuple[str, str]]) -> State:
    """Applies every regular-expression rule in turn to every name; what becomes empty is dropped."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name:
            renamed[name] = tensor
    return renamed


def _mmseg(weights: State, notes: list[str]) -> State:
    if not any(name.startswith(("backbone.", "decode_head.")) for name in weights):  # a file for pretraining
        weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    is_mask = "decode_head.cls_emb" in weights
    if is_mask and any(name.startswith("decode_head.conv_seg.") for name in weights):
        notes.append("decode_head.conv_seg dropped, the mask transformer does not use it")
    for name in ("decode_head.patch_proj.weight", "decode_head.classes_proj.weight"):
        if is_mask:
            weights[name] = weights[name].T.contiguous()  # a Linear there, a matrix on the right here
    if not is_mask and "decode_head.conv_seg.weight" in weights:
        weights["decode_head.conv_seg.weight"] = weights["decode_head.conv_seg.weight"].flatten(1)
    return _rename(
        weights,
        [
            (
                r"^decode_head\.conv_seg\..*" if is_mask else r"^decode_head\.conv_seg\.",
                "" if is_mask else "decoder.head.",
            ),
            (r"^backbone\.head\..*", ""),
            (r"\.layers\.(\d+)\.ln", r".blocks.\1.norm"),
            (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
            (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
            (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
            (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
            (r"\.layers\.(\d+)\.", r".blocks.\1."),
            (r"^backbone\.ln1\.", "encoder.norm."),
            (r"^backbone\.patch_embed\.projection\.", "encoder.patch_embed.proj."),
            (r"^decode_head\.dec_proj\.", "decoder.proj_dec."),
            (r"^decode_head\.(patch|classes)_proj\.weight$", r"decoder.proj_\1"),
            (r"^backbone\.", "encoder."),
            (r"^decode_head\.", "decoder."),
        ],
    )


def _timm(weights: State, notes: list[str]) -> State:
    scales = [name for name in weights if re.search(r"\.(ls[12]\.gamma|gamma_[12])$", name)]
    for name in scales:
        gamma = weights.pop(name)
        block, which = re.match(r"(.*blocks\.\d+\.).*([12])", name).groups()
        layer = block + ("attn.proj." if which == "1" else "mlp.fc2.")
        weights[layer + "weight"] *= gamma[:, None]
        weights[layer + "bias"] *= gamma
    if scales:
        notes.append("LayerScale folded into attn.proj and mlp.fc2 (exact)")
    positions = weights["pos_embed"]
    if positions.ndim == 3 and positions.shape[1] > 1 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        extra = torch.zeros(1, 2 if "dist_token" in weights else 1, positions.shape[2])
        weights["pos_embed"] = torch.cat([extra, positions], dim=1)  # DeiT-III: the class token gets no position
        notes.append("position embedding of patches only: zeros added for the class token (exact)")
    return _rename(weights, [(r"^(mask_token|pre_logits\..*)$", ""), (r"^(?=.)", "encoder.")])


def _npz(weights: State, fields: dict[str, Any]) -> State:
    weights = {name.removeprefix("opt/target/"): array for name, array in weights.items()}
    ours: State = {}
    for name, array in weights.items():
        if name.endswith("/query/kernel"):
            fields["n_heads"] = array.shape[1]
        if re.search(r"/(query|key|value)/kernel$", name):
            array = array.flatten(1).T  # (d, heads, 64)
        elif name.endswith("/out/kernel"):
            array = array.flatten(0, 1).T  # (heads, 64, d)
        elif name == "embedding/kernel":
            array = array.permute(3, 2, 0, 1)
        elif name.endswith("/kernel"):
            array = array.T
        elif re.search(r"/(query|key|value)/bias$", name):
            array = array.flatten()
        ours[name] = array.contiguous()
    ours = _rename(
        ours,
        [
            (r"^pre_logits/.*", ""),
            (r"/(kernel|scale)$", ".weight"),
            (r"/bias$", ".bias"),
            (r"^embedding\.", "patch_embed.proj."),
            (r"^cls$", "cls_token"),
            (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
            (r"^Transformer/encoder_norm\.", "norm."),
            (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
            (r"LayerNorm_0\.", "norm1."),
            (r"LayerNorm_2\.", "norm2."),
            (r"MultiHeadDotProductAttention_1/out\.", "attn.proj."),
            (r"MultiHeadDotProductAttention_1/([qkv])\w+\.", r"attn.\1."),
            (r"MlpBlock_3/Dense_0\.", "mlp.fc1."),
            (r"MlpBlock_3/Dense_1\.", "mlp.fc2."),
            (r"^(?=.)", "encoder."),
        ],
    )
    return _join_qkv(ours)


def _hf(weights: State) -> State:
    ours = _rename(
        weights,
        [
            (r"^(vit|deit)\.", ""),
            (r"^pooler\..*|^embeddings\.mask_token$", ""),
            (r"^embeddings\.distillation_token$", "dist_token"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^embeddings\.", ""),
            (r"^(encoder\.layer|layers)\.", "blocks."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
            (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
            (r"^layernorm\.", "norm."),
            (r"^(cls_)?classifier\.", "head."),
            (r"^distillation_classifier\.", "head_dist."),
            (r"^(?=.)", "encoder."),
        ],
    )
    return _join_qkv(ours)


def _join_qkv(state: State) -> State:
    """attn.q, attn.k, attn.v -> attn.qkv, rows in this order."""
    for name in [n for n in state if ".attn.q." in n]:
        parts = [state.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return state


def _complete(state: State, notes: list[str]) -> None:
    """Adds what every published checkpoint holds and other projects leave out; zeros keep the result exact."""
    d_model = state["encoder.patch_embed.proj.weight"].shape[0]
    n_extra = 2 if "encoder.dist_token" in state else 1
    wanted = {"encoder.patch_embed.proj.bias": (d_model,)}
    for name in state:
        if name.endswith(".attn.qkv.weight"):
            wanted[name.replace("weight", "bias")] = (3 * d_model,)
    for head in ("head", "head_dist")[:n_extra]:
        wanted[f"encoder.{head}.weight"] = (ENCODER_HEAD_CLASSES, d_model)
        wanted[f"encoder.{head}.bias"] = (ENCODER_HEAD_CLASSES,)
    absent = [name for name in wanted if name not in state]
    other = [name for name in wanted if ".head" in name and name in state and state[name].shape != wanted[name]]
    state.update({name: torch.zeros(wanted[name]) for name in absent + other})
    if absent:
        notes.append(f"not in the file, zeros: {listing(absent)}")
    if other:
        notes.append(f"replaced by zeros, an ImageNet head that segmentation does not use: {listing(other)}")
    if n_extra == 1:
        for name in [n for n in state if n.startswith("encoder.head_dist.")]:
            del state[name]
