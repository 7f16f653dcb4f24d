"""Optional packages: imported when they are needed, with a ConfigError where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

from .errors import ConfigError

MISSING_OPS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Ops a torchvision built for another torch fails to load and yet insists on at import."""

DISTRIBUTIONS = {"PIL": "Pillow", "yaml": "PyYAML", "sklearn": "scikit-learn"}
"""What pip calls a package that is imported under another name."""


EXTRAS = {
    "diffusers": ("diffusers",),
    "train": (
        *("accelerate", "diffusers", "matplotlib", "pillow", "pytorch-fid", "pyyaml", "scipy"),
        *("tensorboard", "tqdm"),
    ),
    "datasets": ("datasets",),
    "lora": ("peft",),
    "demo": ("scikit-learn",),
    "eightbit": ("bitsandbytes", "torchao"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
"""What pip installs for the extras of this package, but for other extras; as in pyproject.toml."""


def read_version(distribution: str) -> str | None:
    """Returns the version of what pip calls ``distribution``, None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def is_installed(package: str) -> bool:
    """Returns whether the top-level ``package`` can be imported; imports nothing."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # blocked by a finder, or None in sys.modules
        return False


def import_optional(module: str, *, reason: str, install: str) -> ModuleType:
    """Imports ``module``, or raises ConfigError with the pip line if its package is missing.

    ``reason``: the first half of the error, "these data need datasets". ``install``: what to give
    to pip.

    >>> import_optional("nowhere", reason="this line needs nowhere", install="nowhere")
    Traceback (most recent call last):
    sparsedm_compiler.errors.ConfigError: this line needs nowhere, which is not installed: \
pip install nowhere
    """
    if not is_installed(module.partition(".")[0]):
        raise ConfigError(f"{reason}, which is not installed: pip install {install}")
    return import_module(module)


@contextmanager
def require_extra(user: str, extra: str) -> Iterator[None]:
    """Turns a failed import in the block into a ConfigError that names package and extra.

    ``user``: what needs the package, as the error calls it. ``extra``: the extra of this package
    that brings it. Other errors pass, also those of a package that is there but broken.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or is_installed(package):
            raise
        raise ConfigError(
            f"{user} needs {DISTRIBUTIONS.get(package, package)}, which is not installed: "
            f'pip install "sparsedm-compiler[{extra}]"'
        ) from error


def import_diffusers(
    *, reason: str = "this model comes from diffusers", extra: str = "diffusers"
) -> ModuleType:
    """Imports diffusers, or raises ConfigError if it is not installed.

    ``reason`` and ``extra``: the first half of the error, and the extra of this package it names.
    """
    if is_installed("diffusers"):
        mend_torchvision()
    install = f'"sparsedm-compiler[{extra}]"'
    return import_optional("diffusers", reason=reason, install=install)


def mend_torchvision() -> bool:
    """Declares two missing ops of torchvision if that makes it importable; returns whether it did.

    PyPI's torchvision is built for the CUDA torch; beside a CPU torch it raises RuntimeError at
    import, and transformers, peft and diffusers, which only check that it is installed, with it.
    Declaring the two ops is enough for all that does not call them. A sound torchvision, or none,
    is left alone.
    """
    if not is_installed("torchvision"):
        return False
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch  # here, so that the command line can be imported without it

        for name, schema in MISSING_OPS.items():
            torch.library.define(f"torchvision::{name}", schema)
        import_module("torchvision")
        return True
    return False
