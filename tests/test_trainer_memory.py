"""Memory that runs out in the middle of an epoch, and errors of the user's own code there."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from momentum_tuner.trainer import (
    SlotsOutOfMemoryError,
    Trainer,
    UnfinishedStepError,
    is_out_of_memory,
    update,
)
from momentum_tuner.trainer import stack as stack_module
from momentum_tuner.trainer.data import MemorySource
from momentum_tuner.trainer.objective import Objective
from momentum_tuner.trainer.stack import Stack

from .half_epochs import (
    BATCH,
    EXAMPLES,
    FEATURES,
    STEPS,
    Noisy,
    assert_close,
    examples,
    filled,
    make_task,
    norm_and_dropout,
    setting,
    take,
    through_a_file,
    train,
    values,
)


@pytest.fixture(params=["fused", "sequential"])
def mode(request):
    return request.param


# --- memory that runs out


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_what_running_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:75] . not enough memory: you tried"))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x"), TypeError()):
        assert not is_out_of_memory(other)


class Scarce:
    """Memory for so many rows, from some call on: what needs more fails after it did its work."""

    def __init__(self, monkeypatch, owner, name, rows_of, most, first=1, times=10**9):
        self.calls, self.failures = 0, 0
        real = getattr(owner, name)

        def wrapped(one, *args, **kwargs):
            self.calls += 1
            out = real(one, *args, **kwargs)
            if rows_of(one, args) > most and self.calls >= first and self.failures < times:
                self.failures += 1
                out_of_memory()
            return out

        monkeypatch.setattr(owner, name, wrapped)


POINTS = {
    "gradient": (Objective, "gradient", lambda one, args: len(args[0][0])),
    "norms": (Stack, "gradient_norms", lambda one, args: len(args[0][0])),
    "update": (Stack, "make_room", lambda one, args: len(one.rows[0])),
    "evaluation": (Objective, "evaluate", lambda one, args: len(args[0][0])),
    "stacking": (Stack, "__init__", lambda one, args: len(args[1])),
}
SIX = {i: setting(("momentum", "adam", "rmsprop")[i % 3], 0.01, seed=i % 2, weight_decay=1e-3) for i in range(6)}


def six_task(loader=False):
    data = {"train": DataLoader(Noisy(*examples()), batch_size=BATCH, shuffle=True)} if loader else {}
    return make_task(norm_and_dropout, **data)


@functools.cache
def undisturbed(loader=False, **options):
    """The curves of the six where memory suffices."""
    return train(filled(six_task(loader), SIX, **options), 3)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("first", [1, 3])
def test_a_call_that_ran_out_of_memory_is_as_if_it_had_not_been(point, first, mode, monkeypatch):
    expected = undisturbed(mode=mode)
    trainer = filled(six_task(), SIX, mode=mode)
    scarce = Scarce(monkeypatch, *POINTS[point], most=5, first=first, times=3)
    found, errors = {}, 0
    while any(len(found.get(key, [])) < 3 for key in SIX):
        try:
            for key, record in trainer.train_epoch():
                found.setdefault(key, []).append(values(record))
        except SlotsOutOfMemoryError as error:
            errors += 1
            assert sorted(error.keys) == sorted(trainer.failed or SIX) == list(SIX)
            assert "CUDA out of memory" in str(error) and "6 slots" in str(error) and "\n" not in str(error)
            assert error.__context__ is None and error.__cause__ is None  # which would keep its tensors alive
            states = {key: through_a_file(trainer.export(key)) for key in SIX}
            assert len({(s.epoch, s.epoch_steps) for s in states.values()}) == 1
    assert found == expected
    assert errors == scarce.failures == (0 if (point, first) == ("stacking", 3) else 3)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("loader", [False, True], ids=["tensors", "loader"])
def test_half_of_the_slots_go_on_here_and_the_others_elsewhere(point, loader, monkeypatch):
    task = six_task(loader)
    expected = undisturbed(loader, precision="float64")
    trainer = filled(task, SIX, precision="float64")
    with monkeypatch.context() as patch:
        Scarce(patch, *POINTS[point], most=2, first=1 if point in ("stacking", "evaluation") else 4)
        queue, found = {}, {}
        while True:
            try:
                for key, record in trainer.train_epoch():
                    found.setdefault(key, []).append(values(record))
            except SlotsOutOfMemoryError:
                keep = len(trainer.keys) // 2
                for key in trainer.keys[keep:]:
                    queue[key] = through_a_file(trainer.export(key))
                    trainer.release(key)
                trainer.width = keep
                continue
            if all(len(found[key]) == 3 for key in trainer.keys):
                break
    assert len(queue) == 5 and trainer.width == 1 and trainer.free == 0
    (batch,) = trainer._batches
    rows = [batch._stack.rows, batch._stack.previous, batch._stack.update]
    rows += [segments for s in batch._stack.slices for segments in s.moments.values()]
    tensors = [*batch._stack.buffers.values(), *(segment for segments in rows for segment in segments)]
    assert {len(t) for t in tensors} == {1}
    other = Trainer(task, epochs=3, slots=6, precision="float64", mode="fused")
    for key, state in queue.items():
        other.admit(key, SIX[key], state)
    while any(len(found.get(key, [])) < 3 for key in SIX):
        for key, record in other.train_epoch():
            if len(found.get(key, [])) < 3:
                found.setdefault(key, []).append(values(record))
    for key in SIX:
        assert_close(found[key], expected[key], 1e-8)


def test_after_an_evaluation_without_memory_only_the_evaluation_is_left(monkeypatch):
    trainer = filled(make_task(), {"a": setting(), "b": setting(seed=1)})
    expected = train(filled(make_task(), {"a": setting(), "b": setting(seed=1)}))
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "evaluate", out_of_memory)
        with pytest.raises(SlotsOutOfMemoryError):
            list(trainer.train_epoch())
    state = through_a_file(trainer.export("a"))
    assert state.epoch_steps == STEPS and state.epoch == 0
    other = Trainer(make_task(), epochs=3, slots=2, mode="fused")
    other.admit("a", setting(), state)
    other.admit("b", setting(seed=1), trainer.export("b"))
    monkeypatch.setattr(Objective, "gradient", out_of_memory)
    assert train(trainer) == expected and train(other) == expected


def test_a_trial_for_whose_start_memory_runs_out_has_no_slot(monkeypatch):
    trainer = filled(make_task(), {"a": setting()}, slots=2)
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "evaluate", out_of_memory)
        with pytest.raises(SlotsOutOfMemoryError, match="1 slot: OutOfMemoryError: CUDA") as caught:
            trainer.admit("b", setting(seed=1))
    assert caught.value.keys == ["b"] and trainer.keys == ["a"] and trainer.free == 1
    assert trainer.admit("b", setting(seed=1)).epoch == 0
    assert train(trainer) == train(filled(make_task(), {"a": setting(), "b": setting(seed=1)}))


def test_data_for_which_memory_runs_out_are_asked_for_again(monkeypatch):
    calls = []
    real = MemorySource.epoch

    def epoch(self, orders, start=0):
        for step, batch in enumerate(real(self, orders, start), start=start):
            calls.append(step)
            if step == 3 and calls.count(3) < 3:
                out_of_memory()
            yield batch

    expected = train(filled(make_task(), {"a": setting()}))
    monkeypatch.setattr(MemorySource, "epoch", epoch)
    trainer = filled(make_task(), {"a": setting()})
    calls.clear()
    for _ in range(2):
        with pytest.raises(SlotsOutOfMemoryError):
            list(trainer.train_epoch())
    assert train(trainer) == expected
    assert calls == [0, 1, 2, 3, 3, 3, 4, 5]


def test_a_step_that_breaks_off_in_its_update_is_never_trained_or_exported(monkeypatch):
    settings = {"a": setting(), "b": setting("adam"), "c": setting(batch_size=4)}
    expected = train(filled(make_task(), settings))
    trainer = filled(make_task(), settings)
    take(trainer, 2)
    with monkeypatch.context() as patch:
        patch.setattr(stack_module, "move", lambda *args: (update.move(*args), out_of_memory()))
        with pytest.raises(UnfinishedStepError, match="CUDA out of memory"):
            list(trainer.train_epoch())
    assert trainer.failed == ["a", "b"]
    with pytest.raises(UnfinishedStepError):
        list(trainer.train_epoch())
    for key in "ab":
        with pytest.raises(UnfinishedStepError):
            trainer.export(key)
        trainer.release(key)
    assert train(trainer) == {"c": expected["c"]}


def test_no_width_is_chosen_for_which_memory_did_not_suffice_when_measuring(monkeypatch):
    real = Objective.gradient

    def gradient(self, rows, *args, **kwargs):
        if len(rows[0]) > 20:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return real(self, rows, *args, **kwargs)

    monkeypatch.setattr(Objective, "gradient", gradient)
    assert Trainer(make_task(), epochs=1).width in (4, 8, 16)


WITH_LITTLE_MEMORY = """
import resource
import torch
from torch import nn
from torch.utils.data import TensorDataset
from momentum_tuner import Task
from momentum_tuner.trainer import SlotsOutOfMemoryError, Trainer, TrialSettings

torch.set_num_threads(1)
WIDE = 500_000  # an activation of 8 slots and 2 examples has 32 MB, and a step needs several
ROOM = 75_000_000


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.bias, self.norm = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1)), nn.BatchNorm1d(1)

    def forward(self, x):
        x = self.norm(x)
        return (x.expand(-1, WIDE) * self.scale).sin().mean(1, keepdim=True) + self.bias


x = torch.linspace(-1, 1, 8)[:, None]
task = Task(
    model=Net,
    loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
    train=TensorDataset(x, x),
    valid=TensorDataset(x[:1], x[:1]),
)


def full():
    trainer = Trainer(task, epochs=2, slots=8, mode="fused", precision="float32")
    for key in range(8):
        trainer.admit(key, TrialSettings("momentum", {"learning_rate": 0.1, "momentum": 0.1 * key}, 2, 0))
    return trainer


def train(trainer):
    curves, failures = {}, 0
    while any(len(curves.get(key, [])) < 2 for key in trainer.keys):
        try:
            for key, record in trainer.train_epoch():
                curves.setdefault(key, []).append((record.epoch, record.train_loss, record.valid_loss))
        except SlotsOutOfMemoryError as error:
            assert "allocate memory" in str(error), error
            failures += 1
            trainer.width = len(trainer.keys) // 2
            for key in trainer.keys[trainer.width :]:
                trainer.export(key)
                trainer.release(key)
    return curves, failures


expected, failures = train(full())
assert failures == 0 and len(expected) == 8
trainer = full()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
found, failures = train(trainer)
assert failures in (1, 2, 3) and len(trainer.keys) == 8 // 2**failures, (failures, found)
for key in trainer.keys:
    for ours, theirs in zip(found[key], expected[key], strict=True):
        assert all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
print("halved", failures)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_process_that_really_runs_out_of_memory_goes_on_with_fewer_slots():
    done = subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY],
        # No arenas of 64 MB for threads, and no large blocks in a heap that cannot shrink.
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("halved")


# --- errors of the user's own code


class Fragile(nn.Linear):
    """A model that fails when told to."""

    broken = False

    def forward(self, x):
        if type(self).broken and self.training and x.shape[-2] == BATCH:
            raise ZeroDivisionError("my mistake")
        return super().forward(x)


def test_an_error_of_the_users_model_ends_the_trials_of_its_batch_alone(monkeypatch, mode):
    task = make_task(lambda: Fragile(FEATURES, 1))
    settings = {"a": setting(), "b": setting(seed=1), "c": setting(batch_size=4)}
    expected = train(filled(task, settings, mode=mode), 2)
    trainer = filled(task, settings, mode=mode)
    take(trainer, 2)
    monkeypatch.setattr(Fragile, "broken", True)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="my mistake"):
            list(trainer.train_epoch())
        assert trainer.failed == ["a", "b"]
    state = trainer.export("a")
    assert state.epoch_steps == 2
    for key in trainer.failed:
        trainer.release(key)
    found = train(trainer, 2)
    assert found == {"c": expected["c"]} and trainer.failed == []
    monkeypatch.setattr(Fragile, "broken", False)
    trainer.admit("a", settings["a"], state)
    assert_close(train(trainer)["a"], expected["a"][:1], 1e-4)


def test_an_error_of_the_users_data_leaves_the_slots_at_their_last_step():
    class Flaky:
        def __init__(self):
            self.failures = 0

        def __len__(self):
            return STEPS

        def __iter__(self):
            for i, rows in enumerate(torch.randperm(EXAMPLES).view(STEPS, BATCH)):
                if i == 3 and self.failures:
                    self.failures -= 1
                    raise OSError("the disk is away")
                yield tuple(t[rows] for t in examples())

    data = Flaky()
    task = make_task(train=data)
    expected = train(filled(task, {"a": setting(), "b": setting(seed=1)}))
    trainer = filled(task, {"a": setting(), "b": setting(seed=1)})
    data.failures = 1
    with pytest.raises(OSError, match="the disk is away"):
        list(trainer.train_epoch())
    assert {trainer.export(key).epoch_steps for key in "ab"} == {3}
    assert train(trainer) == expected
