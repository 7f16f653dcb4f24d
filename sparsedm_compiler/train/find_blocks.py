"""The repeated blocks of a model, as its modules tell them before it is captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the outermost modules that stand in a list and whose class does so again.

    A list is an ``nn.ModuleList`` or an ``nn.Sequential``. Blocks have parts and parameters; those
    whose forward somebody has replaced are left alone.
    """
    classes = Counter(type(member) for member in list_members(model))
    return list(find_outermost(model, {cls for cls, count in classes.items() if count > 1}))


def list_members(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules with parts and parameters that stand in a list."""
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            yield from filter(is_block, module.children())


def is_block(module: nn.Module) -> bool:
    """Returns whether a module has parts, parameters and its own forward, and is no list."""
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    has_parts = next(module.children(), None) is not None
    has_parameters = next(module.parameters(), None) is not None
    return has_parts and has_parameters and not is_list and "forward" not in vars(module)


def find_outermost(model: nn.Module, classes: set[type[nn.Module]]) -> Iterator[nn.Module]:
    """Yields the outermost members of lists that are of one of the classes."""
    listed = isinstance(model, (nn.ModuleList, nn.Sequential))
    for child in model.children():
        if listed and type(child) in classes and is_block(child):
            yield child
        else:
            yield from find_outermost(child, classes)
