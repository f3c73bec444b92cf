"""What a report of `accelerate` names runs on the kernels in a real call; what cannot be looked at stays untouched."""

import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
timm = pytest.importorskip("timm")

from segmenter.dropin import accelerate as acceleration  # noqa: E402
from segmenter.dropin.accelerate import accelerate, restore, why_not  # noqa: E402
from tests.support import mmseg_like, official  # noqa: E402
from tests.support.blocks import DEVICE, TIGHT, WIDTH, PlainAttention, PlainBlock, block, replace, tokens  # noqa: E402
from tests.support.tiny import tiny_model  # noqa: E402

NEEDED = {"attention": "attention", "attention core": "attention", "MLP": "layernorm_mlp", "class masks": "mask_head"}


class Count(TorchDispatchMode):
    """Notes our operators, each with the modules within whose calls it ran."""

    def __init__(self):
        super().__init__()
        self.inside, self.ran = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "segmenter":
            self.ran.append((func._opname.removeprefix("cross_"), tuple(self.inside)))  # of packed qkv or of three
        return func(*args, **(kwargs or {}))


def quietly(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accelerate(model, **kwargs)


def unmet_claims(model, report, *inputs):
    """What the report names and a call does not run: {(module, operator)}."""
    modules = dict(model.named_modules())
    by_block = {f"{r.name}.attn".lstrip("."): r.name for r in report.swapped if "attention" in r.became.split(" and ")}
    claims = {(by_block.get(r.name, r.name), NEEDED[what]) for r in report.swapped for what in r.became.split(" and ")}
    with torch.no_grad(), Count() as count:
        hooks = []
        for name in {name for name, _ in claims}:  # hooks of what is swapped itself change nothing
            hooks.append(modules[name].register_forward_pre_hook(lambda *a, n=name: count.inside.append(n)))
            hooks.append(modules[name].register_forward_hook(lambda *a: count.inside.pop() and None))
        model(*inputs)
        for hook in hooks:
            hook.remove()
    return claims - {(name, operator) for operator, inside in count.ran for name in inside}


def became(report, name):
    return next(row.became for row in report.rows if row.name == name)


def reason(report, name):
    return next(row.reason for row in report.rows if row.name == name)


class Looping(nn.Module):
    """A model that calls its blocks with something of its own each time."""

    def __init__(self, blocks, given=None):
        super().__init__()
        self.blocks, self.given = nn.ModuleList(blocks), given or {}

    def forward(self, x):
        for layer in self.blocks:
            x = layer(x, **self.given)
        return x


class Masked(Looping):
    """As text encoders: a mask in a buffer goes to every block."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.register_buffer("attn_mask", torch.zeros(5, 5, device=DEVICE), persistent=False)

    def forward(self, x):
        for layer in self.blocks:
            x = layer(x, attn_mask=self.attn_mask)
        return x


class Around(nn.Module):
    """Has blocks and never calls them."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.blocks:
            x = x + layer.mlp(layer.norm2(x))
        return x


class RotaryAttention(PlainAttention):
    def forward(self, x, rope=None):
        return super().forward(x if rope is None else x * rope)


class RotaryBlock(PlainBlock):
    """Hands positions on to its attention layer."""

    def __init__(self):
        super().__init__()
        self.attn = RotaryAttention()

    def forward(self, x, rope=None):
        x = x + self.drop_path(self.attn(self.norm1(x), rope=rope))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GreedyBlock(RotaryBlock):
    """Uses them itself, too."""

    def forward(self, x, rope=None):
        return super().forward(x, rope) if rope is None else super().forward(x, rope) + 1


class BiasedAttention(PlainAttention):
    """As DINOv2's: a bias that its block never gives for plain tokens."""

    def forward(self, x, attn_bias=None):
        return super().forward(x, attn_mask=attn_bias)


class ScaledBlock(PlainBlock):
    def __init__(self, attention=BiasedAttention, given=None):
        super().__init__()
        self.attn, self.ls1, self.given = attention(), timm.layers.LayerScale(WIDTH, 0.5), given or {}

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x), **self.given))
        return x + self.mlp(self.norm2(x))


def on_device(model):
    return model.to(DEVICE).eval()


SMALL = {"pretrained": False, "depth": 1, "img_size": 48}
MODELS = {  # name -> (what the first block becomes, what its attention layer becomes)
    "vit_tiny_patch16_224": ("attention and MLP", "attention core"),
    "vit_small_patch14_reg4_dinov2": ("attention and MLP", "attention core"),
    "deit3_small_patch16_224": ("attention and MLP", "attention core"),
    "vit_small_patch16_dinov3": ("attention and MLP", "attention core"),
    "vit_pe_core_tiny_patch16_384": ("attention and MLP", "attention core"),
    "vit_small_patch16_rope_224": ("attention and MLP", "attention core"),
    "vit_small_patch16_rope_mixed_224": ("attention and MLP", "attention core"),
    "vit_srelpos_small_patch16_224": ("MLP", None),
    "vit_relpos_small_patch16_224": (None, None),
    "eva02_tiny_patch14_224": ("attention", "attention core"),
    "beitv2_base_patch16_224": (None, None),
}


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_timm(name, with_example):
    size = {"img_size": 56} if "patch14" in name else {}
    model = on_device(timm.create_model(name, **{**SMALL, **size}))
    im = torch.randn(1, 3, *2 * [size.get("img_size", 48)], device=DEVICE)
    with torch.no_grad():
        want = model(im)
    report = quietly(model, example=im if with_example else None)
    assert (became(report, "blocks.0"), became(report, "blocks.0.attn")) == MODELS[name]
    assert unmet_claims(model, report, im) == set()
    with torch.no_grad():
        torch.testing.assert_close(model(im), want, **TIGHT)
    assert why_not(model) == {}
    for positions in ("rope", "shared_rel_pos"):
        if positions in (reason(report, "blocks.0.attn") or ""):
            passes = "passes" if with_example else "may pass"
            assert f"its model {passes} {positions} with every call" in reason(report, "blocks.0.attn")


def test_every_claim_of_other_models_runs():
    own = tiny_model().to(DEVICE)
    cases = [
        (on_device(official.MaskTransformer(5, 8, 64, 1, 1, 0.0, 0.0)), torch.randn(1, 6, 64, device=DEVICE), (16, 24)),
        (on_device(mmseg_like.Model()), torch.randn(1, 64, 3, 4, device=DEVICE)),
        (Looping([block(accelerated=False)]), tokens()),
        (on_device(Looping([ScaledBlock()])), tokens()),
    ]
    for model, *inputs in cases:
        report = quietly(model)
        assert report.swapped
        assert unmet_claims(model, report, *inputs) == set()
    quietly(own)
    with torch.no_grad(), Count() as count:
        own(torch.randn(1, 3, 64, 64, device=DEVICE))
    assert {"attention", "layernorm_mlp", "mask_head"} <= {name for name, _ in count.ran}


def test_positions_with_every_call():
    """The MLP is fused where the block does nothing with them but hand them on."""
    x, rope = tokens(), torch.rand(WIDTH, device=DEVICE)
    for cls, fused in ((RotaryBlock, "MLP"), (GreedyBlock, None)):
        model = on_device(Looping([cls()], {"rope": rope}))
        want = model(x)
        report = quietly(model)
        assert (became(report, "blocks.0"), became(report, "blocks.0.attn")) == (fused, None)
        assert "its model may pass rope with every call" in reason(report, "blocks.0")
        assert unmet_claims(model, report, x) == set()
        torch.testing.assert_close(model(x), want, **TIGHT)
        torch.testing.assert_close(model.blocks[0](x, rope), want, **TIGHT)  # by position
        assert (want - model.blocks[0](x)).abs().max() > 0.05
        assert why_not(model) == {}


def test_an_example_tells_that_positions_are_not_passed():
    model, x = on_device(Looping([RotaryBlock()])), tokens()
    assert became(quietly(model), "blocks.0") == "MLP"
    model.train()
    report = quietly(model, example=x)
    assert model.training and model.blocks[0].mlp.drop.training
    assert (became(report, "blocks.0"), became(report, "blocks.0.attn")) == ("attention and MLP", "attention core")
    assert unmet_claims(model.eval(), report, x) == set()
    report = quietly(model, example=(x,))
    assert len(report.already) == 2 and not report.swapped
    model.given = {"rope": torch.rand(WIDTH, device=DEVICE)}
    model(x)
    declined = ["in its last call: arguments besides the tokens, such as rope"]
    assert why_not(model) == {"blocks.0": declined, "blocks.0.attn": declined}
    model.given = {}
    model(x)
    assert why_not(model) == {}
    model.blocks[0](x, torch.rand(WIDTH, device=DEVICE))
    assert "in its last call: arguments besides the tokens" in str(why_not(model))
    restore(model)
    assert not any("_segmenter" in name for m in model.modules() for name in m.__dict__)


def test_an_example_wakes_up_no_gpu_that_the_model_is_not_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of states of random numbers on all GPUs
        assert accelerate(Looping([RotaryBlock()]), example=tokens().cpu()) is not None


def test_masks_of_the_model_and_blocks_that_are_not_called():
    x = tokens()
    masked = on_device(Masked([PlainBlock()]))
    report = quietly(masked)
    assert became(report, "blocks.0") == "MLP" and became(report, "blocks.0.attn") is None
    assert "may pass attn_mask with every call" in reason(report, "blocks.0")
    assert unmet_claims(masked, report, x) == set()
    around = on_device(Around([PlainBlock()]))
    report = quietly(around, example=x)
    assert {row.reason for row in report.left} == {"the model does not call it with the example"}
    assert report.swapped == []


def test_an_example_of_a_forward_that_takes_more_than_its_signature_says():
    class Decorated(PlainBlock):
        @functools.wraps(PlainBlock.forward)
        def forward(self, *args, scale=None, **kwargs):
            return super().forward(*args, **kwargs) * (1 if scale is None else scale)

    model, x = on_device(Looping([Decorated()], {"scale": 0.5})), tokens()
    want = model(x)
    report = quietly(model, example=x)
    assert "its model passes scale with every call" in reason(report, "blocks.0")
    torch.testing.assert_close(model(x), want, **TIGHT)


def test_what_a_block_gives_to_its_attention_is_tried_out():
    """It cannot be swapped itself, but it shows whether its attention layer gets tokens alone."""
    assert became(quietly(on_device(Looping([ScaledBlock()]))), "blocks.0.attn") == "attention core"
    given = {"attn_bias": torch.zeros(1, dtype=torch.float64)}
    report = quietly(on_device(Looping([ScaledBlock(given=given)])))
    assert reason(report, "blocks.0.attn") == "its model passes attn_bias with every call"


def test_what_is_in_the_way_now_is_said():
    model = Looping([block(accelerated=False), block(accelerated=False)])
    for layer in model.blocks:
        layer.mlp.fc1.register_forward_hook(lambda *a: None)
    report = quietly(model)
    assert report.notes == ["not at the moment: blocks.0 and 1 more: MLP: mlp.fc1 has hooks"]
    double = quietly(on_device(Looping([PlainBlock()])).double())
    assert double.notes == ["not at the moment: blocks.0 and 1 more: float64 input"]


# ---------------------------------------------------------------------------------------------------------------------
# Unknown layers


def quantised(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.nn.quantized.dynamic.Linear(linear.in_features, linear.out_features)


class Raising(PlainBlock):
    def __getattr__(self, name):
        if name.startswith("norm"):
            raise OSError("no norm\x1b[2J here")
        return super().__getattr__(name)


def test_quantised_layers_are_left_alone():
    """Their `weight` is a method."""
    model = nn.Sequential(block(accelerated=False), block(accelerated=False))
    for path in ("attn.qkv", "mlp.fc1"):
        replace(model[0], path, quantised)
    report = quietly(model)
    assert [row.name for row in report.swapped] == ["1", "1.attn"]
    dynamic = "torch.ao.nn.quantized.dynamic.modules.linear.Linear"
    assert reason(report, "0") == (
        f"attention: attn.qkv ({dynamic}) has no weight matrix; "
        f"MLP: mlp.fc1 is {dynamic}, not torch.nn.modules.linear.Linear"
    )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Raising(), f"{__name__}.Raising raised OSError when looked at: no norm\\x1b[2J here"),
        (lambda: lazy(PlainBlock()), "PlainBlock raised RuntimeError when looked at"),
        (lambda: torch.jit.trace(block(accelerated=False), tokens()), "torch.jit has compiled it"),
        (lambda: PlainBlock().to(torch.complex64), "weight is complex64"),
    ],
)
def test_strange_modules_are_left_alone(make, why):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(block(accelerated=False), make())
    report = quietly(model)
    assert became(report, "0") == "attention and MLP"
    assert why in reason(report, "1")
    assert became(report, "1") is None


def lazy(module):
    replace(module, "mlp.fc1", lambda old: nn.LazyLinear(2 * WIDTH))
    return module


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_all_swaps_or_none(error, monkeypatch):
    model = nn.Sequential(block(accelerated=False), block(accelerated=False))
    classes = [type(m) for m in model.modules()]

    def stop(module, name):
        if name == "1":
            raise error("stop")
        return True

    with pytest.raises(error, match="stop"):
        accelerate(model, filter_fn=stop)
    assert [type(m) for m in model.modules()] == classes
    assert not any("_segmenter" in m.__dict__ for m in model.modules())
    own = tiny_model()
    before = [m.ops for m in own.modules() if hasattr(m, "ops")]
    monkeypatch.setattr(acceleration, "why_not", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accelerate(own)
    assert [m.ops for m in own.modules() if hasattr(m, "ops")] == before
    monkeypatch.undo()
    accelerate(model)
    undo, done = acceleration._undo, []

    def undo_twice(module):
        done.append(module)
        return undo(module) if len(done) < 3 else 1 / 0

    monkeypatch.setattr(acceleration, "_undo", undo_twice)
    with pytest.raises(ZeroDivisionError):
        restore(model)
    monkeypatch.undo()
    assert restore(model) == 4
    assert [type(m) for m in model.modules()] == classes


# ---------------------------------------------------------------------------------------------------------------------
# Triton's interpreter as released


INTERPRETED = """
import copy, torch
from segmenter.dropin.accelerate import accelerate, why_not
from segmenter.kernels.attention import attention
from segmenter.kernels.launch import KernelError
from tests.support.blocks import block, tokens, original
module = block()
for dtype in (torch.float32, torch.float16):
    cast, x = copy.deepcopy(module).to(dtype), tokens(dtype=dtype)
    assert why_not(cast) == {}
    assert (cast(x) - original(cast)(x)).abs().max() < 0.02
half, x = copy.deepcopy(module).bfloat16(), tokens(dtype=torch.bfloat16)
assert torch.equal(half(x), original(half)(x))
print(why_not(half)[""])
with torch.autocast("cpu", torch.bfloat16):
    assert torch.equal(module(tokens()), original(module)(tokens()))
    print(why_not(module)[""])
try:
    attention(torch.randn(1, 4, 96).bfloat16(), 2)
except KernelError as error:
    print(error)
try:
    torch.ops.segmenter.attention(torch.randn(1, 4, 96).bfloat16(), 2)
except KernelError as error:
    print(error)
"""


def test_bfloat16_in_the_released_interpreter_is_refused():
    """The tests themselves run in one that is repaired."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    why = "bfloat16 in Triton's interpreter, which computes it wrongly"
    refused = f'{why}; use float32, float16 or impl="eager"'
    assert result.stdout.splitlines() == [*2 * [str([why])], *2 * [refused]]
