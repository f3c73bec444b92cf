"""One picture, uint8 in and labels out, on this machine's CPU: the published way against ours.

pytest bench --benchmark-json bench/results/cpu_NAME.json        -k patch8 and the like choose rows
pytest bench --benchmark-disable -k patch32                      smoke test: each row once, no timing

`published` is bench/published.py: explicit score matrices, full-resolution logits. Timed: normalisation, the network,
merging, argmax; not timed: decoding the file, loading the model. Peak memory is measured in a process of its own.
Labels are compared with the published ones before anything is timed. For random weights the scores of classes nearly
tie, so the agreement of half precision says little there; the shipped model's row shows it on trained weights.
"""

import pytest
import torch

from bench.models import N_CLS, PROVIDERS, SHIPPED, SIZE, build, picture
from bench.peak_memory import peak_memory

MODELS = ["Seg-T-Mask/16", "Seg-S-Mask/16", "Seg-B-Mask/16", "Seg-S-Mask/32", "Seg-S-Mask/8", SHIPPED]
# Share of pixels whose label must be the published one before a row is timed.
AGREEMENT = {"published": 1.0, "eager-fp32": 0.9999, "eager-bf16": 0.5}


def identify(name: str) -> str:
    return name if name == SHIPPED else name.replace("/", "-patch")


@pytest.fixture(scope="module", params=MODELS, ids=identify)
def case(request):
    name = request.param
    model, pixels = build(name), picture(None if name == SHIPPED else SIZE)
    return name, model, pixels, PROVIDERS["published"](model, pixels)


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_labels(benchmark, case, provider):
    name, model, pixels, want = case
    run = PROVIDERS[provider]
    agreement = (run(model, pixels).long() == want).double().mean().item()
    assert agreement >= AGREEMENT[provider]
    benchmark.group = f"labels, {name}, {pixels.shape[1]}x{pixels.shape[0]}, {model.n_cls} classes, CPU"
    benchmark.extra_info.update(
        model=name, provider=provider, size=pixels.shape[:2], n_cls=model.n_cls, agreement=agreement
    )
    if benchmark.enabled:
        benchmark.extra_info["peak_bytes"] = peak_memory(name, provider)
    benchmark.pedantic(run, args=(model, pixels), rounds=10, warmup_rounds=2, iterations=1)


def bench_upsample_argmax(benchmark):
    """The tail alone: low-resolution masks to labels, the published order of work against bands."""
    from segmenter.inference import View, bands

    masks = torch.randn(1, 32, 32, N_CLS, generator=torch.Generator().manual_seed(0))
    view = View(masks, [0], [0], (SIZE, SIZE), SIZE, 16, False)
    benchmark.group = f"masks to labels, {SIZE}x{SIZE}, {N_CLS} classes, CPU"
    benchmark.extra_info.update(model="masks to labels", provider="bands")
    run = lambda: [scores.argmax(-1) for _, scores in bands([view], (SIZE, SIZE), False)]  # noqa: E731
    labels = torch.cat(run())
    full = torch.nn.functional.interpolate(masks.permute(0, 3, 1, 2).contiguous(), (SIZE, SIZE), mode="bilinear")
    assert (labels == full[0].argmax(0)).double().mean() > 0.9999
    benchmark.pedantic(run, rounds=20, warmup_rounds=2, iterations=1)
