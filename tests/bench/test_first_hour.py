"""`python -m bench.first_hour`: its steps, what a second call does, what a failure costs; and the repeats."""

import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="configurations of kernels are repeated")

from bench import first_hour, machine, repeats, steps, timing
from bench.harness import OUT_OF_TIME
from bench.results import ResultsFile, load
from tests.bench.test_harness import MACHINE
from tests.bench.test_run_all import Steps

ORDER = ["ceilings", "parity", "golden", "repeats", "memcheck", "racecheck", "attention", "block", "models",
         "waterfall", "peers", "long", "tuning"]  # fmt: skip
ROOFS = timing.Ceilings("float32", 1e12, 1e10, 0.0, 0.0)


@pytest.fixture
def hour(monkeypatch, tmp_path):
    """(answers of the steps, minutes) -> the states after a call as on a card, with a compute-sanitizer."""
    monkeypatch.setattr(machine, "facts", lambda device: MACHINE)
    monkeypatch.setattr(machine, "results_name", lambda device, dtype: "r.json")
    monkeypatch.setattr(timing, "measure_ceilings", lambda *args, **kwargs: ROOFS)
    monkeypatch.setattr(timing, "release", lambda device: None)
    monkeypatch.setattr(first_hour.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(first_hour, "sanitizer", lambda: "/bin/compute-sanitizer")
    reports = []
    monkeypatch.setattr(first_hour.report, "main", lambda arguments: reports.append(arguments))

    def call(answers, minutes="9"):
        monkeypatch.setattr(steps.subprocess, "run", answers)
        assert first_hour.main(["--out", str(tmp_path), "--minutes", minutes]) == 0
        return {step["name"]: step["state"] for step in load(tmp_path / "r.json")["steps"]}

    call.reports = reports
    return call


def test_steps_run_in_order_and_are_not_run_twice(hour, tmp_path, capsys):
    answers, again = Steps(), Steps()
    states = hour(answers)
    assert list(states) == ORDER and set(states.values()) == {"done"} and len(answers.commands) == 12
    content = load(tmp_path / "r.json")
    assert content["complete"] and content["ceilings"] == ROOFS._asdict() and not content["rehearsal"]
    assert len(hour.reports) == len(ORDER)
    assert not {steps.MINUTES, steps.DEADLINE} & {part for command in answers.commands for part in command}
    assert "--minutes 9" in capsys.readouterr().out.splitlines()[-1]
    hour(again)
    assert not again.commands and "all is done" in capsys.readouterr().out


def test_what_is_cut_short_goes_on_and_what_failed_comes_last(hour):
    answers = Steps(**{"bench_attention": 0, "check.py": 1, "memcheck": first_hour.FOUND, "bench_peers and": None})
    answers.codes["bench.repeats"] = repeats.OUT_OF_TIME
    answers.printed = f"SKIPPED x: {OUT_OF_TIME}\n"
    states = hour(answers)
    assert states["attention"] == states["repeats"] == states["tuning"] == first_hour.CUT_SHORT
    assert states["peers"] == steps.OUT_OF_TIME and states["golden"] == "failed with exit status 1"
    assert states["memcheck"] == "found errors: see memcheck.log" and len(answers.commands) == 12
    again = Steps()
    assert set(hour(again).values()) == {"done"}
    words = [" ".join(command) for command in again.commands]
    assert "check.py" in words[-2] and "memcheck" in words[-1] and len(words) == 12


def test_failed_operations_are_not_timed(hour):
    answers = Steps(**{"tests/gpu": 1})
    answers.printed = "FAILED tests/gpu/test_labels_on_gpu.py::test_ties - AssertionError\n"
    assert hour(answers)["parity"].startswith("tests failed: test_labels_on_gpu")
    timed = [command for command in answers.commands if "--missing" in command]
    assert len(timed) == 5 and all(c[-3:] == ["--failed", "masks-to-labels", "noise-to-labels"] for c in timed)


def test_a_kill_leaves_whole_files_and_the_step_is_run_again(hour, tmp_path):
    class Killed(Steps):
        def __call__(self, command, **kwargs):
            if "check.py" in " ".join(command):
                raise KeyboardInterrupt
            return super().__call__(command, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        hour(Killed())
    kept = {step["name"]: step["state"] for step in load(tmp_path / "r.json")["steps"]}
    assert kept == {"ceilings": "done", "parity": "done", "golden": first_hour.BEGUN}
    again = Steps()
    assert set(hour(again).values()) == {"done"} and "check.py" in " ".join(again.commands[0])


def test_without_time_nothing_is_started(hour):
    answers = Steps()
    assert set(hour(answers, minutes="0.8").values()) == {steps.NOT_STARTED} and not answers.commands


def test_the_sanitizer_of_the_wheel_is_found_beside_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(first_hour, "SANITIZER", (f"{tmp_path}/**/compute-sanitizer",))
    monkeypatch.setenv("PATH", "")
    (tmp_path / "a" / "compute-sanitizer").mkdir(parents=True)
    assert first_hour.sanitizer() is None
    program = tmp_path / "b" / "compute-sanitizer"
    program.parent.mkdir()
    program.touch(0o755)
    assert first_hour.sanitizer() == str(program)


def test_a_missing_sanitizer_is_named_and_costs_nothing(hour, monkeypatch):
    monkeypatch.setattr(first_hour, "sanitizer", lambda: None)
    answers = Steps()
    states = hour(answers)
    assert states["memcheck"] == states["racecheck"] == first_hour.ABSENT and len(answers.commands) == 10


def test_another_commit_is_refused(hour, tmp_path, monkeypatch, capsys):
    ResultsFile(tmp_path / "r.json", {**MACHINE, "commit": "other"}).save()
    monkeypatch.setattr(steps.subprocess, "run", subprocess.run)
    assert first_hour.main(["--out", str(tmp_path)]) == 1 and "name another file" in capsys.readouterr().err


def test_a_rehearsal_is_a_folder_of_its_own_and_has_the_same_steps(tmp_path):
    assert [step.name for step in first_hour.plan(tmp_path, True)] == ORDER
    assert all(step.reason for step in first_hour.plan(tmp_path, True) if "check" in step.name)


def test_the_report_is_made_of_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "facts", lambda device: MACHINE)
    hour = first_hour.Hour(tmp_path, True, 0.0)
    hour.todo = hour.todo[:1]
    hour.run()
    text = (tmp_path / "tables.md").read_text()
    assert (tmp_path / "report.html").exists() and "Not measured (whole models)" in text
    assert text.startswith("# Rehearsal")


# ---------------------------------------------------------------------------------------------------------------------
# Repeats


def test_repeats_find_an_operator_that_differs_once():
    calls = []

    def planted(x):
        calls.append(1)
        return x + (torch.finfo(x.dtype).eps if len(calls) == 7 else 0)

    x = torch.ones(3, 5)
    assert repeats.differing(planted, (x,), 20) == 1 and len(calls) == 21
    assert repeats.differing(lambda x: x * torch.nan, (x,), 5) == 0  # the same bits, though NaN is not NaN


@pytest.mark.more
def test_repeats_keep_what_was_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(repeats.launch, "INTERPRETED", True)
    monkeypatch.setattr(machine, "facts", lambda device: MACHINE)
    looked_at = []

    def found(bucket, times, device):
        looked_at.append(bucket.name)
        return "differs" if len(looked_at) == 2 else ""

    monkeypatch.setattr(repeats, "found", found)
    command = ["--out", str(tmp_path), "--interpret", "--tiny", "--op", "layernorm", "--times", "3"]
    assert repeats.main([*command, "--deadline", "0"]) == repeats.OUT_OF_TIME and not looked_at
    assert repeats.main(command) == 1 and "1 wrong" in capsys.readouterr().out
    count = len(looked_at)
    assert repeats.main(command) == 0 and len(looked_at) == count + 1 and looked_at[-1] == looked_at[1]
