"""Whole models by the wall clock: images to labels, a training step, and the headline figure's steps."""

import functools

import pytest
import torch

from bench import machine, models, providers, shapes, waterfall
from bench.harness import Call, Row
from bench.operations import IGNORE


@pytest.mark.parametrize("provider", models.MODEL_PROVIDERS)
def bench_model(benchmark, harness, shape, provider):
    """uint8 images in, labels out."""
    compiled, extra = provider == "compile", {}

    def check(labels, inputs):
        verdict, extra["agreement"] = models.check_labels(shape, provider, labels, *inputs, harness.dtype)
        return verdict

    def build():
        run = models.labels_of(models.build(shape, harness.device), provider, harness.dtype)
        work = shapes.model(shape, harness.dtype.itemsize)
        return Call(run, lambda: (models.images(shape, harness.device),), check, work)

    harness.run(benchmark, Row("model", provider, shape, build, shape.batch, compiled, compiled, extra))


@pytest.mark.parametrize("provider", models.STEP_PROVIDERS)
def bench_train_step(benchmark, harness, shape, provider):
    """Forward, loss, backward, SGD; weights in float32, half types by autocast."""
    compiled, extra = provider == "compile", {"ours": True} if provider in providers.LEVELS else {}

    def inputs():
        im = torch.randn(shape.batch, 3, shape.size, shape.size, device=harness.device)
        target = torch.randint(0, shape.n_cls, (shape.batch, shape.size, shape.size), device=harness.device)
        target[:, : shape.size // 16] = IGNORE
        return im, target

    def build():
        model = models.build(shape, harness.device)
        step = models.TrainStep(model, provider, harness.dtype)

        def check(loss, first):
            return models.check_gradients(model, provider, *first, harness.dtype)

        return Call(step, inputs, check, shapes.train_step(shape, harness.dtype.itemsize))

    harness.run(benchmark, Row("train-step", provider, shape, build, shape.batch, compiled, compiled, extra))


@functools.lru_cache(1)
def _published(device):
    return waterfall.segment_with(models.shipped(), frozenset(), device)


@pytest.mark.parametrize("step", range(len(waterfall.STEPS)), ids=[step.name for step in waterfall.STEPS])
def bench_waterfall(benchmark, harness, pytestconfig, step):
    """One technique after the other, from the published code to ours."""
    device = harness.device
    on_gpu = device.type == "cuda"
    shape = shapes.SMOKE[0] if harness.smoke else waterfall.GPU_SHAPE if on_gpu else waterfall.CPU_SHAPE
    name, adds, text = waterfall.STEPS[step]
    extra = {}

    def build():
        on = waterfall.features(step, device)
        dtype = waterfall.dtype_of(on)
        extra.update(step=step, text=text, speed_model=shape.name, dtype=machine.SHORT[dtype])

        def check(labels, inputs):
            verdict, _ = models.check_labels(shape, name, labels, *inputs, dtype)
            if not harness.smoke:
                run, chosen = waterfall.segment_with(models.shipped(), on, device), pytestconfig.option.camvid
                extra.update(waterfall.quality(run, _published(device), chosen, waterfall.EVERY[device.type]))
            return verdict

        run = waterfall.labels_of(models.build(shape, device), on)
        return Call(run, lambda: (models.images(shape, device),), check, shapes.model(shape, dtype.itemsize))

    compiled, replays = adds == "compile", adds in ("compile", "graph")
    row = Row("waterfall", name, shape, build, shape.batch, compiled, replays, extra, f"waterfall-{step}")
    harness.run(benchmark, row)
