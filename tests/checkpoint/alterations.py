"""Ways in which a file of a checkpoint may differ from what was saved: bytes, fields, its kind."""

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]

DEEP = 5_000  # brackets inside each other: more than Python's parser follows
# What may stand in the place of any value.
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e400, -1e400, float("nan"), 2**63, 2**200),
    *("", "x", "1", "\ud800", "../../etc/passwd", [], [0], {}, {"a": 1}, [[]], [None]),
)


def of_bytes(content: bytes, count: int, random_: random.Random) -> Iterator[tuple[str, Change]]:
    """Alterations of the bytes of a file, `count` of each class."""
    size = len(content)
    places = [random_.randrange(size) for _ in range(count)]
    for place in places:
        bit, byte = random_.randrange(8), random_.randrange(1, 256)
        yield f"bit {place}.{bit}", _put(content, place, bytes([content[place] ^ 1 << bit]))
        yield f"byte {place}", _put(content, place, bytes([content[place] ^ byte]))
        yield f"insert at {place}", _write(content[:place] + bytes([byte]) + content[place:])
        yield f"delete at {place}", _write(content[:place] + content[place + 1 :])
        yield f"cut at {place}", _write(content[:place])
        yield f"zeros from {place}", _write(content[:place] + bytes(size - place))
        yield f"cut before {place}", _write(content[place + 1 :])
    for tail in (b"\0", b"\n", b" ", b"}", content):
        yield f"{len(tail)} bytes more", _write(content + tail)
    for cut in (1, 2, 30):
        yield f"{cut} bytes less", _write(content[:-cut])
    yield "empty", _write(b"")
    yield "mark", _write(b"\xef\xbb\xbf" + content)
    yield "UTF-16", _write(content.decode("latin-1").encode("utf-16"))
    yield "line ends", _write(content.replace(b"\n", b"\r\n") + b"\r\n")
    yield "nested", _write(b"[" * DEEP)
    yield "list", _write(b"[]")


def of_kind() -> Iterator[tuple[str, Change]]:
    """Something else in the place of a file."""
    yield "absent", Path.unlink
    yield "folder", _replaced(Path.mkdir)
    yield "pipe", _replaced(os.mkfifo)
    yield "loop", _replaced(lambda path: path.symlink_to(path.name))
    yield "dangling link", _replaced(lambda path: path.symlink_to("nowhere"))
    yield "device", _replaced(lambda path: path.symlink_to("/dev/zero"))
    yield "a terabyte", lambda path: os.truncate(path, 2**40)


def of_fields(text: str, count: int, random_: random.Random) -> Iterator[tuple[str, Change]]:
    """Alterations of the values of a JSON file, whose text stays well formed.

    Args: count: of replacing values for each field.
    """
    values = json.loads(text)
    for path in _paths(values):
        own = _at(values, path)
        others = [v for v in VALUES if type(v) is not type(own) or v != own]
        near = [*_near(own), *random_.sample(others, count)]
        for new in near:
            yield f"{path} = {str(new)[:20]}", _edited(text, path, lambda c, n=new: n)
        yield f"{path} gone", _edited(text, path, None)
    yield "a field more", _edited(text, ("more",), lambda c: 5)


def _near(value: Any) -> list[Any]:
    """What a slip of one digit, bit or letter makes of a value."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value ^ 1 << 3]
    if isinstance(value, float):
        return [math.nextafter(value, math.inf), -value - 1]
    if isinstance(value, str) and value:
        return [value[:-1], chr(ord(value[0]) ^ 1) + value[1:]]
    return []


def _paths(values: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value of a JSON object; of a long list or object, the first of its values."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(items)[:40]:
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from _paths(value, (*above, key))


def _at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def _edited(text: str, path: tuple[Any, ...], change: Callable[[Any], Any] | None) -> Change:
    def apply(file: Path) -> None:
        values = json.loads(text)
        holder = _at(values, path[:-1])
        if change is None:
            del holder[path[-1]]
        else:
            holder[path[-1]] = change(holder)
        file.write_text(json.dumps(values, indent=2) + "\n")

    return apply


def _write(content: bytes) -> Change:
    return lambda path: path.write_bytes(content) and None


def _put(content: bytes, place: int, new: bytes) -> Change:
    return _write(content[:place] + new + content[place + 1 :])


def _replaced(make: Change) -> Change:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply
