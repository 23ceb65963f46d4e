"""Tokenizers in the manner of published families, small enough to build in a test: bytes or words, and any opening and closing."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MERGES = (("▁", "y"), ("e", "s"), ("▁y", "es"), ("Ġ", "y"), ("Ġy", "es"), ("y", "es"), ("Ċ", "Ċ"))


def tiny_tokenizer(
    opening: tuple[str, ...] = (), closing: tuple[str, ...] = (), *, bos="<s>", eos="</s>", words=False, merges=MERGES, template=None
) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer, or with `words` one of SentencePiece's kind, which marks the start of a word.

    `opening` and `closing` are what its post-processor writes around a text.
    """
    specials = dict.fromkeys([token for token in (*opening, *closing, bos, eos) if token])
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "▁", "\n"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*alphabet, *map("".join, merges), *specials]))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    if words:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    if opening or closing:
        around = [(token, vocabulary[token]) for token in dict.fromkeys((*opening, *closing))]
        backend.post_processor = processors.TemplateProcessing(single=[*opening, "$A", *closing], special_tokens=around)
    extra = [token for token in specials if token not in (bos, eos)]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, additional_special_tokens=extra, chat_template=template
    )
