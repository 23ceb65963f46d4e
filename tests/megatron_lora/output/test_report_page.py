"""report.html: what it says, that it needs nothing else, and that a real browser shows it without a complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import example_runs
import pytest

from megatron_lora.__main__ import main
from megatron_lora.output.report_charts import Axes, _apart, smoothed, thinned, ticks
from megatron_lora.output.report_page import write_report_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed; apt-get install chromium")


def page_of(run: Path) -> str:
    return write_report_page(run).read_text(encoding="utf-8")


def shown(page: Path) -> tuple[str, list[str]]:
    """Return the page's elements after its script has run, and what the browser complains of."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [str(BROWSER), *quiet, f"--user-data-dir={page.parent / 'browser'}", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]


def test_a_page_has_states_reasons_bests_accounting_events_and_the_window_in_which_most_happened(tmp_path):
    run = example_runs.make_run(tmp_path / "run")
    page = page_of(run)
    text = unescape(re.sub(r"<[^>]*>", " ", page))
    for name in example_runs.NAMES:
        assert name in text
    for said in ("all jobs", "1 job failed", "the gradient norm was not finite in 3 steps in a row", "did not improve in 3 evaluations"):
        assert said.lower() in text.lower()
    best = json.loads((run / "status.json").read_text())["jobs"]["titles"]["best"]
    assert (
        f'<td data-value="{best["eval_loss"]:.9g}">{best["eval_loss"]:.4f}</td><td data-value="{best["step"]}">{best["step"]}</td>' in page
    )
    assert f"{sum(line['tokens'] for line in json.loads((run / 'accounting.json').read_text())['jobs'].values()):,}" in text
    assert "Window 1, slots 32 to 63, as it ran." in text and "titles joins" in text and "dates leaves" in text
    assert page.count('fill="url(#hatch)"/>') > 3 * example_runs.STAGES, "evaluation slots are hatched on every stage"
    assert "14 events" in text and "NVIDIA H200" in text


def test_what_users_wrote_is_text_and_nothing_is_loaded(tmp_path):
    run = example_runs.make_run(tmp_path / "a<b>&run", num_jobs=4)
    page = page_of(run)
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page and page.count("<script>") == 1
    assert "<h1>a&lt;b&gt;&amp;run</h1>" in page
    assert not re.search(r"""(?:src|href)\s*=|url\((?!#)|@import|https?://""", page), "a page that stands alone"


def test_a_run_that_trains_or_has_no_timeline_is_drawn_as_planned(tmp_path):
    text = re.sub(r"<[^>]*>", " ", page_of(example_runs.make_run(tmp_path / "run", live=True)))
    assert "Window 1, slots 32 to 63, as it was planned." in text and "titles joins" in text and "place 1 in the queue" in text
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "status.json").write_text(
        '{"exit_status": 75, "reason": "", "jobs": {"a": {"state": "paused", "reason": "later"}}}'
    )
    assert "No job has taken a step yet" in page_of(tmp_path / "old")


def test_a_thousand_jobs_make_a_page_of_some_megabytes_that_names_the_best(tmp_path):
    run = example_runs.make_run(tmp_path / "run", num_jobs=1000, steps=16)
    page = page_of(run)
    assert len(page) < 10e6 and page.count('<div class="card"') == 1000 and "1,000 charts, one per job" in page
    bests = {name: job["best"]["eval_loss"] for name, job in json.loads((run / "status.json").read_text())["jobs"].items()}
    named = set(re.findall(r"● </tspan>([^<]+)<", page))
    assert named == set(sorted(bests, key=bests.__getitem__)[:5])


def test_the_command_writes_the_page_and_overwrites_no_other_file(tmp_path, capsys):
    run = example_runs.make_run(tmp_path / "run", num_jobs=1)
    for _ in range(2):
        assert main(["report", str(run), "--html"]) == 0 and (run / "report.html").exists()
    other = tmp_path / "page.html"
    assert main(["report", str(run), "--html", str(other)]) == 0 and str(other) in capsys.readouterr().out
    for target in (other, tmp_path / "gone" / "page.html"):
        assert main(["report", str(run), "--html", str(target)]) == 2 and "--html" in capsys.readouterr().err


def test_curves_are_thinned_by_means_and_axes_have_round_numbers():
    assert thinned([1, 2, 3, 4], [1.0, 3.0, float("nan"), 5.0], 2) == [(1.5, 2.0), (3.5, 5.0)]
    ramp = [float(step) for step in range(100)]
    zigzag = [value + (-1) ** at for at, value in enumerate(ramp)]
    assert smoothed(ramp) == pytest.approx(ramp) and max(abs(a - b) for a, b in zip(smoothed(zigzag)[2:-2], ramp[2:-2], strict=True)) < 0.25
    assert smoothed([1.0, float("nan")] * 40)[2:-2] == pytest.approx([1.0] * 76)
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and ticks(3.0, 3.0, 4) == [3.0]
    wide, narrow = ([(1.0, 0.01), (9.0, 5.0)], [(1.0, 1.0), (9.0, 5.0)])
    assert Axes.around([wide], (0, 10, 0, 10)).log and not Axes.around([narrow], (0, 10, 0, 10)).log
    assert _apart([5.0, 6.0, 99.0], 0, 100) == [5.0, 19.0, 99.0] and _apart([98.0, 99.0], 0, 100) == [86.0, 100.0]


@needs_browser
@pytest.mark.parametrize("num_jobs", [1, 30])
def test_a_browser_shows_the_page_without_loading_anything_or_a_script_error(num_jobs, tmp_path):
    page = write_report_page(example_runs.make_run(tmp_path / "run", num_jobs=num_jobs, steps=20))
    elements, complaints = shown(page)
    assert not complaints
    assert elements.count('type="search"') == (2 if num_jobs > 20 else 0), "the script has run"
    page.write_text(page.read_text().replace("</main>", '<img src="https://example.com/x.png"><script>alert(1)</script></main>'))
    assert len(shown(page)[1]) == 2, "what the page must not do would be seen, and is refused"


@needs_browser
def test_a_browser_sorts_and_filters(tmp_path):
    page = write_report_page(example_runs.make_run(tmp_path / "run", num_jobs=30, steps=20))
    use = """<script>
    const table = document.querySelectorAll("[data-filter]")[1], heads = [...table.querySelectorAll("th")], found = [];
    heads.find(head => head.textContent === "step").click();
    found.push([...table.querySelectorAll("tbody tr")].map(row => row.cells[2].dataset.value));
    const input = document.querySelectorAll("input")[1];
    input.value = "FAIL"; input.dispatchEvent(new Event("input"));
    found.push([...table.querySelectorAll("tbody tr:not([hidden])")].map(row => row.cells[0].textContent));
    document.title = JSON.stringify(found);
    </script>"""
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page.read_text())
    page.write_text(text.replace("</body>", f"{use}</body>"))
    elements, complaints = shown(page)
    assert not complaints
    steps, failed = json.loads(unescape(re.search(r"<title>(.*?)</title>", elements)[1]))
    assert [int(step) for step in steps] == [5, 10, *[20] * 28] and failed == ["dates"], "by numbers, not by their digits"
