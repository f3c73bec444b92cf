"""Blocks that project queries, keys and values each by itself, as those of transformers do."""

import copy

import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")

from segmenter.dropin.accelerate import AccelerationError, accelerate, why_not
from tests.support.blocks import (
    DEVICE,
    MLP,
    SEPARATE,
    TIGHT,
    WIDTH,
    SeparateAttention,
    SeparateBlock,
    assert_same_gradients,
    block,
    original,
    replace,
    tokens,
)
from tests.support.spies import kernels_run
from tests.support.supported import SUPPORTED


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


def model_of(name):
    return next(kind for kind in SUPPORTED if kind.name == name and kind.library == "transformers").build()


PARAMETERS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias", "o_proj.weight")


def test_changes_in_place_are_followed(kernels):
    """Nothing is packed: an optimiser may change each of the projections."""
    module, x = block("separate"), tokens()
    before = module(x)
    for name in PARAMETERS:
        with torch.no_grad():
            module.attention.get_parameter(name).mul_(-0.5).add_(0.1)
        after = module(x)
        torch.testing.assert_close(after, original(module)(x), **TIGHT)
        assert (after - before).abs().max() > 0.01, name
        before = after
    module.load_state_dict(block("separate", accelerated=False, seed=5).state_dict())
    torch.testing.assert_close(module(x), original(module)(x), **TIGHT)
    assert kernels == 8 * (SEPARATE + MLP)


def test_no_memory_is_doubled():
    """The state dict and the optimiser see the same tensors in the same memory."""
    module = block("separate", accelerated=False)
    before = {name: p.data_ptr() for name, p in module.named_parameters()}
    accelerate(module)
    module(tokens())
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == before
    assert len({t.untyped_storage().data_ptr() for t in module.state_dict().values()}) == len(before)
    assert not list(module.buffers())


@pytest.mark.parametrize("frozen", [None, "attention.k_proj", "attention", "layer_scale1"])
def test_gradients(frozen, kernels):
    module = block("separate").train()
    assert_same_gradients(module, original(module), frozen)
    assert kernels == SEPARATE + MLP


def test_configurations_count_as_they_were(kernels):
    """What a layer computes may depend on one: it is asked at every call. `accelerate` takes changes up."""
    module, x = block("separate"), tokens()
    plain = module(x)
    kernels.clear()
    module.attention.config.probabilities = "sigmoid"
    changed = module(x)
    torch.testing.assert_close(changed, original(module)(x))
    assert (changed - plain).abs().max() > 0.1
    assert kernels == []  # the MLP holds it as well
    assert "attention has another config.probabilities than before" in str(why_not(module))
    assert [row.became for row in accelerate(module).rows] == ["MLP"]
    torch.testing.assert_close(module(x), changed, **TIGHT)
    assert kernels == MLP
    module.attention.config.probabilities = module.mlp.config.probabilities = "softmax"
    accelerate(module)
    kernels.clear()
    torch.testing.assert_close(module(x), plain, **TIGHT)
    assert kernels == SEPARATE + MLP
    module.attention.config.labels = {0: "a"}  # equal, if not the same
    module(x)
    assert why_not(module) == {}
    module.attention.config = copy.copy(module.attention.config)
    assert "attention has another config" in str(why_not(module))


def test_objects_that_hold_more_than_values_are_not_trusted():
    module = block("separate", accelerated=False)
    module.attention.config.offset = torch.zeros(1)
    with pytest.warns(UserWarning, match="nothing in"):
        report = accelerate(module)
    assert report.rows[0].reason == (
        "attention: attention (tests.support.blocks.SeparateAttention) holds config, a tests.support.blocks.Settings; "
        "MLP: mlp (tests.support.blocks.SeparateMlp) holds config, a tests.support.blocks.Settings"
    )


def test_masks_reach_the_attention_and_the_mlp_stays_fused(kernels):
    module, x, mask = block("separate"), tokens(), torch.randn(5, 5, device=DEVICE)
    for args, kwargs in (((mask,), {}), ((), {"attention_mask": mask})):
        torch.testing.assert_close(module(x, *args, **kwargs), original(module)(x, mask), **TIGHT)
    assert "in its last call: arguments besides the tokens, such as attention_mask" in str(why_not(module))
    assert (module(x, mask) - module(x)).abs().max() > 0.05
    assert kernels == 3 * MLP + SEPARATE + MLP
    assert why_not(module) == {}
    accelerate(module, strict=True)
    with pytest.raises(AccelerationError, match="attention: arguments besides the tokens, such as attention_mask"):
        module(x, attention_mask=mask)


class Rotary(SeparateAttention):
    def forward(self, hidden_states, attention_mask=None, positions=None):
        cos, sin = positions
        return super().forward(hidden_states * cos + hidden_states.roll(1, -1) * sin, attention_mask)


class RotaryBlock(SeparateBlock):
    """Hands positions on, without which its attention cannot be called."""

    def __init__(self):
        super().__init__()
        self.attention = Rotary()

    def forward(self, hidden_states, positions=None):
        attended, _ = self.attention(self.layernorm_before(hidden_states), positions=positions)
        hidden_states = self.dropout(self.layer_scale1(attended)) + hidden_states
        return self.dropout(self.layer_scale2(self.mlp(self.layernorm_after(hidden_states)))) + hidden_states


def test_attention_that_needs_positions_is_the_models(kernels):
    module, x = RotaryBlock().to(DEVICE).eval(), tokens()
    positions = torch.rand(WIDTH, device=DEVICE), torch.rand(WIDTH, device=DEVICE)
    want = module(x, positions)
    (row,) = accelerate(module).rows
    assert (row.became, row.reason[:45]) == ("MLP", "attention: with tokens alone it raises TypeEr")
    torch.testing.assert_close(module(x, positions=positions), want, **TIGHT)
    assert kernels == MLP


class TwoDrops(SeparateBlock):
    """Each after both halves: which of them is whose cannot be told by names."""

    def __init__(self):
        super().__init__()
        self.second = nn.Dropout(0.5)

    def forward(self, hidden_states):
        attended, _ = self.attention(self.layernorm_before(hidden_states))
        hidden_states = self.second(self.dropout(self.layer_scale1(attended))) + hidden_states
        inner = self.layer_scale2(self.mlp(self.layernorm_after(hidden_states)))
        return self.second(self.dropout(inner)) + hidden_states


class Swapped(SeparateBlock):
    """The second LayerNorm first."""

    def forward(self, hidden_states):
        attended, _ = self.attention(self.layernorm_after(hidden_states))
        hidden_states = self.layer_scale1(attended) + hidden_states
        return self.layer_scale2(self.mlp(self.layernorm_before(hidden_states))) + hidden_states


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (TwoDrops, "it calls the layers without weights elsewhere than after each half"),
        (Swapped, "its forward is not that of a pre-norm block"),
        (lambda: without("layernorm_after"), "of its layers 1 look like norm (layernorm_before)"),
        (lambda: without("layer_scale2"), "of its layers 1 look like scale (layer_scale1)"),
    ],
)
def test_lookalikes_are_left_alone(make, why, kernels):
    module = make().to(DEVICE)
    with pytest.warns(UserWarning, match="nothing in"):
        report = accelerate(module)
    assert [row.reason for row in report.left] == [why]
    assert kernels == []


def without(name):
    module = SeparateBlock()
    del module._modules[name]
    return module


def test_fewer_keys_than_queries_are_left_alone():
    module = SeparateBlock()
    module.attention.k_proj = module.attention.v_proj = nn.Linear(WIDTH, WIDTH // 2)
    (row,) = accelerate(module).rows
    assert (row.became, row.reason) == ("MLP", "attention: its queries, keys and values have 32, 16, 16 columns")


def test_adapters_are_called(kernels):
    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a = base, nn.Parameter(torch.randn(base.in_features, WIDTH, device=DEVICE))

        weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

        def forward(self, x):
            return self.base(x) + x @ self.a

    for path, ran in (("attention.k_proj", MLP), ("mlp.fc2", SEPARATE)):
        module, x = block("separate"), tokens()
        plain = module(x)
        replace(module, path, Lora)
        for again in (False, True):
            if again:
                assert f"{path} is" in accelerate(module).rows[0].reason
            kernels.clear()
            got = module(x)
            torch.testing.assert_close(got, original(module)(x), **TIGHT)
            assert (got - plain).abs().max() > 0.1
            assert kernels == ran


# ---------------------------------------------------------------------------------------------------------------------
# transformers itself


def test_wishes_of_transformers(kernels):
    """Hidden states are collected from fused blocks; attention maps from the original attention."""
    pytest.importorskip("transformers")
    (model, im), twin = model_of("ViT"), model_of("ViT")[0]
    for m in (model, twin):
        m.set_attn_implementation("eager")  # the only one that returns maps
    accelerate(model)
    with torch.no_grad():
        model(im)
        assert kernels == 2 * (SEPARATE + MLP)
        for wish in ("output_hidden_states", "output_attentions"):
            kernels.clear()
            got, want = (m(im, **{wish: True})[wish.removeprefix("output_")] for m in (model, twin))
            assert len(got) == len(want) >= 2
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours, theirs, **TIGHT)
            assert kernels == 2 * MLP
        kernels.clear()
        torch.testing.assert_close(model(im)[0], twin(im)[0], **TIGHT)
    assert kernels == 2 * MLP
    assert set(map(str, why_not(model).values())) == {"['attention: attention has hooks']"}  # which stay


def test_activations_that_hold_a_function_with_arguments(kernels):
    """SigLIP's GELU by tanh: each block has one of its own, and two such are never equal."""
    pytest.importorskip("transformers")
    (model, im), (twin, _) = (model_of("SigLIP, image encoder") for _ in range(2))
    accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(im)[0], twin(im)[0], **TIGHT)
    assert kernels == 2 * (SEPARATE + MLP) and why_not(model) == {}
    act = model.encoder.layers[1].mlp.activation_fn
    act.act = type(act.act)(act.act.func, approximate="none")
    assert "has act=" in str(why_not(model)["encoder.layers.1"])


def test_other_attention_implementations(kernels):
    """One that somebody registers is used, whatever `accelerate` was told before."""
    transformers = pytest.importorskip("transformers")
    (model, im), calls = model_of("DINOv2"), []
    sdpa = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(*args, **kwargs):
        calls.append(1)
        return sdpa(*args, **kwargs)

    transformers.AttentionInterface.register("counted", counted)
    accelerate(model)
    with torch.no_grad():
        model(im)
        assert (len(calls), kernels) == (0, 2 * (SEPARATE + MLP))
        model.set_attn_implementation("counted")
        model(im)
        assert len(calls) == 2
        accelerate(model)
        kernels.clear()
        model(im)
    assert kernels == 2 * (SEPARATE + MLP)  # which computes the same, as was tried out


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated")
def test_training_and_checkpointing_of_transformers(kernels):
    pytest.importorskip("transformers")
    (model, im), twin = model_of("DINOv2 with registers"), model_of("DINOv2 with registers")[0]
    accelerate(model)
    grads = []
    for m in (model, twin):
        m.train()
        m.gradient_checkpointing_enable({"use_reentrant": False})
        m(im)[0].square().mean().backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert kernels == 4 * (SEPARATE + MLP)  # forward, and again in backward
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 30
    for name, want in grads[1].items():
        torch.testing.assert_close(grads[0][name], want, atol=1e-4, rtol=1e-3, msg=name)


def test_compiled_and_saved(kernels, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, im = model_of("ViT")
    with torch.no_grad():
        want = model(im)[0]
        accelerate(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(im)[0], want, **TIGHT)
        assert "attention" in kernels
        model.save_pretrained(tmp_path)
        again = transformers.ViTModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(im)[0], want, **TIGHT)
    assert type(again.layers[0]).__name__ == "ViTLayer"
