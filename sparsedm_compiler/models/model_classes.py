"""The table of model classes, and the lookup of a model's class.

A new class is one row, in ``unet_classes.py`` or ``transformer_classes.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .model_class import ModelClass
from .transformer_classes import TRANSFORMER_CLASSES
from .unet_classes import UNET_CLASSES

MODEL_CLASSES: Mapping[str, ModelClass] = {
    row.name: row for row in (*UNET_CLASSES, *TRANSFORMER_CLASSES)
}
"""Every known model class by name."""


def find_model_class(model: nn.Module) -> ModelClass | None:
    """Returns the row of the nearest known base of ``model``'s class, None where there is none."""
    names = [base.__name__ for base in type(model).__mro__]
    return next((MODEL_CLASSES[name] for name in names if name in MODEL_CLASSES), None)
