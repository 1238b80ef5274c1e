"""Command lines made at random: every one ends with an exit code, and an error is one line.

Models, texts and names are what users have, damaged in a place or two. DUQPP_FUZZ_RUNS and
DUQPP_FUZZ_SEED ask for more command lines than those of one seed, and for others.
"""

import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from typer.main import get_command

import duqpp
from duqpp.cli.main import app, main
from duqpp.config import DESCRIPTIONS
from duqpp.tools.gemm_checks import Check
from duqpp.tools.selfcheck import Report

RUNS = int(os.environ.get("DUQPP_FUZZ_RUNS", "2000"))
SEED = int(os.environ.get("DUQPP_FUZZ_SEED", "0"))
MOST_SECONDS = 30.0  # for one run, on a busy machine
MOST_BYTES = 6 * 2**30  # of memory besides what is there: a damaged size may ask for any amount
COMMANDS = vars(get_command(app))["commands"]
NOTICES = ("--calib is not used: the method reads no activations",)
# So that what succeeds is quick; what comes later on the command line counts.
CALIBRATION = ("--calib", "short.txt", "--samples", "1", "--max-steps", "1")
QUICK = {
    "quantize": [*CALIBRATION, "--seq-len", "16"],
    "inspect": [*CALIBRATION, "--seq-len", "16", "--layers", "1"],
    "compare": [
        *(*CALIBRATION, "--calib-seq-len", "16", "--method", "rtn"),
        *("--text", "short.txt", "--seq-len", "16", "--windows", "1"),
    ],
    "eval": ["--text", "short.txt", "--seq-len", "16", "--windows", "1"],
    "generate": ["--max-new-tokens", "1"],
    "export": ["--format", "compressed-tensors"],
}
NAMES = (
    *("", " ", ".", "..", "-", "--", "-x", "~", "~nobody-of-that-name/model", "~/none", "/", "//"),
    *("a b", "ü", "北京", "🦙", "e\u0301", "[bold]", "[/x]", "[red]x[/red]", ":smile:", "x" * 300),
    *("\udcff", "a\udc80b", "a\nb", "a\tb", "\x1b[31m", "a" + "/b" * 3000, "owner/name", "a/b/c"),
    *("hf:", "hf::", "hf:a:b:c:d", "none.gguf", "none.txt", "*", "%s", "{x}", "`model`", "\\", "'"),
    *("nul\0", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/nowhere/x", "loop"),
    *("--help", "builtin", "a.png", "[x].png", "nowhere/a.png", "a.yaml", "\u202e", "CON"),
)
NUMBERS = (
    *("0", "-0", "-1", "1", "2", "3", "17", "511", "0.5", "1.5", "nan", "inf", "-inf", "1e400"),
    *("1e-320", "1e308", "9" * 30, "-" + "9" * 30, str(2**31), str(2**63), str(2**64), "9" * 5000),
)
VALUES = (
    *("", " ", "1_000", "0x10", "\uff11", "²", "0,1,2", "0," + "9" * 30, "100", "90,148,1"),
    *("1,1", "0,1", "1,2,3", "0,0,0", "99999999999999999999,1,1", "true", "None", "[b]", "auto"),
    *("cpu", "cuda", "cuda:9", "cuda:" + "9" * 30, "reference", "tuple", "\udcff", "a'b", '"'),
    *("rtn", "hadamard", "rtn --gptq", "duqpp --refine blocks", "rtn --seed 1", "--", "o_proj"),
)
JSON_VALUES = (
    *(None, True, -1, 0, 1, 3, 1e308, float("nan"), 10**30, 2**63, "", "1", "x" * 1000, "\ud800"),
    *([], {}, [[]], ["a"], {"a": 1}, [1, -5, 10**9], "cpu", "float16", "llama", 0.5, 48, 7, -5),
)
TEMPLATES = (
    *(
        "",
        "{{",
        "{% for m in messages %}",
        "{{ raise_exception('no [b] \\n') }}",
        "x" * 9999,
    ),
    *("{{ messages[9].role }}", "{{ 1 / 0 }}", "{{ messages | nofilter }}", "{% include 'a' %}"),
    "{% for m in messages %}{{ m.content }}{% endfor %}",
)
TEXTS = (
    *(b"", b" \n", b"\xef\xbb\xbf", b"\xff\xfeh\0i\0", b"\xfe\xff", b"\xff\xfe\0", b"\xff\xfe\0\0"),
    *(b"\0" * 9, b"PK\3\4", b"\x1f\x8b", b"words " * 200, "naïve ".encode("latin-1") * 99),
    *(b"\r\nwords\r" * 99, b"[]", b"{}", b'{"text": null}', b'{"text": 5}', b"[" * 100_000),
    *(b'{"text": "words"}\n\n{"text": null}', b'[{"text": "words"}]', b'{"a": 1}', b"[1", b"null"),
    *(b'{"text": "\\ud800 words"}', b"<s></s>" * 99, "北京🦙".encode() * 99, b'{"text": "a"}\n{'),
)
ENCODINGS = ("utf-8", "ascii", "latin-1", "cp1252", "utf-16")


SELFCHECK = Report((Check("cpu", "[b]", 1, ("x [/M, K]",)),), (), None, ("[/gpu]",), {})


class TooLong(BaseException):
    """Of a run, which nothing but this test answers."""


def damaged_json(random_: random.Random, content: bytes) -> bytes:
    """One value of a JSON object, at any depth, replaced, removed or added."""
    values = json.loads(content)
    place = values
    while True:
        key = random_.choice([*place, "added"] if isinstance(place, dict) else range(len(place)))
        inner = place.get(key) if isinstance(place, dict) else place[key]
        if isinstance(inner, dict | list) and inner and random_.random() < 0.8:
            place = inner
            continue
        if isinstance(place, dict) and random_.random() < 0.2:
            place.pop(key, None)
        else:
            place[key] = random_.choice(JSON_VALUES)
        return json.dumps(values).encode()


def damaged_bytes(random_: random.Random, content: bytes) -> bytes:
    """A file cut off, altered, or replaced."""
    place = random_.randrange(len(content) + 1)
    return random_.choice(
        [
            content[:place],
            content[:place] + random_.randbytes(3) + content[place + 3 :],
            content[:place] + content[place + 9 :],
            random_.randbytes(place % 100),
            b"\xef\xbb\xbf" + content,
            content.decode("latin-1").encode("utf-16"),
            *(b"", b"[]", b"null", b"{}", b"5", b'"a"', b"[" * 100_000, b"\0" * 64),
        ]
    )


def replace_file(random_: random.Random, file: Path) -> None:
    """What is no file, in the place of one."""
    file.unlink()
    kind = random_.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file.name)
    elif kind == 3:
        file.symlink_to("/dev/zero")
    elif kind == 4:
        with open(file, "wb") as sparse:
            sparse.truncate(2**40)


class Maker:
    """Makes command lines, and what their names stand for, below the working directory.

    Args: models: whole folders, whose damaged copies are made.
    """

    def __init__(self, random_: random.Random, models: list[Path]) -> None:
        self._random, self._models, self._count = random_, models, 0

    def arguments(self) -> list[str]:
        """A command, its options, and most of the time its arguments."""
        name = self._random.choice([*QUICK, *QUICK, *QUICK, *COMMANDS, "generate"])
        positional = [
            self._argument(parameter.name, name)
            for parameter in COMMANDS[name].params
            if parameter.param_type_name == "argument" and self._random.random() < 0.98
        ]
        chat = ["--chat"] if name == "generate" and self._random.random() < 0.5 else []
        return [name, *QUICK.get(name, []), *chat, *self._options(name), *positional]

    def _options(self, name: str) -> list[str]:
        words: list[str] = []
        options = [p for p in COMMANDS[name].params if p.param_type_name == "option"]
        for option in self._random.sample(options, self._random.choice([0, 1, 1, 2])):
            flag = self._random.choice([*option.opts, *option.secondary_opts])
            if flag == "--help":
                continue
            words += [flag] if option.is_flag else [flag, self._value(option)]
        return words

    def _argument(self, name: str, command: str) -> str:
        if name == "model":
            return self._model(command)
        return self._out() if name == "out" else self._text_argument()

    def _value(self, option) -> str:
        if option.name in ("calib", "text"):
            return self._text()
        if option.name == "reference":
            return self._model("eval")
        if option.name in ("work", "plot", "report", "tasks_dir", "tasks"):
            return self._out()
        described = DESCRIPTIONS.get(option.name)
        if described and described.choices and self._random.random() < 0.8:
            return self._random.choice(list(described.choices))
        return self._random.choice(VALUES if self._random.random() < 0.3 else NUMBERS)

    def _text_argument(self) -> str:
        return self._random.choice([*NAMES, *VALUES, "The capital of France is"])

    def _new(self) -> str:
        self._count += 1
        return f"{self._count}"

    def _out(self) -> str:
        if self._random.random() < 0.6:
            return self._random.choice(NAMES)
        return self._new() + self._random.choice(["", ".png", "[b]", "ü", " ", "\udcff", "/a/b"])

    def _text(self) -> str:
        if self._random.random() < 0.4:
            return self._random.choice(NAMES)
        file = Path(
            self._new() + self._random.choice(["", ".txt", ".jsonl", ".json", ".gz", "[b]"])
        )
        content = self._random.choice(TEXTS)
        file.write_bytes(content)
        if self._random.random() < 0.1:
            replace_file(self._random, file)
        return str(file)

    def _model(self, command: str) -> str:
        if self._random.random() < 0.15:
            return self._random.choice(NAMES)
        whole = self._models[:2] if command in ("quantize", "compare") else self._models
        if command == "export":
            whole = self._models[2:]
        name = self._random.choice(["", "", "", " x", "[/b]", "ü", "[b]"])
        folder = Path(self._new() + name)
        shutil.copytree(self._random.choice(whole), folder, copy_function=os.link)
        for _ in range(self._random.choice([0, 1, 1, 1, 2])):
            self._damage(folder)
        return str(folder)

    def _damage(self, folder: Path) -> None:
        file = self._random.choice(sorted(folder.iterdir()))
        if not file.is_file() or file.is_symlink() or file.stat().st_size > 2**30:
            return
        if self._random.random() < 0.1:
            replace_file(self._random, file)
            return
        content = file.read_bytes()
        file.unlink()  # it is a link to the whole model's
        if file.name == "chat_template.jinja" and self._random.random() < 0.7:
            file.write_text(self._random.choice(TEMPLATES))
        elif file.suffix == ".json" and self._random.random() < 0.6:
            try:
                file.write_bytes(damaged_json(self._random, content))
            except (ValueError, RecursionError, TypeError, LookupError):  # damaged before
                file.write_bytes(content)
        elif file.suffix == ".safetensors":
            head = content[:3000]
            file.write_bytes(damaged_bytes(self._random, head) + content[3000:])
        else:
            file.write_bytes(damaged_bytes(self._random, content))


@contextmanager
def bounded() -> Iterator[None]:
    """Time and memory of what is run inside."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(arguments: list[str], encoding: str) -> tuple[int | None, str, str]:
    """Exit code, or None after an exception; stderr; and what is wrong, if anything."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    code, wrong = None, ""
    try:
        with redirect_stdout(out), redirect_stderr(err), bounded():
            code = main(arguments)
    except (Exception, SystemExit, TooLong) as error:
        wrong = "".join(traceback.format_exception(error))
    for stream in (out, err):
        stream.flush()
    return code, err.buffer.getvalue().decode(encoding, "replace"), wrong


def fault(arguments: list[str], encoding: str) -> str:
    """What is wrong with a command line's run; empty where nothing is."""
    code, errors, wrong = run(arguments, encoding)
    if wrong:
        return wrong
    # Behind tests that import compressed-tensors, which shows bars of its own, an export is loaded.
    lines = [e for e in errors.splitlines() if e.strip() and e not in NOTICES and "it/s]" not in e]
    allowed = (0, 1, 2) if arguments[0] in ("doctor", "selfcheck") else (0, 2)
    if code not in allowed:
        return f"exit code {code}: {errors}"
    if code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        return f"exit code 2, and on stderr: {errors}"
    return "a traceback" if "Traceback" in errors else ""


@pytest.fixture(scope="module")
def models(make_tiny, tmp_path_factory) -> list[Path]:
    """A float model, one in shards, and a quantized one, each with a chat template."""
    base = tmp_path_factory.mktemp("fuzz")
    float_models = [make_tiny("llama"), make_tiny("qwen3", shard_size="60KB")]
    folders = [base / "float", base / "shards", base / "quantized"]
    for source, folder in zip(float_models, folders, strict=False):
        shutil.copytree(source, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATES[-1])
    duqpp.quantize_model(str(folders[0]), folders[2], duqpp.QuantizeConfig(method="rtn"))
    return folders


@pytest.mark.timeout(900)  # 70 to 230 s on two cores with AVX2, by what ran before
def test_command_lines_end_in_a_result_or_in_one_line(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("duqpp.cli.progress.PATIENCE", 1000.0)
    monkeypatch.setattr("duqpp.calibration.tokens.PATIENCE", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("duqpp.tools.selfcheck.selfcheck", lambda **_: SELFCHECK)
    Path("loop").symlink_to("loop")
    Path("short.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    random_ = random.Random(SEED)
    maker, faults = Maker(random_, models), []
    for _ in range(RUNS):
        arguments, encoding = maker.arguments(), random_.choice(ENCODINGS)
        monkeypatch.setenv("COLUMNS", random_.choice(["1", "80", "200", "x"]))
        if found := fault(arguments, encoding):
            faults.append(f"{shlex.join(arguments)!a} ({encoding}): {found}")
    assert not faults, f"{len(faults)} of {RUNS}:\n" + "\n".join(faults)
