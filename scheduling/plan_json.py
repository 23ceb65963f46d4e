"""Streams in and out of JSON: [[[job, step, sample, tokens], ...], ...], [] being a no-op slot.

Which slots are evaluation slots stands beside it, as a list of their places: there `step` is the number of steps that the job has taken,
and `sample` one of its validation set. Those of them that are reference slots (references.py) or mismatched slots (mismatched.py) are
listed once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from scheduling.types import Lengths, Microbatch, Segment, Stream


def stream_to_json(
    stream: Stream,
    lengths: Lengths | Mapping[int, Sequence[Sequence[int]]],
    validation: Mapping[int, Sequence[int]] | None = None,
) -> list[list[list[int]]]:
    """Return a stream as plain lists, one [job, step, sample, tokens] per sample; see evaluation_slots."""
    microbatches = []
    for microbatch in stream:
        held = validation or {}
        batches = ((s, held[s.job] if microbatch.of_validation(s) else lengths[s.job][s.step]) for s in microbatch.segments)
        microbatches.append([[s.job, s.step, sample, batch[sample]] for s, batch in batches for sample in s.samples])
    return microbatches


def evaluation_slots(stream: Stream) -> list[int]:
    """Return the places of a stream's evaluation slots."""
    return [slot for slot, microbatch in enumerate(stream) if microbatch.evaluate]


def stream_from_json(
    microbatches: Sequence[Sequence[Sequence[int]]],
    evaluate: Collection[int] = (),
    reference: Collection[int] = (),
    mismatched: Collection[int] = (),
) -> Stream:
    """Rebuild the stream, with these forward-only slots; a job's samples in a slot become one segment, in the order given."""
    stream = []
    for slot, entries in enumerate(microbatches):
        segments: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for job, step, sample, tokens in entries:
            segments.setdefault((job, step), []).append((sample, tokens))
        held = ((key, tuple(sample for sample, _ in each), sum(tokens for _, tokens in each)) for key, each in segments.items())
        parts = tuple(Segment(*key, samples, tokens) for key, samples, tokens in held)
        stream.append(Microbatch(parts, slot in evaluate, slot in reference, slot in mismatched))
    return tuple(stream)
