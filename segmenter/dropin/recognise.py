"""Recognises transformer blocks, attention layers and mask decoders of other projects by what they are made of.

No class or module name of any project occurs here. What looks right is then tried out on random numbers
(`segmenter.dropin.verify`), since two classes of the same parts may compute different things.

    packed:  block(norm1, attn(qkv, proj, ...), norm2, mlp(fc1, act, fc2, ...)), perhaps with two layers ls1 and ls2 or
        two vectors of its own                                                        published Segmenter, timm
    wrapped: block(norm1, attn(attn = nn.MultiheadAttention), norm2, ffn(layers))     mmsegmentation
    separate: block(two LayerNorms, one layer of four (q..., k..., v... and another), one of two linear layers and what
        has no weights; perhaps two vectors and what has no weights)                  Hugging Face transformers
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn as nn

from segmenter.dropin.calls import ANY, further
from segmenter.dropin.guard import Layer, Layers, Path, Unlike, find, record, record_linear, record_norm
from segmenter.dropin.rotary import Rotary
from segmenter.guard import qualified
from segmenter.kernels.configs import MAX_HEAD_DIM

_NORMS_OF_ATTENTION = ("q_norm", "k_norm", "norm")
_DROPS_OF_ATTENTION = ("attn_drop", "proj_drop")
_UNPACKED = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "proj"}


class AttentionPlan(NamedTuple):
    """How to compute an attention layer.

    Attributes:
        style: "packed", "wrapped" or "separate". heads: how many.
        core: the layers that must stay as they are for softmax(q k^T) v to be ours, projections being called.
        fused: those for its projections to be read; None, with `reason`, if they cannot be.
        returns_tuple: the layer returns (tokens, attention map).
    """

    style: str
    heads: int
    core: Layers | None
    fused: Layers | None
    reason: str | None
    returns_tuple: bool = False


class BlockPlan(NamedTuple):
    """How to compute a pre-norm block.

    Attributes:
        style: "packed", "wrapped" or "separate". heads: how many.
        names: children by role: norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2; "" if there is none. ls1 and
            ls2 may be parameters of the block.
        inner: children of attention and MLP by role: of "separate" q, k, v, proj, fc1, fc2; of "packed" the first four
            if its attention has no qkv.
        attention, mlp: the layers that must stay as they are for each half to be fused; None if it cannot be.
        core: as in AttentionPlan, for blocks whose attention layer returns a tuple.
        reasons: why a half is not fused.
        passed: arguments besides the tokens that the block only hands on to its attention layer, and which therefore
            do not keep the MLP from being fused; in the order of the block's own forward, `calls.ANY` last.
        rotary: positions among these that fused attention takes. renamed: (block's name, attention layer's name) of
            those that the latter calls otherwise. tanh: the MLP's GELU is the one by tanh. `verify` finds all three.
    """

    style: str
    heads: int
    names: dict[str, str]
    attention: Layers | None
    core: Layers | None
    mlp: Layers | None
    reasons: tuple[str, ...]
    passed: tuple[str, ...]
    inner: dict[str, str]
    rotary: Rotary | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    tanh: bool = False

    def hands_on(self, names: Iterable[str]) -> bool:
        """Whether all these arguments are among `passed`."""
        return ANY in self.passed or set(names) <= set(self.passed)


class DecoderPlan(NamedTuple):
    """How to compute a mask transformer.

    Attributes:
        style: "packed" or "wrapped". n_cls: classes.
        layers: those that must stay as they are for the mask head to be fused.
    """

    style: str
    n_cls: int
    layers: Layers


Plan = AttentionPlan | BlockPlan | DecoderPlan


def kind_of(module: nn.Module) -> str | None:
    """ "block", "attention", "decoder" or None, by a glance at the names; `plan` then looks closely."""
    children = module._modules
    if "mask_norm" in children and "cls_emb" in module._parameters:
        return "decoder"
    if "attn" in children and ("mlp" in children or "ffn" in children):
        return "block"
    if any(_is_separate(child) for child in children.values()):
        return "block"
    if "qkv" in children and children["qkv"] is not None and "proj" in children:  # torch.jit's dictionaries have no get
        return "attention"
    return "attention" if "attn" in children and isinstance(children["attn"], nn.MultiheadAttention) else None


def plan(module: nn.Module, kind: str) -> Plan:
    """Looks closely at a module of this kind.

    Raises:
        Unlike: nothing in it can be computed by the fast operators; the message says why.
    """
    return {"attention": plan_attention, "block": plan_block, "decoder": plan_decoder}[kind](module)


def plan_attention(module: nn.Module) -> AttentionPlan:
    """Raises Unlike."""
    return _attention(module, (), {})


def _attention(root: nn.Module, at: Path, inner: dict[str, str]) -> AttentionPlan:
    attention = find(root, at)
    if inner:
        return AttentionPlan("separate", _heads(attention), None, _separate_projections(root, at, inner), None)
    if "qkv" not in attention._modules:
        core = _wrapped_core(root, at)
        return AttentionPlan("wrapped", _heads(attention), core, core, None)
    core = _packed_core(root, at)
    try:
        return AttentionPlan("packed", _heads(attention), core, core + _packed_projections(root, at), None)
    except Unlike as reason:
        return AttentionPlan("packed", _heads(attention), core, None, str(reason))


def own_biases(attention: nn.Module) -> tuple[str, ...]:
    """Names of the vectors that an attention layer holds itself as biases of its qkv, in this order; () if it does
    not hold one for each."""
    held = [name for kind in (attention._parameters, attention._buffers) for name in kind if kind[name] is not None]
    found = sorted(held, key=lambda name: "qkv".find(name[0]))
    return tuple(found) if [name[0] for name in found] == ["q", "k", "v"] else ()


def _unpacked(attention: nn.Module) -> dict[str, str]:
    """Children by role of an attention layer that could have qkv and has three layers instead; {} of others."""
    children = attention._modules
    there = all(children.get(name) is not None for name in _UNPACKED.values())
    return dict(_UNPACKED) if there and children.get("qkv") is None else {}


def _packed_core(root: nn.Module, at: Path) -> Layers:
    attention = find(root, at)
    present = {name for name, child in attention._modules.items() if child is not None}
    parts = {"qkv", "proj", "attn_drop", "proj_drop", *_NORMS_OF_ATTENTION}
    layers = [record(root, at, own_biases(attention), tuple(parts))]
    for name in ("q_norm", "k_norm"):
        if name in present:
            layers.append(_record_called(root, (*at, name)))
    if "attn_drop" in present:
        layers.append(record(root, (*at, "attn_drop")))
    weight = getattr(attention.qkv, "weight", None)  # adapters have the weight of what they wrap
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:  # quantised layers have a method of that name
        raise Unlike(f"{'.'.join((*at, 'qkv'))} ({qualified(type(attention.qkv))}) has no weight matrix")
    _check_head_dim(weight.shape[0], 3 * _heads(attention))
    return tuple(layers)


def _packed_projections(root: nn.Module, at: Path) -> Layers:
    attention = find(root, at)
    layers = [record_linear(root, (*at, "qkv"), masked=True), record_linear(root, (*at, "proj"))]
    if attention._modules.get("norm") is not None:
        layers.append(_record_identity(root, (*at, "norm")))
    if attention._modules.get("proj_drop") is not None:
        layers.append(record(root, (*at, "proj_drop")))
    return tuple(layers)


def _wrapped_core(root: nn.Module, at: Path) -> Layers:
    wrapper = find(root, at)
    if wrapper.__dict__.get("batch_first") is not True:
        raise Unlike("its tokens do not come batch first")
    inner = wrapper._modules["attn"]
    if not isinstance(inner, nn.MultiheadAttention):
        raise Unlike(f"{'.'.join((*at, 'attn'))} is {qualified(type(inner))}, not {qualified(nn.MultiheadAttention)}")
    if inner.in_proj_weight is None or inner.bias_k is not None or inner.add_zero_attn:
        raise Unlike("its MultiheadAttention has separate projections or extra keys")
    _check_head_dim(inner.embed_dim, inner.num_heads)
    return (
        record(root, at, children=("attn", "proj_drop", "dropout_layer")),
        record(root, (*at, "attn"), ("in_proj_weight", "in_proj_bias"), ("out_proj",)),
        record_linear(root, (*at, "attn", "out_proj")),
        record(root, (*at, "proj_drop")),  # the original drops in another memory order, so from other random numbers
        record(root, (*at, "dropout_layer")),
    )


def plan_block(block: nn.Module) -> BlockPlan:
    """Raises Unlike."""
    style = "wrapped" if "ffn" in block._modules else "packed" if "attn" in block._modules else "separate"
    if style == "separate":
        names, inner = separate_roles(block)
    else:
        names = _roles(block, style == "wrapped")
        inner = {} if style == "wrapped" else _unpacked(block._modules["attn"])
    vectors = _own_vectors(block, names)
    names |= vectors
    children = tuple(name for role, name in names.items() if name and role not in vectors)
    itself = record(block, (), tuple(vectors.values()), children)
    try:
        attn = _attention(block, (names["attn"],), inner)
    except Unlike as reason:
        attn = AttentionPlan(style, 0, None, None, str(reason))
    reasons, halves = [], {}
    for half, number in (("attention", "1"), ("mlp", "2")):
        try:
            if half == "attention" and attn.fused is None:
                raise Unlike(attn.reason)
            read = attn.fused if half == "attention" else _mlp(block, names["mlp"], style, inner)
            around = [record_norm(block, (names[f"norm{number}"],))]
            if names[f"ls{number}"] and not vectors:
                around.append(_record_scale(block, (names[f"ls{number}"],)))
            if names[f"drop_path{number}"]:
                around.append(record(block, (names[f"drop_path{number}"],)))
            halves[half] = (itself, *around, *read)
        except Unlike as reason:
            halves[half] = None
            reasons.append(f"{'MLP' if half == 'mlp' else half}: {reason}")
    if halves["attention"] is halves["mlp"] is attn.core is None:
        raise Unlike("; ".join(reasons))
    core = None if attn.core is None else (itself, *attn.core)
    halves = halves["attention"], core, halves["mlp"]
    return BlockPlan(style, attn.heads, names, *halves, tuple(reasons), further(block), inner)


def _roles(block: nn.Module, wrapped: bool) -> dict[str, str]:
    """Names of children by role. Raises Unlike if one is missing or there is one without a role."""
    children = {name: child for name, child in block._modules.items() if child is not None}
    names = {"attn": "attn", "mlp": "ffn" if wrapped else "mlp"}
    for norm in ("norm1", "norm2"):  # a child, or a property that gives one
        layer = getattr(block, norm, None)
        names[norm] = next((name for name, child in children.items() if child is layer), "")
        if not names[norm]:
            raise Unlike(f"it has no {norm}")
    for number in ("1", "2"):
        names[f"ls{number}"] = f"ls{number}" if f"ls{number}" in children else ""
        drops = [name for name in (f"drop_path{number}", "drop_path") if name in children]
        names[f"drop_path{number}"] = drops[0] if drops else ""
    if extra := sorted(set(children) - set(names.values())):
        raise Unlike(f"it has a layer {', '.join(extra)}")
    return names


def _mlp(block: nn.Module, name: str, style: str, inner: dict[str, str]) -> Layers:
    if style == "wrapped":
        return _wrapped_mlp(block, name)
    if style == "separate":
        return _separate_mlp(block, name, inner)
    mlp = block._modules[name]
    drops = [n for n in ("drop", "drop1", "drop2") if mlp._modules.get(n) is not None]
    layers = [
        record(block, (name,), children=("fc1", "act", "norm", "fc2", "drop", "drop1", "drop2")),
        record_linear(block, (name, "fc1"), bias=True),
        record(block, (name, "act")),
        record_linear(block, (name, "fc2"), bias=True),
        *(record(block, (name, n)) for n in drops),
    ]
    if mlp._modules.get("norm") is not None:
        layers.append(_record_identity(block, (name, "norm")))
    hidden, taken = mlp.fc1.weight.shape[0], mlp.fc2.weight.shape[1]
    if hidden != taken:
        raise Unlike(f"{name}.fc1 gives {hidden} columns and {name}.fc2 takes {taken}: a gated MLP")
    return tuple(layers)


def _wrapped_mlp(block: nn.Module, name: str) -> Layers:
    first, extra = (name, "layers", "0"), tuple(n for n in ("gamma2",) if n in block._modules[name]._modules)
    if block._modules[name].__dict__.get("add_identity") is not True:
        raise Unlike(f"{name} adds no residual")
    return (
        record(block, (name,), children=("layers", "dropout_layer", *extra)),
        record(block, (name, "layers"), children=("0", "1", "2")),
        record(block, first, children=("0", "1", "2")),
        record_linear(block, (*first, "0"), bias=True),
        record(block, (*first, "1")),
        record(block, (*first, "2")),
        record_linear(block, (name, "layers", "1"), bias=True),
        record(block, (name, "layers", "2")),
        record(block, (name, "dropout_layer")),
        *(_record_identity(block, (name, n)) for n in extra),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Blocks with separate projections, whose layers have no common names


def _is_separate(module: nn.Module | None) -> bool:
    names = () if module is None else [name for name, child in module._modules.items() if child is not None]
    return len(names) == 4 and all(sum(name.startswith(which) for name in names) == 1 for which in "qkv")


def separate_roles(block: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Names of children by role, and of those of attention and MLP; layers of one kind are taken to be called in the
    order in which they were made. Raises Unlike."""
    kinds: dict[str, list[str]] = {kind: [] for kind in ("attention", "norm", "scale", "drop", "MLP")}
    for name, child in block._modules.items():
        if child is not None:
            kinds[_separate_kind(child)].append(name)
    for kind, counts in (("attention", (1,)), ("norm", (2,)), ("MLP", (1,)), ("scale", (0, 2)), ("drop", (0, 1, 2))):
        if len(found := kinds[kind]) not in counts:
            raise Unlike(f"of its layers {len(found)} look like {kind} ({', '.join(found) or 'none'})")
    names = {"attn": kinds["attention"][0], "mlp": kinds["MLP"][0]}
    for role, found in (("norm", kinds["norm"]), ("ls", kinds["scale"]), ("drop_path", kinds["drop"])):
        first, second = (*found, *found, "", "")[:2]  # one that drops does so in both halves
        names |= {f"{role}1": first, f"{role}2": second}
    attention, mlp = (block._modules[names[role]]._modules for role in ("attn", "mlp"))
    inner = {which: next(name for name in attention if name.startswith(which)) for which in "qkv"}
    inner["proj"] = next(name for name, child in attention.items() if child is not None and name[0] not in "qkv")
    linear = [name for name, child in mlp.items() if child is not None and _holds_weights(child)]
    return names, {**inner, **dict(zip(("fc1", "fc2"), linear, strict=False))}


def _separate_kind(child: nn.Module) -> str:
    if _is_separate(child):
        return "attention"
    if isinstance(child, nn.LayerNorm):
        return "norm"
    if not _holds_weights(child):
        return "drop"
    return "MLP" if child._modules else "scale"


def _holds_weights(module: nn.Module) -> bool:
    return any(state for layer in module.modules() for state in (layer._parameters, layer._buffers))


def _separate_projections(root: nn.Module, at: Path, inner: dict[str, str]) -> Layers:
    paths = [(*at, inner[role]) for role in ("q", "k", "v", "proj")]
    others = (*_NORMS_OF_ATTENTION, *_DROPS_OF_ATTENTION)
    layers = [record(root, at, children=(*(path[-1] for path in paths), *others))]
    layers += [record_linear(root, path) for path in paths]
    for name in others:
        if find(root, at)._modules.get(name) is not None:
            kind = {"norm": _record_identity, "q_norm": _record_called, "k_norm": _record_called}.get(name, record)
            layers.append(kind(root, (*at, name)))
    widths = [find(root, path).weight.shape[0] for path in paths[:3]]
    if len(set(widths)) != 1:
        raise Unlike(f"its queries, keys and values have {', '.join(map(str, widths))} columns")
    _check_head_dim(widths[0], _heads(find(root, at)))
    return tuple(layers)


def _separate_mlp(block: nn.Module, name: str, inner: dict[str, str]) -> Layers:
    children = [n for n, child in block._modules[name]._modules.items() if child is not None]
    linear = [inner[role] for role in ("fc1", "fc2") if role in inner]
    held = [n for n in children if _holds_weights(block._modules[name]._modules[n])]
    if held != linear:
        raise Unlike(f"{name} has {len(held)} layers with weights ({', '.join(held)}), not two")
    return (
        record(block, (name,), children=tuple(children)),
        *(record_linear(block, (name, n), bias=True) for n in linear),
        *(record(block, (name, n)) for n in children if n not in linear),
    )


def plan_decoder(decoder: nn.Module) -> DecoderPlan:
    """Raises Unlike."""
    packed = "proj_patch" in decoder._parameters
    needed = ("proj_dec", "blocks") if packed else ("dec_proj", "layers", "patch_proj", "classes_proj")
    if absent := [n for n in (*needed, "decoder_norm") if decoder._modules.get(n) is None]:
        raise Unlike(f"it has no {', '.join(absent)}")
    layers = [record_norm(decoder, ("mask_norm",))]
    if packed:
        if "proj_classes" not in decoder._parameters or not isinstance(getattr(decoder, "patch_size", None), int):
            raise Unlike("it has no proj_classes or patch_size")
        width = decoder.proj_patch.shape[0]
    else:
        if not callable(getattr(decoder, "_transform_inputs", None)):
            raise Unlike("it does not choose its inputs by _transform_inputs")
        for name in ("patch_proj", "classes_proj"):
            layers.append(record_linear(decoder, (name,)))
            if decoder._modules[name].bias is not None:
                raise Unlike(f"{name} has a bias")
        width = decoder.patch_proj.in_features
    if width % 16:
        raise Unlike(f"its width {width} is no multiple of 16")
    return DecoderPlan("packed" if packed else "wrapped", decoder.cls_emb.shape[1], tuple(layers))


def _record_identity(root: nn.Module, path: Path) -> Layer:
    layer = find(root, path)
    if type(layer) is not nn.Identity:
        raise Unlike(f"{'.'.join(path)} is {qualified(type(layer))}, not {qualified(nn.Identity)}")
    return record(root, path)


def _record_called(root: nn.Module, path: Path) -> Layer:
    """`record` of a layer that is called, so that it may hold what it likes."""
    layer = find(root, path)
    return record(root, path, (*layer._parameters, *layer._buffers))


def _own_vectors(block: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """The names of ls1 and ls2 where they are not layers but two vectors of the block itself, the first made first."""
    held = [name for name, parameter in block._parameters.items() if parameter is not None]
    vectors = len(held) == 2 and all(block._parameters[name].ndim == 1 for name in held)
    return {"ls1": held[0], "ls2": held[1]} if vectors and not (names["ls1"] or names["ls2"]) else {}


def _record_scale(root: nn.Module, path: Path) -> Layer:
    """`record` of a layer that may multiply by a vector, its only parameter, or do nothing."""
    layer = find(root, path)
    held = [name for name, parameter in layer._parameters.items() if parameter is not None]
    if type(layer) is not nn.Identity and (len(held) != 1 or layer._parameters[held[0]].ndim != 1):
        raise Unlike(f"{'.'.join(path)} ({qualified(type(layer))}) holds something else than one vector")
    return record(root, path, tuple(held))


def _heads(attention: nn.Module) -> int:
    state = attention.__dict__
    heads = next((state[name] for name in ("num_heads", "heads", "num_attention_heads") if name in state), None)
    if not isinstance(heads, int) or heads < 1:
        raise Unlike("its number of heads is unknown")
    return heads


def _check_head_dim(width: int, heads: int) -> None:
    head_dim, rest = divmod(width, heads)
    if rest or head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        dim = width / heads
        raise Unlike(f"its head_dim is {dim:g}, the kernel takes multiples of 8 up to {MAX_HEAD_DIM}")
