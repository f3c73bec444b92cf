"""The classes that accelerated modules have, and what they compute.

An accelerated module is the same object with the same parameters, but of a subclass of its class, made here on demand.
So isinstance, state-dict keys, optimisers and hooks see no difference, the original forward is `super().forward`, and
that is what runs whenever a call is not one for the kernels.
"""

import copyreg
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from segmenter.dropin.calls import asks
from segmenter.dropin.guard import unmet
from segmenter.dropin.recognise import AttentionPlan, BlockPlan, DecoderPlan, Plan
from segmenter.fusable import is_fake, qualified, replaced, why_not_bypass
from segmenter.ops import KERNELS, Operators, why_not_tensor


class AccelerationError(RuntimeError):
    """A call cannot run on the kernels, and `accelerate(..., strict=True)` asked for an error then."""


class Swap(NamedTuple):
    """What an accelerated module carries in its attribute `_segmenter`.

    Attributes:
        name: of the module in its model. strict: raise where the original forward would run.
    """

    name: str
    plan: Plan
    strict: bool


# ---------------------------------------------------------------------------------------------------------------------
# May this call use the kernels?


def why_not_call(module: nn.Module, x: Any, args: tuple, kwargs: dict[str, Any], ndim: int = 3) -> str | None:
    """Why forward(x, *args, **kwargs) of a module has to be the original one, or None. Arguments of None and False ask
    for nothing. What lies in the call, not in the module, is noted down for `why_not`."""
    if not isinstance(x, torch.Tensor):  # a proxy of torch.fx
        return f"{qualified(type(x))} in place of a tensor"
    reason, state = _why_not_arguments(x, args, kwargs, ndim), module.__dict__
    if reason and not torch.compiler.is_compiling():
        state["_segmenter_declined"] = reason
    elif "_segmenter_declined" in state and not torch.compiler.is_compiling():
        for layer in module.modules():  # those of a fused block are not called
            layer.__dict__.pop("_segmenter_declined", None)
    return reason or why_not_tensor(x)


def _why_not_arguments(x: torch.Tensor, args: tuple, kwargs: dict[str, Any], ndim: int) -> str | None:
    if args or kwargs:
        given = [*("" for value in args if asks(value)), *(name for name, value in kwargs.items() if asks(value))]
        if given:
            names = ", ".join(filter(None, given)) or "a mask or a wish for the attention map"
            return f"arguments besides the tokens, such as {names}"
    if x.ndim != ndim:
        return f"an input of {x.ndim} dimensions"
    if type(x) not in (torch.Tensor, nn.Parameter) and not is_fake(x):
        return f"an input of type {qualified(type(x))}"
    return None


def _passed(plan: BlockPlan, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by name, if the block only hands them on to its attention layer."""
    if not plan.passed or len(args) > len(plan.passed) or not kwargs.keys() <= set(plan.passed):
        return None
    given = {**dict(zip(plan.passed, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if asks(value)}


def parameter_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What parameters read by an operator must be for input x. None under autocast, which casts them."""
    return None if torch.is_autocast_enabled(x.device.type) else x.dtype


def _must_be_fast(module: nn.Module, reason: str) -> None:
    swap = module.__dict__["_segmenter"]
    if swap.strict:
        raise AccelerationError(f"{swap.name or 'the model'}: {reason}; accelerate without strict=True to allow it")


# ---------------------------------------------------------------------------------------------------------------------
# What is computed. `ops` are the kernels, or the eager operators when a plan is tried out.


def attention_core(attention: nn.Module, plan: AttentionPlan | BlockPlan, x: torch.Tensor, ops: Operators) -> Any:
    """The attention layer without its residual: projections called as layers, the core by an operator."""
    layers = attention._modules
    x = layers["proj"](_normed(layers, ops.attention(layers["qkv"](x), plan.heads)))
    drop = layers.get("proj_drop")
    return x if drop is None else drop(x)


def _normed(layers: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    norm = layers.get("norm")
    return x if norm is None else norm(x)


def wrapped_core(
    wrapper: nn.Module, plan: AttentionPlan, x: torch.Tensor, identity: torch.Tensor, ops: Operators
) -> Any:
    """nn.MultiheadAttention in its wrapper: it never calls its projections, so they are read."""
    inner = wrapper._modules["attn"]
    out = inner._modules["out_proj"]
    qkv = F.linear(x, inner.in_proj_weight, inner.in_proj_bias)
    y = ops.linear(ops.attention(qkv, plan.heads), out.weight, out.bias)
    return identity + wrapper._modules["dropout_layer"](wrapper._modules["proj_drop"](y))


def attention_fused(block: nn.Module, plan: BlockPlan, x: torch.Tensor, ops: Operators) -> torch.Tensor:
    """x + attention(norm1(x)) in three operators."""
    norm, attention = block._modules[plan.names["norm1"]], block._modules[plan.names["attn"]]
    if plan.style == "packed":
        qkv, proj = attention._modules["qkv"], attention._modules["proj"]
        weight, bias = qkv.weight, qkv.bias
    else:
        inner = attention._modules["attn"]
        weight, bias, proj = inner.in_proj_weight, inner.in_proj_bias, inner._modules["out_proj"]
    qkv = ops.layernorm_linear(x, norm.weight, norm.bias, weight, bias, norm.eps)
    return ops.linear(ops.attention(qkv, plan.heads), proj.weight, proj.bias, residual=x)


def mlp_fused(block: nn.Module, plan: BlockPlan, x: torch.Tensor, ops: Operators) -> torch.Tensor:
    """x + mlp(norm2(x)) in one operator."""
    norm, mlp = block._modules[plan.names["norm2"]], block._modules[plan.names["mlp"]]
    if plan.style == "packed":
        fc1, fc2 = mlp._modules["fc1"], mlp._modules["fc2"]
    else:
        layers = mlp._modules["layers"]._modules
        fc1, fc2 = layers["0"]._modules["0"], layers["1"]
    return ops.layernorm_mlp(x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm.eps)


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
        passed: arguments for the attention layer.
    """
    layers, names = block._modules, plan.names
    y, inner = layers[names[f"norm{number}"]](x), layers[names["attn" if number == "1" else "mlp"]]
    if plan.style == "wrapped":
        return inner(y, identity=x)
    y = inner(y, **(passed or {})) if ops is None else attention_core(inner, plan, y, ops)
    y = y[0] if isinstance(y, tuple) else y
    for name in (names[f"ls{number}"], names[f"drop_path{number}"]):
        y = layers[name](y) if name else y
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

    def why_not(self, x: torch.Tensor) -> list[str]:
        """What would not run on the kernels for tokens of x's type and device, and why. Empty if all would."""
        raise NotImplementedError


class FastAttention(Accelerated):
    """(B, N, d) -> (B, N, d), projections as they are, the core by the attention kernel."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__["_segmenter"].plan
        reason = why_not_call(self, x, args, kwargs)
        if reason is None:
            reason = unmet(self, plan.core)
        if reason is None:
            return attention_core(self, plan, x, KERNELS[0])
        _must_be_fast(self, reason)
        return super().forward(x, *args, **kwargs)

    def why_not(self, x: torch.Tensor) -> list[str]:
        reason = why_not_tensor(x) or unmet(self, self.__dict__["_segmenter"].plan.core)
        return [reason] if reason else []


class FastWrappedAttention(Accelerated):
    """The same around nn.MultiheadAttention: forward(query, identity=...), both (B, N, d), gives identity + output."""

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__["_segmenter"].plan
        identity = kwargs.get("identity")
        asked = {name: value for name, value in kwargs.items() if name != "identity" and value is not query}
        reason = why_not_call(self, query, args, asked)
        if reason is None:
            reason = unmet(self, plan.core, parameter_dtype(query))
        if reason is None:
            return wrapped_core(self, plan, query, query if identity is None else identity, KERNELS[0])
        _must_be_fast(self, reason)
        return super().forward(query, *args, **kwargs)

    def why_not(self, x: torch.Tensor) -> list[str]:
        swap = self.__dict__["_segmenter"]
        reason = why_not_tensor(x) or unmet(self, swap.plan.core, parameter_dtype(x))
        return [reason] if reason else []


class FastBlock(Accelerated):
    """(B, N, d) -> (B, N, d): each half fused if it can be at the moment, else layer by layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__["_segmenter"].plan
        passed = _passed(plan, args, kwargs)
        reason = why_not_call(self, x, *((args, kwargs) if passed is None else ((), {})))
        if reason is None and self.__dict__.get("with_cp") and x.requires_grad:
            reason = "gradient checkpointing"
        reason = reason or replaced(self._segmenter_original)
        if reason is not None:
            _must_be_fast(self, reason)
            return super().forward(x, *args, **kwargs)
        x = by_layers(self, plan, x, "1", passed=passed) if passed else self._attention(plan, x, parameter_dtype(x))
        if plan.mlp is not None:
            reason = unmet(self, plan.mlp, parameter_dtype(x))
            if reason is None:
                return mlp_fused(self, plan, x, KERNELS[0])
            _must_be_fast(self, f"MLP: {reason}")
        return by_layers(self, plan, x, "2")

    def _attention(self, plan: BlockPlan, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        if plan.attention is not None:
            reason = unmet(self, plan.attention, dtype)
            if reason is None:
                return attention_fused(self, plan, x, KERNELS[0])
            _must_be_fast(self, f"attention: {reason}")
        if plan.core is not None and unmet(self, plan.core) is None:
            return by_layers(self, plan, x, "1", KERNELS[0])
        return by_layers(self, plan, x, "1")

    def why_not(self, x: torch.Tensor) -> list[str]:
        if reason := why_not_tensor(x) or replaced(self._segmenter_original):
            return [reason]
        plan, dtype = self.__dict__["_segmenter"].plan, parameter_dtype(x)
        halves = {"attention": plan.attention, "MLP": plan.mlp}
        reasons = {name: unmet(self, half, dtype) for name, half in halves.items() if half is not None}
        return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


class FastDecoder(Accelerated):
    """forward(tokens (B, N, d), (H, W)) -> masks (B, K, H/P, W/P), with one kernel for the masks."""

    def forward(self, x: torch.Tensor, im_size: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__["_segmenter"].plan
        reason = why_not_call(self, x, args, kwargs) or self._unmet(plan)
        if reason is None:
            masks = decode(self, plan, x, KERNELS[0])
            return masks.transpose(1, 2).unflatten(2, (im_size[0] // self.patch_size, -1))
        _must_be_fast(self, reason)
        return super().forward(x, im_size, *args, **kwargs)

    def why_not(self, x: torch.Tensor) -> list[str]:
        reason = why_not_tensor(x) or self._unmet(self.__dict__["_segmenter"].plan)
        return [reason] if reason else []

    def _unmet(self, plan: DecoderPlan) -> str | None:
        own = why_not_bypass(self, (type(self),))
        return own if own not in (None, "hooks") else unmet(self, plan.contract)  # its own hooks run anyway


class FastWrappedDecoder(FastDecoder):
    """The same for forward(list of feature maps).

    The original divides by norms of at least 1e-12 where the kernel has no such limit: a token of zeros gives NaN.
    """

    def forward(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__["_segmenter"].plan
        x = self._transform_inputs(inputs)
        reason = why_not_call(self, x, args, kwargs, ndim=4) or self._unmet(plan)
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
    namespace |= {"forward": forward, "_segmenter_forward": forward}  # twice: so that a later replacement shows
    return type(f"Accelerated{original.__name__}", (mixin, original), namespace)


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
