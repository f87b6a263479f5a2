"""Where an agent gets other people's keys from: API keys, passwords, tokens.

The agent's own identity is never a secret of this kind; it comes from its SVID. A provider is one
method, so that an agent does not learn where its secrets lie, and tests bring their own.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.regular_files import open_regular

__all__ = ["MAX_SECRET_BYTES", "EnvironmentSecrets", "FileSecrets", "SecretsProvider"]

MAX_SECRET_BYTES: Final = 64 * 1024

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,253}")


@runtime_checkable
class SecretsProvider(Protocol):
    """Gives secrets by name."""

    async def get_secret(self, name: str) -> str:
        """Return the secret called ``name``.

        Raises:
            ConfigurationError: there is none, or ``name`` is no name; never tells a secret's value.

        """
        ...


class EnvironmentSecrets:
    """Secrets from environment variables: ``openai-api-key`` is ``OPENAI_API_KEY`` after ``prefix``."""

    def __init__(self, prefix: str = "", *, variables: Mapping[str, str] | None = None) -> None:
        self._prefix = prefix
        self._variables = os.environ if variables is None else variables

    async def get_secret(self, name: str) -> str:
        """Return the value of the variable for ``name``; an empty one counts as missing.

        Raises:
            ConfigurationError: the variable is not set.

        """
        variable = self._prefix + re.sub(r"[-.]", "_", _checked(name)).upper()
        value = self._variables.get(variable, "")
        if not value:
            raise ConfigurationError(f"There is no secret {name!r}.", key=name, hint=f"Set {variable}.")
        return value


class FileSecrets:
    """Secrets from the files of a directory, such as a mounted Kubernetes Secret.

    Read anew on every request, so a changed secret takes effect at once. A final line break is taken
    off, because editors add one.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    async def get_secret(self, name: str) -> str:
        """Return the text of the file called ``name``.

        Raises:
            ConfigurationError: it can't be read, is empty, too large or no UTF-8 text.

        """
        return await asyncio.to_thread(self._read, _checked(name))

    def _read(self, name: str) -> str:
        path = self._directory / name
        try:
            with open_regular(path) as file:  # in a thread, which nothing could end while it waits
                data = file.read(MAX_SECRET_BYTES + 1)
            if len(data) > MAX_SECRET_BYTES:
                raise _unusable(name, path, f"is larger than {MAX_SECRET_BYTES // 1024} KiB")
            text = data.decode("utf-8")
        except OSError as error:
            raise _unusable(name, path, f"can't be read ({error.strerror})") from error
        except UnicodeDecodeError:
            # Not chained: the error would carry the secret's bytes.
            raise _unusable(name, path, "is not UTF-8 text") from None
        text = text.removesuffix("\n").removesuffix("\r")
        if not text:
            raise _unusable(name, path, "is empty")
        return text


def _checked(name: str) -> str:
    """Refuse what could leave the directory, or is no variable."""
    if not _NAME.fullmatch(name) or name in {".", ".."} or name.startswith(".."):
        raise ConfigurationError(
            f"{name!r} is no name of a secret.", hint="Use letters, digits, '.', '-' and '_'."
        )
    return name


def _unusable(name: str, path: Path, problem: str) -> ConfigurationError:
    return ConfigurationError(f"Secret {name!r}: {path} {problem}.", key=name)
