"""Models from files and folders: published checkpoints, our own format, every kind through load_any; messages."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from segmenter import load_model as public_load_model
from segmenter.config import ConfigError, ModelInfo
from segmenter.weights.load import (
    convert_checkpoint,
    from_pretrained,
    load_any,
    load_model,
    load_state,
    save_pretrained,
)
from segmenter.weights.read import CheckpointError
from tests.support.foreign import jax_arrays, to_mmseg
from tests.support.tiny import tiny_config, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/checkpoint.pth"))


def image(side=70):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(3))


def logits(model, side=70):
    with torch.no_grad():
        return model(image(side))


def settings_of(model, **sections):
    net_kwargs = model.config.to_dict() | {"decoder": {**model.config.decoder, "n_cls": model.n_cls}}
    return {"net_kwargs": net_kwargs, **sections}


def publish(directory, model, settings=None, state=None):
    """checkpoint.pth and variant.yml as the published training script leaves them."""
    directory.mkdir(exist_ok=True)
    torch.save({"model": state or model.state_dict(), "epoch": 1}, directory / "checkpoint.pth")
    (directory / "variant.yml").write_text(yaml.safe_dump(settings or settings_of(model)))
    return directory / "checkpoint.pth"


# -- load_model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case):
    model, settings = load_model(GOLDEN / case / "checkpoint.pth")
    data = np.load(GOLDEN / case / "data.npz")
    assert not model.training and not any(p.is_meta for p in model.parameters())
    assert settings["algorithm_kwargs"]["num_epochs"] == 2  # the whole file, not only net_kwargs
    assert model.info.window_stride == settings["inference_kwargs"]["window_stride"]
    assert model.info.normalization == settings["net_kwargs"]["normalization"]
    assert model.info.weights == "trained" and model.info.source == f"{case}/checkpoint.pth"
    with torch.no_grad():
        found = model(torch.from_numpy(data["im"]))
    assert (found - torch.from_numpy(data["logits"])).abs().max() <= 1e-4 * abs(data["logits"]).max()


def test_directory_str_and_device(tmp_path):
    path = publish(tmp_path / "a", model := tiny_model())
    for given in (path, str(path), path.parent, str(path.parent)):
        assert torch.equal(logits(load_model(given, "eager", "cpu")[0]), logits(model))
    assert public_load_model is load_model


@pytest.mark.parametrize("form", ["!!python/tuple [64, 64]", "[64, 64]", "64", "!!python/tuple\n  - 64\n  - 64\n"])
def test_forms_of_image_size(tmp_path, form):
    path = publish(tmp_path / "a", model := tiny_model())
    settings = settings_of(model)
    del settings["net_kwargs"]["image_size"], settings["net_kwargs"]["distilled"]
    text = yaml.safe_dump(settings) + f"  image_size: {form}\n"  # the last section is net_kwargs
    (path.parent / "variant.yml").write_text(text)
    assert torch.equal(logits(load_model(path)[0]), logits(model))


def test_prefix_extra_keys_and_text_numbers(tmp_path):
    model = tiny_model()
    settings = settings_of(model)
    settings["net_kwargs"] |= {"patch_type": "x", "threshold": 0.9, "norm_eps": "1e-5"}
    state = {f"module.{name}": tensor.double() for name, tensor in model.state_dict().items()}
    loaded, _ = load_model(publish(tmp_path / "a", model, settings, state))
    assert torch.equal(logits(loaded), logits(model))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())


def test_info_comes_from_the_settings(tmp_path):
    model = tiny_model(n_cls=19)
    sections = {
        "dataset_kwargs": {"dataset": "cityscapes", "normalization": "deit", "crop_size": 64},
        "inference_kwargs": {"im_size": 64, "window_size": 96, "window_stride": 40},
    }
    info = load_model(publish(tmp_path / "a", model, settings_of(model, **sections)))[0].info
    assert info == ModelInfo("deit", 96, 40, "cityscapes", "trained", "a/checkpoint.pth")
    sections["dataset_kwargs"]["dataset"] = "ade20k"  # 19 classes are not ADE20K's
    assert load_model(publish(tmp_path / "a", model, settings_of(model, **sections)))[0].info.classes is None
    info = load_model(publish(tmp_path / "a", model, settings_of(model, inference_kwargs=5)))[0].info
    assert (info.window_size, info.window_stride, info.normalization) == (64, 64, "vit")


def test_normalization_only_under_dataset_kwargs(tmp_path):
    model = tiny_model()
    settings = settings_of(model, dataset_kwargs={"normalization": "deit"})
    del settings["net_kwargs"]["normalization"]
    loaded, _ = load_model(publish(tmp_path / "a", model, settings))
    assert loaded.config.normalization == loaded.info.normalization == "deit"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_cls": 19}, "5 classes in the file, 19 asked for"),
        ({"patch_size": 8}, "patch_size 16 in the file, 8 asked for"),
        (
            {"image_size": [128, 128]},
            r"position embedding for images of \(64, 64\) in the file, \(128, 128\) asked for",
        ),
        ({"d_model": 128, "n_heads": 2}, "d_model 64 in the file, 128 asked for"),
        ({"n_layers": 3}, "n_layers 2 in the file, 3 asked for"),
        ({"distilled": True}, "distilled False in the file, True asked for"),
        ({"decoder": {"name": "linear"}}, "decoder mask_transformer of 1 layers in the file, linear asked for"),
        ({"decoder": {"name": "mask_transformer", "n_layers": 2}}, "of 1 layers in the file, .* of 2 layers asked for"),
    ],
)
def test_settings_that_do_not_fit_say_where(tmp_path, changes, message):
    model = tiny_model()
    settings = settings_of(model)
    settings["net_kwargs"] |= changes
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pth does not fit the model: .*{message}"):
        load_model(publish(tmp_path / "a", model, settings))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_cls": 10**9}, "n_cls 1000000000 is out of range"),
        ({"n_cls": float("inf")}, "variant.yml: "),
        ({"d_model": None}, "lacks d_model"),
        ({"decoder": "magic"}, "decoder must be a mapping"),
        ({"image_size": [64, 64, 64]}, "image_size must be"),
        ({"normalization": "imagenet"}, "normalization 'imagenet' is unknown"),
    ],
)
def test_wrong_values_in_the_settings_name_the_file(tmp_path, changes, message):
    model = tiny_model()
    settings = settings_of(model)
    settings["net_kwargs"] |= changes
    with pytest.raises(ConfigError, match=rf"variant\.yml: .*{message}" if "variant" not in message else message):
        load_model(publish(tmp_path / "a", model, settings))


def test_settings_of_a_giant_allocate_nothing(tmp_path):
    model = tiny_model()
    settings = settings_of(model)
    settings["net_kwargs"] |= {"d_model": 65_536, "n_heads": 1024, "n_layers": 40}  # 8 TB of weights
    with pytest.raises(CheckpointError, match="d_model 64 in the file, 65536 asked for"):
        load_model(publish(tmp_path / "a", model, settings))


def test_without_settings_the_shapes_tell(tmp_path):
    model = tiny_model(decoder={"name": "linear"}, distilled=True, normalization="deit")
    path = publish(tmp_path / "a", model)
    (path.parent / "variant.yml").unlink()
    with pytest.warns(UserWarning, match="no variant.yml beside it"):
        loaded, settings = load_model(path)
    assert torch.equal(logits(loaded), logits(model)) and loaded.info.normalization == "deit"
    assert settings["net_kwargs"]["decoder"] == {"name": "linear", "n_cls": 5}
    assert settings["inference_kwargs"] == {"im_size": 64, "window_size": 64, "window_stride": 64}
    again, _ = load_model(publish(tmp_path / "b", model, settings))  # the variant made up is a valid one
    assert torch.equal(logits(again), logits(model))


def test_a_backbone_is_no_segmentation_model(tmp_path):
    state = {k: v for k, v in tiny_model().state_dict().items() if k.startswith("encoder.")}
    for name, weights in {
        "own.pth": state,
        "timm.pth": {k.removeprefix("encoder."): v for k, v in state.items()},
    }.items():
        torch.save(weights, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name}: a pretrained backbone, not a segmentation checkpoint"):
            load_model(tmp_path / name)


def test_directories_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="has none of checkpoint.pth, model.safetensors"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "checkpoint.pth")


def test_mmseg_file_loads_as_a_whole_model(tmp_path):
    model = tiny_model(n_cls=19, norm_eps=1e-6, pos_embed_mode="bicubic")
    meta = {"meta": {"CLASSES": ("road", *"abcdefghijklmnopqr")}, "state_dict": to_mmseg(model.state_dict(), 19)}
    torch.save(meta, tmp_path / "segmenter_vit.pth")
    loaded, settings = load_model(tmp_path / "segmenter_vit.pth")
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.info.window_size, loaded.info.window_stride, loaded.info.classes) == (64, 32, "cityscapes")
    assert settings["dataset_kwargs"]["dataset"] == "cityscapes"


# -- load_state -----------------------------------------------------------------------------------------------------


def test_load_state_copies_and_changes_dtype():
    model, other = tiny_model(0), tiny_model(1)
    state = {name: tensor.double() for name, tensor in other.state_dict().items()}
    load_state(model, state)
    assert torch.equal(logits(model), logits(other))
    state["encoder.pos_embed"].zero_()
    assert torch.equal(logits(model), logits(other))  # its own memory


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen", "integer"])
def test_load_state_is_all_or_nothing(damage):
    model, state = tiny_model(0), dict(tiny_model(1).state_dict())
    last = "decoder.mask_norm.bias"  # everything before it fits
    if damage == "missing":
        del state[last]
    elif damage == "unexpected":
        state["decoder.surplus"] = torch.ones(1)
    else:
        state[last] = torch.ones(7) if damage == "misshapen" else torch.ones(5, dtype=torch.int64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = {
        "missing": r"my\.pth does not fit the model\n  1 missing: decoder\.mask_norm\.bias",
        "unexpected": r"my\.pth does not fit the model\n  1 unexpected: decoder\.surplus",
        "misshapen": r"1 misshapen:\n    decoder\.mask_norm\.bias: expected \(5,\), found \(7,\)",
        "integer": r"my\.pth: weights must be floating point, found decoder\.mask_norm\.bias \(torch\.int64\)",
    }[damage]
    with pytest.raises(CheckpointError, match=message):
        load_state(model, state, "my.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_load_state_lists_few_and_counts_the_rest():
    with pytest.raises(CheckpointError) as caught:
        load_state(tiny_model(), tiny_model(d_model=128, n_heads=2, n_layers=3).state_dict())
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(": d_model 128 in the file, 64 asked for; n_layers 3 in the file, 2 asked for")
    assert lines[1].startswith("  12 unexpected: encoder.blocks.2.norm1.weight, ") and lines[1].endswith(" and 4 more")
    assert lines[2].endswith(" misshapen:")
    assert len(lines) == 3 + 8 + 1 and lines[-1].strip().endswith("more")


@pytest.mark.parametrize(
    "kind, hint",
    [
        ("mmseg", "it looks like mmsegmentation; `load_any` and `segmenter convert` read it"),
        ("timm", "it looks like a timm encoder without decoder; use `segmenter convert`"),
        ("npz", "JAX ViT"),
        ("encoder", r"a pretrained backbone, not a segmentation checkpoint \(no decoder\)"),
        ("resnet", "the names are those of no kind of weights known here"),
    ],
)
def test_load_state_says_what_the_weights_look_like(kind, hint):
    state = tiny_model().state_dict()
    encoder = {k: v for k, v in state.items() if k.startswith("encoder.")}
    given = {
        "mmseg": to_mmseg(state, 5),
        "timm": {k.removeprefix("encoder."): v for k, v in encoder.items()},
        "npz": jax_arrays(),
        "encoder": encoder,
        "resnet": {"conv1.weight": torch.ones(1)},
    }[kind]
    with pytest.raises(CheckpointError, match=hint):
        load_state(tiny_model(), given)


# -- load_any and conversion ----------------------------------------------------------------------------------------


def encoder_state(model):
    return {k.removeprefix("encoder."): v for k, v in model.state_dict().items() if k.startswith("encoder.")}


def test_presets_have_random_weights():
    model = load_any("Seg-T/16", n_cls=7, image_size=64, drop_path_rate=0.0)
    assert (model.n_cls, model.config.image_size, model.info.weights) == (7, (64, 64), "random")
    assert logits(model).std() > 0 and not model.training
    for request, message in [({"decoder": "linear"}, "takes no decoder"), ({"patch_size": 8}, "takes no patch_size")]:
        with pytest.raises(ConfigError, match=message):
            load_any("Seg-T/16", **request)
    with pytest.raises(ConfigError, match="Seg-X/16' is no preset; try one of"):
        load_any("Seg-X/16")
    with pytest.raises(CheckpointError, match="nothing: no such file or folder, and no preset such as Seg-S-Mask/16"):
        load_any("nothing")


def test_encoders_get_a_random_decoder(tmp_path):
    model = tiny_model()
    torch.save(encoder_state(model), tmp_path / "vit.pth")
    torch.manual_seed(0)
    loaded = load_any(tmp_path / "vit.pth", n_cls=4, decoder="linear", classes="camvid", norm_eps=1e-5)
    assert (loaded.info.weights, loaded.info.source) == ("encoder", f"{tmp_path.name}/vit.pth (timm)")
    assert (loaded.n_cls, loaded.config.decoder, loaded.info.classes) == (4, {"name": "linear"}, "camvid")
    with torch.no_grad():
        im = image(64)
        assert torch.equal(loaded.encoder(im, return_features=True), model.encoder(im, return_features=True))
    assert loaded.decoder.head.weight.std() > 0
    with pytest.raises(CheckpointError, match=r"vit\.pth: a pretrained backbone.*give n_cls"):
        load_any(tmp_path / "vit.pth")
    torch.save({k: v for k, v in encoder_state(model).items() if "norm.weight" not in k}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match="1 missing: norm.weight"):
        load_any(tmp_path / "broken.pth", n_cls=4)


def test_half_a_decoder_is_not_replaced_by_a_random_one(tmp_path):
    state = {name: tensor for name, tensor in tiny_model().state_dict().items() if name != "decoder.cls_emb"}
    torch.save(state, tmp_path / "half.pth")
    with (
        pytest.warns(UserWarning, match="no variant.yml"),
        pytest.raises(CheckpointError, match=r"half\.pth does not fit the model\n  20 unexpected: decoder\.proj_patch"),
    ):
        load_any(tmp_path / "half.pth", n_cls=3)


def test_npz_from_disk(tmp_path):
    np.savez(tmp_path / "vit.npz", **{name: tensor.numpy() for name, tensor in jax_arrays().items()})
    model = load_any(tmp_path / "vit.npz", n_cls=6, image_size=96, normalization="deit")
    assert model.config.image_size == (96, 96) and model.info.normalization == "deit"
    assert logits(model).shape == (1, 6, 70, 70) and logits(model).std() > 0


def test_hugging_face_directory(tmp_path):
    names = {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "cls_token": "vit.embeddings.cls_token"}
    names |= {"pos_embed": "vit.embeddings.position_embeddings", "attn.proj": "attention.output.dense"}
    names |= {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense"}
    names |= {"mlp.fc2": "output.dense", "blocks.": "vit.encoder.layer.", "head.": "classifier."}
    theirs = {}
    for name, tensor in encoder_state(tiny_model()).items():
        if ".qkv." in name:
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                there = name.replace("attn.qkv", f"attention.attention.{part}").replace("blocks.", "vit.encoder.layer.")
                theirs[there] = chunk.contiguous()
            continue
        for ours, other in names.items():
            name = name.replace(ours, other)
        theirs[f"vit.layernorm{name[4:]}" if name.startswith("norm.") else name] = tensor
    from safetensors.torch import save_file

    save_file(theirs, tmp_path / "model.safetensors")
    config = {"model_type": "vit", "layer_norm_eps": 1e-5, "num_attention_heads": 1, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.485, 0.456, 0.406]}))
    loaded = load_any(tmp_path, n_cls=3)
    with torch.no_grad():
        features = [m.encoder(image(64), return_features=True) for m in (loaded, tiny_model())]
    assert torch.equal(*features)
    assert loaded.info.normalization == "deit" and loaded.config.norm_eps == 1e-5
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_act is 'relu'; the Segmenter encoder needs"):
        load_any(tmp_path, n_cls=3)


def test_another_image_size_of_a_saved_model(tmp_path):
    model = tiny_model(image_size=(64, 144), norm_eps=1e-6)  # 4 x 9: as many patches as a 6 x 6 square
    save_pretrained(model, tmp_path)
    same_size = load_any(tmp_path, image_size=(64, 144))
    assert torch.equal(logits(same_size), logits(model))
    wider = load_any(tmp_path, image_size=(64, 288))
    assert wider.config == dataclasses.replace(model.config, image_size=(64, 288))
    assert wider.encoder.pos_embed.shape[1] == 1 + 4 * 18 and wider.info.weights == model.info.weights
    with pytest.raises(CheckpointError, match="7 classes were asked for"):
        load_any(tmp_path, n_cls=7)


def test_convert_checkpoint_reports(tmp_path):
    model = tiny_model(n_cls=11, norm_eps=1e-6, pos_embed_mode="bicubic")
    torch.save({"state_dict": to_mmseg(model.state_dict(), 11)}, tmp_path / "a.pth")
    report = convert_checkpoint(tmp_path / "a.pth", tmp_path / "out", dtype=torch.float16, classes="camvid")
    loaded = from_pretrained(tmp_path / "out")
    assert (logits(loaded) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()
    assert (loaded.info.classes, loaded.info.weights) == ("camvid", "trained")
    assert (report.kind, report.weights, report.config) == ("mmseg", "trained", loaded.config)
    assert report.n_parameters == sum(p.numel() for p in model.parameters())
    assert "conv_seg dropped" in str(report) and "11 classes" in str(report) and "RANDOM" not in str(report)

    torch.save(encoder_state(model), tmp_path / "b.pth")
    report = convert_checkpoint(tmp_path / "b.pth", tmp_path / "out2", n_cls=3)
    assert report.weights == from_pretrained(tmp_path / "out2").info.weights == "encoder"
    assert "RANDOM" in str(report)


def test_live_timm_model(tmp_path):
    timm = pytest.importorskip("timm.models.vision_transformer", reason="needs timm", exc_type=Exception)
    vit = timm.VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0).eval()
    model = load_any(vit, n_cls=4)
    with torch.no_grad():
        expected = vit.forward_features(image(64))
        assert (model.encoder(image(64), return_features=True) - expected).abs().max() < 1e-5
    assert model.info.source == "live VisionTransformer (timm)"
    report = convert_checkpoint(vit, tmp_path / "out", n_cls=4)
    assert report.source == "VisionTransformer" and report.kind == "timm"


def test_tiny_config_is_what_these_tests_think():
    assert (tiny_config().d_model, tiny_config().n_cls, tiny_config().decoder["n_layers"]) == (64, 5, 1)
