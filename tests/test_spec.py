from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pydantic
import pytest

import momentum_tuner
from momentum_tuner.catalog import HYPERPARAMETERS, OPTIMIZERS, SCHEDULES
from momentum_tuner.errors import InputError, StudyFileError
from momentum_tuner.optim.schedules import make_schedule
from momentum_tuner.spec import (
    Range,
    ScheduleSpec,
    StudySpec,
    TaskSpec,
    differences,
    grid_axis,
    load_study,
    parse_study,
    spec_hash,
)

ARCHITECTURE = """\
name: digits-mlp
task:
  factory: momentum_tuner.tasks:digits_mlp    # or my_package.my_task:build, or my_task.py:build beside this file
  params: {hidden: 64}
optimizers: [sgd, momentum, nesterov]
space:
  learning_rate: {low: 1.0e-4, high: 1.0, log: true}
  momentum: {low: 0.0, high: 0.999}            # searched as log(1 - momentum)
fixed: {batch_size: 64, weight_decay: 0.0}
schedule: {name: constant}
objective: {metric: valid_loss, direction: minimize}
budget: {trials: 64, epochs: 20}               # per optimizer
sampler: {name: tpe}
pruner: {name: successive_halving, reduction_factor: 3}
confirm: {seeds: 10}
target: auto
seed: 0
"""

SECTIONS = {
    "name": "digits",
    "task": "{factory: 'momentum_tuner.tasks:digits_mlp'}",
    "optimizers": "[sgd, momentum, nesterov]",
    "budget": "{trials: 8, epochs: 20}",
}


def text_of(**sections: str | None) -> str:
    """A study file of one line per section; None leaves a section out."""
    lines = {**SECTIONS, **sections}
    return "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None)


def study(**sections: str | None) -> StudySpec:
    return parse_study(text_of(**sections))


def mistakes_in(text: str) -> list[str]:
    with pytest.raises(StudyFileError) as caught:
        parse_study(text, "study.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")


# What a correct file says


def test_the_study_of_the_architecture_page_is_read():
    spec = parse_study(ARCHITECTURE)
    assert spec.name == "digits-mlp"
    assert spec.task == TaskSpec(factory="momentum_tuner.tasks:digits_mlp", params={"hidden": 64})
    assert spec.optimizers == ("sgd", "momentum", "nesterov")
    assert (spec.budget.trials, spec.budget.epochs) == (64, 20)
    assert (spec.objective.metric, spec.objective.direction) == ("valid_loss", "minimize")
    assert (spec.schedule.name, spec.sampler.name, spec.pruner.name) == ("constant", "tpe", "successive_halving")
    assert (spec.target, spec.seed, spec.precision, spec.max_attempts) == ("auto", 0, "auto", 3)
    assert spec.hyperparameters("momentum") == {
        "learning_rate": Range(low=1e-4, high=1.0, log=True),
        "momentum": Range(low=0.0, high=0.999, log=False),
        "dampening": 0.0,
        "weight_decay": 0.0,
        "clip_norm": math.inf,
        "batch_size": 64,
    }


def test_a_file_that_says_little_asks_for_the_same_as_one_that_says_its_defaults():
    explicit = text_of(
        space="{learning_rate: {low: 1.0e-4, high: 1, log: true}, momentum: {low: 0, high: 0.999}, clip_norm: .inf}",
        fixed="{batch_size: 64, weight_decay: 0, dampening: 0}",
        schedule="{name: constant, warmup_epochs: 0, warmup_start: 0.1}",
        sampler="{name: tpe}",
        pruner="{reduction_factor: 3, min_epochs: 1}",
        confirm="{seeds: 10}",
        target="auto",
        objective="{}",
    )
    assert parse_study(explicit) == study()
    assert spec_hash(parse_study(explicit)) == spec_hash(study())


def test_hyperparameters_are_those_of_the_optimizer_in_the_order_of_the_catalog():
    spec = study(optimizers=f"[{', '.join(OPTIMIZERS)}]")
    for name, optimizer in OPTIMIZERS.items():
        assert list(spec.hyperparameters(name)) == [*optimizer.hyperparameters, "batch_size"]
    assert spec.hyperparameters("adamw")["beta2"] == HYPERPARAMETERS["beta2"].default
    assert "momentum" not in spec.hyperparameters("sgd")


def test_a_setting_is_a_range_choices_or_a_number():
    spec = study(space="{learning_rate: [0.1, 0.01], momentum: 0.9, batch_size: {low: 16, high: 256, log: true}}")
    found = spec.hyperparameters("nesterov")
    assert found["learning_rate"] == (0.1, 0.01)
    assert found["momentum"] == 0.9
    assert found["batch_size"] == Range(low=16, high=256, log=True)


def test_log_is_the_usual_scale_of_the_hyperparameter_unless_the_file_says_otherwise():
    space = "{{weight_decay: {{low: 1.0e-5, high: 0.1{}}}, momentum: {{low: 0.5, high: 0.99}}}}"
    assert study(space=space.format("")).hyperparameters("momentum")["weight_decay"] == Range(
        low=1e-5, high=0.1, log=True
    )
    linear = study(space=space.format(", log: false")).hyperparameters("momentum")
    assert linear["weight_decay"] == Range(low=1e-5, high=0.1, log=False)
    assert linear["momentum"] == Range(low=0.5, high=0.99, log=False)


def test_the_settings_of_one_optimizer_replace_the_common_ones():
    spec = study(
        optimizers="[momentum, adam]",
        space="{learning_rate: {low: 0.01, high: 1}, "
        "adam: {learning_rate: {low: 1e-5, high: 1e-2}, beta1: [0.8, 0.9]}}",
        fixed="{weight_decay: 0.1}",
    )
    assert spec.hyperparameters("momentum")["learning_rate"] == Range(low=0.01, high=1.0, log=True)
    assert spec.hyperparameters("adam")["learning_rate"] == Range(low=1e-5, high=1e-2, log=True)
    assert spec.hyperparameters("adam")["beta1"] == (0.8, 0.9)
    assert spec.hyperparameters("adam")["weight_decay"] == 0.1


def test_momentum_is_the_optimizer_where_it_holds_hyperparameters():
    spec = study(space="{momentum: {learning_rate: 0.5}, nesterov: {momentum: [0.5, 0.9]}}")
    assert spec.hyperparameters("momentum")["learning_rate"] == 0.5
    assert spec.hyperparameters("momentum")["momentum"] == Range(low=0.0, high=0.999, log=False)
    assert spec.hyperparameters("nesterov")["momentum"] == (0.5, 0.9)
    assert spec.hyperparameters("nesterov")["learning_rate"] == Range(low=1e-4, high=1.0, log=True)
    assert StudySpec.from_canonical(spec.canonical()) == spec
    fixed = study(space="{momentum: {learning_rate: 0.5}}", fixed="{momentum: 0.9}")
    assert fixed.hyperparameters("momentum")["momentum"] == 0.9


def test_an_optimizer_that_is_not_in_the_study_is_an_input_error():
    with pytest.raises(InputError, match=r"^study digits: 'adam' is not known \(allowed: sgd, momentum, nesterov\)$"):
        study().hyperparameters("adam")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5e-3", 0.5e-3),
        ("+1e+2", 100.0),
        ("-2.5e-3", -2.5e-3),
        ("1.", 1.0),
        ("1_000", 1000),
        ("010", 10),
        ("0x1f", 31),
        ("-7", -7),
        ("'1e-4'", "1e-4"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1e", "1e"),
        ("true", True),
        ("~", None),
        ("[1, [2.0, a], null]", [1, [2.0, "a"], None]),
    ],
)
def test_plain_values_are_what_they_look_like(text, value):
    spec = study(task=f"{{factory: 'a:b', params: {{x: {text}}}}}")
    assert spec.task.params["x"] == value
    assert type(spec.task.params["x"]) is type(value)
    assert parse_study(spec.to_yaml()) == spec


@pytest.mark.parametrize(
    "factory",
    [
        "momentum_tuner.tasks:digits_mlp",
        "os:system",
        "my_task.py:build",
        "./my-task.py:build",
        "sub/folder.d/my_task.py:Task",
        "mes tâches/tâche.py:modèle",
        "a:b",
    ],
)
def test_a_factory_is_an_import_path_or_a_file(factory):
    assert study(task=f"{{factory: '{factory}'}}").task.factory == factory


@pytest.mark.parametrize(
    "metric", ["best_valid_loss", "mean_valid_loss", "train_loss", "contraction", "valid_accuracy"]
)
def test_objectives(metric):
    assert study(objective=f"{{metric: {metric}, direction: maximize}}").objective.metric == metric


def test_two_aims():
    spec = study(objective="[steps_to_target, {metric: valid_accuracy, direction: maximize}]", target="0.2")
    assert [(aim.metric, aim.maximize) for aim in spec.objective.aims] == [
        ("steps_to_target", False),
        ("valid_accuracy", True),
    ]
    assert parse_study(spec.to_yaml()) == StudySpec.from_canonical(spec.canonical()) == spec
    assert [aim.metric for aim in study().objective.aims] == ["valid_loss"]


@pytest.mark.parametrize(
    "objective, at_rungs, to_target",
    [
        ("{metric: valid_loss}", "valid_loss minimize", "valid_loss minimize"),
        ("{metric: mean_valid_loss}", "mean_valid_loss minimize", "valid_loss minimize"),
        (
            "{metric: valid_accuracy, direction: maximize}",
            "valid_accuracy maximize",
            "valid_accuracy maximize",
        ),
        ("{metric: oscillation}", "valid_loss minimize", "valid_loss minimize"),
        ("[mean_valid_loss, oscillation]", "valid_loss minimize", "valid_loss minimize"),
    ],
)
def test_what_rungs_report_and_what_has_to_reach_the_target(objective, at_rungs, to_target):
    spec = study(objective=objective)
    rungs = spec.objective.at_rungs
    assert f"{rungs.metric} {rungs.direction}" == at_rungs
    assert f"{spec.target_aim.metric} {spec.target_aim.direction}" == to_target


@pytest.mark.parametrize(
    "changes, reference, contestants",
    [
        ({}, "momentum_0.9", ["sgd", "momentum", "nesterov", "momentum_0.9"]),
        ({"confirm": "{seeds: 0}"}, None, ["sgd", "momentum", "nesterov"]),
        ({"fixed": "{momentum: 0.9}", "space": "{}"}, "momentum", ["sgd", "momentum", "nesterov"]),
        ({"fixed": "{momentum: 0.8}", "space": "{}"}, "momentum_0.9", ["sgd", "momentum", "nesterov", "momentum_0.9"]),
        ({"optimizers": "[momentum_0.9, sgd]", "space": "{}"}, "momentum_0.9", ["momentum_0.9", "sgd"]),
        ({"optimizers": "[adam]", "space": "{}"}, "momentum_0.9", ["adam", "momentum_0.9"]),
    ],
)
def test_the_reference_is_momentum_at_its_textbook_value(changes, reference, contestants):
    spec = study(**changes)
    assert spec.reference == reference
    assert list(spec.contestants) == contestants


def test_the_reference_searches_the_learning_rate_of_momentum_and_nothing_of_its_momentum():
    spec = study(space="{momentum: {learning_rate: {low: 0.01, high: 0.1}}, weight_decay: [0.0, 0.1]}")
    assert spec.hyperparameters("momentum_0.9") == {
        "learning_rate": Range(low=0.01, high=0.1, log=True),
        "weight_decay": (0.0, 0.1),
        "clip_norm": math.inf,
        "batch_size": 64,
    }


def test_only_a_grid_has_points_and_8_unless_the_file_says_otherwise():
    assert study(sampler="{name: grid}").sampler.points == 8
    assert study(sampler="{name: grid, points: null}").sampler.points == 8
    assert study(sampler="{name: grid, points: 9}").sampler.points == 9
    assert study(sampler="{name: qmc}").sampler.points is None


def test_a_schedule_takes_its_own_options():
    spec = study(schedule="{name: step, every_epochs: 5, warmup_epochs: 2}")
    assert spec.schedule.options == {"every_epochs": 5, "gamma": 0.1}
    assert (spec.schedule.warmup_epochs, spec.schedule.warmup_start) == (2.0, 0.1)
    assert study().schedule.options == {}
    assert ScheduleSpec(name="cosine").options == {"final_fraction": 0.0}


def allows(act: Callable[[], object]) -> bool:
    try:
        act()
    except (InputError, pydantic.ValidationError):
        return False
    return True


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in SCHEDULES for option in (*SCHEDULES[name], "warmup_start")]
)
def test_an_option_of_a_schedule_may_be_what_the_trainer_takes(name, option):
    for value in (-1.0, 0.0, 0.5, 1.0, 1.5, 1e6, math.inf, math.nan):
        read = allows(partial(ScheduleSpec.model_validate, {"name": name, option: value}))
        given = {"warmup_start": value} if option == "warmup_start" else {"options": {option: value}}
        taken = allows(partial(make_schedule, name, total_steps=1000, steps_per_epoch=100, **given))
        assert read == taken, value


@pytest.mark.parametrize(
    ("pruner", "epochs", "rungs"),
    [
        ("{name: successive_halving, reduction_factor: 3}", 20, (1, 3, 9)),
        ("{name: successive_halving, reduction_factor: 3}", 9, (1, 3)),
        ("{name: hyperband, reduction_factor: 4, min_epochs: 2}", 33, (2, 8, 32)),
        ("{name: successive_halving, min_epochs: 20}", 20, ()),
        ("{name: median}", 20, (2, 4, 6, 8, 10, 12, 14, 16, 18)),
        ("{name: median}", 25, (3, 6, 9, 12, 15, 18, 21, 24)),
        ("{name: median, min_epochs: 8}", 20, (8, 16)),
        ("{name: none}", 20, ()),
        ("{}", 1, ()),
    ],
)
def test_rungs_lie_below_the_last_epoch(pruner, epochs, rungs):
    assert study(pruner=pruner, budget=f"{{trials: 1, epochs: {epochs}}}").rungs() == rungs


# What a wrong file is told

NAMES = "1 to 63 letters, digits, '-' and '_', beginning with a letter or a digit"
FACTORY = "'package.module:callable', or 'file.py:callable' for a file beside the study file or below it"
OPTIMIZER_NAMES = "sgd, momentum, nesterov, momentum_0.9, momentum_classic, nesterov_lookahead, adam, adamw, rmsprop"
SPACE_NAMES = "learning_rate, momentum, dampening, weight_decay, clip_norm, batch_size, sgd, nesterov"
METRICS = (
    "valid_loss, best_valid_loss, final_valid_loss, mean_valid_loss, train_loss, contraction, steps_to_target, "
    "oscillation, spikes, layer_grad_ratio, sharpness, stability_margin"
)

MISTAKES = [
    # values out of their bounds
    ({"space": "{momentum: {low: 0.0, high: 1.0}}"}, "space.momentum.high: 1.0 is not allowed; it must be in [0, 1)"),
    ({"space": "{momentum: {low: -0.1, high: 0.9}}"}, "space.momentum.low: -0.1 is not allowed; it must be in [0, 1)"),
    ({"space": "{momentum: 1}"}, "space.momentum: 1 is not allowed; it must be in [0, 1)"),
    ({"space": "{momentum: [0.9, 1.5]}"}, "space.momentum[1]: 1.5 is not allowed; it must be in [0, 1)"),
    ({"fixed": "{momentum: .nan}"}, "fixed.momentum: nan is not allowed; it must be in [0, 1)"),
    ({"fixed": "{learning_rate: 0}"}, "fixed.learning_rate: 0 is not allowed; it must be in (0, inf)"),
    ({"fixed": "{learning_rate: .inf}"}, "fixed.learning_rate: inf is not allowed; it must be in (0, inf)"),
    ({"fixed": "{clip_norm: 0.0}"}, "fixed.clip_norm: 0.0 is not allowed; it must be in (0, inf) or inf"),
    ({"fixed": "{batch_size: 0}"}, "fixed.batch_size: 0 is not allowed; it must be a whole number, 1 or more"),
    (
        {"space": "{batch_size: {low: 1, high: 6.5}}"},
        "space.batch_size.high: 6.5 is not allowed; it must be a whole number, 1 or more",
    ),
    (
        {"budget": "{trials: 0, epochs: 20}"},
        "budget.trials: 0 is not allowed; it must be a whole number in [1, 1000000]",
    ),
    (
        {"pruner": "{reduction_factor: 1}"},
        "pruner.reduction_factor: 1 is not allowed; it must be a whole number in [2, 1000]",
    ),
    ({"confirm": "{seeds: -1}"}, "confirm.seeds: -1 is not allowed; it must be a whole number in [0, 10000]"),
    ({"target": ".nan"}, "target: nan is not allowed; it must be auto, or a finite number"),
    (
        {"schedule": "{name: cosine, final_fraction: 2}"},
        "schedule.final_fraction: 2 is not allowed; it must be a number in [0, 1]",
    ),
    (
        {"schedule": "{warmup_epochs: 20}"},
        "schedule.warmup_epochs: 20.0 is not allowed; it must be below budget.epochs (20)",
    ),
    (
        {"schedule": "{name: one_cycle, warmup_epochs: 1}"},
        "schedule.warmup_epochs: one_cycle has a warmup of its own; leave this out",
    ),
    # values of the wrong kind
    (
        {"budget": '{trials: "64", epochs: 20}'},
        "budget.trials: '64' is not allowed; it must be a whole number in [1, 1000000]",
    ),
    (
        {"budget": "{trials: 64.0, epochs: 20}"},
        "budget.trials: 64.0 is not allowed; it must be a whole number in [1, 1000000]",
    ),
    ({"seed": "true"}, "seed: True is not allowed; it must be a whole number in [0, 4294967295]"),
    ({"name": "on"}, f"name: True is not allowed; it must be {NAMES}"),
    ({"name": "12"}, f"name: 12 is not allowed; it must be {NAMES}"),
    ({"target": "'0.1'"}, "target: '0.1' is not allowed; it must be auto, or a finite number"),
    ({"fixed": "{momentum: '0.9'}"}, "fixed.momentum: '0.9' is not allowed; it must be a number in [0, 1)"),
    ({"fixed": "{batch_size: true}"}, "fixed.batch_size: True is not allowed; it must be a whole number, 1 or more"),
    ({"fixed": "{momentum: [0.9]}"}, "fixed.momentum: [0.9] is not allowed; it must be a number in [0, 1)"),
    (
        {"space": "{momentum: null}"},
        "space.momentum: None is not allowed; it must be a range {low: ..., high: ...}, a list of choices, or a number",
    ),
    ({"optimizers": "sgd"}, "optimizers: 'sgd' is not allowed; it must be a list such as [sgd, momentum, nesterov]"),
    ({"pruner": "none"}, "pruner: 'none' is not allowed; it must be a mapping such as {name: successive_halving}"),
    ({"budget": "64"}, "budget: 64 is not allowed; it must be a mapping such as {trials: 64, epochs: 20}"),
    (
        {"space": "[momentum]"},
        "space: ['momentum'] is not allowed; it must be a mapping such as {learning_rate: {low: 1.0e-4, high: 1.0}}",
    ),
    ({"fixed": "64"}, "fixed: 64 is not allowed; it must be a mapping such as {batch_size: 64}"),
    (
        {"objective": "[valid_loss, oscillation, spikes]"},
        "objective: ['valid_loss', 'oscillation', 'spikes'] is not allowed; "
        "it must be one aim {metric: ..., direction: ...}, or a list of two",
    ),
    (
        {"objective": "[valid_loss, 3]"},
        "objective: ['valid_loss', 3] is not allowed; "
        "it must be one aim {metric: ..., direction: ...}, or a list of two",
    ),
    (
        {"objective": "[valid_loss, {metric: valid_loss}]"},
        "objective.second.metric: valid_loss is the first aim already; name another measure",
    ),
    (
        {"objective": "[valid_loss, {metric: oscillation, direction: minimise}]"},
        "objective.second.direction: 'minimise' is not known; did you mean 'minimize'? (allowed: minimize, maximize)",
    ),
    (
        {"objective": "{metric: valid_accuracy}"},
        "objective.direction: is missing; write {metric: valid_accuracy, direction: maximize}, "
        "or minimize if less is better",
    ),
    (
        {"objective": "[valid_accuracy, oscillation]"},
        "objective.direction: is missing; write {metric: valid_accuracy, direction: maximize}, "
        "or minimize if less is better",
    ),
    (
        {"objective": "[valid_loss, valid_f1]"},
        "objective.second.direction: is missing; write {metric: valid_f1, direction: maximize}, "
        "or minimize if less is better",
    ),
    (
        {"objective": "valid_accuracy"},
        "objective: 'valid_accuracy' is not allowed; it must be a mapping such as {metric: valid_loss, direction: "
        "minimize}, or a list of two",
    ),
    (
        {"objective": "[steps_to_target, oscillation]"},
        "target: 'auto' is known only after the search, and objective aims at it; write a number",
    ),
    (
        {"task": "{factory: 'a:b', params: {x: {y: 1}}}"},
        "task.params.x: {'y': 1} is not allowed; it must be true, false, a number, text, null, or a list of these",
    ),
    (
        {"task": "{factory: 'a:b', params: {x-y: 1}}"},
        "task.params.'x-y': 'x-y' cannot be the name of a Python argument",
    ),
    ({"task": "{factory: 'a:b', params: {x: .nan}}"}, "task.params.x: nan is not allowed; it must be finite"),
    (
        {"task": "{factory: 'a:b', params: {x: \"\\0\"}}"},
        "task.params.x: '\\x00' is not allowed; it must be text without null characters and surrogates",
    ),
    (
        {"task": "{factory: 'a:b', params: {x: [\"\\ud800\"]}}"},
        "task.params.x: ['\\ud800'] is not allowed; it must be text without null characters and surrogates",
    ),
    # ranges and choices
    (
        {"space": "{momentum: {low: 0.9, high: 0.5}}"},
        "space.momentum.high: 0.5 is not allowed; it must be above low (0.9)",
    ),
    (
        {"space": "{momentum: {low: 0.9, high: 0.9}}"},
        "space.momentum.high: 0.9 is not allowed; it must be above low (0.9)",
    ),
    (
        {"space": "{momentum: {low: 0, high: 0.9, log: true}}"},
        "space.momentum.log: True is not allowed; momentum is always searched as log(1 - momentum)",
    ),
    (
        {"space": "{weight_decay: {low: 0, high: 0.1}}"},
        "space.weight_decay.low: 0 is not allowed; it must be above 0 on a log scale (or write log: false)",
    ),
    (
        {"space": "{weight_decay: {low: 0.1, high: 1, log: 1}}"},
        "space.weight_decay.log: 1 is not allowed; it must be true or false",
    ),
    (
        {"space": "{clip_norm: {low: 1, high: .inf}}"},
        "space.clip_norm.high: inf is not allowed; it must be finite in a range",
    ),
    ({"space": "{momentum: {high: 0.9}}"}, "space.momentum.low: is missing; it must be a number in [0, 1)"),
    (
        {"space": "{momentum: {low: 0, high: 0.9, logs: true}}"},
        "space.momentum.logs: 'logs' is not known; did you mean 'log'? (allowed: low, high, log)",
    ),
    ({"space": "{momentum: []}"}, "space.momentum: [] is not allowed; it must be a list of at least one number"),
    ({"space": "{momentum: [0.9, 0.5, 0.9]}"}, "space.momentum[2]: 0.9 is in the list twice"),
    # names
    (
        {"optimizers": "[sgd, nestrov]"},
        f"optimizers[1]: 'nestrov' is not known; did you mean 'nesterov'? (allowed: {OPTIMIZER_NAMES})",
    ),
    ({"optimizers": "[sgd, sgd]"}, "optimizers[1]: sgd is in the list twice"),
    ({"optimizers": "[]"}, f"optimizers: [] is not allowed; it must be a list of at least one of {OPTIMIZER_NAMES}"),
    (
        {"space": "{momentun: 0.9}"},
        f"space.momentun: 'momentun' is not known; did you mean 'momentum'? (allowed: {SPACE_NAMES})",
    ),
    ({"space": "{lr: 0.9}"}, f"space.lr: 'lr' is not known; did you mean 'learning_rate'? (allowed: {SPACE_NAMES})"),
    (
        {"fixed": "{batchsize: 64}"},
        "fixed.batchsize: 'batchsize' is not known; did you mean 'batch_size'? (allowed: learning_rate, momentum, "
        "dampening, weight_decay, clip_norm, batch_size)",
    ),
    (
        {"space": "{beta1: 0.9}"},
        "space.beta1: no optimizer of this study (sgd, momentum, nesterov) has it; it belongs to adam, adamw",
    ),
    (
        {"fixed": "{momentum: 0.9}", "optimizers": "[sgd]"},
        "fixed.momentum: no optimizer of this study (sgd) has it; it belongs to momentum, nesterov, momentum_classic, "
        "nesterov_lookahead",
    ),
    (
        {"space": "{adam: {beta1: 0.9}}"},
        "space.adam: adam is not among the optimizers of this study (sgd, momentum, nesterov)",
    ),
    (
        {"space": "{sgd: {momentum: 0.9}}"},
        "space.sgd.momentum: 'momentum' is not known (allowed: learning_rate, weight_decay, clip_norm, batch_size)",
    ),
    (
        {"space": "{sgd: 0.1}"},
        "space.sgd: 0.1 is not allowed; it must be a mapping of settings for sgd only, such as "
        "{learning_rate: {low: 1.0e-4, high: 0.1}}",
    ),
    (
        {"space": "{learning_rate: 0.1}", "fixed": "{learning_rate: 0.1}"},
        "fixed.learning_rate: is in space too; keep it in one of the two",
    ),
    (
        {"sampler": "{name: TPE2}"},
        "sampler.name: 'TPE2' is not known; did you mean 'tpe'? (allowed: tpe, random, qmc, gp, cmaes, grid)",
    ),
    (
        {"pruner": "{name: null}"},
        "pruner.name: None is not known (allowed: successive_halving, hyperband, median, none)",
    ),
    (
        {"schedule": "{name: cosin, foo: 1}"},
        "schedule.name: 'cosin' is not known; did you mean 'cosine'? (allowed: constant, cosine, step, one_cycle)",
    ),
    (
        {"schedule": "{name: cosine, gamma: 0.1}"},
        "schedule.gamma: 'gamma' is not known (allowed: name, warmup_epochs, warmup_start, final_fraction)",
    ),
    (
        {"objective": "{direction: minimise}"},
        "objective.direction: 'minimise' is not known; did you mean 'minimize'? (allowed: minimize, maximize)",
    ),
    (
        {"objective": "{metric: accuracy}"},
        f"objective.metric: 'accuracy' is not allowed; it must be one of {METRICS}, "
        "or valid_<name of a metric of the task>",
    ),
    (
        {"precision": "float16"},
        "precision: 'float16' is not known; did you mean 'bfloat16'? "
        "(allowed: auto, float32, float64, tfloat32, bfloat16)",
    ),
    (
        {"bugdet": "{}"},
        "bugdet: 'bugdet' is not known; did you mean 'budget'? (allowed: name, task, optimizers, space, fixed, "
        "objective, budget, schedule, sampler, pruner, confirm, target, seed, precision, max_attempts)",
    ),
    (
        {"budget": "{trails: 8, trials: 8, epochs: 1}"},
        "budget.trails: 'trails' is not known; did you mean 'trials'? (allowed: trials, epochs)",
    ),
    # what is missing
    ({"budget": None}, "budget: is missing; it must be a mapping such as {trials: 64, epochs: 20}"),
    ({"budget": "{trials: 8}"}, "budget.epochs: is missing; it must be a whole number in [1, 1000000]"),
    ({"task": "{}"}, f"task.factory: is missing; it must be {FACTORY}"),
    # the grid
    (
        {"sampler": "{name: grid}", "optimizers": "[sgd, nesterov]", "budget": "{trials: 10, epochs: 1}"},
        "sampler: the grid of sgd has 8 points, fewer than budget.trials (10); lower budget.trials or "
        "raise sampler.points",
    ),
    (
        {"sampler": "{name: grid, points: 1000}", "optimizers": "[nesterov]"},
        "sampler: the grid of nesterov has 1000000 points, more than 100000; lower sampler.points",
    ),
    ({"sampler": "{name: tpe, points: 4}"}, "sampler.points: only the grid sampler has points; leave it out"),
    # refinement
    ({"sampler": "{name: qmc, refine: 4}"}, "sampler.refine: the points of qmc are fixed in advance; leave it out"),
    (
        {"sampler": "{name: tpe, refine: 8}", "budget": "{trials: 8, epochs: 1}"},
        "sampler.refine: 8 is not allowed; it must be below budget.trials (8)",
    ),
    (
        {"sampler": "{name: tpe, refine: 4}", "objective": "[steps_to_target, oscillation]"},
        "sampler.refine: two aims have no single best trial to refine; leave it out",
    ),
    # two aims
    (
        {"sampler": "{name: cmaes}", "objective": "[steps_to_target, oscillation]", "target": "0.1"},
        "sampler.name: cmaes searches for one aim, and objective has two; write tpe or gp",
    ),
    # hostile text
    ({"name": "../x"}, f"name: '../x' is not allowed; it must be {NAMES}"),
    ({"name": "<script>alert(1)</script>"}, f"name: '<script>alert(1)</script>' is not allowed; it must be {NAMES}"),
    ({"name": '"a\\n"'}, f"name: 'a\\n' is not allowed; it must be {NAMES}"),
    ({"name": "a" * 64}, f"name: '{'a' * 56}... is not allowed; it must be {NAMES}"),
    ({"name": '"\\e[31m"'}, f"name: '\\x1b[31m' is not allowed; it must be {NAMES}"),
    ({"task": "{factory: '../x.py:build'}"}, f"task.factory: '../x.py:build' is not allowed; it must be {FACTORY}"),
    ({"task": "{factory: 'a/../x.py:build'}"}, f"task.factory: 'a/../x.py:build' is not allowed; it must be {FACTORY}"),
    ({"task": "{factory: '/tmp/x.py:build'}"}, f"task.factory: '/tmp/x.py:build' is not allowed; it must be {FACTORY}"),
    ({"task": "{factory: 'C:\\x.py:build'}"}, f"task.factory: 'C:\\\\x.py:build' is not allowed; it must be {FACTORY}"),
    ({"task": "{factory: 'os.system'}"}, f"task.factory: 'os.system' is not allowed; it must be {FACTORY}"),
    ({"task": "{factory: 'os:system()'}"}, f"task.factory: 'os:system()' is not allowed; it must be {FACTORY}"),
    ({"task": "{factory: 'os:import'}"}, f"task.factory: 'os:import' is not allowed; it must be {FACTORY}"),
]


@pytest.mark.parametrize(("sections", "line"), MISTAKES, ids=[line[:60] for _, line in MISTAKES])
def test_a_mistake_is_one_line_with_its_field_and_what_is_allowed(sections, line):
    assert mistakes_in(text_of(**sections)) == [f"study.yaml: {line}"]


def test_every_mistake_is_in_one_report():
    text = text_of(
        name="../x",
        optimizers="[sgd, nestrov]",
        bugdet="{}",
        space="{momentum: {low: 0, high: 1.0}, learning_rate: {low: 1, high: 0.1, lag: true}}",
        fixed="{learning_rate: 0.1, batch_size: 0}",
        budget=None,
        schedule="{name: cosine, final_fraction: 2, warmup_epochs: -1}",
        seed="true",
    )
    lines = mistakes_in(text + "seed: 1.5\n")
    assert [line.split(": ")[1] for line in lines] == [
        "line 9",
        "name",
        "optimizers[1]",
        "space.momentum.high",
        "space.learning_rate.lag",
        "space.learning_rate.high",
        "fixed.batch_size",
        "budget",
        "schedule.warmup_epochs",
        "schedule.final_fraction",
        "seed",
        "bugdet",
        "fixed.learning_rate",
    ]


ODD = [None, True, 0, -1, 1.5, 10**90, math.nan, math.inf, "", "x", "grid", [], [[]], {}, {"low": 1}, {"name": "step"}]


@pytest.mark.parametrize("seed", range(30))
def test_a_document_spoilt_anywhere_is_read_or_told_in_lines_but_never_crashes(seed):
    rng = random.Random(seed)
    for _ in range(20):
        document = json.loads(random_study(rng).canonical())
        for _ in range(rng.randint(1, 3)):
            node = document
            while (key := rng.choice(list(node))) and isinstance(node[key], dict) and node[key] and rng.random() < 0.7:
                node = node[key]
            if rng.random() < 0.3:
                node[rng.choice(["low", "momentum", "adam", "odd", "points"])] = copy.deepcopy(rng.choice(ODD))
            else:
                node[key] = copy.deepcopy(rng.choice(ODD))
        text = json.dumps(document).replace("NaN", ".nan").replace("Infinity", ".inf")
        try:
            spec = parse_study(text, "study.yaml")
        except StudyFileError as error:
            for line in str(error).split("\n"):
                assert line.startswith("study.yaml: "), line
                assert not any(words in line for words in PYDANTIC), line
        else:
            assert parse_study(spec.to_yaml()) == spec


PYDANTIC = ("Input should", "http", "type=", "validation error", "extra_forbidden", "Value error")


def test_no_words_of_pydantic_reach_the_user():
    whole = "\n".join(line for _, line in MISTAKES)
    assert not any(words in whole for words in PYDANTIC)


def test_a_very_long_report_ends_with_a_count():
    lines = mistakes_in(text_of(space="{" + ", ".join(f"key{n}: 1" for n in range(80)) + "}"))
    assert len(lines) == 51
    assert lines[-1] == "... and 30 more mistakes"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is empty; a study file begins with 'name: ...'"),
        ("# nothing\n", "is empty; a study file begins with 'name: ...'"),
        ("- a\n- b\n", "must be a mapping that begins with 'name: ...', not ['a', 'b']"),
        ("name", "must be a mapping that begins with 'name: ...', not 'name'"),
        (
            "a: !!python/object/apply:os.system ['true']",
            "line 1: the tag '!!python/object/apply:os.system' is not allowed; a study file holds only plain values",
        ),
        ("a: 1\nb: !evil x", "line 2: the tag '!evil' is not allowed; a study file holds only plain values"),
        ("a: !!binary aGk=", "line 1: the tag '!!binary' is not allowed; a study file holds only plain values"),
        ("a: &x [1]\nb: *x", "line 1: anchors (&) and aliases (*) are not allowed"),
        ("a: 1\nb: *x", "line 2: anchors (&) and aliases (*) are not allowed"),
        ("a: " + "[" * 5000, "line 1: more than 20 levels deep"),
        ("a: " + "9" * 5000, "line 1: this number is too long"),
        ("a: 1\n\tb: 2", "line 2: is not valid YAML: a tab is not allowed here; indent with spaces"),
        ("a: b: c", "line 1: is not valid YAML: mapping values are not allowed here"),
        ("a: [1, 2", "line 1: is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n---\nb: 1", "line 2: is not valid YAML: but found another document"),
        ("a: \0", "is not valid YAML: it holds control characters"),
        ("a: 1\n" * 200_001, "is larger than 1 MB; that is no study file"),
    ],
    ids=lambda value: value[:24],
)
def test_text_that_cannot_be_read_is_one_line(text, line):
    assert mistakes_in(text) == [f"study.yaml: {line}"]


def test_repeated_keys_and_keys_that_are_no_text_are_told_with_their_lines():
    text = text_of() + "seed: 0\nseed: 1\n3: 4\n[1]: 2\n<<: {a: 1}\n"
    lines = mistakes_in(text)
    assert lines[:3] == [
        "study.yaml: line 6: the key 'seed' is here already on line 5",
        "study.yaml: line 7: the key '3' is not allowed; a key must be text",
        "study.yaml: line 8: the key '[...]' is not allowed; a key must be text",
    ]
    assert lines[3].startswith("study.yaml: '<<': '<<' is not known (allowed: name,")
    assert len(lines) == 4


def test_a_file_is_loaded_and_its_path_begins_each_line(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("\ufeff" + text_of(name="ok"), encoding="utf-8")
    assert load_study(path).name == "ok"
    path.write_text(text_of(seed="-1"), encoding="utf-8")
    with pytest.raises(StudyFileError) as caught:
        load_study(path)
    assert str(caught.value) == f"{path}: seed: -1 is not allowed; it must be a whole number in [0, 4294967295]"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    latin, large, pipe = tmp_path / "latin.yaml", tmp_path / "large.yaml", tmp_path / "pipe.yaml"
    latin.write_bytes(b"name: a\n# \xe9\n")
    large.write_bytes(b"#" * 1_000_001)
    os.mkfifo(pipe)
    expected = {
        tmp_path / "pip.yaml": f"there is no such file; did you mean {str(pipe)!r}?",
        tmp_path / "q": "there is no such file; `momentum-tuner init` writes one",
        tmp_path: "is a directory; name the study file in it",
        latin: "line 2: is not UTF-8 text; save the file as UTF-8",
        large: "is larger than 1 MB; that is no study file",
        pipe: "is not a regular file",
        tmp_path / ("x" * 300): "cannot be read: File name too long",
        latin / "x": "cannot be read: Not a directory",
    }
    for path, line in expected.items():
        with pytest.raises(StudyFileError) as caught:
            load_study(path)
        assert str(caught.value) == f"{path}: {line}"


def test_a_path_with_a_null_character_is_refused():
    with pytest.raises(StudyFileError, match=r"there is no such file|embedded null"):
        load_study(Path("a\0b"))


# Frozen, hashed, stored and compared


def test_a_spec_is_frozen_and_can_be_hashed_copied_and_pickled():
    spec = parse_study(ARCHITECTURE)
    with pytest.raises(pydantic.ValidationError):
        spec.name = "other"
    with pytest.raises(pydantic.ValidationError):
        spec.budget.trials = 1
    assert {spec, parse_study(ARCHITECTURE)} == {spec}
    assert copy.deepcopy(spec) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec.task) == hash(copy.deepcopy(spec.task))


def test_a_spec_can_be_made_in_python_and_is_checked_there_too():
    spec = StudySpec(
        name="digits",
        task=TaskSpec(factory="momentum_tuner.tasks:digits_mlp"),
        optimizers=("sgd", "momentum", "nesterov"),
        space={"momentum": Range(low=0.5, high=0.9)},
        budget={"trials": 8, "epochs": 20},
    )
    assert spec == study(space="{momentum: {low: 0.5, high: 0.9}}")
    with pytest.raises(pydantic.ValidationError, match=r"1.0 is not allowed; it must be in \[0, 1\)"):
        StudySpec.model_validate({**spec.model_dump(), "space": {"momentum": Range(low=0.5, high=1.0)}})
    with pytest.raises(pydantic.ValidationError, match="above low"):
        Range(low=1.0, high=0.0)
    with pytest.raises(pydantic.ValidationError, match="above 0"):
        Range(low=0.0, high=1.0, log=True)


def test_canonical_is_sorted_json_without_spaces_and_hash_is_its_sha256():
    spec = study(optimizers="[sgd]")
    assert spec.canonical() == (
        '{"budget":{"epochs":20,"trials":8},"confirm":{"seeds":10},"fixed":{"batch_size":64,"clip_norm":"inf",'
        '"weight_decay":0.0},"max_attempts":3,"name":"digits","objective":{"direction":"minimize","metric":"valid_loss"},'
        '"optimizers":["sgd"],"precision":"auto","pruner":{"min_epochs":1,"name":"successive_halving",'
        '"reduction_factor":3},"sampler":{"name":"tpe"},"schedule":{"name":"constant","warmup_epochs":0.0,'
        '"warmup_start":0.1},"seed":0,"space":{"learning_rate":{"high":1.0,"log":true,"low":0.0001}},"target":"auto",'
        '"task":{"factory":"momentum_tuner.tasks:digits_mlp","params":{}}}'
    )
    assert len(spec_hash(spec)) == 64
    assert spec_hash(spec) == spec_hash(parse_study(spec.to_yaml()))
    assert spec_hash(spec) != spec_hash(study(optimizers="[sgd]", seed="1"))


def test_a_study_that_an_earlier_version_took_is_still_read():
    text = study(objective="[valid_loss, oscillation]").canonical().replace('"name":"tpe"', '"name":"cmaes"')
    spec = StudySpec.from_canonical(text)
    assert (spec.sampler.name, spec.canonical()) == ("cmaes", text)
    assert mistakes_in(spec.to_yaml()) == [
        "study.yaml: sampler.name: cmaes searches for one aim, and objective has two; write tpe or gp"
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "../x"}', "NaN"])
def test_stored_text_that_is_no_study_is_an_input_error(text):
    with pytest.raises(StudyFileError, match=r"^stored study: "):
        StudySpec.from_canonical(text)


def random_study(rng: random.Random) -> StudySpec:
    def setting(name: str) -> object:
        if name == "batch_size":
            return rng.choice([rng.randint(1, 512), [16, 64], {"low": 1, "high": rng.randint(2, 999), "log": True}])
        coefficient = HYPERPARAMETERS[name].complement or name == "dampening"
        low, high = sorted(rng.random() * (0.999 if coefficient else 10 ** rng.uniform(-8, 3)) for _ in "ab")
        return rng.choice([low or 0.1, [low or 0.1, high + 1e-12], {"low": low or 1e-9, "high": high + 1e-9}])

    optimizers = rng.sample(list(OPTIMIZERS), rng.randint(1, 4))
    owned = [*dict.fromkeys(name for each in optimizers for name in OPTIMIZERS[each].hyperparameters), "batch_size"]
    named = rng.sample(owned, rng.randint(0, len(owned)))
    space: dict[str, object] = {name: setting(name) for name in named}
    for optimizer in rng.sample(optimizers, rng.randint(0, len(optimizers))):
        own = {name: setting(name) for name in OPTIMIZERS[optimizer].hyperparameters if rng.random() < 0.4}
        if optimizer not in space and own:
            space[optimizer] = own
    free = [name for name in owned if not (name in space and name in named) and name in ("eps", "batch_size")]
    document = {
        "name": rng.choice(["a", "A-1", "x_y"]),
        "task": {
            "factory": "a:b",
            "params": {
                "p": rng.choice([True, 1, 1.0, 0.1 + 0.2, "1e-4", "yes", "é\n'\" #: ", None, [1, [2.5, "x"]], ""])
            },
        },
        "optimizers": optimizers,
        "space": space,
        "fixed": {name: 32 if name == "batch_size" else 1e-6 for name in free},
        "budget": {"trials": rng.randint(1, 99), "epochs": rng.randint(1, 99)},
        "schedule": {"name": rng.choice(list(SCHEDULES))},
        "target": rng.choice(["auto", rng.random() * 10 ** rng.randint(-9, 9)]),
        "seed": rng.randint(0, 2**32 - 1),
    }
    return StudySpec.model_validate(document)


@pytest.mark.parametrize("seed", range(40))
def test_canonical_and_yaml_read_back_to_the_same_spec(seed):
    spec = random_study(random.Random(seed))
    for again in (StudySpec.from_canonical(spec.canonical()), parse_study(spec.to_yaml())):
        assert again == spec
        assert again.canonical() == spec.canonical()
        assert differences(spec, again) == []
        for optimizer in spec.optimizers:
            assert again.hyperparameters(optimizer) == spec.hyperparameters(optimizer)
            assert isinstance(again.hyperparameters(optimizer)["learning_rate"], Range | tuple | float)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"budget": "{trials: 9, epochs: 20}"}, []),
        ({"budget": "{trials: 7, epochs: 20}"}, ["budget.trials: 8 -> 7"]),
        ({"budget": "{trials: 9, epochs: 21}"}, ["budget.epochs: 20 -> 21"]),
        ({"space": "{momentum: {low: 0, high: 0.99}}"}, ["space.momentum.high: 0.999 -> 0.99"]),
        (
            {"space": "{momentum: 0.9}"},
            ['space.momentum: {"high": 0.999, "low": 0.0} -> not set', "fixed.momentum: not set -> 0.9"],
        ),
        ({"confirm": "{seeds: 11}"}, []),
        ({"confirm": "{seeds: 9}"}, ["confirm.seeds: 10 -> 9"]),
        ({"target": "0.5", "seed": "1"}, ['target: "auto" -> 0.5', "seed: 0 -> 1"]),
        ({"optimizers": "[sgd, momentum]"}, ['optimizers: ["sgd", "momentum", "nesterov"] -> ["sgd", "momentum"]']),
        (
            {"task": "{factory: 'a:b', params: {x: 1}}"},
            [
                'task.factory: "momentum_tuner.tasks:digits_mlp" -> "a:b"',
                "task.params.x: not set -> 1",
            ],
        ),
        (
            {"schedule": "{name: cosine}"},
            ['schedule.name: "constant" -> "cosine"', "schedule.final_fraction: not set -> 0.0"],
        ),
        ({"fixed": "{clip_norm: 1}"}, ['fixed.clip_norm: "inf" -> 1.0']),
    ],
)
def test_differences_name_the_fields_and_let_trials_and_seeds_grow(changes, lines):
    assert differences(study(), study(**changes)) == lines


def test_differences_tell_a_whole_number_from_true_and_from_a_float():
    one = study(task="{factory: 'a:b', params: {x: 1}}")
    assert differences(one, study(task="{factory: 'a:b', params: {x: 1.0}}")) == ["task.params.x: 1 -> 1.0"]
    assert differences(one, study(task="{factory: 'a:b', params: {x: true}}")) == ["task.params.x: 1 -> true"]


def test_a_grid_axis_is_even_on_the_scale_of_the_search_and_includes_the_ends():
    assert grid_axis("learning_rate", Range(low=1e-4, high=1.0, log=True), 5) == pytest.approx(
        (1e-4, 1e-3, 1e-2, 0.1, 1)
    )
    assert grid_axis("dampening", Range(low=0.0, high=1.0, log=False), 3) == (0.0, 0.5, 1.0)
    assert grid_axis("momentum", Range(low=0.0, high=0.99), 3) == pytest.approx((0.01, 0.1, 1.0))
    assert grid_axis("batch_size", Range(low=1, high=4, log=False), 8) == (1, 2, 3, 4)
    assert grid_axis("momentum", (0.9, 0.5), 3) == (0.9, 0.5)
    assert grid_axis("momentum", 0.9, 3) == (0.9,)


def test_importing_the_spec_loads_nothing_heavy():
    code = (
        "import sys, momentum_tuner.spec; "
        "print([m for m in ('torch', 'optuna', 'mlflow', 'ray', 'plotly', 'numpy', 'sqlalchemy') if m in sys.modules])"
    )
    root = Path(next(iter(momentum_tuner.__path__))).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
