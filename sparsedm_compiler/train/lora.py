"""Training of adapters alone: the sparse base is frozen, and at the end they are merged into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import ConfigError, merge_lora
from ..optional_deps import import_optional, mend_torchvision
from ..packed_tensors import explain_packed
from .finetune_config import FinetuneConfig

ADAPTER = "lora_"
"""What the names of the parameters of an adapter contain (PEFT)."""


@contextmanager
def train_selected(student: nn.Module, config: FinetuneConfig) -> Iterator[None]:
    """Leaves only the parameters that ``config.only`` names trainable, for the block.

    For "lora", a student without adapters gets some at all its linear layers. Raises ConfigError
    where it has none of those, peft is not installed, or an adapter could not be merged at the end.
    """
    if config.only == "all":
        yield
        return
    parameters = dict(student.named_parameters())
    frozen = [p for name, p in parameters.items() if p.requires_grad and ADAPTER not in name]
    if any(ADAPTER in name for name in parameters):
        _refuse_packed(student)
    else:
        add_adapters(student, config.lora_rank, config.seed)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def add_adapters(student: nn.Module, rank: int, seed: int) -> None:
    """Adds adapters that change nothing yet to all linear layers; they are drawn from ``seed``.

    Layers whose weights a library has packed or quantized get none: they could not be merged.
    """
    mend_torchvision()
    peft = import_optional("peft", reason="only='lora' trains adapters of peft", install="peft")
    layers = [(name, layer) for name, layer in student.named_modules() if type(layer) is nn.Linear]
    names = [name for name, layer in layers if explain_packed(layer.weight) is None]
    if not names:
        raise ConfigError(f"{type(student).__name__} has no linear layer that could get an adapter")
    options = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(options, student)


def _refuse_packed(student: nn.Module) -> None:
    """Raises ConfigError for an adapter at a weight that a library has packed or quantized."""
    for name, layer in student.named_modules():
        base: Any = vars(layer).get("_modules", {}).get("base_layer")
        if base is not None and explain_packed(base.weight) is not None:
            raise ConfigError(
                f"the adapter at {name!r} could not be merged at the end: its weight is packed or "
                f"quantized ({type(base.weight).__name__}); add adapters to plain layers"
            )


def merge_adapters(*models: nn.Module | None) -> None:
    """Merges the adapters of models for good (``merge_lora``), before they are saved."""
    for model in models:
        if model is not None:
            merge_lora(model)
