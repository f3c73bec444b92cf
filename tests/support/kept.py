"""What a forward pass keeps for its backward pass."""

from collections.abc import Callable
from typing import Any

import torch


def kept(module: torch.nn.Module, run: Callable[[], Any]) -> tuple[int, Any]:
    """(bytes that `run` saves for a backward pass besides the module's parameters, its result)."""
    mine, found = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}
    alive = []  # or the next one may get its address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(found.values()), result
