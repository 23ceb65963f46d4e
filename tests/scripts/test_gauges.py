"""Clocks and power beside a run, from a stand-in for nvidia-smi."""

import time

import pytest

from scripts.bench import gauges


def test_means_of_each_gpu_without_a_line_that_is_cut_off():
    text = "0, 1980, 600.5\n1, 1500, 700\n0, 1000, 400.5\n1, 1300, 690\n0, 12"
    assert gauges.means(text) == {"sm_mhz": [1490.0, 1400.0], "power_w": [500.5, 695.0]}
    assert gauges.means("") == {}


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Put a stand-in on the path that writes down how it was called, and says `line` until it is ended."""

    def say(line):
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nwhile true; do echo "{line}"; sleep 0.05; done\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "calls"

    return say


def wait_for(path):
    for _ in range(200):
        if path.exists():
            time.sleep(0.2)
            return
        time.sleep(0.05)
    raise AssertionError("it was never called")


def test_a_run_is_gauged_on_the_gpus_that_it_sees(smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    calls = smi("1, 1410, 699.9")
    with gauges.gauged() as found:
        wait_for(calls)
        assert found == {}
    assert found == {"sm_mhz": [1410.0], "power_w": [699.9]} and "--id=1" in calls.read_text()


def test_what_is_no_number_stops_no_run(smi, capsys):
    calls = smi("1, [N/A], 699.9")
    with gauges.gauged() as found:
        wait_for(calls)
    assert found == {} and "no clocks" in capsys.readouterr().err


def test_without_nvidia_smi_nothing_is_gauged(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with gauges.gauged() as found:
        pass
    assert found == {}
