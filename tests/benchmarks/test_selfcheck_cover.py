"""The table of what selfcheck covers is what the library's kernel table says."""

import json

import selfcheck_cover

from tests.cuda.library import extension


def test_the_committed_table_is_that_of_the_code():
    extension()
    committed = json.loads(selfcheck_cover.FILE.read_text(encoding="utf-8"))
    assert committed == selfcheck_cover.result(), "run benchmarks/selfcheck_cover.py"


def test_nothing_is_left_out_that_a_gpu_has():
    extension()
    for gpu in selfcheck_cover.GPUS:
        for _, kernel, there_are, before, after in selfcheck_cover.rows_of(gpu):
            assert int(before) <= int(after) == int(there_are) > 0, (gpu, kernel)
