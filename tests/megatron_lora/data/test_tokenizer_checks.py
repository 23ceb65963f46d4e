"""Tokenizers that are not what the model was trained with: one that drops spaces is refused, Mistral's wrong expression is said."""

import json

import oracle
import pytest
from tiny_tokenizers import tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.data.tokenizer_checks import doubts_of
from megatron_lora.errors import UserError

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(unk=None, num_others=0, **parts):
    """A tokenizer of single bytes in which some parts are others than they should be, and `num_others` tokens that no text has."""
    vocabulary = {
        token: i
        for i, token in enumerate(
            [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>", *([unk] if unk else []), *map(str, range(10, num_others))]
        )
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unk))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token=unk)


WITHOUT_SPACES = {
    "read as SentencePiece": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never"), "decoder": decoders.Metaspace()},
    "the same, with unk": {"unk": "<unk>", "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never"), "decoder": decoders.Fuse()},
    "split at spaces": {"pre_tokenizer": pre_tokenizers.WhitespaceSplit(), "decoder": decoders.Fuse()},
    "normalised away": {"normalizer": normalizers.Replace(" ", "")},
}


@pytest.mark.parametrize("kind", WITHOUT_SPACES)
def test_a_tokenizer_that_drops_spaces_is_refused(tmp_path, kind):
    byte_level(**WITHOUT_SPACES[kind]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^base_model: the tokenizer in {tmp_path} drops the spaces between words; install a transformers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("words", [False, True])
def test_tokenizers_that_keep_spaces_are_not(tmp_path, words):
    tiny_tokenizer(words=words, opening=("<s>",)).save_pretrained(tmp_path)
    load_tokenizer(tmp_path)


def test_words_that_are_unknown_are_no_lost_spaces(tmp_path):
    oracle.make_tokenizer(tmp_path)
    load_tokenizer(tmp_path)


def saved(folder, pattern=None, num_others=0, **config):
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level(pre_tokenizer=pre_tokenizers.Sequence([*split, last]) if split else last, num_others=num_others).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", ["mistral", "mistral3", "ministral"])
@pytest.mark.parametrize("version", ["4.50.0", None])
def test_mistrals_wrong_expression_is_said(tmp_path, model_type, version):
    tokenizer = load_tokenizer(saved(tmp_path, LLAMA3, model_type=model_type, transformers_version=version))
    (line,) = doubts_of(tokenizer)
    assert "published with by mistake" in line and '"fix_mistral_regex": true' in line


@pytest.mark.parametrize(
    ("pattern", "config"),
    [
        (TEKKEN, {"model_type": "mistral", "transformers_version": "4.50.0"}),
        (None, {"model_type": "mistral", "transformers_version": "4.50.0"}),
        (LLAMA3, {"model_type": "llama", "transformers_version": "4.50.0"}),
        (LLAMA3, {}),
    ],
)
def test_no_other_tokenizer_is_doubted(tmp_path, pattern, config):
    assert doubts_of(load_tokenizer(saved(tmp_path, pattern, **config))) == ()


def test_the_correction_is_taken_from_the_tokenizers_own_config(tmp_path):
    saved(tmp_path, LLAMA3, num_others=101_000, model_type="mistral", transformers_version="4.50.0")
    assert len(doubts_of(load_tokenizer(tmp_path))) == 1
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fix_mistral_regex": True}))
    tokenizer = load_tokenizer(tmp_path)
    first = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]
    assert doubts_of(tokenizer) == () and first["pattern"]["Regex"] == TEKKEN
