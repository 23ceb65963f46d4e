"""Records of type `lengths`: random tokens of given lengths, for benchmarks, calibration and trials; no tokenizer is needed.

    {"tokens": 512}                    every token but the first is a target
    {"tokens": 512, "targets": 128}    the last 128 are
    {"chosen": 512, "rejected": 300, "targets": 128}    a pair, for preference objectives: the last 128 of each sequence are

A record is a sample, in the kinds of files that all records come in. Its tokens are a pure function of its place in the file, so that
ranks and later runs make the same ones.
"""

import json
from collections.abc import Mapping

import numpy as np

from megatron_lora.data.encoded import Encoded
from megatron_lora.data.steps import mix
from megatron_lora.errors import UserError

MOST_TOKENS = 2**24  # of a record


class LengthEncoder:
    """Turns the records of one file, in their order, into tokens and targets; one that is no length is a UserError that names its place."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._num_records = 0

    def encode(self, record: Mapping[str, object], format: str, train_on_inputs: bool, where: str) -> Encoded:
        """Make the next record, of which at least one token is a target."""
        assert format == "lengths", format
        names = ("tokens",) if "chosen" not in record and "rejected" not in record else ("chosen", "rejected")
        for name in sorted(record.keys() - {*names, "targets"}):
            what = "a length; write {'tokens': N}" if len(names) == 1 else "a pair; write {'chosen': N, 'rejected': M}"
            raise UserError(f"{where}: {name!r} is no field of {what}, or with 'targets' too")
        lengths = [_count(record, name, 2, MOST_TOKENS, where) for name in names]
        length = sum(lengths)
        most = min(lengths) - 1
        num_targets = _count(record, "targets", 1, most, where) if "targets" in record else most
        start = mix(np.array([self._num_records], dtype=np.uint64))
        self._num_records += 1
        ids = mix(start + np.arange(length, dtype=np.uint64)) % np.uint64(self._vocab_size)
        targets = np.concatenate([np.arange(each) >= (1 if train_on_inputs else each - num_targets) for each in lengths])
        return Encoded(ids.astype(np.int32), targets, border=lengths[0] if len(lengths) > 1 else 0)


def _count(record: Mapping[str, object], name: str, low: int, high: int, where: str) -> int:
    """Get a field that must be a whole number between two."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{where}: {name!r} is {json.dumps(value, default=str)[:40]}; write a whole number from {low} to {high}")
    return value
