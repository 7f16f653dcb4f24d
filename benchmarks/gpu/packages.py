"""Which packages are here. Imports none of them, so that it can say what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

NEEDED = {
    "torch": "torch",
    "networkx": "networkx",
    "tabulate": "tabulate",
    "safetensors": "safetensors",
    "pytest": "pytest",
}
"""Import name -> name to install, of what nothing works without."""

HELPFUL = {
    "matplotlib": ("matplotlib", "no charts are drawn"),
    "triton": ("triton", "no Inductor and no Triton kernels on a GPU"),
    "hypothesis": ("hypothesis", "tests of properties are left out"),
    "expecttest": ("expecttest", "tests of golden texts are left out"),
    "pytest_timeout": ("pytest-timeout", "a test that hangs takes the time of all others"),
    "xdist": ("pytest-xdist", "tests run one after the other"),
    "diffusers": ("diffusers", "DiT is a stand-in of the same layers, SDXL is left out"),
}
"""Import name -> (name to install, what happens without it)."""


def find_absent(names: Iterable[str]) -> list[str]:
    """Those that cannot be imported here."""
    return [name for name in names if find_spec(name) is None]


def refusal() -> str | None:
    """Why nothing can run at all, and which wheels to bring; None if everything needed is here."""
    missing = [NEEDED[name] for name in find_absent(NEEDED)]
    if not missing:
        return None
    return f"missing: {', '.join(missing)}. {explain_install(missing)}"


def losses() -> list[str]:
    """One sentence for every helpful package that is missing."""
    return [f"without {HELPFUL[name][0]}: {HELPFUL[name][1]}" for name in find_absent(HELPFUL)]


def explain_install(names: Iterable[str]) -> str:
    """How to install packages on a machine without a network."""
    return (
        "Where there is no network, download them elsewhere (python3 -m pip download --no-deps "
        f"-d wheels {' '.join(names)}) and install the files here "
        "(python3 -m pip install --no-index --no-deps wheels/*.whl)."
    )
