import jax
import numpy as np
import pytest
from programs.research import CONFIG

from cnnjax.dispatch import open_dispatches
from cnnjax.inputs import load_inputs
from cnnjax.prepare import set_up


def set_up_research(steps_per_dispatch):
    setup, _ = set_up(CONFIG, load_inputs(CONFIG), None, title="", say=print)
    return setup._replace(steps_per_dispatch=steps_per_dispatch)  # 3 epochs of 6 steps.


@pytest.mark.parametrize(("steps_per_dispatch", "lengths"), [(1, [1] * 10), (6, [4, 6])])
def test_dispatches_lead_from_a_step_to_the_end_of_the_run(steps_per_dispatch, lengths):
    setup = set_up_research(steps_per_dispatch)
    with open_dispatches(setup, 0) as dispatches:
        whole = np.concatenate([dispatch.plan.example for dispatch in dispatches])
    assert len(whole) == 18
    with open_dispatches(setup, 8) as dispatches:
        rest = [*dispatches]
    assert [after - before for (before, after), *_ in rest] == lengths
    assert [before for (before, _), *_ in rest] == [8, *np.cumsum([8, *lengths])[1:-1]]
    np.testing.assert_array_equal(np.concatenate([dispatch.plan.example for dispatch in rest]), whole[8:])


def test_each_epoch_has_its_key_and_what_is_frozen_in_it():
    setup = set_up_research(6)
    with open_dispatches(setup, 0) as dispatches:
        epochs = [*dispatches]
    keys = [dispatch.augment_key for dispatch in epochs]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 3
    assert [dispatch.program for dispatch in epochs] == [setup.program_at(epoch) for epoch in range(3)]
