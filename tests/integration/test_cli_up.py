"""``agentweave up`` and what is done with a running stack, all of it by real processes."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

AGENTWEAVE = [sys.executable, "-c", "import sys; from agentweave_bus.cli import main; sys.exit(main())"]
BACKGROUND = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
"""Starts what follows with SIGINT ignored, as scripts do with what stands before ``&``."""
HELLO = "spiffe://agentweave.local/agent/hello"
CLI = "spiffe://agentweave.local/client/cli"
OPERATOR = "spiffe://agentweave.local/client/operator"
UP_SECONDS = 60.0

MORE = """
from agentweave_bus.exceptions import TaskFailedError


class Picky(HelloAgent):
    @capability("fail")
    async def fail(self) -> dict:
        raise TaskFailedError("out of stock")

    @capability("refund")
    async def refund(self) -> dict:
        return {}

    @capability("slow")
    async def slow(self) -> dict:
        import asyncio

        await asyncio.sleep(20)
        return {}
"""


NOBODY = """
  - caller: spiffe://agentweave.local/client/cli
    callee: spiffe://agentweave.local/agent/nobody
    capabilities: [health]
"""


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AGENTWEAVE_")}
    if "AGENTWEAVE_TOOLS" in os.environ:
        kept["AGENTWEAVE_TOOLS"] = os.environ["AGENTWEAVE_TOOLS"]
    return {**kept, **more}


def agentweave(
    folder: Path, *arguments: str, stdin: str = "", traceback: bool = False
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*AGENTWEAVE, *arguments],
        cwd=folder,
        env=clean_environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ("Traceback" in done.stderr) == traceback, done.stderr
    return done


def call(folder: Path, capability: str, *more: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return agentweave(folder, "call", "--target", HELLO, "--capability", capability, *more, stdin=stdin)


@dataclass
class Up:
    """One run of ``agentweave up``."""

    folder: Path
    process: subprocess.Popen[bytes]
    runtime: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, folder: Path, *arguments: str, errors: str | int = "up.err") -> Up:
        """Start it with its messages in a file, or in an open one."""
        runtime = Path(tempfile.mkdtemp(prefix="aw-"))  # short: a socket's path may have 107 bytes
        with os.fdopen(errors, "w") if isinstance(errors, int) else (folder / errors).open("w") as told:
            process = subprocess.Popen(
                [*BACKGROUND, *AGENTWEAVE, "up", *arguments],
                cwd=folder,
                env=clean_environment(XDG_RUNTIME_DIR=str(runtime)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=told,
            )
        return cls(folder, process, runtime)

    def ready(self) -> Up:
        """Read what it prints when it is ready."""
        assert self.process.stdout is not None
        text, deadline = b"", time.monotonic() + UP_SECONDS
        while not text.endswith(b"\n}\n"):
            readable, _, _ = select.select([self.process.stdout], [], [], deadline - time.monotonic())
            more = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            assert more, f"not ready: {self.messages}"
            text += more
        self.facts = json.loads(text)
        return self

    @property
    def messages(self) -> str:
        return (self.folder / "up.err").read_text()

    @property
    def pids(self) -> list[int]:
        return [self.facts["broker_pid"], *(agent["pid"] for agent in self.facts["agents"])]

    @property
    def sockets(self) -> list[Path]:
        return [path for path in self.runtime.rglob("*") if path.is_socket()]

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def end(self) -> None:
        """Leave nothing of this test, whatever it found."""
        try:
            self.stop(signal.SIGKILL)
        finally:
            shutil.rmtree(self.runtime, ignore_errors=True)


def interrupted(process: subprocess.Popen[str], seconds: float) -> int:
    """Press Ctrl-C and return the exit code; what does not end by it is killed."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(seconds)
    finally:
        process.kill()
        process.wait()


def gone(pids: list[int], seconds: float) -> bool:
    """Say whether all processes have ended within ``seconds``."""
    deadline = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def new(folder: Path) -> Path:
    done = agentweave(folder, "new", "hello")
    assert done.returncode == 0, done.stderr
    return folder / "hello"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = new(tmp_path_factory.mktemp("up"))
    with (folder / "hello.py").open("a") as file:
        file.write(MORE)
    config = folder / "hello.yaml"
    config.write_text(
        config.read_text().replace("HelloAgent", "Picky")
        + "identity: {spiffe_endpoint: 'unix:///run/spire/other.sock'}\n"
        + "authorization: {provider: opa, opa_endpoint: 'unix:///run/opa.sock'}\n"
    )
    grants = folder / "grants.yaml"
    grants.write_text(grants.read_text().replace("[greet,", "[greet, fail, slow,") + NOBODY)
    running = Up.start(folder)
    try:
        yield running.ready()
        running.stop()
    finally:
        running.end()


def test_it_says_what_is_there(up: Up) -> None:
    (agent,) = up.facts["agents"]
    assert (agent["name"], agent["spiffe_id"]) == ("hello", HELLO)
    assert Path(agent["spiffe_endpoint"].removeprefix("unix://")).is_socket()
    clients = up.folder / ".agentweave" / "clients"
    assert up.facts["clients"] == {CLI: str(clients / "cli.yaml"), OPERATOR: str(clients / "operator.yaml")}
    assert up.facts["seconds"] > 0


def test_it_says_which_settings_it_replaced(up: Up) -> None:
    replaced = {one["key"]: (one["was"], one["by"]) for one in up.facts["overridden"]}
    assert replaced == {
        "identity.spiffe_endpoint": (
            "unix:///run/spire/other.sock",
            "AGENTWEAVE_IDENTITY__SPIFFE_ENDPOINT",
        ),
        "authorization.provider": ("opa at unix:///run/opa.sock", "AGENTWEAVE_AUTHORIZATION__PROVIDER"),
    }


def test_metrics_and_health_answer(up: Up) -> None:
    url = up.facts["agents"][0]["metrics"]
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert b"agentweave_requests_total" in answer.read()
    with urllib.request.urlopen(url.replace("/metrics", "/healthz"), timeout=5) as answer:
        assert json.load(answer)["ok"] is True


def test_a_call_prints_the_result(up: Up) -> None:
    done = call(up.folder, "greet", "--data", '{"who": "Ada"}')
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "completed"
    assert result["artifacts"] == [{"type": "data", "data": {"greeting": "Hello, Ada!"}}]


def test_data_from_a_file_and_from_standard_input(up: Up) -> None:
    (up.folder / "who.json").write_text('{"who": "Grace"}')
    assert "Hello, Grace!" in call(up.folder, "greet", "--data", "@who.json").stdout
    assert "Hello, Alan!" in call(up.folder, "greet", "--data", "-", stdin='{"who": "Alan"}').stdout


def test_a_failed_task(up: Up) -> None:
    done = call(up.folder, "fail")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "out of stock"


def test_no_answer_in_time(up: Up) -> None:
    done = call(up.folder, "slow", "--timeout", "0.5")
    assert done.returncode in (1, 4), done.stderr  # the agent may say first that its time was up


def test_wrong_arguments(up: Up) -> None:
    done = call(up.folder, "greet", "--data", '{"whom": "Ada"}')
    assert done.returncode == 2
    assert "did you mean 'who'?" in done.stderr


def test_nobody_there(up: Up) -> None:
    done = agentweave(up.folder, "ping", "spiffe://agentweave.local/agent/nobody")
    assert done.returncode == 4
    assert "no replica of spiffe://agentweave.local/agent/nobody" in done.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--timeout", "0"], "a timeout is a positive number"),
        (["--principal", "3"], "--principal is no object of texts"),
        (["--scope", "everything"], "--scope 'everything' is no SPIFFE_ID#CAPABILITY"),
        (["--data", "@nothing.json"], "nothing.json: No such file"),
        (["--as", "bob"], "no client 'bob'"),
        (["--as", "cli", "--config", ".agentweave/clients/cli.yaml"], "Two identities are named"),
    ],
)
def test_mistakes_in_a_call(up: Up, more: list[str], says: str) -> None:
    done = call(up.folder, "greet", *more)
    assert done.returncode == 2
    assert says in done.stderr


def test_denied_and_why_and_the_advice_is_right(up: Up) -> None:
    done = call(up.folder, "refund")
    assert done.returncode == 3
    assert "no grant lets" in done.stderr
    wanted = done.stderr.rpartition("agentweave why ")[2].strip()
    story = json.loads(agentweave(up.folder, "why", wanted).stdout)
    assert story["verdict"] == "denied"
    assert "capabilities: [refund]" in story["would_allow"]
    assert "spiffe://agentweave.local/client/cli" in story["layer"]


def test_a_misspelt_agent(up: Up) -> None:
    done = agentweave(up.folder, "call", "--target", HELLO.replace("hello", "helo"), "--capability", "greet")
    assert done.returncode == 3
    assert "has no agent helo; did you mean hello?" in done.stderr


@pytest.mark.parametrize("command", ["call", "submit"])
def test_a_misspelt_capability(up: Up, command: str) -> None:
    done = agentweave(up.folder, command, "--target", HELLO, "--capability", "gret")
    assert done.returncode == 3
    assert "is about gret there; did you mean greet?" in done.stderr
    done = agentweave(up.folder, command, "--target", HELLO, "--capability", "refund")
    assert done.returncode == 3
    assert "did you mean" not in done.stderr


def test_ping(up: Up) -> None:
    done = agentweave(up.folder, "ping", HELLO)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["health"]["status"] == "healthy"
    assert 0 < facts["ms"] < 5000
    assert agentweave(up.folder, "ping", "spiffe://agentweave.local/agent/other").returncode == 3


def test_identity(up: Up) -> None:
    facts = json.loads(agentweave(up.folder, "identity", "show").stdout)
    assert facts["spiffe_id"] == CLI
    assert facts["bundles"] == {"agentweave.local": 1}
    assert agentweave(up.folder, "identity", "fetch").stdout.startswith("-----BEGIN CERTIFICATE-----")
    assert agentweave(up.folder, "identity", "fetch", "--write", "svid").returncode == 0
    assert (up.folder / "svid" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (up.folder / "svid" / "bundle.agentweave.local.pem").exists()


def test_logs_verify_signatures_included_while_it_runs(up: Up) -> None:
    call(up.folder, "greet")
    done = agentweave(up.folder, "audit", "verify")
    assert done.returncode == 0, done.stdout
    assert not any("signatures" in sentence for sentence in json.loads(done.stdout)["cannot_show"])


def test_tail_follows(up: Up) -> None:
    tail = subprocess.Popen(
        [*BACKGROUND, *AGENTWEAVE, "audit", "tail", "-f", "-n", "1"],
        cwd=up.folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert tail.stdout is not None
    try:
        tail.stdout.readline()  # it stands at the end
        call(up.folder, "greet", "--data", '{"who": "Tail"}')
        while json.loads(line := tail.stdout.readline()).get("event") != "outcome":
            assert line
        assert interrupted(tail, 10) == 130
    finally:
        tail.kill()
        tail.wait()
        tail.stdout.close()


@pytest.mark.slow  # it starts a stack of its own
def test_a_second_interrupt_while_it_comes_up_does_not_wait(tmp_path: Path) -> None:
    """The agent waits for what does not come, and would do so for as long as it has for what it is doing."""
    folder = new(tmp_path)
    waits = "    async def on_start(self):\n        import asyncio, os\n        print('pid', os.getpid(), flush=True)\n"
    code = (folder / "hello.py").read_text()
    head = "class HelloAgent(SecureAgent):\n"
    assert head in code
    code = code.replace(head, f"class HelloAgent(SecureAgent):\n{waits}        await asyncio.sleep(120)\n\n")
    (folder / "hello.py").write_text(code)
    up = Up.start(folder)
    try:
        deadline = time.monotonic() + UP_SECONDS
        while (found := re.search(r"\| pid (\d+)", up.messages)) is None:
            assert time.monotonic() < deadline, up.messages
            time.sleep(0.05)
        up.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert up.process.poll() is None  # in order: the worker may finish what it does
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(10) == 0
        assert gone([int(found[1])], 1)
    finally:
        up.end()


@pytest.mark.slow  # it starts a stack of its own
def test_a_backlog_brings_another_worker_as_like_the_first_as_can_be(tmp_path: Path) -> None:
    """With the identity, broker and policy of the stack, and metrics on a port of its own."""
    folder = new(tmp_path)
    with (folder / "hello.py").open("a") as file:
        file.write(MORE)
    config = folder / "hello.yaml"
    config.write_text(config.read_text().replace("HelloAgent", "Picky"))
    grants = folder / "grants.yaml"
    grants.write_text(grants.read_text().replace("[greet,", "[greet, slow,"))
    stack = folder / "agentweave.yaml"
    scaled = "min: 1, max: 2, scale: {backlog: 1}, concurrency: 1, drain_timeout: 1, health: {beat: 0.2}"
    text = stack.read_text()
    assert text.count("- config: hello.yaml") == 1
    stack.write_text(text.replace("- config: hello.yaml", f"- {{config: hello.yaml, {scaled}}}"))
    up = Up.start(folder)
    try:
        assert [one["name"] for one in up.ready().facts["agents"]] == ["hello/1"]
        for _ in range(4):
            agentweave(folder, "submit", "--target", HELLO, "--capability", "slow")
        deadline = time.monotonic() + UP_SECONDS
        while True:
            told = json.loads(agentweave(folder, "supervisor", "status", "--json").stdout)
            if [one["state"] for one in told["workers"]] == ["ready", "ready"] and told["workers"][1]["beat"]:
                break
            assert time.monotonic() < deadline, told
        assert len({one["metrics"] for one in told["workers"]}) == 2
        assert told["agents"][0]["wanted"] == 2
        assert "hello: 2 workers instead of 1: " in up.messages
        while True:  # until both have seen that the second worker has taken one up
            with urllib.request.urlopen(up.facts["metrics"], timeout=30) as answer:
                page = answer.read().decode()
            (depth,) = re.findall(r'agentweave_queue_depth{agent="hello",capability="slow"} (\S+)', page)
            told = json.loads(agentweave(folder, "supervisor", "status", "--json").stdout)
            if float(depth) == told["agents"][0]["backlog"] == 2:
                break
            assert time.monotonic() < deadline, (depth, told)
        assert call(folder, "greet", stdin='{"name": "x"}').returncode == 0
        assert up.stop() == 0
    finally:
        up.end()


@pytest.mark.slow  # it starts a stack of its own
def test_no_second_stack_in_one_state_directory(up: Up) -> None:
    done = agentweave(up.folder, "up")
    assert done.returncode == 2
    assert f"in use by another stack (process {up.process.pid})" in done.stderr
    assert call(up.folder, "greet").returncode == 0  # and the first one is unharmed


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Start ``agentweave up`` for a fresh agent; nothing of it is left after the test."""
    begun: list[Up] = []

    def start(folder: Path, *arguments: str, **options: Any) -> Up:
        begun.append(Up.start(folder, *arguments, **options))
        return begun[-1]

    yield start
    for one in begun:
        one.end()


@pytest.mark.slow  # it starts a stack of its own, twice
def test_ctrl_c_leaves_no_process_and_no_socket(tmp_path: Path, starting: Callable[..., Up]) -> None:
    folder = new(tmp_path)
    up = starting(folder).ready()
    assert up.sockets
    assert up.stop(signal.SIGINT) == 0
    assert gone(up.pids, 0)
    assert up.sockets == []
    assert not list(up.runtime.iterdir())
    assert not list((folder / ".agentweave" / "clients").iterdir())
    assert "Traceback" not in up.messages
    up = starting(folder).ready()  # and the state that is left can be used again
    assert call(folder, "greet").returncode == 0
    assert up.stop(signal.SIGTERM) == 0


@pytest.mark.slow  # it starts a stack of its own
def test_ctrl_c_when_nobody_reads_its_messages_any_more(tmp_path: Path, starting: Callable[..., Up]) -> None:
    """As after ``agentweave up 2>&1 | tee log``: Ctrl-C ends tee, too."""
    reading, writing = os.pipe()
    up = starting(new(tmp_path), errors=writing).ready()
    os.close(reading)
    os.kill(up.pids[1], signal.SIGKILL)  # of which there is something to say
    assert up.stop(signal.SIGINT) == 0
    assert gone(up.pids, 0)


@pytest.mark.slow  # it starts a stack of its own
def test_ctrl_c_while_it_starts(tmp_path: Path, starting: Callable[..., Up]) -> None:
    folder = new(tmp_path)
    up = starting(folder)
    deadline = time.monotonic() + UP_SECONDS
    while not (folder / ".agentweave" / "clients" / "cli.yaml").exists():  # workers are about to start
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert up.stop() == 0
    assert up.sockets == []
    assert "Traceback" not in up.messages


@pytest.mark.slow  # it starts a stack of its own
def test_killed_outright_it_leaves_no_process(tmp_path: Path, starting: Callable[..., Up]) -> None:
    up = starting(new(tmp_path)).ready()
    up.stop(signal.SIGKILL)
    assert gone(up.pids, 5)
    began = time.monotonic()
    for more in ([], ["--config", up.facts["clients"][CLI]]):
        done = call(up.folder, "greet", *more)
        assert done.returncode == 4
        assert "start `agentweave up` again" in done.stderr
    assert time.monotonic() - began < 25  # and does not wait for who can't answer


@pytest.mark.slow  # it starts a stack of its own
def test_the_next_one_tidies_up_after_one_that_was_killed(
    tmp_path: Path, starting: Callable[..., Up]
) -> None:
    folder = new(tmp_path)
    killed = starting(folder).ready()
    killed.stop(signal.SIGKILL)
    assert gone(killed.pids, 5)
    assert killed.sockets
    stale = folder / ".agentweave" / "clients" / "former.yaml"
    shutil.copy(killed.facts["clients"][CLI], stale)
    starting(folder).ready()
    assert not list(killed.runtime.iterdir())
    assert not stale.exists()
    assert call(folder, "greet").returncode == 0


def test_what_lies_in_the_state_directory_stays_out_of_git(up: Up) -> None:
    assert (up.folder / ".agentweave" / ".gitignore").read_text().splitlines()[-1] == "*"
    subprocess.run(["git", "init", "-q"], cwd=up.folder, check=True)
    seen = subprocess.run(
        ["git", "status", "--short", "-uall"], cwd=up.folder, check=True, capture_output=True, text=True
    )
    assert ".agentweave/" not in seen.stdout
    assert "hello.py" in seen.stdout


@pytest.mark.slow  # it starts a stack of its own
def test_from_another_directory_with_a_state_directory_of_its_own(
    tmp_path: Path, starting: Callable[..., Up]
) -> None:
    new(tmp_path)
    up = starting(tmp_path, "hello/agentweave.yaml", "--state-dir", "state").ready()
    assert call(tmp_path, "greet", "--config", up.facts["clients"][CLI]).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hello", "state", "up.err"]


@pytest.mark.slow  # it starts a stack of its own
def test_without_a_file_there_is_a_broker_to_call_through(
    tmp_path: Path, starting: Callable[..., Up]
) -> None:
    up = starting(tmp_path).ready()
    assert up.facts["agents"] == []
    assert "nobody may call anybody" in up.messages
    done = call(tmp_path, "greet")
    assert done.returncode == 3
    assert agentweave(tmp_path, "why", done.stderr.rpartition("why ")[2].strip()).returncode == 0


@pytest.mark.slow  # it starts a stack of its own
def test_without_its_broker_it_ends_and_says_so(tmp_path: Path, starting: Callable[..., Up]) -> None:
    up = starting(tmp_path).ready()
    os.kill(up.facts["broker_pid"], signal.SIGKILL)
    assert up.process.wait(30) == 4
    assert "agentweave: the broker ended (exit code -9); nobody can be reached any more." in up.messages


@pytest.mark.slow  # it starts a stack of its own
def test_a_worker_that_can_t_start_ends_it(tmp_path: Path) -> None:
    folder = new(tmp_path)
    (folder / "hello.py").write_text("raise RuntimeError('broken on purpose')\n")
    done = agentweave(folder, "up", "--state-dir", "state", traceback=True)  # the agent's own, in its log
    assert done.returncode == 1
    assert "agentweave: hello ended with exit code 1 instead of becoming ready; it said last:" in done.stderr
    assert done.stderr.endswith("  RuntimeError: broken on purpose\n")
    (folder / "hello.py").write_text("HelloAgent = 3\n")
    done = agentweave(folder, "up", "--state-dir", "state")
    assert done.returncode == 2
    assert "not an agent" in done.stderr
    assert not (folder / ".agentweave").exists()  # all state went where it was told to


@pytest.mark.slow  # it starts a stack of its own
def test_a_worker_that_dies_is_started_again_and_replicas_go_on(
    tmp_path: Path, starting: Callable[..., Up]
) -> None:
    folder = new(tmp_path)
    stack = folder / "agentweave.yaml"
    more = "config: hello.yaml\n    replicas: 2\n    restart: {first: 70.0, longest: 70.0, limit: 2}"
    stack.write_text(stack.read_text().replace("config: hello.yaml", more))
    up = starting(folder).ready()
    one, two = up.facts["agents"]
    assert (one["name"], two["name"]) == ("hello/1", "hello/2")
    os.kill(one["pid"], signal.SIGKILL)
    assert gone([one["pid"]], 5)
    assert call(folder, "greet").returncode == 0
    assert "hello/1 was ended by SIGKILL; it is started again in" in up.messages
    seen = agentweave(folder, "doctor")
    (row,) = [check for check in json.loads(seen.stdout)["checks"] if check["check"] == "stack"]
    assert (seen.returncode, row["status"]) == (0, "warning")
    assert row["found"] == f"hello/1 (process {one['pid']}) has ended; other replicas of it go on"
    assert agentweave(folder, "supervisor", "restart", "hello").returncode == 0
    now = json.loads(agentweave(folder, "supervisor", "status").stdout)["workers"]
    assert [worker["state"] for worker in now] == ["ready", "ready"]
    assert not {worker["pid"] for worker in now} & {one["pid"], two["pid"]}
    assert call(folder, "greet").returncode == 0
    (folder / "hello.py").write_text("HelloAgent = 3\n")  # the next ones find nothing to run
    refused = agentweave(folder, "supervisor", "restart")
    assert refused.returncode == 1
    assert "hello/1 was not replaced: hello/1 ended with exit code 2" in refused.stderr
    assert call(folder, "greet").returncode == 0  # the old ones go on
    assert agentweave(folder, "supervisor", "scale", "hello", "1").returncode == 0
    os.kill(now[0]["pid"], signal.SIGKILL)
    agentweave(folder, "supervisor", "restart")
    assert up.process.wait(20) == 1
    assert "no worker is left" in up.messages


@pytest.mark.slow  # it starts processes of its own
def test_serve_runs_one_agent_against_that_stack(up: Up) -> None:
    """``serve`` takes all it needs from its file: here the client's identity serves as an agent's."""
    config = (up.folder / ".agentweave" / "clients" / "cli.yaml").read_text()
    (up.folder / "served.yaml").write_text(
        config.replace("agent:\n", "agent:\n  class: hello:HelloAgent\n").replace("WARNING", "INFO")
    )
    served = subprocess.Popen(
        [*BACKGROUND, *AGENTWEAVE, "serve", "served.yaml"],
        cwd=up.folder,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert served.stderr is not None
    try:
        while "is ready" not in (line := served.stderr.readline()):
            assert line
        assert interrupted(served, 20) == 0
    finally:
        served.kill()
        served.wait()
        served.stderr.close()


@pytest.mark.slow  # it waits for time to pass
def test_serve_without_a_workload_api(tmp_path: Path) -> None:
    done = agentweave(new(tmp_path), "serve", "hello.yaml")
    assert done.returncode == 4
    assert "identity.spiffe_endpoint" in done.stderr
