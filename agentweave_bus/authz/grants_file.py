"""Reading a YAML file into a model, with mistakes that name their line.

YAML is parsed into nodes first, which know where they stand, and into values second; what the model
refuses is then looked up among the nodes. A key that stands twice is refused (YAML would keep the
last one silently: half of a security file could go unread).
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.regular_files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic_core import ErrorDetails

__all__ = ["MAX_GRANTS_BYTES", "load_grants_document"]

MAX_GRANTS_BYTES: Final = 4 * 1024 * 1024

_SENTENCES: Final = {
    "missing": "this key is missing.",
    "tuple_type": "write a list here.",
    "list_type": "write a list here.",
    "dict_type": "write a mapping here (key: value).",
    "model_type": "write a mapping here (key: value).",
    "string_type": "write text here.",
    "too_short": "write at least one.",
}

_ModelT = TypeVar("_ModelT", bound=BaseModel)


def load_grants_document(model: type[_ModelT], path: str | Path, *, text: str | None = None) -> _ModelT:
    """Read ``path`` (or ``text``, then ``path`` is only its name) as a ``model``.

    Raises:
        ConfigurationError: with every mistake, its line and place; ``key`` is the first one's place.

    """
    name = str(path)
    root, values = _parse(_read(Path(path)) if text is None else text, name)
    if root is None or values is None:
        return model()
    try:
        return model.model_validate(values)
    except ValidationError as refused:
        raise _explained(refused, model, root, name) from None


def _read(path: Path) -> str:
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_GRANTS_BYTES + 1)
        if len(raw) > MAX_GRANTS_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_GRANTS_BYTES} bytes.")
        return raw.decode()
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"{path} can't be read: {reason}.") from problem


def _parse(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes and the values of ``text``, both None for an empty document."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None
        _refuse_repeated(root, name)
        return root, loader.construct_document(root)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        what = getattr(problem, "problem", None) or str(problem)
        raise ConfigurationError(f"{name}{line}: this can't be read as YAML: {what}.") from problem
    except RecursionError as problem:
        raise ConfigurationError(f"{name}: nested too deeply.") from problem
    finally:
        loader.dispose()


def _refuse_repeated(root: yaml.Node, name: str) -> None:
    for place, key in _repeated(root, (), set()):
        dotted = _dotted((*place, str(key.value)))
        raise ConfigurationError(
            f"{name}:{key.start_mark.line + 1}: {dotted} stands twice.", key=dotted, hint="Join the two."
        )


def _repeated(
    node: yaml.Node, place: tuple[str | int, ...], visited: set[int]
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if id(node) in visited:  # an alias; a few of them could stand for more nodes than there is time for
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated(item, (*place, index), visited)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield place, key
            seen.add(str(key.value))
            yield from _repeated(value, (*place, str(key.value)), visited)


def _explained(
    refused: ValidationError, model: type[BaseModel], root: yaml.Node, name: str
) -> ConfigurationError:
    found = sorted(_mistakes(refused, model, root))
    text = "\n".join(f"{name}:{line}: {place}: {sentence}" for line, place, sentence in found)
    return ConfigurationError(text, key=found[0][1])


def _mistakes(
    refused: ValidationError, model: type[BaseModel], root: yaml.Node
) -> Iterator[tuple[int, str, str]]:
    for error in refused.errors():
        place = _place_in(root, error["loc"])
        yield _line_of(root, place), _dotted(place), _sentence(error, model)


def _place_in(root: yaml.Node, loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return the part of ``loc`` that exists in the file: pydantic adds steps of its own."""
    place: list[str | int] = []
    node: yaml.Node | None = root
    for step in loc:
        child = _child(node, step)
        if child is None and not (isinstance(step, str) and isinstance(node, yaml.MappingNode)):
            break
        place.append(step)
        node = child
    return tuple(place)


def _child(node: yaml.Node | None, step: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step]  # type: ignore[no-any-return]
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == str(step)), None)
    return None


def _line_of(root: yaml.Node, place: Sequence[str | int]) -> int:
    node = root
    line: int = root.start_mark.line
    for step in place:
        if isinstance(node, yaml.MappingNode):
            line = next((key.start_mark.line for key, _ in node.value if key.value == str(step)), line)
        child = _child(node, step)
        if child is None:
            break
        node = child
        if not isinstance(step, str):
            line = node.start_mark.line
    return line + 1


def _dotted(place: Sequence[str | int]) -> str:
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text or "the file"


def _sentence(error: ErrorDetails, model: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden":
        known = sorted(_known_keys(model, error["loc"][:-1]))
        return "unknown key; " + _nearest(str(error["loc"][-1]), known)
    if error["type"] in _SENTENCES:
        return _SENTENCES[error["type"]]
    return error["msg"].removeprefix("Value error, ") + "."


def _nearest(key: str, known: Sequence[str]) -> str:
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}."


def _known_keys(model: type[BaseModel], loc: Sequence[str | int]) -> Mapping[str, Any]:
    fields = model.model_fields
    for step in loc:
        if isinstance(step, str) and step in fields:
            nested = _model_in(fields[step].annotation)
            fields = fields if nested is None else nested.model_fields
    return fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)
