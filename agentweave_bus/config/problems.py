"""From validation errors to one message that a person can act on.

Each problem says where it was written (file and line, or the variable), the dotted key, what is
wrong, and for an unknown key the nearest one that exists. All problems of a file are listed at once.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from agentweave_bus.config.document import KeyPath
from agentweave_bus.exceptions import ConfigurationError

__all__ = ["Origins", "dotted", "known_keys", "to_configuration_error"]


@dataclass(frozen=True, slots=True)
class Origins:
    """Where each setting came from: lines of a file, and names of variables or arguments."""

    file: str | None
    lines: Mapping[KeyPath, int]
    names: Mapping[KeyPath, str]

    def of(self, path: KeyPath) -> str:
        """Return ``file:line`` or the variable's name, or the file's, as a message prefix."""
        for length in range(len(path), 0, -1):
            if (name := self.names.get(path[:length])) is not None:
                return name
            if (line := self.lines.get(path[:length])) is not None:
                return f"{self.file}:{line}"
        return self.file or "configuration"


def dotted(path: KeyPath) -> str:
    """Return ``path`` as people write it: ``agent.capabilities[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def known_keys(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return every dotted key below ``model``; the section's model for a section, else None.

    The items of a list of sections are written as ``agent.capabilities[]``.
    """
    return dict(_walk(model, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel] | None]]:
    for name, info in model.model_fields.items():
        key = f"{prefix}{info.alias or name}"
        section, many = _section_in(info.annotation)
        yield key, section
        if section is not None:
            yield from _walk(section, f"{key}[]." if many else f"{key}.")


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Find the section model in an annotation such as ``Section | None`` or ``tuple[Section, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for argument in get_args(annotation):
        section, many = _section_in(argument)
        if section is not None:
            return section, many or getattr(annotation, "__origin__", None) is tuple
    return None, False


def to_configuration_error(
    error: ValidationError, model: type[BaseModel], origins: Origins
) -> ConfigurationError:
    """Turn ``error`` into one ConfigurationError that lists every problem in order of appearance."""
    problems = [_Problem.of(details, model, origins) for details in error.errors(include_url=False)]
    lines = [f"{problem.origin}: {problem.text}" for problem in problems]
    key = problems[0].key or None
    if len(lines) == 1:
        return ConfigurationError(lines[0], key=key, hint=problems[0].hint)
    listed = "\n".join(
        f"  {line}{'' if problem.hint is None else f' {problem.hint}'}"
        for line, problem in zip(lines, problems, strict=True)
    )
    return ConfigurationError(f"{len(lines)} problems in the configuration:\n{listed}", key=key)


@dataclass(frozen=True, slots=True)
class _Problem:
    key: str
    origin: str
    text: str
    hint: str | None

    @classmethod
    def of(cls, details: Any, model: type[BaseModel], origins: Origins) -> _Problem:
        path = tuple(part for part in details["loc"] if part != "[key]")
        key = dotted(path)
        origin = origins.of(path)
        if details["type"] == "extra_forbidden":
            return cls(key, origin, f"unknown key {key!r}.", _nearest(path, model))
        if details["type"] == "missing":
            return cls(key, origin, f"{key!r} is missing.", "Add it.")
        return cls(key, origin, _sentence(key, details), _nearest_value(details))


_WANTED: Final = {
    "model_type": "a mapping of keys and values",
    "model_attributes_type": "a mapping of keys and values",
    "dict_type": "a mapping of keys and values",
    "tuple_type": "a list",
    "string_type": "text; put it in quotes",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}


def _sentence(key: str, details: Any) -> str:
    error = details.get("ctx", {}).get("error")
    if error is not None:
        return f"{key}: {error}." if key else f"{error}."
    message = _WANTED.get(details["type"], details["msg"].removeprefix("Input should be "))
    wanted = message if message == details["msg"] else f"must be {message}"
    return f"{key}: {wanted}, not {_shown(details.get('input'))}."


def _shown(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 1
    return short.repr(value)


def _nearest_value(details: Any) -> str | None:
    if details["type"] != "literal_error" or not isinstance(details.get("input"), str):
        return None
    allowed = [word.strip("'") for word in details["ctx"]["expected"].replace(" or ", ", ").split(", ")]
    close = difflib.get_close_matches(details["input"], allowed, n=1)
    return f"Did you mean {close[0]!r}?" if close else None


def _nearest(path: KeyPath, model: type[BaseModel]) -> str | None:
    """Name the nearest key of the same section, or else the section that has a key of this name."""
    keys = known_keys(model)
    prefix = _pattern_of(path[:-1])
    siblings = _children(keys, prefix)
    name = str(path[-1])
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{prefix}{close[0]}'?"
    elsewhere = [key for key in keys if key.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"Did you mean {elsewhere[0]!r}?"
    return f"Known here: {', '.join(siblings)}."


def _pattern_of(path: KeyPath) -> str:
    text = ""
    for part in path:
        text = f"{text.removesuffix('.')}[]." if isinstance(part, int) else f"{text}{part}."
    return text


def _children(keys: Iterable[str], prefix: str) -> list[str]:
    names = (key.removeprefix(prefix) for key in keys if key.startswith(prefix))
    return [name for name in names if "." not in name]
