"""The benchmark's own parts: providers agree, memory is measured, the README's table is the committed result."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.models import PROVIDERS, build, picture
from bench.peak_memory import peak_memory
from bench.published import PUBLISHED, published_attention
from bench.table import END, START, replaced, table

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("cpu_*.json"))


def test_providers_label_alike():
    model, pixels = build("Seg-T-Mask/32"), picture(512)
    labels = {name: run(model, pixels).long() for name, run in PROVIDERS.items()}
    assert torch.equal(labels["published"], labels["eager-fp32"])
    assert len(labels["published"].unique()) > 3
    assert (labels["published"] == labels["eager-bf16"]).float().mean() > 0.5


def test_published_attention_is_undone():
    model = build("Seg-T-Mask/32")
    before = model.decoder.ops
    with published_attention(model):
        assert model.impl == PUBLISHED.name
        assert model.decoder.ops is PUBLISHED
    assert model.impl == "eager"
    assert model.decoder.ops is before


def test_picture():
    assert picture(100).shape == (100, 100, 3)
    assert picture(None).shape == (300, 400, 3)
    assert picture(100).std() > 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_sees_the_full_logits():
    published, ours = peak_memory("Seg-T-Mask/32", "published"), peak_memory("Seg-T-Mask/32", "eager-fp32")
    logits = 150 * 512 * 512 * 4
    assert published > 2 * logits  # windows and merged map at least
    assert 0 < ours < logits / 2
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        peak_memory("Seg-T-Mask/32", "nothing")


def result(model, provider, median, peak, agreement):
    info = {"model": model, "provider": provider, "size": [48, 64], "n_cls": 7, "agreement": agreement}
    return {"stats": {"median": median}, "extra_info": {**info, "peak_bytes": peak}}


def test_table_compares_with_published():
    machine = {"cpu": {"brand_raw": "CPU X"}, "threads": 2, "torch": "2.9", "commit": "abc"}
    rows = [result("M", "published", 2.0, 300 << 20, 1.0), result("M", "eager-fp32", 0.5, 75 << 20, 0.99987)]
    text = table({"machine_info": machine, "benchmarks": [*rows, {"stats": {"median": 1}, "extra_info": {}}]})
    assert "CPU X, 2 threads, torch 2.9, commit abc" in text
    assert "| M | 64x48, 7 | published | 0.50 | 1.00x | 300 MiB | 1.00x | 100.00 % |" in text
    assert "| M | 64x48, 7 | eager-fp32 | 2.00 | 4.00x | 75 MiB | 0.25x | 99.99 % |" in text


def test_replacing_between_markers():
    text = f"a\n{START}\nold\n{END}\nb\n"
    assert replaced(text, "new") == f"a\n{START}\nnew\n{END}\nb\n"
    with pytest.raises(ValueError, match="has no <!-- bench:start -->"):
        replaced("nothing", "new")


def test_readme_table_is_the_committed_result():
    assert RESULTS, "bench/results holds no CPU result"
    block = table(json.loads(RESULTS[-1].read_text()))
    text = (ROOT / "README.md").read_text()
    assert replaced(text, block) == text
    assert np.isfinite([bench["stats"]["median"] for bench in json.loads(RESULTS[-1].read_text())["benchmarks"]]).all()
