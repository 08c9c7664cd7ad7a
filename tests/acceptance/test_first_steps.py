"""A newcomer's first commands, unedited: init, run, and a look at what came of it."""

import json


def test_what_init_wrote_runs_unedited_to_its_end_with_its_confirmation(shell):
    said = shell.run("init", "demo").splitlines()
    assert said[1].split() == ["cd", "demo"]
    inside = type(shell)(shell.folder / "demo")
    command = said[2].split()
    assert command[0] == "momentum-tuner"
    out = inside.run(*command[1:])
    assert "demo: best setting of each optimizer" in out
    status = json.loads(inside.run("status", "--json"))
    assert status["phase"] == "done"
    for o in status["optimizers"]:
        assert o["done"] == o["complete"] + o["pruned"] + o["diverged"] == 24
    assert (status["reference"]["done"], status["confirm"]["done"]) == (24, 4 * 10)
    best = json.loads(inside.run("best", "demo", "--format", "json"))
    assert {b["optimizer"] for b in best} == {"sgd", "momentum", "nesterov"}
    assert all(b["valid_accuracy"] > 0.95 and b["best_valid_loss"] < 0.1 for b in best)
