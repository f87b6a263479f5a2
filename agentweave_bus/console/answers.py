"""Answers of the console: JSON, as ASCII, so that no text of a stranger can make one that is no UTF-8."""

from __future__ import annotations

from typing import Any, Final

from starlette.responses import Response

from agentweave_bus.strict_json import StrictEncoder

__all__ = ["encode_json", "json_answer"]

encode_json: Final = StrictEncoder()


def json_answer(value: Any, status: int = 200) -> Response:
    """Return a JSON value as an answer."""
    return Response(encode_json(value), status, media_type="application/json")
