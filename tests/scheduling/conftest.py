"""Hypothesis settings of the scheduling tests: derandomised, no deadline (the cores are shared)."""

from hypothesis import HealthCheck, settings

settings.register_profile("scheduling", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("scheduling")
