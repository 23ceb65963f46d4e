"""What a record becomes: its tokens, which of them are targets, and what has to be said about it.

A note is a short text such as "system prompt left out": notes are counted over a job's records and shown, so that nothing is left out in
silence. Notes hold no text of a record.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Encoded:
    """A complete record as tokens [L] int32 and targets [L] bool, before it is cut."""

    tokens: np.ndarray
    targets: np.ndarray
    notes: tuple[str, ...] = ()
