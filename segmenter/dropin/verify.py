"""Tries out on random numbers whether a module computes what its structure says.

Attributes alone do not tell a pre-norm block from a post-norm one, the exact GELU from an approximation, or a subclass
of nn.Linear that only has another name from one that rounds its weights. So a copy of the module with random weights,
in float64 on the CPU, runs its original forward, and the formulas that would replace it have to give the same.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from segmenter.dropin import modules
from segmenter.dropin.calls import ANY, given, is_wish, required
from segmenter.dropin.guard import OURS, RATES, Unlike, original_class, record_linear
from segmenter.dropin.recognise import AttentionPlan, BlockPlan, DecoderPlan, Plan
from segmenter.dropin.rotary import FORMS, Rotary
from segmenter.errors import cause
from segmenter.layers import Rotation
from segmenter.ops import EAGER

TOLERANCE = 1e-6  # relative; the tanh form of GELU is off by 1e-4, LayerNorm in float32 by 1e-7
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def confirmed(module: nn.Module, plan: Plan) -> Plan:
    """The plan, without the parts that turned out to be something else.

    Raises:
        Unlike: nothing of it is left, or the original forward cannot be run on random numbers.
    """
    check = {AttentionPlan: _attention, BlockPlan: _block, DecoderPlan: _decoder}[type(plan)]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        copies = [random_copy(module, training) for training in (False, True)]
        try:
            return check(copies, plan)
        except Unlike:
            raise
        except Exception as error:  # whatever somebody else's forward raises
            raise Unlike(f"it could not be tried out ({type(error).__name__}: {cause(error, 120)})") from error


def random_copy(module: nn.Module, training: bool) -> nn.Module:
    """A copy without hooks, with random float64 weights and nothing dropped. Nothing is shared but plain objects."""
    cls = original_class(type(module))
    copy = cls.__new__(cls)
    state = {name: value for name, value in module.__dict__.items() if name not in OURS}
    state |= {name: OrderedDict() for name in _HOOKS if name in state}
    state |= {name: 0.0 for name in RATES if isinstance(state.get(name), float)}
    state |= {"training": training, "_compiled_call_impl": None}
    state["_parameters"] = {n: _random(n, p) for n, p in module._parameters.items()}
    state["_buffers"] = {n: _random(n, b) for n, b in module._buffers.items()}
    state["_modules"] = {n: _child_copy(m, training) for n, m in module._modules.items()}
    copy.__dict__.update(state)
    return copy


def _child_copy(module: nn.Module | None, training: bool) -> nn.Module | None:
    if module is None:
        return None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or _is_linear(module):
        return random_copy(module, training)
    return StandIn(weight.shape)


def _is_linear(module: nn.Module) -> bool:
    try:
        record_linear(module, (), masked=True)
        return True
    except Unlike:
        return False


class StandIn(nn.Module):
    """In place of an adapted or quantised linear layer, which may not run in float64 on the CPU.

    Such a layer has to be called, never read: what there is to read is NaN.
    """

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.matrix = _randn(*shape) * shape[1] ** -0.5
        self.weight = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        self.bias = self.weight[:, 0]
        self.out_features, self.in_features = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T


def _random(name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    if not tensor.is_floating_point():
        raise Unlike(f"{name} is {str(tensor.dtype).removeprefix('torch.')}")
    random = _randn(*tensor.shape)
    if tensor.ndim > 1:
        random *= tensor.shape[-1] ** -0.5
    else:
        random = 0.5 * random + (name == "weight")
    return nn.Parameter(random) if isinstance(tensor, nn.Parameter) else random


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device="cpu")


def _same(copies: list[nn.Module], ours: Callable, theirs: Callable) -> bool:
    for copy in copies:
        got, want = ours(copy), theirs(copy)
        if got.shape != want.shape or not (got - want).abs().max() <= TOLERANCE * want.abs().max():
            return False
    return True


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _attention(copies: list[nn.Module], plan: AttentionPlan) -> AttentionPlan:
    x = _randn(2, 7, _width(copies[0], plan.style))
    if plan.style == "wrapped":
        y = _randn(*x.shape)
        same = _same(copies, lambda m: modules.wrapped_core(m, plan, x, y, EAGER), lambda m: m(x, identity=y))
        returns_tuple = False
    else:
        returns_tuple = isinstance(copies[0](x), tuple)
        same = _same(copies, lambda m: modules.attention_core(m, plan, x, EAGER), lambda m: _first(m(x)))
    if not same:
        raise Unlike("it computes something else than softmax(q k^T / sqrt(d)) v")
    return plan._replace(returns_tuple=returns_tuple)


def _width(attention: nn.Module, style: str) -> int:
    return attention.attn.embed_dim if style == "wrapped" else attention.qkv.weight.shape[1]


def _called(block: nn.Module, x: torch.Tensor, **arguments: Any) -> Any:
    """Its output for tokens, and None for whatever else it cannot do without."""
    return block(x, **{**dict.fromkeys(required(block)), **arguments})


def _block(copies: list[nn.Module], plan: BlockPlan) -> BlockPlan:
    plan = plan._replace(renamed=_renamed(copies[0], plan))
    plan = plan._replace(rotary=_rotary(copies, plan))
    x, rotation, positions = _positions(copies[0], plan)
    if not positions:
        plan = _with_attention(copies, plan, x)

    def first(block: nn.Module) -> torch.Tensor:
        return modules.by_layers(block, plan, x, "1", passed=positions)

    def second(block: nn.Module) -> torch.Tensor:
        return modules.by_layers(block, plan, x, "2")

    def called(block: nn.Module) -> torch.Tensor:
        return _called(block, x, **positions)

    if not _same(copies, lambda m: modules.by_layers(m, plan, first(m), "2"), called):
        raise Unlike("its forward is not that of a pre-norm block")
    if plan.style == "separate" and not _same(
        [_marked(m, plan) for m in copies], lambda m: modules.by_layers(m, plan, first(m), "2"), called
    ):
        raise Unlike("it calls the layers without weights elsewhere than after each half")
    reasons, core = list(plan.reasons), None
    attention, mlp = plan.attention, plan.mlp
    if attention and not _same(copies, lambda m: modules.attention_fused(m, plan, x, EAGER, rotation), first):
        attention = None
        reasons.append("attention: it computes something else than its parts say")
    forms = (plan._replace(tanh=tanh) for tanh in (False, True)) if mlp else ()
    form = next((f for f in forms if _same(copies, lambda m, f=f: modules.mlp_fused(m, f, x, EAGER), second)), None)
    if mlp and form is None:
        mlp = None
        reasons.append("MLP: it computes something else than its parts say")
    inner = copies[0]._modules[plan.names["attn"]]
    passed = plan.passed if plan.style != "wrapped" and _only_passed(copies[0], plan, x, positions) else ()
    if positions and not passed:
        raise Unlike("it does more with its positions than hand them on")
    returns_tuple = plan.core and plan.style == "packed" and isinstance(inner(x), tuple)
    if returns_tuple and _same(copies, lambda m: modules.by_layers(m, plan, x, "1", EAGER), first):
        core = plan.core  # its own forward cannot be replaced
    if attention is mlp is core is None:
        raise Unlike("; ".join(reasons))
    rotary = plan.rotary if attention and passed else None
    found = plan._replace(attention=attention, mlp=mlp, core=core, reasons=tuple(reasons))
    return found._replace(passed=passed, rotary=rotary, tanh=form is not None and form.tanh)


def _positions(block: nn.Module, plan: BlockPlan) -> tuple[torch.Tensor, Rotation | None, dict[str, Any]]:
    """(tokens, what turns their queries and keys, arguments that say so) to try a block with: if it cannot be called
    without positions, else of the latter two nothing."""
    if plan.rotary is None or not plan.rotary.needed:
        return _randn(2, 7, _columns(block, plan)), None, {}
    x, rotation = _turned(block, plan, plan.rotary)
    return x, rotation, {plan.rotary.argument: plan.rotary.value(rotation)}


def _columns(block: nn.Module, plan: BlockPlan) -> int:
    return next(block._modules[plan.names["norm1"]].parameters()).shape[0]


def _turned(
    block: nn.Module, plan: BlockPlan, rotary: Rotary, more: int = 0, by_head: bool = False
) -> tuple[torch.Tensor, Rotation]:
    """Six tokens that are to be turned, behind others (one and `more` if any number will do), and tables of which no
    column equals another."""
    extra = 1 + more if rotary.extra is None else rotary.extra
    tables = (_randn(*((2, plan.heads) if by_head else ()), 6, rotary.columns) for _ in range(2))
    return _randn(2, extra + 6, _columns(block, plan)), Rotation(*tables, rotary.interleaved)


def _rotary(copies: list[nn.Module], plan: BlockPlan) -> Rotary | None:
    """What the block does with rotary positions, or None if it takes none that the operators know."""
    if plan.attention is None or plan.style == "wrapped":
        return None
    attention = copies[0]._modules[plan.names["attn"]]
    rows = attention._modules[plan.inner.get("q", "qkv")].weight.shape[0]
    columns = rows // (plan.heads if "q" in plan.inner else 3 * plan.heads)
    extra = attention.__dict__.get("num_prefix_tokens")
    extra = extra if isinstance(extra, int) else None
    arguments = [name for name in plan.passed if name != ANY and not is_wish(name)]
    for argument, form, interleaved in itertools.product(arguments, FORMS, (False, True)):
        rotary = Rotary(argument, *form, interleaved, plan.heads, columns, extra)
        if _turns(copies, plan, rotary) and _turns(copies, plan, rotary, more=1):
            needed = not _runs(attention, _randn(2, 7, _columns(copies[0], plan)))
            return rotary._replace(by_head=_turns(copies, plan, rotary, by_head=True), needed=needed)
    return None


def _turns(copies: list[nn.Module], plan: BlockPlan, rotary: Rotary, **how: Any) -> bool:
    """Whether the block and its parts compute the same with positions of this form. `how`: as for `_turned`."""
    x, rotation = _turned(copies[0], plan, rotary, **how)
    positions = {rotary.argument: rotary.value(rotation)}

    def first(block: nn.Module) -> torch.Tensor:
        return modules.by_layers(block, plan, x, "1", passed=positions)

    try:
        return _same(copies, lambda m: modules.attention_fused(m, plan, x, EAGER, rotation), first) and _same(
            copies, lambda m: modules.by_layers(m, plan, first(m), "2"), lambda m: _called(m, x, **positions)
        )
    except Exception:  # whatever somebody else's forward raises
        return False


def _runs(attention: nn.Module, x: torch.Tensor) -> bool:
    """Whether an attention layer can be called with tokens alone."""
    try:
        attention(x)
    except Exception:  # whatever somebody else's forward raises
        return False
    return True


def _with_attention(copies: list[nn.Module], plan: BlockPlan, x: torch.Tensor) -> BlockPlan:
    """Puts another layer in the place of one that needs more than tokens, such as positions, and has no part in it."""
    name = plan.names["attn"]
    try:
        copies[0]._modules[name](x)
    except Exception as error:  # whatever somebody else's forward raises
        if plan.style != "separate" or plan.mlp is None:
            raise
        for block in copies:
            block._modules[name] = _AnyAttention(x.shape[2])
        if plan.attention is not None:
            reason = f"attention: with tokens alone it raises {type(error).__name__}: {cause(error, 120)}"
            plan = plan._replace(attention=None, core=None, reasons=(reason, *plan.reasons))
    return plan


def _marked(block: nn.Module, plan: BlockPlan) -> nn.Module:
    """A copy whose layers that may drop something, and now do nothing, multiply, so that it shows where they are."""
    copy = block.__class__.__new__(block.__class__)
    copy.__dict__.update(block.__dict__)
    names = {plan.names["drop_path1"], plan.names["drop_path2"]} - {""}
    factors = {name: _Factor(2.0 + i) for i, name in enumerate(sorted(names))}
    copy._modules = {**block._modules, **factors}
    return copy


class _Factor(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class _AnyAttention(nn.Module):
    """In place of an attention layer: takes anything, and returns a pair as those of separate projections do."""

    def __init__(self, width: int):
        super().__init__()
        self.matrix = _randn(width, width) * width**-0.5

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return x @ self.matrix, None


class _Listener(nn.Module):
    """In place of an attention layer: notes what else it is called with, and calls it with tokens and what it needs."""

    def __init__(self, attention: nn.Module, needed: dict[str, Any]):
        super().__init__()
        self.attention, self.needed, self.calls = attention, needed, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(given(self.attention, args, kwargs))
        wrapped = {"identity": kwargs["identity"]} if "identity" in kwargs else {}
        return self.attention(args[0] if args else next(iter(kwargs.values())), **wrapped, **self.needed)


def _listened(
    parent: nn.Module, name: str, x: torch.Tensor, needed: dict[str, Any], **arguments: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """(output, what the child `name` got besides tokens in each call) of a call of its parent. `needed`: arguments
    that the child cannot do without, whatever it gets."""
    listener = _Listener(parent._modules[name], needed)
    parent._modules[name] = listener
    try:
        return _called(parent, x, **arguments), listener.calls
    finally:
        parent._modules[name] = listener.attention


def _renamed(block: nn.Module, plan: BlockPlan) -> tuple[tuple[str, str], ...]:
    """(its own name, the attention layer's name) of the arguments that a block hands on under another name."""
    found, x = [], _randn(2, 7, _columns(block, plan))
    for name in plan.passed:
        argument = object()
        if plan.style == "wrapped" or name == ANY:
            continue
        try:
            _, calls = _listened(block, plan.names["attn"], x, {}, **{name: argument})
        except Exception:  # whatever somebody else's forward raises
            continue
        names = (other for call in calls for other, value in call.items() if value is argument)
        found += [(name, other) for other in names if other != name]
    return tuple(dict.fromkeys(found))


def _only_passed(block: nn.Module, plan: BlockPlan, x: torch.Tensor, needed: dict[str, Any]) -> bool:
    """Whether the block does nothing with its optional arguments but hand them on to its attention layer, by name."""
    want = _called(block, x, **needed)
    try:
        for name in plan.passed:
            argument, name = object(), "something_else" if name == ANY else name  # nothing can be computed with it
            got, calls = _listened(block, plan.names["attn"], x, needed, **{name: argument})
            if calls != [{dict(plan.renamed).get(name, name): argument}] or not torch.equal(got, want):
                return False
    except Exception:  # whatever somebody else's forward raises
        return False
    return bool(plan.passed)


def received(parent: nn.Module, name: str) -> tuple[str, ...] | None:
    """What the attention layer `name` of a module gets besides tokens when the module is called with tokens alone; None
    if that cannot be found out."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
            copy = random_copy(parent, training=False)
            attention = copy._modules[name]
            style = "packed" if "qkv" in attention._modules else "wrapped"
            _, calls = _listened(copy, name, _randn(2, 7, _width(attention, style)), {})
    except Exception:  # whatever somebody else's forward raises
        return None
    return tuple(dict.fromkeys(n for call in calls for n in call)) if calls else None


def _decoder(copies: list[nn.Module], plan: DecoderPlan) -> DecoderPlan:
    decoder = copies[0]
    first = decoder._modules["proj_dec" if plan.style == "packed" else "dec_proj"]
    tokens = _randn(2, 6, first.weight.shape[1])
    if plan.style == "packed":
        size = (2 * decoder.patch_size, 3 * decoder.patch_size)

        def theirs(module: nn.Module) -> torch.Tensor:
            return module(tokens, size)
    else:
        maps = tokens.transpose(1, 2).unflatten(2, (2, 3))
        index = decoder.in_index if isinstance(decoder.in_index, int) else max(decoder.in_index)

        def theirs(module: nn.Module) -> torch.Tensor:
            return module([maps] * (index + 1 or 1))

    def ours(module: nn.Module) -> torch.Tensor:
        return modules.decode(module, plan, tokens, EAGER).transpose(1, 2).unflatten(2, (2, 3))

    if not _same(copies, ours, theirs):
        raise Unlike("its forward is not that of a mask transformer")
    return plan
