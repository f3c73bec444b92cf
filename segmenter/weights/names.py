"""Names of other projects -> ours; the only place that knows them. `weights.convert` has the conversion."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from segmenter.errors import cause
from segmenter.model import ENCODER_HEAD_CLASSES
from segmenter.weights.read import CheckpointError, listing
from segmenter.weights.recognise import State, check_dimensions

# How each project builds its encoder: LayerNorm epsilon, and the resampling of the position embedding.
DEFAULTS = {
    "segmenter": {"norm_eps": 1e-5, "pos_embed_mode": "bilinear"},
    "mmseg": {"norm_eps": 1e-6, "pos_embed_mode": "bicubic"},
    "timm": {"norm_eps": 1e-6, "pos_embed_mode": "bilinear"},
    "npz": {"norm_eps": 1e-6, "pos_embed_mode": "bilinear"},
    "hf": {"norm_eps": 1e-12, "pos_embed_mode": "bicubic", "pos_embed_check": "grid"},
}
# And its newer encoders: DeiT-III, DINOv2 and models with registers, all but timm's of ImageNet's statistics.
_NEWER = {"norm_eps": 1e-6, "pos_embed_check": "grid", "normalization": "deit"}
_ROTARY = {"norm_eps": 1e-5, "pos_embed": "rotary"}  # over those, DINOv3
_RESAMPLED = "bicubic_antialias"  # their positions, by timm; by Hugging Face those of models with registers
_BLOCK = r"blocks\.\d{1,4}\.((norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)|ls[12]\.gamma)"
_OURS = re.compile(
    rf"(encoder|decoder)\.{_BLOCK}$|encoder\.(cls_token|dist_token|reg_token|pos_embed)$"
    r"|encoder\.(patch_embed\.proj|norm|head|head_dist)\.(weight|bias)$"
    r"|decoder\.(cls_emb|proj_patch|proj_classes)$|decoder\.(head|proj_dec|decoder_norm|mask_norm)\.(weight|bias)$"
)
_SOURCE_DIMENSIONS = {  # of theirs, where the layout differs
    "mmseg": ((r"decode_head\.(patch|classes)_proj\.weight$", 2), (r"decode_head\.conv_seg\.weight$", 4)),
    "timm": ((r"(ls[12]\.gamma|gamma_[12])$", 1),),
    "npz": (
        (r"/(query|key|value|out)/kernel$", 3),
        (r"/(query|key|value)/bias$", 2),
        (r"embedding/kernel$", 4),
        (r"/kernel$", 2),
        (r"/(bias|scale)$", 1),
    ),
    "hf": (),
}
_REQUIRED = {  # what every plain ViT has -> what is missing without it
    "encoder.pos_embed": " (absolute positions)",
    "encoder.patch_embed.proj.weight": "",
}


def to_ours(
    weights: Mapping[str, torch.Tensor], kind: str, rotary: bool = False
) -> tuple[State, dict[str, Any], list[str]]:
    """Renames, transposes, folds and completes the weights of a `kind` of project.

    rotary: they are said to be DINOv3's, which have no learned positions.

    Returns:
        (state dict with the names of the published Segmenter, new tensors in float32; ModelConfig fields that only
        the foreign layout tells; notes for people). Weights of kind "segmenter" come back as they are.
    Raises:
        CheckpointError: names that do not belong to the kind, or tensors of other dimensions than their names imply.
    """
    if kind == "segmenter":
        return dict(weights), {}, []
    notes: list[str] = []
    fields: dict[str, Any] = {**_NEWER, **_ROTARY} if rotary else {}
    ours = {k: v.to(torch.float32, copy=True) if v.is_floating_point() else v for k, v in weights.items()}
    check_dimensions(ours, _SOURCE_DIMENSIONS[kind])
    try:
        if kind == "mmseg":
            ours = _mmseg(ours, notes)
        elif kind == "timm":
            ours = _timm(ours, fields, notes)
        elif kind == "npz":
            ours = _npz(ours, fields)
        else:
            ours = _hf(ours, fields)
        for name, meaning in _REQUIRED.items():
            if name not in ours and (name, fields.get("pos_embed")) != ("encoder.pos_embed", "rotary"):
                raise KeyError(name.removeprefix("encoder.") + meaning)
        odd = [name for name in ours if not _OURS.match(name)]
        if odd:
            raise CheckpointError(f"these {kind} weights have parts that a Segmenter has not: {listing(odd)}")
        check_dimensions(ours)
        norms = [name for name in ours if re.search(r"norm\w*\.weight$", name)]
        if norms and not any(name.removesuffix("weight") + "bias" in ours for name in norms):
            raise CheckpointError(f"these {kind} weights have norms without bias (RMSNorm), which a Segmenter has not")
        _complete(ours, notes)
    except KeyError as error:
        raise CheckpointError(f"these {kind} weights lack {error.args[0]}") from error
    except (RuntimeError, TypeError) as error:  # tensors that cannot be joined, a dtype that cannot be computed with
        raise CheckpointError(f"these {kind} weights do not fit together ({cause(error)})") from error
    return ours, fields, notes


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
            (r"^decode_head\.conv_seg\..*", "") if is_mask else (r"^decode_head\.conv_seg\.", "decoder.head."),
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


def _timm(weights: State, fields: dict[str, Any], notes: list[str]) -> State:
    """Of timm's own names, and those of facebookresearch: deit (DeiT-III), dinov2 and dinov3."""
    periods = weights.get("rope_embed.periods")
    ours = _rename(
        weights,
        [
            (r"^(mask_token|pre_logits\..*|rope(_embed)?\.periods|.*\.attn\.qkv\.bias_mask|local_cls_norm\..*)$", ""),
            (r"^(register|storage)_tokens$", "reg_token"),
            (r"\.gamma_([12])$", r".ls\1.gamma"),
            (r"^(?=.)", "encoder."),
        ],
    )
    if periods is not None:
        _check_periods(periods)
        fields |= {**_NEWER, **_ROTARY}
    for name in [n for n in ours if n.endswith((".attn.q_bias", ".attn.qkv.bias"))]:  # of DINOv3: keys have none
        if name.endswith("q_bias"):
            q, v = ours.pop(name), ours.pop(name.replace("q_bias", "v_bias"))
            ours[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
        elif name.removeprefix("encoder.") + "_mask" in weights:
            ours[name] = ours[name].nan_to_num(0.0).unflatten(0, (3, -1)) * torch.tensor([[1.0], [0.0], [1.0]])
            ours[name] = ours[name].flatten()
    if "register_tokens" in weights:
        _positions_of_patches(ours, fields)
    if any(name.startswith("encoder.fc_norm.") for name in ours):
        fields |= {"class_token": "encoder.cls_token" in ours, "final_norm": "encoder.norm.weight" in ours}
        ours = {n: t for n, t in ours.items() if not n.startswith(("encoder.fc_norm.", "encoder.head."))}
        notes.append("left out: fc_norm and the head, which are for the mean of all patches")
    if "encoder.blocks.0.ls1.gamma" in ours or "encoder.reg_token" in ours or "encoder.cls_token" not in ours:
        fields |= {**_NEWER, "pos_embed_mode": _RESAMPLED, **(_ROTARY if fields.get("pos_embed") == "rotary" else {})}
    return ours


def _check_periods(periods: torch.Tensor) -> None:
    """Raises CheckpointError: they are not those of DINOv3, which lie rounded to bfloat16 in its files."""
    usual = 100.0 ** (torch.arange(len(periods)) / len(periods))
    if not torch.allclose(periods.float(), usual, rtol=1e-2):
        raise CheckpointError(f"rotary positions with the periods {periods.tolist()!r:.80}, other ones than DINOv3's")


def _positions_of_patches(ours: State, fields: dict[str, Any]) -> None:
    """Adds the position of the class token to it, so that patches alone have positions, as timm converts these models.

    For models that put registers, without positions, between a class token and patches that have some.
    """
    positions = ours["encoder.pos_embed"]
    ours["encoder.cls_token"] = ours["encoder.cls_token"] + positions[:, :1]
    ours["encoder.pos_embed"] = positions[:, 1:].contiguous()
    fields["pos_embed"] = "patches"


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


def _hf(weights: State, fields: dict[str, Any]) -> State:
    ours = _rename(
        weights,
        [
            (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
            (r"^pooler\..*|^embeddings\.(mask_token|position_ids)$", ""),
            (r"^embeddings\.distillation_token$", "dist_token"),
            (r"^embeddings\.register_tokens$", "reg_token"),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
            (r"^embeddings\.", ""),
            (r"^(encoder\.layer|layers|(model\.)?layer)\.", "blocks."),
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
    if "encoder.blocks.0.ls1.gamma" in ours:
        fields |= _NEWER
    if "encoder.pos_embed" not in ours and "encoder.norm.weight" in ours:  # DINOv3
        fields |= {**_NEWER, **_ROTARY}
    elif "encoder.reg_token" in ours:
        fields["pos_embed_mode"] = _RESAMPLED
        _positions_of_patches(ours, fields)
    return _join_qkv(ours)


def _join_qkv(state: State) -> State:
    """attn.q, attn.k, attn.v -> attn.qkv, rows in this order. Keys without a bias, as DINOv3's, get zeros."""
    for name in [n for n in state if ".attn.q." in n]:
        if name.endswith(".bias"):
            state.setdefault(name.replace(".attn.q.", ".attn.k."), torch.zeros_like(state[name]))
        parts = [state.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return state


def _complete(state: State, notes: list[str]) -> None:
    """Adds what every published checkpoint holds and other projects leave out; zeros keep the result exact."""
    d_model = state["encoder.patch_embed.proj.weight"].shape[0]
    n_heads = 2 if "encoder.dist_token" in state else 1
    wanted = {"encoder.patch_embed.proj.bias": (d_model,)}
    for name in state:
        if name.endswith(".attn.qkv.weight"):
            wanted[name.replace("weight", "bias")] = (3 * d_model,)
    for head in ("head", "head_dist")[:n_heads]:
        wanted[f"encoder.{head}.weight"] = (ENCODER_HEAD_CLASSES, d_model)
        wanted[f"encoder.{head}.bias"] = (ENCODER_HEAD_CLASSES,)
    absent = [name for name in wanted if name not in state]
    other = [name for name in wanted if ".head" in name and name in state and state[name].shape != wanted[name]]
    state.update({name: torch.zeros(wanted[name]) for name in absent + other})
    if absent:
        notes.append(f"not in the file, zeros: {listing(absent)}")
    if other:
        notes.append(f"replaced by zeros, an ImageNet head that segmentation does not use: {listing(other)}")
    if n_heads == 1:
        for name in [n for n in state if n.startswith("encoder.head_dist.")]:
            del state[name]
