"""A tokenizer for tests that is made on the spot: its tokens are single bytes, the merges that a test asks for, and added tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def make_tokenizer(template=None, merges=(), added=(), bos=None, eos="</s>", words=False, adds_bos=False):
    """Build a tokenizer of single bytes, joined by `merges`; `words` makes it one of sentencepiece's kind ('▁' before words)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["▁"]
    specials = [*added, *([bos] if bos else []), eos]
    vocab = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges), *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, additional_special_tokens=list(added), chat_template=template
    )
