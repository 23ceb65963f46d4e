"""Plot scripts/bench/results/kernels.jsonl: ratio to the frozen floor per shape, and each fused pass against the memory roofline.

python -m scripts.plot_kernels            writes scripts/bench/results/kernels.png from each case's latest line
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from scripts.bench.stamp import RESULTS  # noqa: E402
from scripts.one_line import OneLineParser, json_lines  # noqa: E402

COPY_TB_S = {"H100": 3.0, "H200": 4.3}  # measured device-to-device copies, bytes read and written
PASSES = {"piece S": "in", "piece dS dB": "out", "piece dA": "in"}  # which activation each pass must read once


def latest(path: Path) -> list[dict]:
    """Return the last line of each (shape, p, mix)."""
    rows = json_lines(path)
    return list({(row["shape"], row["p"], row["mix"]): row for row in rows}.values())


def main():
    OneLineParser(description=__doc__.splitlines()[0]).parse_args()
    rows = latest(RESULTS / "kernels.jsonl")
    device, copy_tb_s = next((item for item in COPY_TB_S.items() if item[0] in rows[-1]["hardware"]), ("H200", COPY_TB_S["H200"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6))
    names = [f"{row['shape']}\np={row['p']}" + ("" if row["mix"] == "equal" else f"\n{row['mix']}") for row in rows]
    ratios = [row["ratio"] for row in rows]
    spread = [[row["ratio"] - row["ratio_low"] for row in rows], [row["ratio_high"] - row["ratio"] for row in rows]]
    left.bar(range(len(rows)), ratios, yerr=spread, capsize=3, color="tab:blue", label="fused")
    left.plot(
        [i for i, row in enumerate(rows) if row["target"]], [row["target"] for row in rows if row["target"]], "r_", ms=18, label="target"
    )
    left.axhline(1.0, color="k", lw=0.8)
    left.set_xticks(range(len(rows)), names, rotation=90, fontsize=7)
    left.set_ylim(0.9, max(ratios) + 0.1)
    left.set_ylabel("forward + backward / frozen floor")
    left.legend()
    for name, side in PASSES.items():
        points = []
        for row in rows:
            if row["mix"] == "equal" and row["p"] == 0:
                k, n = (int(v) for v in row["shape"].split("->"))
                points.append((row["rows"] * (k if side == "in" else n) * 2 / 1e6, row["times_ms"][name][0] * 1000))
        right.loglog(*zip(*sorted(points), strict=True), "o-", label=name.removeprefix("piece "))
    sizes = [50, 600]
    right.loglog(sizes, [size / copy_tb_s for size in sizes], "k--", label=f"one read at {copy_tb_s} TB/s ({device})")
    right.set_xlabel("MB of the activation that is read")
    right.set_ylabel("microseconds (p = 0)")
    right.legend()
    figure.suptitle(f"{rows[-1]['hardware']}, {rows[0]['rows']} tokens, commit {', '.join(sorted({row['commit'] for row in rows}))}")
    figure.tight_layout()
    figure.savefig(RESULTS / "kernels.png", dpi=110)


if __name__ == "__main__":
    main()
