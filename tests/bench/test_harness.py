"""The benchmark's own parts: rows, results files, timing, waterfall, and the order and limits of a run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import bench_peers, harness, machine, models, operations, providers, timing, waterfall
from bench.results import ResultsError, ResultsFile, load
from bench.shapes import Shape, Work
from segmenter.layers import Block

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHAPE = Shape("X", 8, 40, 2, n_cls=7)
MACHINE = {"device": "cpu", "name": "CPU X", "torch": "2.9", "triton": "3.6", "commit": "abc"}


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """(completed process, content of its results file) of a timed run in which one provider is broken."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "pytest", "bench/bench_operations.py", "--sweep", "smoke"]
    for plugin in ("no:xdist", "no:cacheprovider", "tests.support.broken_provider"):
        command += ["-p", plugin]
    command += ["-k", "(attention or labels) and not backward and not compile", "--results", str(out)]
    command += ["-q", "--tb=line", "--row-seconds", "0.01"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # a worker of xdist times nothing
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    (path,) = out.iterdir()
    return done, load(path)


def test_a_broken_kernel_is_refused_and_the_others_are_timed(timed):
    done, content = timed
    assert done.returncode == 1
    assert "sdpa-math is wrong and is not timed" in done.stdout
    measured = {row["extra_info"]["row"] for row in content["benchmarks"]}
    assert {"attention-X-patch8-40-b2-fp32-eager", "masks-to-labels-X-patch8-40-b2-fp32-bands"} <= measured
    assert not any("sdpa-math" in name for name in measured)


def test_a_row_says_what_it_is(timed):
    _, content = timed
    rows = {row["extra_info"]["row"]: row for row in content["benchmarks"]}
    row = rows["attention-X-patch8-40-b2-fp32-eager"]
    info = row["extra_info"]
    assert row["stats"]["rounds"] >= 5 and row["stats"]["median"] > 0 and "data" not in row["stats"]
    assert info["flops"] == 4 * 2 * 26**2 * 64 and info["bytes"] == 4 * 4 * 2 * 26 * 64
    assert info["tokens"] == 26 and info["model"] == "Seg-X-Mask/8" and info["dtype"] == "fp32"
    assert info["timing"] == "wall" and info["input_sets"] == timing.MAX_SETS  # they are tiny
    seconds = row["stats"]["median"]
    assert info["tflops"] == pytest.approx(info["flops"] / seconds / 1e12)
    assert info["gbps"] == pytest.approx(info["bytes"] / seconds / 1e9)
    roofs = content["ceilings"]
    floor = max(info["flops"] / roofs["flops_per_second"], info["bytes"] / roofs["bytes_per_second"])
    assert info["floor_seconds"] == pytest.approx(floor)
    assert info["percent_of_floor"] == pytest.approx(100 * floor / seconds)
    assert info["peak_bytes"] is None or info["peak_bytes"] >= 0
    assert "largest error" in info["gate"]


def test_what_is_not_there_is_noted_with_the_reason(timed):
    _, content = timed
    reasons = {row["name"]: row["reason"] for row in content["unavailable"]}
    assert "scaled_dot_product_attention does not have it here" in reasons["attention-X-patch8-40-b2-fp32-sdpa-cudnn"]
    triton = reasons["attention-X-patch8-40-b2-fp32-triton"]
    assert triton in (providers.INTERPRETED, "tensors on the CPU") or "triton" in triton.lower()


def test_machine_facts(timed):
    _, content = timed
    facts = content["machine_info"]
    assert facts["torch"] == torch.__version__ and facts["device"] == "cpu" and facts["commit"]
    assert "bench/bench_operations.py" in facts["command"]
    assert "node" not in facts and str(ROOT) not in json.dumps(content)


# ---------------------------------------------------------------------------------------------------------------------
# One row


class Disabled:
    """Stands for the `benchmark` fixture of a smoke test."""

    enabled = False

    def __init__(self):
        self.extra_info, self.group, self.called = {}, None, 0

    def pedantic(self, fn, args):
        self.called += 1
        fn(*args)


def session(tmp_path, **kwargs):
    results = ResultsFile(tmp_path / "r.json", MACHINE)
    defaults = {"smoke": True, "results": results, "seconds": 0.0, "deadline": float("inf")}
    return harness.Harness(CPU, torch.float32, **{**defaults, **kwargs})


def unavailable(tmp_path):
    return [row["reason"] for row in load(tmp_path / "r.json")["unavailable"]]


def test_every_provider_gets_the_same_inputs(tmp_path):
    seen = {}
    for provider in ("eager", "sdpa-flash"):
        operation = operations.ATTENTION._replace(
            call=lambda provider, shape: (
                lambda qkv: operations.ATTENTION.call(provider, shape)(seen.setdefault(provider, qkv))
            )
        )
        torch.rand(3)
        session(tmp_path).operation(Disabled(), operation, SHAPE, provider)
    assert torch.equal(seen["eager"], seen["sdpa-flash"])


def test_out_of_memory_is_a_result(tmp_path):
    def call(provider, shape):
        def fn(qkv):
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
            )

        return fn

    with pytest.raises(pytest.skip.Exception, match="out of memory"):
        session(tmp_path).operation(Disabled(), operations.ATTENTION._replace(call=call), SHAPE, "eager")
    assert unavailable(tmp_path) == ["out of memory"]


def test_a_reference_that_does_not_fit_is_not_held_against_the_provider(tmp_path):
    def check(provider, shape, result, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(pytest.skip.Exception, match="exact result does not fit"):
        session(tmp_path).operation(Disabled(), operations.ATTENTION._replace(check=check), SHAPE, "eager")
    assert unavailable(tmp_path) == ["its exact result does not fit in memory, so it cannot be checked"]


def test_other_errors_are_errors(tmp_path):
    def call(provider, shape):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        session(tmp_path).operation(Disabled(), operations.ATTENTION._replace(call=call), SHAPE, "eager")


def test_no_row_starts_after_the_deadline(tmp_path):
    fake = Disabled()
    with pytest.raises(pytest.skip.Exception, match="the time was used up"):
        session(tmp_path, deadline=time.time() - 1).operation(fake, operations.ATTENTION, SHAPE, "eager")
    assert unavailable(tmp_path) == ["not run: the time was used up"] and not fake.called


def test_known_rows_are_not_measured_again(tmp_path):
    known = frozenset({f"attention-{SHAPE.id}-fp32-eager"})
    with pytest.raises(pytest.skip.Exception, match="measured before"):
        session(tmp_path, known=known).operation(Disabled(), operations.ATTENTION, SHAPE, "eager")
    assert not (tmp_path / "r.json").exists()


def test_triton_is_not_timed_in_the_interpreter():
    with pytest.raises(providers.Unavailable):
        providers.require("triton", CPU, torch.float32, timed=True)


def test_rates():
    roofs = timing.Ceilings("float32", 1000.0, 60.0, 0.0, 0.0)
    found = harness.rates(Work(200, 30), 4, 2.0, roofs)
    assert found["percent_flops"] == 10 and found["percent_bytes"] == 25
    assert found["floor_seconds"] == 0.5 and found["percent_of_floor"] == 25
    assert found["images_per_second"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Results files


def row(name, median):
    return {"fullname": name, "name": name, "stats": {"median": median}, "extra_info": {"row": name}}


def test_results_are_saved_row_by_row_and_go_on(tmp_path):
    path = tmp_path / "sub" / "r.json"
    results = ResultsFile(path, MACHINE)
    results.add_unavailable({"name": "b", "reason": "no GPU"})
    results.add(row("a", 1.0))
    assert [r["name"] for r in load(path)["benchmarks"]] == ["a"]
    again = ResultsFile(path, MACHINE)
    again.add(row("a", 2.0))
    again.add(row("b", 3.0))  # there after all
    content = load(path)
    assert [r["stats"]["median"] for r in content["benchmarks"]] == [2.0, 3.0]
    again.add_unavailable({"name": "b", "reason": "not run"})  # it is measured, so this says nothing
    assert load(path)["unavailable"] == []
    assert content["unavailable"] == [] and again.names() == {"a", "b"}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize("key", ["name", "torch", "commit"])
def test_rows_of_another_machine_or_commit_do_not_mix(tmp_path, key):
    ResultsFile(tmp_path / "r.json", MACHINE).add(row("a", 1.0))
    with pytest.raises(ResultsError, match=f"{key} .*, not other"):
        ResultsFile(tmp_path / "r.json", {**MACHINE, key: "other"})


@pytest.mark.parametrize("text", ["", "[]", '{"machine_info": {}}'])
def test_what_is_no_results_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ResultsError):
        ResultsFile(path, MACHINE)
    assert path.read_text() == text


def test_a_command_tells_no_folders_of_this_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [str(ROOT / "bench" / "x.py"), "-k", "a/b", "--out", "/data/me/out", "../me/camvid"]
    )
    assert machine.facts(CPU)["command"] == "bench/x.py -k a/b --out out camvid"


def test_name_says_machine_stack_and_type(monkeypatch):
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(machine, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert machine.results_name(torch.device("cuda"), torch.bfloat16) == "h200_torch2.11_triton3.6_bf16.json"


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def test_input_sets_outgrow_the_cache_unless_a_call_takes_long():
    assert timing.n_sets(1, 100, seconds=1e-3) == timing.MAX_SETS
    assert timing.n_sets(10, 100, seconds=1e-3) == 20
    assert timing.n_sets(40, 100, seconds=1e-3) == 5
    assert timing.n_sets(1000, 100, seconds=1e-3) == 2
    assert timing.n_sets(10, 100, seconds=1.0) == 2


def test_rotation_takes_the_next_inputs_each_time():
    seen = []
    run = timing.Rotation(seen.append, [(i,) for i in range(3)], calls=2)
    run(), run()
    assert seen == [0, 1, 2, 0]


def test_clock_gives_seconds_a_call():
    clock = timing.Clock()
    clock.reset("wall", calls=10)
    start = clock()
    time.sleep(0.05)
    assert 0.005 <= clock() - start < 0.05


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_sees_what_is_freed_again():
    found = timing.peak_bytes(lambda: torch.ones(100 << 20, dtype=torch.uint8).max(), CPU)
    assert 95 << 20 < found < 200 << 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_ours_is_without_the_logits():
    shape = Shape("X", 32, 512, 1)
    logits = 150 * 512 * 512 * 4
    pixels = models.images(shape, CPU)
    peaks = {}
    for provider in ("eager", "pruned"):
        run = models.labels_of(models.build(shape, CPU), provider, torch.float32)
        run(pixels)
        peaks[provider] = timing.peak_bytes(lambda run=run: run(pixels), CPU)
    assert peaks["eager"] > logits and peaks["pruned"] < logits / 2


# ---------------------------------------------------------------------------------------------------------------------
# Providers and waterfall


def test_operators_are_put_back():
    model = models.build(SHAPE, CPU)
    before = model.decoder.ops
    with providers.using(model, providers.PUBLISHED):
        assert model.impl == "published" and model.decoder.ops is providers.PUBLISHED
    assert model.decoder.ops is before


def test_levels_of_a_training_step():
    pytest.importorskip("triton")
    for provider, level in (("triton", 1), ("triton-0", 0), ("triton-3", 3), ("eager", 1)):
        step = models.TrainStep(models.build(SHAPE, CPU), provider, torch.float32)
        blocks = [module for module in step.model.modules() if isinstance(module, Block)]
        assert {block.recompute for block in blocks} == {level}
        assert {block.ops.name for block in blocks} == {providers.computing(provider)}
    assert "triton-2" in models.STEP_PROVIDERS and "triton-2" not in models.MODEL_PROVIDERS


def test_each_step_adds_one_technique(monkeypatch):
    monkeypatch.setattr(waterfall, "why_not", lambda adds, device: None)
    on = [waterfall.features(i, CPU) for i in range(len(waterfall.STEPS))]
    for i in range(1, len(on)):
        if "compile" not in on[i - 1]:
            assert on[i] - on[i - 1] == {waterfall.STEPS[i].adds} and on[i - 1] <= on[i]
    assert [i for i, features in enumerate(on) if "compile" in features] == [3]
    assert on[-1] >= {"half", "sdpa", "attention", "mlp", "mask_head", "labels", "pixels", "graph"}


def test_steps_without_a_gpu():
    on = waterfall.features(7, CPU)
    assert "labels" in on and "sdpa" in on and not {"attention", "mlp", "mask_head", "compile"} & on
    with pytest.raises(providers.Unavailable, match="need"):
        waterfall.features(8, CPU)
    assert waterfall.operators(on).windows_argmax is providers.EAGER.windows_argmax
    assert waterfall.operators(frozenset()) is providers.PUBLISHED


def test_kernels_of_each_step():
    pytest.importorskip("triton")
    kernels = providers.operators("triton")
    ops = waterfall.operators(frozenset({"sdpa", "attention", "mlp"}))
    assert ops.attention is kernels.attention and ops.layernorm_mlp is kernels.layernorm_mlp
    assert ops.mask_head is providers.EAGER.mask_head


def test_quality_counts_agreement(monkeypatch):
    images = [torch.zeros(4, 5, 3).numpy()]
    monkeypatch.setattr(waterfall, "examples", lambda: iter(images))
    exact = torch.zeros(4, 5, dtype=torch.long)
    other = exact.clone()
    other[0] = 1
    found = waterfall.quality(lambda im: other, lambda im: exact, None, 1)
    assert found == {"agreement": 0.75, "miou": None, "miou_pictures": 0}


def test_quality_of_the_shipped_model_on_images_with_labels(tmp_path):
    from PIL import Image

    for part, suffix in (("images", "png"), ("annotations", "png")):
        folder = tmp_path / part / "test"
        folder.mkdir(parents=True)
        mode = torch.randint(0, 255, (48, 64, 3)) if part == "images" else torch.full((48, 64), 11)
        if part == "annotations":
            mode[:24] = 3
        Image.fromarray(mode.to(torch.uint8).numpy()).save(folder / f"a.{suffix}")
    run = lambda im: torch.full(im.shape[:2], 3)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waterfall, "examples", lambda: iter([torch.zeros(2, 2, 3).numpy()]))
        found = waterfall.quality(run, run, tmp_path, 1)
    assert found == {"agreement": 1.0, "miou": 100.0, "miou_pictures": 1}  # 11 is no class
    with pytest.raises(FileNotFoundError, match="has no images"):
        next(waterfall.camvid_test(tmp_path / "nothing", 1))


def test_operations_of_peers_include_attention_on_a_cpu():
    q = torch.randn(1, 2, 10, 16)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert bench_peers.count(lambda x: attend(x, x, x), q) == 4 * 2 * 10 * 10 * 16
    assert bench_peers.count(torch.nn.Linear(16, 3), q) == 2 * 20 * 16 * 3
