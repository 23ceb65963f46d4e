"""One dataset record to tokens and targets, in each of the formats that hold text (length_records.py has the other).

    text               {text}
    prompt_completion  {prompt, completion}
    alpaca             {instruction, input, output, system}    Stanford Alpaca's template is the prompt, the output the completion
    alpaca_chat        the same fields                         a conversation of system, user and assistant
    messages           {messages: [{role, content}]}           the tokenizer's chat template over the whole conversation
    sharegpt           {conversations: [{from, value}]}        the same
    preference         {prompt, chosen, rejected}              two answers: preference_records.py, which has preference_chat too
    kto                {prompt, completion, label}             prompt_completion, or both as lists of turns; whether it is desirable

Prompt and completion are tokenised as one text, with bos and eos once each (text_tokens.py). A target is a token that the loss predicts:
every token but the first in text, the completion and its eos in the next two formats, and the assistant turns in conversations
(chat_turns.py). A record of any format may have a `weight`. With `train_on_inputs` every token but the first is a target in all formats.
Nothing is cut here.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.config.dataset_paths import LABELLED_TYPES, PREFERENCE_TYPES
from megatron_lora.data.chat_fields import CHAT_TYPES, is_conversation
from megatron_lora.data.chat_records import ChatEncoder
from megatron_lora.data.chat_template import ChatSettings
from megatron_lora.data.encoded import Encoded
from megatron_lora.data.preference_records import PreferenceEncoder
from megatron_lora.data.record_fields import check_other_fields, filled_text_of, missing, text_of, weight_of
from megatron_lora.data.text_tokens import TextTokenizer
from megatron_lora.errors import UserError

TEMPLATE_TYPES = (*CHAT_TYPES, "alpaca_chat", "preference_chat")  # need a chat template
# The prompt templates of Stanford Alpaca (Taori et al., 2023). A record's system prompt stands in the place of the first paragraph.
ALPACA_OPENING = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_OPENING_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA = "{opening}\n\n### Instruction:\n{instruction}\n\n### Response:"
ALPACA_WITH_INPUT = "{opening}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"


class RecordEncoder:
    """Turns records into tokens and targets with one tokenizer; UserError says where a record stands that cannot be trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chats: ChatSettings | None = None):
        if tokenizer.eos_token_id is None:
            raise UserError("base_model: its tokenizer has no eos_token, so no completion could end; name one in tokenizer_config.json")
        self._given = tokenizer, chats
        self._texts = TextTokenizer(tokenizer)
        self._chats = ChatEncoder(tokenizer, chats or ChatSettings())
        self._pairs = PreferenceEncoder(self._texts, self._chats)

    def __reduce__(self):
        """Pickle what the encoder is made of: a compiled template is no data."""
        return RecordEncoder, self._given

    def encode(self, record: Mapping[str, object], format: str, train_on_inputs: bool, where: str) -> Encoded:
        """Encode a complete record, of which at least one token is a target."""
        if (weight := weight_of(record, where)) != 1:
            encoded = self.encode({**record, "weight": None}, format, train_on_inputs, where)
            return replace(encoded, weight=weight * encoded.weight)
        if format in PREFERENCE_TYPES:
            return self._pairs.encode(record, format, where)
        if format in LABELLED_TYPES:
            label = _label_of(record, where)
            rest = {name: value for name, value in record.items() if name != "label"}
            encoded = self.encode(rest, "prompt_completion", False, where)
            return replace(encoded, num_prompt=int(encoded.targets.argmax()), weight=1.0 if label else -1.0)
        plain = {"text": self._text, "prompt_completion": self._prompt_completion, "alpaca": self._alpaca, "alpaca_chat": self._alpaca_chat}
        chat = is_conversation(record, format)
        encoded = self._chats.encode(record, format, train_on_inputs, where) if chat else plain[format](record, where)
        targets = np.ones_like(encoded.targets) if train_on_inputs and not chat else encoded.targets.copy()
        targets[:1] = False
        if not targets.any():
            turns = ": no assistant turn that is trained has content" if chat else ""
            raise UserError(f"{where}: has nothing to train on{turns}; remove the record or complete it")
        return replace(encoded, targets=targets)

    def _text(self, record: Mapping[str, object], where: str) -> Encoded:
        notes = check_other_fields(record, ("text",), where)
        encoded = self._pair("", filled_text_of(record, "text", where), f"{where}: 'text'", notes)
        return replace(encoded, targets=np.ones_like(encoded.targets))

    def _prompt_completion(self, record: Mapping[str, object], where: str) -> Encoded:
        notes = check_other_fields(record, ("prompt", "completion"), where)
        prompt, completion = text_of(record, "prompt", where), filled_text_of(record, "completion", where)
        return self._pair(prompt, completion, f"{where}: 'completion'", notes)

    def _alpaca(self, record: Mapping[str, object], where: str) -> Encoded:
        system, instruction, context, output, notes = _alpaca_fields(record, where)
        opening = system or (ALPACA_OPENING_WITH_INPUT if context else ALPACA_OPENING)
        template = ALPACA_WITH_INPUT if context else ALPACA
        prompt = template.format(opening=opening, instruction=instruction, input=context)
        return self._pair(prompt, output, f"{where}: 'output'", notes)

    def _alpaca_chat(self, record: Mapping[str, object], where: str) -> Encoded:
        system, instruction, context, output, notes = _alpaca_fields(record, where)
        messages = [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": f"{instruction}\n{context}" if context else instruction},
            {"role": "assistant", "content": output},
        ]
        encoded = self._chats.encode({"messages": messages}, "messages", False, where)
        return replace(encoded, notes=notes + encoded.notes)

    def _pair(self, prompt: str, completion: str, subject: str, notes: tuple[str, ...]) -> Encoded:
        """Encode a prompt and what follows it; `subject` names the latter in errors."""
        encoded = self._texts.encode(prompt, completion)
        if encoded is None:
            raise UserError(f"{subject} gives no tokens but special ones; remove the record or complete it")
        return replace(encoded, notes=notes + encoded.notes)


def _label_of(record: Mapping[str, object], where: str) -> bool:
    """Get whether a labelled answer is desirable; CSV files have it as text."""
    label = record.get("label")
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(label).lower())
    if label is None:
        raise missing(record, "label", where)
    if found is None:
        raise UserError(f"{where}: 'label' is {json.dumps(label, default=str)[:40]}; write true for a desirable completion, or false")
    return found


def _alpaca_fields(record: Mapping[str, object], where: str) -> tuple[str, str, str, str, tuple[str, ...]]:
    """Get system, instruction, input and output of a record, the first and third perhaps empty, and notes about other fields."""
    notes = check_other_fields(record, ("instruction", "input", "output", "system"), where)
    system, context = ("" if record.get(name) is None else text_of(record, name, where) for name in ("system", "input"))
    return system, filled_text_of(record, "instruction", where), context, filled_text_of(record, "output", where), notes
