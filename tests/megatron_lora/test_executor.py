"""The executor by itself: one stage, stub model and optimizers, many windows."""

from types import SimpleNamespace

import torch

from megatron_lora.executor import Executor, Position
from megatron_lora.messages import Links, MessageLayout
from megatron_lora.plan_feed import Window
from megatron_lora.timeline import Timeline
from scheduling.pipeline import endings
from scheduling.types import NOOP, Microbatch, Segment

ROWS = 3


class Model:
    """Multiplies nothing, remembers nothing: the output depends on one parameter."""

    def __init__(self):
        self.weight = torch.ones((), requires_grad=True)

    def __call__(self, data, hidden):
        return self.weight * torch.ones(ROWS, 2)

    def losses(self, hidden, labels, targets):
        assert targets.tolist() == list(range(ROWS))
        return hidden.sum(dim=1)


class Optimizer:
    """Hands the loss on as the squared norm."""

    def start_reduction(self, loss):
        self.loss = loss

    def finish_reduction(self):
        return self.loss, self.loss

    def step(self, step, square_norm):
        pass


def test_a_long_stream_is_not_piled_up():
    slots, num_windows, delay = 8, 40, 1
    done, held = [], []
    executor = Executor(
        Model(),
        Position(stage=0, num_stages=1, delay=delay),
        Links(None, None, None, None),
        MessageLayout(max_endings=1, hidden_size=2, dtype=torch.float32),
        load=lambda microbatch: SimpleNamespace(
            labels=None,
            targets=torch.arange(ROWS),
            weights=torch.ones(ROWS),
            route=SimpleNamespace(segments=((0, ROWS, microbatch.segments[0].job),)),
        ),
        num_rows=lambda microbatch: microbatch.num_tokens,
        optimizers=[Optimizer(), Optimizer()],
        on_step=lambda step: done.append((step.job, step.step, float(step.loss))),
        on_forward=lambda microbatch: None,
        timeline=Timeline(torch.device("cpu")),
        device=torch.device("cpu"),
    )

    def windows():
        for window in range(num_windows):
            numbers = range(window * slots, (window + 1) * slots)  # two jobs take turns, each slot a whole step
            stream = tuple(Microbatch((Segment(number % 2, number // 2, (0,), ROWS),)) for number in numbers)
            yield Window(stream, endings(stream))
            held.append((sum(slot != NOOP for slot in executor.stream), sum(map(len, executor.endings)), len(executor.verdicts)))
        yield Window((NOOP,) * (1 + delay), ((),) * (1 + delay))

    executor.run(windows())
    assert done == [(number % 2, number // 2, 2.0 * ROWS) for number in range(slots * num_windows)]
    assert max(map(max, held)) <= 1 + delay, held
