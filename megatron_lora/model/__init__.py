"""The frozen stage and the adapters on it."""
