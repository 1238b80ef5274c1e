"""Shards: written whole, equal for equal tensors, and every damage to them is found."""

import itertools
import json
import os
import random
import zlib
from contextlib import nullcontext
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings

from duqpp.checkpoint import shard as shards
from duqpp.checkpoint.shard import (
    checkpoint_contents,
    checksum,
    read_json,
    read_shard,
    settle_metadata,
    shard_files,
    verify_shard,
    verify_values,
    write_json,
    write_shard,
)
from duqpp.errors import CheckpointError
from tests import decoder
from tests.checkpoint import damage

LINEAR = "model.layers.0.mlp.down_proj"
PERMUTATION = torch.randperm(96, generator=torch.Generator().manual_seed(3)).int()


def tensors() -> dict[str, torch.Tensor]:
    """One tensor of every kind that a checkpoint holds, seeded."""
    generator = torch.Generator().manual_seed(7)
    rotation = torch.linalg.qr(torch.randn(3, 32, 32, generator=generator))[0]
    return {
        f"{LINEAR}.weight_packed": torch.randint(256, (8, 48), generator=generator).byte(),
        f"{LINEAR}.weight_scale": torch.randint(255, (8, 3), generator=generator).byte(),
        f"{LINEAR}.rotation": rotation.bfloat16().contiguous(),
        f"{LINEAR}.pre_rotation": rotation[0].bfloat16().contiguous(),
        f"{LINEAR}.permutation": PERMUTATION,
        f"{LINEAR}.bias": torch.randn(8, generator=generator),
        "model.norm.weight": torch.randn(5, generator=generator).half(),
    }


def expected() -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(t, device="meta") for name, t in tensors().items()}


def verify_checkpoint(files, wanted, progress=None):
    """All that is checked of a checkpoint's shards, values last."""
    verify_values(checkpoint_contents(files, wanted), progress)


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    write_shard(path, tensors())
    return path


# Writing.


def test_shard_reads_back(shard):
    read = read_shard(shard)
    for library in (read, safetensors.torch.load_file(shard)):
        assert set(library) == set(tensors())
        for name, tensor in tensors().items():
            assert library[name].dtype == tensor.dtype and torch.equal(library[name], tensor)
    assert [f.name for f in shard.parent.iterdir()] == ["model.safetensors"]


def test_shard_is_safetensors_with_checksums(shard):
    _, metadata, data = decoder.read_shard(shard)
    assert metadata["format"] == "pt"
    sums = json.loads(metadata["duqpp.crc32"])
    assert sums == {name: f"{zlib.crc32(part):08x}" for name, part in data.items()}


def test_tensors_are_aligned_to_their_elements(tmp_path):
    """Readers map the file into memory; some processors fault on a float at an odd address."""
    odd = {
        "a": torch.ones(3).byte(),
        "b": torch.ones(5).half(),
        "c": torch.ones(3),
        "d": torch.ones(1),
    }
    write_shard(tmp_path / "odd.safetensors", odd)
    length = int.from_bytes((tmp_path / "odd.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0
    for name, entry in decoder.read_shard(tmp_path / "odd.safetensors")[0].items():
        assert (8 + length + entry["data_offsets"][0]) % odd[name].element_size() == 0


def test_equal_tensors_give_equal_bytes(shard, tmp_path):
    for number, order in enumerate(itertools.permutations(list(tensors())[:4])):
        path = tmp_path / f"{number}.safetensors"
        everything = tensors()
        write_shard(path, {n: everything.pop(n) for n in order} | everything)
        assert path.read_bytes() == shard.read_bytes()


def test_awkward_tensors(tmp_path):
    """Views, an empty tensor, a scalar, a parameter."""
    square = torch.arange(12.0).view(3, 4)
    odd = {
        "transposed": square.T,
        "slice": square[:, 1:3],
        "expanded": square[:1].expand(5, 4),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(square),
    }
    write_shard(tmp_path / "odd.safetensors", odd)
    read = read_shard(tmp_path / "odd.safetensors")
    for name, tensor in odd.items():
        assert torch.equal(read[name], tensor.detach()), name


def test_interrupted_write_leaves_the_old_file(shard, monkeypatch):
    before = shard.read_bytes()

    def fail(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_shard(shard, {"a": torch.zeros(1)})
    assert shard.read_bytes() == before


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, "ü"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, "ü"]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"a": [1, "ü"]}


def test_json_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut, a renamed file that was not synced can be empty."""
    file, seen = tmp_path / "a.json", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(file.exists()))
    write_json(file, {"a": 1})
    assert seen == [False]


@pytest.mark.parametrize("missing", [0, 1])
def test_settled_metadata_never_run_into_the_tensors(missing, shard):
    """Checksums that someone wrote without spaces need more room as duqpp writes them."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    room = len(content[8 : 8 + length].rstrip()) - missing
    sums = json.loads(header["__metadata__"]["duqpp.crc32"])
    header["__metadata__"]["duqpp.crc32"] = json.dumps(sums, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(room)
    assert len(text) == room
    shard.write_bytes(room.to_bytes(8, "little") + text + content[8 + length :])
    before, expected = shard.read_bytes(), read_shard(shard)
    if missing:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: its header has .* need"):
            settle_metadata(shard)
        assert shard.read_bytes() == before
    else:
        settle_metadata(shard)
        assert shard.read_bytes() != before
        assert all(torch.equal(tensor, expected[n]) for n, tensor in read_shard(shard).items())


def test_settling_a_shard_without_checksums(shard):
    safetensors.torch.save_file(tensors(), shard)
    with pytest.raises(CheckpointError, match="lack the format"):
        settle_metadata(shard)


def test_checksum_is_that_of_the_bytes():
    values = torch.tensor([[1.0, -2.5], [0.0, 3.0]]).bfloat16()
    data = bytes.fromhex("803f 20c0 0000 4040".replace(" ", ""))
    assert checksum(values) == f"{zlib.crc32(data):08x}"
    assert checksum(values.T) != checksum(values)


# Reading: damage by chance.


def test_undamaged_shard_passes(shard):
    verify_checkpoint([shard], expected())


def test_every_flipped_bit_of_the_header_is_found(shard):
    content = shard.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for byte in range(end):
        for bit in range(8) if byte < 8 else [rng.randrange(8)]:
            damaged = bytearray(content)
            damaged[byte] ^= 1 << bit
            shard.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                verify_checkpoint([shard], expected())


def test_flipped_bits_of_every_tensor_are_found_and_named(shard):
    content = shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for name, entry in decoder.read_shard(shard)[0].items():
        begin, end = entry["data_offsets"]
        places = {begin, end - 1, *(rng.randrange(begin, end) for _ in range(10))}
        for place, bit in itertools.product(places, (0, 7)):
            damaged = bytearray(content)
            damaged[start + place] ^= 1 << bit
            shard.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"{name} is altered"):
                verify_checkpoint([shard], expected())


def test_every_truncation_is_found(shard):
    content = shard.read_bytes()
    cuts = {*range(40), *range(40, len(content), 97), *range(len(content) - 40, len(content))}
    for cut in cuts:
        shard.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            verify_checkpoint([shard], expected())


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4096, b"more"])
def test_appended_bytes_are_found(tail, shard):
    shard.write_bytes(shard.read_bytes() + tail)
    with pytest.raises(CheckpointError, match="truncated or altered"):
        verify_checkpoint([shard], expected())


def test_swapped_tensors_are_found(shard):
    """Two tensors of one shape that change places keep all sums but their own."""
    everything = tensors()
    everything["a"], everything["b"] = torch.rand(4), torch.rand(4)
    write_shard(shard, everything)
    wanted = expected() | {"a": torch.empty(4), "b": torch.empty(4)}
    verify_checkpoint([shard], wanted)
    content = bytearray(shard.read_bytes())
    a, b = content.index(b'"a":{'), content.index(b'"b":{')
    content[a + 1], content[b + 1] = content[b + 1], content[a + 1]
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="is altered"):
        verify_checkpoint([shard], wanted)


# Reading: files that are whole and wrong.


@pytest.mark.parametrize(
    "name", [f"{LINEAR}.weight_packed", f"{LINEAR}.rotation", f"{LINEAR}.bias"]
)
def test_missing_tensor(name, shard):
    damage.edit_tensors(shard.parent, name, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks {name}$"):
        verify_checkpoint([shard], expected())
    damage.edit_tensors(shard.parent, "model.norm.weight", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks .* and 1 more tensors"):
        verify_checkpoint([shard], expected())


def test_extra_tensor(shard):
    damage.edit_tensors(shard.parent, f"{LINEAR}.bias", lambda t: t.update(extra=torch.ones(1)))
    with pytest.raises(CheckpointError, match="extra does not belong to this model"):
        verify_checkpoint([shard], expected())


def test_tensor_in_two_shards(shard, tmp_path):
    other = tmp_path / "other.safetensors"
    write_shard(other, {"model.norm.weight": torch.ones(5).half()})
    with pytest.raises(CheckpointError, match=r"is in both model\.safetensors and other\.safetens"):
        verify_checkpoint([shard, other], expected())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{LINEAR}.weight_packed", torch.zeros(8, 47)),
        (f"{LINEAR}.weight_packed", torch.zeros(48, 8)),
        (f"{LINEAR}.weight_scale", torch.zeros(8, 4)),
        (f"{LINEAR}.weight_scale", torch.zeros(24)),
        (f"{LINEAR}.rotation", torch.eye(32)),
        (f"{LINEAR}.rotation", torch.eye(32).expand(2, 32, 32)),
        (f"{LINEAR}.pre_rotation", torch.eye(32).expand(3, 32, 32)),
        (f"{LINEAR}.permutation", torch.arange(64)),
        (f"{LINEAR}.permutation", torch.arange(0)),
        (f"{LINEAR}.rotation", torch.zeros(0, 32, 32)),
        (f"{LINEAR}.bias", torch.zeros(9)),
        ("model.norm.weight", torch.zeros(5, 1)),
    ],
)
def test_wrong_shape(name, value, shard):
    value = value.to(tensors()[name].dtype)
    damage.set_tensor(shard.parent, name, value)
    with pytest.raises(CheckpointError, match=rf"{name} must be \[.*\], got \["):
        verify_checkpoint([shard], expected())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{LINEAR}.weight_packed", torch.int32),
        (f"{LINEAR}.weight_packed", torch.bfloat16),
        (f"{LINEAR}.weight_scale", torch.float16),
        (f"{LINEAR}.rotation", torch.float32),
        (f"{LINEAR}.rotation", torch.float16),
        (f"{LINEAR}.permutation", torch.float32),
        (f"{LINEAR}.bias", torch.int32),
        ("model.norm.weight", torch.uint8),
    ],
)
def test_wrong_dtype(name, dtype, shard):
    damage.set_tensor(shard.parent, name, tensors()[name].to(dtype))
    with pytest.raises(CheckpointError, match=f"{name} must be .*, got {dtype}"):
        verify_checkpoint([shard], expected())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.float8_e4m3fn])
def test_dtype_that_the_format_lacks(dtype, shard):
    damage.set_tensor(shard.parent, f"{LINEAR}.bias", torch.ones(8).to(dtype))
    with pytest.raises(CheckpointError, match=r"bias has the dtype [FI]"):
        verify_checkpoint([shard], expected())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_floating_point_dtypes_are_fine(dtype, shard):
    """A float model may be stored in any; transformers casts it on load."""
    damage.set_tensor(shard.parent, f"{LINEAR}.bias", torch.ones(8).to(dtype))
    verify_checkpoint([shard], expected())


@pytest.mark.parametrize("place", [(0, 0), (7, 2), (3, 1)])
def test_scale_byte_of_255(place, shard):
    scales = tensors()[f"{LINEAR}.weight_scale"]
    scales[place] = 255
    damage.set_tensor(shard.parent, f"{LINEAR}.weight_scale", scales)
    with pytest.raises(CheckpointError, match="weight_scale has a scale byte of 255"):
        verify_checkpoint([shard], expected())


def test_codes_of_255_are_fine(shard):
    damage.set_tensor(shard.parent, f"{LINEAR}.weight_packed", torch.full((8, 48), 255).byte())
    verify_checkpoint([shard], expected())


def singular(matrix):
    matrix[:, 4] = matrix[:, 9]


def zero(matrix):
    matrix.zero_()


def not_a_number(matrix):
    matrix[3, 3] = float("nan")


def infinite(matrix):
    matrix[31, 0] = float("inf")


def ill_conditioned(matrix):
    matrix[:, 0] *= 2.0**-30


@pytest.mark.parametrize("name", ["rotation", "pre_rotation"])
@pytest.mark.parametrize("change", [singular, zero, not_a_number, infinite, ill_conditioned])
def test_rotation_that_cannot_be_undone(change, name, shard):
    """In any of the blocks; the last one is changed here."""
    matrix = tensors()[f"{LINEAR}.{name}"]
    change(matrix.view(-1, 32, 32)[-1])
    damage.set_tensor(shard.parent, f"{LINEAR}.{name}", matrix)
    with pytest.raises(CheckpointError, match=rf"{LINEAR}\.{name} (is singular|contains NaN)"):
        verify_checkpoint([shard], expected())


@pytest.mark.parametrize(
    ("place", "value"), [(0, PERMUTATION[1]), (5, 96), (5, -1), (95, 2**31 - 1)]
)
def test_permutation_that_is_none(place, value, shard):
    permutation = PERMUTATION.clone()
    permutation[place] = value
    damage.set_tensor(shard.parent, f"{LINEAR}.permutation", permutation)
    with pytest.raises(CheckpointError, match="permutation does not name every channel once"):
        verify_checkpoint([shard], expected())


def test_shard_without_checksums(shard):
    everything = tensors()
    for metadata in (None, {"format": "pt"}, {"format": "pt", "duqpp.crc32": "[]"}):
        shard.write_bytes(safetensors.torch.save(everything, metadata))
        with pytest.raises(CheckpointError, match=r"checksums|metadata lack|JSON object"):
            verify_checkpoint([shard], expected())
    sums = {name: checksum(tensor) for name, tensor in everything.items()}
    for change in ({"a": "00000000"}, {LINEAR + ".bias": None}, {LINEAR + ".bias": 5}):
        incomplete = {n: s for n, s in sums.items() if n != LINEAR + ".bias"} | change
        metadata = {"format": "pt", "duqpp.crc32": json.dumps(incomplete)}
        shard.write_bytes(safetensors.torch.save(everything, metadata))
        with pytest.raises(CheckpointError, match="bias is altered"):
            verify_checkpoint([shard], expected())


def test_shard_for_another_framework(shard):
    sums = json.dumps({name: checksum(tensor) for name, tensor in tensors().items()})
    metadata = {"format": "tf", "duqpp.crc32": sums}
    shard.write_bytes(safetensors.torch.save(tensors(), metadata))
    with pytest.raises(CheckpointError, match="metadata lack the format 'pt'"):
        verify_checkpoint([shard], expected())


def test_progress_counts_shards(shard, tmp_path):
    everything, wanted = tensors(), expected()
    other = tmp_path / "other.safetensors"
    write_shard(other, {"a": torch.ones(2)})
    calls = []
    write_shard(shard, everything)
    verify_checkpoint(
        [shard, other], wanted | {"a": torch.ones(2)}, lambda *call: calls.append(call)
    )
    assert calls == [("verify", 0, 2), ("verify", 1, 2), ("verify", 2, 2)]


# Headers that somebody made up: never another error than CheckpointError.

NUMBERS = st.one_of(
    st.integers(-3, 40), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=2)
)
ENTRIES = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from(["U8", "F32", "BF16", "X"]), NUMBERS),
            "shape": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
            "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
        },
    ),
)
NAMES = st.one_of(
    st.sampled_from(["a", f"{LINEAR}.weight_scale", f"{LINEAR}.rotation", f"{LINEAR}.permutation"]),
    st.text(max_size=4),
)
METADATA = st.one_of(
    NUMBERS,
    st.fixed_dictionaries(
        {"format": st.just("pt")},
        optional={
            "duqpp.crc32": st.one_of(
                st.sampled_from(["{}", "[]", "", '{"a": "00000000"}']), NUMBERS
            )
        },
    ),
)
HEADERS = st.one_of(
    st.dictionaries(NAMES, ENTRIES, max_size=4),
    st.builds(
        lambda metadata, entries: {"__metadata__": metadata, **entries},
        METADATA,
        st.dictionaries(NAMES, ENTRIES, max_size=3),
    ),
    ENTRIES,
)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("made_up") / "model.safetensors"


@settings(max_examples=250)
@given(header=HEADERS, data=st.binary(max_size=40))
def test_made_up_headers(header, data, made_up):
    if isinstance(header, dict) and "__metadata__" not in header:
        sums = dict.fromkeys(header, f"{zlib.crc32(data):08x}")  # right for one tensor that is all
        header = {"__metadata__": {"format": "pt", "duqpp.crc32": json.dumps(sums)}, **header}
    text = json.dumps(header).encode()
    made_up.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(CheckpointError):
        verify_checkpoint([made_up], expected())


@settings(max_examples=150)
@given(content=st.binary(max_size=60), length=st.integers(0, 2**64 - 1) | st.integers(0, 60))
def test_made_up_bytes(content, length, made_up):
    made_up.write_bytes(length.to_bytes(8, "little") + content)
    with pytest.raises(CheckpointError):
        verify_checkpoint([made_up], expected())


ENTRY = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'


def with_checksums(entry: str, name: str = "a", data: bytes = b"\0\0\0\0") -> bytes:
    """A header of one entry, whose checksum is right."""
    sums = json.dumps(json.dumps({name: f"{zlib.crc32(data):08x}"}))
    metadata = f'{{"format":"pt","duqpp.crc32":{sums}}}'
    return f'{{"__metadata__":{metadata},"{name}":{entry}}}'.encode()


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        with_checksums(ENTRY.replace("[4]", "[true,4]")),
        with_checksums(ENTRY.replace("[4]", "[-1,-4]")),
        with_checksums(ENTRY.replace("[4]", "[4.0]")),
        with_checksums(ENTRY.replace("[4]", "4")),
        with_checksums(ENTRY.replace("[4]", "[5]")),
        with_checksums(ENTRY.replace("[4]", "[" + "9" * 5000 + "]")),
        with_checksums(ENTRY.replace("[4]", "[4294967296,4294967296,0.0]")),
        with_checksums(ENTRY.replace("[0,4]", "[0.0,4.0]")),
        with_checksums(ENTRY.replace("[0,4]", "[false,4]")),
        with_checksums(ENTRY.replace("[0,4]", "[0,1e400]")),
        with_checksums(ENTRY.replace("[0,4]", "[4,0]")),
        with_checksums(ENTRY.replace("[0,4]", "[-4,0]")),
        with_checksums(ENTRY.replace("[0,4]", "[0,4,8]")),
        with_checksums(ENTRY.replace('"U8"', '["U8"]')),
        with_checksums(ENTRY.replace('"U8"', '"u8"')),
        with_checksums(ENTRY + ',"b":' + ENTRY),
        with_checksums(ENTRY).replace(b'"pt"', b'"np"'),
        with_checksums(ENTRY).replace(b'{"format"', b'[{"format"').replace(b'}","a"', b'}"],"a"'),
        with_checksums('{"dtype":"BF16","shape":[2],"data_offsets":[0,2]}'),
        b'{"__metadata__":{"format":"pt","duqpp.crc32":"' + b"[" * 100_000 + b'"}}',
        b"\xff\xfe{}",
        b"",
    ],
    ids=lambda header: header[-60:].decode("latin-1"),
)
def test_headers_with_a_catch(header, made_up):
    made_up.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError):
        verify_shard(made_up)


@pytest.mark.parametrize(("begin", "is_right"), [(4, True), (5, False), (3, False)])
def test_tensors_lie_behind_each_other(begin, is_right, made_up):
    """Neither bytes that belong to no tensor, nor any that belong to two."""
    data, end = b"\1\2\3\4\5\6\7\0", 8
    entry = ENTRY.replace("[4]", f"[{end - begin}]").replace("[0,4]", f"[{begin},{end}]")
    sums = {name: f"{zlib.crc32(d):08x}" for name, d in (("a", data[:4]), ("b", data[begin:]))}
    metadata = json.dumps({"format": "pt", "duqpp.crc32": json.dumps(sums)})
    header = f'{{"__metadata__":{metadata},"a":{ENTRY},"b":{entry}}}'.encode()
    made_up.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with nullcontext() if is_right else pytest.raises(CheckpointError, match="offsets of b"):
        verify_shard(made_up)


def test_header_without_a_catch(made_up):
    """What the headers above start from is right."""
    header = with_checksums(ENTRY)
    made_up.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    verify_shard(made_up)


def test_tensor_whose_size_overflows(made_up):
    """2**64 elements are not zero of them."""
    entry = '{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}'
    header = with_checksums(entry, data=b"")
    made_up.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="offsets of a are wrong"):
        verify_shard(made_up)


def test_header_longer_than_allowed(made_up, monkeypatch):
    text = json.dumps({"a" * 200: 1}).encode()
    made_up.write_bytes(len(text).to_bytes(8, "little") + text)
    monkeypatch.setattr(shards, "_HEADER_LIMIT", 100)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        verify_shard(made_up)


def test_shard_that_is_a_folder_or_absent(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot read"):
            verify_shard(path)


# The index.


def test_shards_come_from_the_index_or_the_single_file(tmp_path):
    with pytest.raises(CheckpointError, match="has neither"):
        shard_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert shard_files(tmp_path) == [tmp_path / "model.safetensors"]
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
    names = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / damage.INDEX).write_text(json.dumps({"weight_map": names}))
    assert shard_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/hostname", "sub/x.safetensors", "..", ".", "", "none", 5, None],
)
def test_index_that_names_no_file_of_the_folder(name, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "x.safetensors", folder / "sub" / "x.safetensors"):
        path.write_bytes(b"")
    (folder / damage.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"names the shard .*, which is not in"):
        shard_files(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}']
)
def test_index_that_is_none(content, tmp_path):
    (tmp_path / damage.INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        shard_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff\xfe", b"[" * 100_000, b"nul"])
def test_json_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path / "none.json")
