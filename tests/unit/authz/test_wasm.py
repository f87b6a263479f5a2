"""The embedded engine: what it answers, what it refuses, and that it stays whole."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agentweave_bus.authz.host_builtins import BuiltinRefusedError, HostBuiltins
from agentweave_bus.authz.policy_input import PolicyInput, write_input
from agentweave_bus.authz.policy_source import find_opa, load_policy, precompile
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.authz.wasm_module import ModuleLimits
from agentweave_bus.exceptions import PayloadError, PolicyLoadError, PolicyUnavailableError

ORDER = "spiffe://agentweave.io/agent/order"
PAYMENT = "spiffe://agentweave.io/agent/payment"

needs_opa = pytest.mark.skipif(
    find_opa() is None, reason="no opa binary: run 'make tools' to have Rego compiled"
)

GRANTS = f"""
grants:
  - caller: {ORDER}
    callee: {PAYMENT}
    capabilities: [process_payment]
    limits: {{max_amount: 1000}}
  - caller: {ORDER}
    callee: {PAYMENT}
    capabilities: [health]
"""


def request(action: str = "process_payment", **payload: object) -> PolicyInput:
    return write_input(
        {
            "caller_spiffe_id": ORDER,
            "callee_spiffe_id": PAYMENT,
            "action": action,
            "direction": "inbound",
            "context": {"kind": "call", "transport": "bus", "via": [], "payload": payload},
        }
    )


def standing_request(action: str, **context: object) -> PolicyInput:
    return write_input(
        {
            "caller_spiffe_id": ORDER,
            "callee_spiffe_id": PAYMENT,
            "action": action,
            "direction": "inbound",
            "context": {"kind": "call", "transport": "bus", "via": []} | context,
        }
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "grants.yaml").write_text(GRANTS)
    return folder


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shipped policy, which never changes, is made ready once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def engine(directory: Path, shared_cache: Path) -> EmbeddedEngine:
    return EmbeddedEngine.from_directory(directory, cache=shared_cache)


def own_policy(folder: Path, text: str, name: str = "own.rego") -> None:
    (folder / name).write_text("package own.authz\nimport rego.v1\n" + text)


def test_grants_alone_need_no_rego(engine: EmbeddedEngine) -> None:
    answer = engine.evaluate_now("agentweave/grants", request(amount=19))
    assert answer.defined
    assert answer.rule == "decision"
    assert answer.result == {"allow": True, "reason": "grant 1 allows it", "limits": {}}
    assert answer.revision == engine.revision != ""


def test_a_denial_names_the_limit(engine: EmbeddedEngine) -> None:
    result = engine.evaluate_now("agentweave/grants", request(amount=1001)).result
    assert result["allow"] is False
    assert result["reason"] == "grant 1 has the limit max_amount 1000 and amount is 1001"


@pytest.mark.parametrize(
    "path",
    ["agentweave/grants", "agentweave/grants/allow", "agentweave.grants", "agentweave/grants/decision"],
)
def test_a_policy_path_may_name_the_rule_too(engine: EmbeddedEngine, path: str) -> None:
    assert engine.evaluate_now(path, request(amount=1)).result["allow"] is True


def test_an_unknown_package_is_no_answer_and_says_which_there_are(engine: EmbeddedEngine) -> None:
    with pytest.raises(PolicyUnavailableError, match=r"no package nobody/authz.*agentweave/grants"):
        engine.evaluate_now("nobody/authz", request())


def test_before_anything_is_loaded_there_is_no_answer() -> None:
    engine = EmbeddedEngine()
    assert engine.revision == ""
    with pytest.raises(PolicyUnavailableError, match="none is loaded"):
        engine.evaluate_now("agentweave/grants", request())


def test_shipped_policies_without_grants_allow_nothing(tmp_path: Path) -> None:
    engine = EmbeddedEngine.from_directory(None, cache=tmp_path)
    assert engine.evaluate_now("agentweave/grants", request(amount=1)).result["allow"] is False


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"{1:2}",
        b"{1,2}",
        b"set()",
        b'{"a":NaN}',
        b'{"a":1}{"b":2}',
        b'{"a":1,"a":2}',
        b"\xff",
        b'"\\ud800"',
        b'{"a":1e400}',
    ],
)
def test_what_is_no_strict_json_never_reaches_the_policy(engine: EmbeddedEngine, raw: bytes) -> None:
    with pytest.raises(PayloadError):
        engine.evaluate_now("agentweave/grants", raw)


def test_input_that_only_opa_refuses_is_no_answer_rather_than_no_input(
    directory: Path, engine: EmbeddedEngine
) -> None:
    """The second net: what slips through the strict parser must not turn into an undefined input."""
    smuggled = bytes.__new__(PolicyInput, b'{"caller_spiffe_id": ')
    with pytest.raises(PolicyUnavailableError, match="OPA's parser refuses"):
        engine.evaluate_now("agentweave/grants", smuggled)
    assert engine.evaluate_now("agentweave/grants", request(amount=1)).result["allow"] is True


def test_the_sandbox_has_room_for_the_largest_input(engine: EmbeddedEngine) -> None:
    large = request(amount=1, pad="x" * 3_900_000)
    assert engine.evaluate_now("agentweave/grants", large).result["allow"] is True
    with pytest.raises(PayloadError, match="more than"):
        request(pad="x" * 4_300_000)


def test_many_decisions_use_no_more_memory(engine: EmbeddedEngine) -> None:
    engine.evaluate_now("agentweave/grants", request(amount=1))
    instance = engine._sandboxes.instance
    assert instance is not None
    before = instance._memory.data_len(instance._store)
    for _ in range(2000):
        engine.evaluate_now("agentweave/grants", request(amount=1, pad=["a"] * 50))
    assert instance._memory.data_len(instance._store) == before


def test_a_decision_has_an_instruction_limit(directory: Path, tmp_path: Path) -> None:
    engine = EmbeddedEngine.from_directory(
        directory, cache=tmp_path, limits=ModuleLimits(instructions=20_000, instructions_per_byte=0)
    )
    with pytest.raises(PolicyUnavailableError, match="fuel"):
        engine.evaluate_now("agentweave/grants", request(amount=1))


def test_a_broken_sandbox_is_thrown_away(directory: Path, tmp_path: Path) -> None:
    engine = EmbeddedEngine.from_directory(
        directory, cache=tmp_path, limits=ModuleLimits(memory_bytes=16 * 1024 * 1024)
    )
    engine.evaluate_now("agentweave/grants", request(amount=1))
    first = engine._sandboxes.instance
    with pytest.raises(PolicyUnavailableError, match="opa_malloc"):
        engine.evaluate_now("agentweave/grants", request(amount=1, pad=list(range(400_000))))
    assert engine.evaluate_now("agentweave/grants", request(amount=1)).result["allow"] is True
    assert engine._sandboxes.instance is not first


def test_each_thread_has_a_sandbox_and_all_agree(engine: EmbeddedEngine) -> None:
    gate = threading.Barrier(4)
    seen: set[int] = set()

    def ask(number: int) -> bool:
        gate.wait(5)
        results = [
            engine.evaluate_now("agentweave/grants", request(amount=amount)).result["allow"]
            for amount in (number, 2000) * 50
        ]
        seen.add(id(engine._sandboxes.instance))
        return results == [True, False] * 50

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))
    assert len(seen) == 4


# --- loading -------------------------------------------------------------------------------------------


def test_new_grants_take_effect_without_a_compiler(engine: EmbeddedEngine, directory: Path) -> None:
    before = engine.revision
    (directory / "grants.yaml").write_text(GRANTS.replace("1000", "10"))
    assert engine.load(directory) != before
    assert engine.evaluate_now("agentweave/grants", request(amount=19)).result["allow"] is False


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("grants.yaml", "grants: [{caler: x}]", "caler"),
        ("grants.yaml", "grants: [", "grants.yaml"),
        ("data.yaml", "grants: []\n", "keep one"),
        ("data.yaml", "a: 1\na: 2\n", "twice"),
        ("data.json", '{"a": NaN}', "NaN"),
        ("data.json", "[]", "mapping"),
    ],
)
def test_a_bad_revision_keeps_the_old_one(
    engine: EmbeddedEngine, directory: Path, name: str, text: str, says: str
) -> None:
    before = engine.revision
    (directory / name).write_text(text)
    with pytest.raises(PolicyLoadError, match=says):
        engine.load(directory)
    assert engine.revision == before
    assert engine.evaluate_now("agentweave/grants", request(amount=1)).result["allow"] is True


def test_without_wasmtime_the_way_out_is_named(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentweave_bus.authz.wasm_module.wasmtime", None)
    monkeypatch.setattr("agentweave_bus.authz.wasm._MODULES", {})  # another test may hold this very module
    with pytest.raises(PolicyLoadError, match=r"agentweave-bus\[embedded\]"):
        EmbeddedEngine.from_directory(directory, cache=tmp_path)


def test_a_foreign_module_must_be_a_policy(directory: Path, tmp_path: Path) -> None:
    (directory / "policy.wasm").write_bytes(b"\0asm\x01\0\0\0")
    with pytest.raises(PolicyLoadError, match="can't be set up"):
        EmbeddedEngine.from_directory(directory, cache=tmp_path)
    (directory / "policy.wasm").write_bytes(b"not wasm")
    with pytest.raises(PolicyLoadError, match="no valid WebAssembly"):
        EmbeddedEngine.from_directory(directory, cache=tmp_path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyLoadError, match="does not exist"):
        EmbeddedEngine.from_directory(tmp_path / "nowhere")


@needs_opa
def test_own_rego_is_compiled_once_and_sees_the_shipped_packages(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_policy(
        directory,
        "default allow := false\nallow if { data.agentweave.grants.allow; input.context.payload.amount < 5 }",
    )
    cache = tmp_path / "cache"
    engine = EmbeddedEngine.from_directory(directory, cache=cache)
    assert engine.evaluate_now("own/authz", request(amount=1)).result is True
    assert engine.evaluate_now("own/authz", request(amount=5)).result is False
    monkeypatch.setattr("agentweave_bus.authz.policy_source.find_opa", lambda: None)
    (directory / "grants.yaml").write_text("grants: []")
    engine.load(directory)
    assert engine.evaluate_now("own/authz", request(amount=1)).result is False


@needs_opa
def test_own_rego_replaces_a_shipped_package(directory: Path, tmp_path: Path) -> None:
    (directory / "mine.rego").write_text(
        'package agentweave.grants\nimport rego.v1\ndefault allow := false\nallow if input.action == "anything"'
    )
    engine = EmbeddedEngine.from_directory(directory, cache=tmp_path)
    assert engine.evaluate_now("agentweave/grants", request("anything")).result is True
    assert engine.evaluate_now("agentweave/grants", request(amount=1)).result is False


@needs_opa
def test_decision_comes_before_allow_and_undefined_falls_through(directory: Path, tmp_path: Path) -> None:
    own_policy(
        directory,
        'allow if input.action == "a"\ndecision := {"allow": false, "reason": "no"} if input.context.payload.x',
    )
    engine = EmbeddedEngine.from_directory(directory, cache=tmp_path)
    decided = engine.evaluate_now("own/authz", request("a", x=1))
    assert (decided.rule, decided.result) == ("decision", {"allow": False, "reason": "no"})
    assert engine.evaluate_now("own/authz", request("a")).rule == "allow"
    undefined = engine.evaluate_now("own/authz", request("b"))
    assert (undefined.defined, undefined.rule, undefined.result) == (False, None, None)


@needs_opa
def test_two_values_of_one_rule_are_no_answer(directory: Path, tmp_path: Path) -> None:
    own_policy(
        directory, 'allow := true if input.action == "a"\nallow := false if input.context.kind == "call"'
    )
    engine = EmbeddedEngine.from_directory(directory, cache=tmp_path)
    with pytest.raises(PolicyUnavailableError, match="conflict"):
        engine.evaluate_now("own/authz", request("a"))


@needs_opa
def test_rego_that_does_not_compile_names_file_and_line(directory: Path, tmp_path: Path) -> None:
    own_policy(directory, "allow { broken")
    with pytest.raises(PolicyLoadError, match=r"own\.rego:3"):
        EmbeddedEngine.from_directory(directory, cache=tmp_path)


@needs_opa
def test_a_built_in_that_is_not_offered_is_refused_when_loading(directory: Path, tmp_path: Path) -> None:
    own_policy(
        directory, 'allow if http.send({"method": "get", "url": "http://localhost"}).status_code == 200'
    )
    with pytest.raises(PolicyLoadError, match=r"http\.send"):
        EmbeddedEngine.from_directory(directory, cache=tmp_path)


def test_rego_without_a_compiler_says_the_way_out(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_policy(directory, "allow := true")
    monkeypatch.setenv("AGENTWEAVE_TOOLS", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PolicyLoadError, match=r"needs the 'opa' binary.*make tools"):
        EmbeddedEngine.from_directory(directory, cache=tmp_path)


@needs_opa
def test_a_precompiled_directory_needs_no_compiler_until_it_changes(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_policy(
        directory,
        'default allow := false\nallow if input.action == "a"\nstanding := {"allow": true, "cache_seconds": 5} if input.action == "a"',
    )
    precompile(directory)
    monkeypatch.setattr("agentweave_bus.authz.policy_source.find_opa", lambda: None)
    engine = EmbeddedEngine.from_directory(directory, cache=tmp_path / "empty")
    assert engine.evaluate_now("own/authz", request("a")).result is True
    assert engine.has_standing("own/authz")
    with (directory / "policy.wasm").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PolicyLoadError, match="needs the 'opa' binary"):
        engine.load(directory)


@needs_opa
def test_a_cache_that_others_can_write_is_not_believed(directory: Path, tmp_path: Path) -> None:
    own_policy(directory, "default allow := false")
    cache = tmp_path / "cache"
    load_policy(directory, cache)
    (compiled,) = cache.glob("*.wasm")
    compiled.write_bytes(b"planted")
    assert load_policy(directory, cache).wasm == b"planted"
    cache.chmod(0o777)
    assert load_policy(directory, cache).wasm.startswith(b"\0asm")


# --- standing ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_grant_without_payload_limits_has_a_standing_answer(engine: EmbeddedEngine) -> None:
    assert engine.has_standing("agentweave/grants")
    standing = await engine.evaluate_standing("agentweave/grants", standing_request("health"))
    assert standing is not None
    assert standing.cache_seconds == 30
    assert await engine.evaluate_standing("agentweave/grants", standing_request("process_payment")) is None
    assert await engine.evaluate_standing("agentweave/grants", standing_request("other")) is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    "more",
    [{"payload": {}}, {"task_id": "1"}, {"stored_at": 1}, {"via": [{"iss": "a", "sender_expired": False}]}],
)
async def test_a_standing_rule_is_never_shown_more_than_it_may_depend_on(
    engine: EmbeddedEngine, more: dict[str, object]
) -> None:
    with pytest.raises(PayloadError, match="standing"):
        await engine.evaluate_standing("agentweave/grants", standing_request("health", **more))


@needs_opa
@pytest.mark.parametrize(
    "rule",
    [
        'standing := {"allow": true, "cache_seconds": 1} if input.context.payload.amount < 5',
        'standing := {"allow": true, "cache_seconds": 1} if not input.context.payload.forbidden',
        'c := input.context\nstanding := {"allow": true, "cache_seconds": 1} if not c.payload.forbidden',
        'standing := {"allow": true, "cache_seconds": 1} if { x := input; not x.context.payload.forbidden }',
        'f(x) if not x.payload.forbidden\nstanding := {"allow": true, "cache_seconds": 1} if f(input.context)',
        'p := "payload"\nstanding := {"allow": true, "cache_seconds": 1} if not input.context[p].forbidden',
        'standing := {"allow": true, "cache_seconds": 1} if not input.context.via[0].sender_expired',
        'standing := {"allow": true, "cache_seconds": 1} if input.context.task_id',
        'standing := {"allow": true, "cache_seconds": 1} if data.agentweave.grants.allow',
        'standing := {"allow": true, "cache_seconds": 1} if time.now_ns() > 0',
        'now := time.clock(time.now_ns())[0]\nstanding := {"allow": true, "cache_seconds": 1} if now > 1',
        'allow if input.context.payload.x\nstanding := {"allow": true, "cache_seconds": 1} if allow',
    ],
)
def test_loading_refuses_a_standing_rule_that_would_not_hold(
    directory: Path, tmp_path: Path, rule: str
) -> None:
    own_policy(directory, "default allow := false\n" + rule)
    with pytest.raises(PolicyLoadError, match="standing answer may"):
        EmbeddedEngine.from_directory(directory, cache=tmp_path)


def foreign_module(tmp_path: Path, directory: Path) -> None:
    """Put a module that was compiled elsewhere into ``directory``, without its source."""
    source = tmp_path / "source"
    source.mkdir()
    own_policy(
        source,
        'allow := true\nstanding := {"allow": true, "cache_seconds": 9} if not input.context.payload.forbidden',
    )
    bundle = tmp_path / "bundle.tar.gz"
    rules = ["-e", "own/authz/allow", "-e", "own/authz/standing"]
    subprocess.run(
        [str(find_opa()), "build", "-t", "wasm", *rules, "-o", bundle, "."], cwd=source, check=True
    )
    subprocess.run(["tar", "xzf", bundle, "-C", directory, "/policy.wasm"], check=True)


@needs_opa
@pytest.mark.anyio
async def test_a_standing_rule_may_depend_on_who_asks_whom_and_for_whom(
    directory: Path, tmp_path: Path
) -> None:
    own_policy(
        directory,
        'standing := {"allow": true, "cache_seconds": 7, "reason": "known"} if {\n'
        'input.context.via[_].iss == "spiffe://a.io/x"\n'
        'input.context.principal.sub == "alice"\ninput.action == "a"\n}',
    )
    engine = EmbeddedEngine.from_directory(directory, cache=tmp_path)
    link = {"iss": "spiffe://a.io/x", "aud": ORDER, "cap": "y", "kind": "call"}
    asked = standing_request("a", via=[link], principal={"sub": "alice"})
    standing = await engine.evaluate_standing("own/authz", asked)
    assert standing is not None
    assert (standing.cache_seconds, standing.reason) == (7, "known")
    assert (
        await engine.evaluate_standing("own/authz", standing_request("a", principal={"sub": "alice"})) is None
    )


@needs_opa
@pytest.mark.anyio
async def test_the_standing_rules_of_a_foreign_module_are_never_asked(
    directory: Path, tmp_path: Path
) -> None:
    foreign_module(tmp_path, directory)
    engine = EmbeddedEngine.from_directory(directory, cache=tmp_path)
    assert engine.evaluate_now("own/authz", request("a")).result is True
    assert not engine.has_standing("own/authz")
    assert await engine.evaluate_standing("own/authz", standing_request("a")) is None


def test_the_clock_of_a_standing_question_is_a_failure() -> None:
    builtins = HostBuiltins(lambda: 7)
    builtins.begin(clock_allowed=False)
    with pytest.raises(BuiltinRefusedError, match="clock"):
        builtins.call("time.now_ns", [])


@pytest.mark.anyio
async def test_a_closed_engine_answers_no_more(engine: EmbeddedEngine) -> None:
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(PolicyUnavailableError):
        await engine.evaluate("agentweave/grants", request(amount=1))


def test_engines_of_one_process_share_what_is_compiled() -> None:
    one, other = EmbeddedEngine.from_directory(None), EmbeddedEngine.from_directory(None)
    assert one._loaded().module is other._loaded().module
