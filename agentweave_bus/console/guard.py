"""The gate in front of every page and answer of the console.

Browsers send what any page tells them to. So each request is looked at in this order, and the first step that
it does not pass ends it:

1. *host*: it names the address that the console listens on. A name that somebody else points at this machine
   (DNS rebinding) is refused.
2. *origin*: a page that asks is one of the console's own.
3. *site*: the browser says that no other site led here.
4. *session*: it has a session's cookie, or brings a token that was not used, and gets a session for it.
5. *act*: what changes something is JSON, and repeats a value that only the console's own page can read.

Steps 1 to 3 come before the session, so that a stranger's page can neither use a session nor spend a token.
Secrets are compared in constant time.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentweave_bus.console.answers import json_answer

__all__ = ["ACT_HEADER", "COOKIE", "SECURITY_HEADERS", "Guard", "Sessions"]

COOKIE: Final = "agentweave_console"
ACT_HEADER: Final = "x-agentweave-session"

SECURITY_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

_MOST_SESSIONS: Final = 32
_READING: Final = frozenset({"GET", "HEAD"})
_OWN_SITE: Final = frozenset({"same-origin", "none"})
_NO_SESSION: Final = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>AgentWeave console</title>
<h1>This address does not open the console</h1>
<p>The address has to be the whole one that the console printed, and each one opens it once.</p>
<p>Where the console was started, it printed a new address when the last one was used. Open that.</p>
</html>
"""


class Sessions:
    """The token that opens the console once, and the sessions that were opened.

    There is always exactly one token that was not used: ``on_token`` is called with each, first when this is
    made. A session lasts until the console ends; of more than 32 the oldest ends.
    """

    def __init__(self, on_token: Callable[[str], None] = lambda _token: None) -> None:
        self._on_token = on_token
        self._open: deque[str] = deque(maxlen=_MOST_SESSIONS)
        self.act_value = secrets.token_urlsafe(32)
        """What a request that changes something repeats."""
        self._renew()

    @property
    def token(self) -> str:
        """The token that was not used yet."""
        return self._token

    def open(self, token: str) -> str | None:
        """Use a token up and return its session's value; ``None`` for any other text."""
        if not _equal(token, self._token):
            return None
        session = secrets.token_urlsafe(32)
        self._open.append(session)
        self._renew()
        return session

    def knows(self, session: str) -> bool:
        """Say whether a session was opened."""
        found = False
        for one in self._open:  # all of them, however early one is found
            found |= _equal(session, one)
        return found

    def may_act(self, value: str) -> bool:
        """Say whether a request repeats what the console's page was told."""
        return _equal(value, self.act_value)

    def _renew(self) -> None:
        self._token = secrets.token_urlsafe(32)
        self._on_token(self._token)


class Guard:
    """ASGI middleware. ``hosts`` are the ``Host`` headers that name the console, with the port.

    ``cookie`` is what the session's is called. Browsers do not tell a host's ports apart, so consoles beside
    each other need names of their own.
    """

    def __init__(
        self, app: ASGIApp, *, sessions: Sessions, hosts: frozenset[str], cookie: str = COOKIE
    ) -> None:
        self._app = app
        self._sessions = sessions
        self._hosts = hosts
        self._cookie = cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or have it answered."""
        if scope["type"] != "http":
            return

        async def safe_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message.setdefault("headers", [])).update(SECURITY_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        answer = (
            self._check_host(headers)
            or self._check_origin(headers)
            or self._check_site(headers)
            or self._check_session(scope, headers)
            or self._check_act(scope, headers)
            or self._app
        )
        await answer(scope, receive, safe_send)

    # --- the steps ---------------------------------------------------------------------------------------

    def _check_host(self, headers: Headers) -> Response | None:
        named = headers.getlist("host")
        return None if len(named) == 1 and named[0].lower() in self._hosts else _refused("another host")

    def _check_origin(self, headers: Headers) -> Response | None:
        own = f"http://{headers['host'].lower()}"
        return None if all(one == own for one in headers.getlist("origin")) else _refused("another origin")

    def _check_site(self, headers: Headers) -> Response | None:
        said = headers.getlist("sec-fetch-site")
        return None if all(one in _OWN_SITE for one in said) else _refused("another site")

    def _check_session(self, scope: Scope, headers: Headers) -> Response | None:
        opening = scope["path"] == "/" and scope["method"] == "GET"
        tokens = (
            parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("token", [])
            if opening
            else []
        )
        if self._has_session(headers):
            return RedirectResponse("/", 303) if tokens else None  # a token is not spent in vain
        if len(tokens) == 1 and (session := self._sessions.open(tokens[0])) is not None:
            opened = RedirectResponse("/", 303)
            opened.set_cookie(self._cookie, session, path="/", httponly=True, samesite="strict")
            return opened
        return Response(_NO_SESSION, 403, media_type="text/html") if opening else _refused("no session")

    def _has_session(self, headers: Headers) -> bool:
        brought = (cookie_parser(header) for header in headers.getlist("cookie"))
        return any(self._sessions.knows(one[self._cookie]) for one in brought if self._cookie in one)

    def _check_act(self, scope: Scope, headers: Headers) -> Response | None:
        if scope["method"] in _READING:
            return None
        of_json = headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        values = headers.getlist(ACT_HEADER)
        if of_json and len(values) == 1 and self._sessions.may_act(values[0]):
            return None
        return _refused("not from the console's page")


def _refused(why: str) -> Response:
    return json_answer({"error": f"refused: {why}"}, 403)


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode())
