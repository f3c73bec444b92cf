"""Does what a report of `accelerate` names run on the kernels in a real call?"""

import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from segmenter.acceleration import accelerate

NEEDED = {"attention": "attention", "attention core": "attention", "MLP": "layernorm_mlp", "class masks": "mask_head"}


class Count(TorchDispatchMode):
    """Names of our operators, each with the modules within whose calls it ran."""

    def __init__(self):
        super().__init__()
        self.inside, self.ran = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "segmenter":
            self.ran.append((func._opname, tuple(self.inside)))
        return func(*args, **(kwargs or {}))


def check(model, inputs, example=None):
    """(report, lines about what it claims and does not run) of a call of the model, once accelerated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = accelerate(model, example=example)
    modules = dict(model.named_modules())
    computed = {f"{r.name}.attn".lstrip("."): r.name for r in report.swapped if "attention" in r.became.split(" and ")}
    claims = {(computed.get(r.name, r.name), NEEDED[what]) for r in report.swapped for what in r.became.split(" and ")}
    with torch.no_grad(), Count() as count:
        hooks = []
        for name in {name for name, _ in claims}:  # hooks of what is swapped itself change nothing
            hooks.append(modules[name].register_forward_pre_hook(lambda *a, n=name: count.inside.append(n)))
            hooks.append(modules[name].register_forward_hook(lambda *a: count.inside.pop() and None))
        model(*inputs)
        for hook in hooks:
            hook.remove()
    ran = {(name, operator) for operator, inside in count.ran for name in inside}
    return report, sorted(f"{operator} in {name or 'the model'}" for name, operator in claims - ran)
