"""What lies beside weights: variant.yml, windows and classes, the JSON of Hugging Face; never code, always bounded."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from segmenter.config import ConfigError
from segmenter.weights.load import load_any, save_pretrained
from segmenter.weights.read import CheckpointError
from segmenter.weights.settings import as_published, read_published
from tests.support.foreign import HF, to_mmseg
from tests.support.tiny import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"

# -- variant.yml ----------------------------------------------------------------------------------------------------


def written(directory, text):
    (directory / "variant.yml").write_text(text)
    return directory / "variant.yml"


def test_settings_of_every_golden_case():
    paths = sorted(GOLDEN.glob("*/variant.yml"))
    assert paths
    for path in paths:
        net_kwargs = read_published(path)["net_kwargs"]
        assert isinstance(net_kwargs["image_size"], tuple) and len(net_kwargs["image_size"]) == 2
        assert net_kwargs["decoder"]["name"] in ("linear", "mask_transformer")


@pytest.mark.parametrize(
    "text, value", [("!!python/tuple [96, 64]", (96, 64)), ("[96, 64]", [96, 64]), ("96", 96), ("1e-5", "1e-5")]
)
def test_forms_of_a_value(tmp_path, text, value):
    found = read_published(written(tmp_path, f"net_kwargs:\n  image_size: {text}\n"))["net_kwargs"]["image_size"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "net_kwargs: {a: !!python/name:os.system }",
        "net_kwargs: {a: !!python/object/apply:os.mkdir [MARKER]}",
        "net_kwargs: {a: !!python/object/new:os.mkdir [MARKER]}",
        "net_kwargs: {a: !!python/module:os }",
        "net_kwargs: {a: !!python/object:pathlib.Path {}}",
        "net_kwargs: {a: !!bool maybe}",  # KeyError inside yaml
        "net_kwargs: {a: !!int ''}",  # IndexError
        "net_kwargs: {a: !!timestamp x}",  # AttributeError
        "net_kwargs: {a: 2024-99-99}",
        "net_kwargs: {[1]: 2, {a: 1}: 3}",
        "net_kwargs: [1, 2",
        "net_kwargs: {a: *nowhere}",
        "a: &a {x: 1}\nnet_kwargs: {<<: [*a, *a]}",
        "net_kwargs:\n\t- tab",
        "\x00\x01",
    ],
)
def test_python_and_broken_yaml_are_refused(tmp_path, text):
    marker = tmp_path / "marker"
    with pytest.raises(CheckpointError, match=r"variant\.yml: is no plain YAML"):
        read_published(written(tmp_path, text.replace("MARKER", str(marker))))
    assert not marker.exists()


@pytest.mark.parametrize("text", ["", "5", "[1]", "a: 1", "net_kwargs: 5", "net_kwargs:"])
def test_without_net_kwargs(tmp_path, text):
    with pytest.raises(CheckpointError, match="has no net_kwargs"):
        read_published(written(tmp_path, text))


def test_too_deep_too_large_not_text_missing(tmp_path):
    with pytest.raises(CheckpointError, match="nested more than 64 levels"):
        read_published(written(tmp_path, "net_kwargs: " + "[" * 5000))
    with pytest.raises(CheckpointError, match="larger than 1000000 bytes"):
        read_published(written(tmp_path, "a: 1\n" * 250_000))
    (tmp_path / "variant.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="no text in UTF-8"):
        read_published(tmp_path / "variant.yml")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_published(tmp_path / "none.yml")


def test_aliases_do_not_multiply(tmp_path):
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 30)]
    with pytest.raises(CheckpointError, match="more than 200000 values once its aliases are followed"):
        read_published(written(tmp_path, "\n".join([*lines, "net_kwargs: {n_cls: 3}"])))
    settings = read_published(written(tmp_path, "\n".join([*lines[:4], "net_kwargs: {n_cls: 3}"])))
    assert settings["net_kwargs"] == {"n_cls": 3} and settings["a3"][0] is settings["a3"][9]


# -- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, stride", [(9000, 64), (10**9, 64), (64, 65), (0, 64), ("64", 64), (64, 0)])
def test_windows_of_files_have_a_range(tmp_path, size, stride):
    model = tiny_model()
    save_pretrained(model, tmp_path / "ours")
    content = json.loads((tmp_path / "ours" / "config.json").read_text())
    content["info"] |= {"window_size": size, "window_stride": stride}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json: the values under info are wrong: window_"):
        load_any(tmp_path / "ours")
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    windows = {"window_size": size, "window_stride": stride}
    (tmp_path / "variant.yml").write_text(yaml.safe_dump({**as_published(model), "inference_kwargs": windows}))
    with pytest.raises(ConfigError, match=r"variant\.yml: window_"):
        load_any(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize(
    "meta, classes",
    [
        ({"dataset_meta": {"classes": ("road", *"abcdefghijklmnopqr")}}, "cityscapes"),
        ({"CLASSES": ["road", *"abcdefghijklmnopqr"], "dataset_meta": 5}, "cityscapes"),
        ({"CLASSES": [["road"], *"abcdefghijklmnopqr"]}, None),
        ({"CLASSES": "road"}, None),
        ({"dataset_meta": {"classes": {"road": 1}}}, None),
        (5, None),
    ],
)
def test_class_names_of_mmsegmentation(tmp_path, meta, classes):
    model = tiny_model(n_cls=19, norm_eps=1e-6, pos_embed_mode="bicubic")
    torch.save({"meta": meta, "state_dict": to_mmseg(model.state_dict(), 19)}, tmp_path / "a.pth")
    assert load_any(tmp_path / "a.pth").info.classes == classes


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "[1]", "must hold a JSON object"),
        ("config.json", "{", "is no JSON"),
        ("config.json", '{"layer_norm_eps": 1e999}', "norm_eps inf is out of range"),
        ("config.json", '{"num_attention_heads": "two"}', "n_heads must be an integer"),
        ("config.json", '{"image_size": NaN}', "is no JSON .the number NaN"),
        ("config.json", '{"image_size": [64, 32]}', r"16 patches, which is no \(4, 2\) grid"),
        ("config.json", '{"model_type": "beit"}', "model_type 'beit' is none of the plain ViTs"),
        ("config.json", '{"model_type": ["vit"]}', "is none of the plain ViTs"),
        ("preprocessor_config.json", "5", "must hold a JSON object"),
        ("preprocessor_config.json", "[" * 500, "is no JSON"),
    ],
)
def test_what_lies_beside_weights_of_hugging_face(tmp_path, name, content, message):
    block = {"encoder.layer.0.layernorm_before.weight": torch.zeros(64)}
    torch.save(
        HF | block | {"encoder.layer.0.layernorm_before.bias": torch.zeros(64)},
        tmp_path / "pytorch_model.bin",
    )
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_any(tmp_path, n_cls=3)
