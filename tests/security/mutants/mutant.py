"""One check taken out of the product: where it stands, what is put in its place, and which attacks must notice.

A place is named by file and function, and by the expression or statement that is replaced, compared as
syntax and not as text. It must be there exactly once: a check that was moved or rewritten is reported as a
mutant that no longer applies, with where it may be now, and never as one that was noticed.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["DoesNotApplyError", "Mutant", "functions_of", "holds", "mutated"]

Function = ast.FunctionDef | ast.AsyncFunctionDef
_SHOWN = 160


class DoesNotApplyError(Exception):
    """What a mutant takes out is not there, or not once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A check that is taken out.

    ``part`` is the step of admission, or the reader of answers, to which it belongs; ``what`` says what is
    taken out. ``find`` is replaced by ``put`` in ``function`` (``Class.method``) of ``file``; without
    ``find``, the whole body is, of each of the functions if there are several (``A.f, A.g``). ``tests`` are
    the arguments for pytest that name the attacks which must fail. ``survives`` says why none does, where
    that is no fault.
    """

    part: int | str
    what: str
    file: str
    function: str
    find: str = ""
    put: str = "False"
    tests: tuple[str, ...] = ()
    survives: str = ""

    @property
    def where(self) -> str:
        """The part, in words."""
        return self.part if isinstance(self.part, str) else f"step {self.part}"

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.where}: {self.what}"


def mutated(source: str, mutant: Mutant) -> str:
    """Return ``source`` with ``mutant``'s check taken out.

    Raises:
        DoesNotApplyError: function or check are not in it exactly once, or nothing is changed.

    """
    tree = ast.parse(source)
    for name in mutant.function.split(", "):
        function = _function(tree, mutant, name)
        if mutant.find:
            _replace(function, mutant)
        else:
            _replace_body(function, mutant)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def functions_of(source: str) -> Iterator[tuple[str, Function]]:
    """Every function of a module and every method of its classes, by the name that mutants call it."""
    for one in ast.parse(source).body:
        if isinstance(one, Function):
            yield one.name, one
        elif isinstance(one, ast.ClassDef):
            yield from ((f"{one.name}.{of.name}", of) for of in one.body if isinstance(of, Function))


def holds(function: Function, find: str) -> bool:
    """Whether an expression or statement stands in a function."""
    wanted = ast.dump(_parsed(find))
    return any(ast.dump(node) == wanted for node in ast.walk(function))


def _function(tree: ast.Module, mutant: Mutant, name: str) -> Function:
    scope: ast.AST = tree
    *classes, last = name.split(".")
    for one in classes:
        scope = _only(
            [of for of in ast.iter_child_nodes(scope) if isinstance(of, ast.ClassDef) and of.name == one],
            mutant,
            name,
        )
    return _only(
        [of for of in ast.iter_child_nodes(scope) if isinstance(of, Function) and of.name == last],
        mutant,
        name,
    )


def _only(found: list, mutant: Mutant, name: str):
    if len(found) != 1:
        raise DoesNotApplyError(f"{mutant.name}: {mutant.file} has {name} {len(found)} times, not once")
    return found[0]


class _Replacer(ast.NodeTransformer):
    def __init__(self, find: ast.AST, put: ast.AST) -> None:
        self._wanted = ast.dump(find)
        self._put = put
        self.times = 0

    def visit(self, node: ast.AST) -> ast.AST:
        if ast.dump(node) == self._wanted:
            self.times += 1
            return self._put
        return self.generic_visit(node)


def _replace(function: Function, mutant: Mutant) -> None:
    replacer = _Replacer(_parsed(mutant.find), _parsed(mutant.put))
    replacer.visit(function)
    if replacer.times != 1:
        alike = "" if replacer.times else _most_alike(function, mutant.find)
        raise DoesNotApplyError(
            f"{mutant.name}: {mutant.file} has {mutant.find!r} in {mutant.function} {replacer.times} times, "
            f"not once{alike}"
        )


def _replace_body(function: Function, mutant: Mutant) -> None:
    docstring = function.body[:1] if ast.get_docstring(function) is not None else []
    before, function.body = ast.dump(function), [*docstring, *ast.parse(mutant.put).body]
    if ast.dump(function) == before:
        raise DoesNotApplyError(
            f"{mutant.name}: {mutant.function} in {mutant.file} does nothing else already"
        )


def _most_alike(function: Function, find: str) -> str:
    """What in the function could be it, rewritten."""
    there = {ast.unparse(node): node for node in ast.walk(function) if isinstance(node, ast.expr | ast.stmt)}
    for text in difflib.get_close_matches(ast.unparse(_parsed(find)), list(there), n=1):
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        return f"; most alike is {shown!r} in line {there[text].lineno}"
    return "; nothing there is like it"


def _parsed(source: str) -> ast.AST:
    (statement,) = ast.parse(source).body
    return statement.value if isinstance(statement, ast.Expr) else statement
