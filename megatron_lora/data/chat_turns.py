"""Which characters of a rendered conversation an assistant wrote.

A template with generation marks says so itself. Most have none. They also trim contents, insert
default system prompts and drop thoughts. So turns are found by rendering the conversation once more,
with the content of every assistant turn replaced by a marker. That gives

    probe == between[0] + marker + between[1] + marker + ... + between[n],    and turns are what stands in the text where

    text  == between[0] + turn   + between[1] + turn   + ... + between[n].

Where a template writes something else around a turn because of what the turn says, that turn alone
is replaced: it is everything in which the two texts differ. For calls of tools, that is done with the
conversation up to them, since templates may want a call before its result.

A turn ends with what the template writes after every answer (Borders.closing), or where it writes
nothing, with an added token that follows. It begins at the thought that the record wrote.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_lora.data.chat_template import Borders, Span
from megatron_lora.errors import UserError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # (messages, up to the prompt for an answer) -> text
THOUGHT_TAGS = ("<think>", "<thinking>", "<thought>", "[THINK]", "<|START_THINKING|>")


def assistant_spans(text: str, messages: Sequence[Mapping[str, Any]], render: Render, borders: Borders, where: str) -> dict[int, Span]:
    """Find each assistant message's content in the rendered `text`: number of the message -> its span, in order."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    between = _between(text, messages, turns, render)
    spans: dict[int, Span] = {}
    position = len(between[0]) if between and text.startswith(between[0]) else None
    floor = 0
    for number, turn in enumerate(turns):
        after = between[number + 1] if between else ""
        end = None if position is None else _end_of(text, position, messages[turn], between[number + 1 :])
        span = Span(position, end) if position is not None and end is not None else _alone(text, messages, turn, floor, render, where)
        if span.start > span.end or span.start < floor:
            raise UserError(f"{where}: message {turn + 1} is not found in what the chat template makes of the record; leave it out")
        spans[turn] = _from_its_start(text, messages[turn], span, floor, borders)
        floor = span.end
        position = span.end + len(after) if between and text.startswith(after, span.end) else None
    return spans


def _between(text: str, messages: Sequence[Mapping[str, Any]], turns: Sequence[int], render: Render) -> list[str]:
    """Return what stands around the turns where all of them are replaced by markers; empty where that does not show each once."""
    stem = absent("turn", text)
    probe = [
        _replaced(message, f"{stem}x{index}x") if message["role"] == "assistant" else message for index, message in enumerate(messages)
    ]
    try:
        pieces = re.split(rf"{stem}x(\d+)x", render(probe, False))
    except UserError:  # it looks at calls of tools, which are replaced too
        return []
    return pieces[::2] if pieces[1::2] == [str(turn) for turn in turns] else []


def _end_of(text: str, start: int, message: Mapping[str, Any], between: Sequence[str]) -> int | None:
    """Return where a turn that begins at `start` ends, if the first of `between` follows it, and the others the later turns."""
    content, after, last = message["content"], between[0], len(between) == 1
    answer = content.rpartition("</think>")[2]
    for piece in (content, content.strip(), answer, answer.strip(), answer.lstrip("\n"), content.lstrip(), content.rstrip()):
        end = start + len(piece)
        if text.startswith(piece, start) and text.startswith(after, end) and (not last or end + len(after) == len(text)):
            return end
    if last:
        end = len(text) - len(after)
        return end if end >= start and text.endswith(after) else None
    if not after.strip() or text.count(after, start) != sum(piece.count(after) for piece in between):
        return None  # the turn itself says what follows turns, or a thought stands where a replaced turn has none
    end = text.find(after, start)
    return end if end >= 0 else None


def _alone(text: str, messages: Sequence[Mapping[str, Any]], turn: int, floor: int, render: Render, where: str) -> Span:
    """Find one turn by a rendering of its own, in which it is replaced."""
    if "tool_calls" not in messages[turn]:
        return _differing(text, messages, turn, render, where)
    # What follows a call may name it, or want it. Of the last turn a template may show the thought, and not of an earlier one.
    found = []
    for message in (messages[turn], _without_thought(messages[turn])) if thought_of(messages[turn]) else (messages[turn],):
        until = [*messages[:turn], message]
        shown = render(until, False)
        span = _differing(shown, until, turn, render, where)
        said = shown[span.start :].rstrip() if span.closed else shown[span.start : span.end]
        position = text.find(said, floor) if said else -1
        if position >= 0:
            found.append(Span(position, position + len(said), span.closed))
    return min(found, default=Span(floor, -1))


def _differing(shown: str, messages: Sequence[Mapping[str, Any]], turn: int, render: Render, where: str) -> Span:
    """Return where a rendering of the messages is another when one turn is replaced; closed: the turn has an end of its own."""
    marker = absent("turn", shown)
    before, found, after = render([*messages[:turn], _replaced(messages[turn], marker), *messages[turn + 1 :]], False).partition(marker)
    if not found or marker in after:
        raise UserError(f"{where}: the chat template does not show message {turn + 1} once; leave it out of the record")
    start, suffix = common_start(shown, before), common_start(shown[::-1], after[::-1])
    return Span(start, len(shown) - suffix, closed=suffix < len(after))


def _without_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return an assistant's message without what it thought."""
    said = {name: value for name, value in message.items() if name not in ("reasoning_content", "thinking")}
    return said | {"content": message["content"].rpartition("</think>")[2].lstrip("\n")}


def _replaced(message: Mapping[str, Any], marker: str) -> dict[str, Any]:
    """Return an assistant's message that says `marker` alone."""
    return {name: value for name, value in message.items() if name in ("role", "name")} | {"content": marker}


def absent(stem: str, text: str) -> str:
    """Return `stem` with the first number with which it does not stand in the text."""
    return next(found for number in itertools.count() if (found := f"{stem}{number}") not in text)


def _from_its_start(text: str, message: Mapping[str, Any], span: Span, floor: int, borders: Borders) -> Span:
    """Let a turn begin with what leads to its text, or where the thought is opened that the record wrote and the template shows."""
    if not shows_thought(message, text[span.start : span.end]):
        led = text.endswith(borders.lead, floor, span.start) and not span.closed
        return span._replace(start=span.start - len(borders.lead)) if led else span
    opened = text.rfind(borders.opening, floor, span.start) if borders.opening else -1
    if opened >= 0:
        return span._replace(start=opened + len(borders.opening))
    head = text[floor : span.start].rstrip()
    tag = next((tag for tag in THOUGHT_TAGS if head.endswith(tag)), "")
    return span._replace(start=floor + len(head) - len(tag)) if tag else span


def thought_of(message: Mapping[str, Any]) -> str:
    """Return the thought that an assistant's message holds, in a field or before </think>; empty without one."""
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip()
    before, found, _ = message["content"].partition("</think>")
    return before.rpartition("<think>")[2].strip() if found else ""


def shows_thought(message: Mapping[str, Any], said: str) -> bool:
    """Whether what a template makes of a message, `said`, has the message's thought before its answer."""
    thought, answer = thought_of(message), message["content"].rpartition("</think>")[2].strip()
    return bool(thought) and thought in said[: max(0, said.rfind(answer))]


def common_start(one: str, other: str) -> int:
    """Return how many characters two texts share at their start, by comparing halves."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low + 1 < high:  # one[:low] == other[:low] and one[:high] != other[:high]
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


class Tokens(NamedTuple):
    """A text's tokens: ids [L], and the characters where each one's text starts and ends [L]."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def tokens_of(text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Tokens:
    """Return the tokens of a text; a token's text starts after the spaces that mark the start of a word (" yes" is one token)."""
    spans = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
    starts, ends = spans[:, 0], spans[:, 1]
    letters = np.frombuffer(f"{text}.".encode("utf-32-le", "surrogatepass"), dtype=np.uint32)  # one more, for a token at the end
    words, spaces = starts.copy(), letters[starts] == ord(" ")
    while spaces.any():
        words[spaces] += 1
        spaces &= words < ends
        spaces &= letters[words] == ord(" ")
    return Tokens(text, np.asarray(ids, dtype=np.int32), np.where(words < ends, words, starts), ends)


def end_of_turn(tokens: Tokens, span: Span, borders: Borders, closing: frozenset[int]) -> int:
    """Return where a turn ends with its mark: Borders.closing, or a token of `closing` that follows."""
    text, end = tokens.text, span.end
    if span.closed:
        return end
    if borders.closing and text.startswith(borders.closing, end):
        return end + len(borders.closing)
    first = int(np.searchsorted(tokens.starts, end))
    for index in range(first, len(tokens.ids)):
        start, stop = int(tokens.starts[index]), int(tokens.ends[index])
        if text[end:start].strip():
            break
        if text[start:stop].strip():
            return stop if int(tokens.ids[index]) in closing else end
    return end


def inside(positions: np.ndarray, spans: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return which positions [L] lie in one of the ascending, disjoint half-open spans: bool [L]."""
    if not spans:
        return np.zeros(len(positions), dtype=bool)
    starts, ends = np.array(spans, dtype=np.int64)[:, :2].T
    span = np.searchsorted(starts, positions, side="right") - 1
    return (span >= 0) & (positions < ends[span])
