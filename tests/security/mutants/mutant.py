"""One check taken out of the product: where it stands, what is put in its place, and which attacks must notice.

A place is named by file and function, and by the expression or statement that is replaced, compared as
syntax and not as text. It must be there exactly once: a check that was moved or rewritten is reported as a
mutant that no longer applies, and never as one that was noticed.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

__all__ = ["DoesNotApplyError", "Mutant", "mutated"]


class DoesNotApplyError(Exception):
    """What a mutant takes out is not there, or not once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A check that is taken out.

    ``part`` is the step of admission, or the reader of answers, to which it belongs; ``what`` says what is
    taken out. ``find`` is replaced by ``put`` in ``function`` (``Class.method``) of ``file``; without
    ``find``, the whole body is. ``tests`` are the arguments for pytest that name the attacks which must fail.
    ``survives`` says why none does, where that is no fault.
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
    def name(self) -> str:
        """What tables call it."""
        return f"{self.part if isinstance(self.part, str) else f'step {self.part}'}: {self.what}"


def mutated(source: str, mutant: Mutant) -> str:
    """Return ``source`` with ``mutant``'s check taken out.

    Raises:
        DoesNotApplyError: function or check are not in it exactly once.

    """
    tree = ast.parse(source)
    function = _function(tree, mutant)
    if mutant.find:
        _replace(function, mutant)
    else:
        docstring = function.body[:1] if ast.get_docstring(function) is not None else []
        function.body = [*docstring, *ast.parse(mutant.put).body]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _function(tree: ast.Module, mutant: Mutant) -> ast.FunctionDef | ast.AsyncFunctionDef:
    scope: ast.AST = tree
    *classes, last = mutant.function.split(".")
    for name in classes:
        scope = _only(
            [
                one
                for one in ast.iter_child_nodes(scope)
                if isinstance(one, ast.ClassDef) and one.name == name
            ],
            mutant,
        )
    functions = [
        one
        for one in ast.iter_child_nodes(scope)
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name == last
    ]
    return _only(functions, mutant)


def _only(found: list, mutant: Mutant):
    if len(found) != 1:
        raise DoesNotApplyError(
            f"{mutant.name}: {mutant.file} has {mutant.function} {len(found)} times, not once"
        )
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


def _replace(function: ast.AST, mutant: Mutant) -> None:
    replacer = _Replacer(_parsed(mutant.find), _parsed(mutant.put))
    replacer.visit(function)
    if replacer.times != 1:
        raise DoesNotApplyError(
            f"{mutant.name}: {mutant.function} in {mutant.file} has {mutant.find!r} {replacer.times} times,"
            " not once"
        )


def _parsed(source: str) -> ast.AST:
    (statement,) = ast.parse(source).body
    return statement.value if isinstance(statement, ast.Expr) else statement
