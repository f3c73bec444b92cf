"""`accelerate(model)`: the fast kernels inside a model that somebody else built, in place, and `restore(model)`.

    import segmenter
    report = segmenter.accelerate(model)   # published Segmenter, timm ViT, mmsegmentation Segmenter, our own
    print(report)                          # what was swapped, what was left alone and why
    segmenter.restore(model)

The modules stay the same objects with the same parameters; only their class changes (`segmenter.swapped`). What they
are is told by their structure (`segmenter.structure`), confirmed by a trial on random numbers (`segmenter.trial`) and
checked again at each call (`segmenter.contract`): a call that is not one for the kernels runs the original forward.
Saving a whole accelerated model with torch.save is fine, and reading it needs this package; state dicts do not change.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from segmenter.contract import RATES, Unlike, original_class
from segmenter.implementation import Automatic, Operators, explain, select, why_not_tensor
from segmenter.structure import AttentionPlan, BlockPlan, Plan, kind_of, plan
from segmenter.swapped import AccelerationError, Swap, fast_class, mixin_for
from segmenter.trial import confirmed

__all__ = ["AccelerationError", "Report", "Row", "accelerate", "restore", "why_not"]


@dataclass(frozen=True)
class Row:
    """One module that `accelerate` looked at.

    Attributes:
        name: in the model; "" is the model itself. was: its class.
        became: what runs on the kernels now, or None if it was left alone.
        reason: why it, or the rest of it, was left alone.
        already: it had been accelerated before.
    """

    name: str
    was: str
    became: str | None
    reason: str | None = None
    already: bool = False


@dataclass
class Report:
    """What `accelerate` did. `str(report)` is a table with a line for all layers that differ only in number.
    `notes`: about the whole, for people."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def swapped(self) -> list[Row]:
        """The modules that this call has accelerated."""
        return [row for row in self.rows if row.became and not row.already]

    @property
    def left(self) -> list[Row]:
        """The modules left alone, each with its reason."""
        return [row for row in self.rows if not row.became]

    @property
    def already(self) -> list[Row]:
        """The modules that were accelerated before and stay as they were."""
        return [row for row in self.rows if row.already]

    def __str__(self) -> str:
        groups: dict[tuple, list[str]] = {}
        for row in self.rows:  # layers that only differ in their number share a line
            key = (re.sub(r"\d+", "*", row.name), row.was, row.became, row.reason)
            groups.setdefault(key, []).append(row.name or "(model)")
        lines = [("modules", "", "was", "on the kernels", "left alone, because")]
        for (name, was, became, reason), names in groups.items():
            lines.append((names[0] if len(names) == 1 else name, f"{len(names)}x", was, became or "-", reason or ""))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = ["  ".join([*(c.ljust(w) for c, w in zip(line[:4], widths, strict=True)), line[4]]) for line in lines]
        counts = f"{len(self.swapped)} swapped, {len(self.left)} left alone"
        counts += f", {len(self.already)} swapped before" if self.already else ""
        return "\n".join([*(line.rstrip() for line in table), counts, *self.notes])


def accelerate(
    model: nn.Module, *, filter_fn: Callable[[nn.Module, str], bool] | None = None, strict: bool = False
) -> Report:
    """Puts the kernels into a model, in place. `restore` takes them out again.

    Parameters, state-dict keys, classes in the sense of isinstance, hooks, copying, saving and training stay as they
    are. Layers that hold anything unusual (LoRA, quantised or parametrised weights, norms of queries and keys, layer
    scale) keep their own forward, and so do calls with a mask, a wish for attention maps, dropout in training, float64,
    or on a device without kernels. Calling it again takes up what has changed since.

    Args:
        model: any module.
        filter_fn: (module, its name in the model) -> whether it may be swapped. By default all.
        strict: a call that would run an original forward raises AccelerationError instead, and so does nothing found
            to swap (ValueError).
    Returns:
        The report; print it. `why_not(model)` tells later what would not be fast.
    Raises:
        ValueError: strict, and there is nothing to swap. ImplementationError: strict, and Triton cannot run here.
    """
    report, trials = Report(), {}
    operators = select("triton") if strict else Automatic("accelerated", on_cpu=True)
    for name, module in list(model.named_modules()):  # parents first: they are tried out with their original children
        own = isinstance(module.__dict__.get("ops"), (Operators, Automatic))
        kind = "own" if own else kind_of(module)
        if kind is None:
            continue
        if filter_fn is not None and not filter_fn(module, name):
            report.rows.append(Row(name, _was(module), None, "filter_fn"))
        elif own:
            report.rows.append(_swap_own(name, module, operators))
        else:
            report.rows.append(_swap(name, module, kind, strict, trials))
    if not report.swapped and not report.already:
        _complain(model, report, strict)
    if explain("triton")[0] != "triton":
        report.notes.append(f"no kernel can run on this machine now: {explain('triton')[1].split(';')[0]}")
    return report


def restore(model: nn.Module) -> int:
    """Undoes `accelerate`: every module gets its original class back. Returns how many did."""
    count = 0
    for module in model.modules():
        if "_segmenter" in module.__dict__:
            count += _undo(module)
    return count


def why_not(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, list[str]]:
    """Which accelerated modules would not run entirely on the kernels if called now, and why: {name: reasons}.

    Args:
        x: a tensor of the type and on the device of the tokens; by default a parameter of the model.
    """
    x = next(model.parameters(), torch.empty(0)) if x is None else x
    found = {}
    for name, module in model.named_modules():
        if "_segmenter" not in module.__dict__:
            continue
        if not isinstance(module.__dict__["_segmenter"], Swap):  # one of our own
            own = why_not_tensor(x)
            halves = ("attention", "mlp") if hasattr(module, "why_not_fused") else ()
            reasons = [own] if own else [r for r in map(module.why_not_fused, halves) if r]
        else:
            reasons = module.why_not(x)
        if reasons:
            found[name] = reasons
    return found


def _swap(name: str, module: nn.Module, kind: str, strict: bool, trials: dict) -> Row:
    was, before = _was(module), module.__dict__.get("_segmenter")
    try:
        if "forward" in module.__dict__:
            raise Unlike("it has a replaced forward")
        found = _confirmed(module, kind, trials)
        if isinstance(found, AttentionPlan) and found.returns_tuple:
            raise Unlike("it also returns attention maps; its block computes the attention when they are not wanted")
        swap = Swap(name, found, strict)
        if before == swap:
            return Row(name, was, _became(found), _reason(found), already=True)
        module.__class__ = fast_class(mixin_for(found), original_class(type(module)))
    except (Unlike, TypeError) as reason:  # TypeError: a class that cannot be exchanged
        if before is not None:
            _undo(module)
        return Row(name, was, None, str(reason))
    module.__dict__["_segmenter"] = swap
    return Row(name, was, _became(found), _reason(found))


def _confirmed(module: nn.Module, kind: str, trials: dict) -> Plan:
    """The plan after its trial. Layers that differ in nothing but weights and drop rates are tried out once."""
    found = plan(module, kind)
    key = _signature(module) if kind != "decoder" else id(module)
    if key not in trials:
        try:
            trials[key] = confirmed(module, found)
        except Unlike as reason:
            trials[key] = reason
    if isinstance(trials[key], Unlike):
        raise trials[key]
    return trials[key]


def _signature(module: nn.Module) -> Any:
    flags = {n: v for n, v in module.__dict__.items() if n not in _NO_FLAGS}
    shapes = tuple((n, None if p is None else tuple(p.shape)) for n, p in module._parameters.items())
    children = tuple((n, None if m is None else _signature(m)) for n, m in module._modules.items())
    return original_class(type(module)), repr(sorted(flags.items())), shapes, children


def _swap_own(name: str, module: nn.Module, operators: Any) -> Row:
    """Our own modules have their operators in an attribute."""
    before, what = module.ops, "all of it"
    if hasattr(module, "mask_norm"):
        what = "class masks"
    elif hasattr(module, "why_not_bytes"):
        what = "bytes to tokens"
    if type(before) is type(operators) and getattr(before, "name", None) == operators.name:
        return Row(name, _was(module), what, already=True)
    module.__dict__.setdefault("_segmenter", before)
    module.ops = operators
    return Row(name, _was(module), what)


def _undo(module: nn.Module) -> bool:
    if not isinstance(module.__dict__["_segmenter"], Swap):  # one of our own
        module.ops = module.__dict__.pop("_segmenter")
        return True
    original = original_class(type(module))
    if original is type(module):  # somebody made a subclass of the accelerated class, whose business it is
        return False
    module.__class__ = original
    del module.__dict__["_segmenter"]
    return True


def _complain(model: nn.Module, report: Report, strict: bool) -> None:
    looked_for = (
        f"accelerate: nothing in {type(model).__name__} can be swapped. Looked for pre-norm blocks (norm1, attn, "
        "norm2, mlp or ffn), attention layers (qkv, proj) and mask transformers (cls_emb, mask_norm)"
    )
    if report.left:
        row = report.left[0]
        looked_for += f"; found {len(report.left)} left alone, the first {row.name or 'the model'}: {row.reason}"
    else:
        looked_for += "; for models of transformers see segmenter.transformers_attention"
    if strict:
        raise ValueError(looked_for)
    warnings.warn(looked_for, stacklevel=3)


def _became(found: Plan) -> str:
    if isinstance(found, BlockPlan):
        core = "attention core" if found.core is not None else None
        halves = ("attention" if found.attention is not None else core, "MLP" if found.mlp is not None else None)
        return " and ".join(half for half in halves if half)
    return "attention core" if isinstance(found, AttentionPlan) else "class masks"


def _reason(found: Plan) -> str | None:
    return "; ".join(found.reasons) or None if isinstance(found, BlockPlan) else None


def _was(module: nn.Module) -> str:
    return original_class(type(module)).__name__


_NO_FLAGS = {*nn.Module().__dict__, "_segmenter", *RATES}
