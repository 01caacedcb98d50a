"""Who may import whom. Imports inside functions count: they are the usual way to hide a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Callable, Iterator

import pytest

Edge = tuple[str, int, str]  # module, line, the full name that it imports

PARAMETERS = ("engine.parameters", "engine.checkpoint_format", "engine.fields", "engine.errors")
WORKER = (
    *("kernels", "engine.model", "engine.weights", *PARAMETERS),
    *("engine.cost", "cache", "scheduler", "engine.worker"),
    *("engine.messages", "engine.expert_statistics", "engine.config"),
)
MESSAGES = ("engine.messages", "engine.expert_statistics", "engine.errors")
CLIENT = ("engine.frontend.client", "engine.llm", *MESSAGES, "engine.cost", "kernels", "bench")
EVERYTHING = ("kernels", "cache", "scheduler", "engine", "bench")

# Room -> rooms it may import. A module belongs to the longest name that fits it.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": ("kernels",),
    "cache": ("cache",),
    "scheduler": ("scheduler", "cache"),
    "engine.errors": (),
    "engine.expert_statistics": (),
    "engine.messages": ("scheduler.params", "scheduler.plan", "engine.expert_statistics"),
    "engine.settings": ("engine.errors",),
    "engine.device_memory": ("engine.model.config", "engine.errors"),
    "engine.config": (
        "cache.config",
        "cache.layout",
        "scheduler.config",
        "kernels.config",
        "kernels.cpu",
        "engine.frontend.config",
        "engine.model.config",
        "engine.device_memory",
        "engine.host",
        "engine.kv_room",
        "engine.profiles",
        "engine.cost.cards",
        "engine.cost.device",
        "engine.settings",
        "engine.weights.shapes",
        "engine.errors",
    ),
    "engine.host": (),
    "engine.kv_room": ("engine.model.config", "engine.errors", "cache.layout"),
    "engine.profiles": (),
    "engine.cost": (
        "engine.cost",
        "engine.expert_statistics",
        "engine.model.config",
        "engine.device_memory",
        "cache.layout",
        "engine.errors",
    ),
    "engine.cost.step_model": ("engine.cost", "engine.config"),
    "engine.metrics": ("engine.messages",),
    "engine.fields": ("engine.errors",),
    "engine.checkpoint_format": ("engine.fields", "engine.errors"),
    "engine.parameters": ("kernels.formats", "engine.errors"),
    "engine.model": ("engine.model", "kernels", "cache.layout", "cache.pool", *PARAMETERS),
    "engine.weights": ("engine.weights", "engine.model.config", "kernels", *PARAMETERS),
    "engine.worker": WORKER,
    "engine.frontend": (
        "engine.frontend",
        "engine.messages",
        "engine.errors",
        "scheduler.params",
        "scheduler.plan",
    ),
    "engine.gateway": ("engine.gateway", "engine.frontend.client", "engine.messages", "engine.errors"),
    "engine": EVERYTHING,  # llm, launch, cli and what they alone use
    "bench": CLIENT,
    "bench.arguments": ("engine.settings",),
    "bench.step": (*CLIENT, *WORKER),
    "bench.sequences": (*CLIENT, *WORKER),  # and the two that run a model by hand
    "bench.context": (*CLIENT, *WORKER),
    "bench.profile": (*CLIENT, *WORKER),
    "bench.virtual": (*CLIENT, *WORKER),
    "bench.plan": (*CLIENT, *WORKER, "engine.options", "engine.device_memory"),
    "bench.gpu": (*CLIENT, *WORKER),
    "bench.headline": (*CLIENT, *WORKER, "engine.kv_room"),
    "bench.peers": (*CLIENT, "engine.model.config"),
    "bench.peers.workers": (*CLIENT, *WORKER),
}
FORBIDDEN = {("scheduler", "cache.pool")}
WITHOUT_TORCH = (
    *("scheduler", "cache", "engine.frontend", "engine.gateway", "engine.messages", "engine.config"),
    *("engine.cost", "engine.profiles", "engine.host", "engine.kv_room", "engine.expert_statistics"),
    *(
        "engine.settings",
        "engine.fields",
        "engine.checkpoint_format",
        "engine.model.config",
        "engine.weights.shapes",
    ),
)
WITH_TORCH = "cache.pool"


def _within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def _room(name: str, rooms: tuple[str, ...]) -> str | None:
    return max((room for room in rooms if _within(name, room)), key=len, default=None)


def _imported(node: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Full names that one import statement names; a module of ours in preference to a name inside it."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = ["cierzo", *module.split(".")]
            above = parts[: len(parts) - node.level + is_package]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner.removeprefix("cierzo.") in known else base


def _ours(name: str) -> str | None:
    return name.removeprefix("cierzo.") if name.startswith("cierzo.") else None


def _edges(modules: dict[str, ast.Module], nodes: Callable[[ast.AST], Iterator[ast.AST]]) -> list[Edge]:
    """Every import of every module, among the nodes that are looked at."""
    known, packages = set(modules), {name.rpartition(".")[0] for name in modules}
    return [
        (module, node.lineno, name)
        for module, tree in modules.items()
        for node in nodes(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in _imported(node, module, module in packages, known)
    ]


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: not functions, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


@pytest.fixture(scope="module")
def imports(modules: dict[str, ast.Module]) -> list[Edge]:
    """Every import of every module, inside functions too."""
    return _edges(modules, ast.walk)


def test_imports_follow_the_direction_of_the_house(imports: list[Edge]) -> None:
    wrong = []
    for module, line, name in imports:
        target = _ours(name)
        if target is None:
            continue
        room = _room(module, tuple(ALLOWED))
        assert room is not None, f"{module} is in no room of the table"
        fits = any(_within(target, allowed) for allowed in ALLOWED[room])
        if not fits or any(_within(module, a) and _within(target, b) for a, b in FORBIDDEN):
            wrong.append(f"{module}:{line} imports {target}; {room} may import {', '.join(ALLOWED[room])}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_at_import(modules: dict[str, ast.Module]) -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for module, _, name in _edges(modules, _at_import):
        target = _ours(name)
        if target in graph and target != module:
            graph[module].add(target)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError("circle: " + " <- ".join(error.args[1])) from None


def test_our_folders_are_imported_below_cierzo_only(imports: list[Edge]) -> None:
    """A plain `import kernels` would shadow a package that transformers looks for."""
    wrong = [f"{module}:{line} {name}" for module, line, name in imports if name.partition(".")[0] in EVERYTHING]
    assert not wrong, "\n".join(wrong)


def test_rooms_without_torch_do_not_name_it(imports: list[Edge]) -> None:
    wrong = [
        f"{module}:{line} {name}"
        for module, line, name in imports
        if name.partition(".")[0] in ("torch", "transformers")
        and _room(module, WITHOUT_TORCH)
        and not _within(module, WITH_TORCH)
    ]
    assert not wrong, "\n".join(wrong)
