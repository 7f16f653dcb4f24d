"""``sparsedm explain``: shows the decision on every weight in a saved file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..progress import watch_compilation
from .job import Job
from .open_student import add_source_options, resolve_source

if TYPE_CHECKING:
    import torch

    from ..config import CompileConfig
    from ..models.loading import ModelWithInputs
    from ..reports import MacsReport

ABOUT = """\
show which weights of a saved model are pruned, and why the others stay dense

Prints one line per weight: its pattern, or the reason why it stays dense. In mode infer (the
default) it also shows the kernel that was fastest for the weight on this machine."""
EXAMPLE = """\
  sparsedm explain runs/first
  sparsedm explain student.safetensors --model uvit-cifar10-small
  sparsedm explain student.safetensors --model package.module:function --mode train --macs"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="weights saved by sparsedm, or the folder of a run"
    )
    add_source_options(parser, required=False)
    about = "shapes of the inputs of one call, for a model class that is not known"
    parser.add_argument("--inputs", help=about)
    parser.add_argument("--macs", action="store_true", help="count the MACs of every layer as well")


def prepare(options: argparse.Namespace) -> Job:
    """Reads the file and makes inputs for its model. Raises SparseDMError."""
    if options.model is None:
        if not (Path(options.weights) / "run.json").exists():
            raise ConfigError(f"{options.weights} is not the folder of a run: give --model too")
        options.model, options.weights = options.weights, None
    source = resolve_source(options)
    if source.pruned is None:
        raise ConfigError(f"{source.weights} holds no pruned model, so there is nothing to explain")
    example = source.open_example(options.inputs)

    def run() -> None:
        from ..compiler.api import explain
        from ..compiler.lookup import require_compiled

        model = source.open()
        args, kwargs = move_inputs(example[1:], source.device)
        with watch_compilation("compiling the model"):
            explanation = explain(model, *args, **kwargs)
        print(explanation)
        if options.macs:
            ((_, forward),) = require_compiled(model)
            print(f"\n{count_pruned_macs(example, forward.config)}")

    return Job((f"would explain {source}",), run)


def move_inputs(inputs: Any, device: torch.device) -> Any:
    """Returns ``inputs`` with every tensor on ``device``; meta tensors become zeros."""
    import torch
    from torch.utils._pytree import tree_map_only

    def move(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x.to(device)

    return tree_map_only(torch.Tensor, move, inputs)


def count_pruned_macs(example: ModelWithInputs, config: CompileConfig) -> MacsReport:
    """Counts the MACs of the model as ``config`` pruned it."""
    from ..compiler.counting import count_macs

    model, args, kwargs = example
    return count_macs(
        model,
        *args,
        pattern=config.pattern or "1:1",  # recognised weights are all named in the overrides
        keep_dense=config.dense_globs,
        overrides=dict(config.overrides),
        policy=config.policy,
        **kwargs,
    )
