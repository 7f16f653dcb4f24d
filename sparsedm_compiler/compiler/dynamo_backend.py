"""The torch.compile entry point: options to Config to compiler; no logic of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import fx

from ..config import CompileConfig
from ..errors import ConfigError
from .building import compile_graph


def sparsedm(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="sparsedm", options={"pattern": "2:4"})``.

    ``options``: those of ``sparsedm_compiler.compile`` but ``inplace`` and ``finalize``; ``mode``
    is "infer" unless given there, and without a ``pattern`` weights run by the one they satisfy
    already. Whether the graph runs at all is torch.compile's affair: only a model from
    ``sparsedm_compiler.compile`` is guarded against a silent dense run.
    """
    if mode is not None:
        raise ConfigError(
            f"torch.compile's mode={mode!r} is not for this backend; choose the inner compiler in "
            "options={'pattern': '2:4', 'backend': 'inductor'}"
        )
    chosen: dict[str, Any] = {"mode": "infer", **(options or {})}
    known = [field.name for field in fields(CompileConfig) if field.name != "finalize"]
    for option in chosen:
        if option not in known:
            raise ConfigError(f"option {option!r} is none of {', '.join(known)}")
    return compile_graph(
        gm, example_inputs, CompileConfig.create(chosen.pop("pattern", None), **chosen)
    )
