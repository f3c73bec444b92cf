"""The kernel as an attention implementation of transformers: tiny random models of several kinds, against "sdpa"."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

from segmenter.dropin import transformers as transformers_attention  # noqa: E402
from segmenter.dropin.modules import AccelerationError  # noqa: E402
from tests.support.spies import kernels_run  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SEGFORMER = {
    "hidden_sizes": [16, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
    "sr_ratios": [4, 2, 1, 1], "decoder_hidden_size": 16,
}  # fmt: skip
DPT = {
    **VIT, "backbone_out_indices": [0, 1, 1, 1], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
    "is_hybrid": False, "head_in_index": -1, "reassemble_factors": [4, 2, 1, 0.5], "neck_ignore_stages": [],
}  # fmt: skip
EOMT = {**VIT, "num_hidden_layers": 3, "num_blocks": 1, "num_queries": 4, "num_upscale_blocks": 1}
MODELS = {  # name -> (configuration, model, arguments, calls of the kernel, or None where a bias sends all to sdpa)
    "ViT": ("ViTConfig", "ViTModel", VIT, 2),
    "DeiT": ("DeiTConfig", "DeiTModel", VIT, 2),
    "Dinov2": ("Dinov2Config", "Dinov2Model", VIT, 2),
    "EoMT": ("EomtConfig", "EomtForUniversalSegmentation", EOMT, 3),
    "EoMT masked": ("EomtConfig", "EomtForUniversalSegmentation", EOMT, 2),  # the last layer gets a mask
    "DPT": ("DPTConfig", "DPTModel", DPT, 2),
    "BEiT": ("BeitConfig", "BeitModel", {**VIT, "use_relative_position_bias": True}, None),
    "SegFormer": ("SegformerConfig", "SegformerModel", SEGFORMER, 4),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    transformers_attention.register()
    transformers_attention.register("segmenter_strict", strict=True)


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels that ran."""
    return kernels_run(monkeypatch)


@pytest.fixture(autouse=True)
def no_loss(monkeypatch):
    """EoMT builds its loss even if it is not wanted, and that needs scipy."""
    from transformers.models.eomt import modeling_eomt

    class NoLoss:
        def __new__(cls, **kwargs):
            return torch.nn.Identity()

    monkeypatch.setattr(modeling_eomt, "EomtLoss", NoLoss)


def build(name):
    config, cls, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**arguments)).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are small, layer scales tiny: attention would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "EoMT":  # trained models come without masks in the end
            model.attn_mask_probs.zero_()
    return model


def outputs(model, im):
    with torch.no_grad():
        return [t for t in model(pixel_values=im).to_tuple() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_sdpa(name, kernels):
    model, im = build(name), torch.randn(1, 3, 32, 32, device=DEVICE)
    model.set_attn_implementation("sdpa")
    want = outputs(model, im)
    assert kernels == []
    model.set_attn_implementation("segmenter")
    got = outputs(model, im)
    calls = MODELS[name][3]
    assert kernels == ["attention"] * (calls or 0)
    assert len(got) == len(want) > 0
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 if calls else 0, rtol=1e-4 if calls else 0)
        assert theirs.abs().max() > 0.1
    model.set_attn_implementation("sdpa")
    assert torch.equal(outputs(model, im)[0], want[0])


class Layer(torch.nn.Module):
    is_causal = False


def qkv(dtype=torch.float32, keys=5, head_dim=16, heads=2, grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 5, head_dim), (2, heads, keys, head_dim), (2, heads, keys, head_dim)]
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    return [t.requires_grad_() for t in tensors] if grad else tensors


def test_results_are_as_transformers_wants_them(kernels):
    """(B, N, heads, d), contiguous, no weights; a scale of one's own; another number of keys."""
    q, k, v = qkv(keys=9)
    out, weights = transformers_attention.attention(Layer(), q, k, v, None, scaling=0.5, dropout=0.0)
    assert weights is None
    assert out.shape == (2, 5, 2, 16)
    assert out.is_contiguous()
    want = (q @ k.transpose(2, 3) * 0.5).softmax(-1) @ v
    torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert len(kernels) == 1


@pytest.mark.parametrize(
    ("make", "arguments", "reason"),
    [
        ({}, {"attention_mask": torch.tensor([[[[True, True, True, False, False]]]])}, "a mask"),
        ({}, {"is_causal": True}, "causal"),
        ({}, {"position_bias": torch.randn(1, 2, 5, 5)}, "position_bias"),
        ({"heads": 1}, {}, "different heads"),
        ({"head_dim": 12}, {}, "head_dim 12"),
        ({"head_dim": 136}, {}, "head_dim 136"),
        ({"dtype": torch.float64}, {}, "float64"),
    ],
)
def test_other_calls_are_sdpa(make, arguments, reason, kernels):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = Layer()
    module.num_key_value_groups = 2 if "heads" in make else 1
    arguments = {n: a.to(DEVICE) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    mask = arguments.pop("attention_mask", None)
    q, k, v = qkv(**make)
    got, _ = transformers_attention.attention(module, q, k, v, mask, **arguments)
    want, _ = sdpa_attention_forward(module, q, k, v, mask, **arguments)
    assert torch.equal(got, want)
    assert kernels == []
    assert reason in transformers_attention.why_not(module, q, k, v, mask, **arguments)
    with pytest.raises(AccelerationError, match=f"Layer: .*{reason}.*; register without strict=True to allow it"):
        transformers_attention.attention(module, q, k, v, mask, strict=True, **arguments)


def test_dropout_is_sdpa_and_modules_are_causal_by_default(kernels):
    q, k, v = qkv()
    torch.manual_seed(0)
    dropped, _ = transformers_attention.attention(Layer(), q, k, v, None, dropout=0.9)
    plain, _ = transformers_attention.attention(Layer(), q, k, v, None)
    assert (dropped - plain).abs().max() > 0.1
    assert len(kernels) == 1
    assert transformers_attention.why_not(torch.nn.Identity(), q, k, v) == "causal attention"  # the rule of sdpa


def test_gradients_equal_sdpa(kernels):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    grads = []
    for function in (transformers_attention.attention, sdpa_attention_forward):
        tensors = qkv(grad=True, keys=7)
        out, _ = function(Layer(), *tensors, None)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        (out * weight).sum().backward()
        grads.append([t.grad for t in tensors])
    assert len(kernels) == 1
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert want.abs().max() > 0.01


def test_strict_name_and_compile(kernels):
    model, im = build("ViT"), torch.randn(1, 3, 32, 32, device=DEVICE)
    model.set_attn_implementation("segmenter_strict")
    want = outputs(model, im)[0]
    assert len(kernels) == 2
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values=im)[0], want, atol=1e-4, rtol=1e-4)
    assert len(kernels) == 4
    with pytest.raises(AccelerationError, match="float64 input"):
        model.double()(pixel_values=im.double())


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install -U transformers"):
        transformers_attention.register()
