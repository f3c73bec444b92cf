"""The one reader of JSON and YAML: what is plain comes through, all else ends in the caller's exception, soon."""

import json
import os
import socket

import pytest

from segmenter import text_files
from segmenter.errors import InputError, cause, printable
from segmenter.text_files import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NODES,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
)


class Refused(InputError):
    pass


@pytest.fixture
def file(tmp_path):
    def make(content):
        path = tmp_path / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


PLAIN = {"a": [1, -2.5, None, True, "\u00e9\U0001f600"], "b": {"1": {}}}


def test_plain_content_comes_through(file):
    for text in (json.dumps(PLAIN), json.dumps(PLAIN, ensure_ascii=False, indent=1)):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            assert read_json(file(text.encode(encoding)), Refused) == PLAIN
    assert parse_json(json.dumps(PLAIN).encode()) == PLAIN
    text = "a: [1, -2.5, null, true, \u00e9\U0001f600]\nb: {'1': {}}\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert read_yaml(file(text.encode(encoding)), Refused) == PLAIN
    assert read_yaml(file("a: &x [1]\nb: *x"), Refused) == {"a": [1], "b": [1]}
    assert read_yaml(file("day: 2020-01-01\n2020-01-02: no"), Refused) == {"day": "2020-01-01", "2020-01-02": False}
    assert read_yaml(file("a: !!python/tuple [1, 2]"), Refused, tuples=True) == {"a": (1, 2)}
    assert read_yaml(file(""), Refused) is None
    name = "caf\udce9"  # a file name that is not UTF-8
    assert read_json(file(json.dumps([name])), Refused) == [name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("", "is no JSON"),
        (b"\xff\xfa", "is no text in UTF-8"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels deep"),
        ("[" * 400_000, "nested more than"),
        ('{"a":' * 150_000, "nested more than"),
        ("[" + "9" * 101 + "]", "a number of 101 digits"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        ("[NaN]", "the number NaN"),
        ("[-Infinity]", "the number -Infinity"),
        (r'["\ud800"]', "surrogates not allowed"),
        (" " * (MAX_BYTES + 1), f"larger than {MAX_BYTES} bytes"),
    ],
)
def test_json_that_is_refused(file, text, message):
    with pytest.raises(Refused, match=message) as raised:
        read_json(file(text), Refused)
    assert str(raised.value).startswith(f"{file(text)}: ")
    assert "\n" not in str(raised.value)


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no plain YAML"),
        ("a: 1\n--- \nb: 2", "is no plain YAML"),
        ("a: *none", "is no plain YAML"),
        ("[" * 100_000, f"nested more than {MAX_DEPTH} levels deep"),
        ("- " * 100_000, "nested more than"),
        ("a: 1\nb: 2\na: 3", "a key twice"),
        ("1: 2\n0x1: 3", "a key twice"),
        ("&a [*a]", "a value that contains itself"),
        ("a: &x {b: 1}\nc: {<<: *x}", "a merge key"),
        ("? [1, 2]\n: 3", "a sequence as a key, at line 1"),
        ("? {a: 1}\n: 3", "a mapping as a key"),
        ("a: " + "9" * 101, "a number of 101 characters"),
        ("a: !!binary aaaa", "could not determine a constructor"),
        ("a: !!set {b, c}", "could not determine a constructor"),
        ("a: !!omap [b: 1]", "could not determine a constructor"),
        ("a: !!python/tuple [1]", "could not determine a constructor"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!int x", "is no plain YAML"),
        ("a: !!bool x", "is no plain YAML"),
        ("a: !!float ''", "is no plain YAML"),
        ('a: "\\ud800"', "surrogates not allowed"),
        ("a: \x00", "is no plain YAML"),
        (LAUGHS, f"more than {MAX_NODES} values once its aliases are followed"),
        ("#" * (MAX_BYTES + 1), f"larger than {MAX_BYTES} bytes"),
    ],
)
def test_yaml_that_is_refused(file, text, message):
    with pytest.raises(Refused, match=message) as raised:
        read_yaml(file(text), Refused)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_yaml_of_more_values_than_are_read_in_seconds(file, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_WRITTEN", 100)
    assert read_yaml(file("[" + "1," * 90 + "1]"), Refused) == 91 * [1]
    with pytest.raises(Refused, match="more than 100 values"):
        read_yaml(file("[" + "1," * 110 + "1]"), Refused)


@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_yaml])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        for name, message in (
            ("pipe", "is no regular file"),
            ("/dev/zero", "is no regular file"),
            ("s", "cannot be read"),
            (".", "is a folder"),
            ("none", "No such file"),
            ("x" * 300, "name too long"),
            ("a\0b", "null"),
            ("link", "symbolic links"),
        ):
            if name == "link":
                (tmp_path / "link").symlink_to("link")
            with pytest.raises(Refused, match=message):
                read(tmp_path / name, Refused)


def test_files_that_tell_no_size_are_bounded_too(tmp_path):
    assert read_text("/proc/self/status", Refused).startswith("Name:")
    with pytest.raises(Refused, match="larger than 10 bytes"):
        read_text("/proc/self/status", Refused, max_bytes=10)


def test_printable():
    assert printable("na\u00efve \u65e5\u672c \U0001f600\n") == "na\u00efve \u65e5\u672c \U0001f600\n"
    assert printable("\x1b]0;x\x07\x9b\t\r\u202e\u2028caf\udce9") == r"\x1b]0;x\x07\x9b\t\r\u202e\u2028caf\udce9"
    assert str(InputError("a\x1b[2J")) == r"a\x1b[2J"


def test_cause():
    assert cause(OSError(28, "No space left on device")) == "No space left on device; make room and try again"
    assert cause(KeyError()) == "KeyError"
    assert cause(ValueError("two\nlines \x1b[2J")) == r"two lines \x1b[2J"
    assert len(cause(ValueError("x" * 1000))) == 200
    assert cause(RecursionError("maximum recursion depth exceeded")) == "nested too deeply"
    assert cause(ModuleNotFoundError("no", name="mmengine")) == "the module mmengine is not installed"


def test_numbers_of_one_hash_as_keys(tmp_path):
    (tmp_path / "a.yml").write_text("\n".join(f"{k * (2**61 - 1)}: 1" for k in range(1, 24_000)))
    with pytest.raises(Refused, match="a number of 19 characters as a key, at line 1"):
        read_yaml(tmp_path / "a.yml", Refused)
