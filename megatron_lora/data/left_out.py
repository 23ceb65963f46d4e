"""What a chat template leaves out of a conversation, as notes: the tokens are transformers', and nothing of it goes in silence.

A message is shown where a marker behind its text comes out of the template. That is tried once for each order
of roles, and again with the record itself where one of its messages is not found between the assistant
turns around it.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_lora.data.chat_fields import Conversation
from megatron_lora.data.chat_template import Borders, Span
from megatron_lora.data.chat_turns import Render, absent, shows_thought, thought_of
from megatron_lora.errors import UserError

SYSTEM = "system prompt left out"
MESSAGE = "turn of {} left out"
TOOLS = "tools left out"
NAMES = "names of turns left out"
CALLS = "calls of tools left out"
EARLIER_THOUGHTS = "thoughts of earlier turns left out"
LAST_THOUGHT = "thought of the last turn left out"
NO_THOUGHT = "no thought in an answer for which the template writes an empty one or asks for one"
EMPTY_ANSWER = "an answer without content is trained to end at once"
NO_END = "no end of a turn is trained, because the chat template writes none"
NO_END_IN_MARKS = "no end of a turn is trained, because the chat template's generation marks leave it out"
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*$")


class LeftOut:
    """Finds what one template leaves out."""

    def __init__(self):
        self._shows_all: dict[tuple, bool] = {}  # order of roles, and with or without tools -> whether the template shows all messages

    def notes(self, text: str, chat: Conversation, spans: Mapping[int, Span], render: Render, borders: Borders) -> list[str]:
        """List what is not in the rendered text, each note once."""
        roles = tuple(message["role"] for message in chat.messages)
        shape = (roles, chat.tools is None, str(chat.kwargs))
        if shape not in self._shows_all:
            self._shows_all[shape] = not _not_shown(text, [{"role": role, "content": "x"} for role in roles], render)
        notes = [] if self._shows_all[shape] and _in_place(text, chat.messages, spans) else _not_shown(text, chat.messages, render)
        return list(dict.fromkeys([*notes, *_not_said(text, chat, spans, borders)]))


def _not_said(text: str, chat: Conversation, spans: Mapping[int, Span], borders: Borders) -> list[str]:
    """List what of the assistant's turns is not in the rendered text."""
    notes = []
    turns = list(spans)
    for turn, span in spans.items():
        message, turn_text = chat.messages[turn], text[span.start : span.end]
        if thought_of(message) and not shows_thought(message, turn_text):
            notes.append(LAST_THOUGHT if turn == turns[-1] else EARLIER_THOUGHTS)
        if any(call["function"]["name"] not in turn_text for call in message.get("tool_calls", ())):
            notes.append(CALLS)
    if turns and not thought_of(chat.messages[turns[-1]]):
        start = spans[turns[-1]].start
        if borders.opens_thought or EMPTY_THOUGHT.search(text, max(0, start - 100), start):
            notes.append(NO_THOUGHT)
    return notes


def _in_place(text: str, messages: list[dict[str, Any]], spans: Mapping[int, Span]) -> bool:
    """Whether each message that is not the assistant's stands between the turns around it, in order."""
    position = 0
    limits = iter([*(span.start for span in spans.values()), len(text)])
    limit = next(limits)
    for index, message in enumerate(messages):
        if index in spans:
            position, limit = spans[index].end, next(limits)
            continue
        content = message["content"].strip()
        found = text.find(content, position, limit)
        if found < 0:
            return False
        position = found + len(content)
    return True


def _not_shown(text: str, messages: list[dict[str, Any]], render: Render) -> list[str]:
    """List the messages whose text does not come out of the template."""
    stem = absent("message", text) + "x"
    marked = [
        message | {"content": f"{message['content']}{stem}{index}x"}
        if message["role"] != "assistant" and message["content"].strip()
        else message
        for index, message in enumerate(messages)
    ]
    try:
        shown = render(marked, False)
    except UserError:  # it takes no such text, as in place of a call: what is not seen to come out counts as left out
        shown = text
    roles = [message["role"] for index, message in enumerate(messages) if message is not marked[index] and f"{stem}{index}x" not in shown]
    return [SYSTEM if role in ("system", "developer") else MESSAGE.format(role) for role in roles]
