"""The headline figure: one technique after the other, from the published code to ours."""

import functools

import pytest

from bench import machine, models, shapes, waterfall
from bench.harness import Row


@functools.lru_cache(1)
def _published(device):
    return waterfall.segment_with(models.shipped(), frozenset(), device)


@pytest.mark.parametrize("step", range(len(waterfall.STEPS)), ids=[step.name for step in waterfall.STEPS])
def bench_waterfall(benchmark, harness, camvid, step):
    on_gpu = harness.device.type == "cuda"
    shape = shapes.SMOKE[0] if harness.smoke else waterfall.GPU_SHAPE if on_gpu else waterfall.CPU_SHAPE
    name, adds, text = waterfall.STEPS[step]

    def build():
        on = waterfall.features(step, harness.device)
        dtype = waterfall.dtype_of(on)
        extra = {"step": step, "text": text, "speed_model": shape.name, "dtype": machine.SHORT[dtype]}

        def check(labels, inputs):
            verdict, _ = models.check_labels(shape, name, labels, *inputs, dtype)
            if not harness.smoke:
                run = waterfall.segment_with(models.shipped(), on, harness.device)
                every = waterfall.EVERY[harness.device.type]
                extra.update(waterfall.quality(run, _published(harness.device), camvid, every))
            return verdict

        return Row(
            "waterfall",
            name,
            shape,
            waterfall.labels_of(models.build(shape, harness.device), on),
            lambda: (models.pictures(shape, harness.device),),
            check,
            shapes.model(shape, dtype.itemsize),
            f"waterfall-{step}",
            pictures=shape.batch,
            whole=True,
            compiled="compile" in on,
            replays=bool({"compile", "graph"} & on),
            extra=extra,
        )

    harness.run(benchmark, "waterfall", name, shape, f"waterfall-{step}", build)
