"""Gathers the facts about this machine that decide which kernels run on it.

A part that cannot be read, as of a broken driver or library, becomes a sentence among the problems.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import KernelError
from ..optional_deps import EXTRAS, read_version
from .machine_report import CacheReport, CardReport, FamilyReport, MachineReport

if TYPE_CHECKING:
    from ..backends.kernel_family import KernelFamily

Value = TypeVar("Value")
Other = TypeVar("Other")
CORE = ("torch", "numpy", "networkx", "tabulate", "safetensors")
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "OMP_NUM_THREADS",
    "SPARSEDM_CACHE",
    "SPARSEDM_CXXFLAGS",
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
)
"""The environment variables that change which kernels run, or where they are kept."""
LONGEST = 300


def inspect_machine() -> MachineReport:
    """Returns the facts about this machine; builds the CPU kernels if that was never done.

    Raises nothing: what cannot be read is among the problems.
    """
    from .. import __version__

    problems: list[str] = []
    versions: dict[str, str | None] = {"sparsedm_compiler": __version__}
    versions["python"] = platform.python_version()
    torch_build = attempt(problems, "torch cannot be imported", read_torch_build, None)
    cpu: dict[str, str | int] = {"cores": os.cpu_count() or 1}
    drivers = attempt(problems, "nvidia-smi does not answer", read_driver, dict[str, str]())
    families: tuple[KernelFamily, ...] = ()
    cards: tuple[CardReport, ...] = ()
    if torch_build is not None:
        cpu = attempt(problems, "the CPU cannot be read", read_cpu, cpu)
        cards = attempt(problems, "the cards cannot be read", read_cards, ())
        families = attempt(problems, "the kernels cannot be imported", list_families, ())
        if drivers and not cards:
            problems.append(explain_unused(drivers, torch_build))
    libraries: dict[str, str | None] = {}
    for family in families:
        what = f"the libraries of {family.names[0]} cannot be read"
        libraries |= attempt(problems, what, family.list_libraries, dict[str, str | None]())
    return MachineReport(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        versions={**versions, **{name: read_version(name) for name in CORE}},
        torch_build=torch_build,
        cpu=cpu,
        libraries=libraries,
        cards=cards,
        driver=next(iter(drivers.values()), None),
        families=tuple(map(inspect_family, families)),
        cache=attempt(problems, "the cache cannot be read", read_cache, None),
        extras={
            extra: {name: read_version(name) for name in names} for extra, names in EXTRAS.items()
        },
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        problems=tuple(dict.fromkeys(problems)),
    )


def attempt(
    problems: list[str], failure: str, gather: Callable[[], Value], otherwise: Other
) -> Value | Other:
    """Returns ``gather()``; ``otherwise`` where it raises, with a line among the problems.

    A warning of ``gather`` becomes a line too.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value: Value | Other = gather()
        except Exception as error:  # of any kind: libraries raise their own
            problems.append(f"{failure}: {format_error(error)}")
            value = otherwise
    lines = [warning.message for warning in caught if warning.category is UserWarning]
    problems += [shorten(str(line)) for line in lines]
    return value


def format_error(error: Exception) -> str:
    """Returns an error of ours as its message, any other with its type, as one line."""
    if isinstance(error, KernelError):
        return shorten(str(error))
    return shorten(f"{type(error).__name__}: {error}")


def shorten(text: str) -> str:
    """Returns a text as one line that is not long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def read_torch_build() -> str:
    """Returns what torch is built for."""
    import torch

    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "the CPU alone" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def read_cpu() -> dict[str, str | int]:
    """Returns model, threads of torch, and cores."""
    import torch

    from ..backends.processor import read_cpu_name

    cores = os.cpu_count() or 1
    return {"model": read_cpu_name(), "threads": torch.get_num_threads(), "cores": cores}


def read_cards() -> tuple[CardReport, ...]:
    """Returns the cards that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(
        CardReport(
            name=card.name,
            capability=f"{card.major}.{card.minor}",
            memory_gib=round(card.total_memory / 2**30, 1),
            multiprocessors=card.multi_processor_count,
        )
        for card in properties
    )


def read_driver() -> dict[str, str]:
    """Returns the version of NVIDIA's driver by card, as nvidia-smi says; empty without it.

    Raises KernelError with its words where it fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if run.returncode != 0:
        raise KernelError(run.stdout.strip() or run.stderr.strip() or "it said nothing")
    rows = [line.rpartition(",") for line in run.stdout.splitlines()]
    return {name.strip(): driver.strip() for name, _, driver in rows if name}


def explain_unused(listed: dict[str, str], torch_build: str) -> str:
    """Returns a sentence on cards that the driver lists and torch does not see."""
    names = ", ".join(f"{name} (driver {driver})" for name, driver in listed.items())
    sentence = f"torch cannot use {names}: it is built for {torch_build}"
    if torch_build == "the CPU alone":
        return f"{sentence}; install a torch built for CUDA"
    return f"{sentence}; the driver may be too old, or CUDA_VISIBLE_DEVICES hides the card"


def list_families() -> tuple[KernelFamily, ...]:
    """Returns all families of kernels."""
    from ..backends import registry

    return registry.list_families()


def inspect_family(family: KernelFamily) -> FamilyReport:
    """Returns the facts about a family; an error of its check is a reason."""
    problems: list[str] = []
    unknown = "its check failed"
    reason = attempt(problems, unknown, family.why_unavailable, unknown)
    notes = [attempt(problems, "its libraries cannot be read", family.describe_doubts, None)]
    if family.inexact:
        notes.append(f"runs only where kernels= names it: it {family.inexact}")
    return FamilyReport(
        kernels=family.names,
        device=family.device,
        reason="; ".join(problems) if reason == unknown else reason,
        patterns={kind.__name__: kind.EXPLANATION for kind in family.accepts},
        note="; ".join(filter(None, notes)),
    )


def read_cache() -> CacheReport:
    """Returns the facts about the folder for kernels and timings, which is made."""
    from ..fileio import cache_folder, list_cache_bases

    folder = cache_folder("").absolute()
    files = [path for path in folder.rglob("*") if path.is_file()]
    parts: dict[str, int] = {}
    for path in files:
        part = path.relative_to(folder).parts[0]
        parts[part] = parts.get(part, 0) + 1
    size = sum(path.stat().st_size for path in files)
    return CacheReport(
        folder=str(folder),
        preferred=str(list_cache_bases()[0].absolute()),
        writable=os.access(folder, os.W_OK),
        files=len(files),
        megabytes=round(size / 1e6, 2),
        parts=dict(sorted(parts.items())),
    )


def hide_home(values: Any) -> Any:
    """Returns plain values in which "~" stands for the user's home folder, in all texts."""
    if isinstance(values, str):
        home = os.path.expanduser("~")
        return (
            re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", values)
            if len(home) > 1
            else values
        )
    if isinstance(values, dict):
        return {hide_home(name): hide_home(value) for name, value in values.items()}
    return [hide_home(value) for value in values] if isinstance(values, (list, tuple)) else values
