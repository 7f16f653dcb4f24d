"""The direction of imports, sizes, and what a fresh import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparsedm_compiler

PACKAGE = Path(sparsedm_compiler.__file__).parent

# Each group imports only from groups above it, or from inside itself.
ORDER = (
    ("errors", "files"),
    ("pattern",),
    ("cache", "config", "facts", "table", "networks", "recognise", "stale"),
    ("selection",),
    ("tiles",),
    ("masks",),
    ("backends.cuda", "backends.cuda.launching"),
    ("backends.cuda.masking", "backends.cuda.masking_kernels"),
    ("ops",),
    ("backends.register", "backends.family", "backends.matrix"),
    ("backends.cpu", "backends.cpu.call"),
    ("backends.cpu.packed", "backends.cpu.library"),
    ("backends.cpu.pack",),
    ("backends.cpu.engine",),
    ("backends.cpu.ops",),
    ("backends.cpu.family",),
    ("backends.cuda.support", "backends.cuda.format24"),
    ("backends.cuda.tokens", "backends.cuda.conv", "backends.cuda.bare"),
    ("backends.cuda.semi_ops",),
    ("backends.cuda.semi",),
    ("backends.cuda.quantized", "backends.cuda.training"),
    ("backends.cuda.nvrtc", "backends.cuda.timing", "backends.cuda.vnm_format"),
    ("backends.cuda.vnm_launch",),
    ("backends.cuda.vnm",),
    ("backends.cuda.vnm_family",),
    ("backends.cuda.gather", "backends.cuda.gather_kernels"),
    ("backends.cuda.gather_family",),
    ("backends.families",),
    ("folding",),
    ("measuring",),
    ("graph",),
    ("capture",),
    ("passes.find_sites",),
    ("passes.topology",),
    ("passes.find_uses",),
    ("passes.mark_prunable", "passes.insert_mask_ste"),
    ("passes.lower_sparse", "passes.carry_features", "passes.pad_tokens", "passes.train_sparse"),
    ("passes.count_macs",),
    ("passes",),
    ("choose", "verify", "report"),
    ("pipeline", "lowering"),
    ("building", "state"),
    ("runtime",),
    ("compiler", "backends", "backends.dynamo"),
    ("storage",),
)
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
APART = {"models", "data", "train", "evaluate", "cli", "__main__"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__").removesuffix("__init__")] = path
    return found


def imports_of(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports, at whatever depth of its code."""
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    base = [part for part in base if part]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            stem = base[: len(base) - node.level + 1]
            target = ".".join([*stem, *(node.module or "").split(".")]).strip(".")
            found |= {target} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "sparsedm_compiler"
        ):
            found.add((node.module or "").removeprefix("sparsedm_compiler").lstrip("."))
    return found - {""}


CORE = {name: path for name, path in modules().items() if name.split(".")[0] not in {*APART, ""}}


@pytest.mark.parametrize("name", CORE)
def test_imports_point_one_way(name: str) -> None:
    assert name in RANK, f"give {name} a place in ORDER"
    for target in imports_of(name, CORE[name]):
        assert target.split(".")[0] not in APART, f"{name} imports {target}"
        assert RANK[target] <= RANK[name], f"{name} imports {target}, which is below it"


def test_pattern_and_errors_need_no_torch() -> None:
    for name in ("errors", "files", "pattern", "config"):
        assert "torch" not in CORE[name].read_text().replace("torch.compile", "")


def test_evaluate_and_models_know_nothing_of_the_compiler() -> None:
    allowed = {
        "models": {"errors", "models"},
        "data": {"errors", "models", "data"},
        "evaluate": {"errors", "files", "pattern", "models", "data", "evaluate"},
    }
    for name, path in modules().items():
        if (own := name.split(".")[0]) in allowed:
            tops = {target.split(".")[0] for target in imports_of(name, path)}
            assert tops <= allowed[own], f"{name} imports {tops - allowed[own]}"


def test_train_uses_only_public_names() -> None:
    for name, path in modules().items():
        if name.split(".")[0] == "train":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module is None:
                    names = {alias.name for alias in node.names}
                    assert names <= {*sparsedm_compiler.__all__}, name


@pytest.mark.parametrize("name", modules())
def test_modules_stay_small(name: str) -> None:
    assert len(modules()[name].read_text().splitlines()) < 300


def test_importing_the_package_needs_only_the_core_dependencies() -> None:
    """No diffusers, matplotlib, torchvision or scipy: those are extras."""
    code = (
        "import sys, sparsedm_compiler, sparsedm_compiler.compiler.dynamo_backend; "
        "import sparsedm_compiler.cli; "
        "print(sorted({'diffusers','matplotlib','torchvision','pytorch_fid','sklearn','yaml',"
        "'accelerate','datasets','tensorboard'} & {*sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_package_works_where_there_is_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, sparsedm_compiler; "
        "from sparsedm_compiler.triton_support import why_unavailable; "
        "from sparsedm_compiler.backends.gather import family; "
        "from sparsedm_compiler.masks import triton_mask; "
        "from sparsedm_compiler.masks.mask_ste import mask_ste; "
        "assert mask_ste(torch.tensor([[1.0, 2.0]]), '1:2').tolist() == [[0.0, 2.0]]; "
        "assert why_unavailable() is triton_mask.why_unavailable(); print(why_unavailable())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("Triton cannot be imported (")
