"""The shape of the package: imports point one way, and few modules touch sockets or pickles."""

import ast
from pathlib import Path

import pytest

import sfl

PACKAGE = Path(sfl.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.glob("*.py"))
MAY_IMPORT = {
    "socket": {"doorstep", "shaping", "stream", "transport"},
    "ssl": {"certificates", "client_store", "doorstep", "stream", "transport"},
    "threading": {
        "doorstep",
        "drain",
        "heartbeat",
        "host",
        "machine",
        "shaping",
        "shared_weights",
        "stream",
        "switchboard",
        "transport",
        "turn",
        "turned_away",
        "write_queue",
    },
    "pickle": set(),
}


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, wherever it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_imports_in_a_circle() -> None:
    names = {path.stem for path in MODULES}
    graph = {
        path.stem: {n.removeprefix("sfl.") for n in imported(path)} & names - {path.stem}
        for path in MODULES
    }
    order: list[str] = []
    while graph.keys() - set(order):
        free = [name for name in graph if name not in order and graph[name] <= set(order)]
        assert free, f"a circle among {sorted(graph.keys() - set(order))}"
        order += free
    assert order.index("protocol") < order.index("transport") < order.index("conversation")
    assert order.index("conversation") < order.index("server") <= order.index("cli")


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_few_modules_import(module: str) -> None:
    assert {path.stem for path in MODULES if module in imported(path)} == MAY_IMPORT[module]


def test_only_tensors_loads_and_saves() -> None:
    users = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
                value = node.value
                if isinstance(value, ast.Name) and value.id == "torch":
                    users.add(path.stem)
    assert users == {"tensors"}


def test_every_load_is_weights_only() -> None:
    calls = [
        node
        for path in [*MODULES, *ROOT.glob("experiments/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    safe = [
        k for k in calls[0].keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"
    ]
    assert safe


def test_the_package_does_not_import_experiments() -> None:
    assert [p.name for p in MODULES if any(n.startswith("experiments") for n in imported(p))] == []
