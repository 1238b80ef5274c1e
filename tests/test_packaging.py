"""Dockerfiles and the script behind them: what can be checked without a container engine."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import duqpp

ROOT = Path(__file__).parents[1]
PACKAGE = Path(duqpp.__file__).parent  # elsewhere, where the tests are of an installed wheel
SCRIPT = ROOT / "docker" / "build_wheel.sh"
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))


def source(path: str) -> Path:
    """A path of the repository; the package is where it is installed."""
    return PACKAGE if path == "duqpp" else ROOT / path


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, its arguments), continuation lines joined and comments left out."""
    text = re.sub(r"^#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(w[0], w[1]) for line in lines if len(w := line.split(None, 1)) == 2]


def script_calls(arguments: str) -> list[list[str]]:
    """Arguments of each call of the script in a RUN."""
    commands = re.split(r"&&|\|\||>", arguments)
    return [
        shlex.split(c.partition("docker/build_wheel.sh")[2])
        for c in commands
        if "build_wheel.sh" in c
    ]


def test_there_are_two():
    assert [file.name for file in DOCKERFILES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_bases_are_pinned_and_the_user_is_not_root(file):
    found = instructions(file)
    defaults = dict(a.split("=", 1) for name, a in found if name == "ARG" and "=" in a)
    stages = {"scratch"}
    for _, arguments in (entry for entry in found if entry[0] == "FROM"):
        image, _, stage = arguments.partition(" AS ")
        if image not in stages:
            image = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], image)
            assert re.fullmatch(r"[\w/]+:[\w.-]*\d[\w.-]*", image), f"{image}: no version"
        stages.add(stage)
    last = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    users = [arguments for name, arguments in found[last:] if name == "USER"]
    assert users and users[-1].isdecimal() and int(users[-1]) > 0
    assert ("CMD", '["doctor"]') in found[last:]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_what_is_copied_exists_and_the_script_has_the_logic(file):
    calls = []
    for name, arguments in instructions(file):
        if name == "COPY" and not arguments.startswith("--from"):
            paths = [word for word in arguments.split()[:-1] if not word.startswith("--")]
            assert all(source(path).exists() for path in paths), arguments
        if name == "RUN":
            calls += script_calls(arguments)
            words = set(shlex.split(arguments))
            assert not words & {"cmake", "pip", "pytest"}, f"not in {SCRIPT.name}"
    assert [call[0] for call in calls] == ["setup", "build", "deps", "install", "test"]
    options = set(re.findall(r"--[a-z-]+", SCRIPT.read_text(encoding="utf-8")))
    assert {word for call in calls for word in call if word.startswith("--")} <= options


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_what_installs_torch_does_not_depend_on_the_sources(file):
    """Else each change of duqpp would make the largest layers anew. What precedes them in their
    stages is the script, and the requirements and arguments that they read."""
    text = SCRIPT.read_text(encoding="utf-8")
    steps, copied, given = [], set(), set()
    for name, arguments in instructions(file):
        if name == "FROM":
            copied, given = set(), set()
        elif name == "COPY":
            copied |= {"dist"} if arguments.startswith("--from") else set(arguments.split()[:-1])
        elif name == "ARG":
            given.add(arguments.partition("=")[0])
        elif name == "RUN" and (calls := script_calls(arguments)) and "--torch" in calls[0]:
            ((step, *_),) = calls
            body = re.search(rf"^step_{step}\(\) {{$(.*?)^}}$", text, re.MULTILINE | re.DOTALL)[1]
            read = set(re.findall(r"requirements/\w+\.txt", body))
            read |= {"requirements/constraints.txt", "docker/build_wheel.sh"}
            where_nvcc_is = {"requirements/cuda.txt"}
            assert copied - where_nvcc_is == read - where_nvcc_is, step
            assert given == {"TORCH", "TORCH_INDEX"}, step
            steps.append(step)
    assert steps == ["setup", "deps"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_build_arguments_are_documented(file):
    text = (ROOT / "docs" / "packaging.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?) \|", text, re.MULTILINE))))
    declared = {a.partition("=")[0] for name, a in instructions(file) if name == "ARG"}
    assert declared <= rows, declared - rows


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_cmake_configures_what_is_copied_to_the_build(file, tmp_path):
    found = instructions(file)
    build = found[: [i for i, (name, _) in enumerate(found) if name == "FROM"][1]]
    for name, arguments in build:
        for path in arguments.split()[:-1] if name == "COPY" else ():
            copy = shutil.copytree if source(path).is_dir() else shutil.copy2
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            copy(source(path), tmp_path / path)
    done = configure(tmp_path, tmp_path / "build")
    assert done.returncode == 0, done.stderr


def configure(folder: Path, build: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run CMake over the sources in a folder."""
    cmake = shutil.which(
        "cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if cmake is None:
        pytest.skip("no cmake: pip install -r requirements/build.txt")
    command = [cmake, "-S", str(folder), "-B", str(build), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("value", ["OFF", "0", "of"])
def test_a_misspelt_choice_of_cuda_kernels_builds_nothing(value, tmp_path):
    done = configure(ROOT, tmp_path, f"-DDUQPP_CUDA={value}")
    assert done.returncode != 0
    assert f"DUQPP_CUDA is on, off or auto, not '{value}'" in done.stderr


def test_the_script_parses_and_names_what_is_there():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=60)
    text = SCRIPT.read_text(encoding="utf-8")
    quick = re.search(r"^QUICK=\((.*?)\)", text, re.MULTILINE | re.DOTALL)[1].split()
    copied = re.search(r"^  cp -R (.*?) \"\$copy\"", text, re.MULTILINE | re.DOTALL)[1]
    for path in (*quick, *copied.replace("\\", " ").split()):
        assert list(ROOT.glob(path)), path
    assert "duqpp" not in copied.split(), "the tests are of the installed package"
    for name in re.findall(r"requirements/[\w.]+txt", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope"], "no step or option --nope"),
        (["build", "--out"], "--out needs a value"),
        (["test", "--tests", "some"], "--tests is quick or all"),
        (["test"], "test needs install, or --venv"),
    ],
)
def test_a_wrong_call_of_the_script_is_an_error(arguments, message):
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr


def called(folder: Path, *steps: str) -> list[str]:
    """What the script asks of pip in its environment, which is made by a stand-in for Python."""
    log, python, venv = folder / "log", folder / "python", folder / "venv"
    python.write_text(
        f"""#!/usr/bin/env bash
        echo "$*" >> {shlex.quote(str(log))}
        if [[ $2 == venv ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
        """
    )
    python.chmod(0o755)
    log.unlink(missing_ok=True)
    options = {"--python": python, "--venv": venv, "--torch": "torch==9", "--out": folder}
    words = [str(word) for option in options.items() for word in option]
    subprocess.run([str(SCRIPT), *steps, *words], check=True, timeout=60, capture_output=True)
    return [line.replace(str(folder), "") for line in log.read_text().splitlines()]


VENV = "-m venv /venv"
TORCH = "-m pip install -qq torch==9"
DEPS = "-m pip install -qq -r requirements/runtime.txt"
WHEEL = "-m pip install -qq /duqpp-1.whl --constraint requirements/runtime.txt"


def test_an_environment_is_new_or_what_deps_has_just_made(tmp_path):
    (tmp_path / "duqpp-1.whl").touch()
    stale = tmp_path / "venv" / "stale"
    assert called(tmp_path, "install") == [VENV, TORCH, WHEEL]
    stale.touch()
    assert called(tmp_path, "deps") == [VENV, TORCH, DEPS]
    assert not stale.exists()
    assert called(tmp_path, "install") == [WHEEL]
    stale.touch()
    assert called(tmp_path, "install") == [VENV, TORCH, WHEEL]
    assert not stale.exists()
    assert called(tmp_path, "deps", "install") == [VENV, TORCH, DEPS, WHEEL]


def test_continuous_integration_tests_the_wheel():
    assert "make wheel" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "docker/build_wheel.sh build" in (ROOT / "Makefile").read_text(encoding="utf-8")
