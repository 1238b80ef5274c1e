"""Files from elsewhere: what is no regular file, too large, or no JSON is an error at once."""

import os
from pathlib import Path

import pytest

from duqpp.errors import InputError
from duqpp.files import (
    local_path,
    model_path,
    parse_json_object,
    read_bytes,
    read_json_object,
    require_regular,
)


def test_contents_and_size(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"é": [1]}', encoding="utf-8")
    assert require_regular(path) == 11 and read_bytes(path) == path.read_bytes()
    assert read_json_object(path) == {"é": [1]}
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_json_object(link) == {"é": [1]}, "the hub's cache holds links"


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "device", "loop", "absent", "."):
        with pytest.raises(OSError):
            read_bytes(tmp_path / name)


def test_large_files_are_not_read(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=f"it has {2**40} bytes"):
        read_bytes(path)
    path.write_bytes(b"1234")
    assert read_bytes(path, limit=4) == b"1234"
    with pytest.raises(ValueError, match="at most 3"):
        read_bytes(path, limit=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"5", "must hold a JSON object"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "' + b"\xff" * 9999 + b'"}', "not UTF-8: invalid start byte at byte 7"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_object(content, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse_json_object(content)
    assert len(str(raised.value)) < 100, "it must not quote the content"


@pytest.mark.parametrize(
    "name", ["", "~nobody-of-that-name/model", "nul\0", "x" * 300, "a/" * 3000 + "b"]
)
def test_a_name_that_can_be_no_path_is_refused(name):
    with pytest.raises(InputError, match=r"^no such folder or file: "):
        local_path(name)


def test_a_path_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/none") == tmp_path / "none"
    assert local_path("nobody/no-such-model") == Path("nobody/no-such-model")


def test_a_loop_of_links_is_no_path(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert not local_path(str(tmp_path / "loop")).exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "a.model"])
def test_a_model_folder_holds_no_pipe_where_a_library_reads(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: it is no regular file"):
        model_path(tmp_path)


def test_companions_are_bounded_and_other_files_are_not(tmp_path):
    for name in ("data.jsonl", "model.safetensors", "tokenizer.json"):
        assert model_path(tmp_path) == tmp_path
        with open(tmp_path / name, "wb") as sparse:
            sparse.truncate(2**40)
    with pytest.raises(InputError, match=r"tokenizer.json: it has 1099511627776 bytes, "):
        model_path(tmp_path)


def test_a_model_path_is_utf_8():
    with pytest.raises(InputError, match=r"^the name 'a\\udcff' is not UTF-8"):
        model_path("a\udcff")
