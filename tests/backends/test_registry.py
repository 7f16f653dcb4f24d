"""Kernel families are named inside backends/ alone; all else asks the registry."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparsedm_compiler
from sparsedm_compiler import KernelError
from sparsedm_compiler.backends.kernel_family import KernelFamily
from sparsedm_compiler.backends.registry import find_families, find_family, list_families
from sparsedm_compiler.patterns import Pattern

PACKAGE = Path(sparsedm_compiler.__file__).parent
FOLDERS = {path.name for path in (PACKAGE / "backends").iterdir() if path.is_dir()}


def list_imports(path: Path) -> set[str]:
    """The modules that a file imports, and the names it imports from them, dotted."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_module_outside_backends_imports_a_family() -> None:
    paths = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "backends"
    ]
    assert len(paths) > 50
    for path in paths:
        for name in list_imports(path):
            _, _, inside = f".{name}".partition(".backends.")
            assert inside.partition(".")[0] not in FOLDERS, f"{path} imports {name}"


@pytest.mark.parametrize("family", list_families(), ids=lambda family: family.names[0])
def test_every_family_declares_its_patterns_and_kernels(family: KernelFamily) -> None:
    assert family.names
    assert all(issubclass(kind, Pattern) for kind in family.accepts)
    assert family in find_families(family.device)
    assert {find_family(name) for name in family.names} == {family}
    assert (family.token_multiple > 1) == bool(family.token_ops)


def test_find_family_of_an_unknown_kernel_raises() -> None:
    with pytest.raises(KernelError, match="no kernel is called 'cuda_gone'"):
        find_family("cuda_gone")
