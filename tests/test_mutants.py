"""The list of planted bugs (tests/mutants) stays plantable; killing them all takes long: `make mutants`."""

from pathlib import Path

import pytest

from tests.mutants.__main__ import plant, report, try_mutant
from tests.mutants.planted import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent


def test_there_are_enough_and_their_names_differ():
    assert len(MUTANTS) >= 60
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_every_edit_fits_exactly_once(mutant, tmp_path):
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    (tmp_path / mutant.file).write_text((ROOT / mutant.file).read_text())
    plant(mutant, tmp_path)
    assert (tmp_path / mutant.file).read_text() != (ROOT / mutant.file).read_text()
    compile((tmp_path / mutant.file).read_text(), mutant.file, "exec")
    assert all((ROOT / test).is_file() for test in mutant.tests)


def test_edits_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "file.py").write_text("x = 1\nx = 1\n")
    for old in ("x = 1", "y"):
        with pytest.raises(ValueError, match="occurs"):
            plant(Mutant("bad", "file.py", old, "z", ()), tmp_path)


@pytest.mark.more
def test_a_bug_is_found_and_its_absence_passes():
    """The machinery itself, on the definition of a GELU and the quickest test of it."""
    pytest.importorskip("triton")
    tests = ("tests/kernels/test_reference.py",)
    bug = Mutant("no_gelu", "kernels/reference.py", "    h = F.gelu(h, ", "    h = (lambda h, **_: h)(h, ", tests)
    assert try_mutant(None, tests)[0] == 0
    assert try_mutant(bug, tests)[0] == 1


def test_report_counts(capsys):
    from tests.mutants.__main__ import Outcome

    mutant, explained = Mutant("a", "f", "x", "y", ()), Mutant("b", "f", "x", "y", (), "mathematically the same")
    assert report([Outcome(mutant, True, "test", 1.0)] * 40 + [Outcome(explained, False, "survived", 1.0)]) == 0
    assert report([Outcome(mutant, False, "survived", 1.0)] + [Outcome(mutant, True, "t", 1.0)] * 40) == 1
    assert report([Outcome(explained, False, "survived", 1.0)] * 3 + [Outcome(mutant, True, "t", 1.0)] * 30) == 1
    assert "40 of 41 mutants killed" in capsys.readouterr().out
