"""Ways to spoil files: values of a JSON file, entries of a safetensors header, bytes, and the files themselves.

Each takes a random.Random, changes one thing, and returns what it did in a few words.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 0.5, 1.0, -2.5, 1e-9, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**400),
    *("", "x", "1", "true", "null", "é\u0000\u2028", "../..", "(", "[a-z", "a" * 5000, "default", "yarn"),
    *([], [1], [None], ["a", "b"], [[1]], {}, {"a": 1}, {"a": {"b": []}}, [0] * 2000),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I8", "U8", "I64", "F8_E4M3", "BOOL", "", "X", "f32")


def odd_value(random: Random, old: object = None) -> object:
    """Return a value of another type or size, or one that is near `old`."""
    if isinstance(old, int | float) and not isinstance(old, bool) and random.random() < 0.4:
        return random.choice([old + 1, old - 1, old * 2, -old, float(old), str(old), old / 2])
    if isinstance(old, list) and old and random.random() < 0.4:
        return random.choice([old[:-1], old + old, old[::-1], [*old, random.choice(ODD_VALUES)]])
    return random.choice(ODD_VALUES)


def edit_json(random: Random, file: Path, keys: Sequence[str]) -> str:
    """Set, drop or add one value of a JSON file, at the top or one level down; `keys` are names that mean something there."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(tree, dict)
    except (ValueError, OSError, AssertionError, RecursionError):
        return "nothing"
    where, name = tree, file.name
    nested = [key for key, value in tree.items() if isinstance(value, dict)]
    if nested and random.random() < 0.3:
        key = random.choice(nested)
        where, name = tree[key], f"{file.name}: {key}"
    key = random.choice([*keys, *where])
    if key in where and random.random() < 0.15:
        del where[key]
        what = "is gone"
    else:
        where[key] = odd_value(random, where.get(key))
        what = f"= {str(where[key])[:60]!r}"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return f"{name}.{key} {what}"


def spoil_text(random: Random, file: Path) -> str:
    """Replace or damage a text file."""
    if not file.is_file():
        return "nothing"
    text = file.read_bytes()
    half = random.randrange(len(text) + 1)
    choices = {
        "empty": b"",
        "a list": b"[1, 2]",
        "a number": b"7",
        "null": b"null",
        "cut": text[:half],
        "no UTF-8": text[:half] + b"\xff\xfe" + text[half:],
        "a byte-order mark": b"\xef\xbb\xbf" + text,
        "nested": b"[" * 100_000,
        "nested objects": b'{"a":' * 50_000,
        "a NaN": text.replace(b": 1", b": NaN", 1),
        "a number of 5,000 digits": text.replace(b": 1", b": 1" + b"0" * 5000, 1),
        "zeros": b"\x00" * 100,
    }
    what = random.choice(sorted(choices))
    file.write_bytes(choices[what])
    return f"{file.name}: {what}"


def spoil_bytes(random: Random, file: Path) -> str:
    """Cut, lengthen or change the bytes of a file."""
    if not file.is_file():
        return "nothing"
    data = bytearray(file.read_bytes())
    what = random.choice(("cut", "cut in the header", "longer", "one byte", "length of the header", "zeros", "empty"))
    if what == "cut":
        data = data[: random.randrange(len(data) + 1)]
    elif what == "cut in the header":
        data = data[: random.randrange(min(len(data), 300) + 1)]
    elif what == "longer":
        data += bytes(random.randrange(1, 50))
    elif what == "one byte" and data:
        data[random.randrange(min(len(data), 2000))] = random.randrange(256)
    elif what == "length of the header":
        data[:8] = random.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
    elif what == "zeros":
        data[:100] = bytes(100)
    else:
        data = bytearray()
    file.write_bytes(data)
    return f"{file.name}: {what}"


def edit_header(random: Random, file: Path, names: Sequence[str]) -> str:
    """Change one entry of a safetensors header, the lengths staying right; `names` are names that mean something there."""
    try:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert isinstance(header, dict) and header
    except (ValueError, OSError, AssertionError, RecursionError):
        return "nothing"
    name = random.choice(sorted(header))
    entry = header[name] if isinstance(header[name], dict) else {}
    what = random.choice(("dtype", "shape", "offsets", "gone", "renamed", "twice", "added", "odd entry", "odd field"))
    if what == "dtype":
        entry["dtype"] = random.choice(DTYPES)
    elif what == "shape":
        entry["shape"] = random.choice([[], [0], [-1, 3], [2**62, 4], [1.5], ["a"], None, list(entry.get("shape") or [1])[::-1]])
    elif what == "offsets":
        first, end = entry.get("data_offsets") or [0, 0]
        entry["data_offsets"] = random.choice([[end, first], [first, end + 4], [first - 4, end], [0, 2**63], [first], None, [0, end]])
    elif what == "gone":
        del header[name]
    elif what == "renamed":
        header[random.choice([*names, "", "a" * 3000, "é\n\u2028"])] = header.pop(name)
    elif what in ("twice", "added"):
        header[random.choice(names)] = entry
    elif what == "odd entry":
        header[name] = odd_value(random)
    else:
        header[name] = {**entry, random.choice(["dtype", "shape", "data_offsets", "x"]): odd_value(random)}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"{file.name}: {what} of {name[:60]}"


def move_files(random: Random, directory: Path) -> str:
    """Remove or rename a file, or put a directory or a link in its place."""
    files = sorted(path for path in directory.iterdir())
    if not files:
        return "nothing"
    file = random.choice(files)
    what = random.choice(("gone", "renamed", "a directory", "a link to itself", "a link to nothing", "a link to another file", "empty"))
    other = random.choice(files)
    content = other.read_bytes() if other.is_file() else b""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink()
    if what == "renamed":
        file.with_name(f"old-{file.name}").write_bytes(content)
    elif what == "a directory":
        file.mkdir()
    elif what == "a link to itself":
        os.symlink(file.name, file)
    elif what == "a link to nothing":
        os.symlink("nowhere", file)
    elif what == "a link to another file":
        file.write_bytes(content)
    elif what == "empty":
        file.write_bytes(b"")
    return f"{file.name}: {what}"
