"""Secrets from the environment and from files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.secrets import MAX_SECRET_BYTES, EnvironmentSecrets, FileSecrets, SecretsProvider

pytestmark = pytest.mark.anyio


async def test_environment_names_follow_from_the_secrets_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_OPENAI_API_KEY", "sk-1")
    assert await EnvironmentSecrets("SHOP_").get_secret("openai-api-key") == "sk-1"
    assert await EnvironmentSecrets(variables={"A_B": "x"}).get_secret("a.b") == "x"


@pytest.mark.parametrize("variables", [{}, {"KEY": ""}])
async def test_a_missing_variable_is_named(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="Set KEY") as caught:
        await EnvironmentSecrets(variables=variables).get_secret("key")
    assert caught.value.key == "key"


async def test_a_file_is_read_anew_without_its_final_line_break(tmp_path: Path) -> None:
    secrets = FileSecrets(tmp_path)
    (tmp_path / "db-password").write_text("  one \n")
    assert await secrets.get_secret("db-password") == "  one "
    (tmp_path / "db-password").write_text("two\r\n")
    assert await secrets.get_secret("db-password") == "two"


async def test_a_mounted_kubernetes_secret_is_followed(tmp_path: Path) -> None:
    """Kubernetes mounts each key as a link through ``..data``, which it swaps."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "key").write_text("value")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "key").symlink_to("..data/key")
    assert await FileSecrets(tmp_path).get_secret("key") == "value"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "..data", "a\n", "a\x00", "x" * 254]
)
async def test_a_name_can_not_leave_the_directory(tmp_path: Path, name: str) -> None:
    for provider in (FileSecrets(tmp_path / "inner"), EnvironmentSecrets()):
        with pytest.raises(ConfigurationError, match="is no name of a secret"):
            await provider.get_secret(name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"hidden-part\xff", "not UTF-8"),
        (b"hidden-part" + b"x" * MAX_SECRET_BYTES, "larger than 64 KiB"),
    ],
)
async def test_unusable_files_are_named_and_never_quoted(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigurationError, match=says) as caught:
        await FileSecrets(tmp_path).get_secret("key")
    assert str(tmp_path / "key") in str(caught.value)
    assert "hidden-part" not in str(caught.value)
    assert not isinstance(caught.value.__cause__, UnicodeDecodeError)


def test_providers_meet_the_protocol() -> None:
    assert isinstance(EnvironmentSecrets(), SecretsProvider)
    assert isinstance(FileSecrets("."), SecretsProvider)


async def test_the_documented_example_runs(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (tmp_path / "openai-api-key").write_text("sk-1\n")
    program = compile(
        example.replace("/run/secrets", str(tmp_path)), "docs", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    names: dict[str, str] = {}
    await eval(program, names)
    assert names["api_key"] == "sk-1"
