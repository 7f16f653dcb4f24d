"""Hooks of mkdocs: pages made from the code, and pages that lie outside of this folder.

``make docs`` runs them; ``write_cli`` and ``write_configuration`` need no mkdocs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site that are files beside the folder of the documentation."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are generated."""
    from mkdocs.structure.files import File

    pages = {
        "reference/cli.md": write_cli(),
        "reference/configuration.md": write_configuration(),
        **{page: (ROOT / name).read_text(encoding="utf-8") for page, name in OUTSIDE.items()},
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lets links to files beside the folder of the documentation lead to their pages."""
    up = "../" * page.file.src_uri.count("/")
    for target, name in OUTSIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(name)}", f"]({up}{target}", markdown)
    if page.file.src_uri in OUTSIDE:
        markdown = markdown.replace("](docs/", "](")
    return markdown


def write_cli() -> str:
    """Returns the page of the command line: every command's help, as it prints it."""
    from sparsedm_compiler.cli.commands import ABOUT, COMMANDS, STATUSES, configure_parser

    parts = [f"# Command line\n\n{ABOUT}\n\n```text\n{STATUSES}\n```\n"]
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(
            prog=f"sparsedm {name}",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=96),
        )
        configure_parser(parser, command)
        parts.append(f"## sparsedm {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(parts)


def write_configuration() -> str:
    """Returns the page of the configuration of a run: every option with its default."""
    from sparsedm_compiler.config import CompileConfig
    from sparsedm_compiler.experiment.recipes import RECIPES
    from sparsedm_compiler.experiment.run_config import (
        DataSpec,
        ModelSpec,
        PruneSpec,
        RunConfig,
        SampleSpec,
        ScoreSpec,
    )
    from sparsedm_compiler.train import METHODS, FinetuneConfig

    sections = {
        "model": (ModelSpec, ModelSpec),
        "data": (DataSpec, DataSpec),
        "prune": (PruneSpec, CompileConfig),
        "train": (FinetuneConfig, FinetuneConfig),
        "sample": (SampleSpec, SampleSpec),
        "score": (ScoreSpec, ScoreSpec),
    }
    parts = [
        "# Configuration of a run",
        "What `sparsedm finetune --config run.yaml` reads, as YAML or JSON. `--set train.lr=1e-3` "
        "sets single values, `--recipe NAME` begins with those of a recipe.",
        f"Recipes: {', '.join(f'`{name}`' for name in RECIPES)}.",
    ]
    for name, (spec, documented) in sections.items():
        parts += [f"## {name}", _write_table(spec, documented)]
    rows = [("name", "how it trains"), ("---", "---")]
    rows += [(f"`{name}`", method.about) for name, method in METHODS.items()]
    parts += ["## train.method", _join(rows)]
    single = [field for field in fields(RunConfig) if field.name not in sections]
    texts = dict(_read_attributes(RunConfig))
    rows = [("option", "default", "meaning"), ("---", "---", "---")]
    rows += [(f"`{f.name}`", _show_default(f), texts.get(f.name, "")) for f in single]
    parts += ["## Beside the sections", _join(rows)]
    return "\n\n".join(parts) + "\n"


def _write_table(spec: type[Any], documented: type[Any]) -> str:
    assert is_dataclass(spec)
    texts = dict(_read_attributes(documented))
    rows = [("option", "default", "meaning"), ("---", "---", "---")]
    rows += [(f"`{f.name}`", _show_default(f), texts.get(f.name, "")) for f in fields(spec)]
    return _join(rows)


def _show_default(field: Any) -> str:
    value = field.default if field.default is not MISSING else None
    if field.default_factory is not MISSING:
        value = field.default_factory()
        value = value if not is_dataclass(value) else None
    return f"`{value}`" if value not in (None, "") else ""


def _join(rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in rows)


def _read_attributes(documented: type[Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the section "Attributes" of a docstring in Google form."""
    _, _, section = (documented.__doc__ or "").partition("Attributes:\n")
    for match in re.finditer(r"^ {8}(\w+): (.*(?:\n {9,}.*)*)", section, re.MULTILINE):
        yield match[1], " ".join(match[2].split()).replace("``", "`")
