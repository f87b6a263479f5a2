"""A real stack for every test here."""

from tests.integration.fixtures import *  # noqa: F403
from tests.integration.fixtures import _tests_own_logging_and_signals  # noqa: F401
