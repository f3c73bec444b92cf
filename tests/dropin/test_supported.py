"""Every kind of model that the docs say `accelerate` supports, end to end and block by block against its library."""

import copy
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from segmenter.dropin.accelerate import accelerate, restore, why_not
from tests.support.blocks import DEVICE, HALVES, MLP, TIGHT
from tests.support.spies import kernels_run
from tests.support.supported import CORE, SUPPORTED, table

DOCS = Path(__file__).parents[2] / "docs" / "accelerate.md"


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


def output(model, im):
    torch.manual_seed(0)  # ViT-MAE shuffles its patches
    with torch.no_grad():
        out = model(im)
    return out if isinstance(out, torch.Tensor) else out[0]


def blocks_of(report, model):
    """Name -> block, of those that are swapped as such."""
    modules = dict(model.named_modules())
    return {row.name: modules[row.name] for row in report.swapped if row.became != CORE}


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: f"{kind.library}: {kind.name}")
def test_models_equal_their_library(kind, kernels):
    """Every part that is named runs on the kernels, and `restore` gives back what was there to the last bit."""
    pytest.importorskip(kind.library)
    model, im = kind.build()
    model, im = model.to(DEVICE), im.to(DEVICE)
    twin, seen = copy.deepcopy(model), {}
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    want = output(model, im)
    report = accelerate(model, example=im if kind.example else None)
    blocks = blocks_of(report, model)
    assert [row.became for row in report.swapped if row.name in blocks] == 2 * [kind.became]
    got = output(model, im)
    assert kernels == 2 * ([*HALVES[kind.half]] * ("attention" in kind.became) + MLP * ("MLP" in kind.became))
    torch.testing.assert_close(got, want, **TIGHT)
    assert want.abs().max() > 0.5
    for name in blocks:

        def note(layer, args, kwargs, out, name=name):
            seen[name] = args, kwargs, out

        twin.get_submodule(name).register_forward_hook(note, with_kwargs=True)
    output(twin, im)
    with torch.no_grad():
        for name, layer in blocks.items():
            args, kwargs, out = seen[name]
            torch.testing.assert_close(layer(*args, **kwargs), out, **TIGHT)
            assert (out - args[0]).abs().max() > 0.1
    assert why_not(model) == {}
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    assert restore(model) == len(report.swapped)
    assert [type(m) for m in model.modules()] == classes
    assert [inspect.signature(m.forward) for m in model.modules()] == signatures
    kernels.clear()
    assert torch.equal(output(model, im), want)
    assert kernels == []


def test_the_docs_have_the_table():
    assert table() in DOCS.read_text(encoding="utf-8"), "python -m tests.support.supported prints the one to paste"
