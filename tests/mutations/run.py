"""Break the code in plausible ways, one at a time, and show that a test notices each.

    python -m tests.mutations.run [--list] [--quick] [WORD ...]

A mutation is one replacement in a copy of the tree, build/mutations; its test must fail there, and
must pass in the copy as it is. A test that does not end within its limit has failed. WORDs select
by name: `python` those in Python, which need no compiler. --quick leaves out what compiles CUDA
kernels to their end. Needs what the tests need. Most mutations take half a minute or so on two
cores; the first whose test reads the compiled library builds it in the copy, which takes some ten
minutes.
"""

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tests.mutations import expand, gptq_block, mxfp4_gemm, mxfp4_gemm_sm80, python, rotate_quantize
from tests.mutations.mutation import Mutation

ROOT = Path(__file__).parents[2]
TREE = ROOT / "build" / "mutations"  # the copy, at one path, so that its builds are incremental
SAVED = ROOT / "build" / "mutations.saved"
LOG = ROOT / "build" / "mutations.log"
FOLDERS = ("benchmarks", "csrc", "duqpp", "tests")  # tests of the plan read benchmarks
FILES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TEST_LIMIT = 900.0  # seconds, of all tests of a mutation together

MUTATIONS: dict[str, Mutation] = {
    f"{part}: {mutation.name}": mutation
    for part, mutations in (
        ("rotate_quantize", rotate_quantize.MUTATIONS),
        ("mxfp4_gemm", mxfp4_gemm.MUTATIONS),
        ("mxfp4_gemm_sm80", mxfp4_gemm_sm80.MUTATIONS),
        ("expand", expand.MUTATIONS),
        ("gptq_block", gptq_block.MUTATIONS),
        ("python", python.MUTATIONS),
    )
    for mutation in mutations
}


def copy_sources() -> None:
    """Bring the copy up to date, with the times of the sources: its build goes by them."""
    restore()
    for name in FOLDERS:
        shutil.rmtree(TREE / name, ignore_errors=True)
        shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy2(ROOT / name, TREE)


def save() -> None:
    unfinished = SAVED.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(TREE, unfinished)
    unfinished.rename(SAVED)


def restore() -> None:
    """Undo what happened since `save`, in an earlier run too, if that was interrupted."""
    if SAVED.exists():
        shutil.rmtree(TREE)
        SAVED.rename(TREE)


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The copy with a fault in it. One in Python leaves no build behind: its file is written back.

    Should that be interrupted, the next run copies the sources again.
    """
    path = TREE / mutation.path
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.old!r} does not occur once in {mutation.path}")
    if not mutation.is_python:
        save()
    try:
        path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        yield
    finally:
        if mutation.is_python:
            path.write_text(source, encoding="utf-8")
        else:
            restore()


def environment() -> dict[str, str]:
    """For what runs in the copy; what a test starts in another folder imports the copy as well."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return os.environ | {"DUQPP_CUDA": "on", "PATH": path, "PYTHONPATH": str(TREE)}


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=TREE,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def build_library() -> None:
    done = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], timeout=3600)
    if done.returncode:
        raise RuntimeError(f"the library does not build\n{done.stdout[-2000:]}")


def compile_source(source: str) -> subprocess.CompletedProcess[str]:
    build = next((TREE / "build").glob("cmake-*"))
    target = f"CMakeFiles/duqpp_cuda.dir/{source}.o"
    return run(["cmake", "--build", str(build), "--target", target], timeout=900)


def run_tests(tests: list[str], *options: str) -> tuple[int | None, str]:
    """pytest's exit code, None where it did not end in time, and what it wrote.

    It runs in a child of this process, which has the libraries loaded.
    """
    load_libraries()
    child = os.fork()
    if child == 0:
        become_pytest([*options, *tests])
    code, deadline = None, time.monotonic() + TEST_LIMIT
    while code is None and time.monotonic() < deadline:
        time.sleep(0.1)
        ended, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else None
    if code is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return code, LOG.read_text(encoding="utf-8", errors="replace")


def load_libraries() -> None:
    """What takes seconds to import, and no mutation changes."""
    for name in ("torch", "transformers.models.auto.modeling_auto", "hypothesis", "pytest"):
        importlib.import_module(name)


def become_pytest(arguments: list[str]) -> NoReturn:
    """End this process, a child, as `python -m pytest` does in the copy."""
    os.setsid()
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(environment())
    os.chdir(TREE)
    sys.dont_write_bytecode = True  # it would go by the time of a file, in whole seconds
    sys.path[:] = [str(TREE), *(p for p in sys.path if Path(p or ROOT).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("duqpp", "tests")]:
        del sys.modules[name]
    code = 3  # pytest's, of an error inside of it
    try:
        code = int(importlib.import_module("pytest").main(["-q", "-pno:cacheprovider", *arguments]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def passes_unchanged(mutations: Collection[Mutation]) -> bool:
    """Whether the copy as it is compiles, and passes what the mutations must make fail."""
    for source in {mutation.source for mutation in mutations if mutation.source}:
        if (done := compile_source(source)).returncode:
            print(f"DOES NOT COMPILE unchanged: {source}\n{done.stdout[-2000:]}")
            return False
    # A test of kernels by itself, so that it is seen where it is skipped; those of Python at once.
    alone = {test: [test] for m in mutations if not m.is_python for test in m.tests}
    at_once = dict.fromkeys(test for m in mutations if m.is_python for test in m.tests)
    for chosen in [*alone.values(), *([list(at_once)] if at_once else [])]:
        code, output = run_tests(chosen)
        if code != 0 or " passed" not in output:
            print(f"DOES NOT PASS unchanged: {' '.join(chosen)}\n{output[-2000:]}")
            return False
        print(f"passes unchanged: {' '.join(chosen)}", flush=True)
    return True


def verdict(mutation: Mutation) -> tuple[bool, str]:
    """Whether the fault was caught; and by what, or what went wrong."""
    with planted(mutation):
        if mutation.source is not None:
            failed = compile_source(mutation.source).returncode != 0
            return failed, mutation.source if failed else "SURVIVED"
        if mutation.library:
            build_library()
        code, output = run_tests(mutation.tests, "-x")
    if code is None:
        return True, f"no end in {TEST_LIMIT:g} s"
    # pytest exits 0 when all passed or skipped, 1 when a test failed, 2 when one could not be read.
    if code == 0:
        return False, "SURVIVED"
    if code != 1:
        return False, f"ERROR: pytest exit {code}"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return True, found[1] if found else mutation.test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("word", nargs="*", help="only mutations with one of these in the name")
    parser.add_argument("--quick", action="store_true", help="none that compiles kernels")
    parser.add_argument("--list", action="store_true", help="print names and tests, run nothing")
    options = parser.parse_args()
    chosen = {
        name: mutation
        for name, mutation in MUTATIONS.items()
        if not (options.quick and mutation.compiles_kernels)
        and (not options.word or any(word in name for word in options.word))
    }
    if options.list:
        for name, mutation in chosen.items():
            print(f"{name}: {mutation.test}")
        return 0
    copy_sources()
    if any(mutation.library or mutation.source for mutation in chosen.values()):
        build_library()
    if not passes_unchanged(chosen.values()):
        return 1
    caught = 0
    for name, mutation in chosen.items():
        is_caught, answer = verdict(mutation)
        caught += is_caught
        print(f"caught: {name}, by {answer}" if is_caught else f"{answer}: {name}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if chosen and caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
