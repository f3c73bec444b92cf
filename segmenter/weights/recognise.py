"""What weights are: whose, by their names, and of which architecture, by their shapes. Found once and handed on.

Kinds of weights; all become the names of the published Segmenter, `encoder.*` and, for whole models, `decoder.*`:

    segmenter   the published checkpoints and ours
    mmseg       Segmenter of mmsegmentation, or only its pretrained ViT (with and without `backbone.`)
    timm        ViT, DeiT, DeiT-III, DINOv2, DINOv3, ViTs with registers of timm and facebookresearch, as a state dict
                or a live model
    npz         ViT of google-research/vision_transformer ("augreg", JAX)
    hf          ViT, DeiT, DINOv2 with and without registers, DINOv3 of Hugging Face transformers, as stored on the hub
                and as held in memory by version 5
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from segmenter.config import ModelConfig
from segmenter.weights.read import CheckpointError, listing

State = dict[str, torch.Tensor]
KINDS = ("segmenter", "mmseg", "timm", "npz", "hf")
_MARKS = {  # a name that only this kind has
    "segmenter": r"encoder\.patch_embed\.proj\.weight$",
    "mmseg": r"(backbone\.)?patch_embed\.projection\.weight$",
    "hf": r"((vit|deit|dinov2|dinov2_with_registers)\.)?embeddings\.patch_embeddings\.(projection\.)?weight$",
    "npz": r"(opt/target/)?embedding/kernel$",
    "timm": r"patch_embed\.proj\.weight$",
}
_DIMENSIONS = (  # of our tensors; the first that matches
    (r"(cls_token|dist_token|reg_token|pos_embed|cls_emb)$", 3),
    (r"patch_embed\.proj\.weight$", 4),
    (r"(bias|norm\w*\.weight|\.gamma)$", 1),
    (r"(\.weight|\.proj_patch|\.proj_classes)$", 2),
)
_BIASES = "biases of queries and values alone (BEiT, EVA)"
_UNSUPPORTED = (  # what the Segmenter encoder has not, by a part of the name
    (r"(^|[._])rope(?!(_embed)?\.periods$)|rotary|freqs_cis|inv_freq", "rotary positions"),
    (r"rel_pos_[hw]$", "decomposed relative positions (SAM, ViTDet)"),
    (r"relative_position|rel_pos|attention_bias|cpb_mlp", "relative positions (BEiT, Swin)"),
    (r"detection_token", "detection tokens (YOLOS)"),
    (r"\.proj_[lw]\.", "talking heads (CaiT)"),
    (r"gating_param|pos_proj\.", "gated positional attention (ConViT)"),
    (r"attn\.temperature$", "cross-covariance attention (XCiT)"),
    (r"conv_root/|patch_embed(dings)?\.(backbone|conv|proj\.\d)", "a convolutional or ResNet stem (hybrid)"),
    (r"attn_mask$|(layers|stages)\.\d+\.blocks\.|logit_scale", "windows or stages (Swin)"),
    (r"\.(q|k|query|key)_(layer)?norm\.|\.norm_[qk]\.|\.(q|k)_ln\.", "qk-norm (norms of queries and keys)"),
    (r"\.lambda_[qk]\d$|\.lambda_a$|attn\.sub_norm", "differential attention"),
    (r"attn\.gate\.", "gated attention"),
    (r"mlp\.(w12|w[0-3]|fc1_[gx]|gate_proj|weights_in)\.", "a gated MLP (SwiGLU)"),
    (r"attn\.(inner_attn_ln|ffn_ln|norm)\.|mlp\.(ffn_ln|norm)\.", "norms inside attention or MLP (BEiT-3, EVA-02)"),
    (r"\.in_proj\.|\.in_norm\.|(attns|ffns)\.\d", "parallel attention and MLP"),
    (r"attn\.[qv]_bias$", _BIASES),
    (r"(?<!\.layer_scale[12])\.lambda_?[12]$|gamma[123]$", "a layer scale of another layout (BEiT, XCiT)"),
    (r"norm_pre\.|ln_pre\.|pre_?layrnorm\.", "a norm before the blocks (CLIP)"),
    (r"patch_embed\.norm\.|patch_embed\.ln", "a norm in the patch embedding"),
    (r"attn_pool\.", "attention pooling"),
    (r"decoder_(embed|blocks|pos_embed)", "a decoder that restores masked images (MAE)"),
    (r"\.(weight|proj_patch|proj_classes)\.scale$", "scales of int8 storage (give its folder, config.json included)"),
)


@dataclass
class Recognised:
    """Weights under our names, and all that was found out about them.

    Attributes:
        state: `encoder.*` and, if `has_decoder`, `decoder.*`.
        config: the architecture. Without a decoder in the file, its decoder and n_cls are those asked for.
        kind: one of KINDS; None: nobody has looked, they are said to be ours.
        has_decoder: the file holds a whole segmentation model.
        notes: what was added, dropped or changed, for people.
        difference: from the tokens of the live model it was made from, as a share of their norm (see `live.compare`);
            None if there was nothing to compare with.
    """

    state: Mapping[str, torch.Tensor]
    config: ModelConfig
    kind: str | None = None
    has_decoder: bool = True
    notes: list[str] = field(default_factory=list)
    difference: float | None = None


def recognise(weights: Mapping[str, Any], kind: str | None = None) -> str:
    """The kind (one of KINDS) of weights: what `kind` says, else what their names say.

    Raises:
        CheckpointError: they are of no known kind.
    """
    found = kind or kind_of(weights)
    if found in KINDS:
        return found
    what = "weights of no known kind" if found is None else f"kind {found!r} is unknown"
    odd = feature(weights) if found is None else None
    raise CheckpointError(
        f"{what} (choose one of {', '.join(KINDS)}){f'; they have {odd}' if odd else ''}; "
        f"the names in the file: {listing(list(weights)) or 'none'}"
    )


def kind_of(names: Iterable[str]) -> str | None:
    """The kind (one of KINDS) that weights with these names are, or None."""
    names = [str(name) for name in names]
    return next((kind for kind, mark in _MARKS.items() if any(re.match(mark, name) for name in names)), None)


def feature(names: Iterable[str], rotary: bool = False) -> str | None:
    """What weights with these names have and the Segmenter encoder has not, by name; None if they look plain.

    rotary: they are said to be DINOv3's, where keys have no bias.
    """
    names = list(names)
    odd = (what for part, what in _UNSUPPORTED if any(re.search(part, name) for name in names))
    return next((what for what in odd if not rotary or what != _BIASES), None)


def refuse(who: str, what: str) -> CheckpointError:
    """The error for weights that have `what`, of `feature`; `who` is "MODEL has" or alike."""
    hint = "; of DINOv2 and DINOv3 the sizes S, B and L are without" if "SwiGLU" in what else ""
    return CheckpointError(f"{who} {what}, which the Segmenter encoder has not{hint}")


def check_plain(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError: something that is no tensor with values that can be computed with."""
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name} is a {type(tensor).__name__}, no tensor")
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device, it has no values; load the weights first")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise CheckpointError(f"{name} is no plain tensor (sparse, nested or quantised)")


def check_dimensions(weights: Mapping[str, torch.Tensor], dimensions: Iterable[tuple[str, int]] = _DIMENSIONS) -> None:
    """Raises CheckpointError: a tensor with another number of dimensions than its name implies, or without elements.

    Args:
        dimensions: (regular expression, number) pairs; the first that matches a name counts. By default for our names.
    """
    for name, tensor in weights.items():
        wanted = next((n for pattern, n in dimensions if re.search(pattern, name)), tensor.ndim)
        if tensor.ndim != wanted or 0 in tensor.shape:
            raise CheckpointError(f"{name} must have {wanted} dimensions and elements, found {tuple(tensor.shape)}")


def architecture(state: Mapping[str, torch.Tensor], rotary: bool = False) -> dict[str, Any]:
    """What the shapes under our names tell, as fields of ModelConfig.

    rotary: there is no position embedding. `image_size` is there only for a square one, `n_cls` and `decoder` only if
    the decoder is.

    Raises:
        CheckpointError: tensors that no Segmenter has.
    """
    for name in ("encoder.patch_embed.proj.weight", "encoder.pos_embed"):
        if name not in state and not (rotary and name == "encoder.pos_embed"):
            raise CheckpointError(f"the weights lack {name}")
    patch, positions = state["encoder.patch_embed.proj.weight"], state.get("encoder.pos_embed")
    if patch.ndim != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3] or 0 in patch.shape:
        raise CheckpointError(f"the patch embedding must be (d, 3, P, P), found {tuple(patch.shape)}")
    kinds = extra_tokens(state)
    tokens = 0 if positions is None or positions.ndim != 3 else positions.shape[1]
    least = kinds["class_token"] + kinds["distilled"]
    fits = positions is None or (tokens > least and positions.shape == (1, tokens, patch.shape[0]))
    if not fits:
        raise CheckpointError(f"the position embedding must be (1, tokens, d), found {tuple(positions.shape)}")
    check_dimensions(state)
    layers = n_blocks(state)
    arch: dict[str, Any] = {
        "patch_size": patch.shape[2],
        "d_model": patch.shape[0],
        "n_layers": layers["encoder"],
        "layer_scale": "encoder.blocks.0.ls1.gamma" in state,
        **kinds,
    }
    if grid := square(tokens - sum(kinds.values())):
        arch["image_size"] = (grid[0] * arch["patch_size"], grid[1] * arch["patch_size"])
    if "decoder.head.weight" in state:
        normed = {"batch_norm": True} if "decoder.norm.running_mean" in state else {}
        arch |= {"n_cls": state["decoder.head.weight"].shape[0], "decoder": {"name": "linear", **normed}}
    elif "decoder.cls_emb" in state:
        decoder = {"name": "mask_transformer", "n_layers": layers["decoder"]}
        arch |= {"n_cls": state["decoder.cls_emb"].shape[1], "decoder": decoder}
    fc1 = state.get("encoder.blocks.0.mlp.fc1.bias")
    fc2 = state.get("encoder.blocks.0.mlp.fc2.weight")
    if fc1 is not None and fc2 is not None and fc2.shape[1] * 2 == fc1.shape[0]:
        raise refuse("the weights have", "a gated MLP (SwiGLU or GLU: fc2 takes half of what fc1 gives)")
    if fc1 is not None and fc1.shape[0] != 4 * arch["d_model"]:
        raise CheckpointError(f"the MLP is {fc1.shape[0]} wide; the Segmenter encoder has 4 x {arch['d_model']}")
    return arch


def extra_tokens(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Which tokens stand before the patches, as fields of ModelConfig; their sum is how many."""
    registers = state.get("encoder.reg_token")
    return {
        "class_token": "encoder.cls_token" in state,
        "distilled": "encoder.dist_token" in state,
        "n_registers": registers.shape[1] if registers is not None and registers.ndim == 3 else 0,
    }


def n_blocks(names: Iterable[str]) -> Counter[str]:
    """The number of transformer layers that "encoder" and "decoder" have in a state dict of our names."""
    matches = (re.match(r"(encoder|decoder)\.blocks\.(\d{1,4})\.", str(name)) for name in names)
    return Counter(part for part, _ in {(match[1], int(match[2])) for match in matches if match})


def square(n: int) -> tuple[int, int] | None:
    """The square grid of `n` patches, if there is one."""
    side = math.isqrt(max(n, 0))
    return (side, side) if side and side * side == n else None
