"""Pictures, curves and HTML reports of runs."""

from __future__ import annotations

from .grid import save_grid
from .png_folder import save_images, saved

__all__ = ["save_grid", "save_images", "saved"]
