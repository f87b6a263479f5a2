"""What happens to the attacks when a check is taken out: ``make mutants``."""

from __future__ import annotations

from tests.security.mutants import of_answers, of_envelopes, of_requests
from tests.security.mutants.mutant import Mutant

__all__ = ["ALL"]


def _place(mutant: Mutant) -> int:
    return mutant.part if isinstance(mutant.part, int) else 99


ALL = tuple(sorted((*of_envelopes.MUTANTS, *of_requests.MUTANTS, *of_answers.MUTANTS), key=_place))
"""All mutants, by the steps of admission; the readers of answers last."""
