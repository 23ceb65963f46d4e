"""The mask's bits: pinned values, quantisation, independence of packing, and statistics of the hash."""

import math

import numpy as np
import pytest
import torch

from fused_ops.lora.dropout import keep_mask, quantised_p, row_keys, threshold

T, K = 1024, 1024
PINNED_KEYS = [3208588772, 307793280, 3707981479, 1534118324]
PINNED_MASK = ["0100111011101011", "0111111011111111", "1011011011101011", "1010101111100111"]


def masks(p=0.25, module=0, seed=7, sample=3, epoch=0):
    return keep_mask(torch.from_numpy(row_keys(seed, sample, epoch, T)), 0, K, module, p)


def test_the_bits_are_pinned():
    """Checkpoints and resumed runs rely on these bits: they change with a new major version only."""
    keys = row_keys(1, 2, 3, 4)
    assert keys.dtype == np.int32
    assert keys.view(np.uint32).tolist() == PINNED_KEYS
    kept = keep_mask(torch.from_numpy(keys), 5, 16, 2, 0.5)
    assert ["".join("01"[int(v)] for v in row) for row in kept] == PINNED_MASK


def test_python_integers_give_the_same_hash():
    keys = row_keys(11, 0, 0, 8)
    kept = keep_mask(torch.from_numpy(keys), 4000, 32, 1, 0.3)
    for t in range(8):
        for i in range(32):
            column = ((4000 + i) >> 1) * 0x9E3779B1 & 0xFFFFFFFF
            h = ((int(keys.view(np.uint32)[t]) ^ column) * 0x7FEB352D) & 0xFFFFFFFF
            x = h ^ (h >> 15)
            h = (x * 0xC2B2AE36 + (x >> 16 | x << 16)) & 0xFFFFFFFF
            assert bool(kept[t, i]) == (h >> (20 if i % 2 else 4) & 1023 >= round(1024 * 0.3))


def test_p_is_quantised_and_checked():
    assert quantised_p(0.1) == 102 / 1024
    assert threshold(0.0) == 0 and threshold(0.99999) == 1023
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="not in"):
            threshold(p)
    assert keep_mask(torch.zeros(3, dtype=torch.int32), 0, 9, 0, 0.0).all()
    with pytest.raises(ValueError, match="module 3"):
        keep_mask(torch.zeros(1, dtype=torch.int32), 0, 1, 3, 0.1)


def test_shards_and_positions_see_slices_of_one_mask():
    keys = torch.from_numpy(row_keys(7, 3, 0, T))
    assert torch.equal(keep_mask(keys[100:200], 256, 128, 1, 0.25), masks(module=1)[100:200, 256:384])
    assert np.array_equal(row_keys(7, 3, 0, 10), row_keys(7, 3, 0, T)[:10])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("module", [0, 1, 2])
def test_keep_rate_overall_by_row_and_by_column(p, module):
    kept, q = masks(p, module).double(), 1 - quantised_p(p)
    sigma = math.sqrt(q * (1 - q))
    assert abs(kept.mean() - q) < 4 * sigma / math.sqrt(T * K)
    for dim in (0, 1):
        z = (kept.mean(dim) - q) / (sigma / math.sqrt(T))
        assert z.abs().max() < 5.5
        assert 0.85 < z.std() < 1.15


def z_of_correlation(a, b):
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / math.sqrt(a.pow(2).sum() * b.pow(2).sum()) * math.sqrt(a.numel()))


def test_no_correlation_across_modules_jobs_epochs_samples():
    base = masks()
    others = [masks(module=1), masks(module=2), masks(seed=8), masks(epoch=1), masks(sample=4)]
    assert max(abs(z_of_correlation(base, other)) for other in others) < 4.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512])
def test_no_correlation_between_rows_or_features_at_a_distance(lag):
    for module in range(3):
        kept = masks(module=module)
        assert abs(z_of_correlation(kept[lag:], kept[:-lag])) < 4.5
        assert abs(z_of_correlation(kept[:, lag:], kept[:, :-lag])) < 4.5
        assert abs(z_of_correlation(kept[lag:, lag:], kept[:-lag, :-lag])) < 4.5


def test_pairs_of_columns_and_of_rows_are_independent():
    """The largest of half a million pairwise correlations is what chance gives."""
    for kept in (masks(), masks().T):
        centred = kept.double() - kept.double().mean(0)
        corr = centred.T @ centred / (centred.norm(dim=0)[:, None] * centred.norm(dim=0)[None, :])
        z = corr[torch.triu(torch.ones_like(corr), 1).bool()] * math.sqrt(T)
        assert z.abs().max() < 6 and 0.97 < z.std() < 1.03


def test_levels_are_uniform():
    """Chi-square over the 1024 levels, through 32 thresholds."""
    keys = torch.from_numpy(row_keys(5, 1, 0, T))
    for module in range(3):
        below = torch.stack([~keep_mask(keys, 0, K, module, i / 32) for i in range(1, 32)]).double().mean((1, 2))
        expected = torch.arange(1, 32, dtype=torch.float64) / 32
        z = (below - expected) / torch.sqrt(expected * (1 - expected) / (T * K))
        assert z.abs().max() < 4.5
