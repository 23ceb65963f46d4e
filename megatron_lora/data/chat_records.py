"""A record that is a conversation, in either way of writing it, to its tokens and targets.

    messages    {messages: [{role, content}]}
    sharegpt    {conversations: [{from, value}]}

Both become the messages that the tokenizer's chat template knows; chat_turns.py renders them and finds the turns.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.chat_turns import closing_tokens, encode_chat
from megatron_lora.data.encoded import Encoded
from megatron_lora.data.record_fields import missing, text_of
from megatron_lora.errors import UserError

CHAT_TYPES = ("messages", "sharegpt")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = MappingProxyType(
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "model": "assistant",
        "tool": "tool",
    }
)
# Fields that ask for a different training, and that this trainer does not support.
REFUSED_IN_RECORD = ("tools", "functions", "system")
REFUSED_IN_MESSAGE = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight", "train")


class ChatEncoder:
    """Turns conversations into tokens and targets with one tokenizer; UserError says where a record stands that cannot be trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._closing = closing_tokens(tokenizer)

    def encode(self, record: Mapping[str, object], format: str, where: str) -> Encoded:
        """Encode a record of one of CHAT_TYPES; its targets are all False where no assistant turn has content."""
        list_key, role_key, content_key = {
            "messages": ("messages", "role", "content"),
            "sharegpt": ("conversations", "from", "value"),
        }[format]
        turns = [(_role(turn, role_key, where), turn) for turn in _turns(record, list_key, where)]
        messages = [{"role": role, "content": text_of(turn, content_key, where)} for role, turn in turns]
        ids, targets = encode_chat(self._tokenizer, messages, self._closing, where)
        if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
            targets = np.zeros_like(targets)
        return Encoded(np.asarray(ids, dtype=np.int32), targets)


def _turns(record: Mapping[str, object], key: str, where: str) -> list[Mapping[str, object]]:
    """Get a conversation's turns; UserError for a field that asks for something unsupported."""
    turns = record.get(key)
    if turns is None:
        raise missing(record, key, where)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: {key!r} is {json.dumps(turns, default=str)[:40]}; write a list of turns")
    if not turns:
        raise UserError(f"{where}: {key!r} is empty; remove the record or complete it")
    _refuse(record, REFUSED_IN_RECORD, where)
    for turn in turns:
        _refuse(turn, REFUSED_IN_MESSAGE, where)
    return turns


def _refuse(fields: Mapping[str, object], names: tuple[str, ...], where: str) -> None:
    """Raise UserError for a field that is set and would be ignored."""
    for name in names:
        if fields.get(name) not in (None, "", [], {}):
            raise UserError(f"{where}: {name!r} is not supported; remove it, or write what it says into the turns' text")


def _role(turn: Mapping[str, object], key: str, where: str) -> str:
    """Get who speaks, as the role that chat templates know."""
    roles: Mapping[str, str] = SHAREGPT_ROLES if key == "from" else dict(zip(ROLES, ROLES, strict=True))
    speaker = text_of(turn, key, where)
    if speaker not in roles:
        raise UserError(f"{where}: {key!r} is {speaker!r}; use one of {', '.join(roles)}")
    return roles[speaker]
