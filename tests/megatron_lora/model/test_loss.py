"""The chunked, vocabulary-parallel loss equals F.cross_entropy over the full logits, forward and backward, and keeps rows apart.

It looks at no row but the targets, where they are listed.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from full_logits import full_logits

from megatron_lora.model import loss
from scheduling import memory

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
    part = weight[first : first + size]
    return loss.Head(weight_VH=part, first_token=first, widest=size, group=group, sequence_parallel=sequence_parallel)


LISTS = {  # of target rows: whether a row has a label -> whether it is listed
    "all": lambda labelled: labelled | True,
    "labelled": lambda labelled: labelled,
    "some": lambda labelled: labelled & (torch.arange(NUM_ROWS) % 3 == 1),
    "one": lambda labelled: torch.arange(NUM_ROWS) == 3,
    "none": lambda labelled: labelled & False,
}


def targets_of(labels, name):
    """Take the labels of rows away that a list leaves out; return the labels and the list (None: nobody listed them)."""
    if name is None:
        return labels, None
    listed = LISTS[name](labels >= 0)
    return labels.where(listed, -100), listed.nonzero().squeeze(1)


def ours(sequence_parallel=False, chunk_rows=5, listed=None):
    """Return losses [T], the gradient of hidden (put together from the shards of rows), and the logits."""
    hidden, weight, labels, weights = inputs()
    labels, targets = targets_of(labels, listed)
    head = head_of(weight, sequence_parallel)
    size = NUM_ROWS // (head.group.size() if sequence_parallel else 1)
    hidden = hidden[size * head.group.rank() :][:size] if sequence_parallel else hidden
    hidden.requires_grad_()
    losses = loss.cross_entropy(hidden, labels, head, targets, chunk_rows)
    (losses * weights).sum().backward()
    grad = loss.gather_rows(hidden.grad, head.group) if sequence_parallel else hidden.grad
    return losses.detach(), grad, full_logits(hidden.detach(), head)


def reference(listed=None):
    hidden, weight, labels, weights = inputs()
    labels, _ = targets_of(labels, listed)
    hidden.requires_grad_()
    full = hidden @ weight.t()
    losses = F.cross_entropy(full, labels, reduction="none")
    (losses * weights).sum().backward()
    return losses.detach(), hidden.grad, full.detach()


def assert_equal(found, listed=None, tolerance=1e-5):
    for one, expected in zip(found, reference(listed), strict=True):
        torch.testing.assert_close(one, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 5, 12, 100])
def test_equals_torch(chunk_rows, one_process):
    found = ours(chunk_rows=chunk_rows)
    assert_equal(found)
    assert found[0][0] == 0 and not found[1][0].any(), "a row without a label has no loss and no gradient"


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("listed", [None, *LISTS])
def test_vocabulary_parallel_equals_torch(listed, sequence, pool):
    for found in pool(tp=2, sequence=sequence).run(ours, sequence, 5, listed):
        assert_equal(found, listed)


def evaluated(sequence_parallel=False, chunk_rows=5, listed=None, twins=False):
    """Return losses and right predictions [T] of hidden states that point at some labels; `twins`: each token has an equal one later."""
    hidden, weight, labels, _ = inputs()
    if twins:
        weight[-(VOCAB // 2) :] = weight[: VOCAB // 2]
    hidden[1::2] = 5 * weight[labels.clamp(min=0)][1::2]
    labels, targets = targets_of(labels, listed)
    head = head_of(weight, sequence_parallel)
    size = NUM_ROWS // (head.group.size() if sequence_parallel else 1)
    shard = hidden[size * head.group.rank() :][:size] if sequence_parallel else hidden
    full = hidden @ weight.t()
    found = loss.evaluate(shard, labels, head, targets, chunk_rows)
    return *found, F.cross_entropy(full, labels, reduction="none"), full.argmax(1) == labels


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("listed", [None, *LISTS])
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"tp": 2, "sequence": True}])
def test_right_predictions_are_those_of_the_full_logits(parallel, listed, twins, pool):
    for losses, right, expected_losses, expected in pool(**parallel).run(evaluated, parallel.get("sequence", False), 5, listed, twins):
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
        assert torch.equal(right, expected)
        assert listed is not None or 0 < int(right.sum()) < NUM_ROWS - 2, "some are right, and some are wrong"


def test_a_row_of_nan_predicts_nothing(one_process):
    hidden, weight, labels, _ = inputs()
    hidden[1] = float("nan")
    losses, right = loss.evaluate(hidden, labels, head_of(weight))
    assert losses[1].isnan() and not right[1] and losses[2:].isfinite().all()


def ours_in_default_chunks():
    """Bound chunks so that 31 columns, rank 0's, allow 4 rows, and 30, rank 1's, 5."""
    with mock.patch.multiple(memory, LOSS_CHUNK_BYTES=4 * 30 * 5, _LOSS_ROWS=1):
        return ours(chunk_rows=None)


def test_ranks_of_uneven_vocabulary_cut_the_same_chunks(pool):
    for found in pool(tp=2).run(ours_in_default_chunks):
        assert_equal(found)


@pytest.mark.parametrize("listed", LISTS)
def test_only_targets_are_looked_at(listed, one_process, monkeypatch):
    """Losses and gradients are those of all rows, 0 elsewhere; no more chunks are made than the targets fill, all of one height."""
    hidden, weight, labels, weights = inputs()
    labels, targets = targets_of(labels, listed)
    others = torch.ones(NUM_ROWS, dtype=torch.bool)
    others[targets] = False
    hidden[others] = float("nan")  # what is not looked at does no harm
    hidden.requires_grad_()
    sizes, chunk = [], loss._chunk
    monkeypatch.setattr(loss, "_chunk", lambda rows, *rest: sizes.append(len(rows)) or chunk(rows, *rest))
    losses = loss.cross_entropy(hidden, labels, head_of(weight), targets, 5)
    (losses * weights).sum().backward()
    assert sizes == [5] * -(-len(targets) // 5)
    for one, expected in zip((losses.detach(), hidden.grad), reference(listed), strict=False):
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)
    assert not losses[others].any() and not hidden.grad[others].any()


def test_nan_stays_in_its_row(one_process):
    hidden, weight, labels, weights = inputs()
    results = []
    for poison in (0.0, float("nan")):
        h = hidden.clone()
        h[4] += poison
        h.requires_grad_()
        losses = loss.cross_entropy(h, labels, head_of(weight), chunk_rows=5)
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


@pytest.mark.parametrize(
    ("head_rows", "item", "rows"), [(128256, 2, 1024), (64128, 2, 2304), (152064, 2, 768), (49152, 4, 128), (10**6, 4, 75)]
)
def test_chunks_fill_tiles_and_are_bounded(head_rows, item, rows):
    assert memory.loss_chunk_rows(head_rows, item) == rows


def test_full_logits_never_exist(one_process, monkeypatch):
    hidden, weight, labels, _ = inputs()
    monkeypatch.setattr(memory, "LOSS_CHUNK_BYTES", 3 * 4 * VOCAB)
    monkeypatch.setattr(memory, "_LOSS_ROWS", 1)
    seen = []
    chunk = loss._chunk
    monkeypatch.setattr(loss, "_chunk", lambda rows, *rest: seen.append(len(rows)) or chunk(rows, *rest))
    loss.cross_entropy(hidden, labels, head_of(weight))
    assert seen == [3, 3, 3, 3]


def test_a_rows_bits_do_not_depend_on_how_many_others_are_targets(one_process):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(700, 48, generator=generator), torch.randn(VOCAB, 48, generator=generator)
    labels = torch.randint(VOCAB, (700,), generator=generator)
    seen = []
    for others in (0, 1, 130, 500):
        rows = torch.cat((torch.arange(200 - min(others, 200), 200), torch.arange(300, 340), torch.arange(340, 340 + max(others - 200, 0))))
        leaf = hidden.clone().requires_grad_()
        losses = loss.cross_entropy(leaf, labels.where(torch.isin(torch.arange(700), rows), -100), head_of(weight), rows)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        seen.append((losses[300:340], grad[300:340]))
    for losses, grad in seen[1:]:
        assert torch.equal(losses, seen[0][0]) and torch.equal(grad, seen[0][1])
