"""Scripts of the repository, no part of what is installed. Run from its root: python scripts/NAME.py, python -m scripts.bench.NAME."""
