"""A record with two answers, of which one was preferred, to a pair: the prompt with `chosen`, then the prompt with `rejected`.

    preference         {prompt, chosen, rejected}     texts, tokenised as prompt_completion; or lists of turns, as messages
    preference_chat    the same, with `system`        texts, which become turns of a conversation

Without a prompt the answers hold it: it is what they begin with in common (TRL's implicit prompt: in texts up to the first character that
differs, or the space before it). Other names that public sets have for the same: `question` or `instruction` (with `input`),
`chosen_response`, `rejected_response`; turns in `messages` or `conversations` are the prompt of answers of one turn. The targets of each
sequence are those of its answer. The two share the prompt's tokens before the first of their targets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_lora.data.chat_records import ChatEncoder
from megatron_lora.data.encoded import Encoded
from megatron_lora.data.record_fields import SAYS_NOTHING, check_other_fields, filled_text_of, missing, text_of
from megatron_lora.data.text_tokens import TextTokenizer
from megatron_lora.errors import UserError

PROMPTS = ("prompt", "question", "instruction")
CHOSEN, REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
TURNS = ("messages", "conversations")
Record = Mapping[str, object]


class PreferenceEncoder:
    """Turns records with two answers into pairs; UserError says where a record stands that cannot be trained on."""

    def __init__(self, texts: TextTokenizer, chats: ChatEncoder):
        self._texts = texts
        self._chats = chats

    def encode(self, record: Record, format: str, where: str) -> Encoded:
        """Encode a complete record."""
        chosen, rejected = (_name_of(record, names, where) for names in (CHOSEN, REJECTED))
        if record[chosen] == record[rejected]:
            raise UserError(f"{where}: {chosen!r} and {rejected!r} are the same; remove the record")
        in_turns = isinstance(record[chosen], list | dict)
        if in_turns != isinstance(record[rejected], list | dict):
            raise UserError(f"{where}: {chosen!r} and {rejected!r} are a text and a list of turns; write both as one of them")
        conversation = in_turns or format == "preference_chat"
        answers = (self._conversations if conversation else self._plain)(record, chosen, rejected, where)
        return _pair(*answers, where)

    def _plain(self, record: Record, chosen: str, rejected: str, where: str) -> tuple[Encoded, Encoded]:
        prompt, used = _prompt_text(record, where)
        notes = check_other_fields(record, (*used, chosen, rejected), where)
        texts = [filled_text_of(record, name, where) for name in (chosen, rejected)]
        if not used:
            at = _common_start(*texts)
            prompt, texts = texts[0][:at], [text[at:] for text in texts]
        found = []
        for name, text in zip((chosen, rejected), texts, strict=True):
            encoded = self._texts.encode(prompt, text)
            if encoded is None:
                raise UserError(f"{where}: {name!r} gives no tokens but special ones; remove the record or complete it")
            found.append(encoded)
        return Encoded(found[0].tokens, found[0].targets, notes + found[0].notes + found[1].notes), found[1]

    def _conversations(self, record: Record, chosen: str, rejected: str, where: str) -> tuple[Encoded, Encoded]:
        prompt, answers, used = _turns(record, chosen, rejected, where)
        rest = {name: value for name, value in record.items() if name not in (*used, chosen, rejected)}
        notes = check_other_fields({name: rest.pop(name) for name in ("prompt", "completion") if name in rest}, (), where)
        found = []
        for name, answer in zip((chosen, rejected), answers, strict=True):
            turns = {"prompt": prompt, "completion": answer}
            encoded = self._chats.encode(rest | turns, "prompt_completion", False, where)
            if not encoded.targets.any():
                raise UserError(f"{where}: {name!r} has no assistant turn with content; remove the record or complete it")
            found.append(encoded)
        return Encoded(found[0].tokens, found[0].targets, tuple(dict.fromkeys(notes + found[0].notes + found[1].notes))), found[1]


def _pair(chosen: Encoded, rejected: Encoded, where: str) -> Encoded:
    """Join two sequences; their prompt is what they share before the first target of either."""
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise UserError(f"{where}: its two answers give the same tokens; remove the record")
    most = min(int(each.targets.argmax()) for each in (chosen, rejected))
    differs = np.flatnonzero(chosen.tokens[:most] != rejected.tokens[:most])
    targets = np.concatenate([chosen.targets, rejected.targets])
    border = len(chosen.tokens)
    targets[[0, border]] = False
    return Encoded(
        np.concatenate([chosen.tokens, rejected.tokens]), targets, chosen.notes, border, int(differs[0]) if len(differs) else most
    )


def _name_of(record: Record, names: Sequence[str], where: str) -> str:
    """Return the first of some names that a record has something under."""
    found = next((name for name in names if record.get(name) not in SAYS_NOTHING), None)
    if found is None:
        raise missing(record, names[0], where)
    return found


def _prompt_text(record: Record, where: str) -> tuple[str, tuple[str, ...]]:
    """Return a record's prompt and the fields that it stands in; none where the answers hold it."""
    name = next((name for name in PROMPTS if record.get(name) not in SAYS_NOTHING), None)
    if name is None:
        return "", ()
    if name != "instruction" or record.get("input") in SAYS_NOTHING:
        return text_of(record, name, where), (name,)
    return f"{text_of(record, name, where)}\n{text_of(record, 'input', where)}", (name, "input")


def _turns(record: Record, chosen: str, rejected: str, where: str) -> tuple[list[Any], list[list[Any]], tuple[str, ...]]:
    """Return the turns of the prompt and of both answers, and the fields that the prompt stands in."""
    answers, text = [_as_turns(record[name]) for name in (chosen, rejected)], ""
    listed = next((name for name in ("prompt", *TURNS) if isinstance(record.get(name), list) and record[name]), None)
    if listed == "prompt" or (listed and all(len(answer) == 1 for answer in answers)):
        prompt, used = _as_turns(record[listed]), (listed,)
    else:
        text, used = _prompt_text(record, where)
        prompt = [{"role": "user", "content": text}] if used and all(len(answer) == 1 for answer in answers) else []
    if not prompt:
        longest = min(map(len, answers))
        at = next((i for i in range(longest) if answers[0][i] != answers[1][i]), longest)
        prompt = answers[0][:at]
        if text and all(text not in (turn.get("content"), turn.get("value")) for turn in prompt if isinstance(turn, dict)):
            used = ()  # the answers begin with another prompt
    hold_prompt = {answer[: len(prompt)] == prompt for answer in answers}
    if hold_prompt == {True}:
        answers = [answer[len(prompt) :] for answer in answers]
    if not prompt or not all(answers) or len(hold_prompt) > 1:
        raise UserError(f"{where}: {chosen!r} and {rejected!r} do not begin with one prompt and then differ; add a 'prompt'")
    return prompt, answers, used


def _as_turns(value: object) -> list[Any]:
    """Return a list of turns, or one turn, or an answer's text, as a list of turns."""
    if isinstance(value, list):
        return value
    return [value if isinstance(value, dict) else {"role": "assistant", "content": value}]


def _common_start(one: str, other: str) -> int:
    """Return where the answers begin in two texts that begin with the same prompt."""
    longest = min(len(one), len(other))
    at = next((i for i in range(longest) if one[i] != other[i]), longest - 1)
    return at - 1 if at and one[at - 1] == " " else at
