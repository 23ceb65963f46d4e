"""Streams in and out of JSON: [[[job, step, sample, tokens], ...], ...], [] being a no-op slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduling.types import Lengths, Microbatch, Segment, Stream


def stream_to_json(stream: Stream, lengths: Lengths | Mapping[int, Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """Return a stream as plain lists, one [job, step, sample, tokens] per sample."""
    microbatches = []
    for microbatch in stream:
        batches = ((s, lengths[s.job][s.step]) for s in microbatch.segments)
        microbatches.append([[s.job, s.step, sample, batch[sample]] for s, batch in batches for sample in s.samples])
    return microbatches


def stream_from_json(microbatches: Sequence[Sequence[Sequence[int]]]) -> Stream:
    """Rebuild the stream; the samples of one job in one slot become one segment, in the order given."""
    stream = []
    for entries in microbatches:
        segments: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for job, step, sample, tokens in entries:
            segments.setdefault((job, step), []).append((sample, tokens))
        stream.append(
            Microbatch(
                tuple(
                    Segment(job, step, tuple(sample for sample, _ in held), sum(tokens for _, tokens in held))
                    for (job, step), held in segments.items()
                )
            )
        )
    return tuple(stream)
