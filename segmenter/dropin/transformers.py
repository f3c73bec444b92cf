"""The attention kernel for models of Hugging Face transformers: ViT, DeiT, DINOv2, EoMT, DPT, SegFormer and others.

    from segmenter.dropin.transformers import register
    register()                                     # once in a process; needs transformers 4.48 or newer
    model.set_attn_implementation("segmenter")     # or from_pretrained(..., attn_implementation="segmenter")

Calls that are not for the kernel run transformers' own "sdpa": with a mask or a bias (BEiT), causal, with dropout, with
fewer key than query heads, a head_dim above 128 or no multiple of 8, float64, or on a device without kernels.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from segmenter.dropin.modules import AccelerationError
from segmenter.kernels.configs import MAX_HEAD_DIM
from segmenter.ops import why_no_triton, why_not_tensor

_NOT_OURS = ("position_bias", "softcap", "cache", "s_aux", "output_attentions")  # arguments that change the result
_KERNEL: list[Callable] = []  # cross_attention, once loaded


def register(name: str = "segmenter", strict: bool = False) -> None:
    """Makes `name` an attention implementation of transformers.

    Args:
        strict: a call that would run "sdpa" raises AccelerationError instead, with the reason.
    Raises:
        ImportError: transformers is missing or too old.
    """
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise ImportError("this needs transformers 4.48 or newer: pip install -U transformers") from error
    if not _KERNEL and why_no_triton() is None:
        from segmenter.kernels.attention import cross_attention

        _KERNEL.append(cross_attention)
    AttentionInterface.register(name, functools.partial(attention, strict=True) if strict else attention)
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    except ImportError:  # before 4.53 masks did not depend on the implementation
        return
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def why_not(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> str | None:
    """Why the kernel cannot take a call, or None if it can. Arguments as transformers passes them."""
    if attention_mask is not None:
        return "a mask"
    if dropout:
        return "dropout"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal  # the rule of sdpa
    if causal and query.shape[2] > 1:
        return "causal attention"
    for name in _NOT_OURS:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            return f"the argument {name}"
    if key.shape != value.shape or key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        return "different heads or batches of queries and keys"
    if key.shape[2] == 0:
        return "no keys"
    head_dim = query.shape[3]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim {head_dim}, the kernel takes multiples of 8 up to {MAX_HEAD_DIM}"
    if not query.dtype == key.dtype == value.dtype:
        return "different types of queries, keys and values"
    return why_not_tensor(query)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    strict: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: q, k, v (B, heads, N, head_dim) -> ((B, N, heads, head_dim), None).

    Raises:
        AccelerationError: `strict`, and the kernel cannot take the call.
    """
    reason = why_not(module, query, key, value, attention_mask, dropout, **kwargs)
    if reason is None:
        out = _KERNEL[0](query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scaling)
        return out.unflatten(2, (query.shape[1], query.shape[3])), None
    if strict:
        raise AccelerationError(f"{type(module).__name__}: {reason}; register without strict=True to allow it")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    arguments = {"dropout": dropout, "scaling": scaling, **kwargs}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
