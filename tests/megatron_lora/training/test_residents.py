"""The changes of windows that are still to be carried out when the next window begins."""

from concurrent.futures import Future
from types import SimpleNamespace
from unittest import mock

import pytest
from living_plan import job_config

from megatron_lora.output.standing import ResumePoint
from megatron_lora.training.residents import Residents
from megatron_lora.training.window_changes import Joining, Leaving, WindowChanges
from scheduling.slot_cost import SlotCost


@pytest.mark.parametrize("change", ["left", "configs"])
def test_a_job_that_a_later_window_changes_has_joined_by_then(change):
    """Windows may have fewer slots than jobs that join; each slot's forward carries out one join."""
    residents = Residents(lambda configs: [], Future(), mock.Mock(), 1, SlotCost(), mock.Mock(), mock.Mock())
    residents._arena.set_result(mock.MagicMock())
    saver, config = mock.Mock(), job_config("a", priority=3.0)

    def join(joining, saver):
        residents.jobs[joining.number] = SimpleNamespace(config=joining.config, steps_taken=0, leaving=None)
        residents._joining.remove(joining.number)

    with mock.patch.object(residents, "_join", join):
        joined = [Joining(number=n, config=job_config(f"job-{n}"), point=ResumePoint(), places={}) for n in range(3)]
        residents.begin(WindowChanges(joined=joined), saver)
        assert not residents.jobs
        residents.begin(WindowChanges(**{change: {2: Leaving(step=0, state="paused") if change == "left" else config}}), saver)
    if change == "left":
        saver.leave.assert_called_once_with(residents.jobs[2])
    assert (residents.jobs[2].config is config) == (change == "configs")
