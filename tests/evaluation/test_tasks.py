"""lm-eval tasks from local files, against log-likelihoods computed by hand.

`make test` installs lm-eval into a folder of its own and names it in DUQPP_LM_EVAL; where it is
neither there nor installed, these tests are skipped, but for what must be said without it.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duqpp
from duqpp.cli.main import main
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.evaluation.tasks import Tasks

WORDS = ["Paris", "Rome", "the moon", "a power of two", "dogs", "one scale for them all"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.5
"""


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1 in the environment, which was read long ago."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory) -> Iterator[None]:
    """lm_eval, from the folder named by DUQPP_LM_EVAL at the end of sys.path, or installed."""
    folder = os.environ.get("DUQPP_LM_EVAL")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its packages warn about deprecations of their own
        patch.setattr(sys, "path", [*sys.path, folder] if folder else [*sys.path])
        pytest.importorskip("lm_eval", reason="lm-eval is not installed (DUQPP_LM_EVAL)")
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    """Twelve questions with two to four answers each, the right ones at every place."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for index in range(12):
        order = torch.randperm(len(WORDS), generator=generator).tolist()
        choices = [WORDS[i] for i in order[: 2 + index % 3]]
        question = f"{index}: what shares a block with {WORDS[order[-1]]}?"
        found.append({"question": question, "choices": choices, "gold": index % len(choices)})
    return found


def write_task(folder: Path, name: str, documents: list[dict]) -> Path:
    data, file = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    file.write_text(TASK.format(name=name, data=data), encoding="utf-8")
    return file


def by_hand(model, tokenizer, documents: list[dict]) -> dict[str, list[bool]]:
    """Whether the right answer has the largest log-likelihood, whole or per character, of each."""
    right = {"acc": [], "acc_norm": []}
    for document in documents:
        prompt = f"Question: {document['question']}\nAnswer:"
        sums = []
        for choice in document["choices"]:
            whole = tokenizer(f"{prompt} {choice}")["input_ids"]
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].double()
            log_p = logits.log_softmax(-1)
            sums.append(math.fsum(float(log_p[i - 1, whole[i]]) for i in range(start, len(whole))))
        norms = [s / len(c) for s, c in zip(sums, document["choices"], strict=True)]
        for name, values in (("acc", sums), ("acc_norm", norms)):
            right[name].append(max(range(len(values)), key=values.__getitem__) == document["gold"])
    return right


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "out"
    duqpp.quantize_model(str(tiny_llama), out, QuantizeConfig(method="hadamard"))
    return out


def test_scores_by_hand(lm_eval, tiny_llama, quantized, documents, tmp_path):
    tasks = Tasks([str(write_task(tmp_path, "toy", documents))])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    float_model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for model in (float_model, duqpp.from_pretrained(quantized).eval()):
        right = by_hand(model, tokenizer, documents)
        assert all(0 < sum(hits) < len(hits) for hits in right.values()), "a test of nothing"
        scores = {score.metric: score for score in tasks.run(model, tokenizer)}
        assert set(scores) == {"acc", "acc_norm"}
        for name, hits in right.items():
            assert scores[name].value == pytest.approx(sum(hits) / len(hits), rel=1e-12)
            share = sum(hits) / len(hits)
            stderr = math.sqrt(share * (1 - share) / (len(hits) - 1))
            assert scores[name].stderr == pytest.approx(stderr, rel=1e-6)
            assert (scores[name].task, scores[name].filter) == ("toy", "none")
            assert (scores[name].samples, scores[name].shots) == (12, 0)
            assert scores[name].version == "1.5"


def test_log_likelihoods_by_hand(lm_eval, quantized, documents, tmp_path, monkeypatch):
    """The numbers behind the answers, which alone could be right by luck."""
    import lm_eval.models.huggingface as host

    seen = {}
    inner = host.HFLM.loglikelihood

    def record(self, requests, **options):
        answers = inner(self, requests, **options)
        seen.update({r.args: a[0] for r, a in zip(requests, answers, strict=True)})
        return answers

    monkeypatch.setattr(host.HFLM, "loglikelihood", record)
    model = duqpp.from_pretrained(quantized).eval()
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    Tasks([str(write_task(tmp_path, "seen", documents))]).run(model, tokenizer)
    assert len(seen) == sum(len(d["choices"]) for d in documents)
    for (prompt, answer), value in seen.items():
        whole, start = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        expected = math.fsum(float(log_p[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert value == pytest.approx(expected, rel=1e-5)


def test_bfloat16_logits_are_normalized_in_float32(lm_eval, tiny_llama, documents, tmp_path):
    import lm_eval.models.huggingface as host

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    kinds = []

    class Recorder(host.HFLM):
        def __init__(self, **options):
            kinds.append(options["softmax_dtype"])
            super().__init__(**options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "HFLM", Recorder)
        tasks = Tasks([str(write_task(tmp_path, "half", documents[:2]))])
        tasks.run(model, AutoTokenizer.from_pretrained(tiny_llama))
    assert kinds == ["float32"]


def test_limit_takes_the_first_samples(lm_eval, tiny_llama, documents, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tasks = Tasks([str(write_task(tmp_path, "few", documents))], limit=5)
    hits = by_hand(model, tokenizer, documents[:5])
    for score in tasks.run(model, tokenizer):
        assert score.samples == 5
        assert score.value == pytest.approx(sum(hits[score.metric]) / 5)


def test_the_command(lm_eval, tiny_llama, documents, tmp_path, capsys, monkeypatch):
    """A folder with tasks and a group of them; nothing but the answer on stdout and stderr."""
    monkeypatch.setattr("duqpp.cli.progress.PATIENCE", 1000.0)
    for name, part in (("one", documents[:4]), ("two", documents[4:])):
        write_task(tmp_path, name, part)
    group = "group: both\ntask: [one, two]\naggregate_metric_list:\n  - metric: acc\n"
    (tmp_path / "both.yaml").write_text(group + "    weight_by_size: true\n", encoding="utf-8")
    arguments = ["eval", str(tiny_llama), "--device", "cpu", "--tasks-dir", str(tmp_path)]
    assert main([*arguments, "--tasks", "both", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert set(found) == {"model", "device", "tasks"}, "perplexity was not asked for"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    hits = by_hand(model, AutoTokenizer.from_pretrained(tiny_llama), documents)["acc"]
    values = {s["task"]: s["value"] for s in found["tasks"] if s["metric"] == "acc"}
    expected = {"one": hits[:4], "two": hits[4:], "both": hits}
    assert values == {name: pytest.approx(sum(h) / len(h)) for name, h in expected.items()}
    capsys.readouterr()  # bars of the model that was loaded by hand

    file = str(tmp_path / "one.yaml")
    arguments = ["eval", str(tiny_llama), "--tasks", file, "--limit", "2", "--text", "builtin"]
    assert main([*arguments, "--seq-len", "64", "--windows", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split()[0] for line in out.splitlines()]
    assert lines == ["perplexity", "convention:", "one:", "one:"]
    assert "2 samples, 0 shots" in out


@pytest.mark.parametrize(
    ("tasks", "folder", "message"),
    [
        (["arc_esy"], None, "lm-eval knows no task 'arc_esy'; there is arc_easy"),
        (["none.yaml"], None, "no such task file: none.yaml"),
        (["arc_easy"], "none", "`tasks_dir`: none is no folder"),
        (["FILE", "FILE"], None, None),
        (["BROKEN"], None, "lm-eval cannot load .*broken.yaml: Unable to find .*none.jsonl"),
    ],
)
def test_tasks_that_cannot_run(tasks, folder, message, lm_eval, documents, tmp_path):
    file, broken = write_task(tmp_path, "toy", documents), tmp_path / "broken.yaml"
    broken.write_text(TASK.format(name="broken", data=tmp_path / "none.jsonl"), encoding="utf-8")
    places = {"FILE": str(file), "BROKEN": str(broken)}
    tasks = [places.get(task, task) for task in tasks]
    if message is None:
        assert Tasks(tasks, folder).names == tasks, "the same twice is once"
        return
    with pytest.raises(InputError, match=message):
        Tasks(tasks, folder)


def test_a_task_from_the_hub_without_a_network(lm_eval):
    with pytest.raises(InputError, match="lm-eval cannot load arc_easy: Couldn't reach 'allenai"):
        Tasks(["arc_easy"])


def test_without_lm_eval(tiny_llama, capsys, monkeypatch):
    """Said before a model is loaded."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("duqpp.integrations.transformers.load_model", None)
    assert main(["eval", str(tiny_llama), "--tasks", "arc_easy"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "error: --tasks needs lm-eval: pip install lm-eval datasets" in err
