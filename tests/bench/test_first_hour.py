"""`python -m bench.first_hour`: its steps, what a later call does, and what repeats find."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="kernels are Triton's")

from bench import first_hour, machine, report, run_all
from bench import steps as steps_module
from bench.results import load
from tests.bench.test_harness import CPU, MACHINE
from tests.bench.test_run_all import Steps


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Calls the command with commands that only note that they ran; a list of the names of those that did."""
    monkeypatch.setattr(machine, "facts", lambda device: MACHINE)
    monkeypatch.setattr(machine, "results_name", lambda device, dtype: "r.json")
    monkeypatch.setattr(first_hour, "sanitizer", lambda: "/usr/bin/compute-sanitizer")
    monkeypatch.setattr(report, "main", lambda arguments: None)

    def run(minutes="9", printed="", **codes):
        steps, names = Steps(**codes), []
        steps.printed = printed
        monkeypatch.setattr(steps_module.subprocess, "run", steps)
        begun = steps_module.run
        monkeypatch.setattr(run_all, "run", lambda step, *a: names.append(step.name) or begun(step, *a))
        code = first_hour.main(["--out", str(tmp_path), "--minutes", minutes, "--device", "cuda"])
        monkeypatch.setattr(run_all, "run", begun)
        return code, names, steps.commands, {e["name"]: e["state"] for e in load(tmp_path / "r.json")["steps"]}

    return run


ALL = ["gate", "golden", "repeats", "memcheck", "racecheck", "core", "long", "tune"]


def test_right_before_fast_before_what_could_be_faster(call):
    code, names, commands, states = call()
    assert code == 0 and names == list(states) == ALL and set(states.values()) == {"done"}
    assert commands[3][:3] == ["/usr/bin/compute-sanitizer", "--tool", "memcheck"]
    assert sys.executable in commands[3] and commands[3][-6:-4] == ["--step", "launches"]
    assert "--deadline" in commands[5] and "--minutes" in commands[7] and "bench.tune" in commands[7]


def test_a_second_call_does_what_is_left(call):
    call(**{"repeats": 1, "memcheck": None})
    _, names, _, states = call()
    assert names == ["repeats", "memcheck", "core", "tune"], "these two go on by themselves"
    assert set(states.values()) == {"done"} and list(states) == ALL


def test_what_fails_blocks_nothing(call):
    code, names, _, states = call(**{"golden": 1, "--tool racecheck": 9, "profile_long": None})
    assert code == 0 and names == ALL
    assert states["golden"] == "failed with exit status 1" and states["racecheck"] == "failed with exit status 9"
    assert states["long"] == "stopped: out of time" and states["tune"] == "done"


def test_tests_that_failed_are_not_run_again_and_their_operations_never_timed(call):
    printed = "FAILED tests/gpu/test_layers_on_gpu.py::test_mlp - AssertionError\n"
    call(printed=printed, **{"tests/gpu": 1})
    _, names, commands, states = call(**{"core": 0})
    assert "gate" not in names and states["gate"].startswith("tests failed: test_layers_on_gpu")
    (core,) = (command for command in commands if "core" in command)
    assert core[core.index("--failed") + 1 :][:2] == ["layernorm-mlp", "mask-head"]


def test_without_a_sanitizer_it_says_so(call, monkeypatch):
    monkeypatch.setattr(first_hour, "sanitizer", lambda: None)
    _, _, commands, states = call()
    assert states["memcheck"] == states["racecheck"] and "compute-sanitizer (it comes with" in states["memcheck"]
    assert len(commands) == len(ALL) - 2


def test_without_time_nothing_is_lost(call):
    call(minutes="0.8")
    _, names, _, states = call()
    assert names == ALL and set(states.values()) == {"done"}


def test_a_rehearsal_has_every_step_and_says_what_it_cannot_show(call, tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(run_all, "measure", lambda args, steps: ran.extend(steps(args)) or 0)
    assert first_hour.main(["--out", str(tmp_path), "--rehearse"]) == 0
    assert [step.name for step in ran] == [name for name in ALL if name != "racecheck"]
    assert all("cuda" not in step.command for step in ran)
    assert "a rehearsal, not a measurement" in capsys.readouterr().out


def test_without_a_gpu_it_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        first_hour.main(["--out", str(tmp_path), "--device", "cpu"])
    assert "--rehearse goes through all of it" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Repeats


def test_results_that_differ_are_counted():
    results = iter([1.0, 1.0, 1.0 + 2**-23, float("nan"), 1.0, -1.0])
    assert first_hour.differing(lambda: torch.tensor([2.0, next(results)]), 5) == 3
    zeros = iter([0.0, -0.0])
    assert first_hour.differing(lambda: torch.tensor([next(zeros)]), 1) == 1, "bit for bit"


def test_every_row_of_an_architecture_is_repeated(monkeypatch, capsys):
    rows = first_hour.shipped("sm_90", tiny=True)
    assert {row.table for row in rows} == {
        "attention", "fold", "layernorm", "layernorm_linear", "layernorm_mlp", "linear", "mask_head",
        "pixels_to_tokens", "upsample_argmax",
    }  # fmt: skip
    assert all(row.tiny for row in rows)
    rows = [next(row for row in rows if row.table == table) for table in ("layernorm", "upsample_argmax")]
    monkeypatch.setattr(first_hour, "shipped", lambda architecture, tiny: rows)
    assert first_hour.each_shipped(CPU, True, 2) == 0
    assert "2 rows, each 3 times: all the same" in capsys.readouterr().out
    launched, count = first_hour.launched, iter(range(100))

    def unsteady(bucket, device):
        run = launched(bucket, device)
        return (lambda: run() + next(count)) if bucket.table == "layernorm" else run

    monkeypatch.setattr(first_hour, "launched", unsteady)
    assert first_hour.each_shipped(CPU, True, 2) == 1
    assert "layernorm sm_90" in (said := capsys.readouterr().out) and "2 of 2 results differ" in said

    def broken(bucket, device):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(first_hour, "launched", broken)
    assert first_hour.each_shipped(CPU, True, 0) == 1
    assert capsys.readouterr().out.count("RuntimeError: CUDA error: an illegal memory access") == 2
