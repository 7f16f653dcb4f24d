"""Compiled models for other runtimes: ONNX files and AOTInductor packages."""

from __future__ import annotations

from .check_onnx import OnnxReport, OnnxWeight, check_onnx
from .onnx_file import export_onnx
from .package import export_package, load_package

__all__ = [
    "OnnxReport",
    "OnnxWeight",
    "check_onnx",
    "export_onnx",
    "export_package",
    "load_package",
]
