"""One training step: forward, loss, backward, SGD; weights in float32, half types by autocast."""

import pytest
import torch

from bench import machine, models, shapes
from bench.harness import Row
from bench.operations import IGNORE

TRAINING = True


@pytest.mark.parametrize("provider", models.STEP_PROVIDERS)
def bench_train_step(benchmark, harness, shape, provider):
    name = f"train-step-{shape.id}-{machine.SHORT[harness.dtype]}-{provider}"

    def inputs():
        im = torch.randn(shape.batch, 3, shape.size, shape.size, device=harness.device)
        target = torch.randint(0, shape.n_cls, (shape.batch, shape.size, shape.size), device=harness.device)
        target[:, : shape.size // 16] = IGNORE
        return im, target

    def build():
        model = models.build(shape, harness.device)
        return Row(
            "train-step",
            provider,
            shape,
            models.TrainStep(model, provider, harness.dtype),
            inputs,
            lambda loss, first: models.check_gradients(model, provider, *first, harness.dtype),
            shapes.train_step(shape, harness.dtype.itemsize),
            name,
            pictures=shape.batch,
            whole=True,
            compiled=provider == "compile",
            replays=provider == "compile",
        )

    harness.run(benchmark, "train-step", provider, shape, name, build)
