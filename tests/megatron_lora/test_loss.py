"""The chunked, vocabulary-parallel loss equals F.cross_entropy over the full logits, forward and backward, and keeps rows apart."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lora import loss

NUM_ROWS, HIDDEN, VOCAB = 12, 16, 61


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(VOCAB, (NUM_ROWS,), generator=generator)
    labels[[0, 7]] = -100
    labels[3] = VOCAB - 1
    return hidden, weight, labels, torch.rand(NUM_ROWS, generator=generator)


def head_of(weight, sequence_parallel=False):
    """Cut this rank's range of the vocabulary, padded as the embedding is."""
    group = dist.group.WORLD
    size = -(-VOCAB // group.size())
    first = size * group.rank()
    return loss.Head(weight_VH=weight[first : first + size], first_token=first, group=group, sequence_parallel=sequence_parallel)


def ours(sequence_parallel=False, chunk_rows=5):
    """Return losses [T], the gradient of hidden (put together from the shards of rows), and the logits."""
    hidden, weight, labels, weights = inputs()
    head = head_of(weight, sequence_parallel)
    size = NUM_ROWS // (head.group.size() if sequence_parallel else 1)
    hidden = hidden[size * head.group.rank() :][:size] if sequence_parallel else hidden
    hidden.requires_grad_()
    losses = loss.cross_entropy(hidden, labels, head, chunk_rows)
    (losses * weights).sum().backward()
    grad = loss.gather_rows(hidden.grad, head.group) if sequence_parallel else hidden.grad
    return losses.detach(), grad, loss.logits(hidden.detach(), head)


def reference():
    hidden, weight, labels, weights = inputs()
    hidden.requires_grad_()
    full = hidden @ weight.t()
    losses = F.cross_entropy(full, labels, reduction="none")
    (losses * weights).sum().backward()
    return losses.detach(), hidden.grad, full.detach()


def assert_equal(found, tolerance=1e-5):
    for one, expected in zip(found, reference(), strict=True):
        torch.testing.assert_close(one, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 5, 12, 100])
def test_equals_torch(chunk_rows, one_process):
    found = ours(chunk_rows=chunk_rows)
    assert_equal(found)
    assert found[0][0] == 0 and not found[1][0].any(), "a row without a label has no loss and no gradient"


@pytest.mark.parametrize("sequence", [False, True])
def test_vocabulary_parallel_equals_torch(sequence, pool):
    for found in pool(tp=2, sequence=sequence).run(ours, sequence):
        assert_equal(found)


def test_nan_stays_in_its_row(one_process):
    hidden, weight, labels, weights = inputs()
    results = []
    for poison in (0.0, float("nan")):
        h = hidden.clone()
        h[4] += poison
        h.requires_grad_()
        losses = loss.cross_entropy(h, labels, head_of(weight), 5)
        (losses * weights).sum().backward()
        results.append((losses.detach(), h.grad))
    others = torch.arange(NUM_ROWS) != 4
    assert results[1][0][4].isnan() and results[1][1][4].isnan().all()
    assert all(torch.equal(clean[others], poisoned[others]) for clean, poisoned in zip(*results, strict=True))


def test_a_row_without_weight_passes_nothing_on(one_process):
    hidden, weight, labels, weights = inputs()
    hidden[4] = float("nan")
    hidden.requires_grad_()
    weights[4] = 0
    loss.cross_entropy(hidden, labels, head_of(weight)).backward(weights)
    assert not hidden.grad[4].any() and not hidden.grad.isnan().any()


def large():
    hidden, weight, labels, _ = inputs()
    hidden = hidden * 300
    return loss.cross_entropy(hidden, labels, head_of(weight)), F.cross_entropy(hidden @ weight.t(), labels, reduction="none")


def test_large_logits_do_not_overflow(one_process, pool):
    for found, expected in (large(), *pool(tp=2).run(large)):
        assert expected.max() > 500
        torch.testing.assert_close(found, expected)


def test_bf16_is_as_good_as_torchs(one_process):
    exact = reference()
    hidden, weight, labels, weights = inputs(torch.bfloat16)

    def torchs(h):
        return F.cross_entropy((h @ weight.t()).float(), labels, reduction="none")

    errors = []
    for compute in (lambda h: loss.cross_entropy(h, labels, head_of(weight)), torchs):
        h = hidden.clone().requires_grad_()
        compute(h).backward(weights)
        errors.append(h.grad.float() - exact[1])
    assert errors[0].square().mean() <= 4 * errors[1].square().mean()


def test_no_gradient_is_made_when_none_is_wanted(one_process):
    hidden, weight, labels, _ = inputs()
    hidden.requires_grad_()
    with torch.no_grad():
        losses = loss.cross_entropy(hidden, labels, head_of(weight))
    assert not losses.requires_grad
    torch.testing.assert_close(losses, reference()[0])


def test_full_logits_never_exist(one_process, monkeypatch):
    hidden, weight, labels, _ = inputs()
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 3 * VOCAB)
    seen = []
    chunk = loss._chunk
    monkeypatch.setattr(loss, "_chunk", lambda rows, *rest: seen.append(len(rows)) or chunk(rows, *rest))
    loss.cross_entropy(hidden, labels, head_of(weight))
    assert seen == [3, 3, 3, 3]
