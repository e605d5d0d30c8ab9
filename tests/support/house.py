"""How the package is built, in figures, each with a bound: read from the source alone, nothing is imported.

The tests are in test_house.py. As a program it prints

    python tests/support/house.py           the figures
    python tests/support/house.py -v        and every place that counts, or the ten largest
    python tests/support/house.py -v KEY    those of the figures whose names contain KEY
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

BOUNDS = {
    "import circles": 0,
    "files above 400 lines": 0,
    "most files in a folder": 16,
    "most public methods of a class": 15,
    "largest signature": 20,
    "isinstance tests on own classes": 25,
    "methods overridden twice": 0,
    "overridden methods of CurvatureOptimizer": 5,
    "lines of the longest function": 50,
    "private names in tests": 30,
}
LONG_FILE = 400
Function = ast.FunctionDef | ast.AsyncFunctionDef


def root() -> Path:
    """The root of the repository: the folder above this file that has a pyproject.toml."""
    return next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())


# --- the source ------------------------------------------------------------------------------------------------


@dataclass
class Module:
    """A file of the package: its dotted name, and its syntax tree."""

    name: str
    path: Path
    is_package: bool
    tree: ast.Module = field(repr=False)
    lines: int

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    def imports(self) -> Iterator[tuple[ast.stmt, str, str | None, str]]:
        """(statement, module, name taken from it if any, the name it has here), at any depth."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node, alias.name, None, alias.asname or alias.name.partition(".")[0]
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield node, self._origin(node), alias.name, alias.asname or alias.name

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])

    @cached_property
    def bound(self) -> dict[str, str | ast.expr]:
        """What a name here stands for: a dotted name, or the expression that was assigned to it."""
        found: dict[str, str | ast.expr] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
            elif isinstance(node, ast.ClassDef):
                found[node.name] = f"{self.name}.{node.name}"
        for _, origin, name, here in self.imports():
            dotted = f"{origin}.{name}" if name else origin
            found[here] = dotted if name or here != origin.partition(".")[0] else here
        return found


@dataclass
class Class:
    name: str  # dotted
    node: ast.ClassDef = field(repr=False)
    module: Module = field(repr=False)
    bases: list[str]

    @cached_property
    def methods(self) -> dict[str, list[Function]]:
        """Functions of the class body by name: several for a property with a setter, or for overloads."""
        found: dict[str, list[Function]] = {}
        for node in self.node.body:
            if isinstance(node, Function):
                found.setdefault(node.name, []).append(node)
        return found

    def defines(self, name: str) -> bool:
        """Whether a body is given to a method here, and not only its declaration."""
        return not all(map(is_declaration, self.methods.get(name, ())))


class Source:
    """A package below a folder."""

    def __init__(self, folder: Path, package: str) -> None:
        self.folder, self.package = folder, package
        paths = sorted((folder / package.replace(".", "/")).rglob("*.py"))
        self.modules = {module.name: module for module in (self._module(path) for path in paths)}

    def _module(self, path: Path) -> Module:
        parts = path.relative_to(self.folder).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        text = path.read_text()
        name = ".".join(parts[:-1] if is_package else parts)
        return Module(name, path, is_package, ast.parse(text, str(path)), len(text.splitlines()))

    def place(self, path: Path, node: ast.AST) -> str:
        return f"{path.relative_to(self.folder)}:{getattr(node, 'lineno', 1)}"

    def nodes(self) -> Iterator[tuple[Module, ast.AST]]:
        return ((module, node) for module in self.modules.values() for node in in_order(module.tree))

    @cached_property
    def classes(self) -> dict[str, Class]:
        found = {
            f"{module.name}.{node.name}": Class(f"{module.name}.{node.name}", node, module, [])
            for module, node in self.nodes()
            if isinstance(node, ast.ClassDef)
        }
        self.__dict__["classes"] = found  # the bases are looked up among them
        for one in found.values():
            one.bases = [name for base in one.node.bases for name in sorted(self.classes_in(base, one.module))]
        return found

    def target(self, origin: str, name: str | None) -> str | None:
        """The module of the package that an import reads: of `from a.b import c`, a.b.c where that is a module."""
        inner = f"{origin}.{name}" if name else origin
        return next((found for found in (inner, origin) if found in self.modules), None)

    def classes_in(self, node: ast.expr | None, module: Module, depth: int = 0) -> set[str]:
        """The package's own classes that an expression stands for: C, module.C, A | B, (A, B), or a name of these."""
        if node is None or depth > 8:
            return set()
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return set().union(*(self.classes_in(item, module, depth + 1) for item in node.elts))
        if isinstance(node, ast.BinOp):
            sides = (node.left, node.right)
            return set().union(*(self.classes_in(side, module, depth + 1) for side in sides))
        if isinstance(node, ast.Starred | ast.Subscript):
            return self.classes_in(node.value, module, depth + 1)
        first, _, rest = dotted(node).partition(".")
        meant = module.bound.get(first)
        if isinstance(meant, ast.expr):
            return set() if rest else self.classes_in(meant, module, depth + 1)
        return self._class_at(f"{meant}.{rest}" if rest else meant, depth + 1) if meant else set()

    def _class_at(self, name: str, depth: int) -> set[str]:
        if name in self.classes:
            return {name}
        module, _, last = name.rpartition(".")
        if module not in self.modules:
            return set()
        return self.classes_in(ast.Name(last), self.modules[module], depth)

    def ancestors(self, name: str) -> list[str]:
        """A class and all that it inherits from within the package, nearest first."""
        found = [name]
        for one in found:
            found += [base for base in self.classes[one].bases if base not in found]
        return found


def in_order(tree: ast.AST) -> list[ast.AST]:
    return sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0))


def dotted(node: ast.AST) -> str:
    """a.b.c of an expression, or ""."""
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return f"{value}.{node.attr}" if value else ""
    return node.id if isinstance(node, ast.Name) else ""


def without_docstring(node: Function) -> list[ast.stmt]:
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def is_declaration(node: Function) -> bool:
    """Whether a function has no body of its own: a docstring, `...`, or `raise NotImplementedError` alone."""
    return all(
        (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant) and x.value.value is ...)
        or (isinstance(x, ast.Raise) and x.exc is not None and _raised(x.exc) == "NotImplementedError")
        for x in without_docstring(node)
    )


def _raised(node: ast.expr) -> str:
    return dotted(node.func if isinstance(node, ast.Call) else node)


# --- figures ---------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    value: int
    places: list[str]  # everything that counts, or what is largest first


def largest(sized: Iterable[tuple[int, str]]) -> Figure:
    ordered = sorted(sized, key=lambda pair: (-pair[0], pair[1]))
    return Figure(ordered[0][0] if ordered else 0, [f"{size} {place}" for size, place in ordered[:10]])


def counted(places: Iterable[str]) -> Figure:
    found = list(places)
    return Figure(len(found), found)


def import_graph(source: Source) -> dict[str, set[str]]:
    """Module -> modules it imports, those for type checking too, but for the faces of packages."""
    graph: dict[str, set[str]] = {name: set() for name, module in source.modules.items() if not module.is_package}
    for name in graph:
        targets = (source.target(origin, taken) for _, origin, taken, _ in source.modules[name].imports())
        graph[name] = {target for target in targets if target in graph and target != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach one another, of two or more."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, open_nodes = set(), [start]
        while open_nodes:
            new = graph[open_nodes.pop()] - found
            found |= new
            open_nodes += new
        reached[start] = found
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def import_circles(source: Source) -> Figure:
    return counted(" <-> ".join(circle) for circle in circles(import_graph(source)))


def long_files(source: Source) -> Figure:
    long = [module for module in source.modules.values() if module.lines > LONG_FILE]
    return counted(f"{m.lines} {m.path.relative_to(source.folder)}" for m in sorted(long, key=lambda m: -m.lines))


def fullest_folder(source: Source) -> Figure:
    folders = [module.path.parent.relative_to(source.folder) for module in source.modules.values()]
    return largest((folders.count(folder), str(folder)) for folder in set(folders))


def public_methods(source: Source) -> Figure:
    return largest(
        (sum(not name.startswith("_") for name in one.methods), name) for name, one in source.classes.items()
    )


def functions(source: Source) -> Iterator[tuple[str, Function]]:
    for module, node in source.nodes():
        if isinstance(node, Function):
            yield f"{source.place(module.path, node)} {node.name}", node


def signatures(source: Source) -> Figure:
    def size(node: Function) -> int:
        a = node.args
        return len([*a.posonlyargs, *a.args, *a.kwonlyargs]) + (a.vararg is not None) + (a.kwarg is not None)

    return largest((size(node), place) for place, node in functions(source))


def longest_function(source: Source) -> Figure:
    """Decorators and signature count, the docstring does not."""

    def size(node: Function) -> int:
        first = min(x.lineno for x in (node, *node.decorator_list))
        doc = node.body[0] if len(without_docstring(node)) < len(node.body) else None
        return node.end_lineno - first + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)

    return largest((size(node), place) for place, node in functions(source))


def _tested(node: ast.AST) -> ast.expr | None:
    """The classes that a node asks about: those of isinstance, issubclass, `type(x) is`, or a class pattern."""
    if isinstance(node, ast.Call) and dotted(node.func) in ("isinstance", "issubclass") and len(node.args) == 2:
        return node.args[1]
    if isinstance(node, ast.Compare) and isinstance(node.left, ast.Call) and dotted(node.left.func) == "type":
        return ast.Tuple(node.comparators)
    return node.cls if isinstance(node, ast.MatchClass) else None


def class_tests(source: Source) -> Figure:
    return counted(
        f"{source.place(module.path, node)} {', '.join(name.rpartition('.')[2] for name in sorted(found))}"
        for module, node in source.nodes()
        if (found := source.classes_in(_tested(node), module))
    )


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def overridden_twice(source: Source) -> Figure:
    """Methods with a body in three or more classes that inherit from one another, by the first of them."""
    found = set()
    for one in source.classes:
        chain = source.ancestors(one)
        for name in source.classes[one].methods:
            definers = [ancestor for ancestor in chain if source.classes[ancestor].defines(name)]
            if len(definers) > 2 and not is_dunder(name):
                found.add(f"{definers[-1]}.{name}")
    return counted(sorted(found))


def overridden_of(source: Source, base: str = "CurvatureOptimizer") -> Figure:
    """Methods of a class that some class below it has as well."""
    found = set()
    for one in source.classes:
        above = [source.classes[name] for name in source.ancestors(one)[1:] if name.rpartition(".")[2] == base]
        names = {name for ancestor in above for name in ancestor.methods} - {"__init__"}
        found |= names & source.classes[one].methods.keys()
    return counted(sorted(found))


def private_names(source: Source) -> set[str]:
    """Names with one leading underscore that the package defines: functions, classes, variables and attributes."""
    found = set()
    for _, node in source.nodes():
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if name.startswith("_") and not is_dunder(name) and name != "_"}


def _names_used(node: ast.AST, package: str) -> list[str]:
    """Attributes of others, names imported from the package, and names given as strings, as setattr takes them."""
    if isinstance(node, ast.Attribute):
        return [] if dotted(node.value) in ("self", "cls") else [node.attr]
    if isinstance(node, ast.ImportFrom):
        inside = (node.module or "").partition(".")[0] == package
        return [alias.name for alias in node.names] if inside else []
    arguments = node.args if isinstance(node, ast.Call) else ()
    return [x.value for x in arguments if isinstance(x, ast.Constant) and isinstance(x.value, str)]


def private_in_tests(source: Source, folder: str = "tests") -> Figure:
    """Uses of private names that the package defines. What torch alone defines is not among these."""
    known, places = private_names(source), []
    for path in sorted((source.folder / folder).rglob("*.py")):
        for node in in_order(ast.parse(path.read_text(), str(path))):
            names = _names_used(node, source.package)
            places += [f"{source.place(path, node)} {name}" for name in names if name in known]
    return counted(places)


FIGURES = {
    "import circles": import_circles,
    "files above 400 lines": long_files,
    "most files in a folder": fullest_folder,
    "most public methods of a class": public_methods,
    "largest signature": signatures,
    "isinstance tests on own classes": class_tests,
    "methods overridden twice": overridden_twice,
    "overridden methods of CurvatureOptimizer": overridden_of,
    "lines of the longest function": longest_function,
    "private names in tests": private_in_tests,
}


def main(arguments: list[str]) -> None:
    source = Source(root(), "torchcurv")
    wanted = [word for word in arguments if word != "-v"]
    for name, figure in FIGURES.items():
        if all(word in name for word in wanted):
            value, places = figure(source)
            print(f"{name}: {value} [bound {BOUNDS[name]}]")
            print("".join(f"    {place}\n" for place in places) if "-v" in arguments else "", end="")


if __name__ == "__main__":
    main(sys.argv[1:])
