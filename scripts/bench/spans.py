"""What a run's timeline shows: how long each stage is idle, and how long it waits for a message that was already sent.

Events are those of megatron_lora.output.timeline: F, B and STEP work; "wait F" and "wait B" end when the message is there. A stage waits
for a hop, and not for work, from the moment when the neighbour had its message ready: the later of the wait's start and the end of the
neighbour's pass. Clocks of ranks agree as far as `align` makes them.
"""

from collections import defaultdict
from collections.abc import Sequence

WORK = ("F", "B", "STEP")


def align(events: list[dict], start_s: float, end_s: float) -> list[dict]:
    """Stretch a rank's events (microseconds) so that its spans "begin" and "end" start at these times of the host's clock; drop the two."""
    marks = {event["cat"]: event["ts"] for event in events if event["cat"] in ("begin", "end")}
    stretch = (end_s - start_s) * 1e6 / (marks["end"] - marks["begin"])
    moved = []
    for event in events:
        if event["cat"] not in marks:
            ts = start_s * 1e6 + (event["ts"] - marks["begin"]) * stretch
            moved.append(event | {"ts": ts, "dur": event["dur"] * stretch})
    return moved


def spans_of(events: Sequence[dict]) -> dict[str, dict[int, tuple[float, float]]]:
    """Return (start, end) in seconds of one rank's actions: [kind][slot]; STEPs, which repeat, are left out."""
    spans: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for event in events:
        if event["cat"] != "STEP":
            spans[event["cat"]][int(event["name"].split()[-1])] = (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
    return spans


def makespan(events_of_ranks: Sequence[Sequence[dict]]) -> float:
    """Return seconds from the first work of any rank to the last."""
    work = [event for events in events_of_ranks for event in events if event["cat"] in WORK]
    return (max(event["ts"] + event["dur"] for event in work) - min(event["ts"] for event in work)) / 1e6


def bubbles(events_of_ranks: Sequence[Sequence[dict]], stages: Sequence[int], num_stages: int) -> list[float]:
    """Return the share of the makespan in which each stage does no work, the mean over its ranks; `stages` has each rank's."""
    total = makespan(events_of_ranks)
    idle: list[list[float]] = [[] for _ in range(num_stages)]
    for events, stage in zip(events_of_ranks, stages, strict=True):
        idle[stage].append(1 - sum(event["dur"] for event in events if event["cat"] in WORK) / 1e6 / total)
    return [sum(each) / len(each) for each in idle]


def exposed_hops(events_of_ranks: Sequence[Sequence[dict]], pipelines: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return, per hop ("0>1": forward, "1>0": backward), the share of the makespan that its receiver waits for messages under way.

    The mean over pipelines, each given as its ranks from the first stage to the last.
    """
    total = makespan(events_of_ranks)
    shares: dict[str, list[float]] = defaultdict(list)
    spans = [spans_of(events) for events in events_of_ranks]
    for ranks in pipelines:
        for stage, (before, after) in enumerate(zip(ranks[:-1], ranks[1:], strict=True)):
            for name, kind, sender, receiver in (
                (f"{stage}>{stage + 1}", "F", before, after),
                (f"{stage + 1}>{stage}", "B", after, before),
            ):
                waits, sent = spans[receiver][f"wait {kind}"], spans[sender][kind]
                under_way = sum(max(0.0, end - max(start, sent[slot][1])) for slot, (start, end) in waits.items() if slot in sent)
                shares[name].append(under_way / total)
    return {name: sum(each) / len(each) for name, each in shares.items()}


def pass_seconds(events_of_ranks: Sequence[Sequence[dict]], stages: Sequence[int], num_stages: int, kind: str, num_slots: int):
    """Return the mean seconds of every slot's F or B on each stage, [stage][slot]; 0 where nothing ran."""
    sums = [[0.0] * num_slots for _ in range(num_stages)]
    for events, stage in zip(events_of_ranks, stages, strict=True):
        for slot, (start, end) in spans_of(events)[kind].items():
            sums[stage][slot] += (end - start) / stages.count(stage)
    return sums
