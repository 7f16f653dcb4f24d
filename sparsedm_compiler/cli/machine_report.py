"""The facts about a machine that ``sparsedm doctor`` shows, as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """One family of kernels.

    Attributes:
        kernels: The names of its kernels.
        device: The type of device that they run on.
        reason: Why none of them runs here, as a sentence; None where they run.
        patterns: The kinds of pattern that it accepts, with their meanings.
        note: What is known against its libraries, or of its numbers; "" for nothing.
    """

    kernels: tuple[str, ...]
    device: str
    reason: str | None
    patterns: dict[str, str]
    note: str = ""

    @property
    def runs(self) -> bool:
        """Whether its kernels run here."""
        return self.reason is None


@dataclass(frozen=True, slots=True)
class CardReport:
    """One card that torch can use.

    Attributes:
        name: Its name.
        capability: Its compute capability.
        memory_gib: Its memory.
        multiprocessors: Number of its multiprocessors.
    """

    name: str
    capability: str
    memory_gib: float
    multiprocessors: int


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The folder where kernels and timings are kept.

    Attributes:
        folder: The folder that is used.
        preferred: The folder that would be used if it could be written.
        writable: Whether ``folder`` can be written.
        files: Number of files in it.
        megabytes: Their size.
        parts: Number of files by sub-folder.
    """

    folder: str
    preferred: str
    writable: bool
    files: int
    megabytes: float
    parts: dict[str, int]


@dataclass(frozen=True, slots=True)
class MachineReport:
    """All facts.

    Attributes:
        system: Operating system and processor type.
        versions: Versions of this package, Python and the core dependencies; None: not installed.
        torch_build: The platform that torch is built for.
        cpu: Model, threads of torch, and cores.
        libraries: Libraries and tools of the kernels by name; None: not there.
        cards: The cards that torch can use.
        driver: Version of NVIDIA's driver; None without it.
        families: The families of kernels in the order in which they are tried.
        cache: The folder for kernels and timings; None where it cannot be read.
        extras: Versions of optional packages by extra; None: not installed.
        environment: Environment variables that are set and change which kernels run.
        problems: Sentences on what could not be read.
    """

    system: str
    versions: dict[str, str | None]
    torch_build: str | None
    cpu: dict[str, str | int]
    libraries: dict[str, str | None]
    cards: tuple[CardReport, ...]
    driver: str | None
    families: tuple[FamilyReport, ...]
    cache: CacheReport | None
    extras: dict[str, dict[str, str | None]]
    environment: dict[str, str]
    problems: tuple[str, ...]

    @property
    def runs_sparse(self) -> bool:
        """Whether at least one sparse kernel runs here."""
        return any(family.runs for family in self.families)
