"""The command `duqpp generate`."""

import sys
from typing import Annotated

import typer

from duqpp.cli.options import (
    DeviceMapOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    placed,
)
from duqpp.cli.progress import Bars
from duqpp.cli.tables import print_json
from duqpp.placement.devices import AUTO


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above, sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    device: DeviceOption = AUTO,
    device_map: DeviceMapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue PROMPT with a float or quantized MODEL."""
    from duqpp.integrations.transformers import load_model
    from duqpp.tools.generate import generate as run

    where = placed(device, device_map)
    with Bars() as bars:
        bars.open(model)
        loaded, tokenizer = load_model(model, **where, progress=bars)
    result = run(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        stream=not as_json,
    )
    if as_json:
        print_json(
            {
                "model": model,
                "device": str(loaded.device),
                "prompt": prompt,
                **result.to_dict(),
            }
        )
    print(
        f"{result.tokens} tokens in {result.seconds:.1f} s on {loaded.device}, "
        f"{result.tokens_per_second:.1f} tokens/s",
        file=sys.stderr,
    )
