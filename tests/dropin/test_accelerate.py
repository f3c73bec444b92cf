"""Whole models with the kernels put in: same numbers, and copying, saving, averaging, training and undoing work."""

import copy
import inspect
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")
timm = pytest.importorskip("timm")

import segmenter  # noqa: E402
from segmenter.dropin.accelerate import AccelerationError, accelerate, restore, why_not  # noqa: E402
from segmenter.kernels import reference  # noqa: E402
from tests.support import mmseg_like, official  # noqa: E402
from tests.support.spies import kernels_run  # noqa: E402
from tests.support.tiny import tiny_model  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIGHT = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


def randomise(model, seed=0):
    """Every parameter random, so that nothing hides behind a zero or a small layer scale. In evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3 * noise + ("bias" not in name))
    return model.to(DEVICE).eval()


def timm_vit(name="vit_tiny_patch16_224", **kwargs):
    """17 tokens of width 64."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
    return randomise(timm.create_model(name, **{**small, **kwargs}))


def image(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(model, *args):
    with torch.no_grad():
        return model(*args)


BUILDERS = {  # what: (model, input, fused blocks, attention layers of their own, mask decoders)
    "timm": (timm_vit, (2, 3, 32, 32), 2, 2, 0),
    "published": (lambda: official.load(GOLDEN / "04_inference_single_scale").to(DEVICE), (1, 3, 40, 48), 3, 0, 1),
    "mmseg": (lambda: randomise(mmseg_like.Model()), (2, 64, 3, 4), 3, 3, 1),
}


@pytest.fixture(params=BUILDERS)
def case(request):
    build, shape, *counts = BUILDERS[request.param]
    return build(), image(*shape), counts


def test_swapped_and_equal(case, kernels):
    model, im, (blocks, attentions, decoders) = case
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    want = run(model, im)
    assert kernels == []
    report = accelerate(model)
    assert len(report.swapped) == blocks + attentions + decoders
    got = run(model, im)
    for name, count in (("attention", blocks), ("mask_head", decoders)):
        assert kernels.count(name) == count
    for name in ("layernorm_linear", "linear", "layernorm_mlp"):
        assert kernels.count(name) == blocks
    torch.testing.assert_close(got, want, **TIGHT)
    assert torch.equal(got.argmax(1), want.argmax(1))
    assert want.abs().max() > 0.5
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    assert why_not(model) == {}
    assert restore(model) == len(report.swapped)
    kernels.clear()
    assert torch.equal(run(model, im), want)
    assert kernels == []
    assert [type(m) for m in model.modules()] == classes
    assert [inspect.signature(m.forward) for m in model.modules()] == signatures
    assert not any("_segmenter" in m.__dict__ for m in model.modules())
    assert restore(model) == 0


@pytest.mark.parametrize("name", ["01_mask_p16_square", "02_linear_p16_distilled", "03_mask_p8_padding_posembed"])
def test_published_model_on_golden_cases(name, kernels):
    """Against the published code's own numbers, and against our model of the same weights."""
    data = np.load(GOLDEN / name / "data.npz")
    im, logits = torch.from_numpy(data["im"]).to(DEVICE), torch.from_numpy(data["logits"]).to(DEVICE)
    model = official.load(GOLDEN / name).to(DEVICE)
    before = run(model, im)
    torch.testing.assert_close(before, logits, **TIGHT)  # the look-alike is one
    accelerate(model)
    got = run(model, im)
    ours, _ = segmenter.load_model(GOLDEN / name / "checkpoint.pth", impl="eager", device=DEVICE)
    assert {"attention", "layernorm_mlp"} <= set(kernels)
    assert ("mask_head" in kernels) == ("mask" in name)
    for other in (logits, before, run(ours, im)):
        torch.testing.assert_close(got, other, **TIGHT)
        assert torch.equal(got.argmax(1), other.argmax(1))


def test_attention_maps_of_the_published_model(kernels):
    """They need the original attention of their own block; blocks before it stay fast."""
    data = np.load(GOLDEN / "01_mask_p16_square" / "data.npz")
    model, im = official.load(GOLDEN / "01_mask_p16_square").to(DEVICE), torch.from_numpy(data["im"]).to(DEVICE)
    accelerate(model)
    with torch.no_grad():
        maps = {"attn_enc_1": model.get_attention_map_enc(im, 1), "attn_dec_0": model.get_attention_map_dec(im, 0)}
    assert kernels.count("attention") == 1 + 2
    for name, got in maps.items():
        torch.testing.assert_close(got, torch.from_numpy(data[name]).to(DEVICE), **TIGHT)
    attended, attn = model.encoder.blocks[0].attn(image(1, 5, 128))
    assert (attended.shape, attn.shape) == ((1, 5, 128), (1, 2, 5, 5))


def test_our_own_model(kernels):
    model, im = tiny_model().to(DEVICE), image(1, 3, 64, 64)
    model.load_state_dict(tiny_model(seed=3).state_dict())
    eager = segmenter.create_segmenter(model.config, impl="eager").to(DEVICE).eval()
    eager.load_state_dict(model.state_dict())
    want = run(eager, im)
    n = sum(hasattr(module, "ops") for module in eager.modules())
    report = accelerate(eager)
    assert (len(report.swapped), eager.impl) == (n, "triton")
    torch.testing.assert_close(run(eager, im), want, **TIGHT)
    assert kernels.count("attention") == 3
    assert kernels.count("mask_head") == 1
    assert len(accelerate(eager).already) == n
    twin = copy.deepcopy(eager)
    assert twin.impl == "triton"
    assert (restore(eager), eager.impl, restore(twin), twin.impl) == (n, "eager", n, "eager")
    kernels.clear()
    assert torch.equal(run(eager, im), want)
    assert kernels == []
    assert accelerate(eager.double()).swapped
    assert run(eager, im.double()).dtype == torch.float64  # eager operators where kernels cannot
    assert "float64 input" in str(why_not(eager))
    assert kernels == []


ATTENTION, MLP = {"layernorm_linear", "attention", "linear"}, {"layernorm_mlp"}
VISION = timm.models.vision_transformer
VARIANTS = {  # what is special: (arguments, what the block becomes, what its attention layer becomes, what runs)
    "layer scale": ({"init_values": 0.5}, "attention and MLP", "attention core", ATTENTION | MLP),
    "norms of q and k": (
        {"qk_norm": True},
        "attention and MLP",
        "attention core",
        ATTENTION | MLP | {"cross_attention"},
    ),
    "norm after attention": ({"scale_attn_norm": True}, "MLP", "attention core", {"attention", *MLP}),
    "norm in the MLP": ({"scale_mlp_norm": True}, "attention", "attention core", ATTENTION),
    "GELU by tanh": ({"act_layer": "gelu_tanh"}, "attention and MLP", "attention core", ATTENTION | MLP),
    "quick GELU": ({"act_layer": "quick_gelu"}, "attention", "attention core", ATTENTION),
    "SwiGLU": ({"mlp_layer": timm.layers.SwiGLU}, "attention", "attention core", ATTENTION),
    "RMS norm": ({"norm_layer": "rmsnorm"}, None, "attention core", {"attention"}),
    "registers": ({"reg_tokens": 2, "qkv_bias": False}, "attention and MLP", "attention core", ATTENTION | MLP),
    "stochastic depth": ({"drop_path_rate": 0.3}, "attention and MLP", "attention core", ATTENTION | MLP),
    "post-norm": ({"block_fn": VISION.ResPostBlock}, None, "attention core", {"attention"}),
    "parallel": ({"block_fn": VISION.ParallelThingsBlock}, "nothing", "attention core", {"attention"}),
    "gate": ({}, "MLP", None, MLP),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_get_the_part_that_fits(name, kernels):
    kwargs, block, attention, ran = VARIANTS[name]
    if name == "gate":
        model = timm_vit(depth=1)
        model.blocks[0].attn = randomise(timm.layers.Attention(64, num_heads=2, qkv_bias=True, gated=True))
    else:
        model = timm_vit(depth=1, **kwargs)
    im = image(1, 3, 32, 32)
    want = run(model, im)
    report = accelerate(model)
    rows = {row.name: row for row in report.rows}
    if block == "nothing":
        assert "blocks.0" not in rows
    else:
        assert rows["blocks.0"].became == block
        assert (rows["blocks.0"].reason is None) == (block == "attention and MLP")
    assert next(row.became for name, row in rows.items() if "attn" in name) == attention
    torch.testing.assert_close(run(model, im), want, **TIGHT)
    assert set(kernels) == ran


def test_eps_of_the_module_is_used(kernels):
    model, im = timm_vit(depth=1), image(1, 3, 32, 32)
    accelerate(model)
    fast = run(model, im)
    for norm in (model.blocks[0].norm1, model.blocks[0].norm2):
        norm.eps = 0.5
    changed = run(model, im)
    assert (changed - fast).abs().max() > 0.01
    assert kernels.count("attention") == 2
    restore(model)
    torch.testing.assert_close(changed, run(model, im), **TIGHT)


# ---------------------------------------------------------------------------------------------------------------------
# Life of a model


def clones(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    yield "deepcopy", copy.deepcopy(model)
    yield "torch.save", torch.load(stream, weights_only=False)
    yield "EMA", timm.utils.ModelEmaV3(model).module
    yield "average", torch.optim.swa_utils.AveragedModel(model).module


def test_copies_stay_fast_and_independent(case, kernels):
    model, im, (blocks, _, _) = case
    accelerate(model)
    want = run(model, im)
    for what, clone in clones(model):
        kernels.clear()
        torch.testing.assert_close(run(clone, im), want)
        assert kernels.count("attention") == blocks, what
        assert [type(m) for m in clone.modules()] == [type(m) for m in model.modules()]
        assert restore(clone) > 0
        assert "_segmenter" in next(m for m in model.modules() if "Accelerated" in type(m).__name__).__dict__
    fresh = BUILDERS["timm"][0]() if "blocks.0.ls1" in dict(model.named_modules()) else None
    if fresh is not None:
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(run(fresh, im), want, **TIGHT)


def test_ema_follows_and_state_dicts_load(kernels):
    model, im = timm_vit(depth=1), image(1, 3, 32, 32)
    accelerate(model)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    other = timm_vit(depth=1, img_size=32)
    model.load_state_dict(randomise(other, seed=5).state_dict())
    ema.update(model)
    for p, q in zip(ema.module.parameters(), model.parameters(), strict=True):
        assert not torch.equal(p, q)
    torch.testing.assert_close(run(model, im), run(other, im), **TIGHT)
    assert kernels.count("attention") == 1
    assert torch.isfinite(run(ema.module, im)).all()
    assert kernels.count("attention") == 2


def test_one_step_of_fine_tuning(case, kernels):
    model, im, (blocks, _, _) = case
    for module in model.modules():
        module.__dict__.update({n: 0.0 for n in ("p", "drop_prob") if n in module.__dict__})
    twin = copy.deepcopy(model)
    accelerate(model)
    grads = []
    for m in (model.train(), twin.train()):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        out = m(im)
        (out * image(*out.shape, seed=9)).mean().backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
        optimizer.step()
    assert kernels.count("attention") == blocks
    for name, want in grads[1].items():
        if want is None:
            assert grads[0][name] is None
            continue
        torch.testing.assert_close(grads[0][name], want, atol=1e-5, rtol=1e-3, msg=name)
    assert sum(g is not None and g.abs().max() > 0 for g in grads[1].values()) > 20
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), atol=1e-5, rtol=1e-4)


def test_frozen_layers_and_inference_mode(kernels):
    model, im = timm_vit(depth=1), image(1, 3, 32, 32)
    accelerate(model)
    model.blocks[0].attn.requires_grad_(False)
    model(im).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is None
    assert model.blocks[0].mlp.fc1.weight.grad is not None
    with torch.inference_mode():
        model(im)
    assert kernels.count("attention") == 2


def test_autocast(case, kernels):
    model, im, (blocks, _, _) = case
    want = run(model, im)
    accelerate(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(model, im)
    assert kernels.count("attention") == blocks
    assert 0 < (got.float() - want).abs().max() < 0.25


def test_half_model(kernels):
    model, im = timm_vit(depth=1).bfloat16(), image(1, 3, 32, 32).bfloat16()
    want = run(model, im)
    accelerate(model)
    got = run(model, im)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.1
    assert kernels.count("attention") == 1


def test_compile_and_export(kernels):
    model, im = timm_vit(depth=1), image(1, 3, 32, 32)
    want = run(model, im)
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, im), want, **TIGHT)
    assert kernels.count("attention") == 1
    program = torch.export.export(model, (im,))
    assert {"segmenter.attention.default", "segmenter.layernorm_mlp.default"} <= {
        str(node.target) for node in program.graph.nodes
    }
    torch.testing.assert_close(run(program.module(), im), want, **TIGHT)
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *a: None)
    kernels.clear()
    torch.testing.assert_close(run(compiled, im), want, **TIGHT)  # hooked later: compiled anew, attention as it was
    assert "attention" not in kernels


# ---------------------------------------------------------------------------------------------------------------------
# Asking for it


def test_twice_is_harmless_and_takes_up_changes(kernels):
    model = timm_vit()
    first = accelerate(model)
    classes = [type(m) for m in model.modules()]
    second = accelerate(model)
    assert (len(first.swapped), len(second.swapped), len(second.already)) == (4, 0, 4)
    assert [type(m) for m in model.modules()] == classes
    model.blocks[0].mlp.act = nn.ReLU()
    third = accelerate(model)
    assert {row.name: row.became for row in third.swapped} == {"blocks.0": "attention"}
    model.blocks[1].attn.gate = nn.Linear(64, 64)
    fourth = accelerate(model)
    assert {row.name: row.became for row in fourth.rows if row.name.startswith("blocks.1")} == {
        "blocks.1": "MLP", "blocks.1.attn": None,
    }  # fmt: skip
    assert type(model.blocks[1].attn) is timm.layers.Attention
    assert restore(model) == 3


def test_filter(kernels):
    model, im = timm_vit(), image(1, 3, 32, 32)
    want, seen = run(model, im), []

    def only_second(module, name):
        seen.append((type(module).__name__, name))
        return name == "blocks.1"

    report = accelerate(model, filter_fn=only_second)
    assert [row.name for row in report.swapped] == ["blocks.1"]
    assert {row.reason for row in report.left} == {"filter_fn"}
    assert ("Block", "blocks.0") in seen
    torch.testing.assert_close(run(model, im), want, **TIGHT)
    assert kernels.count("attention") == 1


def test_nothing_to_swap():
    with pytest.warns(UserWarning, match="nothing in ResNet can be swapped. Looked for pre-norm blocks"):
        report = accelerate(timm.create_model("resnet10t"))
    assert report.rows == []
    with pytest.warns(UserWarning, match="2 left alone, the first it.*scale|1 left alone|left alone, the first"):
        gated = timm_vit(depth=1, norm_layer="rmsnorm")
        gated.blocks[0].attn.gate = nn.Linear(64, 64)
        accelerate(gated)


def test_strict(kernels, monkeypatch):
    with pytest.raises(ValueError, match="nothing in Linear can be swapped"):
        accelerate(nn.Linear(2, 2), strict=True)
    model, im = timm_vit(depth=1), image(1, 3, 32, 32)
    accelerate(model, strict=True)
    run(model, im)
    assert kernels.count("attention") == 1
    with pytest.raises(AccelerationError, match="blocks.0: arguments besides the tokens.*without strict=True"):
        model.blocks[0](image(1, 5, 64), attn_mask=torch.zeros(5, 5, device=DEVICE))
    with pytest.raises(AccelerationError, match="blocks.0: float64 input"):
        model.double()(im.double())
    model.float().blocks[0].mlp.fc2.register_forward_hook(lambda *a: None)
    with pytest.raises(AccelerationError, match="blocks.0: MLP: mlp.fc2 has hooks"):
        model(im)
    assert why_not(model) == {"blocks.0": ["MLP: mlp.fc2 has hooks"]}
    accelerate(model)  # again, without strict
    run(model, im)
    restore(model)


def test_report_is_a_table():
    text = str(accelerate(timm_vit(norm_layer="rmsnorm")))
    lines = text.splitlines()
    assert lines[0].split() == ["modules", "was", "on", "the", "kernels", "left", "alone,", "because"]
    assert lines[1].startswith("blocks.*       2x  Block      -")
    norm, expected = "timm.layers.norm.RmsNorm", "torch.nn.modules.normalization.LayerNorm"
    assert f"attention: norm1 is {norm}, not {expected}; MLP: norm2 is {norm}, not {expected}" in lines[1]
    assert lines[2].startswith("blocks.*.attn  2x  Attention  attention core")
    assert lines[3] == "2 swapped, 2 left alone"
    block = timm.models.vision_transformer.Block(64, 2)
    assert str(accelerate(block)).splitlines()[1].startswith("(model)")


def test_looking_disturbs_nothing():
    """No random numbers are drawn, no hooks fire, nothing is written to the parameters."""
    model, calls = timm_vit(depth=1), []
    for module in model.modules():
        module.register_forward_hook(lambda *a: calls.append(1))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
    assert calls == []
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_public_names():
    assert segmenter.accelerate is accelerate
    assert segmenter.restore is restore
    assert reference.attention is segmenter.ops.EAGER.attention
