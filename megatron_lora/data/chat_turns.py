"""Chat templates: a whole conversation to text, and which characters of it an assistant wrote.

Most templates mark no assistant turns, and they trim, insert default system prompts and drop thoughts as they please, so turns are
found by asking the template itself: rendering once more with turn i's content replaced by a marker gives `before + marker + after`,
and what stands between `before` and `after` in the real text is the turn,

    text == before + turn + after.

Where a template derives more than one piece from a turn (thoughts and answer), the turn is all that differs. A turn's characters go on
to the end of its end-of-turn token: the first added token of the tokenizer behind it, white space apart.
"""

import datetime
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.errors import UserError

Message = Mapping[str, str]
# What templates that print today's date are told: equal rows must give equal tokens on any day. Llama's templates default to it too.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
# Templates call strftime_now(format); transformers hands them data alone, so ours is a macro (whose newline jinja trims).
STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{letter}', '{TEMPLATE_DATE.strftime('%' + letter)}')" for letter in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}\n"
)


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """List the tokens that can end a turn: the added ones, less one that only ever opens a text."""
    opening = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    return frozenset({*tokenizer.added_tokens_decoder, tokenizer.eos_token_id} - opening)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], closing: frozenset[int], where: str
) -> tuple[list[int], np.ndarray]:
    """Tokenise a conversation: its ids, and which of them [L] bool belong to assistant turns; UserError names `where`."""
    text = render(tokenizer, messages, where)
    spans = assistant_spans(text, messages, lambda probe: render(tokenizer, probe, where), where)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    begins = np.array([begin_of(text, start, end) for start, end in offsets], dtype=np.int64)
    return ids, inside(begins, [(start, end_of_turn(text, ids, offsets, end, closing)) for start, end in spans])


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> str:
    """Apply the tokenizer's chat template to a whole conversation; UserError when the template refuses it."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = STRFTIME_NOW + template
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], chat_template=template, tokenize=False)
    except Exception as error:  # a template is a program of the model's: whatever it raises, it does not take this row
        roles = ", ".join(message["role"] for message in messages[:6]) + (", ..." if len(messages) > 6 else "")
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{where}: the base model's chat template refuses this conversation of {roles}: {said.rstrip('.')}; change the row's roles"
        ) from None


def assistant_spans(
    text: str, messages: Sequence[Message], render_again: Callable[[Sequence[Message]], str], where: str
) -> list[tuple[int, int]]:
    """Find the characters (start, end) of each assistant turn's content in the rendered `text`, in order."""
    marker = "turn0"
    while marker in text:
        marker = f"turn{int(marker[4:]) + 1}"
    spans = [(0, 0)]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        probe = [*messages[:index], {**message, "content": marker}, *messages[index + 1 :]]
        before, found, after = render_again(probe).partition(marker)
        if not found or marker in after:
            raise UserError(f"{where}: the base model's chat template does not show message {index + 1} once; leave it out of the row")
        start = len(os.path.commonprefix((text, before)))
        end = len(text) - len(os.path.commonprefix((text[::-1], after[::-1])))
        if start > end or start < spans[-1][1]:
            raise UserError(f"{where}: message {index + 1} is not found in what the base model's chat template makes of the row")
        spans.append((start, end))
    return spans[1:]


def begin_of(text: str, start: int, end: int) -> int:
    """Give the character at which a token's own text begins: behind the spaces that mark a word's start (" yes" is one token)."""
    piece = text[start:end]
    word = piece.lstrip(" ")
    return end - len(word) if word else start


def end_of_turn(text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], end: int, closing: frozenset[int]) -> int:
    """Extend a turn that ends at character `end` over its end-of-turn token, if its template writes one."""
    first = int(np.searchsorted([start for start, _ in offsets], end))
    for token, (start, stop) in zip(ids[first:], offsets[first:], strict=True):
        if text[end:start].strip():
            return end
        if text[start:stop].strip():
            return stop if token in closing else end
    return end


def inside(places: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Say which places [L] lie in one of the ascending, disjoint half-open spans: [L] bool."""
    if not spans:
        return np.zeros(len(places), dtype=bool)
    starts, ends = np.array(spans, dtype=np.int64).T
    span = np.searchsorted(starts, places, side="right") - 1
    return (span >= 0) & (places < ends[span])
