"""`accelerate(model)`: the fast kernels inside a model that somebody else built, in place, and `restore(model)`.

    import segmenter
    report = segmenter.accelerate(model)   # published Segmenter, mmsegmentation's, timm's and transformers' ViTs
    print(report)                          # what was swapped, what was left alone and why
    segmenter.restore(model)

The modules stay the same objects with the same parameters; only their class changes (`modules`). What they are is told
by their structure (`recognise`), confirmed on random numbers (`verify`) and checked again at each call (`guard`): a
call that is not one for the kernels runs the original forward. Saving a whole accelerated model with torch.save is
fine, and reading it needs this package; state dicts do not change.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from segmenter.dropin.calls import Call, expected, observed
from segmenter.dropin.guard import OURS, RATES, Unlike, original_class
from segmenter.dropin.modules import Acceleration, AccelerationError, fast_class, mixin_for
from segmenter.dropin.recognise import AttentionPlan, BlockPlan, DecoderPlan, Plan, kind_of, plan
from segmenter.dropin.verify import confirmed, received
from segmenter.errors import cause
from segmenter.guard import attributes_of, qualified
from segmenter.ops import Automatic, OperatorModule, explain, select, why_not_tensor

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
    model: nn.Module,
    *,
    example: Any = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
) -> Report:
    """Puts the kernels into a model, in place. `restore` takes them out again.

    Parameters, state-dict keys, classes in the sense of isinstance, hooks, copying, saving and training stay as they
    are. Layers that hold anything unusual (LoRA, quantised or parametrised weights, norms of queries and keys) keep
    their own forward, and so do calls with a mask, a wish for attention maps, dropout in training, float64, or on a
    device without kernels. Attention that gets something else than tokens and rotary positions with every call, such as
    relative positions, is left alone: an `example` shows whether it does, without one it is taken to if its forward has
    such an argument. Calling it again takes up what has changed since. If it raises, the model is as it was before.

    Args:
        model: any module.
        example: an input of the model, or a tuple of its arguments. It is called once with it, in evaluation mode and
            without gradients (its hooks see this), and what it does not call, or calls otherwise than with tokens
            alone, is left alone.
        filter_fn: (module, its name in the model) -> whether it may be swapped. By default all.
        strict: a call that would run an original forward raises AccelerationError instead, and so does nothing found
            to swap (ValueError).
    Returns:
        The report; print it. `why_not(model)` tells later what would not be fast.
    Raises:
        ValueError: strict, and there is nothing to swap. ImplementationError: strict, and Triton cannot run here.
    """
    operators = select("triton") if strict else Automatic("accelerated", on_cpu=True)
    with _all_or_nothing(model):
        report = _accelerate(model, example, filter_fn, operators, strict)
        if strict and not report.swapped and not report.already:
            raise ValueError(_nothing(model, report))
        if explain("triton")[0] != "triton":
            report.notes.append(f"no kernel can run on this machine now: {explain('triton')[1].split(';')[0]}")
        else:
            report.notes += _obstacles(model)
    if not report.swapped and not report.already:
        warnings.warn(_nothing(model, report), stacklevel=2)
    return report


def _accelerate(model: nn.Module, example: Any, filter_fn: Any, operators: Any, strict: bool) -> Report:
    report, run = Report(), _Run(model, strict)
    found = []
    for name, module in list(model.named_modules()):  # parents first: they are tried out with their original children
        kind = "ours" if isinstance(module, OperatorModule) else kind_of(module)
        if kind is not None:
            found.append((name, module, kind))
    if example is not None:
        run.seen = observed(model, example, [module for _, module, kind in found if kind in ("block", "attention")])
    for name, module, kind in found:
        if filter_fn is not None and not filter_fn(module, name):
            report.rows.append(Row(name, _was(module), None, "filter_fn"))
        elif kind == "ours":
            report.rows.append(_switch_operators(name, module, operators))
        else:
            report.rows.append(_change_class(name, module, kind, run))
    return report


@contextlib.contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If anything is raised within it, all modules get back the classes and operators that they had."""
    before = [(m, type(m), {n: m.__dict__[n] for n in (*OURS, "ops") if n in m.__dict__}) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, ours in before:
            if type(module) is not cls:
                module.__class__ = cls
            for name in OURS:
                module.__dict__.pop(name, None)
            module.__dict__.update(ours)
        raise


def _obstacles(model: nn.Module) -> list[str]:
    """Lines about what would not run at the moment, for a report."""
    names: dict[str, list[str]] = {}
    for name, reasons in why_not(model).items():
        names.setdefault("; ".join(reasons), []).append(name or "(model)")
    return [f"not at the moment: {of[0]}{f' and {len(of) - 1} more' * (len(of) > 1)}: {r}" for r, of in names.items()]


def restore(model: nn.Module) -> int:
    """Undoes `accelerate`: every module gets its original class back. Returns how many did. If it raises, none did."""
    with _all_or_nothing(model):
        return sum(_undo(module) for module in model.modules() if "_segmenter" in module.__dict__)


def why_not(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, list[str]]:
    """Which accelerated modules would not run entirely on the kernels if called now, and why: {name: reasons}.

    With it what was in the way in the last call of a module: arguments besides tokens, such as positions or a mask.

    Args:
        x: a tensor of the type and on the device of the tokens; by default a parameter of the model.
    """
    x = next(model.parameters(), torch.empty(0)) if x is None else x
    found = {}
    for name, module in model.named_modules():
        if "_segmenter" not in module.__dict__:
            continue
        if isinstance(module, OperatorModule):
            reason = why_not_tensor(x)
            reasons = [reason] if reason else module.obstacles()
        else:
            reasons = module.why_not(x)
            if declined := module.__dict__.get("_segmenter_declined"):
                reasons = [*reasons, f"in its last call: {declined}"]
        if reasons:
            found[name] = reasons
    return found


class _Run:
    """What one call of `accelerate` knows: the model's modules, how they were seen to be called, plans tried out."""

    def __init__(self, model: nn.Module, strict: bool):
        self.modules, self.strict = dict(model.named_modules()), strict
        self.confirmed: dict[Any, Plan | Unlike] = {}  # by what a module is; or why it is not
        self.seen: dict[nn.Module, Call] | None = None
        self.covered: set[nn.Module] = set()  # attention layers whose block computes them

    def call(self, name: str, module: nn.Module) -> Call:
        """How the model calls a module besides with tokens. Raises Unlike if it does not."""
        if self.seen is not None:
            if module not in self.seen:
                raise Unlike("the model does not call it with the example")
            return self.seen[module]
        parts = name.split(".") if name else []
        parents = [self.modules[".".join(parts[:i])] for i in range(len(parts))]
        call = expected(module, parents)
        if not call.arguments or kind_of(parents[-1]) != "block":
            return call
        if self.call(".".join(parts[:-1]), parents[-1]).arguments:
            return call
        got = received(parents[-1], parts[-1])  # what comes from a block that gets tokens alone can be tried out
        return call if got is None else Call(got, sure=True)


def _change_class(name: str, module: nn.Module, kind: str, run: _Run) -> Row:
    was, before = _was(module), module.__dict__.get("_segmenter")
    try:
        found = _wanted(name, module, kind, run)
        after = Acceleration(name, found, run.strict)
        already = before is not None and before[1:] == after[1:]
        if not already:
            module.__class__ = fast_class(mixin_for(found), original_class(type(module)))
    except Exception as error:  # whatever somebody else's properties, forwards and metaclasses raise
        if before is not None:
            _undo(module)
        cls = qualified(original_class(type(module)))
        strange = f"{cls} raised {type(error).__name__} when looked at: {cause(error)}"
        return Row(name, was, None, str(error) if isinstance(error, Unlike) else strange)
    module.__dict__["_segmenter"] = after
    if isinstance(found, BlockPlan) and (found.attention is not None or found.core is not None):
        run.covered.add(module._modules[found.names["attn"]])
    return Row(name, was, _became(found), _reason(found), already)


def _wanted(name: str, module: nn.Module, kind: str, run: _Run) -> Plan:
    """What of a module is to be computed by the kernels. Raises Unlike if nothing is."""
    if isinstance(module, torch.jit.ScriptModule):
        raise Unlike("torch.jit has compiled it")
    if "forward" in module.__dict__ or "_call_impl" in module.__dict__:
        raise Unlike("it has a replaced forward")
    found = _confirmed(module, kind, run.confirmed)
    if isinstance(found, AttentionPlan) and found.returns_tuple:
        raise Unlike("it also returns attention maps; its block computes the attention when they are not wanted")
    if isinstance(found, DecoderPlan) or module in run.covered:
        return found
    call = run.call(name, module)
    if not call.tokens:
        raise Unlike("its model calls it with something else than tokens (B, N, d)")
    rotary = found.rotary if isinstance(found, BlockPlan) else None
    if not call.arguments:
        without = isinstance(found, BlockPlan) and found.style != "separate" and rotary is None
        return found._replace(passed=()) if without else found
    if rotary is not None and call.arguments == (rotary.argument,):
        return found
    passes = f"its model {'passes' if call.sure else 'may pass'} {', '.join(call.arguments)} with every call"
    if not call.sure:
        passes += " (an example shows whether it does)"
    if isinstance(found, AttentionPlan) or found.mlp is None or not found.hands_on(call.arguments):
        raise Unlike(passes)
    others = [reason for reason in found.reasons if not reason.startswith("attention: ")]
    return found._replace(attention=None, core=None, reasons=(f"attention: {passes}", *others))


def _confirmed(module: nn.Module, kind: str, known: dict) -> Plan:
    """The plan after it was tried out. Layers that differ in nothing but weights and drop rates are tried out once."""
    found = plan(module, kind)
    key = _signature(module) if kind != "decoder" else id(module)
    if key not in known:
        try:
            known[key] = confirmed(module, found)
        except Unlike as reason:
            known[key] = reason
    if isinstance(known[key], Unlike):
        raise known[key]
    return known[key]


def _signature(module: nn.Module) -> Any:
    flags = {n: v for n, v in module.__dict__.items() if n not in _NO_FLAGS}
    shapes = tuple((n, None if p is None else (p.dtype, *p.shape)) for n, p in module._parameters.items())
    children = tuple((n, None if m is None else _signature(m)) for n, m in module._modules.items())
    plain = sorted((n, v if attributes_of(v) is None else id(v)) for n, v in flags.items())
    return original_class(type(module)), repr(plain), shapes, children


def _switch_operators(name: str, module: OperatorModule, operators: Any) -> Row:
    """Modules of this project have their operators in an attribute."""
    before = module.ops
    if type(before) is type(operators) and getattr(before, "name", None) == operators.name:
        return Row(name, _was(module), module.computes, already=True)
    module.__dict__.setdefault("_segmenter", before)
    module.ops = operators
    return Row(name, _was(module), module.computes)


def _undo(module: nn.Module) -> bool:
    if isinstance(module, OperatorModule):
        module.ops = module.__dict__.pop("_segmenter")
        return True
    original = original_class(type(module))
    if original is type(module):  # somebody made a subclass of the accelerated class, whose business it is
        return False
    module.__class__ = original
    for name in OURS:
        module.__dict__.pop(name, None)
    return True


def _nothing(model: nn.Module, report: Report) -> str:
    looked_for = (
        f"accelerate: nothing in {type(model).__name__} can be swapped. Looked for pre-norm blocks (norm1, attn, "
        "norm2, mlp or ffn; or two LayerNorms, q, k, v, an MLP), attention layers (qkv, proj) and mask transformers "
        "(cls_emb, mask_norm)"
    )
    if report.left:
        row = report.left[0]
        return f"{looked_for}; found {len(report.left)} left alone, the first {row.name or 'the model'}: {row.reason}"
    return f"{looked_for}; for models of transformers see segmenter.dropin.transformers"


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


_NO_FLAGS = {*nn.Module().__dict__, *OURS, *RATES}
