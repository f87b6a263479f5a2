"""Passwords are kept as scrypt hashes, each with a salt and the cost it was made with."""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
from typing import Final

__all__ = ["hash_password", "password_matches"]

_COST: Final = 2**14  # 16 MiB and some 30 ms: OWASP's smaller setting, with the parallelism below
_BLOCK: Final = 8
_PARALLEL: Final = 5
_SALT_BYTES: Final = 16
_KEY_BYTES: Final = 32


def hash_password(password: str) -> str:
    """Return ``scrypt$cost$block$parallel$salt$key``, salt and key in hex."""
    salt = os.urandom(_SALT_BYTES)
    key = _derive(password, salt, _COST, _BLOCK, _PARALLEL)
    return f"scrypt${_COST}${_BLOCK}${_PARALLEL}${salt.hex()}${key.hex()}"


def password_matches(password: str, stored: str | None) -> bool:
    """Compare; without a stored hash the same work is done, so that time doesn't tell who has an account."""
    _, cost, block, parallel, salt, key = (stored or _nobody()).split("$")
    derived = _derive(password, bytes.fromhex(salt), int(cost), int(block), int(parallel))
    return hmac.compare_digest(derived, bytes.fromhex(key)) and stored is not None


def _derive(password: str, salt: bytes, cost: int, block: int, parallel: int) -> bytes:
    return hashlib.scrypt(
        password.encode(), salt=salt, n=cost, r=block, p=parallel, maxmem=64 * 1024 * 1024, dklen=_KEY_BYTES
    )


@functools.cache
def _nobody() -> str:
    return hash_password("")
