"""The grid of foreign position embeddings: what the source says, not what a count happens to be; or two readings."""

import json

import pytest
import torch

from segmenter.cli import main
from segmenter.weights.convert import convert
from segmenter.weights.load import from_pretrained, load_any
from segmenter.weights.read import CheckpointError
from tests.support.tiny import tiny_model

D, PATCH = 64, 16


def timm_state(rows, columns, distilled=False, class_positions=True):
    """Plain timm weights whose position embedding counts its patches: value k at patch k."""
    model = tiny_model(image_size=(rows * PATCH, columns * PATCH), distilled=distilled)
    state = {k.removeprefix("encoder."): v.clone() for k, v in model.state_dict().items() if k.startswith("encoder.")}
    n_extra = 1 + distilled
    state["pos_embed"][:] = (torch.arange(n_extra + rows * columns) - n_extra)[None, :, None]
    if not class_positions:
        state["pos_embed"] = state["pos_embed"][:, n_extra:]
    return state


def positions(converted):
    """(rows, columns) of the patch numbers, when nothing was resized."""
    n_extra = 1 + converted.config.distilled if converted.config.pos_embed == "all" else 0
    rows, columns = (side // PATCH for side in converted.config.image_size)
    return converted.state["encoder.pos_embed"][0, n_extra:, 0].reshape(rows, columns)


def assert_unchanged(converted, rows, columns):
    assert converted.config.image_size == (rows * PATCH, columns * PATCH)
    assert torch.equal(positions(converted), torch.arange(float(rows * columns)).reshape(rows, columns))


@pytest.mark.parametrize("rows, columns, distilled", [(14, 16, False), (3, 5, False), (16, 14, False), (2, 7, True)])
@pytest.mark.parametrize("how", ["image_size", "grid", "source_size"])
def test_patches_with_class_tokens_that_count_a_square(rows, columns, distilled, how):
    """14 x 16 patches and a class token are 15 x 15 tokens."""
    told = {"grid": (rows, columns)}.get(how, (rows * PATCH, columns * PATCH))
    converted = convert(timm_state(rows, columns, distilled), n_cls=3, **{how: told})
    assert_unchanged(converted, rows, columns)
    assert converted.config.pos_embed == "all"
    if how == "image_size":
        assert f"read as the {rows} x {columns} patches of image_size" in "; ".join(converted.notes)
    else:  # and the size asked for is one to resize to
        resized = convert(timm_state(rows, columns, distilled), n_cls=3, image_size=64, **{how: told})
        assert resized.config.image_size == (64, 64)
        assert f"resized from {(rows, columns)} to (4, 4)" in resized.notes[0]


@pytest.mark.parametrize("how", ["image_size", "grid", "source_size"])
def test_positions_of_patches_only(how):
    told = {"grid": (4, 4)}.get(how, (64, 64))
    converted = convert(timm_state(4, 4, class_positions=False), n_cls=3, **{how: told})
    assert_unchanged(converted, 4, 4)
    assert converted.config.pos_embed == "patches"
    assert converted.state["encoder.pos_embed"].shape[1] == 16
    rectangle = convert(timm_state(3, 6, class_positions=False), n_cls=3, grid=(3, 6))
    assert_unchanged(rectangle, 3, 6)


@pytest.mark.parametrize(
    "state, request_, message",
    [
        (timm_state(14, 16), {}, r"either 224 patches and 1 of the class token.*or a square of \(15, 15\) patches"),
        (timm_state(4, 4, class_positions=False), {}, r"either 15 patches.*or a square of \(4, 4\) patches without"),
        (timm_state(14, 16), {"image_size": 64}, r"either 224 patches.*or a square of \(15, 15\) patches"),
        (timm_state(2, 7, True), {}, r"either 14 patches and 2 of the class token.*or a square of \(4, 4\)"),
        (timm_state(2, 8), {"image_size": (32, 128)}, r"either a square of \(4, 4\).*or already the \(2, 8\) grid"),
        (timm_state(8, 8), {"image_size": (80, 208)}, r"either a square of \(8, 8\).*or already the \(5, 13\) grid"),
        (timm_state(2, 5), {}, "10 patches, no square; give its grid"),
        (timm_state(2, 5), {"image_size": 64}, r"10 patches, neither a square nor the \(4, 4\) grid of image_size"),
        (timm_state(2, 5), {"grid": (3, 3)}, r"10 patches, which is no \(3, 3\) grid"),
        (timm_state(4, 4), {"source_size": (32, 32)}, r"16 patches, which is no \(2, 2\) grid"),
    ],
)
def test_two_readings_or_none_are_refused(state, request_, message):
    with pytest.raises(CheckpointError, match=message):
        convert(state, n_cls=3, **request_)


def test_the_grid_that_is_given_is_believed():
    assert_unchanged(convert(timm_state(2, 8), n_cls=3, grid=(2, 8)), 2, 8)
    assert_unchanged(convert(timm_state(2, 8), n_cls=3, grid=(2, 8), image_size=(32, 128)), 2, 8)
    assert_unchanged(convert(timm_state(2, 8), n_cls=3, grid=(2, 8), source_size=64), 2, 8)
    square = convert(timm_state(4, 4), n_cls=3)
    assert_unchanged(square, 4, 4)
    assert "taken for a square of 4 x 4 patches, nothing tells its grid" in square.notes[-1]
    assert "nothing tells" not in "; ".join(convert(timm_state(4, 4), n_cls=3, image_size=64).notes)


def test_only_timm_leaves_out_positions_of_the_class_token():
    state = {f"encoder.{k}": v for k, v in timm_state(4, 4, class_positions=False).items()}
    with pytest.raises(CheckpointError, match="15 patches, no square"):
        convert(state, n_cls=3)
    with pytest.raises(CheckpointError, match=r"15 patches, which is no \(4, 4\) grid"):
        convert(state, n_cls=3, grid=(4, 4))


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"image_size": 10**9}, "image_size 1000000000 must be one integer or two, from 16"),
        ({"image_size": (64, 64, 64)}, "must be one integer or two"),
        ({"image_size": 64.0}, "must be one integer or two"),
        ({"image_size": "64"}, "must be one integer or two"),
        ({"image_size": 8}, "from 16 .the patch size. to"),
        ({"image_size": 100}, "image_size 100 must be a multiple of the patch size 16"),
        ({"grid": (4, -4)}, "grid .4, -4. must be one integer or two"),
        ({"grid": (4, None)}, "must be one integer or two"),
        ({"source_size": float("nan")}, "the image size in the configuration nan must be"),
        ({"patch_size": 0}, "patch_size 0 must be an integer from 1 to 256"),
        ({"patch_size": 10**6}, "patch_size 1000000 must be an integer"),
    ],
)
def test_sizes_out_of_range(request_, message):
    with pytest.raises(CheckpointError, match=message):
        convert(timm_state(4, 4), n_cls=3, **request_)


# -- what lies beside the file --------------------------------------------------------------------------------------


def timm_folder(folder, state, **config):
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", **config}))
    return folder


def test_timms_config_tells_the_grid(tmp_path):
    trained = {"input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406]}
    timm_folder(tmp_path, timm_state(2, 8), model_args={"img_size": [32, 128], "num_heads": 2}, pretrained_cfg=trained)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        model = load_any(source, n_cls=3)
        assert (model.config.image_size, model.config.n_heads, model.info.normalization) == ((32, 128), 2, "deit")
    timm_folder(tmp_path, timm_state(4, 4, class_positions=False), pretrained_cfg={"input_size": [3, 64, 64]})
    assert load_any(tmp_path, n_cls=3).config.image_size == (64, 64)
    timm_folder(tmp_path, timm_state(4, 4), pretrained_cfg={"input_size": [3, 32, 32]})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the position embedding has 16 patches"):
        load_any(tmp_path, n_cls=3)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architecture": "vit_small_patch16_rope_ape_224"}, r"config\.json: vit_small.* has rotary positions"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "the quick GELU"),
        ({"model_args": {"act_layer": "gelu_tanh"}}, "act_layer is 'gelu_tanh'"),
        ({"model_args": {"img_size": "big"}}, "the image size in the configuration 'big' must be"),
        ({"model_args": {"num_heads": [2]}}, "n_heads must be an integer"),
    ],
)
def test_timms_config_tells_what_no_weight_does(tmp_path, config, message):
    timm_folder(tmp_path, timm_state(4, 4), **config)
    with pytest.raises(CheckpointError, match=message):
        load_any(tmp_path, n_cls=3)


def test_command_line(tmp_path, capsys):
    torch.save(timm_state(14, 16), tmp_path / "vit.pth")
    command = ["convert", str(tmp_path / "vit.pth"), str(tmp_path / "out"), "--n-cls", "3"]
    assert main(command) == 4
    assert "give its --grid" in capsys.readouterr().err
    for option in (["--grid", "14x16"], ["--image-size", "224x256"]):
        assert main([*command, *option]) == 0
        assert from_pretrained(tmp_path / "out").config.image_size == (224, 256)
    assert main([*command, "--grid", "14x16", "--n-heads", "2"]) == 0
    assert from_pretrained(tmp_path / "out").config.n_heads == 2
    assert main([*command, "--grid", "14"]) == 2
