"""scripts/train.sbatch on a real SLURM: two nodes of three by name, preemption, a node that dies, and what must not be queued again."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import oracle
import pytest
import runs
from safetensors.torch import load_file
from slurm_cluster import SlurmCluster, missing
from waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
LACKS = missing()
pytestmark = pytest.mark.skipif(bool(LACKS), reason=LACKS)
STEPS = 120
TRAIN = f'exec "{sys.executable}" -m megatron_lora "$@"'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "MEGATRON_LORA_CACHE": str(folder / "cache")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "SLURM_WAIT": "15"}
    cluster = SlurmCluster(folder, ["node1", "node2", "node3"], environment)
    yield cluster
    cluster.close()


class Site:
    """A folder from which jobs are submitted, as from the repository's root."""

    def __init__(self, folder: Path, cluster: SlurmCluster, program: str):
        """Make the folder; the lines of `program` are what megatron-lora does there."""
        self.folder, self.cluster = folder, cluster
        (folder / "scripts").symlink_to(ROOT / "scripts")
        binaries = folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
        (binaries / "megatron-lora").write_text(f"#!/bin/bash\n{program}\n")
        (binaries / "megatron-lora").chmod(0o755)

    def submit(self, *words: str) -> str:
        """Submit a job of two nodes and return its id."""
        return self.cluster.run("sbatch", "--parsable", "--nodes=2", *words, folder=self.folder).strip()

    def wait(self, job: str, state: str, restarts: int = 0, seconds: float = 300) -> None:
        """Wait until a job is in a state, after the given number of restarts."""
        found = []

        def reached() -> bool:
            time.sleep(0.5)  # a core that asks all the time would not train
            words = self.cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--Format=State,RestartCnt").split()
            found[:] = [words[0], int(words[1])]
            return found == [state, restarts]

        try:
            wait_for(reached, seconds)
        except AssertionError:
            raise AssertionError(f"job {job} is {found}, not {state}, {restarts}: {self.output(job)}") from None

    def output(self, job: str) -> str:
        """Return what a job has printed."""
        return (self.folder / f"slurm-{job}.out").read_text()

    def train(self, name: str) -> str:
        """Submit a run of config.yaml that writes runs/NAME; return its job's id."""
        return self.submit("scripts/train.sbatch", "config.yaml", f"output_dir=runs/{name}")

    def lines(self, name: str) -> int:
        """Return how many steps of its first job a run has logged."""
        metrics = self.folder / "runs" / name / "jobs" / "a" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory) -> Site:
    """A site with a model, the records of two jobs, and their config for two stages."""
    site = Site(tmp_path_factory.mktemp("site"), cluster, TRAIN)
    oracle.make_model(site.folder / "model")
    jobs = []
    for seed, name in enumerate(("a", "b")):
        oracle.make_rows(site.folder / f"{name}.jsonl", num_rows=12, seed=seed)
        datasets = [{"path": f"{name}.jsonl", "type": "prompt_completion"}]
        jobs.append({"name": name, "datasets": datasets})
    defaults = {"max_steps": STEPS, "global_batch_size": 4, "save_steps": 10, "adam_epsilon": 1e-6}
    config = {"base_model": "model", "output_dir": "runs/none", "microbatch_tokens": 64, "parallel": {"pipeline": 2}}
    config |= {"defaults": defaults, "jobs": jobs}
    (site.folder / "config.yaml").write_text(json.dumps(config))
    return site


def hosts_of_ranks(job: str) -> dict[str, str]:
    """Return the node of each rank of a SLURM job, from the environments of processes."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = dict(word.partition("=")[::2] for word in entry.read_text().split("\0"))
        except OSError:
            continue
        if words.get("SLURM_JOB_ID") == job and "RANK" in words:
            found[words["RANK"]] = words["SLURMD_NODENAME"]
    return found


def test_a_run_on_two_nodes_is_preempted_and_loses_a_node_and_takes_each_step_once(site):
    whole = site.train("whole")
    wait_for(lambda: site.lines("whole") > 0, 300)
    assert hosts_of_ranks(whole) == {"0": "node1", "1": "node2"}  # and node3 is spare
    site.wait(whole, "COMPLETED")

    job = site.train("broken")
    wait_for(lambda: site.lines("broken") > 1, 300)
    urgent = site.submit("--partition=high", "--wrap", "true")
    site.wait(urgent, "COMPLETED")
    site.wait(job, "RUNNING", 1)
    assert "train.sbatch: stopped with its state saved; requeueing" in site.output(job)
    taken = site.lines("broken")
    wait_for(lambda: site.lines("broken") > taken + 12, 300)
    lost = hosts_of_ranks(job)["1"]
    site.cluster.kill(lost)
    wait_for(lambda: "train.sbatch: a node does not answer; requeueing" in site.output(job), 300)
    site.cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=dead")  # as SLURM does after SlurmdTimeout
    site.wait(job, "COMPLETED", 2)

    runs_of = [site.folder / "runs" / name for name in ("broken", "whole")]
    for name in ("a", "b"):
        broken, unbroken = (runs.lines_of(run, name) for run in runs_of)
        assert [line["step"] for line in broken] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in broken] == pytest.approx([line["loss"] for line in unbroken], rel=1e-5)
        adapters = [load_file(run / "jobs" / name / "adapter_model.safetensors") for run in runs_of]
        assert all(oracle.distance(*adapters, kind) < 1e-4 for kind in ("lora_A", "lora_B"))


@pytest.mark.parametrize("status", [75, 1])
def test_a_job_that_is_cancelled_is_not_queued_again(status, cluster, tmp_path):
    site = Site(tmp_path, cluster, f"trap 'exit {status}' TERM; touch started; while true; do sleep 0.1; done")
    job = site.submit("scripts/train.sbatch", "config.yaml")
    wait_for(lambda: (tmp_path / "started").exists(), 60)
    cluster.run("scancel", job)
    site.wait(job, "CANCELLED", seconds=60)


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_a_run_that_ends_by_itself_is_not_queued_again(status, cluster, tmp_path):
    site = Site(tmp_path, cluster, f"exit {status}")
    job = site.submit("scripts/train.sbatch", "config.yaml")
    site.wait(job, "FAILED" if status else "COMPLETED", seconds=60)
