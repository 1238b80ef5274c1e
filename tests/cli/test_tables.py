"""Formats for people, and the table of a comparison."""

import io
from dataclasses import replace

from duqpp.cli.commands.evaluate import perplexity_lines, task_lines
from duqpp.cli.tables import ComparisonTable, percent, size
from duqpp.evaluation.divergence import Divergence
from duqpp.evaluation.perplexity import PerplexityResult
from duqpp.evaluation.scores import Row, Run, Scores
from duqpp.evaluation.tasks import TaskScore


def test_formats():
    assert [size(n) for n in (0, 999, 1000, 56_412_345, 3 * 10**9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "56.4 MB",
        "3.0 GB",
    ]
    assert (percent(None), percent(0.12345)) == ("-", "12.35 %")


def scores(text: str, *runs: Run) -> Scores:
    return Scores(text, windows=2, float_perplexity=11.5, runs=runs)


def printed(rows: list[Row], methods: list[str], texts: list[str]) -> list[str]:
    stream = io.StringIO()
    table = ComparisonTable(methods, texts, stream)
    for number, row in enumerate(rows, 1):
        table.print(row)
        assert stream.getvalue().count("\n") == 1 + number * len(texts), "a row is not held back"
    return stream.getvalue().splitlines()


def test_columns_stand_under_their_heads():
    several = Run(0, 20.0, 0.5, 0.75, 5, 1.0), Run(1, 21.0, 0.625, 0.5, 7, 1.0)
    rows = [
        Row("float", (scores("a.txt", Run(None, 11.5, 0.0, 1.0, 0.0, 1.0)),), 400, 100),
        Row("duqpp --refine [both]", (scores("a.txt", *several),), 54, 100),
    ]
    lines = printed(rows, ["duqpp --refine [both]"], ["a.txt"])
    assert len({len(line) for line in lines}) == 1
    for head in ("perplexity", "ratio to float", "KL, nats", "top-1, %", "quantize", "bits/weight"):
        end = lines[0].index(head) + len(head)
        assert all(line[end - 1] != " " and line[end : end + 2].strip() == "" for line in lines)
    expected = (
        "duqpp --refine [both] 20.50 +- 0.71 1.783 +- 0.061 0.562 +- 0.088 62.5 +- 17.7 6.0 s "
        "54 B 4.32"
    )
    assert " ".join(lines[2].split()) == expected
    assert " ".join(lines[1].split()) == "float 11.50 1.000 0.000 100.0 - 400 B 32.00"


def test_further_texts_have_lines_of_their_own():
    texts = ["first.txt", "/some/where/wiki.valid.txt", "hf:name:config:split"]
    run = Run(0, 23.0, 0.25, 0.5, 5, 1.0)
    row = Row("rtn", tuple(scores(text, run) for text in texts), 54, 100)
    header, first, *others = printed([row], ["rtn"], texts)
    assert [line.split() for line in others] == [
        ["on", "wiki.valid.txt", "23.00", "2.000", "0.250", "50.0"],
        ["on", "hf:name:config:split", "23.00", "2.000", "0.250", "50.0"],
    ]
    end = header.index("top-1, %") + len("top-1, %")
    assert {len(line.rstrip()) for line in others} == {end} and first[:end].endswith(" 50.0")


def test_lines_of_an_evaluation():
    plain = PerplexityResult(20.0, [3.0], 64, 1, 2.5)
    assert perplexity_lines(plain)[0] == "perplexity 20.0000 over 1 windows of 64 tokens (2.5 s)"
    assert len(perplexity_lines(plain)) == 2
    beside = replace(plain, divergence=Divergence(0.4321, 0.7654, [], []))
    assert perplexity_lines(beside)[1] == (
        "KL divergence from the reference 0.4321 nats per token, top-1 agreement 76.54 %"
    )


def test_lines_of_tasks():
    scores = [
        TaskScore("arc", "acc", "none", 0.5, 0.0625, 40, 0, "1.0"),
        TaskScore("gsm", "exact_match", "strict", 0.25, None, 7, 5, None),
        TaskScore("group", "acc", "none", 0.5, 0.1, None, None, "2"),
    ]
    assert task_lines(scores) == [
        "arc: acc 0.5000 +- 0.0625, 40 samples, 0 shots",
        "gsm: exact_match (strict) 0.2500, 7 samples, 5 shots",
        "group: acc 0.5000 +- 0.1000",
    ]
