"""Tokens a second of generation: a float model and its quantized form, in turn in one process.

python benchmarks/bench_generate.py FLOAT_MODEL QUANTIZED_MODEL
"""

from harness import Table, parser, report, start
from timing import alternate

from duqpp.integrations.transformers import load_model

COLUMNS = {"model": "s", "dtype": "s", "tokens/s": ".1f", "vs_float": ".2f"}
PROMPT = "The capital of France is"


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("float_model", help="model folder, .gguf file or hub name")
    options.add_argument("quantized_model", help="what `duqpp quantize` wrote of it")
    options.add_argument("--tokens", type=int, default=32)
    options, _ = start(options, arguments)
    models = {}
    for name, source in (("float", options.float_model), ("duqpp", options.quantized_model)):
        models[name], tokenizer = load_model(source)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    calls = {
        name: lambda model=model: model.generate(
            ids,
            max_new_tokens=options.tokens,
            min_new_tokens=options.tokens,
            do_sample=False,
            pad_token_id=0,
        )
        for name, model in models.items()
    }
    times, ratios = alternate(calls, seconds=10 * options.seconds)
    table = Table(COLUMNS, options)
    for name, model in models.items():
        table.add(
            {
                "model": name,
                "dtype": str(model.dtype).removeprefix("torch."),
                "tokens": options.tokens,
                "tokens/s": options.tokens / times[name].median,
                "vs_float": ratios[name],
            }
        )
    report(table.rows, options)


if __name__ == "__main__":
    main()
