"""What a checkpoint has of its source besides weights: the tokenizer's files, config.json, others.

They are copied as they stand, and not loaded and saved again, which changes some of them.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duqpp.checkpoint.card import CARD
from duqpp.checkpoint.manifest import MANIFEST_FILE
from duqpp.checkpoint.shard import read_json, write_json
from duqpp.errors import CheckpointError, InputError, first_line
from duqpp.models.hub import load_pretrained
from duqpp.models.source import Source

REPORT_FILE = "quantization_report.json"
TEMPLATES = "additional_chat_templates"  # the folder of the named ones, as transformers has it
_REPLACED = frozenset({"config.json", CARD, REPORT_FILE, MANIFEST_FILE, "adapter_config.json"})
# Weights of any program, training states, archives; and Python code, which duqpp never runs.
_NOT_COPIED = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|npz|npy|pkl|pickle|pdparams"
    r"|nemo|tflite|mlmodel|ot|engine|distcp|llamafile|zip|tar|gz|tgz|xz|zst|7z|py|pyc|so|index\.json"
    r"|partial)$",
    re.IGNORECASE,
)
_LARGEST = 2**28  # bytes; the largest tokenizers have 2**25
# What names files, folders or code that are the source's alone.
_POINTERS = ("auto_map", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_OWN = ("_name_or_path", "auto_map", "custom_pipelines", "quantization_config", "torch_dtype")
_ROPE = ("rope_theta", "rope_scaling")  # what older files have for rope_parameters
_PROBE = "<s>[INST] Hello,  world! [/INST] 12345 caf\u00e9 \u4f60\u597d \U0001f642\n\tdef f(x):</s>"


def companion_files(folder: Path) -> list[Path]:
    """The files beside a model's weights that a copy of it has too, relative to the folder.

    All that are no weights, hidden, code, larger than 256 MiB, or made anew: regular files of the
    folder itself, and of the one with named chat templates.
    """
    places = [place for place in (folder, folder / TEMPLATES) if place.is_dir()]
    files = sorted(file for place in places for file in place.iterdir())
    return [file.relative_to(folder) for file in files if _is_companion(file)]


def _is_companion(file: Path) -> bool:
    return (
        not file.name.startswith(".")
        and file.name not in _REPLACED
        and not _NOT_COPIED.search(file.name)
        and file.is_file()
        and file.stat().st_size <= _LARGEST
    )


def copy_companions(folder: Path, work: Path) -> None:
    """Copy them, byte by byte; a tokenizer_config.json that points elsewhere, without pointers."""
    for name in companion_files(folder):
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, work / name)
    settings = work / "tokenizer_config.json"
    if settings.exists():
        values = read_json(settings)
        kept = {name: value for name, value in values.items() if name not in _POINTERS}
        if kept != values:
            settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False), encoding="utf-8")


@dataclass(frozen=True)
class Companions:
    """What a checkpoint has of its source besides weights: read before any work is done.

    config: values of config.json, but for what the quantization adds. tokenizer: the source's.
    """

    source: Source
    config: dict[str, Any]
    tokenizer: Any
    generation: Any | None

    @classmethod
    def of(cls, source: Source) -> "Companions":
        """Read them. Raises: InputError."""
        return cls(source, _config(source), source.tokenizer(), source.generation_config())

    def write(self, work: Path) -> None:
        """Write them all but config.json. Raises: InputError."""
        folder = _folder(self.source)
        if folder is not None:
            copy_companions(folder, work)
            return
        try:
            self.tokenizer.save_pretrained(work)
        except Exception as error:  # transformers: of any kind
            raise InputError(f"cannot save the tokenizer: {first_line(error)}") from error
        if self.generation is not None:  # not its own method, which some versions let refuse
            values = json.loads(self.generation.to_json_string())
            write_json(work / "generation_config.json", values)

    def check(self, work: Path) -> None:
        """Raise InputError unless the written files give the source's tokenizer and defaults.

        Args: work: has config.json as well.
        """
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = load_pretrained(AutoTokenizer, work, "tokenizer", trust_remote_code=False)
        if _tokens(tokenizer) != _tokens(self.tokenizer):
            raise InputError(f"the tokenizer in {work} is not that of the model: its tokens differ")
        if (work / "generation_config.json").exists():
            load_pretrained(GenerationConfig, work, "generation configuration")


def _tokens(tokenizer: Any) -> Any:
    """Of a text that shows most ways to split one, or the error of who cannot read it."""
    try:
        return tokenizer(_PROBE)["input_ids"]
    except Exception as error:  # bare, from the tokenizers library
        return first_line(error)


def _folder(source: Source) -> Path | None:
    """Where the source's files are to be copied from; None of one that is no folder."""
    return getattr(source, "folder", None)


def _config(source: Source) -> dict[str, Any]:
    """The values of config.json: the source's own, and what transformers makes of those not given.

    Raises: InputError for a model that is more than a causal language model.
    """
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM._model_mapping[type(source.config)]
    values: dict[str, Any] = json.loads(source.config.to_json_string(use_diff=True))
    folder = _folder(source)
    if folder is not None:
        own = _own_values(folder / "config.json")
        stale = ["rope_parameters"] if any(name in own for name in _ROPE) else []
        # Its tokenizers are read as the version that it names would have.
        stale.append("transformers_version")
        values = own | {n: v for n, v in values.items() if n not in own and n not in stale}
    _check_architectures(values.get("architectures"), causal)
    kept = {name: value for name, value in values.items() if name not in _OWN}
    tied = source.config.tie_word_embeddings  # in fact, which the file may not know
    return kept | {"architectures": [causal.__name__], "tie_word_embeddings": tied}


def _own_values(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise InputError(str(error)) from error


def _check_architectures(architectures: Any, causal: Any) -> None:
    """Raise InputError where config.json names a model with another head, which would be lost.

    A model without any head is fine: with tied embeddings it is a causal language model.
    """
    known = {causal.__name__, causal.config_class.__name__.removesuffix("Config") + "Model"}
    for name in map(str, architectures if isinstance(architectures, list) else []):
        if name not in known and not re.search("ForCausalLM$", name, re.IGNORECASE):
            raise InputError(
                f"config.json names the architecture {name}, whose head would be lost: duqpp "
                f"quantizes causal language models; if this is one, write {causal.__name__} there"
            )
