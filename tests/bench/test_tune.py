"""`python -m bench.tune`: what is tried, what is refused, what wins, and that the package stays as it is."""

import ast
import concurrent.futures
import dataclasses
import math
import os
import time

import pytest
import torch

pytest.importorskip("triton", reason="configurations of kernels are tuned")

from bench import machine, repeats, timing, tune
from bench.compile.report import Kernel
from bench.results import ResultsFile, load
from bench.tuning import measure, workers
from bench.tuning.buckets import GRIDS, buckets, candidates
from bench.tuning.verdict import judge, reason, row_text, written
from segmenter.kernels import configs, launch
from segmenter.kernels.configs import SHARED_MEMORY
from segmenter.kernels.configs_backward import TABLES
from tests.bench.test_harness import MACHINE
from tests.support import crashes

GOOD = Kernel("attention", "sm_90", "bf16", "highest", "n=257", registers=168, shared=50_000, programs_per_sm=2,
              shared_limit=SHARED_MEMORY["sm_90"], tensor_core="wgmma.mma_async", has_dot=True)  # fmt: skip
ROOFS = {"dtype": "bfloat16", "flops_per_second": 1e14, "bytes_per_second": 1e12, "flops_spread": 0.0,
         "bytes_spread": 0.0}  # fmt: skip
CPU = torch.device("cpu")
RIGHT = {"gate": "right", "error_ratio": 1.0, "rounds": 9, "timing": "graph"}


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """In place of the one of all tests: examples are large, and `measure.poisoned` has to do it."""


def bucket_of(table, architecture="sm_90", match=""):
    return next(b for b in buckets(architecture, "half", [table]) if match in b.name)


# ---------------------------------------------------------------------------------------------------------------------
# What is tried


@pytest.mark.parametrize("table", TABLES)
def test_shipped_rows_lie_on_the_grid(table):
    assert set(GRIDS) == set(TABLES)
    for row in TABLES[table]:
        assert all(getattr(row.config, name) in values for name, values in GRIDS[table].items()), row


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "gfx942"])
@pytest.mark.parametrize("table", ["attention", "upsample_argmax", "layernorm_mlp", "fold"])
def test_candidates_begin_with_the_shipped_one_and_differ(table, architecture):
    for bucket in buckets(architecture, "half", [table]):
        found = candidates(bucket)
        assert found[0] == (0, bucket.row.config) and [steps for steps, _ in found] == sorted(s for s, _ in found)
        assert len({config for _, config in found}) == len(found) > 3
        for _, config in found:
            assert all(getattr(config, name) in values for name, values in GRIDS[table].items())
            launches, at = bucket.launches(config)
            assert launches[at].plan.options["num_warps"] == config.num_warps
        tma = {getattr(config, "descriptors", False) for _, config in found}
        assert architecture == "sm_90" or tma == {False}


def test_what_launches_the_same_is_tried_once():
    """Columns of a chunk beyond what divides the width are cut to it."""
    bucket = dataclasses.replace(bucket_of("mask_head", match="batch=16 n_cls=19"), tiny=True)
    plans = [launches[at].plan for launches, at in (bucket.launches(config) for _, config in candidates(bucket))]
    assert bucket.row.config.block_d == 256 and len({plan.scalars for plan in plans}) > 5
    assert len({(plan.scalars, plan.grid, *plan.options.items()) for plan in plans}) == len(plans)


def test_the_index_of_a_launch_is_that_of_the_table():
    bucket = bucket_of("fold")
    launches, at = bucket.launches(bucket.row.config)
    assert len(launches) == 3 and "fold" in launches[at].plan.kernel.fn.__name__


def test_what_weighs_most_in_a_forward_pass_comes_first():
    names = [bucket.name for bucket in buckets("sm_90", "half")]
    assert names[0].startswith("linear") and len(set(names)) == len(names)
    order = [names.index(f"{name}") for name in (
        "attention sm_90 half n=1025", "layernorm_mlp sm_90 half m=8200 d=192", "mask_head sm_90 half n_cls=150",
        "upsample_argmax sm_90 all n_cls=150", "layernorm sm_90 all n=19",
    )]  # fmt: skip
    assert order == sorted(order)
    assert {bucket.row.kind for bucket in buckets("sm_90", "tf32", ["linear", "layernorm"])} == {"tf32"}


def test_the_package_is_as_it_was_afterwards():
    bucket = bucket_of("layernorm_mlp", match="m=8200")
    other = candidates(bucket)[1][1]
    look_up, before = configs.look_up, configs.mlp("sm_90", 8200)
    with pytest.raises(KeyError), bucket.in_force(other):
        assert configs.mlp("sm_90", 8200) == configs.mlp("sm_90", 99_999) == other
        assert configs.attention("sm_90", 2, 64, 257, "ieee") == configs.AttentionConfig(64, 64, 4, 2, True)
        raise KeyError
    assert configs.look_up is look_up and configs.mlp("sm_90", 8200) == before != other


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared": 240_000}, "240000 bytes of shared memory"),
        ({"serialised": 2}, "2 wgmma one by one"),
        ({"hazards": ["R8 touched"]}, "R8 touched"),
        ({"tensor_core": "none"}, "without tensor cores"),
        ({"programs_per_sm": 0}, "does not fit on a multiprocessor"),
        ({"error": "does not compile: CompilationError"}, "does not compile"),
    ],
)
def test_infeasible(change, said):
    found = measure.infeasible(dataclasses.replace(GOOD, **change), GOOD)
    assert said in found and bool(found) == bool(said)


def test_more_spills_than_the_shipped_one_are_infeasible_where_that_may_spill():
    old = dataclasses.replace(GOOD, architecture="sm_89", tensor_core="mma.sync", spills=16)
    assert measure.infeasible(old, old) == ""
    assert "the shipped one 16" in measure.infeasible(dataclasses.replace(old, spills=20), old)


@pytest.fixture
def layernorm():
    return dataclasses.replace(bucket_of("layernorm", match="n=192"), tiny=True)


def spoiled(monkeypatch, spoil):
    run = launch.Plan.run

    def wrong(self, *tensors):
        run(self, *tensors)
        spoil(tensors[3])

    monkeypatch.setattr(launch.Plan, "run", wrong)


def test_a_right_kernel_is_timed(layernorm):
    found = measure.measured(layernorm, candidates(layernorm)[1][1], "cpu")
    assert found["median"] > 0 and found["timing"] == "wall" and 0 < found["error_ratio"] < 2


def test_an_unwritten_result_is_wrong(layernorm, monkeypatch):
    monkeypatch.setattr(launch.Plan, "run", lambda *args: None)
    empty = torch.empty  # right by chance: what memory held before
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(0.0))
    assert "NaN" in measure.measured(layernorm, layernorm.row.config, "cpu")["wrong"]


def test_an_inexact_result_is_wrong(layernorm, monkeypatch):
    spoiled(monkeypatch, lambda y: y.mul_(1.01))
    assert "error" in measure.measured(layernorm, layernorm.row.config, "cpu")["wrong"]


def test_a_result_that_changes_is_wrong(layernorm, monkeypatch):
    steps = iter([1.0, 1.0, 1.0, 1 + 2**-10])  # the check, two that are timed, and another one

    def last(y):
        if len(y) == 70:  # and not while the example is recorded
            y[0, :1].mul_(next(steps))

    spoiled(monkeypatch, last)
    assert "differ from run to run" in measure.measured(layernorm, layernorm.row.config, "cpu")["wrong"]


def test_on_a_gpu_graphs_over_sets_beyond_the_cache_are_timed_by_events(layernorm, monkeypatch):
    """The graph goes through every set once; an event's time is shared among its calls."""
    called, device, bytes_of = [], torch.device("cuda"), timing.tensor_bytes(measure.inputs(layernorm, 0, CPU))
    sets = [(torch.full((), float(i)),) for i in range(4)]
    monkeypatch.setattr(measure, "_first_set", lambda bucket, device: (measure.inputs(layernorm, 0, CPU), None, None))
    monkeypatch.setattr(measure, "_sets", lambda bucket, device, count: sets[:count])
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 2 * bytes_of)
    monkeypatch.setattr(timing, "wall_seconds", lambda run, device: 0.01)
    monkeypatch.setattr(timing, "graphed", lambda run: run)
    clocks = []

    def clock(mode, calls):
        clocks.append((mode, calls))
        return iter([0.0, 3.0] * 100).__next__

    monkeypatch.setattr(timing, "Clock", clock)
    times, mode = measure._times(layernorm, lambda x: called.append(x.item()), device)
    assert (set(times), mode, clocks) == ({3.0}, "graph", [("events", 4)])
    assert len(times) == 5 and called == [0.0, 1.0, 2.0, 3.0] * 6  # one round to warm up


@pytest.mark.parametrize(("table", "kind"), [("upsample_argmax", "half"), ("queries_argmax", "tf32")])
def test_labels_are_checked_by_their_scores(table, kind):
    bucket = next(b for b in buckets("sm_90", kind, [table]) if "n_cls=150" in b.name)
    bucket = dataclasses.replace(bucket, tiny=True)
    arguments = measure.inputs(bucket, 0, CPU)
    scores, labels = measure.references(bucket, arguments)
    assert scores.shape[1] == 150 and measure.check(bucket, labels, scores, labels)[1] in (0.0, 1.0)
    with pytest.raises(AssertionError, match="less than the best"):
        measure.check(bucket, (labels + 1) % 150, scores, labels)


@pytest.mark.parametrize("table", ["attention", "linear", "pixels_to_tokens", "mask_head", "layernorm_linear", "fold"])
def test_inputs_are_as_the_examples_and_have_references(table):
    bucket = dataclasses.replace(bucket_of(table), tiny=True)
    arguments, (_, like) = measure.inputs(bucket, 0, CPU), bucket.arguments()
    for tensor, value in zip(arguments, like.values(), strict=True):
        if isinstance(value, torch.Tensor):
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (value.shape, value.stride(), value.dtype)
    exact, eager = measure.references(bucket, arguments)
    assert exact.dtype == torch.float64 and exact.isfinite().all() and exact.std() > 0.1
    assert measure.check(bucket, eager, exact, eager)[1] == 1.0


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("attention_delta", ""), ("attention_dkdv", "n=1025 d=32"), ("attention_dq", "n=257"), ("column_sums", ""),
        ("gelu_backward", "m=257"), ("layernorm_backward", "n=192"), ("partial_sums", ""), ("unit_rows", ""),
        ("mask_head_backward", "n_cls=19"), ("patch_weights", ""), ("upsample_cross_entropy", "n_cls=19"),
    ],
)  # fmt: skip
def test_gradients_are_checked_one_by_one(table, match, monkeypatch):
    """Each of them: of several, one that is wrong is as bad as all."""
    bucket = dataclasses.replace(bucket_of(table, match=match), tiny=True)
    found = measure.measured(bucket, bucket.row.config, "cpu")
    assert found["median"] > 0 and found["error_ratio"] < 2
    arguments, exact, eager = measure._first_set(bucket, CPU)
    if isinstance(exact, tuple):
        several = [tensor.clone() for tensor in eager]
        next(t for t in reversed(several) if t.is_floating_point() and t.numel()).view(-1)[-1] += 1.0
        with pytest.raises(AssertionError, match="error"):
            measure.check(bucket, tuple(several), exact, eager)


def test_the_log_sum_exp_is_that_of_the_scores():
    bucket = dataclasses.replace(bucket_of("attention_delta"), tiny=True)
    _, qkv, o, lse, _, heads = measure.inputs(bucket, 0, CPU)
    q, k, _ = qkv.double().view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    torch.testing.assert_close(lse[..., : qkv.shape[1]].double(), scores.logsumexp(-1), rtol=1e-2, atol=1e-2)


def test_repeats_look_at_every_result():
    calls = iter(range(9))
    same, other = torch.ones(3), torch.zeros(2, dtype=torch.int64)
    assert repeats.differing(lambda x: (x, other + next(calls) // 2), (same,), 3) == 2
    assert repeats.differing(lambda x: x, (same,), 3) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What wins


def row(name, steps, *runs):
    return {"name": name, "extra_info": {"steps": steps, "runs": [list(run) for run in runs]}}


SHIPPED = row("shipped", 0, (100e-6, 2e-6), (101e-6, 2e-6))


@pytest.mark.parametrize(
    ("runs", "wins"),
    [
        ([(90e-6, 1e-6), (91e-6, 1e-6)], True),
        ([(97.9e-6, 1e-6), (97.9e-6, 1e-6)], True),
        ([(98.1e-6, 1e-6), (98.1e-6, 1e-6)], False),  # by less than the shipped one's range
        ([(90e-6, 1e-6)], False),  # once may be luck
        ([(90e-6, 1e-6), (99e-6, 1e-6)], False),  # as it was
        ([(90e-6, 11e-6), (90e-6, 1e-6)], False),  # by less than its own range
        ([(110e-6, 0), (110e-6, 0)], False),
    ],
)
def test_a_winner_is_faster_by_more_than_the_spread(runs, wins):
    assert judge([row("other", 1, *runs), SHIPPED, row("slow", 1, (200e-6, 0), (200e-6, 0))]).wins is wins


def test_drift_of_the_shipped_one_is_spread():
    drifting = row("shipped", 0, (100e-6, 1e-6), (120e-6, 1e-6))
    other = row("other", 1, (85e-6, 1e-6), (85e-6, 1e-6))
    found = judge([drifting, other])
    assert not found.wins and math.isclose(found.spread, 20e-6)
    assert judge([SHIPPED]).best is None and not judge([SHIPPED]).wins and judge([other]) is None


@pytest.mark.parametrize(("table", "match"), [("attention", "n=257"), ("fold", ""), ("layernorm", "n=192")])
def test_a_printed_row_is_the_winner(table, match):
    bucket = bucket_of(table, match=match)
    config = candidates(bucket)[-1][1]
    figures = {"percent_of_floor": 71.2, "registers": 168, "shared": 65536, "programs_per_sm": 2}
    best = row(written(config), 1, (90e-6, 1e-6), (91e-6, 1e-6))
    best["extra_info"] |= figures
    why = reason(judge([SHIPPED, best]), 'NVIDIA "H100"', "tune_x.json")
    assert "91.00 us on" in why and "9.0 % less than shipped" in why and "tune_x.json" in why and "168 reg" in why
    text = row_text(bucket, config, why)
    assert all(len(part) <= 120 for part in text.splitlines())
    assert ast.literal_eval(text[text.index('"', text.index("},")) : -2].replace("\n", "")) == why
    (printed,) = eval(text.strip(), vars(configs))
    assert printed == dataclasses.replace(bucket.row, architectures=("sm_90",), config=config, why=why)
    assert bucket.row.fits("sm_90", "half", {"n_keys": 1, "head_pad": 64, "n": 192}) == printed.fits(
        "sm_90", "half", {"n_keys": 1, "head_pad": 64, "n": 192}
    )


# ---------------------------------------------------------------------------------------------------------------------
# The whole


class Machine:
    """Stands for compilers and the device: seconds by configuration, from a clock that each measurement moves on."""

    def __init__(self, monkeypatch, special=None):
        self.special, self.asked, self.now = special or {}, [], 0.0
        monkeypatch.setattr(tune.time, "monotonic", lambda: self.now)

    def compile(self, bucket, config):
        found = self.special.get((bucket.table, config))
        return dataclasses.replace(GOOD, spills=99 if found == "spills" else 0)

    def measure(self, bucket, config):
        self.now += 1.0
        self.asked.append((bucket.table, config))
        found = self.special.get((bucket.table, config), 100e-6 if config == bucket.row.config else 150e-6)
        return {found: "it is"} if isinstance(found, str) else {**RIGHT, "median": found, "iqr": 1e-6}


def tuning_of(tmp_path, machine, seconds=1e9, rehearsal=False):
    file = ResultsFile(tmp_path / "tune_x.json", MACHINE)
    file.content["ceilings"] = ROOFS
    chosen = [bucket_of("layernorm", match="n=192"), bucket_of("upsample_argmax", match="n_cls=300")]
    return tune.Tuning(file, chosen, machine.compile, machine.measure, machine.now + seconds, rehearsal)


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    near = [config for _, config in candidates(bucket_of("layernorm", match="n=192"))]
    special = zip(near[1:5], ("wrong", 50e-6, "spills", "error"), strict=True)
    machine = Machine(monkeypatch, {("layernorm", config): found for config, found in special})
    tuning = tuning_of(tmp_path, machine)
    tuning.run()
    assert ("layernorm", near[3]) not in machine.asked and machine.asked.count(("layernorm", near[2])) == 2
    assert (
        machine.asked[0] == ("layernorm", near[0]) and machine.asked.count(("layernorm", near[0])) == 3
    )  # begin, each end
    text = tune.report_text(tuning)
    assert text.count("Row((") == 1 and written(near[2]) in text[text.index("Row((") :]
    assert f"WRONG, never proposed: layernorm sm_90 all n=192: {written(near[1])}" in text
    assert "ERROR, never proposed" in text and "1 not feasible, 0 not reached" in text
    assert f"WRONG: layernorm sm_90 all n=192: {written(near[1])}: it is" in capsys.readouterr().err
    content = load(tmp_path / "tune_x.json")
    assert content["complete"] and not tuning.broken()
    winner = next(r["extra_info"] for r in content["benchmarks"] if r["name"] == written(near[2]))
    assert winner["registers"] == 168 and winner["error_ratio"] == 1.0 and winner["percent_of_floor"] > 0
    assert winner["runs"] == [[50e-6, 1e-6]] * 2 and winner["config"] == dataclasses.asdict(near[2])


def test_it_stops_in_time_and_goes_on_where_it_ended(tmp_path, monkeypatch):
    machine = Machine(monkeypatch)
    first = tuning_of(tmp_path, machine, seconds=9.5)
    todo = len(first.not_reached())
    first.run()
    assert len(machine.asked) == 10
    # The first bucket's neighbours, then the second's, before anything further away from the first.
    assert [table for table, _ in machine.asked] == ["layernorm"] * 6 + ["upsample_argmax"] * 4
    assert f"not reached: {todo - 9} of" not in (text := tune.report_text(first)) and f"{todo - 9} not reached" in text
    assert not load(tmp_path / "tune_x.json")["complete"]
    before, machine.asked = machine.asked, []
    second = tuning_of(tmp_path, machine)
    assert all(config == b.row.config or (b.table, config) not in before for b, config in second.tasks())
    second.run()
    again = set(before) & set(machine.asked)
    assert all(config in [bucket.row.config for bucket in second.candidates] for _, config in again)
    assert second.not_reached() == [] and load(tmp_path / "tune_x.json")["complete"]
    machine.asked = []
    tuning_of(tmp_path, machine).run()
    assert machine.asked == []


def test_a_shipped_configuration_that_is_wrong_is_no_success(tmp_path, monkeypatch):
    shipped = bucket_of("layernorm", match="n=192").row.config
    machine = Machine(monkeypatch, {("layernorm", shipped): "wrong"})
    tuning = tuning_of(tmp_path, machine)
    tuning.run()
    assert tuning.broken() and [config for table, config in machine.asked if table == "layernorm"] == [shipped]
    assert not load(tmp_path / "tune_x.json")["complete"]


@pytest.mark.parametrize("index", [0, 1])
def test_one_that_is_wrong_the_second_time_is_refused(tmp_path, monkeypatch, index):
    machine = Machine(monkeypatch)
    other = candidates(bucket_of("layernorm", match="n=192"))[index][1]
    machine.special["layernorm", other] = 50e-6
    measure_once = machine.measure

    def measured(bucket, config):
        found = measure_once(bucket, config)
        if config == other:
            machine.special["layernorm", other] = "wrong"
        return found

    machine.measure = measured
    tuning = tuning_of(tmp_path, machine)
    tuning.run()
    assert "Row((" not in tune.report_text(tuning) and len(tuning.refused("wrong")) == 1
    assert tuning.broken() is (index == 0)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Without a GPU it says so; a rehearsal proposes nothing, however fast something is."""
    machine = Machine(monkeypatch)
    monkeypatch.setattr(tune, "Compilers", lambda tasks, jobs, deadline: Stub(machine.compile))
    monkeypatch.setattr(tune, "Device", lambda device, deadline: Stub(machine.measure))
    monkeypatch.setattr(tune.machine, "facts", lambda device: MACHINE)
    assert tune.main(["--out", str(tmp_path)]) == 1 and "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out", str(tmp_path)]) == 1 and "no GPU to tune for" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--out", str(tmp_path), "--arch", "sm_80"])
    options = ["--rehearse", "--arch", "sm_80", "--op", "layernorm", "--match", "n=192", "--out", str(tmp_path)]
    assert tune.main([*options, "--match", "nothing"]) == 1
    machine.special["layernorm", candidates(bucket_of("layernorm", "sm_80", "n=192"))[1][1]] = 50e-6
    assert tune.main(options) == 0
    printed = capsys.readouterr().out
    assert "rehearsal, not a measurement" in printed and "faster" in printed and "Row((" not in printed
    (file,) = tmp_path.glob("tune_rehearsal_half_cpu-*.json")
    assert len(load(file)["benchmarks"]) == tune.REHEARSED and load(file)["complete"]
    machine.special["layernorm", bucket_of("layernorm", match="n=192").row.config] = "wrong"
    file.unlink()
    assert tune.main(options) == 1


class Stub:
    def __init__(self, function):
        self.function = function

    def __call__(self, bucket, config):
        return self.function(bucket, config)

    def run(self, function, *arguments):
        return ROOFS

    def close(self):
        pass


def test_a_process_that_dies_or_hangs_costs_one_configuration(monkeypatch):
    device = workers.Device("cpu", time.monotonic() + 300)
    try:
        with pytest.raises(RuntimeError, match="its process died"):
            device.run(os._exit, 3)
        assert device.run(os.getenv, "TRITON_INTERPRET") == "1"
        first = device.pid
        monkeypatch.setattr(workers, "LIMIT", 0.2)
        with pytest.raises(RuntimeError, match="did not end in 0 s"):
            device.run(time.sleep, 100)
        assert device.pid is None and not os.path.exists(f"/proc/{first}")
        device.deadline = time.monotonic()
        with pytest.raises(workers.OutOfTime):
            device.run(time.sleep, 100)
    finally:
        device.close()


def test_compilers_give_what_is_asked_for_and_survive_a_crash(monkeypatch):
    bucket = bucket_of("layernorm")
    tasks = [(bucket, 0), (bucket, 1), (bucket, 2)]
    monkeypatch.setattr(workers.measure, "compiled", crashes.compiled)
    compilers = workers.Compilers(tasks, 1, time.monotonic() + 300)
    try:
        assert "the compiler's process died" in compilers(*tasks[1]).error
        assert [compilers(*task) for task in (tasks[0], tasks[2])] == ["TRITON_INTERPRET="] * 2
        compilers.futures, compilers.done, compilers.deadline = {tasks[0]: concurrent.futures.Future()}, {}, 0.0
        with pytest.raises(workers.OutOfTime):
            compilers(*tasks[0])
    finally:
        compilers.close()
    assert len(compilers.processes) == 1 and not compilers.processes[0].is_alive()
