"""The executor alone: one stage, stub model and optimizers, many windows."""

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lora.data.microbatch import Part
from megatron_lora.output.timeline import Timeline
from megatron_lora.parallel.messages import Links, MessageLayout
from megatron_lora.parallel.process_groups import Position
from megatron_lora.training.evaluate import EvaluationSums
from megatron_lora.training.executor import Executor
from megatron_lora.training.objectives import cross_entropy
from scheduling.follow import Window
from scheduling.pipeline import endings
from scheduling.types import NOOP, Microbatch, Segment

ROWS, DELAY = 3, 1


class Model:
    """Multiplies nothing, remembers nothing: the output depends on one parameter."""

    def __init__(self, device):
        self.weight = torch.ones((), requires_grad=True, device=device)

    def __call__(self, data, hidden):
        return self.weight * torch.ones(ROWS, 2, device=self.weight.device)

    def losses(self, hidden, labels, targets):
        assert targets.shape == (ROWS,)
        return hidden.sum(dim=1)

    def evaluate(self, hidden, labels, targets):
        assert not hidden.requires_grad, "an evaluation keeps a graph"
        return hidden.sum(dim=1), torch.arange(ROWS, device=hidden.device) > 0


class Optimizer:
    """Returns the loss as the squared norm."""

    def start_reduction(self, sums):
        self.sums = sums

    def finish_reduction(self):
        return self.sums[0], self.sums

    def step(self, step, square_norm):
        pass


def sft(rows, part, weights):
    """The outcome of cross-entropy."""
    return cross_entropy(rows, weights)


def make_executor(device, on_step, on_evaluation=lambda done: None):
    return Executor(
        Model(device),
        Position(stage=0, num_stages=1, delay=DELAY),
        Links(None, None, None, None),
        MessageLayout(max_endings=2, hidden_size=2, dtype=torch.float32),
        load=lambda microbatch: SimpleNamespace(
            labels=None,
            targets=torch.arange(ROWS, device=device),
            weights=torch.ones(ROWS, device=device),
            parts=tuple(Part(job=s.job, step=s.step, first=0, end=ROWS, batch=s.step) for s in microbatch.segments),
        ),
        num_rows=lambda microbatch: microbatch.num_tokens,
        jobs={number: SimpleNamespace(optimizer=Optimizer(), outcome=sft, references=None) for number in range(2)},
        evaluations=EvaluationSums(None, device),
        on_step=on_step,
        on_evaluation=on_evaluation,
        on_forward=lambda microbatch: None,
        on_window=lambda window: None,
        move=lambda job, step: None,
        with_references=lambda microbatch: nullcontext(),
        timeline=Timeline(torch.device("cpu")),
        device=device,
    )


def take_turns(first, end):
    """Return a window of two jobs that take turns, each slot a complete step."""
    stream = tuple(Microbatch((Segment(number % 2, number // 2, (0,), ROWS),)) for number in range(first, end))
    return Window(stream, endings(stream))


LAST = Window((NOOP,) * (1 + DELAY), ((),) * (1 + DELAY))


def test_a_long_stream_is_not_piled_up():
    slots, num_windows = 8, 40
    done, held = [], []
    executor = make_executor(torch.device("cpu"), lambda step: done.append((step.job, step.step, float(step.sums[0]))))

    def windows():
        for window in range(num_windows):
            yield take_turns(window * slots, (window + 1) * slots)
            held.append((len(executor.stream), len(executor.verdicts)))
        yield LAST

    executor.run(windows())
    assert done == [(number % 2, number // 2, 2.0 * ROWS) for number in range(slots * num_windows)]
    assert max(map(max, held)) <= 1 + DELAY, held


def test_evaluations_are_summed_over_their_slots_and_reported_in_order():
    """Between the steps, one evaluation of two slots and one of one slot: each reported once, before the next steps' ends."""
    done = []
    executor = make_executor(
        torch.device("cpu"),
        lambda step: done.append(("step", step.job, step.step)),
        lambda evaluation: done.append((evaluation.job, evaluation.step, float(evaluation.sums[0]), float(evaluation.num_right))),
    )

    def slots(evaluate, *keys):
        return tuple(Microbatch((Segment(job, step, (sample,), ROWS),), evaluate) for job, step, sample in keys)

    steps = [slots(False, (job, step, 0)) for step in range(2) for job in range(2)]
    evaluated = slots(True, (0, 1, 0), (0, 1, 1)), slots(True, (1, 1, 0))
    stream = (*steps[0], *steps[1], NOOP, *evaluated[0], *steps[2], *evaluated[1], *steps[3], *LAST.stream)
    ended = endings(stream)
    executor.run([Window(stream[:4], ended[:4]), Window(stream[4:], ended[4:])])
    first, second = (0, 1, 2.0 * 2 * ROWS, 2.0 * (ROWS - 1)), (1, 1, 2.0 * ROWS, ROWS - 1.0)
    assert done == [("step", 0, 0), ("step", 1, 0), first, ("step", 0, 1), second, ("step", 1, 1)]
    assert not executor.evaluations.sums


class Holder(torch.autograd.Function):
    """Holds something until its node of the graph is gone, as a layer holds what its backward reads."""

    @staticmethod
    def forward(ctx, value, held):
        ctx.held = held
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class SentBack:
    """The next stage: takes activations and gives back a gradient of ones."""

    ahead, posted = False, ()

    def __init__(self, layout):
        self.layout = layout

    def post(self, slot, num_rows):
        pass

    def take(self, slot):
        message = self.layout.blank(slot, ROWS, torch.device("cpu"))
        message.body.fill_(1.0)
        return message


def test_a_graph_is_gone_after_its_backward_without_the_collector():
    """On a stage that is not the last, a microbatch's graph is freed at once, not when Python's garbage collector next runs."""
    held, alive = [], []
    layout = MessageLayout(max_endings=2, hidden_size=2, dtype=torch.float32)
    executor = make_executor(torch.device("cpu"), lambda step: None)
    executor.position = Position(stage=0, num_stages=2, delay=0)
    executor.links = SimpleNamespace(
        forward_in=None, forward_out=SimpleNamespace(post=lambda message: None), backward_in=SentBack(layout), backward_out=None,
        drain=lambda: None,
    )  # fmt: skip
    weight = torch.ones((), requires_grad=True)

    def model(data, hidden):
        alive.append(sum(reference() is not None for reference in held))
        kept = torch.zeros(())
        held.append(weakref.ref(kept))
        return Holder.apply(weight, kept) * torch.ones(ROWS, 2)

    executor.model = model
    stream = tuple(Microbatch((Segment(number % 2, number // 2, (0,), ROWS),)) for number in range(8))
    gc.collect()
    gc.disable()
    try:
        executor.run([Window(stream, tuple(() for _ in stream))])
    finally:
        gc.enable()
    assert weight.grad == 2 * ROWS * len(stream) and len(held) == len(stream)
    assert max(alive) <= 1 and not any(reference() for reference in held), "graphs wait for the collector"


class NoWaits(TorchDispatchMode):
    """Refuses copies between host and device that the host would wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            assert args[0].device == args[1].device or args[2:] == (True,), "the host waits for a copy"
        elif func is torch.ops.aten._to_copy.default:
            assert kwargs.get("device", args[0].device) == args[0].device or kwargs.get("non_blocking"), "the host waits for a copy"
        return func(*args, **kwargs)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that was built for CUDA; no GPU")
def test_the_host_does_not_wait_for_a_gpu():
    """With fake tensors on a GPU: reading a value, or a copy that the host waits for, raises, without a GPU."""
    done = []
    with FakeTensorMode(), NoWaits(), mock.patch.object(torch.Tensor, "backward", lambda self: None):
        executor = make_executor(torch.device("cuda"), done.append)
        with pytest.raises(DataDependentOutputException):  # after the last step it asks whether messages went astray
            executor.run([take_turns(0, 6), LAST])
    assert [(step.job, step.step) for step in done] == [(number % 2, number // 2) for number in range(6)]
