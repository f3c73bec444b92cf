"""Whose weights are, by their names; which architecture, by their shapes; and that this is found out once."""

import sys
from collections import Counter

import pytest
import torch
import torch.nn as nn
import yaml

from segmenter.weights import convert as converting
from segmenter.weights import recognise as recognising
from segmenter.weights.convert import convert
from segmenter.weights.load import convert_checkpoint, load_any, load_model, save_pretrained
from segmenter.weights.read import CheckpointError
from segmenter.weights.recognise import architecture, kind_of, recognise
from segmenter.weights.settings import as_published
from tests.support.foreign import jax_arrays, to_mmseg
from tests.support.tiny import tiny_model


def test_recognise():
    state = tiny_model().state_dict()
    assert kind_of(state) == recognise(state) == "segmenter"
    assert kind_of(to_mmseg(state, 5)) == "mmseg"
    assert kind_of(jax_arrays()) == kind_of(jax_arrays("opt/target/")) == "npz"
    assert kind_of([name.removeprefix("encoder.") for name in state]) == "timm"
    assert kind_of(["vit.embeddings.patch_embeddings.projection.weight"]) == "hf"
    assert kind_of(["conv1.weight", "fc.weight"]) is None
    with pytest.raises(CheckpointError, match=r"no known kind \(choose one of segmenter, mmseg.*conv1\.weight"):
        convert({"conv1.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="kind 'keras' is unknown"):
        convert(state, kind="keras")


def test_weights_with_parts_missing():
    state = tiny_model().state_dict()
    for name in ("encoder.pos_embed", "encoder.patch_embed.proj.weight"):
        with pytest.raises(CheckpointError, match=f"lack {name}"):
            architecture({k: v for k, v in state.items() if k != name})
    theirs = {k: v for k, v in to_mmseg(state, 5).items() if "patch_proj" not in k}
    with pytest.raises(CheckpointError, match=r"mmseg weights lack decode_head\.patch_proj\.weight"):
        convert(theirs)
    jax = {k: v for k, v in jax_arrays().items() if "encoderblock_1/MultiHeadDotProductAttention_1/key" not in k}
    with pytest.raises(CheckpointError, match=r"npz weights lack encoder\.blocks\.1\.attn\.k\."):
        convert(jax, n_cls=3)
    with pytest.raises(CheckpointError, match="patch embedding must be"):
        architecture(state | {"encoder.patch_embed.proj.weight": torch.ones(64, 3, 16, 8)})
    with pytest.raises(CheckpointError, match="position embedding must be"):
        architecture(state | {"encoder.pos_embed": torch.ones(5, 64)})


# -- once -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often each step of recognising ran, whichever module called it."""
    counts = Counter()
    for home, name in (
        (recognising, "kind_of"),
        (recognising, "feature"),
        (recognising, "architecture"),
        (converting, "to_ours"),
        (converting, "compare"),
    ):
        original = getattr(home, name)

        def counted(*args, original=original, name=name, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        for module in [m for key, m in sys.modules.items() if key.startswith("segmenter.")]:
            if vars(module).get(name) is original:
                monkeypatch.setattr(module, name, counted)
    return counts


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same weights in every form."""
    root, model = tmp_path_factory.mktemp("sources"), tiny_model()
    encoder = {k.removeprefix("encoder."): v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    states = {"published": model.state_dict(), "lost": model.state_dict(), "timm": encoder}
    states |= {"unfit": model.state_dict(), "mmseg": to_mmseg(model.state_dict(), 5), "unknown": {"a.b": torch.ones(1)}}
    for name, state in states.items():
        (root / name).mkdir()
        torch.save(state, root / name / "checkpoint.pth")
    settings = as_published(model)
    (root / "published" / "variant.yml").write_text(yaml.safe_dump(settings))
    settings["net_kwargs"]["n_cls"] = 7
    (root / "unfit" / "variant.yml").write_text(yaml.safe_dump(settings))
    save_pretrained(model, root / "ours")
    return root


ONCE = {"kind_of": 1, "feature": 1, "architecture": 1, "to_ours": 1}


@pytest.mark.parametrize(
    "name, request_, counts",
    [
        ("published", {}, {"kind_of": 1}),
        ("ours", {}, {}),
        ("lost", {}, ONCE),
        ("mmseg", {}, ONCE),
        ("timm", {"n_cls": 3}, ONCE),
        ("timm", {"n_cls": 3, "kind": "timm"}, {**ONCE, "kind_of": 0}),
        ("unfit", {}, {"kind_of": 1, "architecture": 1}),  # for the message
        ("unknown", {}, {"kind_of": 1, "feature": 1}),
        ("timm", {}, ONCE),  # a decoder is missing
    ],
)
@pytest.mark.filterwarnings("ignore:.*no variant.yml")
def test_a_file_is_recognised_once(sources, tmp_path, calls, name, request_, counts):
    loads = [
        lambda: load_any(sources / name, **request_),
        lambda: convert_checkpoint(sources / name, tmp_path, **request_),
    ]
    for load in loads if request_ else [*loads, lambda: load_model(sources / name)]:
        calls.clear()
        try:
            load()
        except CheckpointError:
            assert name in ("unfit", "unknown", "timm") and "n_cls" not in request_
        assert calls == Counter(counts)


def test_a_live_model_is_recognised_and_run_once(calls):
    timm = pytest.importorskip("timm.models.vision_transformer", reason="needs timm", exc_type=Exception)
    vit = timm.VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    load_any(nn.DataParallel(vit), n_cls=3)
    assert calls == {**ONCE, "compare": 1}
