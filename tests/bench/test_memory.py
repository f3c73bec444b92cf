"""`python -m bench.memory`: what is kept against what PyTorch saves, and whole steps against what is allocated."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton")

from bench import memory, models, operations, shapes
from bench.memory import WAYS, Way
from bench.shapes import Shape
from segmenter.kernels import launch
from segmenter.ops import EAGER, load_kernels
from segmenter.training.losses import SegmentationLoss
from tests.support.kept import kept
from tests.support.pages import ROOT

CPU = torch.device("cpu")
SHAPES = [Shape("X", 8, 56, 2, n_cls=20), Shape("X", 16, 96, 1, n_cls=7)]
MASK = 2  # bytes an element of what dropout keeps on a CPU: a number of the type, not a bit


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Host code allocates, kernels do not run: nothing is interpreted, and no interpreter's copies are counted."""
    monkeypatch.setattr(launch.Plan, "run", lambda self, *tensors: None)


def training(shape, way, dropout=False):
    """(model, a function from nothing to the loss of a batch) under autocast to bfloat16.

    dropout: of the decoder, but for attention's, with which PyTorch on a CPU would keep all probabilities.
    """
    model = models.build.__wrapped__(shape, CPU).train()
    models.set_operators(model, EAGER if way.level is None else load_kernels())
    model.recompute(1 if way.level is None else way.level)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1 * (dropout and name.startswith("decoder") and not name.endswith("attn_drop"))
    images = torch.randn(shape.batch, 3, shape.size, shape.size)
    labels = torch.randint(0, shape.n_cls, (shape.batch, shape.size, shape.size))
    impl = "eager" if way.level is None else "triton"
    loss = SegmentationLoss(255, patch_size=shape.patch, impl=impl)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            masks = model.masks(images)
            if way.logits:
                return operations.segmentation_loss(masks, labels, shape.patch)
        return loss(masks, labels, float(labels.numel()))

    return model, forward


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
def test_what_is_kept_to_the_byte(shape, way):
    model, forward = training(shape, way)
    assert kept(model, forward)[0] == memory.kept(shape, way, dropout=False)


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.name)
def test_what_is_kept_with_dropout(way):
    """To the byte but for the log-sum-exp, which is attention's own here and PyTorch's when attention drops out."""
    shape = SHAPES[0]
    found = kept(*training(shape, way, dropout=True))[0]
    of_operator = shapes.DECODER_LAYERS * 4 * shape.batch * (128 - shape.patches - shape.n_cls)
    more = of_operator if way.level in (0, 1, 2) else 0
    assert found == memory.kept(shape, way, mask=MASK) + more


def allocated(run):
    """The most bytes that tensors held while `run` ran, of what it allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("sizes", [(256, 4, 64, 2), (128, 2, 160, 4)], ids=["weights", "activations"])
def test_a_step_needs_what_is_said(monkeypatch, sizes, way):
    width, layers, size, batch = sizes
    monkeypatch.setitem(shapes.WIDTHS, "X", (width, layers))
    shape = Shape("X", 8, size, batch, n_cls=20)
    model, forward = training(shape, way)
    there = 8 * shapes.parameters(shape) + 4 * memory.HEAD * (width + 1) + 20 * batch * size**2

    def step():
        forward().backward()

    step()  # what is made once
    model.zero_grad(set_to_none=True)
    found = there + allocated(step)
    assert found == pytest.approx(memory.step(shape, way, dropout=False), rel=0.10)


def test_weights_gradients_momenta_and_images_are_counted():
    """Without images nothing but weights is left."""
    none, way = Shape("S", 16, 512, 0), WAYS[-1]
    assert memory.step(none, way) == 12 * shapes.parameters(none) + 4 * 1000 * 385
    one = none._replace(batch=1)
    gradients = 4 * shapes.parameters(none)
    assert memory.step(one, way) > memory.step(none, way) - gradients + 20 * 512**2 + memory.kept(one, way)


def test_more_levels_fit_more_and_all_fit_more_than_logits():
    for of in ("batch", "side"):
        found = [memory.row("B", 16, way, of, 150) for way in WAYS]
        for less, more in zip(found, found[1:], strict=False):
            assert all(a < b for a, b in zip(less, more, strict=True))
        assert all(a < b < c for a, b, c in found)


def test_the_largest_that_fits():
    assert memory.largest(lambda n: n <= 100) == 100 and memory.largest(lambda n: n <= 100, 16) == 96
    assert memory.largest(lambda n: False) == 0 and memory.largest(lambda n: True, 32) == memory.MOST
    shape, way = Shape("L", 16, 512, 1), Way("", 1)
    (_, batch, _), limit = memory.row("L", 16, way, "batch", 150), 0.93 * 80 * 2**30
    needs = [memory.step(shape._replace(batch=n), way) for n in (batch, batch + 1)]
    assert needs[0] <= limit < needs[1]


def test_the_page_has_the_tables(capsys):
    page = (ROOT / "docs" / "train.md").read_text()
    assert memory.main([]) == 0
    printed = [block for block in capsys.readouterr().out.split("\n\n") if block.startswith("|")]
    assert len(printed) == 2 and all(table.strip() in page for table in printed)
