"""The shape of the package: imports point one way, and few modules touch sockets or pickles.

``ROOMS`` is the table that docs/architecture.md shows.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import sfl

PACKAGE = Path(sfl.__file__).parent
ROOT = PACKAGE.parent
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The files beside the rooms, on three floors.
GROUND = {"errors", "seeds", "values", "crash"}
OPTIONS = {"config", "nodes", "options", "registry", "trusted_imports", "environment"}
PROGRAMS = {"cli", "auth", "program"}
# room -> the rooms that it may import from, beside itself and the floors below it
ROOMS = {
    "ground": "",
    "files": "ground",
    "options": "ground files",
    "wire": "ground files options",
    "transport": "ground files options wire",
    "weights": "ground files options wire",
    "data": "ground files options",
    "model": "ground files options",
    "tracking": "ground files options",
    "archive": "ground files options wire data model tracking",
    "strategy": "ground files options wire weights data model archive",
    "conversation": "ground files options wire weights data model archive strategy",
    "runtime": "ground files options wire transport weights data model tracking archive strategy"
    " conversation",
    "interactive": "ground files options data model tracking archive strategy conversation runtime",
    "trained": "ground files options wire transport data model archive strategy conversation"
    " runtime interactive",
    "reports": "ground files options wire tracking archive interactive",
    "programs": "ground files options wire transport tracking runtime interactive trained reports",
}
# What is not of TCP alone: ``transports`` is the table from which runtime takes a transport.
OF_ANY_TRANSPORT = {
    "addresses", "guard", "heartbeat", "rate_limit", "refusal_log", "tokens", "transports",
}  # fmt: skip
MAY_IMPORT = {
    "socket": {
        "transport.acceptor",
        "transport.addresses",
        "transport.connecting",
        "transport.connection",
        "transport.http_proxy",
        "transport.listener",
        "transport.mpi",
        "transport.pending",
        "transport.rpc",
        "transport.shaping",
        "transport.stream",
        "transport.tunnel",
    },
    "ssl": {
        "transport.certificates",
        "transport.connecting",
        "transport.connection",
        "transport.pending",
        "transport.stream",
    },
    "pickle": set(),
}


# What looks a name up or parses an option, and who may: the edge. Everybody else is given the row.
LOOK_UPS = {
    "named": {
        "registry",
        "model.optimizers",
        "model.training",
        "strategy.recipe",
        "trained.export",
        "transport.transports",
    },
    "with_options": {"data.augment", "model.schedule", "strategy.recipe", "tracking.trackers"},
    "look_up": {"data.datasets", "model.zoo"},
    "changes_of": {"data.client_data", "strategy.recipe"},
    "model_spec": {"strategy.recipe"},
    "Training.of": {"strategy.recipe"},
    "optimizer_of": {"model.training"},
    "learning_rates": {"model.training"},
    "KeepTensors.parse": {"config", "nodes", "strategy.recipe", "values"},
    "KeepModels.parse": {"archive.writer", "config", "strategy.recipe"},
    "LinkShape.parse": {"nodes"},
    "Recipe.of": {
        "runtime.client_process",
        "runtime.fed_server",
        "runtime.following",
        "runtime.preflight",
        "runtime.recorded_run",
        "trained.models",
    },
}
REGISTRIES = {
    "AUGMENTATIONS",
    "MODELS",
    "OPTIMIZERS",
    "RULES",
    "SCHEDULES",
    "SCHEMES",
    "TASKS",
    "TRACKERS",
}


def room_of(module: str) -> str:
    """Return the room of a module by its name below ``sfl``."""
    first, _, rest = module.partition(".")
    if rest or (PACKAGE / first).is_dir():
        return first
    floors = {"ground": GROUND, "options": OPTIONS, "programs": PROGRAMS}
    return next((floor for floor, names in floors.items() if first in names), "ground")


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, wherever it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def of_the_package(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, by their names below ``sfl``."""
    names = {name.removeprefix("sfl.") for name in imported(path) if name.startswith("sfl.")}
    return {f"{n}.__init__" if (PACKAGE / n.replace(".", "/")).is_dir() else n for n in names} & (
        MODULES.keys()
    )


def against_the_order() -> Iterable[str]:
    for module, path in MODULES.items():
        ours = room_of(module)
        for other in of_the_package(path):
            theirs = room_of(other)
            if theirs != ours and theirs not in ROOMS[ours].split():
                yield f"{module} ({ours}) imports {other} ({theirs})"


def test_no_room_imports_against_the_order() -> None:
    assert sorted(against_the_order()) == []


def test_no_module_imports_in_a_circle() -> None:
    left = {module: of_the_package(path) - {module} for module, path in MODULES.items()}
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


def test_runtime_knows_no_class_of_one_transport() -> None:
    of_any = {f"transport.{name}" for name in OF_ANY_TRANSPORT}
    found = {
        (module, other)
        for module, path in MODULES.items()
        if module.startswith("runtime.")
        for other in of_the_package(path)
        if other.startswith("transport.") and other not in of_any
    }
    assert found == {("runtime.on_mpi", "transport.mpi")}  # what mpirun starts knows its rank


def test_the_rooms_are_few_and_their_modules_short() -> None:
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert {path.name for path in rooms} == ROOMS.keys() - {"ground", "options", "programs"}
    assert len(list(PACKAGE.glob("*.py"))) <= 14
    assert {p.stem for p in PACKAGE.glob("*.py")} == GROUND | OPTIONS | PROGRAMS | {"__init__"}
    assert [m for m, path in MODULES.items() if len(path.read_text().splitlines()) > 400] == []


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|$", page, re.MULTILINE))
    assert {room: cell.replace("`", "").split() for room, cell in shown.items()} == {
        room: others.split() or ["-"] for room, others in ROOMS.items()
    }


def test_the_page_names_every_module() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = re.split(r"^### ", page[page.index("## The rooms") :], flags=re.MULTILINE)[1:]
    for text in rooms:
        room = found[1] if (found := re.match(r"`(\w+)`", text)) else ""
        named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*\|", text, re.MULTILINE))))
        assert named == {p.stem for p in (PACKAGE / room).glob("*.py")} - {"__init__"}, room
    assert len(rooms) == 1 + len([path for path in PACKAGE.iterdir() if path.name[0] != "_"]) - len(
        list(PACKAGE.glob("[!_]*.py"))
    )


def nodes_of(kind: type[ast.AST]) -> Iterable[tuple[str, ast.AST]]:
    """Yield the syntax nodes of a kind in the package, each with its module."""
    for module, path in MODULES.items():
        yield from ((module, n) for n in ast.walk(ast.parse(path.read_text())) if type(n) is kind)


@pytest.mark.parametrize("call", LOOK_UPS)
def test_names_are_looked_up_at_the_edge(call: str) -> None:
    calls = ((module, ast.unparse(node.func)) for module, node in nodes_of(ast.Call))
    assert {module for module, called in calls if called == call} == LOOK_UPS[call]


def test_nobody_takes_a_row_out_of_a_registry() -> None:
    taken = ((module, ast.unparse(node.value)) for module, node in nodes_of(ast.Subscript))
    assert [(module, what) for module, what in taken if what in REGISTRIES] == []


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_few_modules_import(module: str) -> None:
    assert {m for m, path in MODULES.items() if module in imported(path)} == MAY_IMPORT[module]


def test_only_one_module_loads_and_saves() -> None:
    users = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
                value = node.value
                if isinstance(value, ast.Name) and value.id == "torch":
                    users.add(module)
    assert users == {"files.torch_file"}


def test_every_load_is_weights_only() -> None:
    calls = [
        node
        for path in [
            *MODULES.values(),
            *(p for p in ROOT.glob("experiments/**/*.py") if "peers" not in p.parts),
        ]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    safe = [
        k for k in calls[0].keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"
    ]
    assert safe


def test_the_package_does_not_import_experiments() -> None:
    theirs = [
        m for m, p in MODULES.items() if "experiments" in {n.split(".")[0] for n in imported(p)}
    ]
    assert theirs == []


def test_no_test_imports_another() -> None:
    for path in (ROOT / "tests").glob("**/*.py"):
        assert {name for name in imported(path) if name.startswith("tests.test_")} == set(), path
