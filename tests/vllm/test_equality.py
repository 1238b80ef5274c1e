"""vLLM gives what transformers gives, for the same checkpoint in float32.

Greedy tokens must be equal, and log-probabilities but for the order of float32 sums. Rounding to
four bits hides such differences nearly always; where a value stands at a tie between two codes, one
of them may jump, and all that follows with it: then what comes before is compared.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.vllm.conftest import SMOLLM2, TINY
from tests.vllm.engine import Answer, EngineError, Job, run
from tests.vllm.reference import Reference, assert_equal, differences

COUNT = 16  # tokens generated
LENGTHS = (5, 17, 40)  # of the prompts, which run as one batch
TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of one hundred degrees, and it freezes at",
    "A prime number is a natural number greater than one that is not a product of two smaller "
    "natural numbers. The first prime numbers are 2, 3, 5, 7,",
)
# Ranks of tensor parallelism, and the checkpoints that can be split so: SmolLM2 has 9 heads on 3
# key-value heads, which two ranks cannot share but three can.
SPLITS = {1: [*TINY, SMOLLM2], 2: list(TINY), 3: [SMOLLM2]}
CASES = [
    (name, ranks, compiled)
    for ranks, names in SPLITS.items()
    for name in names
    for compiled in (False, True)
]


def prompts_for(name: str, folder: Path) -> list[list[int]]:
    if name == SMOLLM2:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return [tokenizer(text).input_ids for text in TEXTS]
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="session")
def answers(request, served, tmp_path_factory):
    """Factory: what vLLM answered, by mode, for a checkpoint over a number of ranks.

    One process, started once, runs the modes whose tests are selected; its failure is that of each.
    """
    root, made = tmp_path_factory.mktemp("runs"), {}
    chosen = [i.callspec.params for i in request.session.items if i.path == Path(__file__)]

    def get(name: str, ranks: int) -> dict[bool, Answer]:
        if (name, ranks) not in made:
            modes = [p["compiled"] for p in chosen if (p["name"], p["ranks"]) == (name, ranks)]
            folder = served(name)
            prompts = prompts_for(name, folder)
            jobs = [Job(str(folder), prompts, COUNT, compiled) for compiled in modes]
            try:
                given = run(jobs, root / f"{folder.name}-{ranks}", ranks=ranks)
                made[name, ranks] = dict(zip(modes, given, strict=True))
            except EngineError as error:
                made[name, ranks] = error
        if isinstance(made[name, ranks], EngineError):
            raise made[name, ranks]
        return made[name, ranks]

    return get


@pytest.fixture(scope="module")
def table():
    """Rows of the equality table; printed when the tests end, and written to DUQPP_VLLM_RESULTS."""
    rows: list[dict] = []
    yield rows
    lines = ["| checkpoint | ranks | mode | tokens equal | sound positions | max dlogp |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        tokens = f"{row['equal']} of {row['tokens']}"
        sound = f"{row['sound']} of {row['positions']}"
        lines.append(
            f"| {row['checkpoint']} | {row['ranks']} | {row['mode']} | {tokens} "
            f"| {sound} | {row['deviation']:.1e} |"
        )
    print("", *lines, sep="\n")
    if file := os.environ.get("DUQPP_VLLM_RESULTS"):
        Path(file).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@pytest.mark.timeout(3600)  # the first test of a checkpoint also runs the engine of the second
@pytest.mark.parametrize(
    ("name", "ranks", "compiled"),
    CASES,
    ids=[f"{n} tp{r} {'compiled' if c else 'eager'}" for n, r, c in CASES],
)
def test_vllm_equals_transformers(name, ranks, compiled, served, answers, table):
    answer = answers(name, ranks)[compiled]
    assert answer.mode.startswith("DYNAMO" if compiled else "eager")
    reference = Reference(served(name))
    row = differences(reference, prompts_for(name, served(name)), answer.generated)
    table.append({"checkpoint": name, "ranks": ranks, "mode": answer.mode, **row})
    assert row["tokens"] == COUNT * len(LENGTHS)
    assert_equal(row, small=name != SMOLLM2)
