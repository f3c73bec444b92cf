"""Mutated files of every format: a few of each here, `--fuzz N` for more, `python -m tests.fuzz` for the table."""

import os
import random
import time
from pathlib import Path

import pytest

from segmenter.errors import InputError
from tests import fuzz
from tests.fuzz import Finding, Format
from tests.support.fuzz_formats import FORMATS

limits = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="processes are forked, limits are Linux's")


@limits
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_mutated_files_are_refused_as_documented(form, tmp_path, request):
    cases = range(request.config.getoption("--fuzz"))
    counts, findings = fuzz.run(form, cases, tmp_path)
    assert not findings, "\n".join(map(str, findings))
    assert sum(counts.values()) == len(cases)
    assert counts["refused"] > len(cases) / 10, "the files are really damaged"
    assert not form.summed or counts["other"] == 0


def refuse() -> None:
    raise InputError("no such thing")


BEHAVIOUR = {
    "refused": refuse,
    "same": lambda: "written",
    "other": lambda: "something else",
    "silent": lambda: "implausible",
    "hung": lambda: time.sleep(60),
    "crashed": os.abort,
    "memory": lambda: bytearray(1 << 42),
    "wrong exception": lambda: {}["key"],
}


def toy(ends: list[str], summed: bool = False) -> Format:
    """A format that is first read as it was written, and then as the list says, file by file."""

    def load(directory: Path) -> object:
        with open(directory / "reads", "ab", buffering=0) as reads:
            reads.write(b".")
            return BEHAVIOUR[["same", *ends][reads.tell() - 1]]()

    def write(directory: Path) -> None:
        (directory / "a").write_bytes(b"content")

    return Format("toy", "a", write, load, (InputError,), summed=summed, plausible=lambda r: r != "implausible")


@limits
def test_each_way_to_fail_is_found_and_the_next_case_goes_on(tmp_path):
    counts, findings = fuzz.run(toy(list(BEHAVIOUR)), range(10, 10 + len(BEHAVIOUR)), tmp_path, seconds=1)
    assert counts == dict.fromkeys(BEHAVIOUR, 1)
    wrong = [(10 + i, end) for i, end in enumerate(BEHAVIOUR) if end not in fuzz.HARMLESS]
    assert [(finding.case, finding.kind) for finding in findings] == wrong
    assert str(findings[-1]).startswith("wrong exception: toy --start 17: KeyError")


@limits
def test_other_content_is_a_finding_where_there_are_checksums(tmp_path):
    _, findings = fuzz.run(toy(["other"], summed=True), range(7, 8), tmp_path)
    assert findings == [Finding("toy", 7, "silent", "other content")]


def test_messages_that_cannot_be_printed_are_findings():
    class Unescaped(InputError):
        def __str__(self):
            return "a\x1b[31m"

    assert fuzz._verdict(toy([]), InputError("a\x1b[31m"))[0] == "refused", "its message is escaped"
    assert fuzz._verdict(toy([]), InputError(""))[0] == "wrong exception"
    assert fuzz._verdict(toy([]), Unescaped("a"))[0] == "wrong exception"


def test_a_lack_of_memory_is_found_behind_the_documented_exception():
    error = InputError("damaged")
    error.__cause__ = MemoryError()
    assert fuzz._verdict(toy([]), error)[0] == "memory"


def test_a_number_is_a_file():
    content = bytes(range(256)) * 8 + b"a number 12 and text"
    files = [fuzz.case_content(FORMATS[0], content, case) for case in range(200)]
    assert files == [fuzz.case_content(FORMATS[0], content, case) for case in range(200)]
    assert len(set(files)) > 190


@pytest.mark.parametrize("mutation", fuzz.MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_changes_most_files_and_takes_empty_ones(mutation):
    content = bytes(range(256)) * 8 + b"a number 12 and text"
    changed = 0
    for seed in range(50):
        data = bytearray(content)
        mutation(data, random.Random(seed), (b"token",))
        changed += data != content
        mutation(bytearray(), random.Random(seed), ())
    assert changed > 35


def test_the_table_has_every_format_and_their_sum():
    table = fuzz.table({"a": fuzz.Counter(refused=3, hung=1), "b": fuzz.Counter(same=2)}).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["a", "4", "3", "0", "0", "0", "1", "0", "0", "0"],
        ["b", "2", "0", "2", "0", "0", "0", "0", "0", "0"],
        ["all", "6", "3", "2", "0", "0", "1", "0", "0", "0"],
    ]
