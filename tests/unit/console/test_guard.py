"""The gate in front of the console: what each of its steps refuses, and that nothing else would."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from agentweave_bus.console.guard import ACT_HEADER, COOKIE, SECURITY_HEADERS, Guard, Sessions

HOST = "127.0.0.1:8600"
NOTHING: dict[str, str | None] = {}


class Browser:
    """Asks as a browser does that has a session."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.sessions = Sessions(self.tokens.append)
        self.guard = Guard(PlainTextResponse("inside"), sessions=self.sessions, hosts=frozenset({HOST}))
        self.session = self.sessions.open(self.sessions.token)

    async def ask(
        self, path: str = "/api/state", *, method: str = "GET", **headers: str | None
    ) -> tuple[int, dict[str, str]]:
        """Return the status and the headers; a header of ``None`` is left out."""
        own = {"host": HOST, "cookie": f"{COOKIE}={self.session}"}
        if method == "POST":
            own |= {
                "content-type": "application/json",
                ACT_HEADER: self.sessions.act_value,
                "origin": f"http://{HOST}",
            }
        own |= {
            "sec-fetch-site": "same-origin",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }  # type: ignore[dict-item]
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in own.items() if value is not None],
        }
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await self.guard(scope, None, send)  # type: ignore[arg-type]
        return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.fixture
def browser() -> Browser:
    return Browser()


pytestmark = pytest.mark.anyio

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "another name for this machine": ("_check_host", {"host": "rebound.evil.test:8600"}),
    "another port": ("_check_host", {"host": "127.0.0.1:8601"}),
    "no port": ("_check_host", {"host": "127.0.0.1"}),
    "a page of another site": ("_check_origin", {"origin": "https://evil.test"}),
    "a page without an origin": ("_check_origin", {"origin": "null"}),
    "a page of another port": ("_check_origin", {"origin": "http://127.0.0.1:9999"}),
    "led here by another site": ("_check_site", {"sec_fetch_site": "cross-site"}),
    "led here by another port": ("_check_site", {"sec_fetch_site": "same-site"}),
    "no cookie": ("_check_session", {"cookie": None}),
    "a wrong cookie": ("_check_session", {"cookie": f"{COOKIE}=guessed"}),
    "the token as a cookie": ("_check_session", {"cookie": "TOKEN"}),
    "an act without the value": ("_check_act", {"method": "POST", ACT_HEADER.replace("-", "_"): None}),
    "an act with a wrong value": ("_check_act", {"method": "POST", ACT_HEADER.replace("-", "_"): "guessed"}),
    "an act as a form": ("_check_act", {"method": "POST", "content_type": "text/plain"}),
    "another method": ("_check_act", {"method": "DELETE"}),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_each_step_refuses_what_no_other_does(
    browser: Browser, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, given = REFUSED[case]
    given = dict(given)
    if given.get("cookie") == "TOKEN":
        given["cookie"] = f"{COOKIE}={browser.sessions.token}"
    assert (await browser.ask(**given))[0] == 403
    asked_well = {"method": given["method"]} if given.get("method") == "POST" else {}
    assert (await browser.ask(**asked_well))[0] == 200
    # Without the step, the same request comes in: nothing but this step stands against it. What an origin is
    # compared with is the host, which is checked before.
    monkeypatch.setattr(Guard, step, lambda *_: None)
    assert (await browser.ask(**given))[0] == 200


async def test_a_request_without_what_browsers_add_is_let_in_by_its_session(browser: Browser) -> None:
    assert (await browser.ask(sec_fetch_site=None))[0] == 200
    assert (await browser.ask(sec_fetch_site="none"))[0] == 200


async def test_a_token_opens_once_and_another_is_ready(browser: Browser) -> None:
    token = browser.sessions.token
    status, headers = await browser.ask(f"/?token={token}", cookie=None, sec_fetch_site="none")
    assert (status, headers["location"]) == (303, "/")
    cookie, *attributes = headers["set-cookie"].lower().split("; ")
    assert set(attributes) == {"httponly", "samesite=strict", "path=/"}
    assert (await browser.ask(cookie=headers["set-cookie"].split(";")[0]))[0] == 200
    assert cookie != f"{COOKIE}={browser.session}".lower()
    status, headers = await browser.ask(f"/?token={token}", cookie=None)
    assert status == 403
    assert "set-cookie" not in headers
    assert browser.tokens[-1] == browser.sessions.token != token


@pytest.mark.parametrize("token", ["", "guessed", "\xff", "%ED%A0%80"])
async def test_another_token_opens_nothing_and_uses_none_up(browser: Browser, token: str) -> None:
    before = browser.sessions.token
    assert (await browser.ask(f"/?token={token}", cookie=None))[0] == 403
    assert (await browser.ask(f"/?token={before}&token={token}", cookie=None))[0] == 403
    assert browser.sessions.token == before


async def test_a_token_opens_nothing_but_the_page(browser: Browser) -> None:
    token = browser.sessions.token
    assert (await browser.ask(f"/api/state?token={token}", cookie=None))[0] == 403
    assert (await browser.ask(f"/?token={token}", cookie=None, method="POST"))[0] == 403
    assert browser.sessions.token == token


@pytest.mark.parametrize(
    "wrong", [{"host": "evil.test"}, {"origin": "https://evil.test"}, {"sec_fetch_site": "cross-site"}]
)
async def test_no_stranger_spends_a_token(browser: Browser, wrong: dict[str, str]) -> None:
    token = browser.sessions.token
    assert (await browser.ask(f"/?token={token}", cookie=None, **wrong))[0] == 403
    assert browser.sessions.token == token


async def test_whoever_has_a_session_spends_no_token(browser: Browser) -> None:
    token = browser.sessions.token
    assert (await browser.ask(f"/?token={token}"))[0] == 303
    assert browser.sessions.token == token


async def test_the_oldest_of_many_sessions_ends(browser: Browser) -> None:
    for _ in range(31):
        browser.sessions.open(browser.sessions.token)
    assert (await browser.ask())[0] == 200
    browser.sessions.open(browser.sessions.token)
    assert (await browser.ask())[0] == 403


@pytest.mark.parametrize("headers", [{}, {"cookie": None}, {"host": "evil.test"}])
async def test_every_answer_says_what_browsers_may_do_with_it(
    browser: Browser, headers: dict[str, Any]
) -> None:
    answered = (await browser.ask(**headers))[1]
    assert {name: answered.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert "default-src 'none'" in answered["content-security-policy"]
    assert "unsafe" not in answered["content-security-policy"]
