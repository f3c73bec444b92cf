"""Gradients of an operator with one result, and how they are compared with those of its definition."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.support.parity import assert_parity


def gradients(
    function: Callable, args: Sequence[Any], upstream: torch.Tensor, only: Sequence[int] | None = None
) -> list:
    """One for each argument: None of what is no tensor, or not among the places `only`."""
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and (only is None or i in only)]
    inputs = list(args)
    for i in places:
        inputs[i] = args[i].detach().requires_grad_()
    out = function(*inputs)
    found = iter(torch.autograd.grad(out, [inputs[i] for i in places], upstream.to(out.dtype)))
    return [next(found) if i in places else None for i in range(len(args))]


def doubled(args: Sequence[Any]) -> list:
    """With all tensors in float64."""
    return [x.double() if isinstance(x, torch.Tensor) else x for x in args]


def check_gradients(
    function: Callable, definition: Callable, args: Sequence[Any], upstream: torch.Tensor, **limits: Any
) -> list:
    """Every gradient by the rule of parity; returns ours. `limits` of `assert_parity`, by default a little wider.

    A sum over rows in another order is off by more than a few eps: that is what `terms` is for.
    """
    ours = gradients(function, args, upstream)
    exact = gradients(definition, doubled(args), upstream)
    eager = gradients(definition, args, upstream)
    for i, (o, x, e) in enumerate(zip(ours, exact, eager, strict=True)):
        if o is None:
            assert not isinstance(args[i], torch.Tensor)
            continue
        wide = {"frobenius": 2.5, "terms": 64} if o.dtype == torch.float32 else {"frobenius": 1.1}
        assert_parity(o, x, e, context=f"gradient {i}", **{**wide, **limits})
    return ours
