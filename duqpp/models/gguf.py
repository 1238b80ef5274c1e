"""GGUF files, which transformers dequantizes."""

import contextlib
import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duqpp.errors import InputError
from duqpp.models.hub import load_pretrained, load_whole_model
from duqpp.models.quiet import quiet_libraries


class GgufSource:
    """A GGUF file, dequantized whole to float32 by transformers."""

    def __init__(self, file: Path) -> None:
        model, self._tokenizer = load_gguf(file)
        self.config = model.config
        self._generation_config = model.generation_config
        self._file = file
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.names = frozenset(self._tensors)

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise InputError(f"{self._file} has no tensor {name}")
        return self._tensors[name]

    def tokenizer(self) -> Any:
        return self._tokenizer

    def generation_config(self) -> Any | None:
        return self._generation_config


def is_gguf(model: str) -> bool:
    """Whether the name of a model is that of a GGUF file."""
    return model.endswith(".gguf")


def gguf_config(file: Path) -> Any:
    """The configuration in a GGUF file, of the float32 model in it. Raises: InputError."""
    import transformers

    if not file.is_file():
        raise InputError(f"no such file: {file}")
    with quiet_libraries():
        config = load_pretrained(
            transformers.AutoConfig, file.parent, "GGUF configuration", gguf_file=file.name
        )
    config.dtype = torch.float32
    return config


def load_gguf(file: Path, **options: Any) -> tuple[Any, Any]:
    """The float32 model in a GGUF file, in eval mode, and its tokenizer.

    Args: options: for transformers' `from_pretrained`, such as device_map.
    Raises: InputError.
    """
    import transformers

    if not file.is_file():
        raise InputError(f"no such file: {file}")
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The bar over a GGUF file's tensors is plain tqdm, which knows nothing of transformers' switch.
    hidden = contextlib.redirect_stderr(io.StringIO())
    with quiet_libraries(), hidden, _parsed_once():
        model = load_whole_model(
            transformers.AutoModelForCausalLM,
            file.parent,
            "GGUF model",
            gguf_file=file.name,
            dtype=torch.float32,
            **options,
        )
        tokenizer = load_pretrained(
            transformers.AutoTokenizer, file.parent, "GGUF tokenizer", gguf_file=file.name
        )
    model.config.name_or_path = file.name
    return model.eval(), tokenizer


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once: it does for the configuration, the weights and the
    tokenizer, and makes a table of names for every tensor. Measured for a 135M model: 8 s, not 19.

    And from plain arrays: a slice of a mapped file is made in microseconds, and its vocabulary
    takes a million of them. Parsing it took 1.6 s, not 4.
    """
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)  # which is no copy

    parser, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(PlainReader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = parser, names
