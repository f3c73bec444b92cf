"""Layers and modules that `accelerate` must not take for what they look like: adapters, odd weights, other forwards."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

pytest.importorskip("triton")

from segmenter.dropin.accelerate import accelerate, why_not
from tests.support import mmseg_like, official
from tests.support.blocks import (
    ATTENTION,
    DEVICE,
    KINDS,
    MLP,
    TIGHT,
    WIDTH,
    PlainAttention,
    PlainBlock,
    attention_of,
    block,
    original,
    replace,
    tokens,
    where,
)  # fmt: skip
from tests.support.spies import kernels_run


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


class Lora(nn.Module):
    """As PEFT's: wraps a layer, has its weight, adds something."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, device=DEVICE))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, device=DEVICE))

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class InheritedLora(nn.Linear):
    """As loralib's: a subclass of nn.Linear that starts out equal to it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, device=DEVICE)
        self.weight, self.bias = base.weight, base.bias
        self.a = nn.Parameter(torch.randn(2, base.in_features, device=DEVICE))
        self.b = nn.Parameter(torch.zeros(base.out_features, 2, device=DEVICE))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class Rounding(nn.Linear):
    """As simulated quantisation: nothing to see from outside."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, device=DEVICE)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return F.linear(x, (self.weight * 4).round() / 4, self.bias)


def parametrised(linear):
    return parametrize.register_parametrization(linear, "weight", nn.Tanh())


def weight_normed(linear):
    return torch.nn.utils.weight_norm(linear)


def with_other_weights(linear):
    data = linear.weight.data
    linear.weight = nn.Parameter(TwoTensor(data, data.clone()))
    return linear


def replaced_forward(linear):
    linear.forward = lambda x: nn.Linear.forward(linear, x) + 1
    return linear


ODD = {  # what is put in place of a linear layer: why it is left alone
    Lora: f"is {__name__}.Lora, not torch.nn.modules.linear.Linear",
    InheritedLora: f"({__name__}.InheritedLora) holds a, b",
    Rounding: "it computes something else than its parts say",
    parametrised: "(torch.nn.utils.parametrize.ParametrizedLinear) has a layer parametrizations",
    weight_normed: "(torch.nn.modules.linear.Linear) holds weight_g, weight_v",
    replaced_forward: "has a replaced forward",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize(("path", "ran"), [("attn.qkv", ["attention", *MLP]), ("mlp.fc1", ATTENTION)])
def test_odd_linears_are_called(make, path, ran, when, kernels):
    """Their half goes layer by layer, the other one stays fused; the attention core is ours in any case."""
    module, x = block(accelerated=False), tokens()
    plain = module(x)
    if when == "after":
        accelerate(module)
    replace(module, path, make)
    if when == "before":
        row = accelerate(module).rows[0]
        assert row.became == ("MLP" if "attn" in path else "attention")
        assert ODD[make] in row.reason
    with torch.no_grad():
        got = module(x)
    twin = block(accelerated=False)
    replace(twin, path, make)
    if make in (Lora, InheritedLora):  # random, so take over
        twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(got, twin(x), **TIGHT)
    assert sorted(kernels) == sorted(ran)
    if make is not InheritedLora and make is not weight_normed:
        assert (got - plain).abs().max() > 0.05
    if when == "after":
        half = "attention" if "attn" in path else "MLP"
        assert any(r.startswith(half) for r in why_not(module)[""])


def test_inherited_lora_counts_once_trained(kernels):
    module, x = block(accelerated=False), tokens()
    replace(module, "mlp.fc2", InheritedLora)
    accelerate(module)
    before = module(x)
    with torch.no_grad():
        module.mlp.fc2.b.add_(1)
    assert (module(x) - before).abs().max() > 0.1


@pytest.mark.parametrize("path", ["attn.proj", "mlp.fc2", "norm1", "norm2"])
def test_odd_layers_in_all_structures(kind, path, kernels):
    """After the swap."""

    class Shifted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)
        eps, in_features, out_features = 1e-5, WIDTH, WIDTH

        def forward(self, x):
            return self.base(x) + 1

    module, x = block(kind), tokens()
    plain = module(x)
    kernels.clear()
    replace(module, where(kind, path), Shifted)
    got = module(x)
    torch.testing.assert_close(got, original(module)(x), **TIGHT)
    if path != "attn.proj" or kind != "wrapped":  # nn.MultiheadAttention reads its projection
        assert (got - plain).abs().max() > 0.05
    fused = MLP if path in ("attn.proj", "norm1") else attention_of(kind)
    assert [k for k in kernels if k in (*MLP, "layernorm_linear", "layernorm")] == [fused[0]]


def test_weights_of_another_class(kernels):
    """As torchao's quantised ones: read directly they would be a null pointer."""
    module, x = block(accelerated=False), tokens()
    want = module(x)
    accelerate(module)
    replace(module, "mlp.fc1", with_other_weights)
    assert "mlp.fc1 has weights of type torch.testing._internal.two_tensor.TwoTensor" in str(why_not(module))
    with torch.no_grad():
        assert torch.allclose(module(x), want, **TIGHT)
    assert kernels == ATTENTION
    accelerate(module)
    assert "layernorm_mlp" not in kernels
    untouched = block(accelerated=False)
    replace(untouched, "mlp.fc1", with_other_weights)
    rows = {row.name: row for row in accelerate(untouched).rows}
    assert rows[""].became == "attention"
    assert "TwoTensor" in rows[""].reason


def test_subclasses_that_add_nothing_are_read(kernels):
    """mmcv's Linear and timm's LayerNorm are such."""

    class Named(nn.LayerNorm):
        pass

    module, x = block(accelerated=False), tokens()
    replace(module, "mlp.fc1", lambda old: copy_into(mmseg_like.Linear(WIDTH, 2 * WIDTH), old))
    replace(module, "norm1", lambda old: copy_into(Named(WIDTH), old))
    want = module(x)
    accelerate(module)
    torch.testing.assert_close(module(x), want, **TIGHT)
    assert kernels == ATTENTION + MLP


def copy_into(new, old):
    new.load_state_dict(old.state_dict())
    return new.to(DEVICE)


@pytest.mark.parametrize("path", ["attn", "mlp"])
def test_children_added_later_are_seen(kind, path, kernels):
    module, x = block(kind), tokens()
    module.get_submodule(where(kind, path)).add_module("adapter", nn.Identity())
    module(x)
    assert kernels == (attention_of(kind) if path == "mlp" else MLP)
    assert "has other layers than before" in str(why_not(module))


def test_flags_changed_later_are_seen(kernels):
    module, x = block(), tokens()
    module.attn.scale *= 2
    module.mlp.act.approximate = "tanh"
    torch.testing.assert_close(module(x), original(module)(x))
    assert kernels == []
    assert "attn has scale=0.5, it was 0.25" in str(why_not(module))


# ---------------------------------------------------------------------------------------------------------------------
# Modules of the same parts that compute something else


class PostNorm(PlainBlock):
    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class Parallel(PlainBlock):
    def forward(self, x):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


class Causal(PlainAttention):
    def forward(self, x):
        return super().forward(x, is_causal=True)


class Noisy(PlainAttention):
    def forward(self, x):
        return super().forward(x) + (0.1 if self.training else 0)


class Reading(PlainAttention):
    """Reads the weight of its projection, so that an adapter around it has no effect."""

    def forward(self, x):
        B, N, C = x.shape
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj((F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(B, N, C))


def test_an_adapter_that_is_read_is_not_called():
    attention = Reading().to(DEVICE)
    replace(attention, "qkv", Lora)
    with pytest.warns(UserWarning, match="it computes something else"):
        accelerate(attention)
    assert accelerate(Reading().to(DEVICE)).swapped  # without adapter it is an attention layer as any other


def test_lookalikes_are_left_alone(kernels):
    for cls in (PostNorm, Parallel):
        module = cls()
        report = accelerate(module)
        assert [row.reason for row in report.left] == ["its forward is not that of a pre-norm block"]
        assert [row.name for row in report.swapped] == ["attn"]
    for cls in (Causal, Noisy):
        module = cls()
        with pytest.warns(UserWarning, match="it computes something else than softmax"):
            accelerate(module)
        assert type(module) is cls
    scaled = PlainAttention()
    scaled.scale = 1.0
    with pytest.warns(UserWarning, match="it computes something else than softmax"):
        accelerate(scaled)
    with pytest.warns(UserWarning, match="head_dim is 4, the kernel takes multiples of 8 up to 128"):
        accelerate(PlainAttention(num_heads=8))
    assert kernels == []


def test_a_decoder_that_computes_something_else_is_left_alone():
    class Softmaxed(official.MaskTransformer):
        def forward(self, x, im_size):
            return super().forward(x, im_size).softmax(1)

    for cls, found in ((Softmaxed, False), (official.MaskTransformer, True)):
        report = accelerate(cls(5, 8, 64, 1, 1, 0.0, 0.0))
        assert [row.name for row in report.swapped if row.became == "class masks"] == ([""] if found else [])
