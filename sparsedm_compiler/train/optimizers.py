"""The optimizers of a fine-tune, by name: AdamW of torch, of bitsandbytes and of torchao."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ConfigError
from ..optimizer_state import is_quantized
from ..optional_deps import import_optional

BLOCK = 256
"""Values that share a scale in 8 bits."""
LEAST_NUMBER = 4096
"""Tensors of fewer values keep their state in float32."""
STEP_BYTES = 4
QMAP_BYTES = 256 * 4


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """An optimizer by name.

    Attributes:
        package: The package that it is of; "torch" is always there.
        path: Its module and class.
        bits: The bits of each of its two moments.
        block: How many values share a scale; 0 where there are none.
        paged: Whether its state may lie in the memory of the host.
        moment: The name that its state has for the second moment of the gradient.
    """

    package: str
    path: tuple[str, str]
    bits: int = 32
    block: int = 0
    paged: bool = False
    moment: str = "exp_avg_sq"


OPTIMIZERS: Mapping[str, OptimizerKind] = {
    "adamw": OptimizerKind("torch", ("torch.optim", "AdamW")),
    "bnb-adamw8bit": OptimizerKind(
        "bitsandbytes", ("bitsandbytes.optim", "AdamW8bit"), 8, BLOCK, moment="state2"
    ),
    "bnb-paged-adamw8bit": OptimizerKind(
        "bitsandbytes", ("bitsandbytes.optim", "PagedAdamW8bit"), 8, BLOCK, True, "state2"
    ),
    "bnb-paged-adamw": OptimizerKind(
        "bitsandbytes", ("bitsandbytes.optim", "PagedAdamW32bit"), 32, 0, True, "state2"
    ),
    "torchao-adamw8bit": OptimizerKind("torchao", ("torchao.optim", "AdamW8bit"), 8, BLOCK),
}
"""Every value of ``FinetuneConfig.optimizer``."""


def make_optimizer(
    name: str, parameters: Iterable[Tensor], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Returns the optimizer called ``name``.

    Raises ConfigError where its package is missing, and for a paged one on a CPU.
    """
    kind, weights = OPTIMIZERS[name], [*parameters]
    module, title = kind.path
    reason = f"optimizer {name!r} is one of {kind.package}"
    library = import_optional(module, reason=reason, install=kind.package)
    make: Callable[..., torch.optim.Optimizer] = vars(library)[title]
    if kind.paged and any(weight.device.type == "cpu" for weight in weights):
        raise ConfigError(
            f"optimizer {name!r} pages its state between a card and the host, and this student is "
            "on a CPU: choose 'adamw' or 'bnb-adamw8bit'"
        )
    return make(weights, **options)


def count_state_bytes(parameters: Iterable[Tensor], name: str) -> int:
    """Returns the bytes of the state of an optimizer for parameters, after its first step."""
    kind = OPTIMIZERS[name]
    total = 0
    for parameter in parameters:
        number = parameter.numel()
        if not takes_few_bits(parameter, kind):
            width = parameter.element_size() if kind.package == "torch" else 4
            total += 2 * number * width
        else:
            scales = -(-number // kind.block) * 4
            total += 2 * (number * kind.bits // 8 + scales)
            total += 2 * QMAP_BYTES if kind.package == "torchao" else 0
        total += STEP_BYTES if kind.package != "bitsandbytes" else 0
    return total


def get_second_moment(state: Mapping[str, Any]) -> Tensor | None:
    """Returns Adam's second moment of a weight in float32, decoded from 8 bits; None without it."""
    names = {kind.moment for kind in OPTIMIZERS.values()} & state.keys()
    if not names:
        return None
    name = names.pop()
    value: Any = state[name]
    if is_quantized(value):
        decoded: Tensor = value.dequantize(torch.float32)
        return decoded
    if value.dtype != torch.uint8:
        moment: Tensor = value
        return moment
    functional: Any = import_optional(
        "bitsandbytes.functional", reason="this state is of bitsandbytes", install="bitsandbytes"
    )
    scales, table = state[name.replace("state", "absmax")], state[name.replace("state", "qmap")]
    codes = value.to(scales.device)  # paged ones are seen as memory of the host
    decoded = functional.dequantize_blockwise(codes, absmax=scales, code=table, blocksize=BLOCK)
    return decoded


def split_quantized(value: Tensor) -> tuple[dict[str, Tensor], list[Any]] | None:
    """Returns the plain tensors of one of torchao, and its settings for JSON; None for others."""
    if not is_quantized(value):
        return None
    quantized: Any = value
    names, (signed, dtype) = quantized.__tensor_flatten__()
    parts = {name: vars(quantized)[name] for name in names}
    return parts, [signed, str(dtype).removeprefix("torch.")]


def join_quantized(parts: Mapping[str, Tensor], settings: list[Any]) -> Tensor:
    """Returns the tensor that ``split_quantized`` took apart.

    Raises ConfigError without torchao.
    """
    signed, dtype = settings
    library: Any = import_optional(
        "torchao.optim.subclass_8bit",
        reason="this checkpoint's optimizer is of torchao",
        install="torchao",
    )
    kind: Any = library.OptimState8bit
    joined: Tensor = kind.__tensor_unflatten__(parts, [signed, vars(torch)[dtype]])
    return joined


def takes_few_bits(parameter: Tensor, kind: OptimizerKind) -> bool:
    """Returns whether the state of a parameter is kept in few bits."""
    number = parameter.numel()
    if kind.bits == 32 or number < LEAST_NUMBER:
        return False
    return kind.package != "torchao" or number % kind.block == 0
