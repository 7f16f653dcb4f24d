"""Sample grids, training curves and HTML reports of training runs."""

from __future__ import annotations

from .charts import save_curves
from .grid import save_grid
from .page import report_page
from .png_folder import has_images, save_images
from .run_log_format import HeldOutEntry, StepEntry, read_log
from .run_record import Macs, RunRecord, Speedup, read_run

__all__ = [
    "HeldOutEntry",
    "Macs",
    "RunRecord",
    "Speedup",
    "StepEntry",
    "has_images",
    "read_log",
    "read_run",
    "report_page",
    "save_curves",
    "save_grid",
    "save_images",
]
