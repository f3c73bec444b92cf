"""What training tools wrap around weights: prefixes of names, dictionaries, averages beside the plain weights."""

import itertools

import pytest
import torch
import torch.nn as nn

from segmenter.weights.load import load_any
from segmenter.weights.read import CheckpointError, read_weights
from tests.support.tiny import tiny_model


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("encoder.cls_token", "encoder.blocks.0.norm1.weight", "encoder.blocks.1.norm1.weight", "decoder.cls_emb")
    return {name: torch.randn(3, 2, generator=generator) for name in names}


PLAIN, AVERAGED = weights(0), weights(1)
TWICE = {  # (key of the plain weights, of the averaged ones, what else there is)
    "timm": ("state_dict", "state_dict_ema", {}),
    "deit": ("model", "model_ema", {}),
    "ema": ("model", "ema", {}),
    "ema_state_dict": ("model_state_dict", "ema_state_dict", {}),
    "module": ("module", "ema_model", {}),
    "basicsr": ("params", "params_ema", {}),
    "mmengine": ("ema_state_dict", "state_dict", {"message_hub": {}}),  # it swaps them
    "Lightning": ("current_model_state", "state_dict", {"averaging_state": {"n_averaged": torch.tensor(3)}}),
}


def same(state, expected):
    return list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in expected)


def prefixed(prefix, state=PLAIN):
    return {prefix + name: tensor for name, tensor in state.items()}


def read(tmp_path, content, **options):
    torch.save(content, tmp_path / "a.pth")
    return read_weights(tmp_path / "a.pth", **options)


def refusal(tmp_path, content, **options):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, content, **options)
    return str(caught.value)


# -- prefixes -------------------------------------------------------------------------------------------------------

PARTS = ("module.", "_orig_mod.", "model.", "net.")


@pytest.mark.parametrize(
    "prefix",
    [
        *PARTS,
        *("".join(pair) for pair in itertools.permutations(PARTS, 2)),
        "_orig_mod.module.model.",
        "model._orig_mod.module.",
        "module.module.",
        "network.",
        "segmentor.",
        "_forward_module.module.model.",
        "_fsdp_wrapped_module._orig_mod.",
    ],
)
def test_prefixes_of_any_order_and_depth(tmp_path, prefix):
    found = read(tmp_path, {"state_dict": prefixed(prefix), "epoch": 1})
    assert same(found.state, PLAIN) and found.extra == {"epoch": 1}
    assert found.notes == [f"prefix {prefix} removed from the names"]


def test_plain_names_stay_and_nothing_is_said(tmp_path):
    for state in (PLAIN, prefixed("backbone."), prefixed("vit."), {"module.a": torch.ones(1), "b": torch.ones(1)}):
        found = read(tmp_path, state)
        assert same(found.state, state) and found.notes == []


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_alone_keeps_its_name(tmp_path, part):
    state = {name: tensor for name, tensor in PLAIN.items() if name.startswith(part)}
    found = read(tmp_path, prefixed("module.model.", state))
    assert same(found.state, state)


@pytest.mark.parametrize(
    "wrapped, removed",
    [
        ({"encoder.": "encoder._orig_mod."}, "_orig_mod"),
        ({"encoder.": "encoder.module."}, "module"),
        ({"encoder.": "encoder.module._orig_mod.", "decoder.": "decoder._orig_mod."}, "_orig_mod, module"),
        ({"blocks.0.": "blocks.0._orig_mod."}, "_orig_mod"),
        ({"blocks.0.": "blocks.0._checkpoint_wrapped_module."}, "_checkpoint_wrapped_module"),
        ({"blocks.": "blocks.module."}, "module"),
    ],
)
@pytest.mark.parametrize("outer", ["", "model."])
def test_wrapped_parts(tmp_path, wrapped, removed, outer):
    def rename(name):
        for old, new in wrapped.items():
            name = name.replace(old, new)
        return outer + name

    found = read(tmp_path, {rename(name): tensor for name, tensor in PLAIN.items()})
    assert same(found.state, PLAIN)
    assert f"removed inside names: {removed}" in found.notes


def test_a_module_among_others_is_no_wrapper(tmp_path):
    state = {"encoder.module.weight": torch.ones(1), "encoder.bias": torch.ones(1)}
    assert same(read(tmp_path, state).state, state)
    state = {"encoder._orig_mod.weight": torch.ones(1), "encoder.weight": torch.zeros(1)}  # they would become one
    assert same(read(tmp_path, state).state, state)


def test_what_wrappers_add_is_left_out_and_said(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    average = torch.optim.swa_utils.AveragedModel(model)
    found = read(tmp_path, average.state_dict())
    assert same(found.state, model.state_dict())
    assert found.notes == ["prefix module. removed from the names", "left out, they belong to the training: n_averaged"]
    steps = {**prefixed("model.module."), "model.steps": torch.tensor(5), "criterion.weight": torch.ones(3)}
    found = read(tmp_path, steps)
    assert same(found.state, PLAIN) and "criterion.weight" in found.notes[1] and "steps" in found.notes[2]
    assert "steps" in read(tmp_path, {**PLAIN, "steps": torch.tensor(5)}).state  # beside names without a wrapper


def test_a_compiled_and_averaged_model_loads(tmp_path):
    model = tiny_model()
    for prefix in ("_orig_mod.module.", "module._orig_mod.", "model.net."):
        torch.save({"model": prefixed(prefix, model.state_dict())}, tmp_path / "a.pth")
        with pytest.warns(UserWarning, match="no variant.yml"):
            loaded = load_any(tmp_path / "a.pth")
        assert same(loaded.state_dict(), model.state_dict())


# -- plain and averaged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", TWICE)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_averaged_weights_beside_plain_ones(tmp_path, tool, prefix):
    plain, averaged, others = TWICE[tool]
    content = {plain: PLAIN, averaged: prefixed(prefix, AVERAGED), "epoch": 2, **others}
    found = read(tmp_path, content)
    assert same(found.state, AVERAGED)
    note = f"averaged weights taken ({averaged}), averaged=False takes the plain ones ({plain})"
    assert note in found.notes and found.extra["epoch"] == 2
    assert same(read(tmp_path, content, averaged=True).state, AVERAGED)
    found = read(tmp_path, content, averaged=False)
    assert same(found.state, PLAIN)
    assert f"plain weights taken ({plain}), averaged=True takes the averaged ones ({averaged})" in found.notes


def test_a_training_of_this_project_is_read_as_it_is_trained(tmp_path):
    content = {"model": PLAIN, "average": {**prefixed("module.", AVERAGED), "n_averaged": torch.tensor(3)}}
    found = read(tmp_path, content)
    assert same(found.state, PLAIN)
    assert found.notes == ["plain weights taken (model), averaged=True takes the averaged ones (average)"]
    assert same(read(tmp_path, content, averaged=True).state, AVERAGED)
    assert read(tmp_path, {**content, "average": None}).notes == []


@pytest.mark.parametrize("names", [("model.", "ema."), ("net.", "net_ema.module."), ("model.", "model_ema.module.")])
def test_both_in_one_dictionary_of_names(tmp_path, names):
    content = {"state_dict": {**prefixed(names[0]), **prefixed(names[1], AVERAGED)}, "epoch": 1}
    if "module" in names[1]:
        content["state_dict"][names[1].replace("module.", "n_averaged")] = torch.tensor(3)
    assert same(read(tmp_path, content).state, AVERAGED)
    found = read(tmp_path, content, averaged=False)
    assert same(found.state, PLAIN) and "plain weights taken" in found.notes[0]


def test_mmcv_keeps_the_plain_ones_under_flat_names(tmp_path):
    flat = {f"ema_{name.replace('.', '_')}": tensor for name, tensor in PLAIN.items()}
    content = {"state_dict": {**AVERAGED, **flat}, "meta": {}}
    assert same(read(tmp_path, content).state, AVERAGED)
    assert same(read(tmp_path, content, averaged=False).state, PLAIN)


def test_asking_for_what_is_not_there(tmp_path):
    message = refusal(tmp_path, {"model": PLAIN, "epoch": 1}, averaged=True)
    assert "holds no averaged weights; its keys are: model, epoch" in message
    assert "holds no averaged weights" in refusal(tmp_path, PLAIN, averaged=True)
    assert "holds no plain weights; its keys are: model_ema" in refusal(tmp_path, {"model_ema": PLAIN}, averaged=False)
    found = read(tmp_path, {"model_ema": AVERAGED}, averaged=True)
    assert same(found.state, AVERAGED) and found.notes == ["averaged weights taken (model_ema), the file has no others"]
    assert same(read(tmp_path, {"model": PLAIN, "ema": {"decay": 0.9, "shadow": [1]}}).state, PLAIN)


@pytest.mark.parametrize("prefix", ["model.", "", "student.module.", "pl_module._model."])
@pytest.mark.parametrize("beside", ["criterion.weight", "val_metrics.f1.tp", "miou.confmat", "train_acc.total"])
def test_losses_and_metrics_of_a_lightning_module_are_left_out(tmp_path, prefix, beside):
    names = ["encoder.norm.weight", "decoder.head.weight"]
    torch.save(
        {"state_dict": {**{prefix + n: torch.ones(1) for n in names}, beside: torch.ones(3)}}, tmp_path / "a.pth"
    )
    found = read_weights(tmp_path / "a.pth")
    assert list(found.state) == names
    assert f"left out, they belong to the training: {beside}" in found.notes


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("trusted", [False, True])
def test_arrays_of_numpy_are_named_as_such(tmp_path, protocol, trusted):
    torch.save({"encoder.a": torch.ones(2).numpy()}, tmp_path / "a.pth", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="holds arrays of numpy, no tensors: encoder.a; save them as .npz"):
        read_weights(tmp_path / "a.pth", allow_pickle=trusted)


@pytest.mark.parametrize("key", ["weights", "model_weights", "net_state_dict"])
def test_other_keys_of_weights(tmp_path, key):
    found = read(tmp_path, {key: prefixed("module."), "epoch": 1})
    assert same(found.state, PLAIN) and found.extra == {"epoch": 1}
