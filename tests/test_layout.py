"""The direction of imports, sizes, names, docstrings, and the cost of a fresh import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sparsedm_compiler
from tests.import_graph import Import, module_of, read_imports
from tests.public_names import undocumented
from tests.tiers import LONGEST, SLOW, TESTS, UNMATCHED, share_out

PACKAGE = Path(sparsedm_compiler.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
IMPORTS = read_imports(SOURCES)

# Every folder (or module at the root; "" is the root itself) with all it may import from others.
BASE = "errors fileio optional_deps triton_support progress meta_models"
BASE += " optimizer_state packed_tensors option_values npz_archive"
MAY_IMPORT = {
    "errors": "",
    "fileio": "errors",
    "optional_deps": "errors",
    "triton_support": "errors",
    "progress": "errors optional_deps",
    "meta_models": "errors",
    "optimizer_state": "",
    "packed_tensors": "",
    "option_values": "errors",
    "npz_archive": "errors",
    "selection": f"{BASE}",
    "patterns": f"{BASE} selection",
    "graph": f"{BASE} selection patterns",
    "config": f"{BASE} selection patterns graph",
    "reports": f"{BASE} selection patterns graph config",
    "masks": f"{BASE} selection patterns graph config reports",
    "files": f"{BASE} selection patterns graph config reports masks",
    "backends": f"{BASE} selection patterns graph config reports masks",
    "passes": f"{BASE} selection patterns graph config reports masks backends",
    "autotune": f"{BASE} selection patterns graph config reports masks backends passes",
    "compiler": f"{BASE} selection patterns graph config reports masks backends passes autotune"
    " files",
    "diffusion": f"{BASE}",
    "models": f"{BASE} diffusion",
    "data": f"{BASE} diffusion models",
    "evaluate": f"{BASE} diffusion models data",
    "reporting": f"{BASE} diffusion models data evaluate patterns reports",
    "diffusers": f"{BASE} patterns graph config reports files compiler",
    "oneshot": f"{BASE} selection patterns graph config reports masks passes compiler diffusion",
    "export": f"{BASE} selection patterns graph config reports masks files backends passes autotune"
    " compiler",
    "": "errors patterns reports masks compiler diffusers oneshot export",
    "train": f"{BASE} diffusion models data evaluate reporting",
    "experiment": f"{BASE} config diffusion models data evaluate reporting train",
    "cli": f"{BASE} patterns config reports backends autotune compiler diffusion models data"
    " evaluate reporting train experiment files export",
    "__main__": "cli",
}

# These use the compiler by what ``sparsedm_compiler.__all__`` names.
USERS = {"train", "experiment", "cli"}

# Not at import time: the root's names that need the extra "train".
LAZY = {("", "train")}

# These import what a user names, a package of an extra, or (the root) a public name at its first
# use, which the law then reads in its imports for type checkers.
BY_NAME = {"", "optional_deps", "models.factories", "diffusers.registration"}

# The folders of kernel families; one of them is what the NVIDIA families share.
SHARED = "backends.cuda"
KERNEL_FAMILIES = tuple(
    f"backends.{folder}" for folder in ("cpu", "cusparselt", "fp8", "gather", "vnm", "wgmma")
)

BANNED = {"found", "each", "place", "how", "given", "asked"}


def top(module: str) -> str:
    return module.partition(".")[0]


def breaks_direction(edge: Import, public: set[str]) -> bool:
    """True if the law of MAY_IMPORT (by name for USERS) forbids an import."""
    if edge.target is None:
        return edge.importer not in BY_NAME
    folder, target = top(edge.importer), top(edge.target)
    if "" in (edge.target, edge.door) and folder in USERS:
        return edge.name is not None and edge.name not in public
    if folder == target or (folder, target) in LAZY:
        return False
    return target not in MAY_IMPORT[folder].split()


def kernel_family(module: str) -> str | None:
    """The family folder that a module lies in."""
    folders = (*KERNEL_FAMILIES, SHARED)
    return next((f for f in folders if module == f or module.startswith(f"{f}.")), None)


def breaks_families(edge: Import) -> bool:
    """True for an import of a kernel family from outside, but for the registry's."""
    if edge.target is None or (family := kernel_family(edge.target)) is None:
        return False
    own = kernel_family(edge.importer)
    if family == SHARED:
        return own is None
    return own != family and edge.importer != "backends.registry"


def cycles(imports: list[Import]) -> list[list[str]]:
    """One cycle among the modules of each folder that has any."""
    graphs: dict[str, dict[str, set[str]]] = {}
    for edge in imports:
        if edge.target is not None and top(edge.importer) == top(edge.target):
            graph = graphs.setdefault(top(edge.importer), {})
            graph.setdefault(edge.importer, set()).add(edge.target)
    return [cycle for graph in graphs.values() if (cycle := cycle_of(graph))]


def cycle_of(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a source names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name


def listed(lines: list[str]) -> str:
    return f"{len(lines)}:\n" + "\n".join(lines)


def test_imports_between_folders_point_one_way() -> None:
    public = {*sparsedm_compiler.__all__, "__version__"}
    broken = [str(edge) for edge in IMPORTS if breaks_direction(edge, public)]
    assert not broken, listed(broken)


def test_law_of_imports_names_every_folder_and_has_no_circle() -> None:
    assert {*MAY_IMPORT} == {top(module_of(path)) for path in SOURCES}
    order = [*MAY_IMPORT]
    for folder, allowed in MAY_IMPORT.items():
        assert {*allowed.split()} <= {*order[: order.index(folder)]}, folder


def test_imports_inside_a_folder_have_no_circle() -> None:
    assert cycles(IMPORTS) == []


def test_kernel_families_are_imported_by_the_registry_alone() -> None:
    broken = [str(edge) for edge in IMPORTS if breaks_families(edge)]
    assert not broken, listed(broken)


TREE = {
    "__init__.py": "from .compiler.api import compile\n__all__ = ['compile']",
    "masks/__init__.py": "from .nm_mask import compute_mask",
    "masks/nm_mask.py": "def compute_mask(): ...",
    "compiler/__init__.py": "",
    "compiler/api.py": "from ..masks import compute_mask\ndef compile(): ...",
    "train/__init__.py": "",
}
FORBIDDEN_SPELLINGS = (
    "import sparsedm_compiler.masks.nm_mask",
    "import sparsedm_compiler.masks.nm_mask as hidden",
    "import sparsedm_compiler as sdm\nsdm.masks.nm_mask.compute_mask()",
    "import sparsedm_compiler as sdm\ngetattr(sdm, 'masks').nm_mask",
    "from .. import masks",
    "from .. import masks as hidden",
    "from ..masks import nm_mask",
    "from ..masks import compute_mask",
    "from ..masks import *",
    "from ..masks.nm_mask import compute_mask as hidden",
    "from ..compiler.api import compute_mask",
    "from .. import compute_mask",
    "from sparsedm_compiler import masks",
    "from sparsedm_compiler.masks import compute_mask",
    "def late():\n    from ..masks.nm_mask import compute_mask",
    "if True:\n    from ..masks import nm_mask",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..masks import nm_mask",
    "import importlib\nimportlib.import_module('sparsedm_compiler.masks')",
    "import importlib as i\ni.import_module(name='sparsedm_compiler.masks.nm_mask')",
    "from importlib import import_module as load\nload('..masks.nm_mask', __package__)",
    "from importlib import import_module\nimport_module('sparsedm_compiler').masks.nm_mask",
    "from importlib import import_module\nname = 'sparsedm_compiler.masks'\nimport_module(name)",
    "from importlib import import_module\nimport_module(f'{__package__}.masks')",
    "from importlib import import_module\nload = import_module\nload('..masks', __package__)",
    "__import__('sparsedm_compiler.masks.nm_mask')",
    "import builtins\nbuiltins.__import__('sparsedm_compiler.masks')",
    "import pkgutil\npkgutil.resolve_name('sparsedm_compiler.masks.nm_mask:compute_mask')",
    "import sys\nsys.modules['sparsedm_compiler.masks']",
    "exec('from ..masks import nm_mask')",
)
ALLOWED_SPELLINGS = (
    "from .. import compile",
    "from sparsedm_compiler import compile as sparse",
    "import sparsedm_compiler as sdm\nsdm.compile()",
    "from importlib import import_module\nimport_module('diffusers')",
    "import torch.masks\ntorch.masks.nm_mask",
    "raise ValueError('sparsedm_compiler.compile(model)')",
)


def test_imports_are_read_in_every_spelling() -> None:
    def broken(source: str) -> list[Import]:
        imports = read_imports({**TREE, "train/loop.py": source})
        return [edge for edge in imports if breaks_direction(edge, {"compile"})]

    missed = [source for source in FORBIDDEN_SPELLINGS if not broken(source)]
    assert not missed, listed(missed)
    refused = {source: broken(source) for source in ALLOWED_SPELLINGS if broken(source)}
    assert not refused


def test_cycles_and_families_are_read_in_every_spelling() -> None:
    lazy = {
        "train/loop.py": "def f():\n    from . import step",
        "train/step.py": "from .loop import f",
    }
    assert cycles(read_imports({**TREE, **lazy})) == [["train.loop", "train.step", "train.loop"]]
    through = {"backends/cpu/ops.py": "from ..door import pack", "backends/vnm/ops.py": "pack = 1"}
    through |= {"backends/door.py": "from .vnm.ops import pack"}
    broken = [edge for edge in read_imports({**TREE, **through}) if breaks_families(edge)]
    assert {edge.importer for edge in broken} == {"backends.cpu.ops", "backends.door"}


def test_modules_stay_below_300_lines() -> None:
    lengths = {path: len(text.splitlines()) for path, text in SOURCES.items()}
    assert not {path: length for path, length in lengths.items() if length >= 300}


def test_every_file_that_is_no_module_is_in_the_wheel() -> None:
    package = Path(sparsedm_compiler.__file__).parent
    options = (package.parent / "pyproject.toml").read_text()
    listed_in = re.search(r"\nsparsedm_compiler = (\[.*\])\n", options)
    assert listed_in is not None
    packed = {path for pattern in ast.literal_eval(listed_in[1]) for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file()}
    compiled = {path for path in files if "__pycache__" in path.parts}
    modules = {path for path in files if path.suffix == ".py"}
    assert not files - compiled - modules - packed
    assert all((path.parent / "__init__.py").exists() for path in modules - compiled)


def test_vague_words_name_nothing() -> None:
    vague = [
        f"{path}:{line}: {name}"
        for path, text in sorted(SOURCES.items())
        for line, name in sorted(bindings(ast.parse(text)))
        if name in BANNED
    ]
    assert not vague, listed(vague)


def test_public_names_have_the_sections_they_need() -> None:
    lines = undocumented(SOURCES)
    assert not lines, listed(lines)


def test_every_entry_of_the_slow_list_fits_a_test(pytestconfig: pytest.Config) -> None:
    """Of the whole suite, that is: what is checked here is known where all of it was collected."""
    stale = pytestconfig.stash.get(UNMATCHED, [])
    assert not stale, listed(stale)


def test_files_that_run_first_are_files_with_slow_tests() -> None:
    assert [file for file in LONGEST if not (TESTS / file).is_file() or file not in SLOW] == []


def test_tests_are_shared_out_by_file_with_the_slow_ones_first() -> None:
    def item(file: str, name: str, *, slow: bool = False) -> Any:
        keywords = {name, "slow"} if slow else {name}
        return SimpleNamespace(path=TESTS / file, keywords=keywords, name=name)

    quick = [item("a.py", f"a{i}") for i in range(4)]
    mixed = [item("z.py", "z0"), item("z.py", "z1", slow=True)]
    long = [item(file, file, slow=True) for file in LONGEST[1::-1]]
    names = [test.name for test in share_out([*quick, *long, *mixed])]
    first, second = LONGEST[:2]
    assert names == [second, "a0", "a1", "a2", "a3", first, "z0", "z1"]


def test_errors_files_and_options_need_no_torch() -> None:
    for path in ("errors.py", "fileio.py", "config.py"):
        assert "torch" not in SOURCES[path].replace("torch.compile", "")


def test_importing_the_package_needs_only_the_core_dependencies() -> None:
    """No diffusers, matplotlib, torchvision or scipy: those are extras."""
    code = (
        "import sys, sparsedm_compiler, sparsedm_compiler.compiler.dynamo_backend; "
        "import sparsedm_compiler.cli; "
        "print(sorted({'diffusers','matplotlib','torchvision','pytorch_fid','sklearn','yaml',"
        "'accelerate','datasets','tensorboard','onnx','onnxscript','onnx_ir'} & {*sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_package_works_where_there_is_no_triton() -> None:
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
