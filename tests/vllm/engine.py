"""Run models in vLLM on the CPU, in a process of its own: `run` here, `main` there."""

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LENGTH, KV_CACHE = 256, 64 * 2**20  # tokens of a sequence; bytes for all of them
TOP = 20  # log-probabilities for a position: as many as vLLM gives by default


@dataclass(frozen=True)
class Job:
    """What to run: prompts of `model` continued greedily by `count` tokens, in float32.

    compiled: let vLLM compile the model, as it does by default.
    """

    model: str
    prompts: list[list[int]]
    count: int
    compiled: bool


@dataclass(frozen=True)
class Generated:
    """Greedy tokens of one prompt, and the log-probabilities that vLLM gives with them.

    logprobs: for each position of prompt and continuation, from the second on, token to value.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]


@dataclass(frozen=True)
class Answer:
    """What came out of a job: one Generated per prompt, and how vLLM says it was compiled."""

    generated: list[Generated]
    mode: str


class EngineError(Exception):
    """The engine did not start or run; the message is its log."""


def environment(ranks: int, cache: Path) -> dict[str, str]:
    """Environment variables of vLLM on a CPU: each rank on a core, in turn of those there are.

    Args: cache: folder for what vLLM keeps, such as compiled graphs; not the user's.
    """
    cores = sorted(os.sched_getaffinity(0))
    own = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[r % len(cores)]) for r in range(ranks)),
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    return {**os.environ, **own}


def run(
    jobs: list[Job], folder: Path, *, ranks: int = 1, stock: bool = False, timeout: int = 1800
) -> list[Answer]:
    """Run jobs one after the other.

    Args:
        folder: new or empty, for what the processes tell each other; `log` in it is vLLM's. Folders
            side by side share vLLM's cache.
        ranks: of tensor parallelism.
        stock: without duqpp's plugin, and with what stock vLLM lacks (see `tests/vllm/stock.py`).
        timeout: seconds; a start takes half a minute on two idle cores.
    Raises: EngineError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered, log = folder / "asked.json", folder / "answered.json", folder / "log"
    asked.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    # One process fewer to start: the engine's core runs in that of `main`.
    env = environment(ranks, folder.parent / "cache") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if stock:
        env["VLLM_PLUGINS"] = "none"  # the name of no plugin
    arguments = [str(ranks), str(asked), str(answered), *(["stock"] if stock else [])]
    command = [sys.executable, "-m", "tests.vllm.engine", *arguments]
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            print(f"no answer within {timeout} seconds", file=output)
        finally:
            end(process)
    if process.returncode:
        raise EngineError(log.read_text(encoding="utf-8"))
    return read_answers(answered)


def end(process: subprocess.Popen) -> None:
    """End a process that leads its session, and those that it started: the ranks."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_answers(file: Path) -> list[Answer]:
    """What `main` has written, a line for each job."""
    answers = []
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        generated = [
            Generated(
                item["tokens"],
                [{int(token): value for token, value in p.items()} for p in item["logprobs"]],
            )
            for item in values["generated"]
        ]
        answers.append(Answer(generated, values["mode"]))
    return answers


def main(ranks: str, asked: str, answered: str, stock: str = "") -> None:
    """Run the jobs in the file `asked`, and write their answers as they come."""
    if stock:
        from tests.vllm.stock import fill_gaps

        fill_gaps()
    with open(answered, "w", encoding="utf-8") as file:
        for values in json.loads(Path(asked).read_text(encoding="utf-8")):
            print(json.dumps(answer(Job(**values), int(ranks))), file=file, flush=True)


def answer(job: Job, ranks: int) -> dict:
    """One job, as an `Answer` in JSON."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=job.model,
        dtype="float32",
        max_model_len=LENGTH,
        kv_cache_memory_bytes=KV_CACHE,
        tensor_parallel_size=ranks,
        enforce_eager=not job.compiled,
    )
    sampling = SamplingParams(
        max_tokens=job.count,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprobs=TOP,
        prompt_logprobs=TOP,
    )
    generated = []
    for output in llm.generate([{"prompt_token_ids": p} for p in job.prompts], sampling):
        positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        logprobs = [{token: p.logprob for token, p in position.items()} for position in positions]
        generated.append({"tokens": list(output.outputs[0].token_ids), "logprobs": logprobs})
    compilation = llm.llm_engine.vllm_config.compilation_config
    mode = f"{compilation.mode.name}, {compilation.backend}" if compilation.mode else "eager"
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    torch._dynamo.reset()
    return {"generated": generated, "mode": mode}


if __name__ == "__main__":
    main(*sys.argv[1:])
