"""``read_imports``: every import that a package's sources make of its own modules.

A pure function of sources, so that a test can try it on imports that must be caught. It reads
``import``, ``from`` at any level, stars, aliases followed by attributes (``sdm.masks.nm_mask``),
``import_module`` and its kin, ``getattr`` with a constant name, and strings that spell a module,
at any depth of the code. A name is followed through modules that pass it on to the one that
defines it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

ROOT = "sparsedm_compiler"
IMPORTERS = {
    "__import__",
    "importlib.import_module",
    "importlib.__import__",
    "builtins.__import__",
    "pkgutil.resolve_name",
    "runpy.run_module",
}
"""Functions that import what their first argument spells."""

UNREADABLE = {
    "exec",
    "eval",
    "builtins.exec",
    "builtins.eval",
    "runpy.run_path",
    "importlib.util.spec_from_file_location",
    "importlib.util.module_from_spec",
    "sys.modules",
}
"""What reaches modules in a way that no test can read."""


@dataclass(frozen=True, order=True)
class Import:
    """One module's import of another module of the package.

    Attributes:
        importer: The importing module, dotted, without the package's name; "" is its root.
        target: The imported module, spelled likewise; None where the argument of an import
            function is no constant, so that nobody can tell.
        name: The name imported from ``target``, or None for the module itself.
        line: The line in the importer's source.
        door: The module that the source spells, where ``name`` was followed through it to
            ``target``; None where ``target`` is spelled.
    """

    importer: str
    target: str | None
    name: str | None
    line: int
    door: str | None = None

    def __str__(self) -> str:
        what = "something that cannot be read" if self.target is None else self.target or ROOT
        name = f" ({self.name})" if self.name else ""
        door = f" by way of {self.door or ROOT}" if self.door is not None else ""
        return f"{self.importer or ROOT}:{self.line} imports {what}{name}{door}"


def read_imports(sources: Mapping[str, str]) -> list[Import]:
    """Returns all imports between the modules of a package, in order, each one once.

    Args:
        sources: Source text by path below the package's folder, e.g. "train/loop.py".
    """
    modules = read_modules(sources)
    return sorted(
        {
            edge
            for module in modules.values()
            for path, line in module.spelled
            for edge in _resolve(modules, module.name, path, line)
        },
        key=lambda edge: (edge.importer, edge.line, str(edge)),
    )


def read_modules(sources: Mapping[str, str]) -> dict[str, Module]:
    """Returns what each source binds and spells, by the module's dotted name."""
    names = {module_of(path) for path in sources}
    return {module_of(path): Module.read(path, text, names) for path, text in sources.items()}


def follow(modules: Mapping[str, Module], module: str, name: str) -> tuple[str, str]:
    """Returns (module, name) where a name is defined; "" as the name stands for the module."""
    seen: set[tuple[str, str]] = set()
    while name and module in modules and name not in modules[module].defined:
        path = modules[module].bound.get(name)
        if path is None or not path.startswith(f"{ROOT}.") or (module, name) in seen:
            break
        seen.add((module, name))
        module, rest = _split(modules, path)
        name = rest[0] if rest else ""
    return module, name


def module_of(path: str) -> str:
    """Returns the dotted name of a path below the package: "train/__init__.py" is "train"."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass
class Module:
    """What one source binds and spells.

    Attributes:
        name: Its dotted name.
        package: The package its relative imports start from, dotted, with the root's name.
        bound: Full dotted paths by the names that imports bind to them, at any depth.
        spelled: (full dotted path, line) of all that may be a module of the package; a None path
            stands for an argument that cannot be read.
        public: ``__all__``, or an empty list.
        defined: Names that the module itself defines at its top level.
    """

    name: str
    package: str
    bound: dict[str, str] = field(default_factory=dict)
    spelled: list[tuple[str | None, int]] = field(default_factory=list)
    public: list[str] = field(default_factory=list)
    defined: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: str, text: str, names: Collection[str]) -> Module:
        """Reads one source of a package that has modules of these names."""
        name = module_of(path)
        full = f"{ROOT}.{name}" if name else ROOT
        package = full if path.endswith("__init__.py") else full.rpartition(".")[0]
        module = cls(name, package)
        tree = ast.parse(text)
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module._read_statement(node)
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Name | ast.Attribute):
                module._read_name(node, called=id(node) in called)
            elif isinstance(node, ast.Call) and module._dotted(node.func) in IMPORTERS:
                module.spelled.append((module._imported_by(node), node.lineno))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                module._read_string(node.value.replace(":", "."), node.lineno, names)
        for statement in tree.body:
            module._read_definition(statement)
        return module

    def _read_statement(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                path = alias.name
                bound = alias.asname or path.partition(".")[0]
                self.bound[bound] = path if alias.asname else bound
            else:
                base = self._absolute("." * node.level + (node.module or ""))
                path = f"{base}.{alias.name}"
                self.bound[alias.asname or alias.name] = path
            self.spelled.append((path, node.lineno))

    def _read_name(self, node: ast.Name | ast.Attribute, *, called: bool) -> None:
        path = self._dotted(node)
        if path in UNREADABLE or (path in IMPORTERS and not called):
            self.spelled.append((None, node.lineno))
        elif path and isinstance(node, ast.Attribute):
            self.spelled.append((path, node.lineno))

    def _read_string(self, path: str, line: int, names: Collection[str]) -> None:
        parts = path.split(".")
        spells = parts[0] == ROOT and all(part.isidentifier() for part in parts)
        if spells and len(parts) > 1 and parts[1] in names:
            self.spelled.append((path, line))

    def _imported_by(self, call: ast.Call) -> str | None:
        """The path that a call of one of IMPORTERS spells; None where it is no constant."""
        spelling = call.args[0] if call.args else None
        for keyword in call.keywords:
            if keyword.arg in ("name", "mod_name"):
                spelling = keyword.value
        if not (isinstance(spelling, ast.Constant) and isinstance(spelling.value, str)):
            return None
        return self._absolute(spelling.value.replace(":", "."))

    def _read_definition(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            self.defined.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            self.defined |= set(names)
            if names == ["__all__"] and statement.value is not None:
                self.public = list(ast.literal_eval(statement.value))

    def _absolute(self, spelling: str) -> str:
        """A path as an import spells it, made absolute."""
        level = len(spelling) - len(spelling.lstrip("."))
        if not level:
            return spelling
        package = self.package.split(".")
        return ".".join([*package[: len(package) - level + 1], spelling.lstrip(".")]).rstrip(".")

    def _dotted(self, node: ast.expr) -> str | None:
        """The path of ``alias.attribute...``, or of a module that an expression imports."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return base and f"{base}.{node.attr}"
        if not isinstance(node, ast.Call):
            return None
        function = self._dotted(node.func)
        if function in IMPORTERS:
            return self._imported_by(node)
        if function == "getattr" and len(node.args) > 1:
            base, name = self._dotted(node.args[0]), node.args[1]
            if base and isinstance(name, ast.Constant) and isinstance(name.value, str):
                return f"{base}.{name.value}"
        return None


def _resolve(
    modules: Mapping[str, Module], importer: str, path: str | None, line: int
) -> Iterator[Import]:
    """The imports that a spelled path is: of the module, and of whoever defines the name."""
    if path is None:
        yield Import(importer, None, None, line)
        return
    if path != ROOT and not path.startswith(f"{ROOT}."):
        return
    module, rest = _split(modules, path)
    if rest == ["*"]:
        for name in _star(modules[module]):
            yield from _resolve(modules, importer, f"{path[:-1]}{name}", line)
        rest = []
    if module != importer or rest:
        yield Import(importer, module, rest[0] if rest else None, line)
    for door, name, target in _definers(modules, path):
        if target != importer:
            yield Import(importer, target, name, line, door)


def _split(modules: Mapping[str, Module], path: str) -> tuple[str, list[str]]:
    """(the longest beginning that is a module, the names behind it)."""
    parts = path.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in modules:
            return ".".join(parts[:length]), parts[length:]
    return "", parts


def _star(module: Module) -> list[str]:
    names = [*module.bound, *sorted(module.defined)]
    return module.public or [name for name in names if not name.startswith("_")]


def _definers(modules: Mapping[str, Module], path: str) -> Iterator[tuple[str, str, str]]:
    """(door, name, defining module) for a name that some module on the path only passes on."""
    parts = path.split(".")[1:]
    for i, name in enumerate(parts):
        door = ".".join(parts[:i])
        target, _ = follow(modules, door, name)
        if target != door:
            yield door, name, target
