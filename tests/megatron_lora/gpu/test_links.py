"""Links over peer memory between two processes: every message, in order, bit by bit, and nobody held up. Needs CUDA.

The pairs of processes run at once: both on one GPU, and where there are two, one on each, with both GPUs visible and with one. Each
pair goes through all CASES over one connection. A slow machine is no failure: no case looks at the clock, and a pair is given up when
neither of its processes has come further for PATIENCE_S. Its stacks are then in the tests' failures.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lora.messages import Links, Message, MessageLayout, Receiver, Sender, connect
from megatron_lora.peer_links import SLOTS

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 60.0  # for the imports, for CUDA and the connection, or for one case: a few seconds each on a machine of their own
LAYOUT = MessageLayout(max_endings=3, hidden_size=1024, dtype=torch.bfloat16)
MAX_ROWS = 4096
NUM_SLOTS = 40
NUM_GPUS = torch.cuda.device_count()
PLACES = {"one GPU": (0, 0)} | ({"two GPUs": (0, 1), "two GPUs, one visible to each": (0, 1)} if NUM_GPUS > 1 else {})
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@dataclass
class Side:
    """One process's part in a case."""

    rank: int
    device: torch.device
    links: Links
    layout: MessageLayout

    def __post_init__(self):
        ends = self.links.forward_out or self.links.backward_out, self.links.backward_in or self.links.forward_in
        assert isinstance(ends[0], Sender) and isinstance(ends[1], Receiver)
        self.out, self.into = ends
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        self.work = torch.randn(2048, 2048, dtype=torch.bfloat16, device=self.device)

    def compute(self, times: int = 1):
        """Keep the current stream at work."""
        for _ in range(times):
            self.work = (self.work @ self.work).clamp(-1, 1)

    def write(self, slot: int, rows: int, direction: int) -> Message:
        """Make a message whose every number tells its place, slot and direction."""
        message = self.layout.blank(slot, rows, self.device)
        message.square_norms.fill_(slot + direction / 2)
        message.body.copy_(expected_body(message, slot, direction))
        return message

    def post(self, slot: int, rows: int, direction: int):
        """Send a message, let go of it, and write over whatever memory is free."""
        message = self.write(slot, rows, direction)
        self.out.post(message)
        size = message.buffer.numel()
        del message
        torch.full((size,), -1.0, dtype=torch.bfloat16, device=self.device)

    def take(self, slot: int, rows: int, direction: int):
        """Take a message and compare it on the device."""
        self.into.post(rows)
        message = self.into.take(slot)
        wrong = (message.body != expected_body(message, slot, direction)).sum() + (message.header[0] != slot)
        self.wrong += wrong + (message.square_norms != slot + direction / 2).sum()

    def finish(self):
        self.links.drain()
        torch.cuda.synchronize()
        assert int(self.wrong) == 0, f"{int(self.wrong)} numbers differ"


def expected_body(message: Message, slot: int, direction: int) -> torch.Tensor:
    """Return whole numbers below 251, which bf16 holds exactly."""
    numbers = torch.arange(message.body.numel(), device=message.buffer.device)
    return ((numbers * 31 + slot * 7 + direction * 101) % 251).view_as(message.body).to(torch.bfloat16)


def rows_of(slot: int, direction: int) -> int:
    """Give messages all sizes: a third are a header alone, some fill their slot."""
    return (0, MAX_ROWS, 1, 0, 777, 0, 3000, MAX_ROWS)[(slot + 3 * direction) % 8]


def exchange(side: Side, between=lambda: None, num_slots: int = NUM_SLOTS):
    """Send messages both ways as the first and the last of two stages do."""
    for slot in range(num_slots):
        if side.rank == 0:
            for ahead in (0, 1) if slot == 0 else (slot + 1,):
                if ahead < num_slots:
                    side.compute()
                    side.post(ahead, rows_of(ahead, 0), 0)
                    between()
            side.take(slot, rows_of(slot, 1), 1)
        else:
            side.take(slot, rows_of(slot, 0), 0)
            between()
            side.compute(2)
            side.post(slot, rows_of(slot, 1), 1)
        between()
    side.finish()


def all_sizes_both_ways(side: Side):
    exchange(side)


def the_host_does_not_wait_for_the_device(side: Side):
    exchange(side, num_slots=8)  # whatever is made on first use has been made
    side = Side(side.rank, side.device, side.links.again(side.layout), side.layout)
    torch.cuda.set_sync_debug_mode("error")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        for slot in range(2 * SLOTS):
            if side.rank == 0:
                side.post(slot, rows_of(slot, 0), 0)
            else:
                side.take(slot, rows_of(slot, 0), 0)
    side.finish()


def a_host_that_stands_still_after_everything(side: Side):
    exchange(side, torch.cuda.synchronize if side.rank == 0 else lambda: None, 12)
    exchange(Side(side.rank, side.device, side.links.again(side.layout), side.layout), torch.cuda.synchronize, 12)


def a_sender_runs_ahead_and_computes(side: Side):
    """Nothing is taken before the sender has computed; one that its own messages hold up would wait for ever."""
    count = 3 * SLOTS
    side.compute(5)
    torch.cuda.synchronize()
    dist.barrier()
    if side.rank == 0:
        for slot in range(count):
            side.post(slot, MAX_ROWS, 0)
        side.compute(5)
        torch.cuda.current_stream().synchronize()
        while messages_left(side) > count - SLOTS:
            time.sleep(0.01)  # copies into free slots may still be under way
        time.sleep(0.2)
        assert messages_left(side) == count - SLOTS, f"{messages_left(side)} of {count} messages wait, with {SLOTS} slots"
    dist.barrier()
    if side.rank == 1:
        for slot in range(count):
            side.take(slot, MAX_ROWS, 0)
    side.finish()


def messages_left(side: Side) -> int:
    return sum(not work.is_completed() for work, _ in side.out.pending)


def modules_loaded_while_messages_wait(side: Side):
    x = torch.rand(1000, device=side.device)
    torch.cuda.synchronize()
    dist.barrier()
    if side.rank == 0:
        for slot in range(SLOTS + 2):
            side.post(slot, MAX_ROWS, 0)
        for never_used in (torch.special.i1e, torch.special.erfcx, torch.special.digamma, torch.sort, torch.linalg.norm):
            never_used(x)
        side.take(0, 5, 1)
    else:
        time.sleep(0.5)
        for never_used in (torch.special.i0e, torch.special.log_ndtr, torch.median, torch.special.ndtri):
            never_used(x)
        for slot in range(SLOTS + 2):
            side.take(slot, MAX_ROWS, 0)
        side.post(0, 5, 1)
    side.finish()


def another_run_with_longer_headers(side: Side):
    layout = MessageLayout(max_endings=64, hidden_size=LAYOUT.hidden_size - 128, dtype=LAYOUT.dtype)
    exchange(Side(side.rank, side.device, side.links.again(layout), layout), num_slots=2 * SLOTS + 1)


CASES = {
    case.__name__: case
    for case in (
        all_sizes_both_ways,
        the_host_does_not_wait_for_the_device,
        a_host_that_stands_still_after_everything,
        a_sender_runs_ahead_and_computes,
        modules_loaded_while_messages_wait,
        another_run_with_longer_headers,
    )
}


def child(rank: int, gpu: int, directory: Path, abandoned: bool) -> None:
    """Go through all cases as one of a pair, and write each one's outcome."""
    faulthandler.register(signal.SIGUSR1, open(directory / f"stacks.{rank}", "w"))  # noqa: SIM115
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2, timeout=timedelta(seconds=2 * PATIENCE_S)
    )
    links = connect([[0, 1]], LAYOUT, device, max_rows=MAX_ROWS, peer_memory=True)
    outcomes = {"connect": "ok" if set(links.transports.values()) == {"peer"} else f"connected over {links.transports}"}
    report(directory, rank, outcomes)
    if abandoned:
        abandon(rank, Side(rank, device, links, LAYOUT), directory)
    for name, case in CASES.items():
        try:
            case(Side(rank, device, links.again(LAYOUT), LAYOUT))
            torch.cuda.synchronize()
            dist.barrier()
        except BaseException:
            outcomes[name] = traceback.format_exc()
            report(directory, rank, outcomes)
            os._exit(1)
        outcomes[name] = "ok"
        report(directory, rank, outcomes)
    if rank == 1:
        time.sleep(0.5)  # the other is gone by now, or about to go
        torch.cuda.synchronize()


def abandon(rank: int, side: Side, directory: Path) -> None:
    """Rank 1 leaves without a word; rank 0 waits for its message until somebody ends it."""
    dist.barrier()
    if rank == 1:
        os._exit(0)
    side.into.post(1)
    side.into.take(0)  # and no kernel behind it: the first use of one may wait for the stream
    (directory / "waits").touch()
    torch.cuda.synchronize()
    os._exit(1)


def report(directory: Path, rank: int, outcomes: dict) -> None:
    aside = directory / f"outcomes.{rank}.new"
    aside.write_text(json.dumps(outcomes))
    aside.replace(directory / f"outcomes.{rank}")


def start(directory: Path, place: str, *options: str) -> list[subprocess.Popen]:
    """Start a pair of processes."""
    directory.mkdir()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    pair = []
    for rank, gpu in enumerate(PLACES[place]):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
        if "one visible" in place:
            environment["CUDA_VISIBLE_DEVICES"], gpu = visible[gpu], 0
        with open(directory / f"log.{rank}", "w") as log:
            command = [sys.executable, __file__, str(rank), str(gpu), str(directory), *options]
            pair.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return pair


def end(directory: Path, pair: list[subprocess.Popen]) -> str:
    """End what is left of a pair; return what its processes said and where they stood."""
    left = [process for process in pair if process.poll() is None]
    for process in left:
        process.send_signal(signal.SIGUSR1)
    time.sleep(0.5 if left else 0.0)
    for process in left:
        process.kill()
    for process in pair:
        process.wait()
    told = [f"rank {rank} ended with {process.returncode}" for rank, process in enumerate(pair)]
    return "\n".join(told + [f"-- {path.name}\n{path.read_text()}" for path in sorted(directory.glob("[ls][ot]*.[01]")) if path.exists()])


def read(directory: Path, rank: int) -> dict:
    path = directory / f"outcomes.{rank}"
    return json.loads(path.read_text()) if path.exists() else {}


def silence_s(directory: Path) -> float:
    """Return how long ago a process of a pair came further, since it makes files: when it starts, after its imports, after a case."""
    return time.time() - directory.stat().st_mtime


@pytest.fixture(scope="module")
def abandoned(tmp_path_factory):
    """Start a pair whose rank 1 leaves; its rank 0 waits beside all other pairs. Yields its directory and processes."""
    directory = tmp_path_factory.mktemp("abandoned") / "pair"
    pair = start(directory, "one GPU", "abandoned")
    yield directory, pair
    end(directory, pair)


@pytest.fixture(scope="module")
def pairs(abandoned, tmp_path_factory):
    """Run a pair per place, all at once; return place -> (both ranks' outcomes, what to say of those that are missing)."""
    parent = tmp_path_factory.mktemp("pairs")
    running = {place: (parent / str(number), start(parent / str(number), place)) for number, place in enumerate(PLACES)}
    failed_at: dict[str, float] = {}
    ended: dict[str, str] = {}
    while len(ended) < len(running):
        time.sleep(0.1)
        for place, (directory, pair) in running.items():
            if place in ended:
                continue
            states = [process.poll() for process in pair]
            if any(states):
                failed_at.setdefault(place, time.monotonic())
            if None not in states or time.monotonic() > failed_at.get(place, math.inf) + 3.0:
                ended[place] = end(directory, pair)
            elif silence_s(directory) > PATIENCE_S:
                ended[place] = f"neither process came further for {PATIENCE_S:g} s\n{end(directory, pair)}"
    return {place: ([read(directory, rank) for rank in (0, 1)], ended[place]) for place, (directory, _) in running.items()}


@pytest.mark.parametrize("case", ["connect", *CASES])
@pytest.mark.parametrize("place", PLACES)
def test_messages(pairs, place, case):
    outcomes, story = pairs[place]
    for rank, outcome in enumerate(outcomes):
        if outcome.get(case) != "ok":
            pytest.fail(f"rank {rank}: {outcome.get(case, 'did not come to an end')}\n{story}", pytrace=False)


@pytest.mark.parametrize("place", PLACES)
def test_both_processes_leave(pairs, place):
    _, story = pairs[place]
    assert "rank 0 ended with 0\nrank 1 ended with 0" in story, story


def test_a_rank_whose_peer_has_died_can_be_ended(abandoned, pairs):
    directory, pair = abandoned
    waits = (directory / "waits").exists() and pair[0].poll() is None
    if not waits:
        pytest.fail(end(directory, pair), pytrace=False)
    pair[0].terminate()
    assert pair[0].wait(timeout=10) == -signal.SIGTERM


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), "abandoned" in sys.argv[4:])
