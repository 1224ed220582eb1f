"""Imports inside natten: no cycles, including imports inside functions."""

from __future__ import annotations

import ast
import unittest
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import natten

ROOT = Path(natten.__file__).parent


def module_name(path: Path) -> str:
    parts = ("natten", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported_modules(name: str) -> set[str]:
    """Return the natten modules that the file of a module imports anywhere.

    Importing a submodule also runs the packages around it. These are not included: a package that imports its own
    submodules is not a cycle.
    """
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = node.module or "" if not node.level else ".".join(filter(None, (package, node.module)))
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in FILES else base)
    return found & set(FILES) - {name}


class CycleTest(unittest.TestCase):
    def test_no_import_cycle(self):
        try:
            order = list(TopologicalSorter({name: imported_modules(name) for name in FILES}).static_order())
        except CycleError as error:
            self.fail(f"import cycle: {' -> '.join(error.args[1])}")
        self.assertLess(order.index("natten.geometry"), order.index("natten.checks"))
        self.assertLess(order.index("natten.ops"), order.index("natten.functional"))
