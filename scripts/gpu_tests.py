"""Runs the tests that need a GPU, each folder in a process of its own, and records that they passed: commit, hardware, versions, counts.

    python -m scripts.gpu_tests [--commit SHA] [pytest arguments ...]     from the root of the repository, on a machine with a GPU

Appends a line to scripts/bench/results/gpu_tests.jsonl for each folder, whether or not all passed; CI has no GPU, so these lines say
when they last did (docs/measured.md). Ends with 1 where a test failed. `--commit` names the commit where the checkout cannot tell it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from scripts.bench.stamp import RESULTS, append_line, stamp

FOLDERS = ("tests/fused_ops/gpu", "tests/megatron_lora/gpu")


def main(arguments: list[str]) -> int:
    """Run both folders; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="the commit, where the checkout cannot tell it")
    options, arguments = parser.parse_known_args(arguments)
    failed = False
    for folder in FOLDERS:
        with tempfile.TemporaryDirectory() as scratch:
            report, start = Path(scratch) / "report.xml", time.monotonic()
            command = [sys.executable, "-m", "pytest", "-q", folder, f"--junitxml={report}", *arguments]
            ended = subprocess.run(command).returncode
            suite = ElementTree.parse(report).getroot().find("testsuite")
            assert suite is not None, "pytest wrote a report without a suite"
            counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        failed |= ended != 0
        line = stamp(code=options.commit) | {"case": folder, "passed": passed, "seconds": round(time.monotonic() - start)} | counts
        append_line(RESULTS / "gpu_tests.jsonl", line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
