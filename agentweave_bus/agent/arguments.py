"""What a handler takes, read from its annotations, and the check of a payload against it.

A payload is validated as JSON is, strictly: a string makes a ``Decimal``, a ``datetime`` or a ``UUID``,
but never an ``int``; a number makes no ``str``; a boolean is no number. Two things come out of one
validation: the arguments for the handler, and the same values in JSON form, defaults filled in, for the
policy. So a policy judges exactly what runs.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import logging
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo

from agentweave_bus.agent.failures import correlation_id
from agentweave_bus.agent.first_faults import stopping_validator
from agentweave_bus.agent.policy_form import policy_form
from agentweave_bus.agent.policy_types import Hidden, hidden_from_policy
from agentweave_bus.exceptions import ConfigurationError, PayloadError
from agentweave_bus.strict_json import StrictEncoder

__all__ = ["Arguments", "ValidatedCall"]

_logger: Final = logging.getLogger("agentweave_bus.agent")
_MAX_PROBLEMS: Final = 5  # told to the caller; a payload can break more rules than an error should list
_MAX_COUNTED: Final = 10_000  # telling five of them takes pydantic as long as telling all
_LARGE_BYTES: Final = 16 * 1024  # JSON of which not every wrong item is looked for
_MAX_HINT_CHARACTERS: Final = 64  # comparing names takes time that grows with the square of their length
_ABSENT: Final = inspect.Parameter.empty
_MUTABLE: Final = (list, dict, set)
_to_json: Final = StrictEncoder()


class ValidatedCall(NamedTuple):
    """A payload that passed: ``arguments`` for the handler, ``policy_payload`` for the policy.

    The policy's form has the defaults filled in. Its values are JSON, except that a ``Decimal`` stays
    one, so that the policy can get a number with all its digits.
    """

    arguments: dict[str, Any]
    policy_payload: Any


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    annotation: Any
    default: Any = _ABSENT

    @property
    def type(self) -> Any:
        return typing.Optional[self.annotation] if self.default is None else self.annotation  # noqa: UP045 - a value


class _Problems:
    """What is wrong with a payload: the first few in words, all of them counted.

    A payload of a stranger can have a hundred thousand mistakes, so words are only made for those told.
    """

    def __init__(self) -> None:
        self._told: list[str] = []
        self._count = 0

    def add(self, sentences: Iterable[str], count: int) -> None:
        """Add ``count`` problems, of which ``sentences`` tells one after the other when asked."""
        self._told += islice(sentences, _MAX_PROBLEMS - len(self._told))
        self._count += count

    def __bool__(self) -> bool:
        return self._count > 0

    def __str__(self) -> str:
        more = self._count - len(self._told)
        return "; ".join(self._told) + (f"; and {more} more" if more > 0 else "")


class _Check:
    """Validation of JSON. In what is large, a container is read up to its first wrong item."""

    def __init__(self, schema: Any, validator: Any) -> None:
        self._all = validator.validate_json
        self._first = stopping_validator(schema).validate_json

    def __call__(self, text: bytes) -> Any:
        return (self._all if len(text) < _LARGE_BYTES else self._first)(text, strict=True)


class Arguments:
    """The parameters of one handler.

    ``function`` is the handler as it is called (a bound method or a function), ``owner`` the class in
    whose namespace its annotations may be resolved.

    Raises:
        ConfigurationError: an annotation can't be resolved or validated; the message names the function.

    """

    def __init__(self, name: str, function: Callable[..., Any], owner: type | None = None) -> None:
        self._name = name
        self._label = str(getattr(function, "__qualname__", name))
        parameters, extra = self._read(function, owner)
        self._parameters: Final = {parameter.name: parameter for parameter in parameters}
        self._model: Final = self._make_model(parameters)
        self._check_extra: Final = self._adapter(extra)
        self._names: Final = tuple(zip(self._model.model_fields, self._parameters, strict=True))
        self._mutable: Final = {p.name: p.default for p in parameters if isinstance(p.default, _MUTABLE)}
        self._check_visible(parameters, extra)
        self._defaults: Final = dict(self._default_forms())
        self.schema: Final = self._make_schema()
        self._check: Final = _Check(self._model.__pydantic_core_schema__, self._model.__pydantic_validator__)

    def validate(self, value: Any) -> ValidatedCall:
        """Check ``value``, a payload as decoded, against the parameters.

        Raises:
            PayloadError: not an object, unknown or missing arguments, wrong types: named, never quoted.

        """
        if not isinstance(value, dict):
            raise PayloadError(
                f"{self._name}: the payload must be an object with the arguments, not {_json_type(value)}"
            )
        problems = _Problems()
        known, extra = value, {}
        if not value.keys() <= self._parameters.keys():
            extra = {key: item for key, item in value.items() if key not in self._parameters}
            known = {key: item for key, item in value.items() if key in self._parameters}
        if extra and self._check_extra is None:
            problems.add((self._unknown(key) for key in extra), len(extra))
        model = self._checked(self._check, known, problems)
        extras = self._checked_extra(extra, problems) if extra else {}
        if problems or model is None:
            raise PayloadError(f"{self._name}: {problems}")
        return self._call(self._given(model), extras)

    def _call(self, given: dict[str, Any], extras: dict[str, Any]) -> ValidatedCall:
        arguments = {**given, **extras}
        policy = self._defaults.copy()
        for key, value in arguments.items():
            policy[key] = policy_form(value)
        if self._mutable:
            arguments |= self._fresh_defaults(given)
        return ValidatedCall(arguments, policy)

    def _fresh_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Copy mutable defaults, so that no request leaves something in them for the next."""
        return {name: copy.deepcopy(default) for name, default in self._mutable.items() if name not in given}

    def _given(self, model: BaseModel) -> dict[str, Any]:
        given = model.model_fields_set
        return {name: getattr(model, key) for key, name in self._names if key in given}

    def _checked_extra(self, extra: dict[str, Any], problems: _Problems) -> dict[str, Any]:
        check = self._check_extra
        if check is None:
            return {}
        return self._checked(check, extra, problems) or {}

    def _checked(self, check: Callable[[bytes], Any], value: Any, problems: _Problems) -> Any:
        try:
            return check(_to_json(value))
        except ValidationError as error:
            problems.add(_sentences(error), error.error_count())
        except Exception as error:  # a validator of the author's failed: nothing of that is for the caller
            number = correlation_id()
            _logger.exception("validation of %s failed", self._label, extra={"correlation_id": number})
            raise PayloadError(
                f"{self._name}: the arguments could not be validated; correlation id {number}"
            ) from error
        return None

    def _unknown(self, key: str) -> str:
        short = len(key) <= _MAX_HINT_CHARACTERS
        near = difflib.get_close_matches(key, self._parameters, n=1) if short else ()
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(self._parameters) or 'none'}"
        return f"{key!r:.80} is no argument ({hint})"

    # --- reading a signature ----------------------------------------------------------------------

    def _read(self, function: Callable[..., Any], owner: type | None) -> tuple[list[_Parameter], Any]:
        hints = self._hints(function, owner)
        parameters, extra = [], _ABSENT
        for parameter in inspect.signature(function).parameters.values():
            annotation = hints.get(parameter.name, Any)
            if parameter.kind is parameter.VAR_KEYWORD:
                extra = annotation
            else:
                parameters.append(self._parameter(parameter, annotation))
        return parameters, extra

    def _parameter(self, parameter: inspect.Parameter, annotation: Any) -> _Parameter:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise ConfigurationError(
                f"{self._label}: {parameter} can't be given by name, as a payload gives arguments.",
                hint="Make it an ordinary parameter.",
            )
        if isinstance(parameter.default, FieldInfo):
            raise ConfigurationError(
                f"{self._label}: the default of {parameter.name!r} is a pydantic Field.",
                hint="Write Annotated[<type>, Field(…)] = <default>.",
            )
        return _Parameter(parameter.name, annotation, parameter.default)

    def _hints(self, function: Callable[..., Any], owner: type | None) -> dict[str, Any]:
        plain = inspect.unwrap(getattr(function, "__func__", function))
        annotations = {k: v for k, v in getattr(plain, "__annotations__", {}).items() if k != "return"}
        try:
            return typing.get_type_hints(
                SimpleNamespace(__annotations__=annotations),
                globalns=getattr(plain, "__globals__", {}),
                localns=dict(vars(owner)) if owner else None,
                include_extras=True,
            )
        except Exception as error:
            raise ConfigurationError(
                f"{self._label}: an annotation can't be resolved ({error}).",
                hint="Define or import the type at module level.",
            ) from error

    # --- making models ----------------------------------------------------------------------------

    def _make_model(self, parameters: Sequence[_Parameter]) -> type[BaseModel]:
        # Fields have names of their own and the parameters are aliases, so that a parameter may be
        # called "json", "model_config" or "_x", which pydantic keeps for itself.
        fields: dict[str, Any] = {f"a{i}": _field(p) for i, p in enumerate(parameters)}
        try:
            return create_model(self._name, __config__=ConfigDict(extra="forbid"), **fields)
        except (PydanticSchemaGenerationError, PydanticUserError, TypeError) as error:
            raise self._unusable(error) from error

    def _adapter(self, extra: Any) -> _Check | None:
        if extra is _ABSENT:
            return None
        try:
            adapter = TypeAdapter(dict[str, extra])
            return _Check(adapter.core_schema, adapter.validator)
        except (PydanticSchemaGenerationError, PydanticUserError) as error:
            raise self._unusable(error) from error

    def _check_visible(self, parameters: Sequence[_Parameter], extra: Any) -> None:
        """Refuse types of which a policy could not see exactly what the handler gets."""
        types = {parameter.name: parameter.type for parameter in parameters}
        if extra is not _ABSENT:
            types["**"] = extra
        for name, kind in types.items():
            if (found := self._hidden(kind)) is not None:
                raise ConfigurationError(
                    f"{self._label}: a policy can't see what parameter {name!r} gets: {found.reason}.",
                    hint=found.way_out,
                )

    def _hidden(self, kind: Any) -> Hidden | None:
        try:
            return hidden_from_policy(TypeAdapter(kind).core_schema)
        except (PydanticSchemaGenerationError, PydanticUserError) as error:
            raise self._unusable(error) from error

    def _make_schema(self) -> dict[str, Any]:
        try:
            schema = self._model.model_json_schema()
        except PydanticUserError as error:
            raise self._unusable(error) from error
        for name, form in schema.get("properties", {}).items():
            form.pop("default", None)
            if name in self._defaults:
                form["default"] = _schema_form(self._defaults[name])
        schema["additionalProperties"] = self._check_extra is not None
        return schema

    def _unusable(self, error: Exception) -> ConfigurationError:
        reason = str(error).partition("\n")[0]
        return ConfigurationError(
            f"{self._label}: its arguments can't be read from JSON: {reason}",
            hint="Use JSON types, pydantic models, dataclasses or types that pydantic knows.",
        )

    def _default_forms(self) -> Iterator[tuple[str, Any]]:
        for parameter in self._parameters.values():
            if parameter.default is _ABSENT:
                continue
            try:
                yield parameter.name, policy_form(parameter.default)
            except PayloadError as error:
                raise ConfigurationError(
                    f"{self._label}: the default of {parameter.name!r} has no JSON form: {error}.",
                    hint="A policy must be able to see it; use None and fill it in inside.",
                ) from error


def _field(parameter: _Parameter) -> tuple[Any, Any]:
    if parameter.default is _ABSENT:
        return parameter.type, Field(alias=parameter.name)
    return parameter.type, Field(default=None, alias=parameter.name)


def _schema_form(default: Any) -> Any:
    return json.loads(json.dumps(default, default=str))


def _sentences(error: ValidationError) -> Iterator[str]:
    if error.error_count() > _MAX_COUNTED:
        yield "more values than can be listed do not fit"
        return
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        yield _problem(item)


def _problem(item: Mapping[str, Any]) -> str:
    place = _place(item["loc"])
    return f"{place} is missing" if item["type"] == "missing" else f"{place}: {item['msg']}"


def _place(location: Sequence[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return f"{text.removeprefix('.')!r:.120}"


def _json_type(value: Any) -> str:
    names = {type(None): "null", str: "a string", list: "an array", bool: "a boolean"}
    return names.get(type(value), "a number")
