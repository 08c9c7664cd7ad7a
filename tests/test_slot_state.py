"""States of slots from elsewhere: what fits is taken, what does not is refused in one line."""

import functools
import json
import math
from dataclasses import replace

import pytest
import torch

from momentum_tuner.metrics import SpikeState
from momentum_tuner.trainer import (
    SlotState,
)

from .half_epochs import (
    STEPS,
    filled,
    make_task,
    norm_and_dropout,
    setting,
    take,
    train,
)

# --- headers and states from elsewhere


STRANGE = SpikeState(0.1, math.inf, 1 / 3, math.nan)


def test_a_header_is_plain_json_and_keeps_every_float():
    state = SlotState({}, 3, 30, 0.1 + 0.2, SpikeState(5e-324, -1e308, 1 / 3, 0.7), 2, 1e-17)
    assert SlotState.restore({}, json.loads(json.dumps(state.header(), allow_nan=False))) == state
    for loss in (math.nan, math.inf, -math.inf, None):
        strange = SlotState({}, 0, 0, loss, STRANGE)
        text = json.dumps(strange.header(), allow_nan=False)
        back = SlotState.restore({}, json.loads(text))
        assert repr(back) == repr(strange)


GOOD = SlotState({}, 3, 30, 0.5, SpikeState(0.5, 0.5, 0.5, 0.5), 2, 1.0).header()
HOSTILE = {
    "epoch": [-1, 1.0, "1", None, True, [1], 10**400, 2**60, {}],
    "step": [-1, 30.0, [], 10**30],
    "epoch_steps": [-1, None, "2", 1e300],
    "initial_loss": [[0.5], "0.5", "NaN", True, math.nan, math.inf, 10**400, {}, None],
    "seconds": [-1.0, "inf", "nan", None, math.nan, [], False, 10**400],
    "spikes": [None, [], 1.0, "x", {}, GOOD["spikes"] | {"weight": -1.0}, GOOD["spikes"] | {"mean": [1.0]}],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, bad in HOSTILE.items() for v in bad])
def test_a_hostile_header_is_refused_in_one_line(name, value):
    assert SlotState.restore({}, GOOD | {"more": 1}).epoch == 3
    with pytest.raises(ValueError, match=name if name != "spikes" else "spikes|weight|mean") as caught:
        SlotState.restore({}, GOOD | {name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("header", [None, [], "x", 3, {}, *({k: v for k, v in GOOD.items() if k != n} for n in GOOD)])
def test_a_header_that_lacks_something_is_refused(header):
    with pytest.raises(ValueError, match="header"):
        SlotState.restore({}, header)


def changed(state, **tensors):
    kept = {n: t for n, t in state.tensors.items() if tensors.get(n.replace("/", "_"), "") is not None}
    named = {n: tensors[n.replace("/", "_")] for n in kept if n.replace("/", "_") in tensors}
    return replace(state, tensors=kept | named)


STATE_FAULTS = {
    "a parameter too many": lambda s: changed(s, parameters=torch.zeros(9)),
    "another dtype": lambda s: changed(s, parameters=s.tensors["parameters"].double()),
    "two dimensions": lambda s: changed(s, previous_update=s.tensors["previous_update"][None]),
    "a moment missing": lambda s: changed(s, moment_velocity=None),
    "another rule's moment": lambda s: replace(s, tensors={**s.tensors, "moment/first_moment": torch.zeros(129)}),
    "no tensor": lambda s: changed(s, parameters=[0.0] * 129),
    "a buffer missing": lambda s: replace(
        s, tensors={n: t for n, t in s.tensors.items() if not n.endswith("running_var")}
    ),
    "an unknown buffer": lambda s: replace(s, tensors={**s.tensors, "buffer/x": torch.zeros(1)}),
    "no table": lambda s: changed(s, part_table=None),
    "a short table": lambda s: changed(s, part_table=s.tensors["part/table"][:1]),
    "a narrow table": lambda s: changed(s, part_table=s.tensors["part/table"][:, :4]),
    "a table without steps": lambda s: replace(s, epoch_steps=0),
    "steps beyond the epoch": lambda s: changed(
        replace(s, epoch_steps=STEPS + 1), part_table=torch.zeros(STEPS + 1, 5)
    ),
    "huge steps": lambda s: replace(s, epoch_steps=2**50),
    "negative steps": lambda s: replace(s, epoch_steps=-1),
    "a limit for several": lambda s: changed(s, part_limit=torch.zeros(2)),
    "more steps taken than done": lambda s: changed(s, part_taken=torch.tensor(4.0)),
    "half a step": lambda s: changed(s, part_taken=torch.tensor(0.5)),
    "no number of steps": lambda s: changed(s, part_taken=torch.tensor(math.nan)),
    "a taken step without loss": lambda s: changed(s, part_table=torch.full((3, 5), math.nan)),
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(fault):
    task = make_task(norm_and_dropout)
    trainer = filled(task, {"a": setting(), "b": setting(seed=1)}, slots=3)
    take(trainer, 3)
    state = trainer.export("a")
    with pytest.raises(ValueError, match=r"^the state") as caught:
        trainer.admit("c", setting(), STATE_FAULTS[fault](state))
    assert "\n" not in str(caught.value)
    assert trainer.free == 1 and trainer.keys == ["a", "b"] and trainer._entering == []
    assert train(trainer) == undisturbed_pair()


@functools.cache
def undisturbed_pair():
    return train(filled(make_task(norm_and_dropout), {"a": setting(), "b": setting(seed=1)}))


def test_a_state_of_another_optimizer_or_batch_size_is_refused():
    trainer = filled(make_task(), {"a": setting()}, slots=3)
    take(trainer, STEPS)
    state = trainer.export("a")
    with pytest.raises(ValueError, match="tensor 'moment/"):
        trainer.admit("b", setting("adam"), state)
    with pytest.raises(ValueError, match="6 steps of an epoch of 3"):
        trainer.admit("b", setting(batch_size=16), state)
    trainer.admit("b", setting("nesterov"), state)  # the same rule
