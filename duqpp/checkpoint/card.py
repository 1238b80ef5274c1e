"""What makes a folder of shards a checkpoint to hand on: the guard in config.json, a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duqpp.checkpoint.layout import is_duqpp
from duqpp.checkpoint.manifest import MODEL_FILES, write_manifest
from duqpp.checkpoint.shard import linear_storage, read_json, settle_metadata, write_json

CARD = "README.md"
CARD_MARK = "<!-- Written by duqpp, and again whenever the model is saved; to keep your own text, "
CARD_MARK += "remove this line. -->"
# How the card begins that transformers uploads for a model that has none.
_PLACEHOLDER = "This is the model card of a 🤗 transformers model that has been pushed on the Hub"
_TAGS = ("duqpp", "mxfp4", "w4a4")

# transformers takes the name of the weights' file from this field of config.json. One that names no
# safetensors file is an error that quotes it, raised before any module is built. Without the error,
# transformers skips a quantization that nobody has registered, and makes the linears up at random.
GUARD_FIELD = "transformers_weights"
GUARD = (
    "it is a duqpp checkpoint, which transformers reads only after `import duqpp`; "
    "its model card says where duqpp comes from"
)


def finish_folder(folder: Path, repository: str | None = None) -> None:
    """Complete what transformers' `save_pretrained` has written.

    Guards config.json, orders the shards' metadata, writes the model card, unless there is one by
    someone else, and the manifest of the model's files. Does nothing to a folder that holds no
    duqpp checkpoint, such as an adapter's.

    Args: repository: its name on the hub, for the card.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if not is_duqpp(config):
        return
    if config.get(GUARD_FIELD) != GUARD:
        write_json(folder / "config.json", config | {GUARD_FIELD: GUARD})
    for shard in sorted(folder.glob("model*.safetensors")):
        settle_metadata(shard)
    write_card(folder, repository)
    write_manifest(folder, MODEL_FILES)


def write_card(folder: Path, repository: str | None = None) -> None:
    """Write the model card from what the checkpoint itself says: config.json, and its shards.

    A card that neither duqpp nor transformers has written stays as it is, and the tags of any card.

    Args: repository: its name on the hub; None writes the loading lines for the folder.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / CARD
    tags: list[str] = []
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if CARD_MARK not in text and _PLACEHOLDER not in text:
            return
        tags = ModelCard(text).data.tags or []
    config = read_json(folder / "config.json")
    quantization = config["quantization_config"]
    base = quantization.get("provenance", {}).get("base_model", "")
    on_hub = "/" in base  # a folder's name alone would be taken for a model of the hub
    data = ModelCardData(
        library_name="duqpp",  # not transformers: the hub would show its lines, without the import
        pipeline_tag="text-generation",
        base_model=base if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        tags=[*_TAGS, *(tag for tag in tags if tag not in _TAGS)],
    )
    body = "\n".join(_body(folder, config, quantization, base or "A model", repository))
    ModelCard(f"---\n{data.to_yaml()}\n---\n{CARD_MARK}\n{body}").save(path)


def _body(
    folder: Path,
    config: dict[str, Any],
    quantization: dict[str, Any],
    base: str,
    repository: str | None,
) -> list[str]:
    """The lines of the card below its metadata."""
    place = repository or "."
    where = "" if repository else "  # this folder"
    return [
        f"# {base}, quantized to MXFP4 W4A4",
        "",
        "The linears of the decoder blocks hold MXFP4 weights (E2M1 codes with one E8M0 scale for",
        "each 32 of them), and round what they read to MXFP4 as well. Made with duqpp.",
        "",
        "## Load",
        "",
        "duqpp is installed from its sources, in a checkout of its repository:",
        "",
        "```sh",
        "pip install .",
        "```",
        "",
        "```python",
        "import duqpp  # first: transformers by itself does not know these tensors",
        "from transformers import AutoTokenizer",
        "",
        f'checkpoint = "{place}"{where}',
        "model = duqpp.from_pretrained(checkpoint)",
        "tokenizer = AutoTokenizer.from_pretrained(checkpoint)",
        "```",
        "",
        "After the import, `AutoModelForCausalLM.from_pretrained` works as well. Without it, that",
        "stops with an error that asks for the import.",
        "",
        "## How it was made",
        "",
        *_table(_origin(config, quantization)),
        "",
        "## Measured",
        "",
        *_measured(folder, quantization),
        "Perplexity is not measured while a model is quantized:",
        "`duqpp eval CHECKPOINT --text TEXT --reference MODEL` does that.",
        "",
    ]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _origin(config: dict[str, Any], quantization: dict[str, Any]) -> list[tuple[str, str]]:
    provenance = quantization.get("provenance", {})
    options, data = provenance.get("configuration", {}), provenance.get("calibration")
    rules = quantization["scale_rule"]
    method = f"`{quantization['method']}`"
    if refine := _refinement(provenance):
        method += f", then refined: `{refine}`"
    rows = [
        ("method", method),
        ("rotation of the inputs", quantization["rotation"].replace("_", " ")),
        ("scale rule", f"weights `{rules['weights']}`, activations `{rules['activations']}`"),
        ("in floating point", ", ".join(f"`{s}`" for s in quantization["modules_to_not_convert"])),
        ("dtype of what is not quantized", f"`{config.get('dtype')}`"),
    ]
    if data == "none":
        rows.append(("calibration", "none: the method reads no activations"))
    elif data:
        count = "refine_samples" if refine else "samples"
        given = {count, "seq_len"} <= set(options) and data != "tokens"
        size = f", {options[count]} x {options['seq_len']} tokens" if given else ""
        rows.append(("calibration", f"{data}{size}"))
    if "seed" in options:
        rows.append(("seed", str(options["seed"])))
    versions = provenance.get("versions", {})
    if versions:
        rows.append(("versions", ", ".join(f"{name} {v}" for name, v in sorted(versions.items()))))
    return rows


def _measured(folder: Path, quantization: dict[str, Any]) -> list[str]:
    """The size of the linears, and what their rounding costs."""
    size, weights = linear_storage(folder)
    lines = []
    if weights:
        bits = f"{size:,} bytes, {8 * size / weights:.2f} bits a weight, rotations included"
        lines += [f"Quantized linears: {bits}.", ""]
    provenance = quantization.get("provenance", {})
    errors = provenance.get("mean_errors", {})
    rows = [
        (name, f"{100 * errors[field]:.1f} %")
        for field, name in (
            ("weight_error", "weights"),
            ("activation_error_before", "inputs, without the rotation"),
            ("activation_error", "inputs, as rotated"),
            ("output_error", "outputs"),
        )
        if errors.get(field) is not None
    ]
    if rows:
        lines += ["### Mean relative rounding error over the linear groups", ""]
        if _refinement(provenance):
            lines += ["Measured before the refinement, which trains the weights further.", ""]
        lines += [*_table(rows), ""]
    return lines


def _refinement(provenance: dict[str, Any]) -> str | None:
    """The kind of refinement that came after the quantization, if one did."""
    refine = provenance.get("configuration", {}).get("refine", "none")
    return None if refine == "none" else refine
