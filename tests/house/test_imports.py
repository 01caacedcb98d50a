"""Who may import whom. Imports inside functions count: they are the usual way to hide a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator

import pytest

from cierzo.cli import COMMANDS

Edge = tuple[str, int, str]  # module, line, the full name that it imports

PARAMETERS = (
    *("engine.parameters", "engine.checkpoint_format", "engine.quantisation"),
    *("engine.fields", "engine.checkpoint_file", "engine.errors"),
)
WORKER = (
    *("kernels", "engine.model", "engine.weights", *PARAMETERS),
    *("engine.cost", "cache", "scheduler", "engine.worker"),
    *("engine.messages", "engine.expert_statistics", "engine.config", "engine.environment", "engine.graph_sizes"),
    *("engine.signs", "engine.flight", "engine.server_process", "engine.log_lines"),
    *("engine.text.grammar_limits", "engine.text.token_table"),
)
MESSAGES = ("engine.messages", "engine.expert_statistics", "engine.errors")
CLIENT = (
    *("engine.frontend.client", "engine.llm", "engine.options", "engine.settings"),
    *(*MESSAGES, "engine.cost", "kernels", "bench"),
)
HOUSE = ("kernels", "cache", "scheduler", "engine")
TOP = (*HOUSE, "bench")

# Room -> rooms it may import. A module belongs to the longest name that fits it.
ALLOWED: dict[str, tuple[str, ...]] = {
    "cierzo": (),
    "__main__": ("cli",),
    "cli": ("engine", "bench"),
    "kernels": ("kernels",),
    "kernels.formats": ("kernels.formats",),
    "kernels.cpu": (
        *("kernels.cpu", "kernels.formats", "kernels.ops"),
        *("kernels.check", "kernels.derived", "kernels.fault"),
    ),
    "cache": ("cache",),
    "scheduler": ("scheduler", "cache"),
    "engine.errors": (),
    "engine.expert_statistics": (),
    "engine.conversation": (),
    "engine.core_stats": ("engine.expert_statistics",),
    "engine.prompt_image": (),
    "engine.questions": ("engine.conversation", "engine.core_stats", "engine.prompt_image"),
    "engine.messages": (
        *("scheduler.params", "scheduler.plan"),
        *("engine.conversation", "engine.core_stats", "engine.expert_statistics", "engine.questions"),
        "engine.prompt_image",
    ),
    "engine.signs": ("engine.server_process",),
    "engine.server_process": (),
    "engine.log_lines": (),
    "engine.number_choice": ("kernels.formats.number_formats", "engine.errors"),
    "engine.flight": ("engine.messages", "engine.errors"),
    "engine.settings": ("engine.errors",),
    "engine.device_memory": (
        *("engine.cost", "engine.model.config", "engine.graph_sizes", "engine.errors"),
        "kernels.formats.number_formats",
    ),
    "engine.graph_sizes": (),
    "engine.environment": ("kernels.config", "engine.settings", "engine.errors"),
    "engine.config": (
        "engine.environment",
        "cache.config",
        "cache.layout",
        "scheduler.config",
        "kernels.config",
        "kernels.cpu",
        "kernels.formats.number_formats",
        "engine.frontend.config",
        "engine.model.config",
        "engine.model.read_config",
        "engine.device_memory",
        "engine.host",
        "engine.kv_room",
        "engine.number_choice",
        "engine.profiles",
        "engine.cost.cards",
        "engine.cost.device",
        "engine.cost.weights",
        "engine.settings",
        "engine.weights.vision_shapes",
        "engine.errors",
    ),
    "engine.host": (),
    "engine.kv_room": ("engine.model.config", "engine.errors", "cache.layout"),
    "engine.profiles": (),
    "engine.cost": (
        "engine.cost",
        "engine.expert_statistics",
        "engine.model.config",
        "cache.layout",
        "kernels.formats.number_formats",
        "engine.errors",
    ),
    "engine.cost.step_model": ("engine.cost", "engine.config", "engine.errors"),
    "engine.checkpoint_file": ("engine.errors",),
    "engine.fields": ("engine.checkpoint_file", "engine.errors"),
    "engine.quantisation": ("engine.fields",),
    "engine.checkpoint_format": ("engine.quantisation", "engine.fields", "engine.errors"),
    "engine.parameters": ("kernels.formats", "engine.errors"),
    "engine.model": ("engine.model", "kernels", "cache.layout", "cache.pool", *PARAMETERS),
    "engine.weights": (
        *("engine.weights", "engine.model.config", "engine.model.config_json", "engine.model.read_config"),
        *("kernels", *PARAMETERS),
    ),
    "engine.worker": WORKER,
    "engine.text": ("engine.text", "engine.messages", "engine.checkpoint_file", "engine.errors"),
    "engine.frontend": (
        "engine.frontend",
        "engine.text",
        "engine.messages",
        "engine.settings",
        "engine.errors",
        "engine.signs",
        "engine.server_process",
        "engine.log_lines",
        "engine.flight",
        "scheduler.params",
        "scheduler.plan",
    ),
    "engine.gateway": (
        *("engine.gateway", "engine.frontend", "engine.text", "engine.messages", "engine.conversation"),
        *("engine.settings", "engine.errors", "engine.server_process", "engine.log_lines"),
    ),
    "engine.testing": (
        *("engine.testing", "engine.frontend", "engine.text", "engine.messages", "engine.errors"),
        "engine.settings",
    ),
    "testing": ("engine.testing",),
    "engine": HOUSE,  # llm, launch, commands and what they alone use
    "bench": CLIENT,
    "bench.step": (*CLIENT, *WORKER, "engine.checkpoint"),
    "bench.context": (*CLIENT, *WORKER, "engine.checkpoint"),  # it and the next run a model by hand
    "bench.fairness": (*CLIENT, *WORKER),
    "bench.profile": (*CLIENT, *WORKER),
    "bench.grammars": (*CLIENT, *WORKER),
    "bench.virtual": (*CLIENT, *WORKER),
    "bench.vision": (*CLIENT, *WORKER, "engine.fields"),
    "bench.plan": (*CLIENT, *WORKER, "engine.checkpoint", "engine.device_memory"),
    "bench.gpu": (*CLIENT, *WORKER),
    "bench.headline": (*CLIENT, *WORKER, "engine.kv_room"),
    "bench.peers": (
        *CLIENT,
        "engine.model.config",
        "engine.model.read_config",
        "engine.weights",
        "engine.checkpoint_format",
    ),
    "bench.peers.workers": (*CLIENT, *WORKER),
}
FORBIDDEN = {("scheduler", "cache.pool")}
# Imports that close a circle, until they are mended: (importer, imported), as modules or as folders.
CIRCLES = {}
WITHOUT_TORCH = (
    *("scheduler", "cache", "engine.frontend", "engine.messages", "engine.config", "engine.environment"),
    *("engine.cost", "engine.profiles", "engine.host", "engine.kv_room", "engine.device_memory"),
    *("engine.graph_sizes", "engine.requirements"),
    *("engine.expert_statistics", "engine.core_stats"),
    *("engine.signs", "engine.flight", "engine.server_process", "engine.log_lines", "engine.number_choice"),
    *("engine.testing", "testing", "engine.gateway"),
    *("engine.settings", "engine.fields", "engine.checkpoint_format", "engine.checkpoint", "engine.options"),
    "engine.quantisation",
    *("engine.model.config", "engine.model.config_json", "engine.model.params_json", "engine.model.read_config"),
    *("engine.weights.shapes", "kernels.formats.number_formats", "cli", "__main__"),
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


@pytest.fixture(scope="module")
def imports(nodes: dict[str, list[ast.AST]]) -> list[Edge]:
    """Every import of every module, inside functions too; and the modules of the command line's table."""
    known, packages = set(nodes), {name.rpartition(".")[0] for name in nodes}
    for_types = _for_types(nodes)
    found = [
        (module, node.lineno, name)
        for module, found in nodes.items()
        for node in found
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in for_types
        for name in _imported(node, module, module in packages, known)
    ]
    return found + [("cli", 0, f"cierzo.{module}") for _, module, _ in COMMANDS if module]


def _for_types(nodes: dict[str, list[ast.AST]]) -> set[ast.AST]:
    """Whatever is below an `if TYPE_CHECKING`: it never runs."""
    return {
        inner
        for found in nodes.values()
        for node in found
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


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


@pytest.mark.parametrize("depth", [99, 2, 1], ids=["modules", "folders", "top folders"])
def test_no_circle(imports: list[Edge], nodes: dict[str, list[ast.AST]], depth: int) -> None:
    """A folder two levels down (engine.frontend, bench.plan) is one node at depth 2, a file of a top folder too."""

    def node(name: str) -> str:
        return ".".join(name.split(".")[:depth])

    graph: dict[str, set[str]] = {}
    for module, _, name in imports:
        target = _ours(name)
        if target in nodes and node(module) != node(target):
            graph.setdefault(node(module), set()).add(node(target))
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError("circle: " + " <- ".join(error.args[1])) from None


def test_our_folders_are_imported_below_cierzo_only(imports: list[Edge]) -> None:
    """A plain `import kernels` would shadow a package that transformers looks for."""
    wrong = [f"{module}:{line} {name}" for module, line, name in imports if name.partition(".")[0] in TOP]
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
