"""``undocumented``: public names whose docstring lacks a section that it needs."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from tests.import_graph import ROOT, follow, module_of, read_modules

ARGUMENTS = ("Args:", "Attributes:")
RESULTS = ("Returns:", "Yields:")


def undocumented(sources: Mapping[str, str]) -> list[str]:
    """Returns a line for every name in an ``__all__`` of a package that is not fully documented.

    A function with parameters needs "Args:", one that returns something "Returns:" or "Yields:",
    a class with a constructor of its own or with fields "Args:" or "Attributes:", and a constant
    the string below it.

    Args:
        sources: Source text by path below the package's folder, e.g. "train/loop.py".
    """
    modules = read_modules(sources)
    trees = {module_of(path): ast.parse(text) for path, text in sources.items()}
    packages = [module_of(path) for path in sources if path.endswith("__init__.py")]
    lines = set()
    for package in packages:
        for name in modules[package].public:
            module, defined = follow(modules, package, name)
            lines |= {
                f"{ROOT}.{module}.{defined}: no {lack}" for lack in _lacks(trees[module], defined)
            }
    return sorted(lines)


def _lacks(tree: ast.Module, name: str) -> Iterator[str]:
    """What the documentation of one top-level name of a module lacks."""
    if not name:  # the module itself is public
        yield from [] if ast.get_docstring(tree) else ["docstring"]
        return
    last: ast.stmt | None = None
    docstring = None
    for statement, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if name in _names(statement):
            last = statement
            docstring = _docstring(statement, after)
    if last is None:
        yield "definition"
    elif docstring is None:
        yield "docstring"
    elif isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef):
        if _parameters(last) and "Args:" not in docstring:
            yield "Args:"
        if _returns(last) and not any(section in docstring for section in RESULTS):
            yield "Returns:"
    elif (
        isinstance(last, ast.ClassDef)
        and _is_filled(last)
        and not any(section in docstring for section in ARGUMENTS)
    ):
        yield "Args: or Attributes:"


def _names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.AnnAssign):
        return {statement.target.id} if isinstance(statement.target, ast.Name) else set()
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return set()


def _docstring(statement: ast.stmt, after: ast.stmt | None) -> str | None:
    """The docstring of a function or class (its constructor's with it), or below a value."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(statement)
    if isinstance(statement, ast.ClassDef):
        own = ast.get_docstring(statement)
        constructor = _constructor(statement)
        more = constructor and ast.get_docstring(constructor)
        return own and f"{own}\n{more or ''}"
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        return after.value.value if isinstance(after.value.value, str) else None
    return None


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    star = [arg for arg in (arguments.vararg, arguments.kwarg) if arg is not None]
    return [arg.arg for arg in [*named, *star] if arg.arg not in ("self", "cls")]


def _returns(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return function.returns is not None and ast.unparse(function.returns) not in (
        "None",
        "NoReturn",
        "Never",
    )


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
    return next((method for method in methods if method.name == "__init__"), None)


def _is_filled(node: ast.ClassDef) -> bool:
    """True if the class has fields, or a constructor with parameters."""
    constructor = _constructor(node)
    if constructor is not None and _parameters(constructor):
        return True
    fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
    return any("ClassVar" not in ast.unparse(field.annotation) for field in fields)
