"""Weights stored as int8 with a scale for each row: what is read is what was stored, and damage is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from segmenter.cli import main
from segmenter.weights.int8 import SCALE, STEPS, quantised, restored
from segmenter.weights.load import convert_checkpoint, from_pretrained, load_any, load_model, save_pretrained
from segmenter.weights.pretrained import CONFIG, WEIGHTS
from segmenter.weights.read import CheckpointError
from tests.support.tiny import tiny_model

QKV = "encoder.blocks.0.attn.qkv.weight"
PATCHES = "encoder.patch_embed.proj.weight"


@pytest.fixture
def stored(tmp_path):
    """The folder of a model as int8. Its rows differ in size, as the rows of trained models do."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                sizes = torch.logspace(-4, 1, parameter.shape[0])
                parameter *= sizes.view(-1, *[1] * (parameter.ndim - 1))
    save_pretrained(model, tmp_path / "model", dtype=torch.int8)
    return tmp_path / "model", model.state_dict()


def by_hand(tensors, name):
    """scale * q in float64, where nothing is rounded."""
    scale = tensors[name + SCALE].double()
    return tensors[name].double() * scale.view(-1, *[1] * (tensors[name].ndim - 1))


def test_what_is_loaded_is_scale_times_integer_exactly_under_the_same_names(stored):
    folder, before = stored
    tensors, found = load_file(folder / WEIGHTS), from_pretrained(folder).state_dict()
    assert list(found) == list(before)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        kept = by_hand(tensors, name) if tensors[name].dtype == torch.int8 else tensors[name].double()
        assert torch.equal(tensor.double(), kept), name


def test_matrices_are_int8_and_all_else_is_float16(stored):
    folder, before = stored
    tensors = load_file(folder / WEIGHTS)
    matrices = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    outputs = {name: before[name].shape[0] for name in matrices}
    assert matrices == {name for name in before if name.endswith("weight") and before[name].ndim > 1} | {
        "decoder.proj_patch",
        "decoder.proj_classes",
    }
    assert {name: tuple(tensors[name + SCALE].shape) for name in matrices} == {n: (k,) for n, k in outputs.items()}
    rest = {name: tensor.dtype for name, tensor in tensors.items() if name.removesuffix(SCALE) not in matrices}
    assert set(rest.values()) == {torch.float16} and {"encoder.pos_embed", "encoder.norm.weight"} <= set(rest)


def test_each_row_is_within_half_a_step_of_its_own_scale(stored):
    """Rows are outputs: their sizes differ by a hundred thousand here, so scales along anything else would show."""
    folder, before = stored
    found = from_pretrained(folder).state_dict()
    for name in (QKV, PATCHES, "decoder.proj_dec.weight"):
        rows, error = before[name].flatten(1), (found[name] - before[name]).flatten(1)
        step = rows.abs().amax(1, keepdim=True) / STEPS * (1 + 2**-8)  # bfloat16 rounds it
        assert (error.abs() <= 0.5 * step * (1 + 1e-5)).all(), name


def test_a_stored_model_that_was_read_is_stored_as_the_same_bytes(stored, tmp_path):
    folder, _ = stored
    save_pretrained(from_pretrained(folder), tmp_path / "again", dtype=torch.int8)
    assert main(["convert", str(folder), str(tmp_path / "converted"), "--int8"]) == 0
    for name in (WEIGHTS, CONFIG):
        for again in ("again", "converted"):
            assert (tmp_path / again / name).read_bytes() == (folder / name).read_bytes(), (again, name)


def test_weights_that_are_kept_are_float16(stored, tmp_path, capsys):
    folder, _ = stored
    kept = ["encoder.blocks.0.mlp.fc1.weight", PATCHES]
    before = from_pretrained(folder)
    save_pretrained(before, tmp_path / "saved", dtype=torch.int8, keep=kept)
    assert main(["convert", str(folder), str(tmp_path / "converted"), "--int8", "--keep", *kept]) == 0
    whole, found = load_file(folder / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert set(whole) - set(found) == {name + SCALE for name in kept}
    assert {name: found[name].dtype for name in kept} == dict.fromkeys(kept, torch.float16)
    assert found[QKV].dtype == torch.int8
    assert (tmp_path / "converted" / WEIGHTS).read_bytes() == (tmp_path / "saved" / WEIGHTS).read_bytes()
    for name, tensor in from_pretrained(tmp_path / "saved").state_dict().items():
        expected = before.state_dict()[name]
        assert torch.equal(tensor, expected.half().float() if name in kept else expected), name
    with pytest.raises(CheckpointError, match="weights to keep: the model has none called fc1"):
        save_pretrained(before, tmp_path / "none", dtype=torch.int8, keep=["fc1"])
    with pytest.raises(ValueError, match=r"keep is for dtype torch\.int8, not None"):
        save_pretrained(before, tmp_path / "none", keep=kept)
    capsys.readouterr()
    assert main(["convert", str(folder), str(tmp_path / "none"), "--keep", QKV]) == 2
    assert "give --int8, too" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "none"), "--int8", "--half"]) == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 3e-5, 1.0, 3e38])
def test_rows_of_every_size_come_back_bit_for_bit(size):
    """Random rows, one whose ends are its largest, one of zeros, and odd numbers of rows and columns."""
    rows = torch.empty(997, 13).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)) * size
    rows[0], rows[1] = size, 0
    once = quantised("x", rows)
    twice = quantised("x", restored(once)["x"])
    assert once["x"].abs().max() == (STEPS if size > 1e-36 else 0)
    assert all(torch.equal(once[name], twice[name]) for name in ("x", "x" + SCALE))
    assert not restored(once)["x"][1].any()
    assert torch.equal(quantised("x", -rows)["x"], -once["x"]), "symmetric"


def test_every_way_to_load_reads_it(stored, tmp_path):
    folder, _ = stored
    expected = from_pretrained(folder).state_dict()
    convert_checkpoint(folder, tmp_path / "half", dtype=torch.bfloat16)  # exact: int8 times bfloat16 is not, so close
    for model in (load_model(folder)[0], load_any(folder / WEIGHTS), load_any(str(folder), device="cpu")):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    other = load_any(folder, patch_size=8, image_size=64)
    assert other.config.patch_size == 8 and torch.equal(other.state_dict()[QKV], expected[QKV])
    for name, tensor in from_pretrained(tmp_path / "half").state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16().float())
    assert main(["info", "--model", str(folder)]) == 0


def test_older_versions_are_told_by_the_schema_and_read_everything_else(tmp_path):
    for dtype, schema in ((torch.int8, 2), (torch.float16, 1), (None, 1)):
        save_pretrained(tiny_model(), tmp_path / str(dtype), dtype=dtype)
        content = json.loads((tmp_path / str(dtype) / CONFIG).read_text())
        assert (content["schema"], content.get("storage")) == (schema, "int8" if schema == 2 else None)


def test_a_quarter_of_the_bytes(tmp_path):
    save_pretrained(tiny_model(d_model=256, n_heads=4), tmp_path / "full")
    save_pretrained(tiny_model(d_model=256, n_heads=4), tmp_path / "int8", dtype=torch.int8)
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("int8", "full")]
    assert sizes[0] < 0.26 * sizes[1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (QKV + SCALE, None, f"{QKV} is int8, but its scales, {QKV}.scale, are missing"),
        (QKV, None, f"{QKV}.scale is a scale of no int8 weights"),
        (QKV + SCALE, torch.ones(191).bfloat16(), r"must be \(192,\) torch.bfloat16, one a row, found \(191,\)"),
        (QKV + SCALE, torch.ones(192, 1).bfloat16(), r"found \(192, 1\) torch.bfloat16"),
        (QKV + SCALE, torch.ones(192), r"must be \(192,\) torch.bfloat16, one a row, found \(192,\) torch.float32"),
        (QKV + SCALE, -torch.ones(192).bfloat16(), "scales that are negative, infinite or no number"),
        (QKV + SCALE, torch.full((192,), torch.nan).bfloat16(), "scales that are negative, infinite or no number"),
        (QKV, torch.ones(192, 64, dtype=torch.int16), f"{QKV}.scale is a scale of no int8 weights"),
        (QKV, torch.ones(192, 63, dtype=torch.int8), r"expected \(192, 64\), found \(192, 63\)"),
        ("encoder.norm.bias", torch.tensor(1, dtype=torch.int8), "encoder.norm.bias is int8, but its scales"),
    ],
)
def test_damage_is_named_with_its_file(stored, name, value, message):
    folder, _ = stored
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors | ({} if value is None else {name: value}), folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"(?s)model.safetensors.*{message}"):
        from_pretrained(folder, verify=False, allow_nonfinite=True)


def test_an_unknown_storage_is_refused(stored):
    folder, _ = stored
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | {"storage": "int4"}))
    with pytest.raises(CheckpointError, match=r"config\.json: storage 'int4' is unknown; int8 is known"):
        from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*no variant.yml beside it")
def test_integers_without_their_config_are_not_taken_for_weights(stored, tmp_path):
    folder, _ = stored
    shutil.copy(folder / WEIGHTS, tmp_path / "alone.safetensors")
    message = "have scales of int8 storage \\(give its folder, config.json included\\)"
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "alone.safetensors", tmp_path / "converted")
    with pytest.raises(CheckpointError, match=message):
        tiny_model().encoder.load_pretrained(folder / WEIGHTS, prefix="encoder.")


def test_what_int8_cannot_hold(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.encoder.norm.bias[0] = 1e6
    with pytest.raises(CheckpointError, match=r"encoder\.norm\.bias overflows in torch\.float16"):
        save_pretrained(model, tmp_path / "model", dtype=torch.int8)
    with torch.no_grad():
        model.get_parameter(QKV)[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=f"{QKV} has NaN or infinite weights, which int8 cannot hold"):
        save_pretrained(model, tmp_path / "model", dtype=torch.int8)
    with pytest.raises(ValueError, match=r"a floating type or torch\.int8, not torch\.int32"):
        save_pretrained(model, tmp_path / "model", dtype=torch.int32)
    assert not (tmp_path / "model").exists()
