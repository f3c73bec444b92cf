"""What compiles before the tests on a GPU: every test once, kernels together, and nothing that blocks the tests."""

from tests.gpu.conftest import compile_first, shares

NAMES = [f"a.py::test_{f}[{i}]" for f, n in (("x", 5), ("y", 3), ("z", 1)) for i in range(n)] + ["b.py::test_w"]


def test_every_test_once_and_the_cases_of_one_function_together():
    for processes in (1, 2, 3, 9):
        found = shares(NAMES, processes)
        assert sorted(sum(found, [])) == sorted(NAMES) and len(found) == min(processes, 4)
        for share in found:
            functions = {name.partition("[")[0] for name in share}
            assert sorted(share) == sorted(n for n in NAMES if n.partition("[")[0] in functions)
    assert [len(share) for share in shares(NAMES, 2)] == [5, 5]


def test_what_fails_or_hangs_blocks_nothing(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--compile-first', type=int)\n"
    )
    (tmp_path / "test_them.py").write_text(
        "import pathlib, time\n"
        "def test_good():\n    pathlib.Path('good').touch()\n"
        "def test_bad():\n    pathlib.Path('bad').touch(); 1 / 0\n"
        "def test_long():\n    pathlib.Path('long').touch(); time.sleep(100)\n"
    )
    names = [["test_them.py::test_good"], ["test_them.py::test_bad"], ["test_them.py::test_long"]]
    said = compile_first(names, tmp_path, limit=20.0)
    assert said.endswith("2 of 3 processes ended by themselves")
    assert all((tmp_path / name).exists() for name in ("good", "bad", "long"))
