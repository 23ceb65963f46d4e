"""Streams in and out of JSON: [[[job, step, sample, tokens], ...], ...], [] being a no-op slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduling.types import Lengths, Microbatch, Segment, Stream


def stream_to_json(stream: Stream, lengths: Lengths | Mapping[int, Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """Return a stream as plain lists, one [job, step, sample, tokens] per sample."""
    return [[entry for segment in microbatch.segments for entry in _entries(segment, lengths)] for microbatch in stream]


def _entries(segment: Segment, lengths: Lengths | Mapping[int, Sequence[Sequence[int]]]) -> list[list[int]]:
    batch = lengths[segment.job][segment.step]
    return [[segment.job, segment.step, sample, batch[sample]] for sample in segment.samples]


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
