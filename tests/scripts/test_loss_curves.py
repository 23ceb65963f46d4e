"""The comparison of loss curves: in float32 a tiny model's are the same for the kernels' twin, its copy, and peft."""

import json

import oracle
import pytest
import runs

from scripts.bench import loss_curves


def test_ours_and_pefts_are_one_curve_in_float32(tmp_path, one_process, capsys):
    pytest.importorskip("peft")
    model = oracle.make_model(tmp_path / "model", num_layers=2)
    jobs = []
    for seed, r in ((1, 4), (2, 8)):
        rows = oracle.make_rows(tmp_path / f"{seed}.jsonl", 12, seed)
        job = {"name": f"r{r}", "r": r, "datasets": [{"path": str(rows), "type": "prompt_completion"}], "learning_rate": 1e-3}
        jobs.append(job | {"global_batch_size": 4, "lora_dropout": 0.1, "warmup_ratio": 0.2})
    config = runs.write_config(tmp_path / "run.yaml", model, tmp_path / "out", jobs, {}, 64)
    files = ["--output", str(tmp_path / "lines.jsonl"), "--figure", str(tmp_path / "curves.png")]
    sizes = ["--processes", "2", "--steps", "5", "--budget", "64", "--orders", "2", "--batch", "2", "--dtype", "fp32"]
    assert loss_curves.main([str(config), *files, *sizes]) == 0, capsys.readouterr().err
    line = json.loads((tmp_path / "lines.jsonl").read_text())
    assert line["jobs"] == ["r4", "r8"] and (tmp_path / "curves.png").stat().st_size > 1000
    for job in range(2):
        fused, reference = line["ours"]["fused"][job], line["ours"]["reference"][job]
        assert len(fused) == 5 and fused == reference
        for order in line["peft"]:
            assert order[job] == pytest.approx(fused, rel=1e-5)
        assert abs(fused[0] - fused[4]) > 1e-4
        assert line["exact"][job] == line["peft"][0][job]
    for run in ("fused", "reference", "peft"):
        assert max(line["compared"][run]["r4"][name] for name in ("from_peft", "from_reference", "from_exact")) < 1e-4


def test_distances_are_the_largest_of_any_step():
    curves = {"fused": [[1.0, 3.0]], "reference": [[1.0, 2.5]]}
    theirs, exact = [[[1.0, 2.0]], [[1.5, 2.0]]], [[1.0, 2.75]]
    found = loss_curves.compare(curves, theirs, exact, ["job"])
    assert found["fused"]["job"] == {"from_peft": 1.0, "from_reference": 0.5, "from_exact": 0.25, "spread": 0.5, "within": True}
    assert found["reference"]["job"]["from_peft"] == 0.5 and found["peft"]["job"]["from_exact"] == 0.75
    for reference, true in ((1.99, 2.75), (2.5, 1.99)):
        curves["reference"] = [[1.0, reference]]
        assert not loss_curves.compare(curves, theirs, [[1.0, true]], ["job"])["fused"]["job"]["within"]


def test_a_config_that_is_not_there_is_one_line(tmp_path, capsys):
    assert loss_curves.main([str(tmp_path / "none.yaml")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
