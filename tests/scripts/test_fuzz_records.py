"""A seeded sample of the fuzz over dataset files and configs; the whole is run by hand (scripts/fuzz_records.py)."""

import collections

import pytest

from scripts.fuzz_records import run_case

NUM = 60


@pytest.mark.parametrize("kind", ["records", "config"])
def test_a_right_result_or_one_line(kind):
    pytest.importorskip("pyarrow")
    cases = [run_case(kind, seed) for seed in range(7000, 7000 + NUM)]
    failed = [(case["seed"], case["failed"]) for case in cases if case["outcome"] == "failed"]
    assert not failed, failed[0][1]
    assert min(collections.Counter(case["outcome"] for case in cases).values()) > 1, "some are right and some are refused"


def test_a_case_is_its_seed_alone():
    pytest.importorskip("pyarrow")
    assert [run_case("records", 11), run_case("records", 12)] == [run_case("records", 11), run_case("records", 12)]
