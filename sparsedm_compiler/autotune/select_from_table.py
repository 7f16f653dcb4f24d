"""Kernel selection without measuring: by the table that is shipped for a card."""

from __future__ import annotations

from torch import Tensor

from ..backends.kernel_family import KernelConfig
from ..backends.registry import find_families, find_family
from ..passes import PlannedWeight, Refusal
from .kernel_table import KernelTable, TableRow, find_table


def find_card_table(weight: Tensor) -> KernelTable | Refusal:
    """Returns the table for the device of a weight, or that there is none, as a sentence."""
    cards = [family.identify_card() for family in find_families(weight.device.type)]
    card = next((card for card in cards if card is not None), None)
    if card is None:
        return Refusal(f"no table of kernels is shipped for {weight.device.type} tensors")
    return find_table(*card) or Refusal(f"no table of kernels is shipped for {card[0]}")


def find_table_row(row: PlannedWeight, table: KernelTable) -> TableRow | Refusal:
    """Returns the row of a table that stands for all uses of a weight, or why none does."""
    rows = {table.find_row(row.pattern, problem, row.shape) for problem in row.problems}
    line = rows.pop() if len(rows) == 1 else None
    if line is None:
        return Refusal(f"the table for {table.card} has no layer like it at {row.pattern}")
    return line


def make_kernel(row: PlannedWeight, line: TableRow) -> KernelConfig | Refusal:
    """Returns the kernel of a row of a table as this machine has it, or why it has not."""
    family = find_family(line.kernel)
    dtype = row.problems[0].dtype
    rows, cols = row.shape[0], row.shape[1]
    reason = family.why_unavailable() or family.why_refused(row.pattern, rows, cols, dtype)
    if reason is not None:
        return Refusal(reason)
    for kernel in family.list_candidates(row.pattern, dtype):
        if (kernel.name, kernel.tile) == (line.kernel, line.tile):
            return kernel
    return Refusal(f"{line.kernel} has not the setting of the table here")


def describe_source(table: KernelTable, line: TableRow) -> str:
    """Returns where a choice comes from, as part of the reason that ``explain`` shows."""
    size = f"{line.tokens} tokens, {line.cols} to {line.rows} channels"
    return f"from the table shipped for {table.card}: {line.ratio:.2f} times dense's speed ({size})"
