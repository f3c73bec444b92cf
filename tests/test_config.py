import dataclasses

import pytest
import torch

from segmenter import create_segmenter, preset, preset_names
from segmenter.config import BACKBONES, ConfigError, ModelConfig, backbone_config, check_windows
from tests.support.tiny import tiny_config

# Parameters and tensors in the state dict of the published models, at the published image size and class count.
COUNTS = {
    "Seg-T-Mask/16": (6_906_388, 185),
    "Seg-S-Mask/16": (26_418_964, 185),
    "Seg-B-Mask/16": (103_266_580, 185),
    "Seg-B/8": (89_235_838, 154),
    "Seg-L-Mask/16": (334_259_476, 329),
    "Seg-L/16": (305_918_078, 298),
    "Seg-B†/16": (88_089_446, 157),
    "Seg-B†-Mask/16": (104_037_116, 188),
    "Seg-S-Mask/32": (27_008_788, 185),
    "Seg-B-Mask/32": (104_446_228, 185),
}


def count(config):
    with torch.device("meta"):
        model = create_segmenter(config)
    return sum(p.numel() for p in model.parameters()), len(model.state_dict())


@pytest.mark.parametrize("name", preset_names())
def test_parameter_counts_of_presets(name):
    parameters, tensors = count(preset(name))
    if name in COUNTS:
        assert (parameters, tensors) == COUNTS[name]
    else:  # linear and mask variants of one encoder differ by the decoder alone
        config = preset(name)
        d, K, n = config.d_model, config.n_cls, config.decoder.get("n_layers")
        block = 12 * d * d + 13 * d
        decoder = d * K + K if n is None else K * d + 2 * d * d + n * block + d * d + d + 2 * d + 2 * K
        side = config.image_size[0] // config.patch_size
        encoder = (
            d
            + (1 + side * side) * d
            + d * (3 * config.patch_size**2 + 1)
            + config.n_layers * block
            + 2 * d
            + 1000 * (d + 1)
        )
        assert parameters == encoder + decoder


@pytest.mark.parametrize(
    ("kwargs", "parameters"),
    [
        ({"n_cls": 60, "image_size": 480}, 333_450_336),  # Pascal Context
        ({"n_cls": 19, "image_size": 768, "n_decoder_layers": 1}, 322_249_742),  # Cityscapes
        ({"n_cls": 19, "image_size": 768, "n_decoder_layers": 2}, 334_845_966),
    ],
)
def test_parameter_counts_of_other_data_sets(kwargs, parameters):
    assert count(preset("Seg-L-Mask/16", **kwargs))[0] == parameters


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_backbones_and_decoders_build(backbone, decoder):
    config = backbone_config(backbone, decoder, n_cls=7, image_size=96)
    with torch.device("meta"):
        model = create_segmenter(config)
    assert (model.encoder.distilled, model.n_cls, model.patch_size) == (
        BACKBONES[backbone].distilled, 7, BACKBONES[backbone].patch_size,
    )  # fmt: skip
    assert model.encoder.d_model == BACKBONES[backbone].d_model
    assert ("encoder.dist_token" in model.state_dict()) == BACKBONES[backbone].distilled


@pytest.mark.parametrize("size", ["T", "S", "B", "L"])
@pytest.mark.parametrize("patch", [8, 16, 32])
def test_any_width_goes_with_any_patch_size(size, patch):
    config = preset(f"Seg-{size}-Mask/{patch}", image_size=256)
    assert config.patch_size == patch
    assert config.image_size == (256, 256)


@pytest.mark.parametrize("name", ["Seg-X/16", "Seg-B/7", "Seg-B†/8", "Seg-B", "", "seg-b/16"])
def test_unknown_preset(name):
    with pytest.raises(ConfigError, match="no preset; try one of Seg-T/16"):
        preset(name)


@pytest.mark.parametrize("size", [96, [96, 96], (96, 96)])
def test_image_size_forms(size):
    assert tiny_config(image_size=size).image_size == (96, 96)


def test_round_trip_and_unknown_keys():
    config = tiny_config(distilled=True, norm_eps=1e-6, patch_type="pitome", threshold=0.9)
    assert config.norm_eps == 1e-6
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_numbers_that_yaml_reads_as_text():
    assert tiny_config(norm_eps="1e-6").norm_eps == 1e-6


def test_arguments_are_not_changed():
    kwargs = {**tiny_config().to_dict(), "decoder": {"name": "mask_transformer"}}
    before = {**kwargs, "decoder": dict(kwargs["decoder"])}
    create_segmenter(kwargs)
    assert kwargs == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_cls": 0}, "n_cls 0 is out of range"),
        ({"n_cls": 70_000}, "n_cls 70000 is out of range"),
        ({"n_cls": "many"}, "n_cls must be an integer, found 'many'"),
        ({"n_cls": True}, "n_cls must be an integer"),
        ({"n_cls": float("inf")}, "n_cls must be an integer, found inf"),
        ({"n_cls": float("nan")}, "n_cls must be an integer, found nan"),
        ({"distilled": "no"}, "distilled must be true or false, found 'no'"),
        ({"n_layers": 2.5}, "n_layers must be an integer"),
        ({"image_size": 100}, "must be divisible by patch_size 16"),
        ({"image_size": (64, 64, 3)}, "one number or .height, width."),
        ({"image_size": 1 << 20}, "image_size 1048576 is out of range"),
        ({"d_model": 96, "n_heads": 5}, "must be divisible by n_heads 5"),
        ({"d_model": 96, "n_heads": 2}, "d_model 96 is no multiple of 64"),
        ({"dropout": 2}, "dropout 2.0 is out of range"),
        ({"drop_path_rate": 1}, "drop_path_rate 1.0 is out of range"),
        ({"decoder": {"name": "mask_transformer", "dropout": 5.0}}, "decoder.dropout 5.0 is out of range"),
        ({"norm_eps": -1}, "norm_eps -1.0 is out of range"),
        ({"norm_eps": float("nan")}, "norm_eps nan is out of range"),
        ({"norm_eps": 0}, "norm_eps 0.0 is out of range"),
        ({"norm_eps": 10**400}, "norm_eps is too large a number"),
        ({"n_cls": 10**5000}, "n_cls of more than 18 digits is out of range"),
        ({"n_layers": 1025}, "n_layers 1025 is out of range"),
        ({"d_model": 65_600}, "d_model 65600 is out of range"),
        ({"patch_size": 257}, "patch_size 257 is out of range"),
        ({"decoder": {"name": "mask_transformer", "n_layers": 1025}}, "decoder.n_layers 1025 is out of range"),
        ({"distilled": [10**5000]}, "distilled must be true or false"),
        ({"decoder": None}, "lacks decoder"),
        ({"dropout": "none"}, "dropout must be a number"),
        ({"normalization": "imagenet"}, "choose one of vit, deit"),
        ({"pos_embed_check": "maybe"}, "choose one of tokens, grid"),
        ({"decoder": {"name": "deeplab_dec"}}, "'deeplab_dec' is unknown; choose one of linear, mask_transformer"),
        ({"decoder": "linear"}, "must be a mapping with a name"),
        ({"n_cls": 1}, "use the linear decoder"),
        ({"patch_size": None}, "lacks patch_size"),
    ],
)
def test_bad_values_name_the_value_and_the_way_out(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**change)


def test_a_configuration_is_checked_however_it_is_made():
    with pytest.raises(ConfigError, match="n_cls 0 is out of range"):
        dataclasses.replace(tiny_config(), n_cls=0)
    with pytest.raises(ConfigError, match="decoder 'foo' is unknown"):
        dataclasses.replace(tiny_config(), decoder={"name": "foo"})
    with pytest.raises(ConfigError, match="image_size 0 is out of range"):
        preset("Seg-S/16", image_size=0)
    with pytest.raises(ConfigError, match="'Seg-S/16' says the decoder"):
        preset("Seg-S/16", decoder={"name": "mask_transformer"})


def test_misspelt_override():
    with pytest.raises(ConfigError, match="argument 'patchsize' is unknown"):
        preset("Seg-S/16", patchsize=8)
    with pytest.raises(ConfigError, match="net_kwargs must be a mapping"):
        ModelConfig.from_dict([1])


def test_two_classes_warn():
    with pytest.warns(UserWarning, match="use 3 classes or the linear decoder"):
        create_segmenter(tiny_config(n_cls=2))


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().n_cls = 3


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        (0, 1, "window_size must be a number of pixels from 1, found 0"),
        (64, 0, "window_stride must be a number of pixels from 1, found 0"),
        (64, True, "window_stride must be a number of pixels from 1, found True"),
        ("64", 64, "window_size must be a number of pixels from 1, found '64'"),
        (float("nan"), 64, "window_size must be a number of pixels"),
        (64, 65, "window_stride 65 beyond window_size 64 would leave pixels out"),
        (513, 64, r"window_size 513 is beyond 512, too large for a model of images of \(16, 32\)"),
        pytest.param(10**5000, 64, "window_size of more than 18 digits is beyond 512", id="5000 digits"),
    ],
)
def test_windows_have_a_range(size, stride, message):
    with pytest.raises(ConfigError, match=message):
        check_windows(size, stride, (16, 32))


def test_windows_that_people_use():
    for image_size, size, stride in [(32, 512, 1), (512, 8192, 512), (768, 2048, 2048), (1024, 16_384, 1)]:
        check_windows(size, stride, (image_size, image_size))
    with pytest.raises(ConfigError, match="16385 is beyond 16384"):
        check_windows(16_385, 512, (2048, 2048))
