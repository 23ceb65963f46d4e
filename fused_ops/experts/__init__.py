"""Frozen mixtures of experts: the choice of experts, rows in the order of experts, grouped products, and the sum over a token's experts."""
