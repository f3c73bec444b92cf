"""Whole models: uint8 pictures in, labels out, by the wall clock."""

import pytest

from bench import machine, models, shapes
from bench.harness import Row


@pytest.mark.parametrize("provider", models.MODEL_PROVIDERS)
def bench_model(benchmark, harness, shape, provider):
    name = f"model-{shape.id}-{machine.SHORT[harness.dtype]}-{provider}"

    def build():
        extra = {}

        def check(labels, inputs):
            verdict, extra["agreement"] = models.check_labels(shape, provider, labels, *inputs, harness.dtype)
            return verdict

        return Row(
            "model",
            provider,
            shape,
            models.labels_of(models.build(shape, harness.device), provider, harness.dtype),
            lambda: (models.pictures(shape, harness.device),),
            check,
            shapes.model(shape, harness.dtype.itemsize),
            name,
            pictures=shape.batch,
            whole=True,
            compiled=provider == "compile",
            replays=provider == "compile",
            extra=extra,
        )

    harness.run(benchmark, "model", provider, shape, name, build)
