"""One student of the study of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Setting:
    """One student, in the table ``group``, trained with ``options`` of FinetuneConfig."""

    group: str
    method: str
    pattern: str | None
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        extra = [f"{key}={value}" for key, value in self.options.items()]
        parts = [self.method, self.pattern or "dense", f"seed{self.seed}", *extra]
        return "-".join(parts).replace(":", "_").replace("[", "").replace("]", "").replace(" ", "")
