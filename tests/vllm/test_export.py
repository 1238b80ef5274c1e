"""A compressed-tensors export in stock vLLM: the weights and rotations are those of duqpp.

Stock vLLM runs with two aids that it lacks on a CPU (see `stock.py`), one of which is an MXFP4
kernel with the checkpoint's own scale rule. In float32 nothing then is approximate, and the result
must be that of duqpp's own checkpoint.
"""

import pytest

from duqpp.integrations.compressed_tensors import export_compressed_tensors
from tests.vllm.engine import Job, run
from tests.vllm.reference import Reference, assert_equal, differences
from tests.vllm.test_equality import COUNT, LENGTHS, prompts_for


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["llama shared", "llama skips"])
def test_stock_vllm_equals_the_duqpp_checkpoint(name, served, tmp_path):
    original = served(name)
    export_compressed_tensors(original, tmp_path / "exported")
    prompts = prompts_for(name, original)
    job = Job(str(tmp_path / "exported"), prompts, COUNT, compiled=False)
    (answer,) = run([job], tmp_path / "run", stock=True)
    row = differences(Reference(original), prompts, answer.generated)
    print(name, row)
    assert row["tokens"] == COUNT * len(LENGTHS)
    assert_equal(row, small=True)
    assert "duqpp: the linears" not in (tmp_path / "run" / "log").read_text(encoding="utf-8")
