"""YAML documents from outside: read with bounds, with the line of every key.

Owns size, depth and node bounds, the refusal of duplicate keys, and where a key was written. Knows
nothing of what the keys mean. Aliases are allowed, but what they expand to counts against the node
bound, so a small file can't grow into a large value; merge keys and tags are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.regular_files import open_regular

__all__ = [
    "MAX_DEPTH",
    "MAX_FILE_BYTES",
    "MAX_NODES",
    "Bounds",
    "Document",
    "KeyPath",
    "parse_document",
    "parse_value",
    "read_document",
    "read_text",
]

MAX_FILE_BYTES: Final = 256 * 1024
MAX_NODES: Final = 10_000
MAX_DEPTH: Final = 24
MAX_NUMBER: Final = 400
"""Characters of a number; Python takes its time over longer ones, and does not write them out."""

KeyPath = tuple[str | int, ...]

_UP_WRITES_IT: Final = "It is there while the stack runs that has this client: start `agentweave up`."

_MERGE_TAG: Final = "tag:yaml.org,2002:merge"
_MAP_TAG: Final = "tag:yaml.org,2002:map"
_SEQ_TAG: Final = "tag:yaml.org,2002:seq"
_STR_TAG: Final = "tag:yaml.org,2002:str"
_DATE_TAG: Final = "tag:yaml.org,2002:timestamp"
_NUMBER_TAGS: Final = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})
_SCALAR_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")
)


# What PyYAML raises besides its own errors, over an escape, a directive or a value that is not of its type.
_FAULTS: Final = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one document may hold at most: its bytes, its values (with what aliases stand for), its depth.

    Without ``dates`` what looks like a date is text.
    """

    file_bytes: int = MAX_FILE_BYTES
    nodes: int = MAX_NODES
    depth: int = MAX_DEPTH
    dates: bool = True


_USUAL: Final = Bounds()


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: its value, its name for messages and the line (from 1) of every key."""

    name: str
    value: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)


def read_document(path: Path, bounds: Bounds = _USUAL) -> Document:
    """Read one YAML file whose top level is a mapping; an empty file is an empty mapping.

    Raises:
        ConfigurationError: it can't be read, is too large, or is not acceptable YAML; the message
            names file and line.

    """
    return parse_document(read_text(path, bounds.file_bytes), str(path), bounds)


def parse_document(text: str, name: str, bounds: Bounds = _USUAL) -> Document:
    """Parse what such a file would hold; ``name`` is what messages call it. Raises like reading it."""
    value, lines = _parse(text, name, bounds)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigurationError(f"{name}: expected keys and values at the top level.")
    return Document(name, value, lines)


def parse_value(text: str, name: str) -> Any:
    """Parse one YAML value, such as an environment variable's, under the same bounds.

    Raises:
        ConfigurationError: it is not acceptable YAML; ``name`` says where it came from.

    """
    if len(text) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{name}: the value is longer than {MAX_FILE_BYTES} characters.")
    return _parse(text, name, _USUAL)[0]


def read_text(path: Path, limit: int) -> str:
    """Read a file of at most ``limit`` bytes of UTF-8. Raises ConfigurationError, which names it."""
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        hint = _UP_WRITES_IT if isinstance(error, FileNotFoundError) and _of_a_client(path) else None
        raise ConfigurationError(f"{path} can't be read: {error.strerror or error}.", hint=hint) from error
    if len(data) > limit:
        raise ConfigurationError(f"{path} is larger than {limit // 1024} KiB.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start}).") from error


def _of_a_client(path: Path) -> bool:
    """Say whether a stack's client is configured there, for as long as the stack runs."""
    return path.absolute().parent.parts[-2:] == (".agentweave", "clients")


def _parse(text: str, name: str, bounds: Bounds) -> tuple[Any, dict[KeyPath, int]]:
    loader: _Loader | None = None
    try:
        loader = _Loader(text, bounds)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        converter = _Converter(loader, name, bounds)
        return converter.convert(node, (), 0), converter.lines
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{name}{_where(error)}: {_what(error)}.") from error
    except _FAULTS as error:
        where = "" if loader is None else f":{loader.get_mark().line + 1}"
        raise ConfigurationError(f"{name}{where}: not valid YAML ({type(error).__name__}).") from error
    finally:
        if loader is not None:
            loader.dispose()


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"


def _what(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"not valid YAML: {problem}"


class _Loader(yaml.SafeLoader):
    """The safe loader, with a bound on how deep and how much is composed."""

    def __init__(self, text: str, bounds: Bounds) -> None:
        super().__init__(text)
        self.bounds = bounds
        self.depth = 0
        self.nodes = 0
        if not bounds.dates:
            self.yaml_implicit_resolvers = _WITHOUT_DATES

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        # Checked before descending: the composer recurses, and a deep file must not reach
        # Python's own recursion limit.
        bounds = self.bounds
        if self.depth > bounds.depth or self.nodes > bounds.nodes:
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(
                problem=f"more than {bounds.depth} levels or {bounds.nodes} values", problem_mark=mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_WITHOUT_DATES: Final = {
    first: [(tag, expression) for tag, expression in resolvers if tag != _DATE_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Converter:
    """Turns composed nodes into plain values; counts what aliases expand to."""

    def __init__(self, loader: _Loader, name: str, bounds: Bounds) -> None:
        self._loader = loader
        self._name = name
        self._bounds = bounds
        self._visited = 0
        self.lines: dict[KeyPath, int] = {}

    def convert(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        self._visited += 1
        if self._visited > self._bounds.nodes or depth > self._bounds.depth:
            raise self._refused(node, "aliases expand to too many values or refer to themselves")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return self._sequence(node, path, depth)
        return self._scalar(node)

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag not in _SCALAR_TAGS:
            raise self._refused(node, f"the tag {node.tag!r} is not allowed")
        if node.tag in _NUMBER_TAGS and len(node.value) > MAX_NUMBER:
            raise self._refused(node, f"a number of more than {MAX_NUMBER} characters")
        if node.tag == _STR_TAG:
            return self._text(node)
        try:
            return self._loader.construct_object(node, deep=True)
        except (yaml.YAMLError, *_FAULTS) as error:  # such as a date that no calendar has
            kind = node.tag.rpartition(":")[2]
            raise self._refused(node, f"this can't be read as the {kind} that YAML takes it for") from error

    def _text(self, node: yaml.Node) -> str:
        text = str(node.value)
        try:
            text.encode()
        except UnicodeEncodeError:  # an escape can name half of a character, which nobody can write out
            raise self._refused(node, "this text holds half of a character") from None
        return text

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath, depth: int) -> list[Any]:
        if node.tag != _SEQ_TAG:
            raise self._refused(node, f"the tag {node.tag!r} is not allowed")
        values = []
        for index, child in enumerate(node.value):
            self.lines[*path, index] = child.start_mark.line + 1
            values.append(self.convert(child, (*path, index), depth + 1))
        return values

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        if node.tag != _MAP_TAG:
            raise self._refused(node, f"the tag {node.tag!r} is not allowed")
        result: dict[str, Any] = {}
        for key_node, child in node.value:
            key = self._key(key_node)
            if key in result:
                raise self._refused(key_node, f"the key {key!r} is written twice")
            self.lines[*path, key] = key_node.start_mark.line + 1
            result[key] = self.convert(child, (*path, key), depth + 1)
        return result

    def _key(self, node: yaml.Node) -> str:
        if node.tag == _MERGE_TAG:
            raise self._refused(node, "merge keys ('<<') are not supported; write the keys out")
        if not isinstance(node, yaml.ScalarNode):
            raise self._refused(node, "a key must be a word")
        return self._text(node)

    def _refused(self, node: yaml.Node, problem: str) -> ConfigurationError:
        return ConfigurationError(f"{self._name}:{node.start_mark.line + 1}: {problem}.")
