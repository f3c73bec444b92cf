"""The classes that accelerated modules have, and what they compute.

An accelerated module is the same object with the same parameters, but of a subclass of its class, made here on demand.
So isinstance, state-dict keys, optimisers and hooks see no difference, the original forward is `super().forward`, and
that is what runs whenever a call is not one for the kernels.
"""

import copyreg
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from segmenter.dropin.calls import ANY, asks
from segmenter.dropin.guard import mask_of_bias, unlike_before
from segmenter.dropin.recognise import AttentionPlan, BlockPlan, DecoderPlan, Plan, own_biases
from segmenter.guard import METHODS, PLAIN_TENSORS, decision, is_fake, qualified, replaced, why_not_bypass
from segmenter.layers import Rotation, fused_attention, fused_mlp, fused_separate_attention
from segmenter.ops import KERNELS, Operators, why_not_tensor


class AccelerationError(RuntimeError):
    """A call cannot run on the kernels, and `accelerate(..., strict=True)` asked for an error then."""


class Acceleration(NamedTuple):
    """What an accelerated module carries in its attribute `_segmenter`.

    Attributes:
        name: of the module in its model. strict: raise where the original forward would run.
    """

    name: str
    plan: Plan
    strict: bool


# ---------------------------------------------------------------------------------------------------------------------
# May this call use the kernels?


def why_not_tokens(module: nn.Module, x: Any, args: tuple, kwargs: dict[str, Any], ndim: int = 3) -> str | None:
    """What in forward(x, *args, **kwargs) of a module is not for the kernels, or None. Arguments of None and False ask
    for nothing. It is noted down for `why_not`."""
    if not isinstance(x, torch.Tensor):  # a proxy of torch.fx
        return f"{qualified(type(x))} in place of a tensor"
    reason, state = None, module.__dict__
    if args or kwargs:
        given = [*("" for value in args if asks(value)), *(name for name, value in kwargs.items() if asks(value))]
        if given:
            names = ", ".join(filter(None, given)) or "a mask or a wish for the attention map"
            reason = f"arguments besides the tokens, such as {names}"
    if reason is None and x.ndim != ndim:
        reason = f"an input of {x.ndim} dimensions"
    if reason is None and type(x) not in PLAIN_TENSORS and not is_fake(x):
        reason = f"an input of type {qualified(type(x))}"
    if reason and not torch.compiler.is_compiling():
        state["_segmenter_declined"] = reason
    elif "_segmenter_declined" in state and not torch.compiler.is_compiling():
        for layer in module.modules():  # those of a fused block are not called
            layer.__dict__.pop("_segmenter_declined", None)
    return reason


def _passed(plan: BlockPlan, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by name, if the block only hands them on to its attention layer."""
    names = [name for name in plan.passed if name != ANY]
    if not plan.passed or len(args) > len(names) or not plan.hands_on(kwargs):
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if asks(value)}


def parameter_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What parameters read by an operator must be for input x. None under autocast, which casts them."""
    return None if torch.is_autocast_enabled(x.device.type) else x.dtype


def _must_be_fast(module: nn.Module, reason: str) -> None:
    found = module.__dict__["_segmenter"]
    if found.strict:
        raise AccelerationError(f"{found.name or 'the model'}: {reason}; accelerate without strict=True to allow it")


# ---------------------------------------------------------------------------------------------------------------------
# What is computed. `ops` are the kernels, or the eager operators when a plan is tried out.


def attention_core(attention: nn.Module, plan: AttentionPlan | BlockPlan, x: torch.Tensor, ops: Operators) -> Any:
    """The attention layer without its residual: projections called as layers, the core by an operator."""
    layers, bias = attention._modules, own_bias(attention)
    qkv = layers["qkv"](x)
    qkv = qkv if bias is None else qkv + bias
    if _has_norms(layers):
        y = _attended(layers, qkv.unflatten(2, (3, plan.heads, -1)).unbind(2), ops)
    else:
        y = ops.attention(qkv, plan.heads)
    x = layers["proj"](_normed(layers, y))
    drop = layers.get("proj_drop")
    return x if drop is None else drop(x)


def _normed(layers: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    norm = layers.get("norm")
    return x if norm is None else norm(x)


def _has_norms(layers: dict[str, Any]) -> bool:
    """Whether an attention layer has norms of queries and keys that do something."""
    return any(type(layers.get(name)) not in (type(None), nn.Identity) for name in ("q_norm", "k_norm"))


def _attended(
    layers: dict[str, Any], qkv: Sequence[torch.Tensor], ops: Operators, rotation: Rotation | None = None
) -> torch.Tensor:
    """Attention of q, k and v (B, N, h, d) whose norms are called as layers, whatever they are: (B, N, h*d)."""
    names = ("q_norm", "k_norm")
    q, k = (layers[n](t.transpose(1, 2)).transpose(1, 2) for n, t in zip(names, qkv, strict=False))
    if rotation is not None:
        q, k = (ops.rotate(t, *rotation) for t in (q, k))
    return ops.cross_attention(q, k, qkv[2], q.shape[-1] ** -0.5)


def own_bias(attention: nn.Module) -> torch.Tensor | None:
    """(3*h*d,), the bias that an attention layer adds to its qkv itself, put together anew on every call."""
    if not (attention._parameters or attention._buffers):
        return None
    held = [attention._parameters.get(n, attention._buffers.get(n)) for n in own_biases(attention)]
    return torch.cat(held) if held else None


def masked_bias(linear: nn.Linear) -> torch.Tensor | None:
    """The bias of a linear layer, multiplied anew on every call if the layer has a mask for it (of keys, in DINOv3)."""
    mask = mask_of_bias(linear) if linear._buffers else ()
    return linear.bias * linear._buffers[mask[0]].to(linear.bias.dtype) if mask else linear.bias


def wrapped_core(
    wrapper: nn.Module, plan: AttentionPlan, x: torch.Tensor, identity: torch.Tensor, ops: Operators
) -> Any:
    """nn.MultiheadAttention in its wrapper: it never calls its projections, so they are read."""
    inner = wrapper._modules["attn"]
    out = inner._modules["out_proj"]
    qkv = F.linear(x, inner.in_proj_weight, inner.in_proj_bias)
    y = ops.linear(ops.attention(qkv, plan.heads), out.weight, out.bias)
    return identity + wrapper._modules["dropout_layer"](wrapper._modules["proj_drop"](y))


def attention_fused(
    block: nn.Module, plan: BlockPlan, x: torch.Tensor, ops: Operators, rotation: Rotation | None = None
) -> torch.Tensor:
    """x + attention(norm1(x)) by `segmenter.layers.fused_attention`."""
    norm, layer = block._modules[plan.names["norm1"]], block._modules[plan.names["attn"]]
    attention, scale = layer._modules, layer_scale(block, plan, "1")
    if "q" in plan.inner:
        q, k, v, proj = (attention[plan.inner[role]] for role in ("q", "k", "v", "proj"))
        if not _has_norms(attention):
            return fused_separate_attention(x, norm, (q, k, v), plan.heads, proj, ops, scale, rotation)
        normed = ops.layernorm(x, norm.weight, norm.bias, norm.eps)
        qkv = [ops.linear(normed, p.weight, p.bias).unflatten(2, (plan.heads, -1)) for p in (q, k, v)]
    elif plan.style == "packed":
        qkv, bias, proj = attention["qkv"], own_bias(layer), attention["proj"]
        bias = masked_bias(qkv) if bias is None else bias
        if not _has_norms(attention):
            return fused_attention(
                x, norm, qkv.weight, bias, plan.heads, proj, ops, layer_scale=scale, rotation=rotation
            )
        qkv = ops.layernorm_linear(x, norm.weight, norm.bias, qkv.weight, bias, norm.eps)
        qkv = qkv.unflatten(2, (3, plan.heads, -1)).unbind(2)
    else:
        return _wrapped_fused(x, norm, attention["attn"], plan, ops)
    y = _attended(attention, qkv, ops, rotation)
    return ops.linear(y, proj.weight, proj.bias, residual=x, layer_scale=scale)


def _wrapped_fused(
    x: torch.Tensor, norm: nn.LayerNorm, inner: nn.Module, plan: BlockPlan, ops: Operators
) -> torch.Tensor:
    out = inner._modules["out_proj"]
    return fused_attention(x, norm, inner.in_proj_weight, inner.in_proj_bias, plan.heads, out, ops)


def mlp_fused(block: nn.Module, plan: BlockPlan, x: torch.Tensor, ops: Operators) -> torch.Tensor:
    """x + mlp(norm2(x)) by `segmenter.layers.fused_mlp`."""
    norm, mlp = block._modules[plan.names["norm2"]], block._modules[plan.names["mlp"]]._modules
    if plan.style != "wrapped":
        fc1, fc2 = (mlp[plan.inner.get(role, role)] for role in ("fc1", "fc2"))
        return fused_mlp(x, norm, fc1, fc2, ops, layer_scale=layer_scale(block, plan, "2"), tanh=plan.tanh)
    layers = mlp["layers"]._modules
    return fused_mlp(x, norm, layers["0"]._modules["0"], layers["1"], ops, tanh=plan.tanh)


def layer_scale(block: nn.Module, plan: BlockPlan, number: str) -> torch.Tensor | None:
    """The vector (d,) that one half of a block (number "1" or "2") multiplies its branch by, or None."""
    name = plan.names[f"ls{number}"]
    if name in block._parameters:
        return block._parameters[name]
    held = block._modules[name]._parameters.values() if name else ()
    return next((parameter for parameter in held if parameter is not None), None)


def by_layers(
    block: nn.Module,
    plan: BlockPlan,
    x: torch.Tensor,
    number: str,
    ops: Operators | None = None,
    passed: dict[str, Any] | None = None,
) -> Any:
    """One half of a block (number "1" or "2"), layer by layer, as the original does it.

    Args:
        ops: computes the core of the attention, for layers whose own forward cannot be replaced.
        passed: arguments for the attention layer, by their names in the block.
    """
    layers, names = block._modules, plan.names
    y, inner = layers[names[f"norm{number}"]](x), layers[names["attn" if number == "1" else "mlp"]]
    if plan.style == "wrapped":
        return inner(y, identity=x)
    renamed = dict(plan.renamed)
    given = {renamed.get(name, name): value for name, value in (passed or {}).items()}
    y = inner(y, **given) if ops is None else attention_core(inner, plan, y, ops)
    y = y[0] if isinstance(y, tuple) else y
    if names[f"ls{number}"] in block._parameters:
        y = y * block._parameters[names[f"ls{number}"]]
    for name in (names[f"ls{number}"], names[f"drop_path{number}"]):
        y = layers[name](y) if name in layers else y
    return x + y


def decode(decoder: nn.Module, plan: DecoderPlan, tokens: torch.Tensor, ops: Operators) -> torch.Tensor:
    """Encoder tokens (B, N, d) -> class masks (B, N, K)."""
    layers, packed = decoder._modules, plan.style == "packed"
    x = layers["proj_dec" if packed else "dec_proj"](tokens)
    x = torch.cat([x, decoder.cls_emb.expand(x.shape[0], -1, -1)], dim=1)
    for block in layers["blocks" if packed else "layers"]:
        x = block(x)
    x = layers["decoder_norm"](x)
    if packed:
        projections = decoder.proj_patch, decoder.proj_classes
    else:
        projections = layers["patch_proj"].weight.T, layers["classes_proj"].weight.T
    norm = layers["mask_norm"]
    patches, classes = x[:, : -plan.n_cls], x[:, -plan.n_cls :]
    return ops.mask_head(patches, classes, *projections, norm.weight, norm.bias, norm.eps)


# ---------------------------------------------------------------------------------------------------------------------
# The classes


class Accelerated:
    """What all of them have: copying and pickling. `_segmenter_original` is the class that one was made from."""

    _segmenter_original: type

    def __reduce_ex__(self, protocol: int) -> Any:
        function, args, *rest = super().__reduce_ex__(max(protocol, 2))
        cls = type(self)
        if function is not copyreg.__newobj__ or "_segmenter_original" not in cls.__dict__:
            return (function, args, *rest)
        mixin = cls.__mro__[1].__name__
        return (rebuild, (mixin, cls._segmenter_original, *args[1:]), *rest)

    def decide(self, x: torch.Tensor) -> Any:
        """Why the layers are not for the kernels with tokens such as x, for `segmenter.guard.decision`."""
        raise NotImplementedError

    def why_not(self, x: torch.Tensor) -> list[str]:
        """What would not run on the kernels for tokens of x's type and device, and why. Empty if all would."""
        reason = self.decide(x)
        return [reason] if reason else []


class FastAttention(Accelerated):
    """(B, N, d) -> (B, N, d), projections as they are, the core by the attention kernel."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reason = why_not_tokens(self, x, args, kwargs) or decision(self, x)
        if reason is None:
            return attention_core(self, self.__dict__["_segmenter"].plan, x, KERNELS[0])
        _must_be_fast(self, reason)
        return super().forward(x, *args, **kwargs)

    def decide(self, x: torch.Tensor) -> str | None:
        return why_not_tensor(x) or unlike_before(self, self.__dict__["_segmenter"].plan.core)


class FastWrappedAttention(Accelerated):
    """The same around nn.MultiheadAttention: forward(query, identity=...), both (B, N, d), gives identity + output."""

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        identity = kwargs.get("identity")
        asked = {name: value for name, value in kwargs.items() if name != "identity" and value is not query}
        reason = why_not_tokens(self, query, args, asked) or decision(self, query)
        if reason is None:
            plan = self.__dict__["_segmenter"].plan
            return wrapped_core(self, plan, query, query if identity is None else identity, KERNELS[0])
        _must_be_fast(self, reason)
        return super().forward(query, *args, **kwargs)

    def decide(self, x: torch.Tensor) -> str | None:
        return why_not_tensor(x) or unlike_before(self, self.__dict__["_segmenter"].plan.core, parameter_dtype(x))


class Obstacles(NamedTuple):
    """Why a block, and its halves, are not for the kernels at the moment: each a reason or None. `core`: of the
    attention, where its projections are called as layers."""

    whole: str | None
    attention: str | None = None
    core: str | None = None
    mlp: str | None = None


class FastBlock(Accelerated):
    """(B, N, d) -> (B, N, d): each half fused if it can be at the moment, else layer by layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__["_segmenter"].plan
        passed = _passed(plan, args, kwargs)
        reason = why_not_tokens(self, x, *((args, kwargs) if passed is None else ((), {})))
        if reason is None and self.__dict__.get("with_cp") and x.requires_grad:
            reason = "gradient checkpointing"
        found = Obstacles(reason) if reason else decision(self, x)
        if found.whole is not None:
            _must_be_fast(self, found.whole)
            return super().forward(x, *args, **kwargs)
        passed = passed or {}
        rotation = self._rotation(plan, x, passed)
        if isinstance(rotation, str) and plan.attention is not None:
            if not torch.compiler.is_compiling():
                self.__dict__["_segmenter_declined"] = rotation  # for `why_not`
            _must_be_fast(self, f"attention: {rotation}")
        y = self._attention(plan, x, found, rotation, passed)
        if plan.mlp is not None:
            if y.dtype != x.dtype:  # by layers of another type
                found = self.decide(y)
            if (found.whole or found.mlp) is None:
                return mlp_fused(self, plan, y, KERNELS[0])
            _must_be_fast(self, f"MLP: {found.whole or found.mlp}")
        return by_layers(self, plan, y, "2")

    def _rotation(self, plan: BlockPlan, x: torch.Tensor, passed: dict[str, Any]) -> Rotation | str | None:
        """What turns queries and keys in a call, None if nothing; or why its attention is not for the kernels."""
        if plan.rotary is not None and set(passed) <= {plan.rotary.argument}:
            return plan.rotary.read(passed.get(plan.rotary.argument), x)
        return f"arguments besides the tokens, such as {', '.join(passed)}" if passed else None

    def _attention(
        self, plan: BlockPlan, x: torch.Tensor, found: Obstacles, rotation: Rotation | str | None, passed: dict
    ) -> torch.Tensor:
        if plan.attention is not None and not isinstance(rotation, str):
            if found.attention is None:
                return attention_fused(self, plan, x, KERNELS[0], rotation)
            _must_be_fast(self, f"attention: {found.attention}")
        if plan.core is not None and found.core is None and rotation is None:
            return by_layers(self, plan, x, "1", KERNELS[0])
        return by_layers(self, plan, x, "1", passed=passed)

    def decide(self, x: torch.Tensor) -> Obstacles:
        if reason := why_not_tensor(x) or replaced(self._segmenter_original):
            return Obstacles(reason)
        plan, dtype = self.__dict__["_segmenter"].plan, parameter_dtype(x)
        itself = next(part for part in (plan.attention, plan.core, plan.mlp) if part)[:1]
        if reason := unlike_before(self, itself):  # what it does besides calling its layers may have changed, too
            return Obstacles(reason)
        parts = ((plan.attention, dtype), (plan.core, None), (plan.mlp, dtype))
        return Obstacles(None, *(None if part is None else unlike_before(self, part, dtype) for part, dtype in parts))

    def why_not(self, x: torch.Tensor) -> list[str]:
        found = self.decide(x)
        halves = {"attention": found.attention, "MLP": found.mlp}
        return [found.whole] if found.whole else [f"{name}: {reason}" for name, reason in halves.items() if reason]


class FastDecoder(Accelerated):
    """forward(tokens (B, N, d), (H, W)) -> masks (B, K, H/P, W/P), with one kernel for the masks."""

    def forward(self, x: torch.Tensor, im_size: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__["_segmenter"].plan
        reason = why_not_tokens(self, x, args, kwargs) or self.decide(x)
        if reason is None:
            masks = decode(self, plan, x, KERNELS[0])
            return masks.transpose(1, 2).unflatten(2, (im_size[0] // self.patch_size, -1))
        _must_be_fast(self, reason)
        return super().forward(x, im_size, *args, **kwargs)

    def decide(self, x: torch.Tensor) -> str | None:
        itself = why_not_bypass(self, (type(self),))
        itself = None if itself == "hooks" else itself  # its own hooks run anyway
        return why_not_tensor(x) or itself or unlike_before(self, self.__dict__["_segmenter"].plan.layers)


class FastWrappedDecoder(FastDecoder):
    """The same for forward(list of feature maps).

    The original divides by norms of at least 1e-12 where the kernel has no such limit: a token of zeros gives NaN.
    """

    def forward(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__["_segmenter"].plan
        x = self._transform_inputs(inputs)
        reason = why_not_tokens(self, x, args, kwargs, ndim=4) or self.decide(x)
        if reason is None:
            masks = decode(self, plan, x.flatten(2).transpose(1, 2).contiguous(), KERNELS[0])
            return masks.transpose(1, 2).contiguous().unflatten(2, x.shape[-2:])
        _must_be_fast(self, reason)
        return super(FastDecoder, self).forward(inputs, *args, **kwargs)


MIXINS = {
    cls.__name__: cls for cls in (FastAttention, FastWrappedAttention, FastBlock, FastDecoder, FastWrappedDecoder)
}


def mixin_for(plan: Plan) -> type[Accelerated]:
    """Which of the classes above computes a plan."""
    if isinstance(plan, BlockPlan):
        return FastBlock
    wrapped = plan.style == "wrapped"
    if isinstance(plan, AttentionPlan):
        return FastWrappedAttention if wrapped else FastAttention
    return FastWrappedDecoder if wrapped else FastDecoder


@functools.cache
def fast_class(mixin: type[Accelerated], original: type) -> type:
    """The accelerated subclass of a class. Always the same object for the same arguments."""
    ours, theirs = mixin.forward, original.forward
    forward = types.FunctionType(ours.__code__, ours.__globals__, "forward", ours.__defaults__, ours.__closure__)
    if other := _other_names(ours, theirs):

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return ours(self, *args, **{other.get(name, name): value for name, value in kwargs.items()})

    functools.update_wrapper(forward, theirs)  # inspect.signature and torch.fx see the original's arguments
    namespace = {"_segmenter_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    cls = type(f"Accelerated{original.__name__}", (mixin, original), {**namespace, "forward": forward})
    METHODS[cls] = cls.forward  # so that a later replacement shows; the original may wrap those of its subclasses
    return cls


def _other_names(ours: Callable, theirs: Callable) -> dict[str, str]:
    """What the parameters that both forwards take by position or name are called by them, where that differs:
    {their name: ours}."""
    by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = (inspect.signature(forward).parameters.values() for forward in (ours, theirs))
    names = ([p.name for p in found if p.kind is by_name] for found in parameters)
    return {their: our for our, their in zip(*names, strict=False) if our != their}


def rebuild(mixin: str, original: type, *args: Any) -> nn.Module:
    """An empty module of the accelerated class, for unpickling and copying."""
    cls = fast_class(MIXINS[mixin], original)
    return cls.__new__(cls, *args)
