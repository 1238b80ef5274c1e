"""Break the kernels in plausible ways, one at a time, and show that a test notices each.

    python -m tests.mutations.run [--list] [--quick] [WORD ...]

A mutation is one replacement in a copy of the tree, build/mutations; its test must fail there, and
must pass in the copy as it is. WORDs select by name; --quick leaves out what compiles CUDA kernels
to their end. Needs what the tests need. Most mutations take half a minute or so on two cores; the
first whose test reads the compiled library builds it in the copy, which takes some ten minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mutations import expand, mxfp4_gemm, mxfp4_gemm_sm80, rotate_quantize
from tests.mutations.mutation import Mutation

ROOT = Path(__file__).parents[2]
TREE = ROOT / "build" / "mutations"  # the copy, at one path, so that its builds are incremental
SAVED = ROOT / "build" / "mutations.saved"
FOLDERS = ("csrc", "duqpp", "tests")
FILES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")

MUTATIONS: dict[str, Mutation] = {
    f"{op}: {mutation.name}": mutation
    for op, mutations in (
        ("rotate_quantize", rotate_quantize.MUTATIONS),
        ("mxfp4_gemm", mxfp4_gemm.MUTATIONS),
        ("mxfp4_gemm_sm80", mxfp4_gemm_sm80.MUTATIONS),
        ("expand", expand.MUTATIONS),
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
    save()
    try:
        path = TREE / mutation.path
        source = path.read_text(encoding="utf-8")
        if source.count(mutation.old) != 1:
            raise ValueError(f"{mutation.old!r} does not occur once in {mutation.path}")
        path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        yield
    finally:
        restore()


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return subprocess.run(
        command,
        cwd=TREE,
        env=os.environ | {"DUQPP_CUDA": "on", "PATH": path},
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


def run_test(test: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    return run(command, timeout=600)


def passes_unchanged(mutation: Mutation) -> bool:
    if mutation.source is not None:
        done = compile_source(mutation.source)
    else:
        done = run_test(mutation.test)
    passed = done.returncode == 0 and " skipped" not in done.stdout
    if not passed:
        print(done.stdout[-2000:])
    return passed


def verdict(mutation: Mutation) -> str:
    """ "caught", or what went wrong."""
    with planted(mutation):
        if mutation.source is not None:
            return "caught" if compile_source(mutation.source).returncode else "SURVIVED"
        if mutation.library:
            build_library()
        done = run_test(mutation.test)
    # pytest exits 0 when all passed or skipped, 1 when a test failed, else for its own reasons.
    if done.returncode == 0:
        return "SURVIVED"
    return "caught" if done.returncode == 1 else f"ERROR: pytest exit {done.returncode}"


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
    for test, mutation in {mutation.test: mutation for mutation in chosen.values()}.items():
        passed = passes_unchanged(mutation)
        print(f"{'passes' if passed else 'DOES NOT PASS'} unchanged: {test}", flush=True)
        if not passed:
            return 1
    failures = 0
    for name, mutation in chosen.items():
        answer = verdict(mutation)
        failures += answer != "caught"
        print(f"{answer}: {name}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} caught")
    return 1 if failures or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
