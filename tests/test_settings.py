"""What is said in one place: environment variables in docs/settings.md, the version in duqpp."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import duqpp

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "settings.md"
# Not duqpp's own: every program reads them.
FOREIGN = {"PATH", "PYTHONPATH", "COLUMNS"}
FOLDERS = ("benchmarks", "csrc", "duqpp", "examples", "tests")


def sources(*suffixes: str) -> list[Path]:
    """Files that may read a variable; the package as it is installed, wherever that is."""
    roots = [ROOT / name for name in FOLDERS if name != "duqpp"] + [Path(duqpp.__file__).parent]
    found = [p for root in roots for s in suffixes for p in sorted(root.rglob("*" + s))]
    return [p for p in found if p != Path(__file__)] + [ROOT / "setup.py"] * (".py" in suffixes)


def read_by_python(path: Path) -> set[str]:
    """Names that a file gets from os.environ, or that look like duqpp's own."""
    text = path.read_text(encoding="utf-8")
    if "DUQPP_" not in text and "environ" not in text:
        return set()
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch("DUQPP_[A-Z_]+", node.value):
                found.add(node.value)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            found |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("os.environ.get", "os.getenv")
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
    return found


def test_variables_that_are_read_are_documented_and_the_other_way_round():
    read = {name for path in sources(".py") for name in read_by_python(path)}
    for path in sources(".h", ".cpp", ".cu", ".cuh"):
        read |= set(re.findall(r'getenv\("(\w+)"\)', path.read_text(encoding="utf-8")))
    for name in ("Makefile", "docker/build_wheel.sh"):
        read |= set(re.findall(r"\bDUQPP_[A-Z_]+\b", (ROOT / name).read_text(encoding="utf-8")))
    rows = re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"DUQPP_BACKEND", "DUQPP_CPU_ISA", "DUQPP_CUDA_ARCHS", "MAX_JOBS"} <= read, "reads all"
    assert len(rows) == len(set(rows))
    assert read - FOREIGN == set(rows)


def test_variables_of_make_and_of_scripts_are_named():
    read = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    read += re.findall(r"\$\{(\w+):-", (ROOT / "tests/vllm/run.sh").read_text(encoding="utf-8"))
    named = set(re.findall(r"`(\w+)", DOCUMENT.read_text(encoding="utf-8")))
    assert {"TORCH", "TORCH_INDEX", "VENV", "PYTHON", "OMP_WAIT_POLICY"} <= set(read), "reads both"
    assert set(read) <= named, set(read) - named


def test_names_in_any_text_are_documented():
    """A variable that a page, a message or CI speaks of exists."""
    rows = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"\bDUQPP_[A-Z_]+\b", path.read_text(encoding="utf-8")))
        assert named <= rows, f"{path.name}: {named - rows}"


def test_the_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", duqpp.__version__), "a semantic version"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    version = {"attr": "duqpp.version.__version__"}
    assert project["tool"]["setuptools"]["dynamic"]["version"] == version
    package = Path(duqpp.__file__).parent
    for path in [*package.rglob("*.py"), ROOT / "setup.py", ROOT / "CMakeLists.txt"]:
        if path != package / "version.py":
            assert f'"{duqpp.__version__}"' not in path.read_text(encoding="utf-8"), path


def test_the_changelog_speaks_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert versions[0] == duqpp.__version__
    assert len(versions) == len(set(versions))


@pytest.mark.parametrize("name", ["LICENSE", "SECURITY.md", "CHANGELOG.md", "README.md"])
def test_the_files_that_a_user_looks_for_are_there(name):
    assert (ROOT / name).stat().st_size > 500
