"""``export_package``: a compiled model as an AOTInductor package, dense or with our kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..backends.registry import find_family
from ..compiler.lookup import require_compiled
from ..errors import CheckpointError, ConfigError, KernelError
from ..fileio import replace_together
from .pack_program import pack_program
from .trace import (
    Example,
    export_plain,
    make_example,
    require_folder,
    summarize,
    trace_masked,
)

_KERNELS = "sparsedm_kernels"
"""The key of a package's metadata that names its sparse kernels, with commas."""


def export_package(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
    sparse_kernels: bool = False,
) -> tuple[str, ...]:
    """Compiles a model ahead of time, by AOTInductor, into one file that runs without its code.

    Args:
        model: A compiled model in eval mode. One that has not been called yet is called once.
        args: The positional inputs of one call: a tuple, or the only input.
        path: The file to write, ending in .pt2. It appears whole or not at all.
        kwargs: The keyword inputs of the call; None: none.
        dynamic_batch: Whether the package takes any batch size, as in ``export_onnx``.
        dynamic_shapes: Other dynamic sizes, as ``torch.export.export`` takes them. None: none.
        sparse_kernels: Whether pruned weights run by the kernels that mode "infer" would choose,
            packed; they are measured at the example's shapes. Such a package calls custom ops of
            this package, so it runs in Python alone, where ``load_package`` opens it. Without, the
            weights hold their zeros, and any process with torch, also a C++ one, opens it.

    Returns:
        The names of the weights that sparse kernels run.

    Raises:
        ConfigError: If ``model`` was not compiled, is in training mode or wrapped, or a size cannot
            be dynamic; and for ``sparse_kernels`` with ``dynamic_shapes``, or of a module that only
            holds a compiled one.
        CaptureError: If ``torch.export`` cannot hold the forward.
        KernelError: If Inductor cannot compile it, e.g. where there is no C++ compiler.
        CheckpointError: If the file cannot be written.
    """
    file = Path(path)
    if file.suffix != ".pt2":
        raise ConfigError(f"an AOTInductor package is a .pt2 file, not {file.name!r}")
    require_folder(file)
    if sparse_kernels and dynamic_shapes is not None:
        raise ConfigError("sparse kernels take dynamic_batch, no other dynamic_shapes")
    example = make_example(args, kwargs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
    program = trace_masked(model, example).program
    kernels: dict[str, str] = {}
    if sparse_kernels:
        program, kernels = _pack(model, program, example)
    _compile(program, file, type(model).__name__, ",".join(sorted({*kernels.values()})))
    return tuple(kernels)


def _pack(
    model: nn.Module, program: ExportedProgram, example: Example
) -> tuple[ExportedProgram, dict[str, str]]:
    """Returns the program with sparse kernels, and the kernel by weight."""
    forwards = require_compiled(model)
    if [prefix for prefix, _ in forwards] != [""]:
        raise ConfigError(
            f"{type(model).__name__} only holds compiled modules: export one of them with its "
            "sparse kernels, or all of it dense"
        )
    packed, plan = pack_program(program, forwards[0][1], example)
    kernels = {row.name: row.kernel.name for row in plan if row.kernel is not None}
    return export_plain(packed.eval(), type(model).__name__, example), kernels


def _compile(program: ExportedProgram, file: Path, name: str, kernels: str) -> None:
    """Compiles a program into a file. Raises KernelError or CheckpointError."""
    from torch._inductor import aoti_compile_and_package

    configs = {"aot_inductor.metadata": {_KERNELS: kernels}}

    def write(part: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries' own deprecations
                aoti_compile_and_package(program, package_path=str(part), inductor_configs=configs)
        except Exception as error:  # of many kinds, from Inductor and the C++ compiler
            raise KernelError(f"AOTInductor cannot compile {name}: {summarize(error)}") from error

    try:
        with replace_together(file) as part:
            write(part)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error}") from error


def load_package(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Opens a package of ``export_package``, with the custom ops that it may call.

    Args:
        path: A .pt2 file of AOTInductor. It holds machine code: open none that you do not trust.

    Returns:
        The model as a function of what its forward took.

    Raises:
        CheckpointError: If the file is missing, or does not load in this torch on this machine, or
            calls kernels that cannot run here.
        KernelError: If it calls kernels that this version does not know.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"there is no package {file}")
    try:
        loaded: Any = torch._inductor.aoti_load_package(str(file))
    except Exception as error:  # of many kinds, from zip files and the dynamic linker
        raise CheckpointError(f"{file} does not load here: {summarize(error)}") from error
    for kernel in loaded.get_metadata().get(_KERNELS, "").split(","):
        reason = find_family(kernel).why_unavailable() if kernel else None
        if reason is not None:
            raise CheckpointError(f"{file} calls the kernel {kernel}: {reason}")
    run: Callable[..., Any] = loaded
    return run
