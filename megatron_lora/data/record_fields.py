"""The fields of a record: each is asked for by name, and UserError says where the record stands that has none, or something else in it."""

import json
from collections.abc import Mapping

from megatron_lora.errors import UserError


def text_of(record: Mapping[str, object], key: str, where: str) -> str:
    """Get a field that must be text."""
    value = record.get(key)
    if value is None:
        raise missing(record, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {json.dumps(value, default=str)[:40]}; write it as text")
    return complete(value, repr(key), where)


def complete(text: str, what: str, where: str) -> str:
    """Return a text that is made of complete characters; UserError otherwise, which calls it `what`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {what} holds half of a character (a lone surrogate escape); remove it") from None
    return text


def missing(record: Mapping[str, object], key: str, where: str) -> UserError:
    """Return the error for a field that a record does not have."""
    fields = ", ".join(map(repr, record)) or "nothing"
    return UserError(f"{where}: has no {key!r} (it has {fields}); add it, or change the dataset's type")


def filled_text_of(record: Mapping[str, object], key: str, where: str) -> str:
    """Get a field that must be text with something in it."""
    value = text_of(record, key, where)
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; remove the record or complete it")
    return value
