"""Links over peer memory without a GPU: their bytes under any interleaving of streams, and the executor's order of messages.

A toy device stands in for CUDA: a rank's streams are queues of operations on host memory, and the test decides which queue goes on
next. Or all operations of a rank share one queue and the host stands still until it is empty, which is the least that CUDA promises.
"""

import ctypes
import random
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from megatron_lora.cuda_driver import HANDLE_BYTES, PROTOTYPES, IpcHandle
from megatron_lora.executor import Executor, Position
from megatron_lora.messages import SLOT, Links, MessageLayout, Receiver, Sender
from megatron_lora.peer_links import SLOTS, Ends, Inbox, Outbox
from megatron_lora.plan_feed import Window
from megatron_lora.timeline import Timeline
from scheduling.pipeline import endings, with_drain
from scheduling.types import NOOP, Microbatch, Segment

CPU = torch.device("cpu")


class Toy:
    """A rank's device: what peer_links.Driver asks for, on host memory; `single` puts all streams into one queue."""

    def __init__(self, single: bool):
        self.single, self.queues = single, [deque()]

    def new_stream(self):
        if not self.single:
            self.queues.append(deque())
        return self.queues[-1]

    def current_stream(self):
        return self.queues[0]

    def do(self, stream, act, ready=lambda: True):
        stream.append((ready, act))

    def record(self, stream):
        event = SimpleNamespace(done=False)
        event.query = lambda: event.done
        self.do(stream, lambda: setattr(event, "done", True))
        return event

    def wait_event(self, stream, event):
        self.do(stream, lambda: None, event.query)

    def copy(self, target, source, num_bytes, stream):
        self.do(stream, lambda: ctypes.memmove(target, source, num_bytes))

    def write_flag(self, address, value, stream):
        self.do(stream, lambda: setattr(ctypes.c_uint32.from_address(address), "value", value % 2**32))

    def wait_flag(self, address, value, stream):
        self.do(stream, lambda: None, lambda: ctypes.c_int32(ctypes.c_uint32.from_address(address).value - value).value >= 0)

    def is_idle(self):
        return not any(self.queues)


def toy_link(sender: Toy, receiver: Toy, slot_bytes: int, first: int):
    """Join two devices; `first` is the number of the first message. The memory comes along, to be kept."""
    memory = torch.zeros(SLOTS * slot_bytes, dtype=torch.uint8)
    flags = torch.tensor([first, first], dtype=torch.int64).to(torch.uint32)
    sent, taken = flags.data_ptr(), flags.data_ptr() + 4
    outbox = Outbox(sender, Ends(ring=memory.data_ptr(), slot_bytes=slot_bytes, own_flag=taken, peer_flag=sent))
    inbox = Inbox(receiver, Ends(ring=memory.data_ptr(), slot_bytes=slot_bytes, own_flag=sent, peer_flag=taken))
    outbox.number = inbox.number = first
    return outbox, inbox, (memory, flags)


def contents(direction: int, number: int, size: int) -> torch.Tensor:
    return torch.randint(256, (size,), generator=torch.Generator().manual_seed(2 * number + direction), dtype=torch.uint8)


def stage(device: Toy, out: Outbox, into: Inbox, order, sizes, wrong: list, *, stand_still: bool):
    """One rank's host: a generator that yields where other hosts may run. `order` lists ("send" | "take", number)."""
    mine = 0 if order[0][0] == "send" else 1
    under_way = []
    for action, number in order:
        size = sizes[number]
        if action == "send":
            tensor = torch.full((size,), 0xEE, dtype=torch.uint8)
            device.do(device.current_stream(), lambda t=tensor, n=number: t.copy_(contents(mine, n, len(t))))
            under_way.append((out.send(tensor), tensor))
        else:
            tensor = torch.empty(size, dtype=torch.uint8)
            device.do(device.current_stream(), lambda t=tensor: t.fill_(0x77))  # who had this memory before is still at work
            arrival = into.receive(tensor)
            arrival.wait()
            device.do(
                device.current_stream(),
                lambda t=tensor, n=number: None if torch.equal(t, contents(1 - mine, n, len(t))) else wrong.append((mine, n)),
            )
        yield
        for sent, tensor in under_way:
            if sent.is_completed():
                tensor.fill_(0xDD)  # its memory is somebody else's now
        while stand_still and not device.is_idle():
            yield
    for sent, _ in under_way:
        sent.wait()
    while not device.is_idle():
        yield
    yield "ended"


def run_all(hosts, devices, choose: random.Random) -> bool:
    """Let hosts and queues go on in a random order until all have ended; False when nothing can go on."""
    hosts, idle_turns = list(hosts), 0
    while hosts or not all(device.is_idle() for device in devices):
        heads = [queue for device in devices for queue in device.queues if queue and queue[0][0]()]
        idle_turns = 0 if heads else idle_turns + 1
        if not hosts + heads or idle_turns > 500:  # hosts that stand still take turns, too
            return False
        step = choose.choice(heads + hosts)
        if isinstance(step, deque):
            step.popleft()[1]()
        elif next(step, None) == "ended":
            hosts.remove(step)
    return True


def one_forward_one_backward(num_messages: int) -> tuple[list, list]:
    first, second = [("send", 0)], []
    for number in range(num_messages):
        first += [("send", number + 1)] * (number + 1 < num_messages) + [("take", number)]
        second += [("take", number), ("send", number)]
    return first, second


@pytest.mark.parametrize("first", [0, 2**32 - 5], ids=["from zero", "over the wrap"])
@pytest.mark.parametrize("worst", [False, True], ids=["free streams", "one queue, host stands still"])
def test_every_byte_arrives_under_any_interleaving(worst, first):
    for seed in range(25):
        choose = random.Random(seed)
        devices = Toy(worst), Toy(worst)
        sizes = {number: choose.choice((0, 1, 16, 40)) for number in range(first, first + 12)}
        forward = toy_link(*devices, 40, first)
        backward = toy_link(devices[1], devices[0], 40, first)
        orders = [[(action, first + number) for action, number in order] for order in one_forward_one_backward(12)]
        wrong: list = []
        hosts = (
            stage(devices[0], forward[0], backward[1], orders[0], sizes, wrong, stand_still=worst),
            stage(devices[1], backward[0], forward[1], orders[1], sizes, wrong, stand_still=worst),
        )
        assert run_all(hosts, devices, choose), f"seed {seed}: nothing goes on"
        assert not wrong, f"seed {seed}: (rank, message) {wrong}"


def test_a_sender_runs_ahead_by_the_slots_and_its_own_work_goes_on():
    sender, receiver = Toy(False), Toy(False)
    outbox, inbox, _memory = toy_link(sender, receiver, 8, 0)
    messages = [torch.full((8,), number, dtype=torch.uint8) for number in range(2 * SLOTS)]
    sent = [outbox.send(message) for message in messages]
    done = sender.record(sender.current_stream())
    assert run_all([], [receiver], random.Random(0)) and not run_all([], [sender], random.Random(0))
    assert done.query() and [message.is_completed() for message in sent] == [True] * SLOTS + [False] * SLOTS
    tensors = [torch.empty(8, dtype=torch.uint8) for _ in sent]
    for tensor in tensors:
        inbox.receive(tensor)
    assert run_all([], [sender, receiver], random.Random(0))
    assert [int(tensor[0]) for tensor in tensors] == list(range(2 * SLOTS)) and all(message.is_completed() for message in sent)
    assert all(map(torch.equal, tensors, messages))


def test_waiting_for_a_message_means_until_it_is_taken():
    sender, receiver = Toy(False), Toy(False)
    outbox, inbox, _memory = toy_link(sender, receiver, 8, 0)
    message = torch.zeros(8, dtype=torch.uint8)
    outbox.send(message).wait()
    done = sender.record(sender.current_stream())
    assert not run_all([], [sender], random.Random(0)) and not done.query()
    tensor = torch.empty(8, dtype=torch.uint8)
    inbox.receive(tensor)
    assert run_all([], [sender, receiver], random.Random(0)) and done.query()


def test_a_message_larger_than_a_slot_is_refused():
    outbox, inbox, _memory = toy_link(Toy(False), Toy(False), 8, 0)
    for end in (outbox.send, inbox.receive):
        with pytest.raises(AssertionError, match="9 bytes does not fit into a slot of 8"):
            end(torch.zeros(9, dtype=torch.uint8))


def test_a_handle_is_passed_by_value_as_the_driver_declares_it():
    assert ctypes.sizeof(IpcHandle) == HANDLE_BYTES
    name = bytes(range(HANDLE_BYTES))
    assert bytes(IpcHandle.from_buffer_copy(name)) == name, "a zero byte ends nothing"
    assert PROTOTYPES["cuIpcOpenMemHandle_v2"][1] is IpcHandle


# The executor's order of messages. A link is named by its stages: (sender, receiver).


class Recorder:
    """Either end of a link: notes what the executor asks of it."""

    transport = "none"

    def __init__(self, link, notes):
        self.link, self.notes, self.number = link, notes, 0

    def _note(self, action):
        self.notes.append((action, self.link, self.number))
        self.number += 1
        return SimpleNamespace(is_completed=lambda: True, wait=lambda: None)

    def send(self, tensor):
        return self._note("send")

    def receive(self, tensor):
        tensor.zero_()
        tensor[SLOT] = self.number
        return self._note("take")


class Model:
    """One parameter; as many rows out as the microbatch has tokens."""

    def __init__(self):
        self.weight = torch.ones((), requires_grad=True)

    def __call__(self, data, hidden):
        return self.weight * torch.ones(len(data.weights), 2)

    def losses(self, hidden, labels, targets):
        return hidden.sum(dim=1)


def note_messages(stream, index: int, num_stages: int, delay: int) -> list:
    """Return what the executor of one stage sends and takes, in its order: (action, link, number)."""
    notes: list = []
    layout = MessageLayout(max_endings=1, hidden_size=2, dtype=torch.float32)

    def receiver(link):
        end = Receiver(Recorder(link, notes), layout, CPU)
        end.ahead = False  # as on a GPU
        return end

    first, last = index == 0, index == num_stages - 1
    links = Links(
        None if first else receiver((index - 1, index)),
        None if last else Sender(Recorder((index, index + 1), notes)),
        None if last else receiver((index + 1, index)),
        None if first else Sender(Recorder((index, index - 1), notes)),
    )
    optimizer = SimpleNamespace(
        start_reduction=lambda loss: None, finish_reduction=lambda: (torch.zeros(()), torch.zeros(())), step=lambda step, norm: None
    )
    executor = Executor(
        Model(), Position(stage=index, num_stages=num_stages, delay=delay), links, layout,
        load=lambda microbatch: SimpleNamespace(
            labels=None,
            targets=None,
            weights=torch.ones(microbatch.num_tokens),
            route=SimpleNamespace(segments=((0, 1, microbatch.segments[0].job),)),
        ),
        num_rows=lambda microbatch: microbatch.num_tokens,
        optimizers=[optimizer] * (num_stages + delay + 1), on_step=lambda step: None, on_forward=lambda microbatch: None,
        timeline=Timeline(CPU), device=CPU,
    )  # fmt: skip
    executor.run([Window(stream, endings(stream))])
    return notes


def some_stream(num_stages: int, delay: int, num_slots: int, seed: int):
    """Return a drained stream of jobs that take turns, each slot a whole step, with empty slots among them."""
    choose, jobs = random.Random(seed), num_stages + delay + 1
    slots = [
        NOOP if choose.random() < 0.25 else Microbatch((Segment(slot % jobs, slot // jobs, (0,), choose.randint(1, 3)),))
        for slot in range(num_slots)
    ]
    return with_drain(tuple(slots), num_stages, delay)


def walk(orders: list[list], num_slots: int, waits: dict | None = None) -> bool:
    """Let every stage do one thing after another, each wait blocking; False when all stand still with work left.

    `waits` gathers, per link, the messages whose sender cannot know from messages it has taken that message - `num_slots` was taken.
    """
    num_stages = len(orders)
    place = [0] * num_stages
    sent: dict = {}  # link -> clock of each message
    taken: dict = {}  # link -> own time of each take
    clocks = [[0] * num_stages for _ in orders]  # what each stage knows of each stage's place
    moved = True
    while moved:
        moved = False
        for index, order in enumerate(orders):
            while place[index] < len(order):
                action, link, number = order[place[index]]
                messages, takes = sent.setdefault(link, []), taken.setdefault(link, [])
                if (action == "take" and len(messages) <= number) or (action == "send" and len(takes) <= number - num_slots):
                    break
                place[index], moved = place[index] + 1, True
                clocks[index][index] = place[index]
                if action == "take":
                    clocks[index] = [max(own, other) for own, other in zip(clocks[index], messages[number], strict=True)]
                    takes.append(place[index])
                    continue
                messages.append(list(clocks[index]))
                if waits is not None and number >= num_slots and clocks[index][link[1]] < takes[number - num_slots]:
                    waits.setdefault(link, []).append(number)
    return all(done == len(order) for done, order in zip(place, orders, strict=True))


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_no_circle_of_waits_and_none_for_slots_in_the_steady_state(num_stages):
    for seed, delay in ((0, 0), (1, 1), (2, 0)):
        stream = some_stream(num_stages, delay, 5 * num_stages, seed)
        orders = [note_messages(stream, index, num_stages, delay) for index in range(num_stages)]
        assert sum(map(len, orders)) == 4 * len(stream) * (num_stages - 1)
        assert walk(orders, SLOTS)
        waits: dict = {}
        assert walk(orders, 2, waits)
        for (sender, receiver), numbers in waits.items():
            warm_up = num_stages - 1 - sender
            filling, draining = range(warm_up + 1), range(len(stream) - warm_up, len(stream))
            assert set(numbers) <= set(filling if receiver > sender else draining), (sender, receiver, numbers)


def test_the_walk_sees_a_circle():
    orders = [[("send", (0, 1), n) for n in range(3)] + [("take", (1, 0), 0)], [("send", (1, 0), 0), ("send", (1, 0), 1)]]
    assert walk([orders[0][:2], [("take", (0, 1), 0)]], 2)
    assert not walk([orders[0], [*orders[1], ("take", (0, 1), 0)]], 1)
