"""Clock and power of the GPUs while something runs, as nvidia-smi shows them once a second.

Under its power limit a GPU lowers its clock: speeds compare only beside clocks.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gauged(wanted: bool = True) -> Iterator[dict[str, list[float]]]:
    """Give a dict that is filled at the end: mean `sm_mhz` and `power_w` of each visible GPU; empty without nvidia-smi or `wanted`."""
    found: dict[str, list[float]] = {}
    if not wanted or shutil.which("nvidia-smi") is None:
        yield found
        return
    query = ["nvidia-smi", "--query-gpu=index,clocks.sm,power.draw", "--format=csv,noheader,nounits", "--loop=1"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield found
        finally:
            process.terminate()
            text, _ = process.communicate()
            try:
                found |= means(text)
            except ValueError as error:
                print(f"gauges: nvidia-smi says something else than numbers ({error}): no clocks", file=sys.stderr)


def means(text: str) -> dict[str, list[float]]:
    """Return the means of nvidia-smi's lines "index, MHz, W" for each GPU; the last line may be cut off, and is left out."""
    rows = [list(map(float, line.split(","))) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    of_gpus = [[row for row in rows if row[0] == index] for index in sorted({row[0] for row in rows})]
    names = ("sm_mhz", "power_w") if rows else ()
    return {name: [round(statistics.fmean(row[k] for row in of_gpu), 1) for of_gpu in of_gpus] for k, name in enumerate(names, 1)}
