"""compare: what each row must equal, and what is left on disk."""

import hashlib
import json
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import duqpp
from duqpp.calibration.tokens import BUILTIN, builtin_text, read_text, tokenize
from duqpp.checkpoint.shard import linear_storage
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError
from duqpp.evaluation.compare import FLOAT, Plan, compare
from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference
from duqpp.evaluation.scores import Row, Run, Scores
from duqpp.integrations.transformers import load_model
from duqpp.job.quantize import quantize_model
from duqpp.models import source as source_module
from duqpp.models.source import open_source
from tests.families import FAMILIES
from tests.forked import Forked

CALIBRATION = {"samples": 2, "seq_len": 64, "max_steps": 16}
SMALL = QuantizeConfig(**CALIBRATION)
SETTINGS = {"seq_len": 64, "windows": 2}


def plan(*methods: str, **options) -> Plan:
    """Of methods with few options, each under its own name."""
    configs = {name: QuantizeConfig(method=name, **CALIBRATION) for name in methods}
    return Plan(**{"methods": configs, **SETTINGS, **options})


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made; whatever stays in it was left behind."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def evaluate(model, tokenizer) -> float:
    tokens = tokenize(tokenizer, builtin_text("evaluation"))
    return perplexity(model, tokens, **SETTINGS).perplexity


def test_rows_equal_quantizing_and_evaluating_by_hand(tiny_llama, tmp_path, scratch):
    per_block = QuantizeConfig(gptq=True, rotation="per-block", **CALIBRATION)
    methods = {"rtn": QuantizeConfig(method="rtn"), "gptq per block": per_block}
    rows = []
    found = compare(
        open_source(str(tiny_llama)), plan(methods=methods, seeds=[3]), on_row=rows.append
    )
    assert found.rows == rows
    model, tokenizer = load_model(str(tiny_llama))
    expected, divergence = {FLOAT: evaluate(model, tokenizer)}, {FLOAT: (0.0, 1.0)}
    tokens = tokenize(tokenizer, builtin_text("evaluation"))
    _, reference = perplexity_and_reference(model, tokens, **SETTINGS)
    for seed, (name, config) in enumerate(
        [("rtn", {"method": "rtn"}), ("gptq per block", {"rotation": "per-block"})]
    ):
        options = {"seed": 3, "gptq": "gptq" in name, **CALIBRATION, **config}
        out = tmp_path / str(seed)
        quantize_model(str(tiny_llama), out, QuantizeConfig(**options))
        quantized = duqpp.from_pretrained(out)
        expected[name] = evaluate(quantized, tokenizer)
        beside = perplexity(quantized, tokens, **SETTINGS, reference=reference).divergence
        divergence[name] = (beside.kl, beside.agreement)
    scores = {row.method: row.headline for row in rows}
    assert {name: own.perplexity for name, own in scores.items()} == expected
    for name, own in scores.items():
        assert own.ratio == own.perplexity / expected[FLOAT]
        assert (own.kl, own.agreement) == divergence[name]
    assert len(set(expected.values())) == 3
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_float_row_of_every_family(family, tied, make_tiny):
    folder = str(make_tiny(family, tie_word_embeddings=tied))
    found = compare(open_source(folder), plan("rtn"))
    row, scores = found.rows[0], found.rows[0].headline
    assert scores.perplexity == evaluate(*load_model(folder))
    assert (scores.ratio, row.bits_per_weight, scores.spread) == (1.0, 32.0, None)
    assert (scores.kl, scores.agreement) == (0.0, 1.0)
    assert found.rows[1].headline.kl > 0


def test_only_methods_with_randomness_run_once_per_seed(tiny_llama):
    methods = plan("rtn", "hadamard", "random", "duquant++", seeds=[0, 1, 2])
    found = compare(open_source(str(tiny_llama)), methods)
    seeds = {row.method: [run.seed for run in row.headline.runs] for row in found.rows}
    assert seeds == {
        FLOAT: [None],
        "rtn": [0],
        "hadamard": [0],
        "random": [0, 1, 2],
        "duquant++": [0, 1, 2],
    }
    for row in found.rows[3:]:
        for name, spread in (
            ("perplexity", "spread"),
            ("kl", "kl_spread"),
            ("agreement", "agreement_spread"),
        ):
            values = [getattr(run, name) for run in row.headline.runs]
            assert len(set(values)) > 1, (row.method, name)
            assert getattr(row.headline, name) == statistics.fmean(values)
            assert getattr(row.headline, spread) == statistics.stdev(values)


def test_a_row_says_what_its_runs_say():
    runs = (Run(0, 10.0, 0.5, 0.75, 2.0, 1.0), Run(1, 14.0, 0.25, 0.5, 4.0, 1.0))
    scores = Scores("a.txt", 2, float_perplexity=4.0, runs=runs)
    other = Scores("b.txt", 3, float_perplexity=8.0, runs=(Run(0, 12.0, 1.5, 0.25, 2.0, 1.0),))
    values = Row("m", (scores, other), weight_bytes=17, weights=32).to_dict()
    assert (values["perplexity"], values["ratio"], values["seconds"]) == (12.0, 3.0, 3.0)
    assert values["spread"] == pytest.approx(math.sqrt(8))
    assert values["ratio_spread"] == pytest.approx(math.sqrt(8) / 4)
    assert values["bits_per_weight"] == 4.25
    assert [run["seed"] for run in values["runs"]] == [0, 1]
    assert (values["kl"], values["agreement"]) == (0.375, 0.625)
    assert values["kl_spread"] == values["agreement_spread"] == pytest.approx(math.sqrt(1 / 32))
    first, second = values["texts"]
    assert {name: values[name] for name in first if name in values} == {
        name: value for name, value in first.items() if name not in ("text", "windows")
    }
    assert (first["text"], first["windows"]) == ("a.txt", 2)
    assert (second["text"], second["perplexity"], second["ratio"]) == ("b.txt", 12.0, 1.5)
    assert (second["kl"], second["kl_spread"]) == (1.5, None)
    assert [run["perplexity"] for run in second["runs"]] == [12.0]


@pytest.mark.parametrize(
    ("method", "rotation", "extra_bytes"),
    [
        ("rtn", "shared", lambda blocks: 0),
        ("hadamard", "shared", lambda blocks: 2048),
        ("hadamard", "per-block", lambda blocks: 2048 * blocks),
        ("duquant", "shared", lambda blocks: 2 * 2048 + 4 * 32 * blocks),
    ],
)
def test_storage_counts_codes_scales_and_rotations(
    method, rotation, extra_bytes, tiny_llama, tmp_path
):
    config = QuantizeConfig(method=method, rotation=rotation, **CALIBRATION)
    quantize_model(str(tiny_llama), tmp_path / "out", config)
    size, weights = linear_storage(tmp_path / "out")
    assert weights == 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 96)
    linears = [2] * 6 + [3]  # blocks per row: q k v o gate up have K = 64, down has K = 96
    assert size == weights * 17 / 32 + 2 * sum(extra_bytes(blocks) for blocks in linears)


def test_kept_models_stay_and_load(tiny_llama, tmp_path, scratch):
    kept = tmp_path / "kept"
    found = compare(
        open_source(str(tiny_llama)), plan("random", seeds=[5, 6], keep={"random": kept})
    )
    assert evaluate(*load_model(str(kept))) == found.rows[1].headline.runs[0].perplexity
    assert not list(scratch.iterdir())


def test_nothing_is_left_after_a_failure(tiny_llama, scratch):
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "rtn: evaluate":
            assert list(scratch.glob("*/work/model-*/config.json"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(open_source(str(tiny_llama)), plan("rtn"), progress=stop)
    assert not list(scratch.iterdir())


def test_calibration_and_evaluation_texts_are_told_apart(tiny_llama, tmp_path):
    for name, part in (("a.txt", "calibration"), ("b.txt", "evaluation")):
        (tmp_path / name).write_text(builtin_text(part)[:20000], encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt")) != read_text(str(tmp_path / "b.txt"))
    source = open_source(str(tiny_llama))
    options = {"calibration": str(tmp_path / "a.txt"), "texts": [str(tmp_path / "b.txt")]}
    found = compare(source, plan("duquant++", **options))
    tokenizer = source.tokenizer()
    tokens = tokenize(tokenizer, read_text(options["texts"][0]))
    model, _ = load_model(str(tiny_llama))
    assert found.rows[0].headline.perplexity == perplexity(model, tokens, **SETTINGS).perplexity
    quantize_model(str(tiny_llama), tmp_path / "out", SMALL, calibration=options["calibration"])
    quantized = duqpp.from_pretrained(tmp_path / "out")
    assert found.rows[1].headline.perplexity == perplexity(quantized, tokens, **SETTINGS).perplexity


def test_each_text_is_as_if_it_were_alone(tiny_llama, tmp_path, monkeypatch):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text(builtin_text()[:5000], encoding="utf-8")
    short.write_text("The capital of France is Paris. " * 12, encoding="utf-8")
    texts, settings = [str(short), BUILTIN, str(long)], {"seq_len": 64, "windows": 3}
    source, settings = open_source(str(tiny_llama)), settings | {"seeds": [0, 1]}
    alone = [compare(source, plan("rtn", "random", texts=[t], **settings)) for t in texts]
    quantized = []
    monkeypatch.setattr(
        "duqpp.evaluation.compare.quantize_model",
        lambda *a, **k: quantized.append(a[2].method) or quantize_model(*a, **k),
    )
    found = compare(source, plan("rtn", "random", texts=texts, **settings))
    assert quantized == ["rtn", "random", "random"], "once for all texts"
    for index, row in enumerate(found.rows):
        assert [scores.text for scores in row.texts] == texts
        for one, scores in zip(alone, row.texts, strict=True):
            expected = one.rows[index].headline
            assert (scores.text, scores.windows) == (expected.text, expected.windows)
            assert scores.float_perplexity == expected.float_perplexity
            for run, other in zip(scores.runs, expected.runs, strict=True):
                assert (run.seed, run.perplexity) == (other.seed, other.perplexity)
                assert (run.kl, run.agreement) == (other.kl, other.agreement)
    windows = [scores.windows for scores in found.rows[1].texts]
    assert windows[0] < 3 and windows[1:] == [3, 3]
    values = found.to_dict()
    assert (values["text"], values["texts"]) == (texts[0], texts)
    assert values["windows"] == windows[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "none.txt"}, "cannot read text file none.txt"),
        ({"texts": ["none.txt"]}, "cannot read text file none.txt"),
        ({"texts": [BUILTIN, "none.txt"]}, "cannot read text file none.txt"),
        ({"texts": [BUILTIN, BUILTIN]}, "an evaluation text is named twice: builtin, builtin"),
        ({"texts": []}, "at least one method, one seed and one text"),
        ({"seq_len": 10**7}, "exceed the model.s 512 positions"),
        ({"seeds": []}, "at least one method, one seed and one text"),
    ],
)
def test_bad_input_is_found_before_any_row(options, message, tiny_llama):
    rows = []
    with pytest.raises(InputError, match=message):
        asked = plan("rtn", "duquant++", **options)
        compare(open_source(str(tiny_llama)), asked, on_row=rows.append)
    assert rows == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "^`windows` must be at least 1, got 0"),
        ({"seq_len": 1}, "^`seq_len` must be at least 2, got 1"),
        (
            {"seeds": [0, 2**64]},
            r"^`seeds` must lie in \[-9223372036854775808, 18446744073709551615",
        ),
    ],
)
def test_a_plan_that_suits_no_model(options, message):
    with pytest.raises(InputError, match=message):
        plan("rtn", **options)


@pytest.mark.parametrize("sources", ["{}", "{}*2,builtin"])
def test_a_pipe_calibrates_every_method(sources, tiny_llama, tmp_path, scratch):
    """It gives its text once, and each method reads it."""
    text, pipe = builtin_text()[:20000], tmp_path / "pipe"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    os.mkfifo(pipe)
    thread = threading.Thread(target=pipe.write_text, args=(text, "utf-8"), daemon=True)
    thread.start()
    methods = ("duquant++", "duquant")
    piped = compare(open_source(str(tiny_llama)), plan(*methods, calibration=sources.format(pipe)))
    thread.join(timeout=20)
    read = plan(*methods, calibration=sources.format(tmp_path / "text.txt"))
    assert results(piped) == results(compare(open_source(str(tiny_llama)), read))
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"runs": []},
        {"runs": {"builtin": {"seed": 0}}},
        {"runs": {"builtin": None}},
        {"weights": "many"},
        {"configuration": None},
        {"weight_bytes": None},
    ],
)
def test_a_result_that_was_altered_is_one_line(change, tiny_llama, tmp_path):
    asked = plan("rtn", texts=[BUILTIN])
    compare(open_source(str(tiny_llama)), asked, work=tmp_path / "work")
    (file,) = (tmp_path / "work").glob("run-rtn-*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"{file.name} is no result of a comparison"):
        compare(open_source(str(tiny_llama)), asked, work=tmp_path / "work", resume=True)


def test_storage_equals_the_tensors_in_the_files(tiny_llama, tmp_path):
    quantize_model(str(tiny_llama), tmp_path / "out", SMALL)
    kinds = ("weight_packed", "weight_scale", "rotation")
    size = 0
    for shard in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name.endswith(kinds):
                size += tensor.view(torch.uint8).numel()
    assert linear_storage(tmp_path / "out")[0] == size


def test_the_model_is_hashed_once(tiny_llama, tmp_path, monkeypatch):
    """However many methods and seeds."""
    hashed, original = [], source_module._fingerprint
    monkeypatch.setattr(source_module, "_fingerprint", lambda s: hashed.append(s) or original(s))
    source = open_source(str(tiny_llama))
    compare(source, plan("rtn", "random", seeds=[0, 1]), work=tmp_path / "work")
    assert hashed == [source]


# A comparison in a folder goes on where it was.

METHODS = ("rtn", "random", "duquant++")


def results(found) -> list:
    """Everything in the rows of a comparison but its times."""
    timed = {"quantize_seconds": 0.0, "evaluate_seconds": 0.0}
    return [
        replace(
            row,
            texts=tuple(
                replace(own, runs=tuple(replace(run, **timed) for run in own.runs))
                for own in row.texts
            ),
        )
        for row in found.rows
    ]


@pytest.fixture
def reports(monkeypatch) -> list:
    """What is quantized from now on: (method, seed, blocks that were there)."""
    found = []

    def quantize(source, out, config, **options):
        report = quantize_model(source, out, config, **options)
        found.append((config.method, config.seed, report.resumed_blocks))
        return report

    monkeypatch.setattr("duqpp.evaluation.compare.quantize_model", quantize)
    return found


def resumed(model, methods: Sequence[str], work: Path, *, resume=True, progress=None, **options):
    asked = plan(*methods, **{"seeds": [0, 1]} | options)
    return compare(open_source(str(model)), asked, work=work, resume=resume, progress=progress)


def test_killed_in_a_quantization_it_goes_on_at_the_last_block(tiny_llama, tmp_path, reports):
    work = tmp_path / "work"
    expected = resumed(tiny_llama, METHODS, tmp_path / "other", resume=False)
    reports.clear()
    is_there = tmp_path / "there"

    def stay(stage: str, done: int, total: int) -> None:
        """In the second block of duquant++ with seed 1, however slow the machine is.

        The first one is written by another thread, its record last.
        """
        while (stage, done) == ("duquant++, seed 1: quantize", 1):
            if len(list(work.glob("model-*.partial/model-*.json"))) == 2:
                is_there.touch()
            time.sleep(0.01)

    job = Forked(lambda: resumed(tiny_llama, METHODS, work, resume=False, progress=stay))
    deadline = time.monotonic() + 120
    while not is_there.exists():
        assert not job.has_ended(), "the comparison ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.kill()
    assert len(list(work.glob("run-*.json"))) == 4
    (partial,) = work.glob("model-*.partial")
    assert len(list(partial.glob("*.safetensors"))) == 2
    found = resumed(tiny_llama, METHODS, work)
    assert reports == [("duquant++", 1, 1)]
    assert results(found) == results(expected)
    assert not list(work.glob("model-*")) and not list(work.glob("quantized-*"))
    assert found.rows[1].seconds > 0
    assert results(resumed(tiny_llama, METHODS, work)) == results(expected)
    assert len(reports) == 1


def test_stopped_in_an_evaluation_it_does_not_quantize_again(tiny_llama, tmp_path, reports):
    def stop(stage: str, done: int, total: int) -> None:
        if stage.endswith("random, seed 1: evaluate"):
            raise KeyboardInterrupt

    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        resumed(tiny_llama, ["rtn", "random"], work, progress=stop)
    assert len(list(work.glob("model-*/config.json"))) == 1
    del reports[:]
    found = resumed(tiny_llama, ["rtn", "random"], work)
    assert reports == []
    assert [run.seed for run in found.rows[2].headline.runs] == [0, 1]
    assert found.rows[2].headline.runs[1].quantize_seconds > 0
    assert not list(work.glob("model-*"))


def test_a_model_that_was_removed_before_its_evaluation_is_made_again(
    tiny_llama, tmp_path, reports
):
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "random: evaluate":
            raise KeyboardInterrupt

    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        resumed(tiny_llama, ["random"], work, seeds=[0], progress=stop)
    (model,) = work.glob("model-*")
    shutil.rmtree(model)
    assert len(resumed(tiny_llama, ["random"], work, seeds=[0]).rows) == 2
    assert reports == [("random", 0, 0)] * 2


def test_two_comparisons_do_not_work_in_one_folder(tiny_llama, tmp_path):
    """The second one is refused while the first one runs, and not after it, however it ended."""
    work, refused = tmp_path / "work", []

    def again(stage: str, done: int, total: int) -> None:
        for resume in (False, True):
            with pytest.raises(InputError) as raised:
                resumed(tiny_llama, ["rtn"], work, resume=resume)
            refused.append(str(raised.value))
        raise KeyboardInterrupt

    def begin(stage: str, done: int, total: int) -> None:
        if stage != "fingerprint":
            again(stage, done, total)

    with pytest.raises(KeyboardInterrupt) as interrupted:
        resumed(tiny_llama, ["rtn"], work, progress=begin)
    assert refused == [f"another process is working in {work}: let it finish"] * 2
    assert len(resumed(tiny_llama, ["rtn"], work).rows) == 2
    assert interrupted.value.__traceback__ is not None  # which keeps the frames of the first one


def test_methods_and_seeds_can_be_added(tiny_llama, tmp_path, reports):
    work = tmp_path / "work"
    resumed(tiny_llama, ["random"], work, resume=False)
    assert reports == [("random", 0, 0), ("random", 1, 0)]
    found = resumed(tiny_llama, METHODS, work, seeds=[1, 2])
    assert reports[2:] == [
        ("rtn", 1, 0),
        ("random", 2, 0),
        ("duquant++", 1, 0),
        ("duquant++", 2, 0),
    ]
    alone = resumed(tiny_llama, METHODS, tmp_path / "alone", seeds=[1, 2])
    assert results(found) == results(alone)


def test_a_run_is_found_that_was_written_with_another_default(tiny_llama, tmp_path, reports):
    """smooth_alpha was null where it is now the method's own: the file's name was another, too."""
    work, text = tmp_path / "work", tmp_path / "a.txt"
    text.write_text(builtin_text()[:20000], encoding="utf-8")
    before = resumed(tiny_llama, ["duquant++"], work, seeds=[0])
    (file,) = work.glob("run-*.json")
    values = json.loads(file.read_text())
    values["configuration"]["smooth_alpha"] = None
    calibration = hashlib.sha256(read_text(BUILTIN).encode()).hexdigest()
    name = json.dumps([values["configuration"], calibration], sort_keys=True)
    file.unlink()
    old = work / f"run-duquant++-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    old.write_text(json.dumps(values))
    assert resumed(tiny_llama, ["duquant++"], work, seeds=[0]).rows[1:] == before.rows[1:]
    assert len(reports) == 1
    resumed(tiny_llama, ["duquant++"], work, seeds=[0], calibration=str(text))
    assert len(reports) == 2, "of another text"


def test_another_calibration_text_is_another_run(tiny_llama, tmp_path, reports):
    text, work = tmp_path / "a.txt", tmp_path / "work"
    text.write_text(builtin_text()[:20000], encoding="utf-8")
    before = resumed(tiny_llama, ["rtn", "duquant++"], work, seeds=[0])
    found = resumed(tiny_llama, ["rtn", "duquant++"], work, seeds=[0], calibration=str(text))
    assert reports == [("rtn", 0, 0), ("duquant++", 0, 0), ("duquant++", 0, 0)]
    assert results(found)[:2] == results(before)[:2]
    assert results(found)[2] != results(before)[2]


def test_a_folder_of_something_else_is_refused(tiny_llama, make_tiny, tmp_path):
    work, text = tmp_path / "work", tmp_path / "a.txt"
    text.write_text(builtin_text()[:20000], encoding="utf-8")
    resumed(tiny_llama, ["rtn"], work)
    before = sorted(work.iterdir())
    for model, options, message in [
        (tiny_llama, {"resume": False}, "holds a comparison: continue it with `resume=True`"),
        (tiny_llama, {"windows": 1}, "is the comparison of another windows; choose"),
        (tiny_llama, {"seq_len": 32}, "is the comparison of another windows; choose"),
        (tiny_llama, {"texts": [str(text)]}, "is the comparison of another texts; choose"),
        (make_tiny("llama", rms_norm_eps=1e-4), {}, "is the comparison of another model; choose"),
    ]:
        with pytest.raises(InputError, match=message):
            resumed(model, ["rtn"], work, **options)
    assert sorted(work.iterdir()) == before
    with pytest.raises(InputError, match="is not empty, and holds no comparison"):
        resumed(tiny_llama, ["rtn"], tmp_path)
    with pytest.raises(InputError, match=r"a\.txt is not a folder"):
        resumed(tiny_llama, ["rtn"], text)
    with pytest.raises(InputError, match="`resume` needs the folder"):
        resumed(tiny_llama, ["rtn"], None)


def test_an_error_before_the_first_run_leaves_a_folder_to_use(tiny_llama, tmp_path):
    for seq_len in (10**7, 64):
        options = {"seq_len": seq_len, "resume": False}
        if seq_len > 64:
            with pytest.raises(InputError, match="exceed the model"):
                resumed(tiny_llama, ["rtn"], tmp_path / "work", **options)
        else:
            assert len(resumed(tiny_llama, ["rtn"], tmp_path / "work", **options).rows) == 2
