"""Command lines of the scripts: their options' values, and complaints of one line with exit status 2."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_lora.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line and ends with status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def ended(main: Callable[[], int | None]) -> int:
    """Call a script's main; return its exit status, 2 with one line for what the user has to mend."""
    try:
        return main() or 0
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2


def whole(text: str) -> int:
    """Read a number of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def positive(text: str) -> float:
    """Read a number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def share(text: str) -> float:
    """Read a number of at least 0 and below 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


def _number(text: str, kind: type, allowed: Callable[[float], bool], words: str):
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from None
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text} is not {words}")
    return value


def numbers(kind: Callable[[str], object]):
    """Read values with commas between them."""

    def read(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    return read


def output_file(text: str) -> Path:
    """Read the path of a file to be written or added to."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory; name a file")
    return path


def folder(text: str) -> Path:
    """Read the path of a folder, which need not be there yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file; name a folder")
    return path


def json_lines(path: Path, remedy: str = "name a file of JSON lines") -> list[dict]:
    """Return the objects of a file of JSON lines; UserError, with what to do about it, where it cannot be read."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    if not all(isinstance(line, dict) for line in found):
        raise UserError(f"{path}: has lines that are no objects; name a file of results")
    return found


def need_gpus(parser: argparse.ArgumentParser, count: int = 1) -> None:
    """End with one line where fewer GPUs are visible."""
    import torch

    if torch.cuda.device_count() < count:
        parser.error(f"needs {'a GPU' if count == 1 else f'{count} GPUs'}, and {torch.cuda.device_count() or 'none'} is visible")
