"""The sweep's formulas against counted calls: operations by torch's counter, bytes by the tensors in and out."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import encoders, gradients, maps, models, operations, shapes
from bench.providers import PUBLISHED, using
from bench.shapes import Shape, Work
from bench.timing import tensor_bytes

SMALL = [Shape("X", 8, 40, 2, n_cls=7), Shape("T", 16, 48, 1, n_cls=150), Shape("X", 32, 96, 3, n_cls=5, mask=False)]
CPU = torch.device("cpu")


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SMALL, ids=lambda s: s.id)
def test_forward_operations_and_parameters(shape):
    model = models.build(shape, CPU)
    im = torch.zeros(shape.batch, 3, shape.size, shape.size)
    with using(model, PUBLISHED), torch.inference_mode():
        assert counted(lambda: model.masks(im)) == shapes.forward_flops(shape) == shapes.model(shape, 4).flops
    read = {name: p for name, p in model.named_parameters() if not name.startswith("encoder.head.")}
    assert sum(p.numel() for p in read.values()) == shapes.parameters(shape)
    pixels = models.images(shape, CPU)
    labels = pixels.numel() // 3
    assert shapes.model(shape, 2).bytes == 2 * shapes.parameters(shape) + pixels.numel() + labels


@pytest.mark.parametrize("shape", SMALL[:2], ids=lambda s: s.id)
def test_training_operations(shape):
    step = models.TrainStep(models.build(shape, CPU), "eager", torch.float32)
    im = torch.zeros(shape.batch, 3, shape.size, shape.size)
    target = torch.zeros(shape.batch, shape.size, shape.size, dtype=torch.long)
    step.model.eval()  # dropout has its own products
    assert counted(lambda: step.backward(im, target)) == shapes.train_step(shape, 4).flops


OPERATIONS = [
    operations.ATTENTION,
    operations.LAYERNORM_MLP,
    operations.LAYERNORM_MLP_SCALED,
    operations.MASK_HEAD,
    operations.MASKS_TO_LABELS,
    maps.ROWS,
    maps.TRANSPOSED,
    encoders.ROTATE,
    encoders.QUERIES_TO_LABELS,
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.kind)
@pytest.mark.parametrize("shape", SMALL[:2], ids=lambda s: s.id)
def test_work_of_operations(operation, shape):
    inputs = operation.inputs(shape, torch.float32, CPU)
    fn = operation.call("eager", shape)
    with FlopCounterMode(display=False) as counter:
        out = fn(*inputs)
    assert operation.work(shape, 4) == Work(counter.get_total_flops(), tensor_bytes(inputs) + tensor_bytes(out))


@pytest.mark.parametrize("shape", SMALL[:2], ids=lambda s: s.id)
def test_work_of_statistics(shape):
    """Its sums are no matrix products, but eager has one for the centre."""
    inputs = maps.STATISTICS_OF_ROWS.inputs(shape, torch.float32, CPU)
    work, fn = maps.STATISTICS_OF_ROWS.work(shape, 4), maps.STATISTICS_OF_ROWS.call("eager", shape)
    centre = 2 * shape.batch * shape.n_heads * shape.tokens * shape.patches * 2
    assert counted(lambda: fn(*inputs)) == work.flops + centre
    assert work.bytes == tensor_bytes(inputs) + tensor_bytes(fn(*inputs))


@pytest.mark.parametrize("shape", SMALL[:2], ids=lambda s: s.id)
def test_work_of_gradients(shape):
    inputs = operations.LOSS.inputs(shape, torch.float32, CPU)
    gradient = operations.LOSS.call("eager", shape)(*inputs)
    assert operations.LOSS.work(shape, 4) == Work(0, tensor_bytes(inputs) + tensor_bytes(gradient))

    qkv, do = operations.ATTENTION_BACKWARD.inputs(shape, torch.float32, CPU)
    out = operations.ATTENTION.call("eager", shape)(qkv)
    dqkv = torch.autograd.grad(out, qkv, do)[0]
    lse = 4 * shape.batch * shape.n_heads * shape.tokens
    work = shapes.attention_backward(shape, 4)
    assert work.bytes == tensor_bytes((qkv.detach(), out.detach(), do, dqkv)) + lse
    products = counted(lambda: torch.autograd.grad(operations.ATTENTION.call("eager", shape)(qkv), qkv, do))
    forward = shapes.attention(shape, 4).flops
    # explicit attention keeps its scores: four products backward, where a fused backward makes five
    assert products == forward + work.flops * 4 // 5


OF_GRADIENTS = [value for value in vars(gradients).values() if isinstance(value, operations.Operation)]


@pytest.mark.parametrize("operation", OF_GRADIENTS, ids=lambda o: o.kind)
@pytest.mark.parametrize("shape", SMALL[:2], ids=lambda s: s.id)
def test_work_of_operations_with_their_gradients(operation, shape):
    """The arguments are read twice, forward and backward; the result is written once, and its gradient read."""
    inputs = operation.inputs(shape, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        found = operation.call("eager", shape)(*inputs)
    work = operation.work(shape, 4)
    fifth = 2 * shape.batch * shape.tokens**2 * shape.d_model if "attention" in operation.kind else 0
    assert work.flops == counter.get_total_flops() + fifth
    assert work.bytes == tensor_bytes(inputs[:-1]) + tensor_bytes(inputs) + tensor_bytes((inputs[-1], *found))
    for gradient, tensor in zip(found, [t for t in inputs if t.requires_grad], strict=True):
        assert gradient.shape == tensor.shape


def test_floor_is_the_larger_of_the_two_times():
    assert Work(100, 10).floor(50, 100) == 2
    assert Work(100, 1000).floor(50, 100) == 10
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


def test_tokens_of_the_paper():
    assert Shape("B", 8, 512).tokens == 4097
    assert Shape("S", 8, 1024).tokens == 16_385
    assert Shape("B", 16, 512).n_heads == 12
    assert (Shape("B", 8, 512).name, Shape("L", 16, 640, mask=False).name) == ("Seg-B-Mask/8", "Seg-L/16")


@pytest.mark.parametrize("on_gpu", [True, False])
def test_sweeps(on_gpu):
    core, full = shapes.sweep("core", on_gpu), shapes.sweep("full", on_gpu)
    assert full[: len(core)] == core
    ids = [shape.id for shape in full]
    assert len(set(ids)) == len(ids)
    assert {shape.patch for shape in core} == {8, 16, 32}
    assert {(s.model, s.patch) for s in full} == set(itertools.product("TSBL", shapes.PATCHES))
    assert all(shape.size % shape.patch == 0 for shape in full)
    for sweep, shapes_of in (("core", core), ("full", full)):
        steps = shapes.training(sweep, on_gpu)
        assert set(steps) >= {s for s in shapes_of if shapes.trainable(s, on_gpu)} and len(set(steps)) == len(steps)
        assert not on_gpu or {(s.model, s.patch) for s in steps} == set(itertools.product("TSBL", shapes.PATCHES))
    if on_gpu:
        assert {shape.size for shape in full} == {512, 640, 768, 1024, 2048}
        assert {shape.batch for shape in full} >= {1, 8}
