"""The fields of a record: those that a format uses are asked for by name, and no other is ignored in silence.

UserError says where the record stands that lacks a field, has something else in it, or has a field of REFUSED or the name of a mark
(`loss_mask`, `sample_weight`); `weight` multiplies the record's loss. A field that is neither used nor one of HARMLESS becomes a note
(encoded.py). A field that says nothing (null, "", [], {}) is as good as absent. Conversations have fields of their own besides
(chat_fields.py).
"""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress

from megatron_lora.errors import UserError, one_line

# What people keep beside a record or a turn, and what no format of any trainer trains on.
HARMLESS = frozenset(
    ("id", "_id", "idx", "index", "uid", "uuid", "__index_level_0__", "message_id", "conversation_id", "prompt_id", "source", "origin")
    + ("dataset", "subset", "split", "url", "license", "author", "date", "timestamp", "created", "created_at", "meta", "metadata")
    + ("category", "topic", "tags", "task", "lang", "language")
)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# What would change the prompt if it were used; other trainers use some of it.
REFUSED = frozenset(("system", "system_prompt", "history", "tools", "functions", "documents", "input_ids", "labels", *MEDIA))
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # of a record
# Words in the names of fields that would change the loss.
MARK_WORDS = frozenset(("train", "training", "trainable", "loss", "mask", "masked", "masks", "weight", "weights"))
SAYS_NOTHING = (None, "", [], {})


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
    if key in record:
        said = "null" if record[key] is None else "empty"
        return UserError(f"{where}: {key!r} is {said}; remove the record or complete it")
    fields = ", ".join(map(repr, record)) or "nothing"
    return UserError(f"{where}: has no {key!r} (it has {fields}); add it, or change the dataset's type")


def filled_text_of(record: Mapping[str, object], key: str, where: str) -> str:
    """Get a field that must be text with something in it."""
    value = text_of(record, key, where)
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; remove the record or complete it")
    return value


def check_other_fields(record: Mapping[str, object], used: Collection[str], where: str) -> tuple[str, ...]:
    """Return a note for each field that says something and is not used; UserError for one that would change what is trained."""
    notes = []
    for name, value in record.items():
        if name in used or value in SAYS_NOTHING or name.lower() in HARMLESS:
            continue
        if is_mark(name):
            if name not in ("weight", "train", "loss") or not isinstance(value, int | float) or value != 1:  # else it says nothing new
                remedy = "remove it, or in a conversation give turns a 'weight' of 0 or 1; a record's own 'weight' multiplies its loss"
                raise UserError(f"{where}: {name!r} is not used; {remedy}")
        elif name.lower() in REFUSED:
            raise UserError(f"{where}: {name!r} is not used by this type of dataset; remove it, or use a type that has it")
        else:
            notes.append(unused(name))
    return tuple(notes)


def weight_of(record: Mapping[str, object], where: str) -> float:
    """Get what a record's loss is multiplied by, 1 unless it says otherwise; CSV files have it as text."""
    given = record.get("weight")
    if given in SAYS_NOTHING:
        return 1.0
    with suppress(ValueError, OverflowError):
        if isinstance(given, int | float | str) and LEAST_WEIGHT <= (found := float(given)) <= MOST_WEIGHT:
            return found
    said = f"'weight' is {json.dumps(given, default=str)[:40]}"
    raise UserError(f"{where}: {said}; write a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, or remove the record")


def is_mark(name: str) -> bool:
    """Whether a field's name says that it marks what is trained, or how much."""
    return not MARK_WORDS.isdisjoint(name.lower().split("_"))


def unused(name: str, of: str = "") -> str:
    """Return the note about a field that is not used."""
    return f"field {one_line(repr(name), 40)}{of} is not used"
