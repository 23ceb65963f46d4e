"""A record that is a conversation, in any way of writing it, to its tokens and targets.

    messages    {messages: [{role, content}]}
    sharegpt    {conversations: [{from, value}]}

chat_fields.py reads the fields, chat_template.py renders them, chat_turns.py finds the turns that are
trained, and left_out.py what does not show.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.chat_fields import Conversation, read_conversation
from megatron_lora.data.chat_template import ChatSettings, ChatTemplate, Message
from megatron_lora.data.chat_turns import assistant_spans, end_of_turn, inside, tokens_of
from megatron_lora.data.encoded import Encoded
from megatron_lora.data.left_out import EMPTY_ANSWER, NAMES, NO_END, NO_END_IN_MARKS, TOOLS, LeftOut
from megatron_lora.data.record_fields import complete
from megatron_lora.errors import UserError


class ChatEncoder:
    """Turns conversations into tokens and targets with one tokenizer; UserError says where a record stands that cannot be trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, settings)
        self._left_out = LeftOut()
        self._train_on = settings.train_on
        added = tokenizer.added_tokens_decoder
        bos, eos = (cast(int, token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))  # None, if there is none, is no token
        # The tokens that can end a turn: the added ones and eos, without a bos that is not also the eos.
        self._closing = frozenset({*added, eos} - ({bos} - {eos}))

    def encode(self, record: Mapping[str, object], format: str, train_on_inputs: bool, where: str) -> Encoded:
        """Encode a conversation; its targets are all False where no assistant turn that is trained says anything."""
        chat = read_conversation(record, format, self._train_on, where)
        for message, untrained in zip(chat.messages, chat.untrained, strict=True):
            if train_on_inputs and untrained and message["role"] != "assistant":
                why = f"a turn of {message['role']!r} is marked untrained"
                raise UserError(f"{where}: {why}; set train_on_inputs: false, or remove the mark")
        try:
            self._template.text(chat.tools)
        except ValueError:  # of other types than prompt_completion and kto it is missed before any record is read
            remedy = "use an instruct model, write prompt and completion as text, or set the job's chat_template"
            raise UserError(f"{where}: is a conversation, and the base model's tokenizer has no chat template; {remedy}") from None
        text, marks = self._template.render_marked(chat.messages, chat.tools, chat.kwargs, where)
        complete(text, "the conversation", where)  # also what a tool or a call says

        def render(messages, prompt: bool) -> str:
            return self._template.render(messages, chat.tools, chat.kwargs, where, prompt)

        borders = self._template.borders(chat.kwargs)
        assistants = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if marks is not None and len(marks) == len(assistants):
            spans = dict(zip(assistants, marks, strict=True))
        else:
            spans = assistant_spans(text, chat.messages, render, borders, where)
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = tokens_of(text, encoding["input_ids"], encoding["offset_mapping"])
        turns = {turn: (span.start, end_of_turn(tokens, span, borders, self._closing)) for turn, span in spans.items()}
        trained, others = ([turn for turn in turns if chat.trained[turn] == is_trained] for is_trained in (True, False))

        notes = [*chat.notes, *(f"{name!r} is not used by the chat template" for name in self._template.unknown(chat.kwargs))]
        notes += self._left_out.notes(text, chat, spans, render, borders)
        if chat.tools and not self._differs(text, chat.messages, None, chat, where):
            notes.append(TOOLS)
        if any("name" in message for message in chat.messages):
            nameless = [{key: value for key, value in message.items() if key != "name"} for message in chat.messages]
            if not self._differs(text, nameless, chat.tools, chat, where):
                notes.append(NAMES)
        if not all(_says_something(chat.messages[turn]) for turn in trained):
            notes.append(EMPTY_ANSWER)
        if train_on_inputs:
            targets = ~inside(tokens.starts, [turns[turn] for turn in turns if chat.untrained[turn]])
        elif not any(_says_something(chat.messages[turn]) for turn in trained):
            targets = np.zeros(len(tokens.ids), dtype=bool)
        elif marks is None:
            targets = inside(tokens.starts, [turns[turn] for turn in trained])
            if not borders.closing and all(turns[turn][1] == spans[turn].end and not spans[turn].closed for turn in trained):
                notes.append(NO_END)
        else:
            kept = [mark for mark in marks if not any(mark.start <= turns[turn][0] < mark.end for turn in others)]
            targets = inside(tokens.starts, kept)
            if borders.closing and any(text.startswith(borders.closing, mark.end) for mark in kept):
                notes.append(NO_END_IN_MARKS)
        return Encoded(tokens.ids, targets, tuple(dict.fromkeys(notes)))

    def _differs(self, text: str, messages: Sequence[Message], tools: list[Any] | None, chat: Conversation, where: str) -> bool:
        """Whether a conversation's text is another with these messages and tools."""
        try:
            return self._template.render(messages, tools, chat.kwargs, where) != text
        except UserError:  # it wants what is not there
            return True


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))
