"""Time messages between two GPUs over NCCL and over peer memory, and what a message that waits for its receiver costs the sender.

    python scripts/bench/links.py                      40 and 80 MiB between the first two GPUs

hop      one message at a time, there and a header back: milliseconds one way, until the receiver's stream has it
stream   messages one after another: GB/s at the receiver
waiting  8192 x 4096 x 4096 bf16 products on the sender while messages wait for a receiver that comes WAIT_S later; beside the same
         without messages, in interleaved rounds

Medians, with the 10th and 90th percentiles. Appends one JSON line per case to scripts/bench/results/links.jsonl. Ends within LIMIT_S.
"""

import argparse
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from one_line import OneLineParser, need_gpus, output_file, whole  # noqa: E402
from stamp import RESULTS, append_line, stamp  # noqa: E402

from megatron_lora.messages import MessageLayout, connect  # noqa: E402

LIMIT_S = 120.0
WAIT_S, USED_S = 0.050, 0.038  # how long the receiver stays away, and how much of it products fill
HIDDEN = 5120
ROUNDS = 15


class Side:
    """One rank's end of a connection, with its slots counted."""

    def __init__(self, links, layout, device, rank):
        self.rank, self.layout, self.device = rank, layout, device
        self.out, self.into = (links.forward_out, links.backward_in) if rank == 0 else (links.backward_out, links.forward_in)
        self.slot = 0

    def send(self, rows):
        self.out.post(self.layout.blank(0, rows, self.device))

    def take(self, rows):
        self.into.post(rows)
        self.into.take(self.slot)
        self.slot += 1


def spread(values):
    """Return the median and the 10th and 90th percentiles."""
    ordered = sorted(values)
    return [round(ordered[round(share * (len(ordered) - 1))], 5) for share in (0.5, 0.1, 0.9)]


def marked():
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def hop(side, rows, host):
    """Return milliseconds one way of messages with `rows` rows."""
    round_trips = {0: [], rows: []}
    for number in range(2 * ROUNDS + 6):
        size = rows if number % 2 else 0
        dist.barrier(group=host)
        if side.rank == 0:
            message = side.layout.blank(0, size, side.device)
            torch.cuda.synchronize()
            begin = marked()
            side.out.post(message)
            side.take(0)
            end = marked()
            torch.cuda.synchronize()
            round_trips[size].append(begin.elapsed_time(end))
        else:
            side.take(size)
            side.send(0)
            torch.cuda.synchronize()
    back = spread(round_trips[0][3:])[0] / 2 if side.rank == 0 else 0.0
    return [value - back for value in round_trips[rows][3:]], back


def stream(side, rows, host, count=24):
    """Return GB/s of messages that follow one another, once per round."""
    rates = []
    for _ in range(6):
        dist.barrier(group=host)
        if side.rank == 0:
            message = side.layout.blank(0, rows, side.device)
            for _ in range(count):
                side.out.post(message)
        else:
            side.take(rows)
            begin = marked()
            for _ in range(count - 1):
                side.take(rows)
            end = marked()
            torch.cuda.synchronize()
            rates.append((count - 1) * side.layout.num_bytes(rows) / begin.elapsed_time(end) / 1e6)
        torch.cuda.synchronize()
    return rates[1:]


class Products:
    """The sender's work."""

    def __init__(self, device):
        self.x = torch.randn(8192, 4096, device=device, dtype=torch.bfloat16)
        self.w = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        self.y = torch.empty(8192, 4096, device=device, dtype=torch.bfloat16)
        self.times(50)
        self.count = int(USED_S * 1e3 / spread(self.times(50))[0])

    def times(self, count):
        """Return each product's milliseconds."""
        marks = [marked()]
        for _ in range(count):
            torch.mm(self.x, self.w, out=self.y)
            marks.append(marked())
        torch.cuda.current_stream().synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(marks[:-1], marks[1:], strict=True)]


def waiting(sides, products, rows, counts, host):
    """Return each product's milliseconds while nothing waits and while messages do, [(transport, messages)]."""
    found = {(None, 0): []} | {(transport, count): [] for transport in sides for count in counts}
    for number in range(ROUNDS):
        for (transport, count), times in found.items():
            torch.cuda.synchronize()
            dist.barrier(group=host)
            if products is None:
                time.sleep(WAIT_S)
                for _ in range(count):
                    sides[transport].take(rows)
                continue
            start = time.monotonic()
            for _ in range(count):
                sides[transport].send(rows)
            time.sleep(0.003)  # copies that can go have gone, kernels that wait have started
            measured = products.times(products.count)
            if time.monotonic() - start > WAIT_S:
                print(f"  {transport} {count}: products took longer than the receiver's absence")
            if number > 1:
                times += measured
    return found


def rank_main(rank, directory, megabytes, output):
    """Measure as one of the two ranks; the first reports."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    limit = timedelta(seconds=2 * LIMIT_S)
    dist.init_process_group("nccl", init_method=f"file://{directory}/store", rank=rank, world_size=2, timeout=limit)
    host = dist.new_group(backend="gloo")
    layout = MessageLayout(max_endings=4, hidden_size=HIDDEN, dtype=torch.bfloat16)
    sizes = [mb * 2**20 // (2 * HIDDEN) for mb in megabytes]
    sides = {}
    for peer_memory in (False, True):
        links = connect([[0, 1]], layout, device, max_rows=max(sizes), peer_memory=peer_memory)
        sides[links.transports["forward_out" if rank == 0 else "forward_in"]] = Side(links, layout, device, rank)
    if len(sides) == 1 and rank == 0:
        print("these two GPUs do not reach each other's memory: NCCL alone is measured")

    def tell(case, transport, mb, **figures):
        line = {"case": case, "transport": transport, "MiB": mb} | figures
        print(json.dumps(line), flush=True)
        append_line(output, line | stamp())

    for mb, rows in zip(megabytes, sizes, strict=True):
        for transport, side in sides.items():
            times, header = hop(side, rows, host)
            rates: list = [None, None]
            dist.all_gather_object(rates, stream(side, rows, host), group=host)
            if rank == 0:
                tell("hop", transport, mb, ms=spread(times), header_ms=round(header, 5), gb_s=round(mb * 2**20 / spread(times)[0] / 1e6, 1))
                tell("stream", transport, mb, gb_s=spread(rates[1]))
    products = Products(device) if rank == 0 else None
    found = waiting(sides, products, sizes[0], (1, 5), host)
    if rank == 0:
        alone = spread(found[None, 0])
        for (transport, count), times in found.items():
            slower = round(spread(times)[0] / alone[0] - 1, 4)
            tell("waiting", transport, megabytes[0] if count else 0, messages=count, product_ms=spread(times), slower=slower)
    torch.cuda.synchronize()
    dist.barrier(group=host)
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=whole, nargs="+", default=[40, 80], help="sizes of messages, MiB")
    parser.add_argument("--output", type=output_file, default=RESULTS / "links.jsonl")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank is not None:
        return rank_main(chosen.rank, chosen.directory, chosen.megabytes, chosen.output)
    need_gpus(parser, 2)
    with tempfile.TemporaryDirectory() as directory:
        again = [sys.executable, *sys.argv, "--directory", directory, "--rank"]
        ranks = [subprocess.Popen([*again, str(rank)]) for rank in (0, 1)]
        deadline = time.monotonic() + LIMIT_S + 5
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(0.0 if all(rank.poll() == 0 for rank in ranks) else 2.0)
        for rank in ranks:
            rank.kill()
        sys.exit(max(abs(rank.wait()) for rank in ranks))


if __name__ == "__main__":
    main()
