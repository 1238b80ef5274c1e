"""The lists of mutations fit the sources as they are; run.py plants them, which takes hours."""

import ast
from pathlib import Path

import pytest

import duqpp
from tests.mutations.run import MUTATIONS, ROOT


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_changes_one_place(name):
    mutation = MUTATIONS[name]
    of_package = mutation.path.startswith("duqpp/")  # which need not be installed from here
    root = Path(duqpp.__file__).parents[1] if of_package else ROOT
    text = (root / mutation.path).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.old!r} in {mutation.path}"
    assert mutation.new != mutation.old


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_must_fail_is_there(name):
    mutation = MUTATIONS[name]
    if mutation.source is not None:
        assert (ROOT / mutation.source).suffix == ".cu"
        assert (ROOT / mutation.source).exists()
        return
    assert mutation.tests
    for path, _, test in (test.partition("::") for test in mutation.tests):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not test or test.partition("[")[0] in functions


def test_faults_that_must_be_among_them():
    """Those named when the kernels were designed: each once broke something, here or elsewhere."""
    for word in (
        "another order of terms",
        "ceil steps up at 1.5 itself",
        "tie at 1/4 goes up",
        "GDC define dropped",
        "definition of the wait dropped",
        "padding rows are not written",
        "padding blocks are not written",
        "nibbles swapped",
        "k not permuted",
        "n not permuted",
    ):
        assert any(word in name for name in MUTATIONS), word


def test_faults_in_python_are_in_every_part():
    paths = [mutation.path for name, mutation in MUTATIONS.items() if name.startswith("python")]
    assert len(paths) >= 40
    for part in ("calibration", "checkpoint", "cli", "evaluation", "job", "methods"):
        assert any(path.startswith(f"duqpp/{part}/") for path in paths), part
