"""A plain text to tokens, with the special tokens exactly once each, whether the text or the tokenizer writes them, or neither does.

    opening    what the tokenizer's post-processor writes before a text (mostly bos, or nothing)
    closing    what it writes after one, and eos, which every sample ends with

    tokens = opening + body + closing

A body that begins with tokens of the opening loses them and the white space before them; likewise at its end. So
`"<s>hello</s>\n"` gives what `"hello"` gives, but for the mark of a word that some tokenizers write at a text's very start alone.
Where the tokenizer writes no bos, a text that begins with one keeps it. Special tokens inside a text stay.
"""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.chat_turns import tokens_of
from megatron_lora.data.encoded import Encoded
from megatron_lora.errors import UserError

REPEATED = "a bos or eos that the text itself has is written once"
MERGED = "the completion's first characters belong to the prompt's last token, which is not trained"


class TextTokenizer:
    """Turns texts into tokens with one tokenizer, which must have an eos."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        ids, added = _probe(tokenizer)
        num_opening, num_closing = added.index(0), added[::-1].index(0)
        closing = ids[len(ids) - num_closing :]
        bos, eos = cast(int | None, tokenizer.bos_token_id), cast(int, tokenizer.eos_token_id)
        self._tokenizer_closes = bool(closing)
        self._opening: tuple[int, ...] = tuple(ids[:num_opening])
        self._closing: tuple[int, ...] = tuple(closing) if eos in closing else (*closing, eos)
        self._bos = () if bos is None else (bos,)
        self._openers = frozenset(self._opening or self._bos)
        self._closers = frozenset(self._closing)

    def encode(self, prompt: str, completion: str) -> Encoded | None:
        """Encode a text in two parts, of which the second has the targets.

        None where the text, or its second part, has nothing but white space and special tokens. A token begins where its text does,
        after the spaces that mark the start of a word.
        """
        text, border = prompt + completion, len(prompt)
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]

        def is_blank(i: int) -> bool:
            start, end = offsets[i]
            return not text[start:end].strip()

        first = _run(range(len(ids)), ids, is_blank, self._openers)
        last = len(ids) - _run(range(len(ids) - 1, -1, -1), ids, is_blank, self._closers)
        if all(offsets[i][1] <= border or is_blank(i) for i in range(last - 1, first - 1, -1)):
            return None
        opening = self._opening or (self._bos if first else ())
        body = tokens_of(text, ids[first:last], offsets[first:last])
        begins_after = body.starts >= border
        merged = bool(prompt) and bool((~begins_after & (body.ends > border)).any())
        repeated = first > (not self._opening) or len(ids) - last > (not self._tokenizer_closes)
        tokens = np.array([*opening, *ids[first:last], *self._closing], dtype=np.int32)
        targets = np.concatenate([np.zeros(len(opening), bool), begins_after, np.ones(len(self._closing), bool)])
        return Encoded(tokens, targets, (REPEATED,) * repeated + (MERGED,) * merged)


def _probe(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokenise any text that has a token of its own: the ids, and 1 for those that the post-processor adds, else 0."""
    for text in ("a", *tokenizer.get_vocab()):
        probe = tokenizer(text, return_special_tokens_mask=True)
        if 0 in probe["special_tokens_mask"]:
            return cast(list[int], probe["input_ids"]), cast(list[int], probe["special_tokens_mask"])
    raise UserError("base_model: its tokenizer makes no token of any text; copy its tokenizer.json again from where the model came from")


def _run(positions: range, ids: Sequence[int], is_blank: Callable[[int], bool], marks: frozenset[int]) -> int:
    """Return how many tokens the text has up to the last mark of its first run of marks; white space may stand around them."""
    end = 0
    for count, position in enumerate(positions, 1):
        if ids[position] in marks:
            end = count
        elif not is_blank(position):
            break
    return end
