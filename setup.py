"""Build entry point: hands the extension to CMake. Everything else is declared in pyproject.toml.

Environment:
    DUQPP_CUDA: CUDA kernels: on, off, or auto (the default): where nvcc is found.
    DUQPP_CUDA_ARCHS: their architectures, as in "90a;100f" (default: 80;90a;100f;120f).
    CUTLASS_DIR: CUTLASS's source folder (default: that of the package nvidia-cutlass).
    MAX_JOBS: compilers at a time (default: one a core). DUQPP_CMAKE_ARGS: more for CMake.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_package(name: str) -> Path | None:
    """Folder of an installed package, without importing it.

    pip's isolated builds hide the environment that they install into; it is looked at too, so that
    the torch that is there serves, and none is downloaded.
    """
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if (Path(folder) / name / "__init__.py").exists():
            return Path(folder) / name
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_tool(name: str) -> str:
    """A build tool beside this Python, as pip installs it, or on the PATH."""
    beside = os.path.dirname(sys.executable)
    tool = shutil.which(name, path=os.pathsep.join((beside, os.environ.get("PATH", ""))))
    if tool is None:
        sys.exit(f"duqpp: building the extension needs {name}: pip install {name}")
    return tool


def find_cutlass() -> Path | None:
    """CUTLASS's sources: $CUTLASS_DIR, or those in the package nvidia-cutlass."""
    if os.environ.get("CUTLASS_DIR"):
        return Path(os.environ["CUTLASS_DIR"])
    package = find_package("cutlass_library")
    return package / "source" if package else None


def wants_cutlass() -> bool:
    """Whether CUDA kernels will be built, and CUTLASS has still to be installed for them."""
    choice = os.environ.get("DUQPP_CUDA", "auto")
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    return choice != "off" and bool(compiler or choice == "on") and find_cutlass() is None


class CMakeBuild(build_ext):
    """`build_ext` by CMake, in build/, so that a second build compiles only what has changed."""

    def build_extension(self, extension: Extension) -> None:
        torch, pybind11 = find_package("torch"), find_package("pybind11")
        if torch is None or pybind11 is None:
            missing = "torch" if torch is None else "pybind11"
            sys.exit(
                f"duqpp: building the extension needs {missing}. Install it, or let pip build in "
                "isolation (without --no-build-isolation)"
            )
        cmake = find_tool("cmake")
        destination = Path(self.get_ext_fullpath(extension.name)).parent.resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            *(cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DDUQPP_TORCH_INCLUDE={torch / 'include'}",
            f"-DDUQPP_TORCH_LIB={torch / 'lib'}",
            f"-Dpybind11_DIR={pybind11 / 'share' / 'cmake' / 'pybind11'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DCUTLASS_DIR={find_cutlass() or ''}",
            f"-DDUQPP_CUDA={os.environ.get('DUQPP_CUDA', 'auto')}",
            *(
                f"-D{name}={os.environ[name]}"
                for name in ("DUQPP_CUDA_ARCHS",)
                if name in os.environ
            ),
            *shlex.split(os.environ.get("DUQPP_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS")
        for command in (
            configure,
            [cmake, "--build", str(build), *(["--parallel", jobs] if jobs else [])],
            [cmake, "--install", str(build)],
        ):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                sys.exit(f"duqpp: the extension did not build: {error}")


setup(
    ext_modules=[Extension("duqpp._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Asked for only where they are not installed: headers of any torch since 2.11 serve.
    setup_requires=[
        *([] if find_package("torch") else ["torch>=2.11"]),
        *(["nvidia-cutlass==4.2.0.0"] if wants_cutlass() else []),
    ],
)
