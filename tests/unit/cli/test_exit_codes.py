"""Every error has one exit code, and no error of the package becomes a traceback."""

from __future__ import annotations

import nats.errors
import pytest

from agentweave_bus import cli, exceptions
from agentweave_bus.cli.exit_codes import ExitCode, exit_code_of, message_of, single_error
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    AttemptLostError,
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    ChainRefusedError,
    CircuitOpenError,
    ConfigurationError,
    FederationError,
    IdempotencyError,
    InvalidSpiffeIdError,
    NoResponderError,
    PayloadError,
    QueueFullError,
    RetryableError,
    StepFailedError,
    SvidUnavailableError,
    TaskCanceledError,
    TaskFailedError,
    TaskNotFoundError,
    WorkerError,
    WorkloadApiUnavailableError,
)

CASES = [
    (ConfigurationError("x"), ExitCode.USAGE),
    (InvalidSpiffeIdError("x"), ExitCode.USAGE),
    (PayloadError("x"), ExitCode.USAGE),
    (AuthorizationError("x"), ExitCode.DENIED),
    (FederationError("x", trust_domain="a.io"), ExitCode.DENIED),
    (ChainRefusedError("x"), ExitCode.DENIED),
    (WorkloadApiUnavailableError("x"), ExitCode.UNREACHABLE),
    (SvidUnavailableError("x"), ExitCode.UNREACHABLE),
    (BusError("x"), ExitCode.UNREACHABLE),
    (NoResponderError("x"), ExitCode.UNREACHABLE),
    (CircuitOpenError("x", retry_after=1), ExitCode.UNREACHABLE),
    (CallTimeoutError("x"), ExitCode.UNREACHABLE),
    (CallRefusedError("x", step="payload", reason="'n' is missing"), ExitCode.USAGE),
    (CallRefusedError("x", step="payload", reason="not allowed"), ExitCode.DENIED),
    (CallRefusedError("x", step="local"), ExitCode.USAGE),
    (CallRefusedError("x", step="delegation", reason="unproved"), ExitCode.DENIED),
    (CallRefusedError("x", step="replay", retry_after=1.0), ExitCode.UNREACHABLE),
    (WorkerError("x", name="w", exit_code=2), ExitCode.USAGE),
    (WorkerError("x", name="w", exit_code=4), ExitCode.UNREACHABLE),
    (WorkerError("x", name="w", exit_code=-9), ExitCode.FAILED),
    (WorkerError("x", name="w"), ExitCode.FAILED),
    (TaskFailedError("x"), ExitCode.FAILED),
    (AgentCallError("x"), ExitCode.FAILED),
    (RetryableError("x"), ExitCode.FAILED),
    (StepFailedError("x", step="charge", correlation_id="1"), ExitCode.FAILED),
    (AttemptLostError("x"), ExitCode.FAILED),
    (TaskCanceledError("x"), ExitCode.FAILED),
    (QueueFullError("x"), ExitCode.UNREACHABLE),
    (IdempotencyError("x"), ExitCode.USAGE),
    (TaskNotFoundError("x"), ExitCode.USAGE),
]


BY_DEFAULT = {"AuditError", "EnvelopeError", "IdentityError", "PolicyError", "BundleUnavailableError"}
BY_DEFAULT |= {
    "MalformedEnvelopeError",
    "SignatureRefusedError",
    "DelegationRefusedError",
    "TimeRefusedError",
}
BY_DEFAULT |= {"PolicyLoadError", "PolicyUnavailableError", "UnreachableError"}


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda value: repr(value)[:60])
def test_the_code_of_an_error(error: AgentWeaveError, code: ExitCode) -> None:
    assert exit_code_of(error) is code


def test_every_error_has_a_case_or_that_of_its_branch() -> None:
    covered = tuple(type(error) for error, _ in CASES)
    for name in exceptions.__all__:
        error = getattr(exceptions, name)
        assert error is AgentWeaveError or issubclass(error, covered) or name in BY_DEFAULT, name


def test_a_denial_says_how_to_learn_more() -> None:
    assert "agentweave why abc-1" in message_of(AuthorizationError("no", audit_id="abc-1"))
    assert "agentweave why" not in message_of(AuthorizationError("no"))


def test_who_is_let_in_by_no_broker_is_denied_and_sent_to_the_doctor() -> None:
    shut_out = BusError("can't connect to the broker at tls://x: nats: 'Authorization Violation'")
    shut_out.__cause__ = nats.errors.AuthorizationError()
    assert exit_code_of(shut_out) is ExitCode.DENIED
    assert "agentweave doctor" in message_of(shut_out)
    away = BusError("can't connect to the broker at tls://x: Authorization Violation")
    away.__cause__ = ConnectionRefusedError()
    assert exit_code_of(away) is ExitCode.UNREACHABLE
    assert "doctor" not in message_of(away)


def test_a_group_of_one_is_what_it_holds() -> None:
    error = BusError("x")
    assert single_error(ExceptionGroup("a", [ExceptionGroup("b", [error])])) is error
    several = ExceptionGroup("a", [error, error])
    assert single_error(several) is several


def run_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def run(_options: object) -> int:
        raise error

    monkeypatch.setattr("agentweave_bus.cli.config.run_check", run)
    return cli.main(["config", "check", "x.yaml"])


def test_errors_become_messages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    group = ExceptionGroup("tasks", [BusError("the broker is away")])
    assert run_raising(monkeypatch, group) == 4
    assert capsys.readouterr().err == "agentweave: the broker is away\n"
    assert run_raising(monkeypatch, FileNotFoundError(2, "No such file or directory", "a.json")) == 2
    assert capsys.readouterr().err == "agentweave: a.json: No such file or directory.\n"
    assert run_raising(monkeypatch, KeyboardInterrupt()) == 130


def test_a_mistake_of_ours_stays_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_raising(monkeypatch, ZeroDivisionError())
