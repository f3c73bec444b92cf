"""The profile's parts: counted work, regions, traces and tables. test_profile_command.py has the command."""

import gzip
import json

import pytest
import torch
from torch.autograd.profiler_util import EventList, FunctionEvent

pytest.importorskip("triton", reason="the operators of our kernels are counted too")

from bench import long_sequences, models, profile_long, profile_plots, shapes
from bench import profile_tables as tables
from bench.profile_report import Run
from bench.profile_tables import ELSEWHERE, Profile, pattern
from bench.profiling import Counted, Counter, Regions
from bench.shapes import Shape, Work
from bench.timing import Ceilings

CPU = torch.device("cpu")
TINY = Shape("X", 8, 40, 2, n_cls=7)
ROOFS = Ceilings("float32", 2e12, 1e11, 0.0, 0.0)


def counted(shape, provider):
    """(labels, regions, what the counter found) of one forward; "triton" runs in the interpreter."""
    model, im = long_sequences.prepared(shape, CPU, torch.float32)
    regions = Regions()
    run = long_sequences.network(model, provider, regions)
    counter = Counter(lambda: regions.current)
    with torch.no_grad(), regions.of(model), counter:
        labels = run(im)
    return labels, regions, counter.found


# ---------------------------------------------------------------------------------------------------------------------
# Counted work


@pytest.mark.parametrize("provider", ["eager", "sdpa-flash", "sdpa-math", "triton"])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "linear"])
def test_counted_operations_equal_the_formula(provider, mask):
    shape = TINY._replace(mask=mask)
    _, _, found = counted(shape, provider)
    assert sum(one.work.flops for one in found.values()) == shapes.forward_flops(shape)


def test_work_is_counted_in_its_region():
    _, _, found = counted(TINY, "eager")
    at = {}
    for (region, _), one in found.items():
        at[pattern(region)] = at.get(pattern(region), Work(0, 0)) + one.work
    attention = shapes.attention(TINY, 4)
    assert at["encoder.blocks.*.attn"].flops == attention.flops
    assert at["encoder.blocks.*.attn"].bytes > attention.bytes + 4 * TINY.batch * TINY.n_heads * TINY.tokens**2
    assert at["decoder.mask_head"].flops == shapes.mask_head(TINY, 4).flops
    assert at["encoder.blocks.*.norm2+mlp"].flops == shapes.layernorm_mlp(TINY, 4).flops


def test_a_kernel_moves_what_the_formula_says():
    """Fused operators read their inputs and write their outputs, and nothing in between."""
    _, _, found = counted(TINY, "triton")
    one = found["encoder.blocks.0.attn", "segmenter::attention"]
    assert one == (1, shapes.attention(TINY, 4))
    assert found["encoder.blocks.0.norm2+mlp", "segmenter::layernorm_mlp"].work == shapes.layernorm_mlp(TINY, 4)


def bytes_of(function):
    counter = Counter()
    with counter:
        function()
    return {operator: one.work.bytes for (_, operator), one in counter.found.items()}


def test_bytes_by_hand():
    x, weight, bias = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    assert bytes_of(lambda: torch.nn.functional.linear(x, weight, bias)) == {
        "aten::t": 0,  # a view
        "aten::addmm": 4 * (3 * 5 + 7 * 5 + 7 + 3 * 7),
    }
    half = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert bytes_of(lambda: half.copy_(x)) == {"aten::copy_": 15 * (4 + 2)}  # what is overwritten is not read
    assert bytes_of(lambda: x.clone().add_(x))["aten::add_"] == 4 * 15 * 3  # read twice, written once
    assert bytes_of(lambda: x[torch.tensor([2, 2])])["aten::index"] == 2 * 4 * 10 + 8 * 2  # two rows, and the numbers
    assert bytes_of(lambda: bias.expand(9, 7) + 1)["aten::add"] == 4 * (7 + 63)  # lies in memory once
    assert bytes_of(lambda: torch.add(x, x, out=torch.empty(3, 5)))["aten::add"] == 4 * 15 * 3
    assert bytes_of(lambda: torch.empty(3, 5).sum())["aten::empty"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Regions


@pytest.mark.parametrize("provider", ["eager", "sdpa-flash", "triton"])
def test_regions_change_nothing(provider):
    model, im = long_sequences.prepared(TINY, CPU, torch.float32)
    regions = Regions()
    plain, run = long_sequences.network(model, provider), long_sequences.network(model, provider, regions)
    before = [module.ops for module in model.modules() if hasattr(module, "ops")]
    with torch.no_grad():
        masks, labels = model.masks(im), plain(im)
        with regions.of(model):
            assert torch.equal(model.masks(im), masks)
            assert torch.equal(run(im), labels)
    assert regions.current == ""
    after = [module.ops for module in model.modules() if hasattr(module, "ops")]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert labels.unique().numel() > 1


def test_regions_have_the_models_names_and_leave_the_fused_path_on():
    _, regions, _ = counted(TINY, "triton")
    names = {pattern(name) for name in regions.names}
    halves = {"norm1+attn.qkv", "attn", "attn.proj", "norm2+mlp"}
    assert names == {
        "encoder",
        "encoder.patch_embed",
        "encoder.blocks.*",
        *(f"encoder.blocks.*.{half}" for half in halves),
        "encoder.norm",
        "decoder",
        "decoder.proj_dec",
        "decoder.blocks.*",
        *(f"decoder.blocks.*.{half}" for half in halves),
        "decoder.decoder_norm",
        "decoder.mask_head",
        "upsample+argmax",
    }
    for name in names - {"upsample+argmax"}:  # the parts after a plus or a holder are layers of the model
        model = models.build(TINY, CPU)
        for part in name.replace("*", "0").split("+"):
            base = name.replace("*", "0").rpartition(".")[0]
            where = part if part.startswith(("encoder", "decoder")) else f"{base.partition('.norm')[0]}.{part}"
            assert where.endswith("mask_head") or model.get_submodule(where)


def test_regions_close_when_the_network_raises():
    model, im = long_sequences.prepared(TINY, CPU, torch.float32)
    regions = Regions()
    long_sequences.network(model, "eager")

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    broken = model.decoder.ops._replace(mask_head=fail)
    model.decoder.ops = broken
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad(), regions.of(model):
        model.masks(im)
    assert regions.current == ""
    assert model.decoder.ops is broken
    assert not any(module._forward_hooks for module in model.modules())


def tiny_run(out, deadline=float("inf")):
    """What the command makes of its arguments, without any point."""
    facts = {"name": "a CPU", "torch": "2", "triton": "3", "commit": "abc", "command": "x"}
    return Run(TINY, CPU, torch.float32, ROOFS, facts, deadline, out, points=[], profiles=[])


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A profile of the tiny model, its trace, and the folder it was written to."""
    out = tmp_path_factory.mktemp("profile")
    found = profile_long.profile("eager", tiny_run(out))
    assert not found.reason
    return found, json.loads(gzip.decompress((out / "trace_eager.json.gz").read_bytes())), out


def test_regions_cover_the_time_of_the_operators(profiled):
    found, _, _ = profiled
    regions = {line["region"]: line for line in found.regions}
    assert regions[ELSEWHERE]["share_percent"] < 20  # the model is tiny, so Python between its regions counts
    assert regions.keys() >= {"encoder.blocks.*.attn", "decoder.mask_head", "upsample+argmax", ELSEWHERE}
    assert sum(line["share_percent"] for line in found.regions) == pytest.approx(100)
    assert all(line["ms"] >= 0 for line in found.regions)
    everything = sum(line["ms"] for line in found.regions) / 1e3
    assert everything == pytest.approx(found.profiled_seconds)
    operators = sum(line["ms"] for line in found.operators) / 1e3
    assert 0.2 * everything < operators < everything
    assert sum(line["share_percent"] for line in found.operators) == pytest.approx(100)


def test_times_and_work_are_of_the_same_calls(profiled):
    found, _, _ = profiled
    _, _, work = counted(TINY, "eager")
    counts = {}
    for (_, operator), one in work.items():
        # Where nobody watches, torch adds a linear layer's bias in place; under a counter it does not.
        # The profiler also sees the copies that other operators make.
        if any(one.work) and operator.removesuffix("_") not in ("aten::add", "aten::_to_copy", "aten::copy"):
            counts[operator] = counts.get(operator, 0) + one.calls
    calls = {line["operator"]: line["calls"] for line in found.operators}
    assert {operator: calls.get(operator) for operator in counts} == counts
    assert counts.keys() >= {"aten::addmm", "aten::bmm", "aten::_softmax", "aten::native_layer_norm"}
    layers = {line["region"]: line["layers"] for line in found.regions}
    assert layers["decoder.blocks.*.attn"] == shapes.DECODER_LAYERS
    flops = sum(line["gflop"] or 0 for line in found.regions)
    assert flops == pytest.approx(shapes.forward_flops(TINY) / 1e9)


def test_memory_over_time_sees_the_logits(profiled):
    found, _, _ = profiled
    times, held = zip(*found.memory, strict=True)
    assert list(times) == sorted(times)
    assert held[0] == 0
    logits = 4 * TINY.batch * TINY.n_cls * TINY.size**2
    assert logits <= found.peak_bytes < 20 * logits
    assert [name for name, *_ in profile_plots.outermost(found.spans)] == [
        "encoder.patch_embed",
        "encoder.blocks",
        "encoder.norm",
        "decoder.proj_dec",
        "decoder.blocks",
        "decoder.decoder_norm",
        "decoder.mask_head",
        "upsample+argmax",
    ]
    peaks = {line["region"]: line["peak_mib"] for line in found.regions}
    assert peaks["upsample+argmax"] >= logits / 2**20 > peaks["encoder.norm"]
    assert peaks["encoder"] >= peaks["encoder.blocks.*"] >= peaks["encoder.blocks.*.attn"] > 0
    assert max(peak for peak in peaks.values() if peak) <= found.peak_bytes / 2**20


def test_the_trace_tells_nothing_about_the_machine(profiled):
    _, trace, _ = profiled
    assert not {"host_name", "traceName", "trace_id"} & set(trace)
    assert "/tmp" not in json.dumps(trace)
    assert sum(event["name"] == tables.FORWARD for event in trace["traceEvents"]) == profile_long.FORWARDS


# ---------------------------------------------------------------------------------------------------------------------
# Events of other machines and programs, written by hand


def host(name, start, end, kernels=()):
    """An event as torch.profiler gives it; kernels as (name, microseconds)."""
    event = FunctionEvent(len(name), name, thread=1, start_us=start, end_us=end, stack=[], use_device="cuda")
    for kernel, took in kernels:
        event.append_kernel(kernel, 0, took)
    return event


def built(events):
    """The events with their parents, as torch arranges them."""
    found = EventList(sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)))
    found._build_tree()
    return found


def gpu_events():
    return built(
        [
            host("forward", 100, 400),
            host("encoder", 105, 300),
            host("encoder.blocks.0.attn", 110, 210, [("encoder.blocks.0.attn", 90)]),  # its own annotation on the GPU
            host("aten::linear", 111, 151),
            host("aten::addmm", 112, 142, [("gemm", 20)]),
            host("aten::copy_", 113, 118, [("Memcpy DtoD", 5)]),
            host("segmenter::attention", 160, 190, [("_attention_fwd_kernel", 50), ("by id", 7)]),
            host("aten::cat", 215, 220, [("concat", 10)]),
            host("aten::argmax", 310, 320, [("reduce", 3)]),
        ]
    )


def test_kernels_belong_to_the_region_that_launched_them():
    names = {"forward", "encoder", "encoder.blocks.0.attn"}
    found = tables.region_seconds(gpu_events(), names, on_device=True)
    assert found == pytest.approx({"encoder.blocks.0.attn": 82e-6, "encoder": 10e-6, "forward": 3e-6})
    lines = tables.operator_lines(gpu_events().key_averages(), names, forwards=1, on_device=True)
    assert {line["operator"]: line["ms"] for line in lines} == pytest.approx(
        {
            "segmenter::attention": 57e-3,
            "aten::addmm": 20e-3,
            "aten::cat": 10e-3,
            "aten::copy_": 5e-3,
            "aten::argmax": 3e-3,
        }
    )


def test_host_time_of_the_same_events():
    names = {"forward", "encoder", "encoder.blocks.0.attn"}
    found = tables.region_seconds(gpu_events(), names, on_device=False)
    assert found == pytest.approx({"encoder.blocks.0.attn": 100e-6, "encoder": 95e-6, "forward": 105e-6})
    lines = tables.operator_lines(gpu_events().key_averages(), names, forwards=2, on_device=False)
    ms = {line["operator"]: (line["calls"], line["ms"]) for line in lines}
    assert ms["aten::addmm"] == pytest.approx((0.5, 12.5e-3)) and ms["aten::linear"] == pytest.approx((0.5, 5e-3))
    assert not names & ms.keys()


def event(cat, name, ts, dur, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": 1, "ts": ts, "dur": dur, "args": args}


def memory_event(ts, count, device_type=1):
    return {"ph": "i", "name": "[memory]", "ts": ts, "args": {"Bytes": count, "Device Type": device_type}}


TRACE = {
    "traceEvents": [
        event("user_annotation", "forward", 10, 50),
        event("user_annotation", "forward", 100, 300),
        event("user_annotation", "encoder", 110, 100),
        event("cpu_op", "aten::addmm", 112, 30),
        event("gpu_memcpy", "Memcpy DtoD", 250, 5),
        event("kernel", "gemm", 260, 20, **{"registers per thread": 168, "shared memory": 99}),
        event("kernel", "gemm", 290, 40, **{"registers per thread": 168, "shared memory": 99}),
        event("kernel", "gemm", 340, 15, **{"registers per thread": 32, "shared memory": 0}),
        memory_event(113, 512),
        memory_event(114, 99, device_type=0),
        memory_event(180, 256),
        memory_event(180, -512),
        memory_event(90, 7),
        memory_event(250, 1024),
        {"ph": "M", "name": "process_name", "ts": 0, "args": {"name": "python"}},
    ]
}


def test_memory_of_the_last_forward_on_its_device():
    memory, spans = tables.timeline(TRACE, {"forward", "encoder"}, "cuda")
    assert [held for _, held in memory] == [0, 512, 768, 256, 1280, 1280]
    assert [time for time, _ in memory] == pytest.approx([0, 13e-6, 80e-6, 80e-6, 150e-6, 300e-6])
    assert spans == [("encoder", pytest.approx(10e-6), pytest.approx(110e-6))]
    profile = Profile("eager", memory=memory, spans=spans)
    assert profile.peak_bytes == 1280 and profile.region_peaks() == {"encoder": 768}
    assert Profile("eager", spans=spans).region_peaks() == {}


def test_kernels_of_a_trace():
    lines = tables.kernel_lines(TRACE, forwards=2)
    assert [(line["kernel"], line["launches"], line["registers"]) for line in lines] == [
        ("gemm", 1, 168),
        ("gemm", 0.5, 32),
        ("Memcpy DtoD", 0.5, None),
    ]
    assert lines[0]["ms"] == pytest.approx(30e-3) and lines[0]["share_percent"] == pytest.approx(75)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_rates_by_hand():
    def rates(work):
        line = tables.region_lines({"a": 4e-3}, {("a", "aten::mm"): Counted(1, work)}, {}, 2, ROOFS)[0]
        return {column: line[column] for column in tables.RATES}

    assert rates(Work(10**9, 10**8)) == pytest.approx(
        {"tflops": 0.5, "gbps": 50, "percent_flops": 25, "percent_bytes": 50, "percent_of_roof": 50}
    )
    assert rates(Work(0, 10**8))["tflops"] is None
    assert set(rates(Work(0, 0)).values()) == {None}


def test_layers_are_added_up():
    seconds = {f"encoder.blocks.{i}.attn": 2.0 for i in range(12)} | {"encoder": 8.0}
    found = {(f"encoder.blocks.{i}.attn", "aten::bmm"): Counted(1, Work(5, 7)) for i in range(12)}
    peaks = {"encoder.blocks.*.attn": 3 << 20}
    first, second = tables.region_lines(seconds, found, peaks, forwards=2, roofs=ROOFS)
    assert (first["region"], first["layers"], first["ms"]) == ("encoder.blocks.*.attn", 12, 12000)
    assert (first["share_percent"], first["peak_mib"]) == (75, 3)
    assert (first["gflop"], first["mbytes"]) == pytest.approx((60e-9, 84e-6))
    assert (second["region"], second["share_percent"], second["tflops"]) == ("encoder", 25, None)
    assert pattern("forward") == ELSEWHERE
    assert tables.region_lines({"forward": 1.0}, {}, {}, 1, ROOFS)[0]["peak_mib"] is None
    assert pattern("a.1.b.22") == "a.*.b.*"


def test_attentions_seconds_are_those_of_its_calls(monkeypatch):
    clock = iter([0.0, 1.0, 20.0, 20.5])
    monkeypatch.setattr(long_sequences.time, "perf_counter", lambda: next(clock))
    double, seconds = long_sequences.watched(lambda x, by=2: x * by, CPU)
    assert (double(3), double(3, by=5)) == (6, 15)
    assert seconds() == 1.5
