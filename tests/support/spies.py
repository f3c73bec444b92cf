"""What really ran."""

import torch

from segmenter import ops
from segmenter.dropin import modules
from segmenter.kernels import launch

ALWAYS_KERNELS = ("attention", "mask_head", "rotate")  # the others may give a product to a library


def kernels_run(monkeypatch):
    """A list to which is added from now on: the names of the kernels above as they are launched, and of the other
    operators as accelerated modules call them."""
    ran, run = [], launch.Plan.run

    def spy(plan, *tensors):
        name = plan.kernel.fn.__name__.removeprefix("_").removesuffix("_kernel").removesuffix("_fwd")
        if name in ALWAYS_KERNELS:
            ran.append(name)
        return run(plan, *tensors)

    def spied(name, operator):
        def call(*args, **kwargs):
            if not torch.compiler.is_compiling():  # a compiled program sets the list to what it was when traced
                ran.append(name)
            return operator(*args, **kwargs)

        return call

    monkeypatch.setattr(launch.Plan, "run", spy)
    operators = ops.load_kernels()
    others = {n: spied(n, f) for n, f in operators._asdict().items() if callable(f) and n not in ALWAYS_KERNELS}
    for module in (ops, modules):
        # half a block as the operators that it is made of, with gradients too
        monkeypatch.setattr(module, "KERNELS", [operators._replace(**{**others, "attention_half": None})])
    return ran
