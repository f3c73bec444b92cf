"""May a fused operator read a layer's parameters instead of calling the layer?

Only if the layer does nothing but what its type says. A LoRA layer still has the `weight` of the layer that it wraps,
and a quantised one may have a null pointer for it: reading either would be silently wrong.
"""

import torch
import torch.nn as nn

_PLAIN_TENSORS = (nn.Parameter, torch.Tensor)


def why_not_bypass(module: nn.Module, kinds: tuple[type, ...]) -> str | None:
    """Why `module` has to be called, or None if its parameters may be read in its place.

    Args:
        kinds: the exact types that it may have. Subclasses are out.
    """
    if type(module) not in kinds:
        return f"{type(module).__name__} in place of {kinds[0].__name__}"
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "hooks"
    if "forward" in state:
        return "a replaced forward"
    for parameter in state["_parameters"].values():
        if parameter is not None and type(parameter) not in _PLAIN_TENSORS and not _is_fake(parameter):
            return f"weights of type {type(parameter).__name__}"
    return None


def _is_fake(tensor: torch.Tensor) -> bool:
    """Whether it is a stand-in of torch.export or torch.compile."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor))
