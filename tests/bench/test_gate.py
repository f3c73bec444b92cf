"""The gate of the benchmark: what is wrong is not timed, near-ties of labels may fall either way."""

import pytest
import torch

from bench import gate, models, operations
from bench.shapes import Shape
from tests.support.broken_provider import without_last_key

CPU = torch.device("cpu")
SHAPE = Shape("X", 8, 136, 2, n_cls=7)  # 290 tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dropped_key_is_refused(dtype):
    torch.manual_seed(0)
    inputs = operations.ATTENTION.inputs(SHAPE, dtype, CPU)
    right = operations.ATTENTION.call("sdpa-math", SHAPE)(*inputs)
    assert "eager's" in operations.ATTENTION.check("sdpa-math", SHAPE, right, inputs)
    with pytest.raises(gate.GateError, match="sdpa-math is wrong and is not timed"):
        operations.ATTENTION.check("sdpa-math", SHAPE, without_last_key(inputs[0], 1), inputs)


@pytest.mark.parametrize(
    "operation",
    [operations.ATTENTION_BACKWARD, operations.LAYERNORM_MLP, operations.MASK_HEAD, operations.LOSS],
    ids=lambda o: o.kind,
)
def test_one_wrong_element_is_refused(operation):
    torch.manual_seed(0)
    inputs = operation.inputs(SHAPE, torch.float32, CPU)
    result = operation.call("eager", SHAPE)(*inputs)
    operation.check("eager", SHAPE, result, inputs)
    wrong = result.clone()
    index = (-1, 5, 1) if wrong.ndim == 3 else (-1, 5, 1, 1)
    wrong[index] += result.abs().max() * 1e-3
    with pytest.raises(gate.GateError):
        operation.check("eager", SHAPE, wrong, inputs)


def test_attention_of_every_head_and_of_both_ends_of_the_batch_is_checked():
    shape = Shape("T", 16, 64, 4)
    inputs = operations.ATTENTION.inputs(shape, torch.float32, CPU)
    right = operations.ATTENTION.call("eager", shape)(*inputs)
    for image in (0, 3):
        for head in range(3):
            wrong = right.clone()
            wrong[image, :, 64 * head] = 0
            with pytest.raises(gate.GateError):
                operations.ATTENTION.check("eager", shape, wrong, inputs)


def test_labels_of_near_ties_pass_and_others_do_not():
    scores = torch.tensor([1.0, 0.9999, 0.2]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    eager = torch.zeros(1, 4, 4, dtype=torch.uint8)
    near, far, outside = eager.clone(), eager.clone(), eager.clone()
    near[0, 1, 1], far[0, 1, 1], outside[0, 1, 1] = 1, 2, 3
    assert "93.750 %" in gate.check_labels("p", near, scores, eager, floor=1e-3)
    with pytest.raises(gate.GateError, match="pixel 5 of 16"):
        gate.check_labels("p", far, scores, eager, floor=1e-3)
    with pytest.raises(gate.GateError, match="pixel 5 of 16"):
        gate.check_labels("p", near, scores, eager, floor=1e-6)
    with pytest.raises(gate.GateError, match="label 3 of 3 classes"):
        gate.check_labels("p", outside, scores, eager, floor=1e-3)
    with pytest.raises(gate.GateError, match="expected"):
        gate.check_labels("p", near[:, :2], scores, eager, floor=1e-3)


def test_whole_models_are_judged_by_their_labels():
    shape = Shape("X", 8, 40, 2, n_cls=7)
    torch.manual_seed(0)
    pixels = models.images(shape, CPU)
    labels = models.labels_of(models.build(shape, CPU), "pruned", torch.float32)(pixels)
    verdict, agreement = models.check_labels(shape, "pruned", labels, pixels, torch.float32)
    assert agreement > 0.99 and "labels as eager's" in verdict
    with pytest.raises(gate.GateError):
        models.check_labels(shape, "pruned", (labels + 1) % 7, pixels, torch.float32)
    with pytest.raises(ValueError, match="not those"):
        models.check_labels(shape, "pruned", labels, 255 - pixels, torch.float32)


def test_gradients_are_judged():
    shape = Shape("X", 8, 40, 1, n_cls=7)
    model = models.build(shape, CPU)
    im, target = torch.randn(1, 3, 40, 40), torch.randint(0, 7, (1, 40, 40))
    assert models.check_gradients(model, "sdpa-flash", im, target, torch.float32).count("largest error") == 2

    stock = models.providers.operators
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            models.providers,
            "operators",
            lambda name: stock(name)._replace(attention=without_last_key) if name == "sdpa-flash" else stock(name),
        )
        with pytest.raises(gate.GateError):
            models.check_gradients(model, "sdpa-flash", im, target, torch.float32)
