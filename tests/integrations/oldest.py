"""Run tests/integrations on the oldest transformers that duqpp allows.

    python -m tests.integrations.oldest                # makes .venv-oldest, some minutes, once
    python -m tests.integrations.oldest -k guard       # further arguments are pytest's
    python -m tests.integrations.oldest --transformers 5.19.0

The environment has this Python and the version of its torch; transformers is the lower bound of
pyproject.toml, or the version given; the other dependencies are what pip finds to go with it. duqpp
is this source tree, with the extension that is built in it.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TOOLS = ("hypothesis", "pytest", "pytest-timeout")


def main() -> int:
    """Make or bring up to date the environment, and run the tests. Returns: pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", metavar="VERSION", help="instead of the oldest")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-oldest", metavar="FOLDER")
    given, pytest_arguments = parser.parse_known_args()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = {re.match(r"[\w.-]+", line)[0]: line for line in project["dependencies"]}
    bound = re.fullmatch(r"transformers>=([\d.]+)", requirements.pop("transformers"))[1]
    version = given.transformers or ".".join([*bound.split("."), "0", "0"][:3])
    del requirements["torch"]

    python = given.venv.resolve() / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", given.venv], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    # The same build of torch: "2.13.0+cpu" is 2.13.0 on an index that has the CPU build alone.
    subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
    packages = [f"transformers=={version}", *requirements.values(), *TOOLS]
    subprocess.run([*pip, *packages], check=True)

    report = "import transformers, huggingface_hub as h; "
    report += "print('transformers', transformers.__version__, 'huggingface_hub', h.__version__)"
    subprocess.run([python, "-c", report], check=True)
    tests = [a for a in pytest_arguments if a.startswith("tests")] or ["tests/integrations"]
    options = [a for a in pytest_arguments if not a.startswith("tests")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-m", "pytest", *tests, *options], cwd=ROOT, env=environment, check=False
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
