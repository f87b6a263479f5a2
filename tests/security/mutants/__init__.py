"""What happens to the attacks when a check is taken out: ``make mutants``."""

from __future__ import annotations

from pathlib import Path

from tests.security.mutants import of_answers, of_envelopes, of_requests
from tests.security.mutants.mutant import DoesNotApplyError, Mutant, functions_of, holds, mutated

__all__ = ["ALL", "which_do_not_apply"]

_LISTS = {
    f"{one.__name__.replace('.', '/')}.py": one.MUTANTS for one in (of_envelopes, of_requests, of_answers)
}


def _place(mutant: Mutant) -> int:
    return mutant.part if isinstance(mutant.part, int) else 99


ALL = tuple(sorted((mutant for one in _LISTS.values() for mutant in one), key=_place))
"""All mutants, by the steps of admission; the readers of answers last."""


def which_do_not_apply(root: Path, mutants: tuple[Mutant, ...] = ALL) -> list[str]:
    """Say of each mutant whose check is not there any more what is missed, where it may be, and where to mend it."""
    problems = []
    for mutant in mutants:
        try:
            mutated((root / mutant.file).read_text(), mutant)
        except (DoesNotApplyError, FileNotFoundError) as problem:
            named = [f"named in {path}" for path, listed in _LISTS.items() if mutant in listed]
            problems.append("\n    ".join((str(problem), *_elsewhere(root, mutant), *named)))
    return problems


def _elsewhere(root: Path, mutant: Mutant) -> list[str]:
    """Where the expression stands now, or else a function of that name."""
    exactly, by_name = [], []
    last = mutant.function.rpartition(".")[2]
    for path in sorted((root / "agentweave_bus").rglob("*.py")):
        for name, function in functions_of(path.read_text()):
            place = f"{path.relative_to(root)}, {name}, line {function.lineno}"
            if mutant.find and holds(function, mutant.find):
                exactly.append(f"it stands in {place}")
            elif name.rpartition(".")[2] == last and str(path.relative_to(root)) != mutant.file:
                by_name.append(f"a function of that name is {place}")
    return exactly or by_name
