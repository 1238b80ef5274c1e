"""Every fenced block of README.md, docs/ and the other pages is executed, or says why it is not.

`sh` and `python` blocks run in a folder of their own with a tiny quantized model in `out/`; the
names of real models stand for the tiny float one, those of lm-eval's tasks for a local file, and
options are appended that keep jobs small. A block under `<!-- not run: REASON -->` is taken apart
instead: subcommands, options, targets, files and build arguments in it must exist. `json` is
parsed, `text` is neither.
"""

import json
import re
import shlex
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
from typer.main import get_command

from duqpp.calibration.tokens import builtin_text
from duqpp.cli.main import app, main
from duqpp.methods import METHODS
from duqpp.models.family import FAMILIES
from duqpp.tools import gemm_checks, selfcheck
from tests.evaluation.test_tasks import lm_eval, write_task  # noqa: F401 (lm_eval is a fixture)

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {"sh", "python", "json", "text"}
WIDTH = 100  # of prose; tables, code and lines that are one link are as wide as they are
ONE_LINK = re.compile(r"\s*([-*] )?!?\[[^\]]*\]\([^)]*\)[.,;:]?")

MODELS = (
    "MODEL",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.1-70B-Instruct",
)
TASKS = "arc_easy,piqa"  # stands for a task of these; without lm-eval the line is skipped
QUESTIONS = [{"question": f"Is {n} even?", "choices": ["yes", "no"], "gold": n % 2} for n in (2, 5)]
TEXTS = ("wiki.txt", "held_out.txt", "first60.txt", "last30.txt")
CALIBRATION = "--samples 2 --seq-len 64 --max-steps 8"
SMALL = {  # appended: of an option that is given twice, the last counts
    "quantize": CALIBRATION,
    "inspect": CALIBRATION,
    "compare": "--samples 2 --calib-seq-len 64 --max-steps 8 --windows 1 --seq-len 256 --seeds 0",
    "eval": "--windows 1 --seq-len 256",
    "generate": "--max-new-tokens 4",
}
COMMANDS = get_command(app).commands


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The command lines of a `sh` block, as words."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start("code")), m["language"], m["code"], m["reason"])
        for m in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(blocks: list[Block]):
    return pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in blocks])


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "out"
    assert main(["quantize", str(tiny_llama), str(out), *CALIBRATION.split()]) == 0
    return out


@pytest.fixture
def sandbox(quantized, tiny_llama, tmp_path, monkeypatch) -> Path:
    """Where a block runs: `out/` and the texts that the pages speak of."""
    shutil.copytree(quantized, tmp_path / "out")
    (tmp_path / "float-model").symlink_to(tiny_llama)
    for name in TEXTS:
        (tmp_path / name).write_text(builtin_text()[:40_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read long ago
    for module in (selfcheck, gemm_checks):
        monkeypatch.setattr(module, "ROWS", (1, 17))
        monkeypatch.setattr(module, "K", (32, 160))
    return tmp_path


def without_assignments(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """NAME=value in front of a command, and the command."""
    count = next((i for i, w in enumerate(words) if not re.match(r"\w+=", w)), len(words))
    return dict(w.split("=", 1) for w in words[:count]), words[count:]


@named([b for b in BLOCKS if b.language == "sh" and b.reason is None])
def test_commands_run(block, sandbox, tiny_llama, monkeypatch, capsys, request):
    for line in block.commands:
        variables, words = without_assignments(line)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert words[0] == "duqpp", f"{words[0]}: only duqpp is run here; say why it is not run"
        parse_duqpp(words)
        words = [str(tiny_llama) if word in MODELS else word for word in words[1:]]
        if TASKS in words:
            request.getfixturevalue("lm_eval")  # or the rest of the block is skipped
            words[words.index(TASKS)] = str(write_task(sandbox, "toy", QUESTIONS))
        if words[0] == "quantize":
            shutil.rmtree(words[2], ignore_errors=True)
        small = "" if "--tasks" in words else SMALL.get(words[0], "")
        code = main([*words, *small.split()])
        out, err = capsys.readouterr()
        assert code == 0, f"{shlex.join(words)}\n{err}"
        assert out, f"{shlex.join(words)} printed nothing"
        for name in variables:
            monkeypatch.delenv(name)


@named([b for b in BLOCKS if b.language == "python" and b.reason is None])
def test_python_runs(block, sandbox, capsys):
    exec(compile(block.code, block.name, "exec"), {"__name__": "docs"})


@named([b for b in BLOCKS if b.reason is not None])
def test_what_is_not_run_could_be(block):
    assert len(block.reason) > 10, "a reason"
    if block.language == "python":
        compile(block.code, block.name, "exec")
    else:
        assert block.language == "sh", "only what could run needs a reason"
        for line in block.commands:
            _, words = without_assignments(line)
            check = CHECKS.get(words[0])
            assert check, f"{words[0]} is unknown to {Path(__file__).name}"
            check(words)


@named([b for b in BLOCKS if b.language == "json"])
def test_json_is_valid(block):
    json.loads(block.code)


def parse_duqpp(words: list[str]) -> None:
    """Parse a command line as the command would, and stop there."""
    assert words[1] in COMMANDS, f"duqpp has no command {words[1]}"
    COMMANDS[words[1]].make_context(words[1], words[2:])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words[1:]:
        variable = word.partition("=")[0] if "=" in word else None
        pattern = rf"^{variable} \?=" if variable else rf"^{word}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"make {word}"


def check_pip(words: list[str]) -> None:
    assert words[1] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in (w for w in words[2:] if not w.startswith("-")):
        if match := re.fullmatch(r"\.\[(\w+)\]", word):
            assert match[1] in extras["optional-dependencies"], word
        else:
            assert re.fullmatch(r"\.|[\w.-]+(==[\w.+]+)?|dist/duqpp-\*\.whl", word), word


def check_python(words: list[str]) -> None:
    if words[1] == "-m":
        assert find_spec(words[2]), words[2]
        return
    script = ROOT / words[1]
    text = script.read_text(encoding="utf-8")
    text += (script.parent / "harness.py").read_text(encoding="utf-8")
    for option in (w for w in words[2:] if w.startswith("--")):
        assert f'"{option}"' in text, f"{words[1]} {option}"


def check_docker(words: list[str]) -> None:
    if words[1] != "build":
        assert words[1] == "run"
        return
    file = ROOT / words[words.index("-f") + 1]
    text = file.read_text(encoding="utf-8")
    for index, word in enumerate(words):
        if word == "--build-arg":
            name = words[index + 1].partition("=")[0]
            assert re.search(rf"^ARG {name}\b", text, re.MULTILINE), f"{file.name}: {name}"


def check_build_wheel(words: list[str]) -> None:
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    for word in words[1:]:
        if word in ("setup", "build", "deps", "install", "test"):
            assert f"step_{word}()" in text
        elif word.startswith("--"):
            assert f"| {word} |" in text or f" {word})" in text, word


CHECKS = {
    "duqpp": parse_duqpp,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": lambda words: parse_duqpp(words[words.index("duqpp") :]),
    "docker": check_docker,
    "docker/build_wheel.sh": check_build_wheel,
    "tests/vllm/run.sh": lambda words: None,
    "vllm": lambda words: None,
    "curl": lambda words: None,
}


def test_the_pages_are_read():
    """The tests above would pass on nothing."""
    assert {"README.md", "SECURITY.md", "CHANGELOG.md", "speed.md"} <= {p.name for p in PAGES}
    run = [b for b in BLOCKS if b.reason is None]
    assert sum(b.language == "sh" for b in run) >= 5
    assert sum(b.language == "python" for b in run) >= 4
    for page in PAGES:
        fences = re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), f"{page.name}: a block that is not read"
    assert {b.language for b in BLOCKS} <= LANGUAGES


def too_wide(text: str) -> list[str]:
    """The lines of prose that are not wrapped."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [
        line
        for line in prose.splitlines()
        if len(line) > WIDTH and not line.startswith("|") and not ONE_LINK.fullmatch(line)
    ]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_prose_is_wrapped(page):
    assert too_wide(page.read_text(encoding="utf-8")) == []


def test_which_lines_are_prose():
    word = "x" * WIDTH
    free = f"| {word} |\n```text\n{word} code\n```\n![{word}](a.svg)\n- [{word}](b.md).\n{word}\n"
    assert too_wide(free) == []
    for line in (f"{word}.", f"- {word}", f"See [{word}](b.md)", f"# {word}", f"<!-- {word} -->"):
        assert too_wide(f"{free}{line}\n") == [line]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


SOURCES = r"`((?:duqpp|csrc|tests|benchmarks|docs|docker|requirements)/[\w./-]*)`"


def test_files_that_pages_name_are_there():
    """DEVICE in a name stands for one."""
    named = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(SOURCES, page.read_text(encoding="utf-8"))
        if "DEVICE" not in name
    }
    assert ("CONTRIBUTING.md", "duqpp/methods/") in named
    assert [(page, name) for page, name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_table_of_methods_has_them_all():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| `--method` | what R is |")[2].partition("\n\n")[0]
    first = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall("`([^`]+)`", first)) == set(METHODS)


def test_nobody_is_told_to_install_duqpp_from_pypi():
    """It is not there; the card that is written with a model must not promise it either."""
    for file in [*PAGES, *(ROOT / "duqpp").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"pip install ['\"]?duqpp", text), file.relative_to(ROOT)


@pytest.mark.parametrize("page", ["README.md", "docs/vllm.md"])
def test_the_families_that_a_page_lists_are_the_registrys(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    lists = re.findall(r"Llama(?:,\s+[A-Z]\w+)+(?:\s+and\s+[A-Z]\w+)?", text)
    assert lists, "no list like: Llama, Mistral and Qwen2"
    for listed in lists:
        names = re.split(r",\s+|\s+and\s+", listed)
        assert sorted(name.lower() for name in names) == sorted(FAMILIES), listed


def test_a_wrong_option_would_be_seen():
    for words in (["duqpp", "quantise"], ["duqpp", "quantize", "A", "B", "--metod", "rtn"]):
        with pytest.raises(Exception, match=r"quantise|metod"):
            parse_duqpp(words)
    with pytest.raises(Exception, match="rtm"):
        parse_duqpp(["duqpp", "quantize", "A", "B", "--method", "rtm"])
    for check, words in (
        (check_make, ["make", "demos"]),
        (check_pip, ["pip", "install", ".[plots]"]),
        (check_python, ["python", "benchmarks/bench_mxfp4_gemm.py", "--fp33"]),
        (check_docker, shlex.split("docker build -f docker/Dockerfile --build-arg CUDA=1 .")),
        (check_build_wheel, ["docker/build_wheel.sh", "--outt", "dist"]),
    ):
        with pytest.raises(AssertionError):
            check(words)


def test_the_format_page_shows_what_is_written(quantized):
    page = next(b for b in BLOCKS if b.page.name == "checkpoint-format.md" and b.language == "json")
    shown = json.loads(page.code)
    written = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert list(shown) == list(written)
    assert list(shown["provenance"]) == list(written["provenance"])
    assert {k: written[k] for k in shown if k != "provenance"} == {
        k: shown[k] for k in shown if k != "provenance"
    }
