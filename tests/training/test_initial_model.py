"""The model that a training run starts from."""

import sys
from types import SimpleNamespace

import pytest
import torch

from segmenter.config import ConfigError
from segmenter.data.datasets import open_dataset
from segmenter.training.initial_model import first_layers, starting_model
from segmenter.training.recipe import Recipe, RecipeError
from segmenter.weights.read import CheckpointError
from tests.support.data_sets import make_data_set
from tests.support.foreign import LAYERS, D, jax_arrays
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Of 5 classes."""
    return open_dataset(make_data_set(tmp_path_factory.mktemp("data"), n=1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a model of 5 classes, with settings of its own."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(normalization="deit", pos_embed_mode="bicubic")
    model.save_pretrained(folder)
    return folder


def start(dataset, model, **changes):
    settings = {"crop_size": 64, "epochs": 1, "batch_size": 2, "learning_rate": 0.1, "data": "d", "model": str(model)}
    torch.manual_seed(0)
    return starting_model(Recipe(**{**settings, **changes}).completed("folder"), dataset)


def drop_rates(model):
    return [getattr(block.drop_path, "drop_prob", 0.0) for block in model.encoder.blocks]


def encoder_of(model):
    return {n: t for n, t in model.encoder.state_dict().items() if not n.startswith("head")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_preset(dataset):
    model = start(dataset, "Seg-T-Mask/16", decoder_layers=1, dropout=0.2, decoder_dropout=0.3, n_layers=3)
    config = model.config
    assert model.training and (model.n_cls, config.image_size, config.d_model) == (5, (64, 64), 192)
    assert config.decoder["name"] == "mask_transformer"
    assert len(model.decoder.blocks) == 1 and len(model.encoder.blocks) == 3
    assert model.encoder.blocks[0].mlp.drop.p == 0.2 and model.decoder.blocks[0].mlp.drop.p == 0.3
    assert drop_rates(model) == pytest.approx([0.0, 0.05, 0.1])
    assert same(model.state_dict(), start(dataset, "Seg-T-Mask/16", decoder_layers=1, n_layers=3).state_dict()), (
        "seeded"
    )


def test_a_preset_with_a_linear_decoder(dataset):
    model = start(dataset, "Seg-T/16", n_layers=1)
    assert type(model.decoder).__name__ == "DecoderLinear" and model.n_cls == 5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Seg-T-Mask/16", {"patch_size": 8}, "patch_size 8: the preset Seg-T-Mask/16 has 16"),
        ("Seg-T-Mask/16", {"decoder": "linear"}, "decoder linear: the preset Seg-T-Mask/16 has mask_transformer"),
        ("Seg-T/16", {"decoder": "mask_transformer"}, "decoder mask_transformer: the preset Seg-T/16 has linear"),
    ],
)
def test_settings_that_contradict_a_preset(dataset, name, changes, message):
    with pytest.raises(RecipeError, match=message):
        start(dataset, name, **changes)


def test_a_depth_that_the_decoder_has_not(dataset, saved):
    with pytest.raises(RecipeError, match="decoder_layers 4: the decoder of .* has 1; new_decoder: true makes another"):
        start(dataset, saved, decoder_layers=4)


def test_a_linear_decoder_is_kept(dataset, tmp_path):
    model = tiny_model(decoder={"name": "linear"})
    model.save_pretrained(tmp_path)
    started = start(dataset, tmp_path)
    assert torch.equal(started.decoder.head.weight, model.decoder.head.weight)


def test_a_folder_is_taken_before_a_preset_or_a_name_of_timm(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Seg-S-streets", "timm/mine"):
        tiny_model().save_pretrained(tmp_path / name)
        assert start(dataset, name).config.d_model == 64


def test_the_kernels_are_used_only_if_asked_for(dataset, saved):
    assert start(dataset, saved).encoder.ops.name == "eager"
    assert start(dataset, saved, impl="auto").encoder.ops.name == "auto"
    assert start(dataset, "Seg-T-Mask/16", n_layers=1).encoder.ops.name == "eager"


def test_a_preset_that_is_none(dataset):
    with pytest.raises(ConfigError, match="Seg-X/16"):
        start(dataset, "Seg-X/16")


def test_a_model_of_ours_goes_on_with_all_its_weights(dataset, saved):
    model = start(dataset, saved, decoder_layers=1)
    assert same(model.state_dict(), tiny_model(normalization="deit", pos_embed_mode="bicubic").state_dict())
    assert (model.info.normalization, model.config.pos_embed_mode) == ("deit", "bicubic"), "its own, as nothing is said"
    assert (model.info.weights, model.info.classes, model.info.window_size) == ("trained", None, 64)
    assert model.info.source.startswith("folder train, 1 images; started from ")
    assert drop_rates(model) == pytest.approx([0.0, 0.1])
    assert start(dataset, saved, normalization="vit").info.normalization == "vit"


def test_the_source_names_every_start(dataset, saved, tmp_path):
    first = start(dataset, saved)
    first.save_pretrained(tmp_path / "first")
    first_source = f"folder train, 1 images; started from {saved.name}"
    assert first.info.source == first_source
    assert start(dataset, tmp_path / "first").info.source == (
        f"folder train, 1 images; started from first ({first_source})"
    )


def test_the_classifiers_of_imagenet_are_not_trained(dataset, saved):
    model = start(dataset, saved)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still and all(name.startswith("encoder.head") for name in still)
    frozen = start(dataset, saved, freeze_backbone=True)
    assert {name.split(".")[0] for name, p in frozen.named_parameters() if p.requires_grad} == {"decoder"}


def test_other_classes_need_a_new_decoder(dataset, tmp_path):
    other = tiny_model(n_cls=7)
    other.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="5 classes were asked for, the file holds .* 7 classes; new_decoder: true"
    ):
        start(dataset, tmp_path)
    model = start(dataset, tmp_path, new_decoder=True, decoder_layers=2)
    assert same(encoder_of(model), encoder_of(other))
    assert model.n_cls == 5 and len(model.decoder.blocks) == 2
    assert type(start(dataset, tmp_path, new_decoder=True, decoder="linear").decoder).__name__ == "DecoderLinear"


def test_a_new_decoder_is_random(dataset, saved):
    model = start(dataset, saved, new_decoder=True, decoder_layers=1)
    old = tiny_model(normalization="deit", pos_embed_mode="bicubic")
    assert same(encoder_of(model), encoder_of(old))
    assert not torch.equal(model.decoder.proj_dec.weight, old.decoder.proj_dec.weight)
    assert (model.info.normalization, model.config.pos_embed_mode) == ("deit", "bicubic")


def test_an_encoder_gets_a_decoder(dataset, tmp_path):
    """A checkpoint of timm, without decoder."""
    old = tiny_model()
    torch.save(dict(old.encoder.state_dict()), tmp_path / "vit.pth")
    model = start(dataset, tmp_path / "vit.pth")
    assert same(encoder_of(model), encoder_of(old)) and model.n_cls == 5
    assert model.info.weights == "trained" and model.info.source.endswith("started from vit.pth")
    again = start(dataset, tmp_path / "vit.pth", new_decoder=True, decoder_layers=3)
    assert same(encoder_of(again), encoder_of(old)) and len(again.decoder.blocks) == 3


def test_arrays_of_augreg(dataset, tmp_path):
    import numpy as np

    np.savez(tmp_path / "vit.npz", **{name: tensor.numpy() for name, tensor in jax_arrays().items()})
    model = start(dataset, tmp_path / "vit.npz", n_layers=1)
    assert (model.config.d_model, len(model.encoder.blocks)) == (D, 1) and LAYERS > 1
    kernel = jax_arrays()["embedding/kernel"].permute(3, 2, 0, 1)
    assert torch.equal(model.encoder.patch_embed.proj.weight, kernel)


def test_crops_of_another_size_resample_the_positions(dataset, saved):
    model = start(dataset, saved, crop_size=96)
    assert model.encoder.pos_embed.shape == (1, 37, 64) and model.config.image_size == (96, 96)


def test_another_patch(dataset, saved):
    model = start(dataset, saved, patch_size=8)
    assert (model.patch_size, model.encoder.patch_embed.proj.weight.shape[-1]) == (8, 8)
    assert model.encoder.pos_embed.shape == (1, 65, 64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5, 64, 64)


def test_first_layers():
    model = tiny_model(n_layers=4, drop_path_rate=0.3)
    shorter = first_layers(model, 2)
    assert shorter.config.n_layers == 2 and drop_rates(shorter) == pytest.approx([0.0, 0.3])
    kept = {n: t for n, t in model.state_dict().items() if ".blocks.2." not in n and ".blocks.3." not in n}
    assert same(shorter.state_dict(), kept)
    with pytest.raises(RecipeError, match="n_layers 5: the encoder has only 4 blocks"):
        first_layers(model, 5)


def test_timm_is_asked_for_its_weights(dataset, monkeypatch):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason="needs timm", exc_type=Exception)
    timm = sys.modules["timm"]
    torch.manual_seed(1)
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
    vit = vision_transformer.VisionTransformer(**sizes)
    asked = []

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        return vit

    monkeypatch.setattr(timm, "create_model", create_model)
    model = start(dataset, "timm/vit_tiny_of_a_test")
    assert asked == [("vit_tiny_of_a_test", True)]
    assert torch.equal(model.encoder.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    assert model.info.source.endswith("started from vit_tiny_of_a_test") and model.n_cls == 5


def test_timm_without_a_network(dataset, monkeypatch):
    def create_model(name, pretrained):
        raise OSError("cannot reach\nthe hub")

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    with pytest.raises(CheckpointError, match="timm cannot make 'vit' .*cannot reach the hub.* path of a weight file"):
        start(dataset, "timm/vit")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CheckpointError, match="timm cannot make 'vit' .*is not installed.*pip install timm"):
        start(dataset, "timm/vit")


def test_weights_that_are_not_there(dataset, tmp_path):
    for changes in ({}, {"new_decoder": True}):
        with pytest.raises(CheckpointError, match="nothing.pth: no such file or folder, and neither a preset"):
            start(dataset, tmp_path / "nothing.pth", **changes)
