"""Hundreds of random configurations over all kernels, and of their gradients; see tests/random_cases.py.

`--cases N` and `--backward-cases N` for more.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segmenter.kernels import attention, layernorm
from tests import random_cases

BATCH = 40


def pytest_generate_tests(metafunc):
    if "first" in metafunc.fixturenames:
        of_gradients = metafunc.definition.originalname == "test_random_cases_of_gradients"
        firsts = range(0, metafunc.config.getoption("--backward-cases" if of_gradients else "--cases"), BATCH)
        metafunc.parametrize("first", [pytest.param(i, marks=[pytest.mark.more] if i else []) for i in firsts])


def test_random_cases(first, request):
    count = min(BATCH, request.config.getoption("--cases") - first)
    found = random_cases.failures(first, count, families=random_cases.FORWARD)
    assert not found, f"{len(found)} of {count} cases fail\n\n" + "\n\n".join(found)


def test_random_cases_of_gradients(first, request):
    count = min(BATCH, request.config.getoption("--backward-cases") - first)
    found = random_cases.failures(first, count, families=random_cases.BACKWARD)
    assert not found, f"{len(found)} of {count} cases fail\n\n" + "\n\n".join(found)


def test_every_family_takes_its_turn():
    ops = [random_cases.numbered(i) for i in range(3 * len(random_cases.FAMILIES))]
    assert len(set(ops)) == len(ops) and {op for op, _ in ops} == set(random_cases.FAMILIES)


def test_a_seed_gives_the_same_case_again():
    for op, family in random_cases.FAMILIES.items():
        cases = [family(random_cases.Draw(op, 11)) for _ in range(2)]
        assert cases[0].what == cases[1].what
        for a, b in zip(cases[0].args, cases[1].args, strict=True):
            assert (a is None and b is None) or (a.stride() == b.stride() and torch.equal(a, b))
        assert cases[0].what != family(random_cases.Draw(op, 12)).what


@pytest.mark.parametrize("what", ["wrong", "written outside", "input changed"])
def test_a_failure_says_how_to_run_it_again(monkeypatch, what):
    original = layernorm.layernorm

    def broken(x, *args):
        if what == "written outside":
            x.as_strided((1,), (1,), x.storage_offset() - 1).fill_(0)
        elif what == "input changed":
            x.view(-1)[:1].fill_(7) if x.is_contiguous() else x.flatten(0, -2)[0, :1].fill_(7)
        y = original(x, *args)
        return y * 1.01 if what == "wrong" else y

    monkeypatch.setattr(layernorm, "layernorm", broken)
    found = [m for m in random_cases.failures(0, 8, "layernorm") if "--op layernorm --seed" in m]
    assert len(found) == 8, found
    op, seed = re.search(r"python -m tests.random_cases --op (\w+) --seed (\d+)", found[3]).groups()
    with pytest.raises(AssertionError, match=f"--seed {seed}"):
        random_cases.run_case(op, int(seed))


def test_a_dropped_key_is_found(monkeypatch):
    original = attention._run

    def broken(q, k, v, *args, **kwargs):
        return (
            original(q, k[:, :-1], v[:, :-1], *args, **kwargs) if k.shape[1] > 1 else original(q, k, v, *args, **kwargs)
        )

    monkeypatch.setattr(attention, "_run", broken)
    assert len(random_cases.failures(0, 10, "cross_attention")) >= 8


def test_command_line():
    command = [sys.executable, "-m", "tests.random_cases", "--op", "layernorm", "--seed", "3"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout == "1 of 1 cases right\n", result.stderr
