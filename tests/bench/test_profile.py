"""The profile's parts: counted work, regions, traces and tables. test_profile_command.py has the command."""

import gzip
import json

import pytest
import torch

pytest.importorskip("triton", reason="the operators of our kernels are counted too")

from bench import long_sequences, models, profile_long, profile_plots, profiling, shapes, traces
from bench.ceilings import Ceilings
from bench.profiling import DISPATCH, Counted, Counter, Regions, Row
from bench.shapes import Shape, Work
from bench.traces import Call

CPU = torch.device("cpu")
TINY = Shape("X", 8, 40, 2, n_cls=7)
ROOFS = Ceilings("float32", 2e12, 1e11, 0.0, 0.0)


def counted(shape, provider):
    """(labels, regions, what the counter found) of one forward; "triton" runs in the interpreter."""
    model = long_sequences.build(shape, CPU, torch.float32)
    regions = Regions()
    run = long_sequences.network(model, provider, regions)
    counter = Counter(lambda: regions.current)
    im = long_sequences.picture(shape, CPU, torch.float32)
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
    at = {profiling.pattern(region): work for region, work in profiling.region_work(found).items()}
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
    model = long_sequences.build(TINY, CPU, torch.float32)
    im = long_sequences.picture(TINY, CPU, torch.float32)
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
    names = {profiling.pattern(name) for name in regions.names}
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
    model = long_sequences.build(TINY, CPU, torch.float32)
    regions = Regions()
    long_sequences.network(model, "eager")

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    broken = model.decoder.ops._replace(mask_head=fail)
    model.decoder.ops = broken
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad(), regions.of(model):
        model.masks(long_sequences.picture(TINY, CPU, torch.float32))
    assert regions.current == ""
    assert model.decoder.ops is broken
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A profile of the tiny model, its trace, and the folder it was written to."""
    out = tmp_path_factory.mktemp("profile")
    setting = profile_long.Setting(TINY, CPU, torch.float32, "torch", ROOFS, float("inf"), out)
    found = profile_long.profile("eager", setting)
    assert not found.reason
    return found, json.loads(gzip.decompress((out / "trace_eager.json.gz").read_bytes())), out


def test_regions_cover_the_time_of_the_operators(profiled):
    found, _, _ = profiled
    assert found.covered > 0.95
    assert 0 < found.operator_seconds < 1.05 * found.profiled_seconds
    assert sum(row.share for row in found.operators) == pytest.approx(1)
    assert sum(row.seconds for row in found.regions) == pytest.approx(found.operator_seconds)
    assert {row.region for row in found.regions} >= {"encoder.blocks.*.attn", "decoder.mask_head", "upsample+argmax"}


def test_times_and_work_are_of_the_same_calls(profiled):
    found, _, _ = profiled
    _, _, work = counted(TINY, "eager")
    expected = {}
    for (region, operator), one in work.items():
        if any(one.work):
            key = (profiling.pattern(region), operator)
            expected[key] = expected.get(key, 0) + one.calls
    actual = {(row.region, row.operator): row.calls for row in found.operators if row.operator != DISPATCH}
    assert actual == expected
    blocks = next(row for row in found.regions if row.region == "decoder.blocks.*.attn")
    assert blocks.layers == shapes.DECODER_LAYERS
    total = sum((row.work for row in found.regions if row.work), Work(0, 0))
    assert total.flops == shapes.forward_flops(TINY)


def test_memory_over_time_sees_the_logits(profiled):
    found, _, _ = profiled
    times, held = zip(*found.memory, strict=True)
    assert list(times) == sorted(times)
    assert held[0] == 0
    logits = 4 * TINY.batch * TINY.n_cls * TINY.size**2
    assert logits <= found.peak_bytes < 20 * logits
    assert [name for name, *_ in profile_plots.merged(found.stretches)] == [
        "encoder.patch_embed",
        "encoder.blocks.*",
        "encoder.norm",
        "decoder.proj_dec",
        "decoder.blocks.*",
        "decoder.decoder_norm",
        "decoder.mask_head",
        "upsample+argmax",
    ]


def test_the_trace_tells_nothing_about_the_machine(profiled):
    _, trace, _ = profiled
    assert not {"host_name", "traceName", "trace_id"} & set(trace)
    assert "/tmp" not in json.dumps(trace)
    assert sum(event["name"] == traces.FORWARD for event in trace["traceEvents"]) == profile_long.FORWARDS


# ---------------------------------------------------------------------------------------------------------------------
# Traces of other machines and programs, written by hand


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": ts, "dur": dur, "args": args}


def gpu_trace():
    return [
        event("user_annotation", "warm-up", 0, 50),
        event("cuda_runtime", "cudaLaunchKernel", 10, 2, correlation=1),
        event("user_annotation", "forward", 100, 300),
        event("user_annotation", "encoder.blocks.0.attn", 110, 100),
        event("cpu_op", "aten::linear", 111, 40, **{"External id": 4}),
        event("cpu_op", "aten::addmm", 112, 30, **{"External id": 5}),
        event("cpu_op", "aten::copy_", 113, 5, **{"External id": 6}),
        event("cuda_runtime", "cudaMemcpyAsync", 114, 2, correlation=2),
        event("cuda_runtime", "cudaLaunchKernelExC", 120, 2, correlation=3),
        event("cpu_op", "segmenter::attention", 160, 30, **{"External id": 7}),
        event("cuda_driver", "cuLaunchKernelEx", 170, 2, correlation=4),
        event("cuda_driver", "cuLaunchKernelEx", 215, 2, correlation=5),  # by no operator, in no region
        event("cuda_runtime", "cudaDeviceSynchronize", 220, 170, correlation=6),
        event("gpu_user_annotation", "encoder.blocks.0.attn", 500, 90, tid=7),
        event("kernel", "warm", 60, 40, tid=7, correlation=1),
        event("gpu_memcpy", "Memcpy DtoD", 250, 5, tid=7, correlation=2),
        event("kernel", "gemm", 260, 20, tid=7, correlation=3, **{"registers per thread": 168, "shared memory": 99}),
        event("kernel", "_attention_fwd_kernel", 290, 50, tid=7, correlation=4),
        event("kernel", "stray", 345, 10, tid=7, correlation=5),
        event("kernel", "by id", 356, 7, tid=7, correlation=77, **{"External id": 7}),
        event("cuda_driver", "cuLaunchKernelEx", 191, 2, correlation=79),  # the clocks place it after its operator
        event("kernel", "late", 364, 1, tid=7, correlation=79, **{"External id": 7}),
        event("kernel", "unknown", 364, 3, tid=7, correlation=78),
        {"ph": "i", "name": "[memory]", "ts": 113, "args": {"Bytes": 512, "Device Type": 1}},
        {"ph": "i", "name": "[memory]", "ts": 114, "args": {"Bytes": 99, "Device Type": 0}},
        {"ph": "i", "name": "[memory]", "ts": 180, "args": {"Bytes": -512, "Device Type": 1}},
        {"ph": "i", "name": "[memory]", "ts": 90, "args": {"Bytes": 7, "Device Type": 1}},
        {"ph": "M", "name": "process_name", "ts": 0, "args": {"name": "python"}},
    ]


def test_kernels_belong_to_the_operator_and_region_that_launched_them():
    names = {"encoder.blocks.0.attn"}
    found = traces.read_chrome({"traceEvents": gpu_trace()}, names, {"aten::addmm", "segmenter::attention"}, "cuda")
    region = "encoder.blocks.0.attn"
    assert [(c.region, c.operator, pytest.approx(c.seconds), c.launches) for c in found.calls] == [
        (region, "aten::addmm", 25e-6, 2),  # the copy within it is its own
        (region, "segmenter::attention", 58e-6, 3),
        ("", "stray", 10e-6, 1),
        ("", "unknown", 3e-6, 1),
    ]
    assert found.kernels[1] == ("gemm", region, 20e-6, 1, 168, 99)
    assert "warm" not in {kernel.name for kernel in found.kernels}
    assert found.forwards == [300e-6]
    assert found.memory == [(0, 0), (13e-6, 512), (80e-6, 0), (300e-6, 0)]
    assert found.stretches == [("encoder.blocks.0.attn", pytest.approx(10e-6), pytest.approx(110e-6))]
    rows = profiling.kernel_rows(found, forwards=1)
    assert [row.name for row in rows][:2] == ["_attention_fwd_kernel", "gemm"]
    assert rows[0].share == pytest.approx(50 / 96)


def test_host_time_of_the_same_trace():
    names = {"encoder.blocks.0.attn"}
    found = traces.read_chrome({"traceEvents": gpu_trace()}, names, {"aten::addmm", "segmenter::attention"}, "cpu")
    seconds = {call.operator: call.seconds for call in found.calls if not call.launches}
    assert seconds == pytest.approx({"aten::addmm": 30e-6, DISPATCH: 10e-6, "segmenter::attention": 30e-6})


def test_a_compiled_program_is_listed_by_what_is_inside():
    events = [
        event("user_annotation", "forward", 0, 100),
        event("user_annotation", "compiled program", 1, 98),
        event("cpu_op", "Torch-Compiled Region: 0/0", 2, 96),
        event("cpu_op", "## Call CompiledFxGraph f7ayr2 ##", 3, 94),
        event("cpu_op", "aten::addmm", 4, 50),
        event("cpu_op", "aten::copy_", 5, 20),
        event("cpu_op", "graph_0_cpp_fused_gelu_3", 60, 30),
    ]
    found = traces.read_chrome({"traceEvents": events}, {"compiled program"}, set(), "cpu")
    rows = profiling.operator_rows(found, {}, forwards=1, on_device=False)
    assert [(row.operator, round(1e6 * row.seconds)) for row in rows] == [
        ("aten::addmm", 50),
        ("graph_0_cpp_fused_gelu_3", 30),
        (DISPATCH, 16),
    ]
    assert {row.region for row in rows} == {"compiled program"}
    assert all(row.work is None for row in rows)
    assert "compiled program,aten::addmm,1,1,,0.05,52.08,,,,,,,\n" in profiling.csv_text(rows, ROOFS)


def test_a_trace_without_a_forward_is_an_error():
    with pytest.raises(ValueError, match="no annotation 'forward'"):
        traces.read_chrome({"traceEvents": [event("cpu_op", "aten::mm", 0, 1)]}, set(), set(), "cpu")


HATCHET = [
    {
        "frame": {"name": "ROOT", "type": "function"},
        "metrics": {"count": 0, "time (ns)": 0},
        "children": [
            {
                "frame": {"name": "encoder.blocks.0.attn", "type": "function"},
                "metrics": {},
                "children": [
                    {
                        "frame": {"name": "_attention_fwd_kernel", "type": "function"},
                        "metrics": {"count": 3, "time (ns)": 6000, "device_id": "0", "device_type": "CUDA"},
                        "children": [],
                    },
                    {
                        "frame": {"name": "__proton_launch_metadata", "type": "function"},
                        "metrics": {"count": 3, "time (ns)": 50000, "device_id": "0", "device_type": "CUDA"},
                        "children": [],
                    },
                ],
            },
            {
                "frame": {"name": "elementwise", "type": "function"},
                "metrics": {"count": 6, "time (ns)": 3000, "device_id": "0", "device_type": "CUDA"},
                "children": [],
            },
        ],
    },
    {"CUDA": {"0": {"arch": "90", "bus_width": 6144, "clock_rate": 1980000, "num_sms": 132}}},
]


def test_proton():
    found = traces.read_hatchet(HATCHET, {"encoder.blocks.0.attn"})
    assert found.calls == [
        Call("encoder.blocks.0.attn", "_attention_fwd_kernel", pytest.approx(6e-6), 3),
        Call("", "elementwise", pytest.approx(3e-6), 6),
    ]
    rows = profiling.operator_rows(found, {}, forwards=3, on_device=True)
    assert [(row.operator, row.launches, pytest.approx(row.seconds)) for row in rows] == [
        ("_attention_fwd_kernel", 1, 2e-6),
        ("elementwise", 2, 1e-6),
    ]
    assert profiling.kernel_rows(found, 3)[0].launches == 1
    work = profiling.region_work({("encoder.blocks.0.attn", "aten::mm"): Counted(1, Work(4000, 10))})
    regions = profiling.region_rows(rows, work)
    assert regions[0].rates(ROOFS)["percent_flops"] == pytest.approx(100 * 4000 / 2e-6 / 2e12)
    with pytest.raises(ValueError, match="no .hatchet file"):
        traces.read_hatchet({"traceEvents": []}, set())


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_rates_by_hand():
    row = Row("r", "o", 1, 1, None, 2e-3, 1.0, Work(10**9, 10**8))
    rates = row.rates(ROOFS)
    assert rates == pytest.approx(
        {"tflops": 0.5, "gbps": 50, "percent_flops": 25, "percent_bytes": 50, "percent_of_roof": 50}
    )
    assert row._replace(work=Work(0, 10**8)).rates(ROOFS)["tflops"] is None
    assert set(row._replace(work=None).rates(ROOFS).values()) == {None}


def test_layers_are_added_up():
    calls = [Call(f"encoder.blocks.{i}.attn", "aten::bmm", 1.0, 0) for i in range(12)] * 2
    found = {(f"encoder.blocks.{i}.attn", "aten::bmm"): Counted(1, Work(5, 7)) for i in range(12)}
    (row,) = profiling.operator_rows(traces.Trace(calls=calls), found, forwards=2, on_device=False)
    assert row == ("encoder.blocks.*.attn", "aten::bmm", 12, 12, None, 12.0, 1.0, Work(60, 84))
    assert profiling.pattern("") == "(elsewhere)"
    assert profiling.pattern("a.1.b.22") == "a.*.b.*"
