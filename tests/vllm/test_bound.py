"""The bound that vLLM's log-probabilities are held to: wrong checkpoints must be beyond it.

Each has one thing wrong in one linear of its last block, as a plugin that loads or runs a layer
wrongly would have. Its answers, from transformers, stand in for vLLM's: no engine runs here.
"""

import copy

import pytest
from torch import Tensor

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.nn import MXFP4Linear
from tests.vllm.conftest import SMOLLM2
from tests.vllm.engine import TOP, Generated
from tests.vllm.reference import BOUND, Reference, assert_equal, differences
from tests.vllm.test_equality import prompts_for

COUNT = 2  # tokens generated
MUTATIONS = {}


def mutation(change):
    MUTATIONS[change.__name__.replace("_", " ")] = change
    return change


def swap_first_different(values: Tensor) -> None:
    """Swap two neighbours in one row: the first that differ."""
    row, column = (values[:, 1:] != values[:, :-1]).nonzero()[0].tolist()
    values[row, column : column + 2] = values[row, column : column + 2].flip(0)


@mutation
def rotation_dropped(linear: MXFP4Linear) -> None:
    linear.rotation = None


@mutation
def one_rotation_transposed(linear: MXFP4Linear) -> None:
    matrix = linear.rotation.data.view(-1, 32, 32)[0]  # the first, where each block has its own
    matrix.copy_(matrix.mT.clone())


@mutation
def two_scales_swapped(linear: MXFP4Linear) -> None:
    weight = linear.weight
    scales = weight.scales.clone()
    swap_first_different(scales)
    linear.replace_weight(MXFP4Tensor(weight.codes, scales))


@mutation
def two_codes_swapped(linear: MXFP4Linear) -> None:
    weight = linear.weight
    codes = weight.codes.clone()
    row, column = ((codes >> 4) != (codes & 15)).nonzero()[0].tolist()
    codes[row, column] = (codes[row, column] >> 4) | (codes[row, column] << 4)
    linear.replace_weight(MXFP4Tensor(codes, weight.scales))


@mutation
def activations_by_another_rule(linear: MXFP4Linear) -> None:
    linear.rule = ScaleRule.FLOOR


@mutation
def bias_lost(linear: MXFP4Linear) -> None:
    linear.bias.data.zero_()


def answers(model: Reference, prompts: list[list[int]]) -> list[Generated]:
    """As vLLM gives them."""
    given = []
    for prompt in prompts:
        tokens: list[int] = []
        for _ in range(COUNT):
            tokens.append(int(model.logprobs([*prompt, *tokens, 0])[-1].argmax()))
        rows = [row.topk(TOP) for row in model.logprobs([*prompt, *tokens])]
        values = [dict(zip(r.indices.tolist(), r.values.tolist(), strict=True)) for r in rows]
        given.append(Generated(tokens, values))
    return given


CASES = [
    ("qwen2 biases", "bias lost", "self_attn.v_proj"),
    *[
        (name, change, linear)
        for name, linear in (
            ("llama per-block", "self_attn.o_proj"),
            ("llama per-block", "mlp.down_proj"),
            ("llama shared", "mlp.down_proj"),
            (SMOLLM2, "mlp.down_proj"),
        )
        for change in MUTATIONS
        if change != "bias lost"
    ],
]


@pytest.fixture(scope="module")
def originals(served):
    """Factory: the checkpoint's reference and prompts, by name; made once."""
    made = {}

    def get(name: str) -> tuple[Reference, list[list[int]]]:
        if name not in made:
            made[name] = Reference(served(name)), prompts_for(name, served(name))
        return made[name]

    return get


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "change", "linear"), CASES, ids=map(" ".join, CASES))
def test_a_wrong_checkpoint_is_beyond_the_bound(name, change, linear, originals):
    original, prompts = originals(name)
    wrong = copy.copy(original)
    wrong.model = copy.deepcopy(original.model)
    MUTATIONS[change](wrong.model.model.layers[-1].get_submodule(linear))
    row = differences(original, prompts, answers(wrong, prompts))
    print(name, change, linear, row)
    assert row["deviation"] > 10 * BOUND
    with pytest.raises(AssertionError):
        assert_equal(row, small=name != SMOLLM2)


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES}))
def test_the_checkpoint_itself_is_within_it(name, originals):
    original, prompts = originals(name)
    row = differences(original, prompts, answers(original, prompts))
    assert row["deviation"] <= BOUND
    assert_equal(row, small=True)
    assert_equal(row, small=False)
