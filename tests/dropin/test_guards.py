"""Calls that accelerated modules must leave to the original: hooks, dropout, masks, other types and devices."""

import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")

from segmenter import ops
from segmenter.dropin.accelerate import AccelerationError, accelerate, restore, why_not
from tests.support import official
from tests.support.blocks import (
    ATTENTION,
    DEVICE,
    KINDS,
    MLP,
    TIGHT,
    attention_of,
    block,
    original,
    tokens,
    where,
)
from tests.support.spies import kernels_run


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_all_of_them_are_fused_at_first(kind, kernels):
    module, x = block(kind), tokens()
    torch.testing.assert_close(module(x), original(module)(x), **TIGHT)
    assert kernels == attention_of(kind) + MLP


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


HOOKED = ["attn", "attn.qkv", "attn.attn_drop", "attn.proj", "attn.proj_drop", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2",
          "mlp.drop", "norm1", "norm2"]  # fmt: skip


@pytest.mark.parametrize(("kind", "when"), [("packed", "before"), *((kind, "after") for kind in KINDS)])
@pytest.mark.parametrize("path", HOOKED)
def test_hooks_fire(kind, path, when, kernels):
    module, x, calls = block(kind, accelerated=False), tokens(), []
    path = where(kind, path)
    if path not in dict(module.named_modules()) or path == "attn.attn.out_proj":  # which the original never calls
        return
    if when == "after":
        accelerate(module)
    handle = module.get_submodule(path).register_forward_hook(lambda *args: calls.append(path))
    if when == "before":
        accelerate(module)
    with torch.no_grad():
        module(x)
    assert len(calls) == (
        2 if (kind, path) in (("packed", "mlp.drop"), ("scaled", "mlp.drop"), ("tuple", "mlp.drop")) else 1
    )
    assert f"{path} has hooks" in str(why_not(module))
    other = attention_of(kind) if path.startswith(("mlp", "ffn", "norm2", "ln2", "layernorm_after")) else MLP
    assert set(other) <= set(kernels)
    handle.remove()
    assert why_not(module) == {}


def test_backward_hooks_and_hooks_of_the_block(kernels):
    module, calls = block(), []
    module.register_forward_hook(lambda *args: calls.append("block"))
    module(tokens())
    assert (calls, kernels) == (["block"], ATTENTION + MLP)  # nothing is passed over
    module.mlp.fc1.register_full_backward_hook(lambda *args: calls.append("back"))
    module(tokens().requires_grad_()).sum().backward()
    assert calls == ["block", "block", "back"]


def test_hooked_mask_norm():
    decoder, calls = official.MaskTransformer(5, 8, 64, 1, 1, 0.0, 0.0).to(DEVICE).eval(), []
    x = torch.randn(1, 6, 64, device=DEVICE)
    want = decoder(x, (16, 24))
    accelerate(decoder)
    torch.testing.assert_close(decoder(x, (16, 24)), want, **TIGHT)
    decoder.mask_norm.register_forward_hook(lambda *a: calls.append(1))
    torch.testing.assert_close(decoder(x, (16, 24)), want, **TIGHT)
    assert calls == [1]
    assert why_not(decoder) == {"": ["mask_norm has hooks"]}


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"drop_path": 0.5}, {"dropout": 0.3, "drop_path": 0.5}])
def test_active_dropout_is_the_originals(kind, rates, kernels):
    """The same random numbers are drawn, so the results are equal with the same seed."""
    module = block(kind, **rates)
    module.train()
    results = []
    for m in (module, original(module)):
        torch.manual_seed(3)
        results.append(m(tokens(batch=4)))
    torch.testing.assert_close(*results, **TIGHT)
    torch.manual_seed(4)
    assert (module(tokens(batch=4)) - results[0]).abs().max() > 0.1
    assert "layernorm_mlp" not in kernels
    assert "drops at random in training" in str(why_not(module))
    kernels.clear()
    module.eval()(tokens())
    assert kernels == attention_of(kind) + MLP


def test_dropout_left_on_in_evaluation(kernels):
    """Monte-Carlo dropout sets single layers to training."""
    module = block(dropout=0.5)
    module.mlp.drop.train()
    assert (module(tokens()) - module(tokens())).abs().max() > 0.1
    assert kernels == ATTENTION * 2


def test_gradient_checkpointing_is_kept(kernels):
    module, x = block("wrapped"), tokens().requires_grad_()
    module.with_cp = True
    module(x).sum().backward()
    assert kernels.count("attention") == 2  # forward, and again in backward
    assert "layernorm_mlp" not in kernels


# ---------------------------------------------------------------------------------------------------------------------
# Calls


@pytest.mark.parametrize("asked", [{"attn_mask": torch.randn(5, 5)}, {"is_causal": True}])
def test_masks_are_obeyed(asked, kernels):
    asked = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in asked.items()}
    module, x = block(), tokens()
    plain = module(x, attn_mask=None, is_causal=False)
    assert kernels == ATTENTION + MLP
    kernels.clear()
    masked = module(x, **asked)
    assert torch.equal(masked, original(module)(x, **asked))
    assert (masked - plain).abs().max() > 0.05
    assert torch.equal(module.attn(x, **asked), original(module).attn(x, **asked))
    assert kernels == []


def test_wrapper_arguments(kernels):
    attention, x, y = block("wrapped").attn, tokens(), tokens(seed=2)
    twin = original(attention)
    for args, kwargs in [((), {}), ((), {"identity": y}), ((x, x), {}), ((), {"key": x, "value": x, "identity": y})]:
        torch.testing.assert_close(attention(x, *args, **kwargs), twin(x, *args, **kwargs), **TIGHT)
    fast = kernels.count("attention")
    assert fast >= 3
    for args, kwargs in [((y,), {}), ((), {"key": y}), ((), {"query_pos": y}), ((None, y), {})]:
        assert torch.equal(attention(x, *args, **kwargs), twin(x, *args, **kwargs))
    assert kernels.count("attention") == fast


def test_other_types_and_devices(kind, kernels, monkeypatch):
    module = block(kind)
    assert module.double()(tokens(dtype=torch.float64)).dtype == torch.float64
    assert "float64 input" in str(why_not(module))
    module.float()
    assert kernels == []
    monkeypatch.setattr(ops, "why_not_on", lambda device, index: f"tensors on {device}")
    assert torch.equal(module(tokens()), original(module)(tokens()))
    assert kernels == []
    assert "tensors on" in str(why_not(module))
    with pytest.raises(RuntimeError, match="dtype|type"):  # the original's own complaint
        module(tokens(dtype=torch.float16))


def test_mixed_types_are_the_originals_business(kernels):
    module = block()
    module.mlp.bfloat16()
    with pytest.raises(RuntimeError, match="dtype|type"):
        module(tokens())
    assert "MLP: mlp.fc1 is bfloat16, the input float32" in str(why_not(module))


def test_layers_that_make_another_type(kernels):
    """The second half is asked about again for what the first has made."""

    class Precise(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    module = block()
    module.attn.proj.__class__ = Precise
    with pytest.raises(RuntimeError, match="dtype|type"):  # the original's own complaint
        module(tokens())
    assert "layernorm_mlp" not in kernels


def test_half_tokens_under_autocast(kind, kernels):
    """There parameters of another type are no obstacle."""
    module, x = block(kind), tokens(dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, want = module(x), original(module)(x)
    assert kernels == attention_of(kind) + MLP
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)


def test_function_transforms(kernels):
    """Per-sample gradients, forward mode and vmap of torch.func run the original."""
    module, x = block(), tokens()
    twin = original(module)
    for m in (module, twin):
        m.jvp = torch.func.jvp(m, (x,), (torch.ones_like(x),))[1]
        m.grads = torch.func.grad(lambda p, m=m: torch.func.functional_call(m, p, (x,)).square().sum())(
            dict(m.named_parameters())
        )
        m.mapped = torch.vmap(m)(x[None].expand(3, -1, -1, -1))
    torch.testing.assert_close(module.jvp, twin.jvp, **TIGHT)
    torch.testing.assert_close(module.mapped, twin.mapped, **TIGHT)
    for name, grad in twin.grads.items():
        torch.testing.assert_close(module.grads[name], grad, **TIGHT)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
    torch.testing.assert_close(tangent, twin.jvp, **TIGHT)
    assert kernels == []


def test_fx_traces_the_original():
    module, x = nn.Sequential(block()), tokens()
    traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(x), module(x), **TIGHT)


def test_a_class_made_from_an_accelerated_one_is_not_undone():
    module = block()
    module.__class__ = type("Wrapped", (type(module),), {})
    assert restore(module) == 1  # its attention
    assert type(module).__name__ == "Wrapped"
    torch.testing.assert_close(module(tokens()), block()(tokens()), **TIGHT)


def test_strict_names_the_module(kernels):
    module = nn.Sequential(block(accelerated=False))
    accelerate(module, strict=True)
    with pytest.raises(AccelerationError, match="^0: it has other layers than before"):
        del module[0]._modules["norm1"]
        module(tokens())


def test_tokens_by_another_name(kernels):
    """Whoever calls a block by the names of its own forward goes on to."""

    class Hidden(KINDS["packed"][0]):
        def forward(self, hidden_states, attn_mask=None, is_causal=False):
            return super().forward(hidden_states, attn_mask, is_causal)

    module, x = Hidden().to(DEVICE).eval(), tokens()
    accelerate(module)
    want = original(module)(x)
    for got in (module(hidden_states=x), module(x), module(hidden_states=x, attn_mask=None)):
        torch.testing.assert_close(got, want, **TIGHT)
    assert kernels == 3 * (ATTENTION + MLP)
    mask = torch.zeros(5, 5, device=DEVICE)
    torch.testing.assert_close(module(attn_mask=mask, hidden_states=x), want, **TIGHT)
