"""The one reader of text, JSON and YAML that come from outside: regular files only, of bounded size and nesting.

Each function takes the exception that its caller promises, and raises nothing else.
"""

import json
import os
import re
from typing import Any

import yaml

from segmenter.errors import InputError, cause
from segmenter.files import open_regular

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_WRITTEN = 50_000  # values of a YAML file: beyond it, the parser takes many seconds
MAX_NODES = 200_000  # with every alias counted as what it stands for
MAX_DIGITS = 100  # of one number
MAX_KEY_DIGITS = 15  # of a whole number as a key

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*\\?(?:"|\Z)', re.DOTALL)  # never fails, so linear
_BRACKETS = re.compile(rb"[\[\]{}]")


class _Refused(ValueError):
    """Too large, too deep ...: the message need not name the file."""


def read_bytes(path: str | os.PathLike, error: type[InputError], max_bytes: int = MAX_BYTES) -> bytes:
    """The whole of a regular file of at most `max_bytes`. Raises `error`: anything else, with path and reason."""
    try:
        with open_regular(path) as file:
            content = file.read(max_bytes + 1)
        if content is None:  # some files below /proc make their readers wait
            raise _Refused("holds nothing yet")
        if len(content) > max_bytes:
            raise _Refused(f"is larger than {max_bytes} bytes, which no such file is")
        return content
    except OSError as reason:
        raise error(f"{path}: cannot be read ({cause(reason)})") from reason
    except ValueError as reason:  # also a path with a NUL character
        raise error(f"{path}: {reason}") from reason


def read_text(path: str | os.PathLike, error: type[InputError], max_bytes: int = MAX_BYTES) -> str:
    """Text in UTF-8, with or without a byte order mark; or in UTF-16 with one. Raises `error`, as `read_bytes`."""
    content = read_bytes(path, error, max_bytes)
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as reason:
        raise error(f"{path}: is no text in UTF-8 ({cause(reason)})") from reason


def read_json(path: str | os.PathLike, error: type[InputError], max_bytes: int = MAX_BYTES) -> Any:
    """The content of a JSON file. Raises `error`: it cannot be read, or what `parse_json` refuses."""
    text = read_text(path, error, max_bytes)
    try:
        return parse_json(text)
    except Exception as reason:
        raise error(f"{path}: is no JSON ({cause(reason)})") from reason


def parse_json(text: str | bytes) -> Any:
    """JSON of bounded depth and numbers, each key once, without NaN and halves of characters. Raises ValueError."""
    text = text if isinstance(text, str) else text.decode()
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", text.encode(errors="surrogatepass"))):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} levels deep")
    return _text_checked(json.loads(text, parse_int=_integer, parse_constant=_refuse, object_pairs_hook=_object))


def read_yaml(path: str | os.PathLike, error: type[InputError], tuples: bool = False) -> Any:
    """The content of a YAML file as dictionaries, lists, text, numbers, truth values and None.

    Numbers without a dot such as 1e-5 come as text (YAML 1.1), and so do dates.

    Args:
        tuples: takes the one Python tag that the published training writes, `!!python/tuple`.
    Raises:
        `error`: unreadable, no YAML, tags of other types, merge keys, keys that are no single values or come twice, too
        large, too deep, too long a number, more than MAX_WRITTEN values, or than MAX_NODES once aliases are followed.
    """
    text = read_text(path, error)
    try:
        return _text_checked(yaml.load(text, Loader=_TupleLoader if tuples else _Loader))
    except Exception as reason:  # besides YAMLError: KeyError, IndexError, AttributeError for malformed scalars
        raise error(f"{path}: is no plain YAML ({cause(reason)})") from reason


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Refused(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse(constant: str) -> None:
    raise _Refused(f"the number {constant}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise _Refused(f"the key {name!r} twice")
        content[name] = value
    return content


def _text_checked(content: Any) -> Any:
    """`content`, unless its text holds half of a character, other than those that stand for bytes of file names."""
    json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape")
    return content


class _Loader(yaml.SafeLoader):
    """SafeLoader with limits on what small files can make large, and without types that JSON does not know."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._depth, self._sizes, self._nodes = 0, {}, []

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        known = self.anchors.get(event.anchor) if isinstance(event, yaml.AliasEvent) else None
        if known is not None and id(known) not in self._sizes:
            raise _Refused("a value that contains itself")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} levels deep")
        if len(self._nodes) > MAX_WRITTEN:
            raise _Refused(f"more than {MAX_WRITTEN} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if known is None:
            children = node.value if isinstance(node.value, list) else []
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
            self._nodes.append(node)  # so that its id stays its own
        if self._sizes[id(node)] > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES} values once its aliases are followed")
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):  # hashing nested ones can take for ever
                raise _Refused(f"a {key.id} as a key, at line {key.start_mark.line + 1}")
            if key.tag == "tag:yaml.org,2002:int" and len(key.value) > MAX_KEY_DIGITS:  # many may share one hash
                raise _Refused(f"a number of {len(key.value)} characters as a key, at line {key.start_mark.line + 1}")
            if key.tag == "tag:yaml.org,2002:merge":
                raise _Refused(f"a merge key (<<) at line {key.start_mark.line + 1}; write its values out")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise _Refused(f"a key twice, in what begins at line {node.start_mark.line + 1}")
        return mapping

    def _number(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > MAX_DIGITS:
            raise _Refused(f"a number of {len(node.value)} characters at line {node.start_mark.line + 1}")
        is_integer = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)

    def _date(self, node: yaml.ScalarNode) -> str:
        self.construct_yaml_timestamp(node)  # raises, if it is none
        return node.value


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader._number)
for _tag in ("binary", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader._date)


class _TupleLoader(_Loader):
    pass


_TupleLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)
