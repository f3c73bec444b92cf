"""Files that are well-formed, and nonsense as weights, end in CheckpointError; nothing giant is allocated."""

import math
import warnings

import pytest
import torch
import yaml

from segmenter.model import create_segmenter
from segmenter.weights.convert import convert
from segmenter.weights.load import convert_checkpoint, load_any, load_model
from segmenter.weights.read import CheckpointError
from segmenter.weights.recognise import architecture, check_plain
from segmenter.weights.settings import as_published
from tests.support.foreign import HF, jax_arrays, to_mmseg
from tests.support.tiny import tiny_config, tiny_model
from tests.test_positions import timm_state

OURS = tiny_model().state_dict()
ENCODER = {name: tensor for name, tensor in OURS.items() if name.startswith("encoder.")}
QKV = (("query", 64), ("key", 63), ("value", 64))
ATTENTION = "encoder.layer.0.attention.attention."


@pytest.mark.parametrize(
    "state, message",
    [
        (ENCODER | {"decoder.head.weight": torch.tensor(1.0)}, r"decoder\.head\.weight must have 2 dimensions"),
        (ENCODER | {"decoder.cls_emb": torch.zeros(3, 64)}, r"decoder\.cls_emb must have 3 dimensions and elements"),
        (OURS | {"encoder.blocks.0.mlp.fc1.bias": torch.tensor(1.0)}, r"mlp\.fc1\.bias must have 1 dimensions"),
        (OURS | {"encoder.pos_embed": torch.zeros(1, 17, 63)}, "position embedding must be"),
        (timm_state(4, 4) | {"foo.ls1.gamma": torch.zeros(64)}, r"parts that a Segmenter has not: encoder\.foo"),
        (timm_state(4, 4) | {"blocks.7.ls1.gamma": torch.zeros(64)}, "does not fit the model"),
        (timm_state(4, 4) | {"blocks.0.ls1.gamma": torch.zeros(63)}, "does not fit the model"),
        (timm_state(4, 4) | {"blocks.0.ls1.gamma": torch.tensor(1.0)}, r"ls1\.gamma must have 1 dimensions"),
        (timm_state(4, 4) | {"patch_embed.proj.weight": torch.tensor(1.0)}, r"proj\.weight must have 4 dimensions"),
        (timm_state(4, 4) | {"pos_embed": torch.tensor(1.0)}, r"pos_embed must have 3 dimensions"),
        (timm_state(4, 4) | {"index": torch.zeros(2, dtype=torch.int64)}, r"parts that a .* has not: encoder\.index"),
        (jax_arrays(**{"a/query/kernel": (3,)}), "a/query/kernel must have 3 dimensions"),
        (jax_arrays(**{"embedding/kernel": (3,)}), "embedding/kernel must have 4 dimensions"),
        (HF | {ATTENTION + "query.weight": torch.zeros(64, 64), ATTENTION + "key.weight": torch.zeros(64, 63)}, "lack"),
        (
            HF | {f"{ATTENTION}{part}.weight": torch.zeros(64, width) for part, width in QKV},
            "do not fit together",
        ),
        (to_mmseg(OURS, 5) | {"decode_head.conv_seg.weight": torch.tensor(1.0)}, r"conv_seg\.weight must have 4 dim"),
        (to_mmseg(OURS, 5) | {"decode_head.patch_proj.weight": torch.zeros(3)}, r"patch_proj\.weight must have 2 dim"),
    ],
)  # fmt: skip
def test_weights_of_other_dimensions(tmp_path, state, message):
    torch.save(state, tmp_path / "odd.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no variant.yml
        with pytest.raises(CheckpointError, match=rf"odd\.pth.*({message})") as caught:
            load_any(tmp_path / "odd.pth", n_cls=None if "decode" in str(list(state)) else 4)
    assert "of a form that no model here has" not in str(caught.value)  # by a check, not by the last resort


def test_what_no_check_foresaw(tmp_path, monkeypatch):
    torch.save(timm_state(4, 4), tmp_path / "odd.pth")
    for error in (IndexError("x"), RuntimeError("x"), OverflowError("x"), MemoryError(), AttributeError("x")):
        monkeypatch.setattr(
            "segmenter.weights.load.convert", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
        )
        with pytest.raises(CheckpointError, match=r"odd\.pth: weights of a form that no model here has \("):
            load_any(tmp_path / "odd.pth", n_cls=4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.zeros(3, device="meta"), "is on the meta device"),
        (lambda: torch.eye(3).to_sparse(), "is no plain tensor"),
        (lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]), "is no plain tensor"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "is no plain tensor"),
        (lambda: [1.0], "is a list, no tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_in_a_state_dict(make, message):
    with pytest.raises(CheckpointError, match=f"norm.bias {message}"):
        convert(timm_state(4, 4) | {"norm.bias": make()}, n_cls=3)
    check_plain({"a": torch.zeros(3, dtype=torch.bfloat16)})


def test_blocks_of_thousands_of_digits_and_empty_tensors():
    assert architecture(OURS | {f"encoder.blocks.{'9' * 5000}.x": torch.zeros(1)})["n_layers"] == 2
    empty = {"patch_embed.proj.weight": torch.empty(10**12, 0, 1, 1)}
    with pytest.raises(CheckpointError, match=r"proj\.weight must have 4 dimensions and elements, found \(10{12}, 0"):
        convert(timm_state(4, 4) | empty, n_cls=3)


def test_a_small_file_that_claims_a_giant_allocates_nothing(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    wide = {"patch_embed.proj.weight": torch.zeros(8192, 3, 1, 1), "pos_embed": torch.zeros(1, 5, 8192)}
    wide |= {"cls_token": torch.zeros(1, 1, 8192), "blocks.0.mlp.fc1.bias": torch.zeros(4 * 8192)}
    save_file(wide, tmp_path / "wide.safetensors")  # 0.4 MB; one block of it has 3 GB, the decoder 6

    def made(*arguments):
        assert torch.empty(0).is_meta, "memory for a model whose weights were not compared yet"
        return create_segmenter(*arguments)

    monkeypatch.setattr("segmenter.weights.build.create_segmenter", made)
    with pytest.raises(CheckpointError, match=r"wide\.safetensors does not fit the model"):
        load_any(tmp_path / "wide.safetensors", n_cls=4)


def test_thousands_of_layers_in_the_settings_make_none(tmp_path, monkeypatch):
    model = tiny_model()
    settings = as_published(model)
    settings["net_kwargs"]["decoder"]["n_layers"] = 1024
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    (tmp_path / "variant.yml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("segmenter.weights.build.create_segmenter", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(CheckpointError, match="of 1 layers in the file, .* of 1024 layers asked for"):
        load_model(tmp_path)


def test_widths_whose_heads_no_shape_tells(monkeypatch):
    model = tiny_model(d_model=1280, n_heads=16, n_layers=1, decoder={"name": "linear"})
    state = {k.removeprefix("encoder."): v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    with pytest.raises(CheckpointError, match="width 1280 may have 20 heads of 64 or, .*, 16 of 80; give n_heads"):
        convert(state, n_cls=3, decoder="linear")
    assert convert(state, n_cls=3, decoder="linear", n_heads=16).config.n_heads == 16


# -- weights kept twice, notes, names -------------------------------------------------------------------------------


def test_which_of_two_sets_of_weights(tmp_path):
    plain, averaged = tiny_model(0), tiny_model(1)
    both = {"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict(), "epoch": 9}
    torch.save(both, tmp_path / "last.pth")
    with pytest.warns(UserWarning, match=r"last\.pth: averaged weights taken .*averaged=False takes"):
        taken = load_any(tmp_path / "last.pth")
    assert torch.equal(taken.state_dict()["encoder.pos_embed"], averaged.encoder.pos_embed)
    for asked, model in ((True, averaged), (False, plain)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = load_any(tmp_path / "last.pth", averaged=asked)
            report = convert_checkpoint(tmp_path / "last.pth", tmp_path / f"out{asked}", averaged=asked)
        assert not any("averaged" in str(warning.message) for warning in caught)
        assert torch.equal(found.state_dict()["encoder.pos_embed"], model.encoder.pos_embed)
        assert f"{'averaged' if asked else 'plain'} weights taken" in str(report)
    with pytest.raises(CheckpointError, match="one set of weights, none averaged"):
        load_model(tmp_path / "outTrue", averaged=True)
    with pytest.raises(CheckpointError, match="one set of weights, none averaged"):
        load_any("Seg-T/16", averaged=True)


def test_reports_and_sources_are_printable(tmp_path):
    directory = tmp_path / "a\x1b[31m"
    directory.mkdir()
    torch.save(timm_state(4, 4), directory / "vit.pth")
    report = convert_checkpoint(directory / "vit.pth", tmp_path / "out", n_cls=3)
    assert "\x1b" not in str(report) and "\\x1b[31m" in str(report)
    assert load_any(tmp_path / "out").info.source == "a\\x1b[31m/vit.pth (timm)"


def test_the_tiny_model_is_what_these_tests_think():
    assert tiny_config().image_size == (64, 64) and math.prod(OURS["encoder.pos_embed"].shape) == 17 * 64
