"""Hooks on all modules and what is replaced on classes or in torch, after `accelerate`: the original runs, until it is
undone. Our own blocks keep the same rule."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.flop_counter
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")

import segmenter.guard
from segmenter import layers
from segmenter.dropin.accelerate import accelerate, why_not
from tests.support import mmseg_like, official
from tests.support.blocks import ATTENTION, DEVICE, MLP, TIGHT, WIDTH, PlainAttention, block, original, replace, tokens
from tests.support.spies import kernels_run


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


def own_block():
    torch.manual_seed(0)
    return layers.Block(WIDTH, 2, 2 * WIDTH, 0.0, 0.0).to(DEVICE).eval()


HOOKS = {
    "forward": (torch_module.register_module_forward_hook, lambda m, args, out: out * 0.5),
    "forward, always called": (
        functools.partial(torch_module.register_module_forward_hook, always_call=True),
        lambda m, args, out: out * 0.5,
    ),
    "before": (torch_module.register_module_forward_pre_hook, lambda m, args: (args[0] * 0.5, *args[1:])),
}


@pytest.mark.parametrize("kind", ["packed", "tuple", "wrapped"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_all_modules(name, kind, kernels):
    register, hook = HOOKS[name]
    module, x, seen = block(kind), tokens(), []
    twin = original(module)
    plain = module(x)
    kernels.clear()

    def only_linear(m, *args):
        if isinstance(m, nn.Linear):
            seen.append(m.in_features)
            return hook(m, *args)
        return None

    handle = register(only_linear)
    try:
        want = twin(x)
        there = list(seen)
        seen.clear()
        got = module(x)
        assert (seen, kernels) == (there, [])
        assert "hooks on all modules" in str(why_not(module))
    finally:
        handle.remove()
    torch.testing.assert_close(got, want, **TIGHT)
    assert (got - plain).abs().max() > 0.01
    assert why_not(module) == {}
    torch.testing.assert_close(module(x), plain)
    assert kernels == ATTENTION + MLP


@pytest.mark.parametrize("name", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
def test_backward_hooks_on_all_modules(name, kernels):
    module, seen = block(), []
    handle = getattr(torch_module, name)(lambda m, *args: seen.append(type(m)) and None)
    try:
        module(tokens().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 4
    assert kernels == []


def test_hooks_on_all_modules_reach_our_own_blocks(kernels):
    module, seen = own_block(), []
    accelerate(module)
    handle = torch_module.register_module_forward_hook(lambda m, *args: seen.append(type(m)) and None)
    try:
        module(tokens())
        assert why_not(module) == {"": ["hooks", "hooks"]}
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 4 and seen.count(nn.GELU) == 1
    assert kernels == []  # the hook sees the attention layer's tokens and weights, so they are written out
    module(tokens())
    assert kernels == ATTENTION + MLP


def test_the_flop_counter_of_pytorch_counts_the_kernels(kernels):
    """It hooks all modules, only to know where it is."""
    module = own_block()
    accelerate(module)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        module(tokens())
    assert kernels == ATTENTION + MLP


def plus_one(function):
    @functools.wraps(function)
    def changed(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return changed


def changed_first(function):
    @functools.wraps(function)
    def changed(*args, **kwargs):
        out = function(*args, **kwargs)
        return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1

    return changed


REPLACED = [  # (owner, name, structure)
    *((cls, "forward", "packed") for cls in (nn.Linear, nn.LayerNorm, nn.GELU)),
    (nn.GELU, "__call__", "packed"),
    (nn.Linear, "_call_impl", "packed"),
    (PlainAttention, "__call__", "packed"),
    (nn.Linear, "forward", "tuple"),
    (nn.MultiheadAttention, "forward", "wrapped"),
    (nn.Sequential, "forward", "wrapped"),
    (mmseg_like.Linear, "forward", "wrapped"),
    (mmseg_like.FFN, "forward", "wrapped"),
    (mmseg_like.MultiheadAttention, "forward", "wrapped"),
    (mmseg_like.TransformerEncoderLayer, "forward", "wrapped"),
    (PlainAttention, "forward", "packed"),
    (official.Block, "forward", "tuple"),
    (official.FeedForward, "forward", "packed"),
    (nn.Module, "__call__", "packed"),
    (nn.Module, "_call_impl", "packed"),
    (F, "linear", "packed"),
    (F, "layer_norm", "packed"),
    (F, "gelu", "tuple"),
    (torch.Tensor, "softmax", "packed"),
    (F, "multi_head_attention_forward", "wrapped"),
]


@pytest.mark.parametrize(("owner", "name", "kind"), REPLACED, ids=lambda value: getattr(value, "__name__", value))
def test_replaced_methods_and_functions(owner, name, kind, kernels, monkeypatch):
    module, x = block(kind), tokens()
    twin = original(module)
    plain = module(x)
    kernels.clear()
    change = changed_first if "ulti" in f"{owner}{name}" or owner is nn.Module else plus_one
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, change(getattr(owner, name)), raising=False)
        got, want = module(x), twin(x)
        assert why_not(module) != {}
    torch.testing.assert_close(got, want, **TIGHT)
    assert (got - plain).abs().max() > 1e-3
    ran = set(kernels)
    assert ran < {*ATTENTION, *MLP}
    kernels.clear()
    torch.testing.assert_close(module(x), plain)
    assert kernels == ATTENTION + MLP
    assert why_not(module) == {}


def test_replaced_before_accelerate_again(kernels, monkeypatch):
    """Who asks anew gets the reason in the report; layers are called."""
    module, x = block(), tokens()
    monkeypatch.setattr(nn.Linear, "forward", plus_one(nn.Linear.forward))
    report = accelerate(module)
    assert report.rows[0].became is None
    assert "a forward replaced on its class torch.nn.modules.linear.Linear" in report.rows[0].reason
    torch.testing.assert_close(module(x), original(module)(x), **TIGHT)
    assert kernels == ["attention"]


def test_replaced_by_another_function_of_pytorch(kernels, monkeypatch):
    module, x = block(), tokens()
    monkeypatch.setattr(F, "dropout", F.alpha_dropout)
    torch.testing.assert_close(module(x), original(module)(x), **TIGHT)
    assert kernels == []
    why = ["torch.nn.functional.dropout, which has been replaced"]
    assert why_not(module) == {"": why, "attn": why}


BEFORE_IMPORT = """
import functools, torch
import torch.nn.functional as F
{}
from segmenter.guard import altered
print(altered())
"""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("F.gelu = functools.wraps(F.gelu)(lambda *args, gelu=F.gelu, **kwargs: gelu(*args, **kwargs))", "gelu"),
        ("F.scaled_dot_product_attention = functools.partial(F.scaled_dot_product_attention, is_causal=True)",
         "scaled_dot_product_attention"),
        ("F.layer_norm = F.normalize", "layer_norm"),
    ],
)  # fmt: skip
def test_replaced_before_this_package_is_imported(line, name):
    command = [sys.executable, "-c", BEFORE_IMPORT.format(line)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == f"torch.nn.functional.{name}, which has been replaced\n", result.stderr


def test_replaced_on_an_accelerated_class(kernels, monkeypatch):
    """As tools do that say type(module).forward = ..."""
    module, x = block(), tokens()
    plain = module(x)
    kernels.clear()
    monkeypatch.setattr(type(module.attn), "forward", plus_one(type(module.attn).forward))
    assert (module(x) - plain).abs().max() > 0.5
    assert "attn has a forward replaced on its class" in str(why_not(module))
    assert set(kernels) == {"attention", *MLP}


def test_call_replaced_on_one_layer(kernels):
    module, calls = block(), []
    inner = module.mlp.fc1._call_impl
    module.mlp.fc1._call_impl = lambda *args: calls.append(1) or inner(*args)
    module(tokens())
    assert (calls, kernels) == ([1], ATTENTION)
    assert why_not(module) == {"": ["MLP: mlp.fc1 has a replaced forward"]}


@pytest.mark.parametrize(
    ("owner", "name"), [(layers.Mlp, "forward"), (layers.Attention, "forward"), (nn.Linear, "forward"), (F, "gelu")]
)
def test_our_own_blocks_call_what_is_replaced(owner, name, kernels, monkeypatch):
    module, x, calls = own_block(), tokens(), []
    accelerate(module)
    module(x)
    assert kernels == ATTENTION + MLP
    kernels.clear()
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    module(x)
    assert calls
    assert set(kernels) < {*ATTENTION, *MLP}
    assert "replaced" in str(why_not(module))


def test_function_modes(kernels):
    """One of somebody's own sees what the original calls. torch.device is one, too, and asks for nothing."""

    class Halving(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return out * 0.5 if func is F.linear else out

    module, x = block(), tokens()
    twin = original(module)
    with Halving():
        got, want = module(x), twin(x)
        assert "the TorchFunctionMode" in str(why_not(module))
        assert "Halving" in str(why_not(module))
    torch.testing.assert_close(got, want, **TIGHT)
    assert kernels == []
    with torch.device(DEVICE):
        torch.testing.assert_close(module(x), twin(x), **TIGHT)
    assert kernels == ATTENTION + MLP


def test_tokens_of_another_class(kernels):
    """Whose functions may do something else."""

    class Doubling(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out * 2 if func is F.gelu else out

    module = block()
    x = tokens().as_subclass(Doubling)
    assert torch.equal(module(x), original(module)(x))
    assert kernels == []
    assert "an input of type" in str(why_not(module))


def test_replacements_cost_little_and_are_seen_once():
    assert segmenter.guard.altered() is None
    assert segmenter.guard.replaced(nn.Linear) is None
    assert segmenter.guard.qualified(nn.Linear) == "torch.nn.modules.linear.Linear"
    assert segmenter.guard.qualified(int) == "int"


ODD = {  # of a class that is known, and something else all the same
    "mlp.act": lambda: nn.GELU(approximate="tanh"),
    "norm1": lambda: nn.LayerNorm((5, WIDTH)),
    "norm2": lambda: nn.LayerNorm((5, WIDTH)),
}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("path", ODD)
def test_flags_of_layers_that_come_later(path, accelerated, kernels):
    """In our own blocks with eager operators, too."""
    own, x = own_block(), tokens()
    twin, theirs = block("tuple", accelerated=False), block("tuple")
    for module in (own, twin, theirs):
        replace(module, path, lambda _: ODD[path]().to(DEVICE))
    twin.load_state_dict(own.state_dict())
    theirs.load_state_dict(own.state_dict())
    if accelerated:
        accelerate(own)
    for module in (own, theirs):
        torch.testing.assert_close(module(x), twin(x), atol=1e-5, rtol=1e-5)
    assert accelerated or set(kernels) < {*ATTENTION, *MLP}
