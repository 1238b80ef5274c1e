"""An independent reader of duqpp checkpoints, written from the format's description.

It imports neither duqpp nor safetensors nor torch: bytes are read with struct, json and numpy, and
E2M1 and E8M0 are decoded from their definitions. Values are float64, which holds them exactly.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

_WIDTHS = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4}  # bytes of each dtype in the format
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP MX v1.0, table 5
_E2M1 = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)])


def read_shard(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, bytes]]:
    """Header entries (dtype, shape, data_offsets), metadata, and bytes of each tensor of a file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length].decode("utf-8"))
    metadata = header.pop("__metadata__", {})
    data = content[8 + length :]
    parts = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    for name, entry in header.items():
        assert len(parts[name]) == _WIDTHS[entry["dtype"]] * int(np.prod(entry["shape"])), name
    assert sum(map(len, parts.values())) == len(data), "bytes that belong to no tensor"
    return header, metadata, parts


class Checkpoint:
    """A checkpoint folder. config: config.json. entries, data: of every tensor, by name."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.entries: dict[str, dict[str, Any]] = {}
        self.data: dict[str, bytes] = {}
        for file in sorted(set(index["weight_map"].values())):
            entries, metadata, parts = read_shard(folder / file)
            checksums = json.loads(metadata["duqpp.crc32"])
            for name, part in parts.items():
                assert index["weight_map"][name] == file, name
                assert checksums[name] == format(zlib.crc32(part), "08x"), name
            self.entries |= entries
            self.data |= parts
        assert set(index["weight_map"]) == set(self.data)
        assert index["metadata"]["total_size"] == sum(map(len, self.data.values()))

    @property
    def linears(self) -> list[str]:
        """Names of the quantized linears."""
        return [n.removesuffix(".weight_packed") for n in self.data if n.endswith("weight_packed")]

    def floats(self, name: str) -> np.ndarray:
        """A floating-point tensor, float64."""
        entry, data = self.entries[name], self.data[name]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
            values = bits.view(np.float32)
        else:
            values = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[entry["dtype"]])
        return values.astype(np.float64).reshape(entry["shape"])

    def integers(self, name: str) -> np.ndarray:
        """An integer tensor."""
        kind = {"U8": "u1", "I32": "<i4"}[self.entries[name]["dtype"]]
        return np.frombuffer(self.data[name], kind).reshape(self.entries[name]["shape"])

    def scales(self, linear: str) -> np.ndarray:
        """2**(byte - 127) for each block of a linear's weight: float64 [N, K/32]."""
        exponents = self.integers(f"{linear}.weight_scale").astype(np.int64)
        assert exponents.max() < 255, f"{linear} has a NaN scale"
        return np.ldexp(1.0, exponents - 127)

    def rotated_weight(self, linear: str) -> np.ndarray:
        """The weight as stored, in the rotated basis: float64 [N, K]."""
        packed = self.integers(f"{linear}.weight_packed")
        codes = np.stack([packed & 15, packed >> 4], axis=-1)  # the even column is the low nibble
        values = _E2M1[codes].reshape(packed.shape[0], -1, 32)
        return (values * self.scales(linear)[..., None]).reshape(packed.shape[0], -1)

    def effective_weight(self, linear: str) -> np.ndarray:
        """W with ``y = x W.T``, the linear's function but for its input's rounding: [N, K].

        The input takes the way ``x -> (x P)[permutation] R``, each step being optional.
        """
        weight = self.rotated_weight(linear)
        if f"{linear}.rotation" in self.data:
            weight = _times_transpose(weight, self.floats(f"{linear}.rotation"))
        if f"{linear}.permutation" in self.data:
            shuffled, weight = weight, np.empty_like(weight)
            weight[:, self.integers(f"{linear}.permutation")] = shuffled
        if f"{linear}.pre_rotation" in self.data:
            weight = _times_transpose(weight, self.floats(f"{linear}.pre_rotation"))
        return weight


def _times_transpose(weight: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """W R.T for each block of 32 columns, with one R [32, 32] or one per block [K/32, 32, 32]."""
    blocks = weight.reshape(weight.shape[0], -1, 32)
    rotation = np.broadcast_to(rotation, (blocks.shape[1], 32, 32))
    return np.einsum("nbj,bij->nbi", blocks, rotation).reshape(weight.shape)
