"""What a record becomes: its tokens, which of them are targets, and what has to be said about it.

A note is a short text such as "system prompt left out": notes are counted over a job's records and shown, so that nothing is left out in
silence. Notes hold no text of a record.

A pair of answers is two sequences, one after the other, which begin with the same prompt. Where a sequence is longer than it may be, both
lose the same tokens of the prompt, at the left, down to its last one; then the answers are cut at the right, as any other record is.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Encoded:
    """A complete record as tokens [L] int32 and targets [L] bool, before it is cut.

    Of a pair `border` is where the second sequence begins, 0 otherwise, and `num_prompt` how many tokens both begin with as their prompt;
    of a labelled answer those before it. `weight`, of the loss, is below 0 where the label is false.
    """

    tokens: np.ndarray
    targets: np.ndarray
    notes: tuple[str, ...] = ()
    border: int = 0
    num_prompt: int = 0
    weight: float = 1.0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.border, len(self.tokens) - self.border)

    @property
    def trains(self) -> bool:
        """Whether it has targets; of a pair, both sequences, which differ."""
        if not self.border:
            return bool(self.targets.any())
        chosen, rejected = self.tokens[: self.border], self.tokens[self.border :]
        has_both = self.targets[: self.border].any() and self.targets[self.border :].any()
        return bool(has_both) and not np.array_equal(chosen, rejected)

    def cut(self, length: int) -> "Encoded":
        """Return it with at most `length` tokens in each sequence."""
        if self.longest <= length:
            return self
        if not self.border:
            return replace(self, tokens=self.tokens[:length], targets=self.targets[:length])
        answers = self.longest - self.num_prompt
        kept = max(min(1, self.num_prompt), min(self.num_prompt, length - answers))
        first = np.r_[self.num_prompt - kept : min(self.border, self.num_prompt + length - kept)]
        second = np.r_[self.num_prompt - kept : min(len(self.tokens) - self.border, self.num_prompt + length - kept)] + self.border
        rows = np.concatenate([first, second])
        tokens, targets = self.tokens[rows], self.targets[rows]
        targets[[0, len(first)]] = False
        return replace(self, tokens=tokens, targets=targets, border=len(first), num_prompt=kept)
