"""Benchmarks, run from the repository's root as python -m scripts.bench.NAME; what they find goes to results/, a JSON line each."""
