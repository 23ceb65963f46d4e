"""Chat templates: a conversation to text, and which characters of that text an assistant wrote.

Most templates do not mark assistant turns. They also trim contents, insert default system prompts
and drop thoughts. So a turn is found by rendering the conversation once more, with turn i's content
replaced by a marker. That gives `before + marker + after`, and the turn is what stands between
`before` and `after` in the real text:

    text == before + turn + after.

Where a template derives more than one piece from a turn (thoughts and answer), the turn is
everything that differs. A turn includes its end-of-turn token: the first added token of the
tokenizer after the content, if only white space stands between them.
"""

import datetime
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.errors import UserError

Message = Mapping[str, str]
# The date given to templates that print today's: equal records must give equal tokens on any day. Llama's templates default to it.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
# Templates call strftime_now(format). Transformers passes them data, not functions, so ours is a macro (whose newline jinja trims).
STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{letter}', '{TEMPLATE_DATE.strftime('%' + letter)}')" for letter in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}\n"
)


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """List the tokens that can end a turn: the added ones and eos, without a bos that is not also the eos."""
    opening = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    return frozenset({*tokenizer.added_tokens_decoder, tokenizer.eos_token_id} - opening)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], closing: frozenset[int], where: str
) -> tuple[list[int], np.ndarray]:
    """Tokenise a conversation: ids [L], and bool [L] for those of assistant turns; UserError begins with `where`."""
    text = render(tokenizer, messages, where)
    spans = assistant_spans(text, messages, lambda probe: render(tokenizer, probe, where), where)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    starts = np.array([text_start(text, start, end) for start, end in offsets], dtype=np.int64)
    return ids, inside(starts, [(start, end_of_turn(text, ids, offsets, end, closing)) for start, end in spans])


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> str:
    """Apply the tokenizer's chat template to a conversation; UserError when the template refuses it."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = STRFTIME_NOW + template
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], chat_template=template, tokenize=False)
    except Exception as error:  # the template is the model's own program: whatever it raises, it refuses this record
        roles = ", ".join(message["role"] for message in messages[:6]) + (", ..." if len(messages) > 6 else "")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{where}: the base model's chat template refuses this conversation of {roles}: {reason.rstrip('.')}; change the record's roles"
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
            raise UserError(f"{where}: the base model's chat template does not show message {index + 1} once; leave it out of the record")
        start = len(os.path.commonprefix((text, before)))
        end = len(text) - len(os.path.commonprefix((text[::-1], after[::-1])))
        if start > end or start < spans[-1][1]:
            raise UserError(f"{where}: message {index + 1} is not found in what the base model's chat template makes of the record")
        spans.append((start, end))
    return spans[1:]


def text_start(text: str, start: int, end: int) -> int:
    """Return the character at which a token's text starts, after the spaces that mark the start of a word (" yes" is one token)."""
    piece = text[start:end]
    word = piece.lstrip(" ")
    return end - len(word) if word else start


def end_of_turn(text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], end: int, closing: frozenset[int]) -> int:
    """Return the end of a turn whose content ends at character `end`, with the end-of-turn token if the template writes one."""
    first = int(np.searchsorted([start for start, _ in offsets], end))
    for token, (start, stop) in zip(ids[first:], offsets[first:], strict=True):
        if text[end:start].strip():
            return end
        if text[start:stop].strip():
            return stop if token in closing else end
    return end


def inside(positions: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which positions [L] lie in one of the ascending, disjoint half-open spans: bool [L]."""
    if not spans:
        return np.zeros(len(positions), dtype=bool)
    starts, ends = np.array(spans, dtype=np.int64).T
    span = np.searchsorted(starts, positions, side="right") - 1
    return (span >= 0) & (positions < ends[span])
