"""The pages for developers are true: their code runs, and their files and names exist."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, Pattern
from sparsedm_compiler.backends.kernel_family import KernelFamily
from sparsedm_compiler.backends.registry import (
    list_families,
    register_family,
    unregister_family,
)
from sparsedm_compiler.models import PRESETS, example_inputs, open_model
from sparsedm_compiler.models.model_classes import MODEL_CLASSES
from sparsedm_compiler.models.presets import Preset
from sparsedm_compiler.passes import INFER, run_passes
from sparsedm_compiler.patterns import register_pattern, unregister_pattern
from sparsedm_compiler.train import METHODS, FinetuneConfig
from tests.oracle import assert_same, oracle_of
from tests.passes import test_laws as laws
from tests.passes.plans import print_calls

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sparsedm_compiler"
FOLDER = ROOT / "docs" / "develop"
GUIDES = sorted(path.name for path in FOLDER.glob("*.md"))
PAGES = {
    **{f"docs/develop/{name}": 100 for name in GUIDES},
    "ARCHITECTURE.md": 111,
    "CONTRIBUTING.md": 61,
}
"""The pages, by path, each with the number of lines that it stays below."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SUFFIXES = {".py", ".md", ".toml", ".txt", ".h", ".cu", ".cuh", ".cpp"}
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
every_page = pytest.mark.parametrize("page", PAGES)


@dataclass(frozen=True)
class Page:
    """The names that the Python of a page defines, and the values that it registers."""

    names: Mapping[str, Any]
    families: tuple[KernelFamily, ...]
    kinds: tuple[type[Pattern], ...]

    def unregister(self) -> None:
        for family in self.families:
            unregister_family(family)
        for kind in self.kinds:
            unregister_pattern(kind)


@cache
def run_blocks(name: str) -> Page:
    """Runs the Python of a page, once per process: an op cannot be registered twice."""
    module = types.ModuleType(f"develop_{Path(name).stem}")
    sys.modules[module.__name__] = module
    before, text = {*list_families()}, (FOLDER / name).read_text()
    try:
        for block in FENCE.finditer(text):
            if block[1] == "python":
                lines = text[: block.start(2)].count("\n")
                exec(compile("\n" * lines + block[2], str(FOLDER / name), "exec"), vars(module))
    finally:
        families = tuple(family for family in list_families() if family not in before)
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        own = [value for value in classes if value.__module__ == module.__name__]
        kinds = tuple(value for value in own if issubclass(value, Pattern))
        page = Page(vars(module), families, kinds)
        page.unregister()
    return page


@contextmanager
def open_page(name: str) -> Iterator[Mapping[str, Any]]:
    """Yields the names of a page, with what it registers registered."""
    page = run_blocks(name)
    for family in page.families:
        register_family(family)
    for kind in page.kinds:
        register_pattern(kind)
    try:
        yield page.names
    finally:
        page.unregister()


@pytest.fixture(scope="module")
def pattern_page() -> Iterator[Mapping[str, Any]]:
    with open_page("add_a_pattern.md") as names:
        yield names


@pytest.fixture(scope="module")
def family_page() -> Iterator[Mapping[str, Any]]:
    with open_page("add_a_kernel_family.md") as names:
        yield names


@pytest.fixture(scope="module")
def pass_page() -> Iterator[Mapping[str, Any]]:
    with open_page("add_a_pass.md") as names:
        yield names


@pytest.fixture(scope="module")
def method_page() -> Iterator[Mapping[str, Any]]:
    with open_page("add_a_training_method.md") as names:
        yield names


@pytest.fixture
def method_row(method_page: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the page's method, which METHODS holds for one test."""
    rows = MappingProxyType({**METHODS, **method_page["ROWS"]})
    monkeypatch.setattr("sparsedm_compiler.train.methods.METHODS", rows)
    (name,) = method_page["ROWS"]
    return str(name)


@pytest.fixture
def preset_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, Any]]:
    """The names of the page on presets; the tables hold its row for one test."""
    with open_page("add_a_model_preset.md") as names:
        row = names["PRIOR"]
        monkeypatch.setitem(MODEL_CLASSES, row.name, row)  # type: ignore[arg-type]
        for name, (title, config) in row.presets.items():
            monkeypatch.setitem(PRESETS, name, Preset(title, row.name, config))  # type: ignore[arg-type]
        yield names


class Net(nn.Module):
    """A convolution and three layers, of which the structural policy keeps the ends dense."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(self.first(x))).flatten(2).transpose(1, 2)
        return self.last(F.gelu(self.middle(x), approximate="tanh"))


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def mask_diagonal(weight: Tensor, k: int, m: int) -> Tensor:
    """The mask of "diag<k>:<m>", one weight after the other."""
    mask = torch.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            mask[row, column] = float((column - row) % m == k)
    return mask


def test_pattern_page_defines_a_pattern_that_parses_and_prints(
    pattern_page: Mapping[str, Any],
) -> None:
    pattern = Pattern.parse("diag1:4")
    assert type(pattern) is pattern_page["Diagonal"]
    assert (str(pattern), pattern.density, pattern.relaxations()) == ("diag1:4", 0.25, ())
    assert pattern.misfit(6, 8) == "output width 6 is not a multiple of 4"
    with pytest.raises(sdm.PatternError, match="'diag1:4' keeps diagonal 1 of every 4x4 tile"):
        Pattern.parse("diag1")


def test_pattern_page_compiles_a_student_that_runs_masked(
    pattern_page: Mapping[str, Any],
) -> None:
    student, net = pattern_page["student"], pattern_page["net"]
    assert {*sdm.masked_parameters(student)} == {"1.weight"}
    x, masked = torch.randn(3, 8), net[1].weight * mask_diagonal(net[1].weight, 1, 4)
    assert_same(student(x), net[2](F.linear(net[0](x), masked, net[1].bias)))


@pytest.mark.parametrize("kernel", ["dense", "cpu_free"])
def test_pattern_page_defines_a_pattern_that_runs_by_kernels_of_the_one_it_implies(
    pattern_page: Mapping[str, Any], kernel: str
) -> None:
    net = Net()
    fast = sdm.compile(net, "diag1:4", mode="infer", backend="eager", kernels={"*": kernel})
    with torch.no_grad():
        out = fast(X)
        for layer in (net.conv, net.middle):
            layer.weight.mul_(mask_diagonal(layer.weight, 1, 4))
        assert_same(out, net(X), tolerance=0.0 if kernel == "dense" else 1e-5)
    assert {choice.kernel for choice in sdm.explain(fast).choices} == {kernel}


def compile_example(**options: Any) -> nn.Module:
    options = {"kernels": {"*": "example"}, **options}
    return sdm.compile(Net(), "2:4", mode="infer", backend="eager", **options)


def list_kernels(model: nn.Module) -> dict[str, str]:
    return {choice.weight: choice.kernel for choice in sdm.explain(model).choices}


@pytest.mark.usefixtures("family_page")
def test_family_page_registers_a_family_that_equals_the_oracle() -> None:
    fast = compile_example()
    with torch.no_grad():
        assert_same(fast(X), oracle_of(fast)(X))
        channels_last = X.to(memory_format=torch.channels_last)
        assert_same(fast(channels_last), oracle_of(fast)(X), tolerance=1e-5)
    assert list_kernels(fast) == {"conv.weight": "example", "middle.weight": "example"}


@pytest.mark.usefixtures("family_page")
def test_family_page_registers_a_family_that_is_measured_without_a_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    monkeypatch.setattr("sparsedm_compiler.autotune.select_kernel.MARGIN", 1e9)
    others = ["cpu_free", "cpu_shared", "cpu_wide"]
    fast = compile_example(kernels=None, exclude_kernels=others)
    with torch.no_grad():
        assert_same(fast(X), oracle_of(fast)(X))
    assert {choice.reason for choice in sdm.explain(fast).choices} == {"fastest measured"}


@pytest.mark.usefixtures("family_page")
@pytest.mark.parametrize("finalize", [False, True])
def test_family_page_registers_a_family_that_comes_back_from_a_file(
    tmp_path: Path, finalize: bool
) -> None:
    fast = compile_example(finalize=finalize)
    with torch.no_grad():
        expected = fast(X)
        sdm.save(fast, tmp_path / "model")
        loaded = sdm.load(tmp_path / "model", Net(), backend="eager")
        assert_same(loaded(X), expected)
    assert {*list_kernels(loaded).values()} == {"example"}


@pytest.mark.usefixtures("family_page")
def test_family_page_registers_a_family_that_refuses_by_a_sentence() -> None:
    fast = sdm.compile(
        Net().bfloat16(), "2:4", mode="infer", backend="eager", kernels={"*": "example"}
    )
    with torch.no_grad():
        fast(X.bfloat16())
    assert {choice.reason for choice in sdm.explain(fast).choices} == {
        "example multiplies float32, not torch.bfloat16"
    }


@pytest.fixture
def with_new_pass(pass_page: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline and the laws with the page's rewrite, for one test."""
    monkeypatch.setattr("sparsedm_compiler.passes.pipeline.INFER", pass_page["NEW_INFER"])
    monkeypatch.setitem(laws.PASSES, "infer", pass_page["NEW_INFER"])
    for name, row in pass_page["ROW"].items():
        monkeypatch.setitem(laws.FIRES, name, row)


@pytest.mark.usefixtures("with_new_pass")
def test_pass_page_defines_a_rewrite_that_obeys_the_laws(pass_page: Mapping[str, Any]) -> None:
    rewrite = pass_page["drop_dropout"]
    laws.test_rewrite_fires_once_and_changes_nothing_in_a_second_run("infer", rewrite)
    laws.test_rewrite_skips_a_graph_without_a_plan_and_leaves_its_code("infer", rewrite)
    laws.test_run_passes_verifies_and_changes_nothing_in_a_second_run("drop_dropout")
    laws.test_new_nodes_of_a_rewrite_carry_an_example_value("infer", rewrite)


@pytest.mark.usefixtures("with_new_pass")
def test_pass_page_defines_a_rewrite_that_runs_in_the_pipeline(
    pass_page: Mapping[str, Any],
) -> None:
    assert pass_page["NEW_INFER"][1:] == INFER
    case = pass_page["dropout_case"]()
    (x,) = case.inputs
    assert print_calls(case.gm).count("dropout") == 2
    assert run_passes(case.gm, case.plan, "infer") == 2
    assert "dropout" not in print_calls(case.gm)
    net = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Dropout(0.1))])
    fast = sdm.compile(net.eval(), "2:4", mode="infer", backend="eager", kernels={"*": "dense"})
    with torch.no_grad():
        assert_same(fast(x), oracle_of(fast)(x))


def test_method_page_adds_a_row_whose_options_are_defaults(method_row: str) -> None:
    config = FinetuneConfig.create(method=method_row)
    assert (config.method, config.schedule, config.ema_decay) == (method_row, "constant", 0.99)
    assert FinetuneConfig.create(method=method_row, ema_decay=0.5).ema_decay == 0.5


def test_method_page_trains_a_student(method_row: str, method_page: Mapping[str, Any]) -> None:
    result = method_page["train"]()
    assert (result.config.method, result.images, len(result.losses)) == (method_row, 32, 4)


def test_method_of_the_page_is_unknown_without_its_row(method_page: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match="method 'ste-constant' is none of sparsedm"):
        method_page["train"]()


def test_preset_page_adds_a_preset_that_opens_and_runs(preset_row: Mapping[str, Any]) -> None:
    model = open_model("prior-small")
    args, kwargs = example_inputs(model, batch=3)
    out = model(*args, **kwargs).predicted_image_embedding
    assert out.shape == (3, 16)
    assert out.isfinite().all()


def test_preset_page_counts_the_macs_of_its_preset(preset_row: Mapping[str, Any]) -> None:
    report = preset_row["count"]()
    assert 0 < report.sparse < report.dense


def test_testing_page_compares_with_the_oracle_and_sees_a_test_red() -> None:
    with open_page("testing.md") as names:
        assert "is read unmasked by" in names["red"]


def strip_fences(text: str) -> str:
    return FENCE.sub("", text)


def list_inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", strip_fences((ROOT / page).read_text()))


def is_path(code: str) -> bool:
    """Whether inline code means a file or folder. Parts to fill in, "<kind>", mean none."""
    return bool(PATH.fullmatch(code)) and ("/" in code or Path(code).suffix in SUFFIXES)


def exists(path: str) -> bool:
    """Whether a path exists from the root or the package's folder; a lone name, anywhere there."""
    if (ROOT / path).exists() or (PACKAGE / path).exists():
        return True
    return "/" not in path and any(PACKAGE.rglob(path))


@every_page
def test_every_path_on_a_page_exists(page: str) -> None:
    paths = [code for code in list_inline_code(page) if is_path(code)]
    assert not [path for path in paths if not exists(path)]


@cache
def list_words() -> frozenset[str]:
    """Returns all words of the sources."""
    files = [*PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*"), ROOT / "Makefile"]
    texts = (
        path.read_text() for path in files if path.suffix in SUFFIXES or path.stem == "Makefile"
    )
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


@every_page
def test_every_identifier_on_a_page_occurs_in_the_sources(page: str) -> None:
    blocks = "".join(block[2] for block in FENCE.finditer((ROOT / page).read_text()))
    known = list_words() | {*re.findall(r"\w+", blocks)}
    codes = [code for code in list_inline_code(page) if not is_path(code)]
    names = [code for code in codes if re.fullmatch(r"[A-Za-z_][\w.]*", code)]
    words = [word for name in names for word in name.split(".")]
    assert not [word for word in words if word not in known]


@every_page
def test_every_dotted_name_and_make_target_on_a_page_exists(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for code in list_inline_code(page):
        if re.fullmatch(r"sparsedm_compiler(\.\w+)+", code):
            resolve_name(code)
        if match := re.fullmatch(r"make ([a-z-]+)", code):
            assert match[1] in targets


@every_page
def test_every_link_on_a_page_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", strip_fences((ROOT / page).read_text()))
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not ((ROOT / page).parent / link).exists()]


@every_page
def test_every_page_is_short(page: str) -> None:
    assert len((ROOT / page).read_text().splitlines()) < PAGES[page]


def test_index_links_to_every_page() -> None:
    linked = {*re.findall(r"\]\((\w+\.md)\)", (FOLDER / "README.md").read_text())}
    assert linked == {*GUIDES} - {"README.md"}
