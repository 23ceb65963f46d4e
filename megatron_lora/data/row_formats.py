"""One dataset record to tokens and targets, in each of the formats that hold text (length_records.py has the other).

    text               {text}                          tokenizer(text) with its special tokens, eos appended if absent
    prompt_completion  {prompt, completion}            tokenizer(prompt) with special tokens + tokenizer(completion) without + eos
    alpaca             {instruction, input, output}    the same, with the Stanford Alpaca template as the prompt
    messages           {messages: [{role, content}]}   the tokenizer's chat template over the whole conversation
    sharegpt           {conversations: [{from, value}]}    the same

A target is a token that the loss predicts: every token but the first in text, the completion and
its eos in the next two formats, and the assistant turns in conversations (chat_turns.py). With
`train_on_inputs` every token but the first is a target in all formats. Nothing is cut here.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_lora.data.chat_fields import is_conversation
from megatron_lora.data.chat_records import ChatEncoder
from megatron_lora.data.chat_template import ChatSettings
from megatron_lora.data.encoded import Encoded
from megatron_lora.data.record_fields import filled_text_of, text_of
from megatron_lora.errors import UserError

# The prompt templates of Stanford Alpaca (Taori et al., 2023).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class RecordEncoder:
    """Turns records into tokens and targets with one tokenizer; UserError says where a record stands that cannot be trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chats: ChatSettings | None = None):
        if tokenizer.eos_token_id is None:
            raise UserError("base_model: its tokenizer has no eos_token, so no completion could end; name one in tokenizer_config.json")
        self._tokenizer = tokenizer
        self._chats = ChatEncoder(tokenizer, chats or ChatSettings())

    def encode(self, record: Mapping[str, object], format: str, train_on_inputs: bool, where: str) -> Encoded:
        """Encode a complete record, of which at least one token is a target."""
        encoders = {
            "text": self._text,
            "prompt_completion": self._prompt_completion,
            "alpaca": self._alpaca,
        }
        chat = is_conversation(record, format)
        encoded = self._chats.encode(record, format, train_on_inputs, where) if chat else encoders[format](record, where)
        targets = np.ones_like(encoded.targets) if train_on_inputs and not chat else encoded.targets.copy()
        targets[:1] = False
        if not targets.any():
            turns = ": no assistant turn that is trained has content" if chat else ""
            raise UserError(f"{where}: has nothing to train on{turns}; remove the record or complete it")
        return replace(encoded, targets=targets)

    def _text(self, record: Mapping[str, object], where: str) -> Encoded:
        ids = self._tokenizer(filled_text_of(record, "text", where))["input_ids"]
        if ids[-1:] != [self._tokenizer.eos_token_id]:
            ids = [*ids, self._tokenizer.eos_token_id]
        return Encoded(np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))

    def _prompt_completion(self, record: Mapping[str, object], where: str) -> Encoded:
        return self._pair(text_of(record, "prompt", where), filled_text_of(record, "completion", where))

    def _alpaca(self, record: Mapping[str, object], where: str) -> Encoded:
        instruction, output = filled_text_of(record, "instruction", where), filled_text_of(record, "output", where)
        context = "" if record.get("input") is None else text_of(record, "input", where)
        template = ALPACA_WITH_INPUT if context else ALPACA
        return self._pair(template.format(instruction=instruction, input=context), output)

    def _pair(self, prompt: str, completion: str) -> Encoded:
        prompt_ids = self._tokenizer(prompt)["input_ids"]
        completion_ids = [*self._tokenizer(completion, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        tokens = np.asarray(prompt_ids + completion_ids, dtype=np.int32)
        return Encoded(tokens, np.arange(len(tokens)) >= len(prompt_ids))
