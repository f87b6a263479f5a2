"""Keeping values out of the audit log by the names of their fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["REDACTED", "Redaction"]

REDACTED: Final = "[redacted]"
"""What stands in place of a value. No digest of it: a card number could be guessed from that."""


_SCALARS: Final = frozenset({str, int, float, bool, type(None)})  # asked for first, which spares most calls


class Redaction:
    """Replaces values in a policy's input.

    A bare name (``card_number``) is replaced wherever it stands, at any depth of payload, principal and
    further facts; a dotted path (``customer.name``) only there, counted from the payload. Lists are
    looked through.
    """

    def __init__(self, fields: Iterable[str]) -> None:
        wanted = [field for field in fields if field]
        self._names = frozenset(field for field in wanted if "." not in field)
        self._paths = tuple(tuple(field.split(".")) for field in wanted if "." in field)

    def __bool__(self) -> bool:
        return bool(self._names or self._paths)

    def apply(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return ``document`` (a policy's ``input``) with the values replaced.

        It is not changed; one in which there is nothing to replace is returned as it is.
        """
        # Nearly every document is such a one, and to see that is cheaper than to copy it.
        cleaned = self._without_names(document) if self._has_name(document) else document
        context = cleaned.get("context")
        if self._paths and isinstance(context, dict) and "payload" in context:
            payload = context["payload"]
            for path in self._paths:
                payload = _without_path(payload, path)
            cleaned = {**cleaned, "context": {**context, "payload": payload}}
        return cleaned

    def _has_name(self, value: Any) -> bool:
        """Say whether anything in ``value`` is to be replaced for its name."""
        if isinstance(value, dict):
            if not self._names.isdisjoint(value):
                return True
            value = value.values()
        elif not isinstance(value, (list, tuple)):
            return False
        for item in value:  # noqa: SIM110 - any() costs more
            if type(item) not in _SCALARS and item and self._has_name(item):
                return True
        return False

    def _without_names(self, value: Any) -> Any:
        names, inner = self._names, self._without_names
        if isinstance(value, dict):
            cleaned = {}
            for key, item in value.items():
                if key in names:
                    cleaned[key] = REDACTED
                else:
                    cleaned[key] = item if type(item) in _SCALARS else inner(item)
            return cleaned
        if value and isinstance(value, (list, tuple)):
            return [item if type(item) in _SCALARS else inner(item) for item in value]
        return value


def _without_path(value: Any, path: tuple[str, ...]) -> Any:
    if not path:
        return REDACTED
    if isinstance(value, list | tuple):
        return [_without_path(item, path) for item in value]
    if isinstance(value, dict) and path[0] in value:
        return {**value, path[0]: _without_path(value[path[0]], path[1:])}
    return value
