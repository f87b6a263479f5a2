"""Reading a grants file into a model, with mistakes that name their line.

The file is read as configuration is (:mod:`agentweave_bus.config.document`), with room for more: it is
bounded, also in what its aliases stand for, and a key that stands twice is refused (half of a security
file could go unread). What the model refuses is looked up among the lines of the keys.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError

from agentweave_bus.config.document import Bounds, Document, KeyPath, parse_document, read_text
from agentweave_bus.exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic_core import ErrorDetails

__all__ = ["load_grants_document"]

_BOUNDS: Final = Bounds(file_bytes=4 * 1024 * 1024, nodes=250_000)

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
    if text is None:
        text = read_text(Path(path), _BOUNDS.file_bytes)
    return cast("_ModelT", _model_of(text, str(path), model))


# One file is read by several: by each agent of a process, for the policy and for its data.
@lru_cache(maxsize=2)
def _model_of(text: str, name: str, model: type[BaseModel]) -> BaseModel:
    document = parse_document(text, name, _BOUNDS)
    try:
        return model.model_validate(document.value)
    except ValidationError as refused:
        raise _explained(refused, model, document) from None


def _explained(refused: ValidationError, model: type[BaseModel], document: Document) -> ConfigurationError:
    found = sorted(_mistakes(refused, model, document))
    text = "\n".join(f"{document.name}:{line}: {place}: {sentence}" for line, place, sentence in found)
    return ConfigurationError(text, key=found[0][1])


def _mistakes(
    refused: ValidationError, model: type[BaseModel], document: Document
) -> Iterator[tuple[int, str, str]]:
    for error in refused.errors():
        place = _place_in(document, error["loc"])
        yield _line_of(document, place), _dotted(place), _sentence(error, model)


def _place_in(document: Document, loc: KeyPath) -> KeyPath:
    """Return the part of ``loc`` that exists in the file: pydantic adds steps of its own."""
    place: KeyPath = ()
    value: Any = document.value
    for step in loc:
        if (*place, step) in document.lines:
            place, value = (*place, step), value[step]
            continue
        return (*place, step) if isinstance(step, str) and isinstance(value, dict) else place
    return place


def _line_of(document: Document, place: KeyPath) -> int:
    written = (place[:length] for length in range(len(place), 0, -1))
    return next((document.lines[part] for part in written if part in document.lines), 1)


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
