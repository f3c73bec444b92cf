"""The one guard: how often a block asks it, and that no answer outlives what it rests on."""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

from segmenter import guard, layers
from segmenter.dropin import guard as recorded
from segmenter.dropin.accelerate import accelerate
from segmenter.ops import EAGER
from tests.support import blocks


def ours():
    torch.manual_seed(0)
    return layers.Block(blocks.WIDTH, 2, 2 * blocks.WIDTH, 0.1, 0.1, ops=EAGER).eval()


def theirs():
    pytest.importorskip("triton")
    block = blocks.block("packed", accelerated=False, dropout=0.1, drop_path=0.1).cpu()
    assert accelerate(block).swapped
    return block


MADE = {"ours": ours, "theirs": theirs}
ASKING = {  # file of this project -> functions in it that answer whether something may run fused
    "guard.py": {"decision", "decide", "why_not_bypass", "replaced", "unlike_before"},
    "layers.py": {"decide", "why_not_fused", "why_written_out"},
    "modules.py": {"decide"},
    "ops.py": {"why_not_tensor", "why_not_on"},
}


def tokens(**kwargs):
    return torch.randn(1, 5, blocks.WIDTH, generator=torch.Generator().manual_seed(1)).to(**kwargs)


def asked(run):
    """Names of the functions of ASKING that were called while `run` ran."""
    names = []

    def note(frame, event, _):
        code = frame.f_code
        file = code.co_filename.rpartition("/")[2]
        if event == "call" and "segmenter" in code.co_filename and code.co_name in ASKING.get(file, ()):
            names.append(code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return names


@pytest.mark.parametrize("made", MADE)
def test_a_forward_of_a_block_asks_once(made):
    block, x = MADE[made](), tokens()
    assert len(asked(lambda: block(x))) > 1  # the first call looks at every layer
    assert asked(lambda: block(x)) == asked(lambda: block(x)) == ["decision"]
    block.mlp.fc1.register_forward_hook(lambda *args: None)
    assert "why_not_bypass" in asked(lambda: block(x))  # asks anew, once
    refused = asked(lambda: block(x))  # layers of ours that are called are asked themselves, as ever
    assert refused.count("decision") == 1 and "decide" not in refused


@pytest.mark.parametrize("kind", ["packed", "tuple", "wrapped"])
def test_an_attention_layer_asks_once(kind):
    attention, x = blocks.block(kind).cpu().attn, tokens()
    if kind == "tuple":  # its own forward also returns weights: the block computes it
        assert not hasattr(attention, "decide")
        return
    attention(x)
    assert asked(lambda: attention(x)) == ["decision"]


class Lora(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Halving(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def replace_child(block):
    block.mlp._modules["fc2"] = Lora(2 * blocks.WIDTH, blocks.WIDTH)


def exchange_class(block):
    block.mlp.fc2.__class__ = Lora


def other_weights(block):
    weight = block.mlp.fc1.weight.data
    block.mlp.fc1.weight = nn.Parameter(TwoTensor(weight, weight.clone()))


def other_type(block):
    block.mlp.fc1.weight.data = block.mlp.fc1.weight.data.double()


def other_hooks(block):
    """As tools do that put an empty dictionary in the place of the hooks, and later fill it."""
    block.mlp.fc1._forward_hooks = type(block.mlp.fc1._forward_hooks)()
    guard.decision(block, tokens())
    block.mlp.fc1._forward_hooks[0] = lambda *args: None


CHANGES = {  # what makes some half run otherwise than before
    "forward hook": lambda block: block.mlp.fc1.register_forward_hook(lambda *args: None),
    "pre-hook": lambda block: block.attn.proj.register_forward_pre_hook(lambda *args: None),
    "backward hook": lambda block: block.norm1.register_full_backward_hook(lambda *args: None),
    "backward pre-hook": lambda block: block.mlp.register_full_backward_pre_hook(lambda *args: None),
    "dictionary of hooks": other_hooks,
    "setattr": lambda block: setattr(block.attn, "qkv", Lora(blocks.WIDTH, 3 * blocks.WIDTH)),
    "add_module": lambda block: block.mlp.add_module("adapter", nn.Identity()),
    "child of a leaf": lambda block: block.mlp.fc1.add_module("adapter", nn.Identity()),
    "_modules": replace_child,
    "class": exchange_class,
    "forward of one layer": lambda block: setattr(block.mlp.act, "forward", torch.tanh),
    "_call_impl of one layer": lambda block: setattr(block.mlp.act, "_call_impl", torch.tanh),
    "parametrisation": lambda block: nn.utils.parametrize.register_parametrization(
        block.mlp.fc2, "weight", nn.Identity()
    ),
    "flag": lambda block: setattr(block.mlp.act, "approximate", "tanh"),
    "shape of a norm": lambda block: setattr(block.norm2, "normalized_shape", (5, blocks.WIDTH)),
    "training": lambda block: block.train(),
    "training of one layer": lambda block: block.mlp.drop.train(),
    "weights of another class": other_weights,
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_show_in_the_next_call(made, change):
    block, x = MADE[made](), tokens()
    before = guard.decision(block, x)
    assert guard.decision(block, x) is before
    CHANGES[change](block)
    if (made, change) == ("ours", "child of a leaf"):  # which nn.Linear does not call
        assert guard.decision(block, x) == before
        return
    after = guard.decision(block, x)
    assert after == block.decide(x) != before
    assert any(isinstance(reason, str) for reason in after)


@pytest.mark.parametrize("made", MADE)
def test_rates_types_and_scales_show_in_the_next_call(made):
    block, x = MADE[made](), tokens()
    block.mlp.drop.p, block.mlp.drop.training = 0.0, True
    before = guard.decision(block, x)
    block.mlp.drop.p = 0.5
    assert guard.decision(block, x) == block.decide(x) != before
    block.mlp.drop.p = 0.0
    assert guard.decision(block, x) == before
    if made == "ours":
        block.attn.scale *= 2
        assert guard.decision(block, x)[1] == "another scale of the scores"
        block.attn.scale /= 2
        assert guard.decision(block, x)[1] is None
        block.attn.qkv.weight.data = block.attn.qkv.weight.data[:48]  # heads of another size
        assert guard.decision(block, x)[1] == "another scale of the scores"
    else:
        other_type(block)
        assert guard.decision(block, x).mlp == "mlp.fc1 is float64, the input float32"
        with torch.autocast("cpu", torch.bfloat16):
            assert guard.decision(block, x).mlp is None
        assert guard.decision(block, x.double()).whole == "float64 input"
        assert guard.decision(block, x).whole is None


@pytest.mark.parametrize("made", MADE)
def test_what_is_outside_shows_in_the_next_call(made, monkeypatch):
    block, x = MADE[made](), tokens()
    before = guard.decision(block, x)

    def differs():
        found = guard.decision(block, x)
        assert found == block.decide(x)
        return found != before

    handle = torch_module.register_module_forward_hook(lambda *args: None)
    assert differs()
    handle.remove()
    with Halving():
        assert differs()
    replaced = [(F, "gelu"), (nn.Linear, "forward"), (nn.Module, "__call__")]
    replaced += [(type(block.mlp), name) for name in ("forward", "__call__", "_call_impl")]
    for owner, name in replaced:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *args: None, raising=False)
            assert differs(), (owner, name)
        assert not differs()
    if made == "theirs":
        with torch.autograd.forward_ad.dual_level():
            assert differs()
        assert not differs()
        torch.func.vmap(lambda _: torch.zeros(1) if differs() else 1 / 0)(torch.zeros(2))
        with monkeypatch.context() as patched:
            patched.setattr(type(block)._segmenter_original, "forward", lambda *args: None)
            assert differs()
    assert not differs()


@pytest.mark.parametrize("made", MADE)
def test_copies_ask_for_themselves(made):
    block, x = MADE[made](), tokens()
    guard.decision(block, x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), copy.copy(block)):
        assert guard.decision(twin, x) == twin.decide(x)
        twin.train()
        assert guard.decision(twin, x) == twin.decide(x)
        block.eval()
        assert guard.decision(block, x) == block.decide(x)


def test_an_answer_keeps_nothing_alive():
    """Neither a model that nobody has any more, nor layers that were replaced, nor results that somebody left."""
    gc.collect()
    gc.disable()
    try:
        block, x = ours(), tokens()
        block.attn.last = torch.zeros(3)
        guard.decision(block, x)
        result, layer, whole = (weakref.ref(thing) for thing in (block.attn.last, block.mlp.fc1, block))
        block.attn.last, block.mlp.fc1 = None, None
        assert result() is layer() is None
        del block
        assert whole() is None
    finally:
        gc.enable()


def test_layers_without_the_dictionaries_of_a_module_are_asked_each_time():
    block, x = ours(), tokens()
    block.mlp = torch.jit.trace(block.mlp, x)
    for _ in range(2):
        assert guard.decision(block, x)[2].endswith("in place of segmenter.layers.Attention")
    assert block(x).shape == x.shape


@pytest.mark.parametrize("made", MADE)
def test_parameters_without_a_shape_are_none_of_its_business(made):
    block, x = MADE[made](), tokens()
    block.mlp.fc1 = nn.LazyLinear(2 * blocks.WIDTH)
    assert guard.decision(block, x) == block.decide(x)
    assert block(x).shape == x.shape
    assert guard.decision(block, x) == block.decide(x)


def test_what_is_recorded_is_all_that_is_asked_about():
    block = theirs()
    plan = block.__dict__["_segmenter"].plan
    assert recorded.unlike_before(block, plan.attention) is recorded.unlike_before(block, plan.mlp) is None
    del block._modules["norm2"]
    assert recorded.unlike_before(block, plan.mlp) == "it has other layers than before"
