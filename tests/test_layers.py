"""Imports inside the package point one way. They are read from the source, nothing is run."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(find_spec("duqpp").origin).parent

# From the bottom up: a module may import from layers below its own, and inside its own package. The
# members of one layer do not know each other.
LAYERS = (
    ("_C", "errors", "format", "version"),
    ("files", "ops"),
    ("placement",),
    ("torch_state",),
    ("calibration", "nn", "rotation"),
    ("models",),
    ("checkpoint",),
    ("methods",),
    ("config",),
    ("job",),
    ("integrations",),
    ("evaluation", "tools"),
    ("cli",),
    ("__main__",),
)
# The package itself is above everything: no module below imports it.
ROOT = "duqpp"
# What a layer may import from outside while it is itself imported; anything else is imported where
# it is used, so that the layers up to nn need torch alone.
BASE = {"torch"}
HOSTS = {
    "checkpoint": {"safetensors"},
    "models": {"safetensors"},
    "integrations": {"transformers", "vllm"},
    "cli": {"rich", "typer"},
}


def module_name(path: Path) -> str:
    """duqpp/ops/library.py is duqpp.ops.library; a package's __init__.py is the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
RANK = {layer: rank for rank, layers in enumerate(LAYERS) for layer in layers}


def imported(node: ast.stmt) -> list[str]:
    """Modules that a statement imports: `from a import b` is a.b where that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        modules = [name for name in inside if name in SOURCES]
        return modules if len(modules) == len(inside) else [*modules, node.module]
    return []


def imports_of(name: str) -> set[str]:
    """Every module that a module imports, also inside functions."""
    return {found for node in ast.walk(TREES[name]) for found in imported(node)}


def imports_at_import_time(name: str) -> set[str]:
    """Those outside functions: they are needed as soon as the module is imported."""
    found, open_nodes = set(), [TREES[name]]
    while open_nodes:
        node = open_nodes.pop()
        found |= set(imported(node))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        open_nodes += [] if inside else list(ast.iter_child_nodes(node))
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == ROOT}


def layer_of(name: str) -> str:
    """duqpp.ops.library is of layer ops; the package itself is of none."""
    return name.partition(".")[2].partition(".")[0]


def test_the_reader_sees_imports():
    """The tests below would pass on nothing: what they read must be there."""
    assert "duqpp.format.e8m0" in imports_of("duqpp.format.mxfp4")
    assert "duqpp.format" in imports_of("duqpp.config")
    assert "duqpp.ops.library" in imports_of("duqpp.ops"), "a module named in `from package import`"
    lazy = imports_of("duqpp.models.weights") - imports_at_import_time("duqpp.models.weights")
    assert "transformers" in lazy


def test_layers_and_folders_are_the_same():
    """And the modules beside them: none without a layer, none that is gone."""
    there = {name: layer_of(name) for name in SOURCES if name != ROOT}
    unknown = {name for name, layer in there.items() if layer not in RANK}
    assert not unknown, f"name their layer in {Path(__file__).name}: {sorted(unknown)}"
    compiled = {path.name.partition(".")[0] for path in PACKAGE.glob("_C*")}
    assert set(RANK) == {*there.values(), *compiled}
    folders = {path.parent for path in SOURCES.values()}
    assert all((folder / "__init__.py") in SOURCES.values() for folder in folders)


def test_no_layer_is_one_with_the_layer_below():
    """Something in each imports something of the next one down: there are no idle ranks."""
    found = {
        (layer_of(name), layer_of(other)) for name in SOURCES for other in own(imports_of(name))
    }
    for below, above in pairwise(LAYERS):
        assert {(a, b) for a in above for b in below} & found, f"{above} could stand beside {below}"


def test_few_modules_stand_outside_of_folders():
    """Eight at most: what every layer needs, and the ends of the package."""
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("name", [name for name in SOURCES if name != ROOT])
def test_imports_point_down(name):
    layer = layer_of(name)
    for other in sorted(own(imports_of(name))):
        assert other != ROOT, f"{name} must not import the package above it"
        below = RANK[layer_of(other)] < RANK[layer]
        assert below or layer_of(other) == layer, f"{name} must not import {other}"


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {name: own(imports_of(name)) for name in SOURCES if name != ROOT}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


@pytest.mark.parametrize("name", [name for name in SOURCES if name != ROOT])
def test_hosts_are_imported_where_they_are_used(name):
    roots = {found.split(".")[0] for found in imports_at_import_time(name)} - {ROOT}
    outside = roots - set(sys.stdlib_module_names)
    assert outside <= BASE | HOSTS.get(layer_of(name), set()), f"{name} imports {outside}"


@pytest.mark.parametrize(
    ("layer", "host"), [(layer, host) for layer, hosts in HOSTS.items() for host in sorted(hosts)]
)
def test_a_permission_is_used(layer, host):
    own_modules = [name for name in SOURCES if layer_of(name) == layer]
    used = {found.split(".")[0] for name in own_modules for found in imports_at_import_time(name)}
    assert host in used, f"no module of {layer} imports {host} while it is imported"
