"""`python -m bench.run_all`: the steps of a run, its time, and what a failed test keeps from being timed."""

import subprocess
import time

import pytest
import torch

from bench import encoders, gradients, harness, machine, maps, operations, providers, run_all, timing
from bench import steps as steps_module
from bench.results import ResultsFile, load
from tests.bench.test_harness import CPU, MACHINE, row


class Steps:
    """Stands for subprocess.run: notes the commands, and answers with exit codes by a word of the command."""

    def __init__(self, **codes):
        self.codes, self.commands, self.printed = codes, [], ""

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        kwargs["stdout"].write(f"the step's output\n{self.printed}")
        code = next((code for word, code in self.codes.items() if word in " ".join(command)), 0)
        if code is None:
            raise subprocess.TimeoutExpired(command, kwargs["timeout"])
        return subprocess.CompletedProcess(command, code)


def run_with(monkeypatch, tmp_path, steps, minutes="9", device="cpu"):
    monkeypatch.setattr(steps_module.subprocess, "run", steps)
    monkeypatch.setattr(machine, "facts", lambda device: MACHINE)
    monkeypatch.setattr(machine, "results_name", lambda device, dtype: "r.json")
    return run_all.main(["--out", str(tmp_path), "--minutes", minutes, "--device", device])


def test_run_all_goes_through_its_steps(monkeypatch, tmp_path, capsys):
    steps = Steps()
    assert run_with(monkeypatch, tmp_path, steps) == 0
    words = [" ".join(command) for command in steps.commands]
    assert "--benchmark-disable" in words[0] and "--compile-first" not in words[0]  # nothing compiles on a CPU
    assert "--sweep core" in words[1] and "profile_long" in words[2]
    deadline = float(steps.commands[1][steps.commands[1].index("--deadline") + 1])
    assert time.time() + 300 < deadline < time.time() + 540
    content = load(tmp_path / "r.json")
    assert [step["name"] for step in content["steps"]] == ["gate", "core", "long"] and content["complete"]
    assert "0 rows" in capsys.readouterr().out


def test_nothing_is_timed_on_a_red_gate(monkeypatch, tmp_path, capsys):
    steps = Steps(**{"--benchmark-disable": 1})
    assert run_with(monkeypatch, tmp_path, steps) == 1
    assert len(steps.commands) == 1
    captured = capsys.readouterr()
    assert "nothing is timed" in captured.err and "the step's output" in captured.out
    assert not load(tmp_path / "r.json")["complete"]


def test_operations_that_fail_their_tests_are_not_timed_and_all_else_is(monkeypatch, tmp_path, capsys):
    """On a GPU, where the tests are those of tests/gpu; and pytest's --failed makes rows of them unavailable."""
    steps = Steps(**{"tests/gpu": 1})
    steps.printed = (
        "tests/gpu/test_layers_on_gpu.py F\n"
        "FAILED tests/gpu/test_labels_on_gpu.py::test_noise[512-float16] - AssertionError: 3 labels\n"
        "FAILED tests/gpu/test_labels_on_gpu.py::test_ties - AssertionError\n"
        "ERROR tests/gpu/test_captured_on_gpu.py::test_memory - RuntimeError: FAILED\n"
    )
    assert run_with(monkeypatch, tmp_path, steps, device="cuda") == 0
    gate, core, long, full = steps.commands
    assert "-x" not in gate and "--failed" not in long
    assert 60 < float(gate[gate.index("--compile-first") + 1]) < 0.2 * 9 * 60  # half of its share of 9 minutes
    for command in (core, full):
        at = command.index("--failed")
        assert command[at + 1 :] == ["masks-to-labels", "noise-to-labels"]
    said = "tests failed: test_labels_on_gpu, test_captured_on_gpu; not timed: masks-to-labels, noise-to-labels"
    content = load(tmp_path / "r.json")
    assert said in capsys.readouterr().err and content["steps"][0]["state"] == said and not content["complete"]


def test_tests_that_did_not_run_let_nothing_be_timed(monkeypatch, tmp_path, capsys):
    steps = Steps(**{"tests/gpu": 4})
    assert run_with(monkeypatch, tmp_path, steps, device="cuda") == 1
    assert len(steps.commands) == 1 and "nothing is timed" in capsys.readouterr().err


def test_every_operation_has_tests_on_a_gpu():
    tested = {kind for kinds in run_all.OPERATIONS.values() for kind in kinds}
    modules = (encoders, gradients, maps, operations)
    known = [value for module in modules for value in vars(module).values()]
    assert tested == {o.kind for o in known if isinstance(o, operations.Operation)}
    for file in run_all.OPERATIONS:
        assert (machine.ROOT / "tests" / "gpu" / f"{file}.py").exists()


def test_rows_of_failed_operations_are_unavailable(tmp_path, monkeypatch):
    file = ResultsFile(tmp_path / "r.json", MACHINE)
    h = harness.Harness(CPU, torch.float32, False, file, 0.1, float("inf"), failed=("attention",))
    monkeypatch.setattr(providers, "require", lambda *args, **kwargs: None)
    built = []
    for kind, provider in (("attention", "triton"), ("attention", "eager"), ("mask-head", "triton")):
        name = f"{kind} {provider}"
        with pytest.raises(pytest.skip.Exception):
            h.run(None, harness.Row(kind, provider, None, lambda: pytest.skip(built.append(1) or "built"), name=name))
    assert len(built) == 2
    (entry,) = file.content["unavailable"]
    assert entry["name"] == "attention triton" and "failed the tests" in entry["reason"]


def test_a_gate_without_time_is_said_and_the_rows_have_their_own(monkeypatch, tmp_path, capsys):
    assert run_with(monkeypatch, tmp_path, Steps(**{"--benchmark-disable": None})) == 0
    assert "each row is checked by itself" in capsys.readouterr().err
    assert not load(tmp_path / "r.json")["complete"]


def test_a_second_call_goes_on(monkeypatch, tmp_path):
    assert run_with(monkeypatch, tmp_path, Steps()) == 0
    again = Steps()
    assert run_with(monkeypatch, tmp_path, again) == 0
    assert not any("--benchmark-disable" in " ".join(command) for command in again.commands)  # the gate was passed


def test_another_commit_is_refused_before_anything_runs(monkeypatch, tmp_path, capsys):
    ResultsFile(tmp_path / "r.json", {**MACHINE, "commit": "other"}).add(row("a", 1.0))
    steps = Steps()
    assert run_with(monkeypatch, tmp_path, steps) == 1
    assert not steps.commands and "name another file" in capsys.readouterr().err


def test_a_step_that_hangs_does_not_lose_the_others(monkeypatch, tmp_path):
    steps = Steps(core=None)
    assert run_with(monkeypatch, tmp_path, steps) == 0
    content = load(tmp_path / "r.json")
    assert content["steps"][1]["state"] == "stopped: out of time" and not content["complete"]
    assert len(steps.commands) == 3


def test_points_of_long_sequences_join_the_results(tmp_path):
    file = ResultsFile(tmp_path / "r.json", MACHINE)
    file.content["ceilings"] = timing.Ceilings("float32", 1e12, 1e10, 0.0, 0.0)._asdict()
    (tmp_path / "scaling.csv").write_text(
        "provider,tokens,size,ms,spread_percent,peak_mib,reason\n"
        "eager,257,128,50,2,10.5,\neager,16385,1024,,,,out of memory\n"
    )
    run_all.add_long_rows(file, tmp_path / "scaling.csv", "cpu", "fp32")
    content = load(tmp_path / "r.json")
    (measured,), (failed,) = content["benchmarks"], content["unavailable"]
    info = measured["extra_info"]
    assert info["tokens"] == 257 and info["peak_bytes"] == 10.5 * 2**20 and info["model"] == "Seg-T-Mask/8"
    assert measured["stats"] == pytest.approx({"median": 0.05, "q1": 0.049, "q3": 0.051, "iqr": 0.002})
    assert info["tflops"] == pytest.approx(info["flops"] / 0.05 / 1e12)
    assert failed["reason"] == "out of memory" and failed["shape"]["size"] == 1024


def test_without_time_steps_are_not_started(monkeypatch, tmp_path):
    steps = Steps()
    assert run_with(monkeypatch, tmp_path, steps, minutes="0.8") == 0
    assert [s["state"] for s in load(tmp_path / "r.json")["steps"][1:]] == ["not started: out of time"] * 2
