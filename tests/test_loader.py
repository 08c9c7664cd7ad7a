import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from momentum_tuner import Task
from momentum_tuner.errors import TaskError
from momentum_tuner.spec import load_study
from momentum_tuner.tasks import BUILT_IN, check_task, load_task, trust_of

torch.set_num_threads(1)

STUDIES = Path(__file__).parents[1] / "studies"

TASK = """
from torch import nn
from momentum_tuner import Task

def build(width: int = 3, *, steps=5, name="x"):
    return Task(model=lambda: nn.Linear(width, 1), loss=lambda m, b: m.weight.square().sum(), steps_per_epoch=steps)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A study's folder; the working directory is another, empty one."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    known = set(sys.modules)
    path = tmp_path / "study"
    path.mkdir()
    yield path
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def _write(path: Path, text: str = TASK) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _load_file(folder: Path, factory="my_task.py:build", params=None):
    return load_task(factory, params or {}, base=folder, trusted=[trust_of(factory, folder)])


def _refusal(factory, params=None, **arguments) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(factory, params or {}, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is refused before it is imported


@pytest.fixture
def trap(folder, monkeypatch):
    """Modules and files that write a marker when they are imported, and a check that none did."""
    marker = folder.parent / "imported"
    code = f"open({str(marker)!r}, 'a').close()\ndef build(): pass\n"
    _write(folder / "hostile.py", code)
    _write(folder / "sub" / "hostile.py", code)
    _write(folder / "package" / "__init__.py", code)
    _write(folder / "package" / "part.py", code)
    _write(folder / "my_package2.py", code)
    _write(folder.parent / "outside.py", code)
    (folder / "link.py").symlink_to(folder.parent / "outside.py")
    (folder / "away").symlink_to(folder.parent)
    monkeypatch.syspath_prepend(str(folder))
    return marker


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("os:system", "task.factory 'os:system' is not trusted: add --trust os if it is yours"),
        ("subprocess:run", "is not trusted: add --trust subprocess if it is yours"),
        ("builtins:exec", "is not trusted: add --trust builtins if it is yours"),
        ("hostile:build", "is not trusted: add --trust hostile if it is yours"),
        ("package.part:build", "is not trusted: add --trust package.part if it is yours"),
        ("my_package2:build", "is not trusted: add --trust my_package2 if it is yours"),
        ("my_packag:build", "is not trusted: add --trust my_packag if it is yours"),
        ("hostile.py:build", "is not trusted: add --trust {folder}/hostile.py if it is yours"),
        ("sub/hostile.py:build", "is not trusted: add --trust {folder}/sub/hostile.py if it is yours"),
        ("./hostile.py:build", "is not trusted: add --trust {folder}/hostile.py if it is yours"),
        ("../outside.py:build", "must name a file in the study file's folder or below it"),
        ("sub/../../outside.py:build", "must name a file in the study file's folder or below it"),
        ("sub/../hostile.py:build", "must name a file in the study file's folder or below it"),
        ("{folder}/hostile.py:build", "must name a file in the study file's folder or below it"),
        ("link.py:build", "is a link that leaves the study file's folder, {folder}"),
        ("away/outside.py:build", "is a link that leaves the study file's folder, {folder}"),
        ("momentum_tuner.cli:main", "is not trusted: add --trust momentum_tuner.cli if it is yours"),
        ("momentum_tuner.tasks:load_task", "is not a built-in task; momentum_tuner.tasks has: quadratic, "),
        ("momentum_tuner.tasks:import_module", "is not a built-in task; momentum_tuner.tasks has: quadratic, "),
        ("momentum_tuner.tasks.loader:load_task", "is not a built-in task"),
        ("momentum_tuner.tasks.hostile:build", "is not a built-in task"),
        ("momentum_tuner.tasks.digits:digits_mlp", "is not a built-in task (did you mean 'digits_mlp'?)"),
        ("momentum_tuner.tasks:digits_mpl", "is not a built-in task (did you mean 'digits_mlp'?); "),
        ("momentum_tuner.tasks2:build", "is not trusted: add --trust momentum_tuner.tasks2 if it is yours"),
        ("hostile", "must be package.module:function or file.py:function"),
        ("hostile:", "must be package.module:function or file.py:function"),
        (":build", "must be package.module:function or file.py:function"),
        ("", "must be package.module:function or file.py:function"),
        ("hostile:build()", "must be package.module:function or file.py:function"),
        ("hostile:os.system", "must be package.module:function or file.py:function"),
        ("hostile:build:build", "must be package.module:function or file.py:function"),
        ("hostile.:build", "must be package.module:function or file.py:function"),
        (".hostile:build", "must be package.module:function or file.py:function"),
        ("hostile\n:build", "must be package.module:function or file.py:function"),
        ("hostile:build\n", "must be package.module:function or file.py:function"),
        ("sub\\hostile.py:build", "must be package.module:function or file.py:function"),
        ("hostile.py\0:build", "must be package.module:function or file.py:function"),
        ("<script>:build", "must be package.module:function or file.py:function"),
        ("hostile.pyc:build", "is not trusted: add --trust hostile.pyc if it is yours"),
    ],
)
def test_a_hostile_factory_is_refused_and_nothing_is_imported(factory, message, folder, trap):
    before = set(sys.modules)
    factory = factory.replace("{folder}", str(folder))
    refused = _refusal(factory, base=folder, trusted=["my_package", str(folder / "other.py"), "x/hostile.py"])
    assert message.replace("{folder}", str(folder)) in refused
    assert not trap.exists()
    assert {"hostile", "package", "outside"}.isdisjoint(set(sys.modules) - before)


def test_a_path_to_trust_is_quoted_for_a_shell(folder):
    place = folder / "my tasks"
    place.mkdir()
    assert f"add --trust '{place}/mine.py' if it is yours" in _refusal("mine.py:build", base=place)


def test_the_trap_works(folder, trap):
    load = {"base": folder, "trusted": ["hostile"]}
    assert "must return a momentum_tuner.Task, not NoneType" in _refusal("hostile:build", **load)
    assert trap.exists()


def test_a_relative_path_and_a_bare_file_name_trust_no_file(folder, trap, monkeypatch):
    monkeypatch.chdir(folder)
    assert "is not trusted" in _refusal(
        "hostile.py:build", base=folder, trusted=["hostile.py", "./hostile.py", "hostile"]
    )
    assert not trap.exists()


def test_trusting_a_file_trusts_no_module_of_that_name(folder, trap):
    assert "is not trusted" in _refusal("hostile:build", base=folder, trusted=[str(folder / "hostile.py")])
    assert not trap.exists()


def test_a_file_needs_the_folder_to_be_known():
    assert "is a file, but the study file's folder is not known here" in _refusal(
        "my_task.py:build", base=None, trusted=["/my_task.py"]
    )


def test_what_a_trusted_module_only_imported_is_not_trusted(folder):
    _write(
        folder / "mine.py",
        "from os import system\nfrom functools import partial\nfrom subprocess import run\n"
        "from momentum_tuner.tasks.loader import load_task\nshell = partial(partial(run), shell=True)\n"
        "put = {}.update\n",
    )
    marker = folder / "ran"
    for factory, origin in [("mine:{}", "mine"), ("mine.py:{}", str(folder / "mine.py"))]:
        for name, params, module in [
            ("system", {"command": f"touch {marker}"}, "posix"),
            ("run", {"args": ["touch", str(marker)]}, "subprocess"),
            ("shell", {"args": f"touch {marker}"}, "subprocess"),
            ("load_task", {}, "momentum_tuner.tasks.loader"),
            ("put", {}, "builtins"),
        ]:
            refused = _refusal(factory.format(name), params, base=folder, trusted=[origin])
            assert f"which is not trusted: add --trust {module} if it is yours" in refused
    assert not marker.exists()


def test_a_factory_may_come_from_elsewhere_in_its_package_or_be_built_in_or_trusted(folder):
    _write(folder / "pack" / "__init__.py", "from pack.core import build")
    _write(folder / "pack" / "core.py")
    _write(folder / "mine.py", "from momentum_tuner.tasks import quadratic\nfrom pack import build")
    assert isinstance(load_task("pack:build", {}, base=folder, trusted=["pack"]), Task)
    assert isinstance(_load_file(folder, "mine.py:quadratic"), Task)
    assert isinstance(load_task("mine:build", {}, base=folder, trusted=["mine", "pack"]), Task)
    assert "add --trust pack.core" in _refusal("mine:build", base=folder, trusted=["mine"])


def test_any_callable_that_the_users_module_defines_may_be_the_factory(folder):
    _write(
        folder / "mine.py",
        TASK
        + "import functools\n"
        + "narrow = functools.partial(build, width=1)\n"
        + "kept = functools.cache(build)\n"
        + "class Maker:\n"
        + "    def __call__(self): return build()\n"
        + "    def method(self): return build()\n"
        + "maker = Maker()\n"
        + "method = maker.method\n"
        + "class Mine(Task):\n"
        + "    def __init__(self, width=2): super().__init__(model=lambda: nn.Linear(width, 1), loss=len,"
        + " steps_per_epoch=1)\n",
    )
    for name in ("narrow", "kept", "maker", "method", "Mine"):
        assert isinstance(_load_file(folder, f"mine.py:{name}"), Task), name
    assert _load_file(folder, "mine.py:narrow").model().in_features == 1


# --- trust_of


def test_the_trust_of_a_study_that_the_user_names(folder):
    _write(folder / "my_task.py")
    (folder / "same.py").symlink_to(folder / "my_task.py")
    assert trust_of("momentum_tuner.tasks:digits_mlp", folder) is None
    assert trust_of("my_package.my_task:build", None) == "my_package.my_task"
    assert trust_of("my_task.py:build", folder) == str(folder / "my_task.py")
    assert trust_of("sub/my_task.py:build", folder) == str(folder / "sub" / "my_task.py")
    assert trust_of("same.py:build", folder) == str(folder / "my_task.py")
    with pytest.raises(TaskError, match="must name a file in the study file's folder"):
        trust_of("../my_task.py:build", folder)


def test_the_trust_of_a_study_holds_from_any_working_directory(folder, monkeypatch):
    _write(folder / "my_task.py")
    monkeypatch.chdir(folder.parent)
    entry = trust_of("my_task.py:build", Path("study"))
    monkeypatch.chdir(folder)
    assert isinstance(load_task("my_task.py:build", {}, base=Path("."), trusted=[entry]), Task)


def test_a_folder_reached_by_a_link_is_the_same_folder(folder):
    _write(folder / "my_task.py")
    (folder.parent / "alias").symlink_to(folder)
    alias = folder.parent / "alias"
    assert isinstance(load_task("my_task.py:build", {}, base=alias, trusted=[str(alias / "my_task.py")]), Task)
    assert isinstance(load_task("my_task.py:build", {}, base=folder, trusted=[str(alias / "my_task.py")]), Task)


# --- files


def test_a_file_is_loaded_with_its_params(folder):
    _write(folder / "my_task.py")
    task = _load_file(folder, params={"width": 7, "steps": 2})
    assert task.model().in_features == 7
    assert task.steps_per_epoch == 2


@pytest.mark.parametrize("name", ["my-task.py", "2nd.py", "my task.py", "os.py", "ünï.py", "sub/my.task.py"])
def test_any_file_name_will_do(folder, name):
    _write(folder / name)
    assert isinstance(_load_file(folder, f"{name}:build"), Task)
    assert sys.modules["os"] is os


def test_a_file_that_changed_is_loaded_anew_even_within_a_second(folder, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for width in (3, 4, 5):
        file = _write(folder / "my_task.py", TASK.replace("width: int = 3", f"width: int = {width}"))
        os.utime(file, (1_000_000_000, 1_000_000_000))
        assert _load_file(folder).model().in_features == width
    assert not (folder / "__pycache__").exists()


def test_files_of_one_name_in_two_folders_do_not_mix(folder):
    for width in (3, 4):
        _write(folder / str(width) / "layers.py", f"width = {width}\n")
        _write(
            folder / str(width) / "my_task.py",
            TASK.replace("width: int = 3", "width: int = layers.width").replace("\nfrom", "\nimport layers\nfrom", 1),
        )
    tasks = [_load_file(folder / str(width)) for width in (3, 4, 3)]
    assert [task.model().in_features for task in tasks] == [3, 4, 3]


def test_a_file_can_import_its_neighbours_and_hold_dataclasses(folder):
    _write(folder / "layers.py", "width = 9\n")
    _write(
        folder / "my_task.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport layers\n"
        "@dataclass\nclass Options:\n    width: int = layers.width\n"
        + TASK.replace("width: int = 3", "width=Options().width"),
    )
    before = list(sys.path)
    assert _load_file(folder).model().in_features == 9
    assert sys.path == before


def test_a_missing_file_and_a_missing_function_are_named(folder):
    assert f"there is no file {folder}/my_task.py" in _refusal(
        "my_task.py:build", base=folder, trusted=[str(folder / "my_task.py")]
    )
    _write(folder / "my_task.py")
    trusted = [str(folder / "my_task.py")]
    assert f"{folder}/my_task.py has no 'biuld' (did you mean 'build'?)" in _refusal(
        "my_task.py:biuld", base=folder, trusted=trusted
    )
    assert "'my_task.py:nn' is not a function, but module" in _refusal("my_task.py:nn", base=folder, trusted=trusted)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("x = 1\nraise ValueError('no\\n data')\n", "raised ValueError: no data", 2),
        ("x = 1\n\nimport sys; sys.exit(3)\n", "raised SystemExit: 3", 3),
        ("def build(:\n", "raised SyntaxError: invalid syntax", 1),
        ("import no_such_thing\n", "raised ModuleNotFoundError: No module named 'no_such_thing'", 1),
        ("import json\n\njson.loads('{')\n", "raised JSONDecodeError: Expecting property name", 3),
        ("def build():\n    x = 1\n    raise KeyError('k')\n", "raised KeyError: 'k'", 3),
        ("def build():\n    return inner()\ndef inner():\n    assert False\n", "raised AssertionError (", 4),
        ("import torch\ndef build():\n    torch.zeros(2) @ torch.zeros(3)\n", "raised RuntimeError: ", 3),
        ("def __getattr__(name):\n    raise OSError('disk')\n", "raised OSError: disk", 2),
        ("def build():\n    raise StopIteration\n", "raised StopIteration (", 2),
    ],
)
def test_what_a_task_file_raises_is_one_line_with_its_place(folder, text, message, line):
    file = _write(folder / "my_task.py", text)
    refused = _refusal("my_task.py:build", base=folder, trusted=[str(file)])
    assert refused.startswith(f"task.factory 'my_task.py:build' {message}"), refused
    assert refused.endswith(f"({file}:{line})"), refused


def test_a_failed_file_leaves_no_module_behind(folder):
    before = set(sys.modules)
    file = _write(folder / "my_task.py", "raise ValueError\n")
    _refusal("my_task.py:build", base=folder, trusted=[str(file)])
    assert {name for name in set(sys.modules) - before if "my_task" in name} == set()


def test_what_task_itself_refuses_is_said_with_the_factory(folder):
    _write(folder / "my_task.py", TASK.replace("steps=5", "steps=0"))
    refused = _refusal("my_task.py:build", base=folder, trusted=[str(folder / "my_task.py")])
    expected = "task.factory 'my_task.py:build': Task.steps_per_epoch must be a positive integer, not 0"
    assert refused == expected


def test_what_is_not_a_task_is_refused(folder):
    file = _write(folder / "my_task.py", "from torch import nn\ndef build():\n    return nn.Linear(1, 1)\n")
    refused = _refusal("my_task.py:build", base=folder, trusted=[str(file)])
    assert refused == "task.factory 'my_task.py:build' must return a momentum_tuner.Task, not Linear"


# --- modules


@pytest.mark.parametrize("where", ["study", "elsewhere"])
def test_a_module_is_found_in_the_studys_folder_and_in_the_working_directory(folder, where):
    _write(folder.parent / where / "pack_a" / "__init__.py", "")
    _write(folder.parent / where / "pack_a" / "tasks.py")
    before = list(sys.path)
    for trusted in ("pack_a", "pack_a.tasks"):
        assert isinstance(load_task("pack_a.tasks:build", {}, base=folder, trusted=[trusted]), Task)
    assert sys.path == before


def test_the_studys_folder_comes_before_the_working_directory(folder):
    _write(folder / "both.py", TASK.replace("width: int = 3", "width: int = 8"))
    _write(folder.parent / "elsewhere" / "both.py")
    assert load_task("both:build", {}, base=folder, trusted=["both"]).model().in_features == 8


def test_an_installed_module_is_not_shadowed_by_the_studys_folder(folder, monkeypatch):
    _write(folder / "colorsys.py")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    refused = _refusal("colorsys:build", base=folder, trusted=["colorsys"])
    assert refused.endswith("colorsys.py has no 'build'")
    assert str(folder) not in refused


def test_modules_of_one_name_in_two_folders_do_not_mix(folder):
    for width in (3, 4):
        _write(folder / str(width) / "twin.py", TASK.replace("width: int = 3", f"width: int = {width}"))
    tasks = [load_task("twin:build", {}, base=folder / str(w), trusted=["twin"]) for w in (3, 4, 3)]
    assert [task.model().in_features for task in tasks] == [3, 4, 3]


def test_loading_forgets_no_module_that_came_from_elsewhere(folder):
    import sklearn

    _write(folder / "my_task.py", "import sklearn\n" + TASK)
    for _ in range(2):
        _load_file(folder)
    assert sys.modules["sklearn"] is sklearn
    assert sys.modules["momentum_tuner.tasks.task"].Task is Task


def test_a_source_checkout_that_is_the_working_directory_is_not_loaded_twice(tmp_path):
    _write(tmp_path / "my_task.py", "import momentum_tuner.tasks.landscapes\n" + TASK)
    code = (
        f"import os, sys; sys.path.insert(0, {str(STUDIES.parent)!r})\n"
        "from pathlib import Path\n"
        "from momentum_tuner.tasks.loader import load_task\n"
        f"del sys.path[0]; os.chdir({str(STUDIES.parent)!r})\n"
        f"base = Path({str(tmp_path)!r})\n"
        "seen = []\n"
        "for _ in range(2):\n"
        "    load_task('my_task.py:build', {}, base=base, trusted=[str(base / 'my_task.py')])\n"
        "    seen.append(sys.modules['momentum_tuner.tasks.landscapes'])\n"
        "print(seen[0] is seen[1])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_missing_module_is_named_with_where_it_was_sought(folder):
    _write(folder / "pack_b" / "__init__.py", "")
    refused = _refusal("pack_b.tasks:build", base=folder, trusted=["pack_b"])
    assert refused == (
        "task.factory 'pack_b.tasks:build': no module 'pack_b.tasks' in the study file's folder, "
        "the working directory and the installed packages"
    )
    assert "no module 'pack_c' in " in _refusal("pack_c.x:build", base=None, trusted=["pack_c"])


def test_a_module_that_misses_another_says_which(folder):
    file = _write(folder / "pack_d.py", "\nimport pack_e\n")
    assert _refusal("pack_d:build", base=folder, trusted=["pack_d"]) == (
        f"task.factory 'pack_d:build' raised ModuleNotFoundError: No module named 'pack_e' ({file}:2)"
    )


# --- params


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"widht": 3},
            "task.params: 'widht' is unknown (did you mean 'width'?); "
            "my_task.py:build takes width=3, steps=5, name='x'",
        ),
        ({"zzz": 3}, "task.params: 'zzz' is unknown; my_task.py:build takes width=3, steps=5, name='x'"),
    ],
)
def test_an_unknown_parameter_is_named_with_what_is_taken(folder, params, message):
    _write(folder / "my_task.py")
    assert _refusal("my_task.py:build", params, base=folder, trusted=[str(folder / "my_task.py")]) == message


def test_params_are_checked_before_the_factory_is_called(folder):
    _write(
        folder / "my_task.py",
        TASK + "def needy(width, depth, /, *args, size, **more):\n    raise SystemExit\n"
        "def open_(size, **more):\n    return build(**more)\n",
    )
    trusted = [str(folder / "my_task.py")]
    assert "'size' is missing; my_task.py:needy takes size" in _refusal(
        "my_task.py:needy", base=folder, trusted=trusted
    )
    assert "'size' is missing; my_task.py:open_ takes size" in _refusal(
        "my_task.py:open_", {"width": 2}, base=folder, trusted=trusted
    )
    task = load_task("my_task.py:open_", {"size": 1, "width": 2}, base=folder, trusted=trusted)
    assert task.model().in_features == 2


def test_a_built_in_tasks_options_are_checked_too():
    unknown = _refusal("momentum_tuner.tasks:digits_mlp", {"hiden": 4}, base=None)
    assert unknown == (
        "task.params: 'hiden' is unknown (did you mean 'hidden'?); "
        "momentum_tuner.tasks:digits_mlp takes hidden=64, layers=2"
    )
    wrong = _refusal("momentum_tuner.tasks:digits_rnn", {"cell": "x"}, base=None)
    assert wrong == (
        "task.factory 'momentum_tuner.tasks:digits_rnn': cell: Input should be 'rnn', 'lstm' or 'gru', not 'x'"
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_task_loads_without_trust(name):
    check_task(load_task(f"momentum_tuner.tasks:{name}", {}, base=None))


def test_a_built_in_task_loads_in_a_fresh_process_from_an_empty_folder(tmp_path):
    code = (
        "from momentum_tuner.tasks import load_task\n"
        "task = load_task('momentum_tuner.tasks:digits_mlp', {'hidden': 8}, base=None)\n"
        "print(sum(p.numel() for p in task.model().parameters()))"
    )
    environment = os.environ | {"PYTHONPATH": str(STUDIES.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 64 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10


# --- studies/


def _study(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_file_is_valid(path):
    spec = load_study(path)
    assert spec.name == path.stem
    assert spec.task.factory == _study(path)["task"]["factory"]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_names_a_task_that_can_be_trained(path):
    study = _study(path)
    factory = study["task"]["factory"]
    entry = trust_of(factory, path.parent)
    task = load_task(factory, study["task"]["params"], base=path.parent, trusted=[entry] if entry else [])
    check_task(task)
    if task.train is None:
        torch.manual_seed(0)
        first = nn.utils.parameters_to_vector(task.model().parameters())
        torch.manual_seed(1)
        second = nn.utils.parameters_to_vector(task.model().parameters())
        assert not torch.equal(first, second)  # confirmation seeds must be different trials


def test_there_is_a_study_for_every_built_in_task():
    factories = {_study(path)["task"]["factory"] for path in STUDIES.glob("*.yaml")}
    assert factories >= {f"momentum_tuner.tasks:{name}" for name in BUILT_IN}


def test_the_readme_of_the_studies_names_each_of_them():
    rows = re.findall(r"^\| \[([\w-]+)\]\(([\w.-]+)\) .*`momentum-tuner run studies/([\w.-]+)`", _readme(), re.M)
    assert sorted(rows) == sorted((path.stem, path.name, path.name) for path in STUDIES.glob("*.yaml"))


def _readme() -> str:
    return (STUDIES / "README.md").read_text()


def test_the_example_of_an_own_task_learns(tmp_path):
    task = load_task("own_task.py:build", {"hidden": 8}, base=STUDIES, trusted=[trust_of("own_task.py:build", STUDIES)])
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(50):
        optimizer.zero_grad()
        task.loss(model, task.train.tensors).backward()
        optimizer.step()
    assert task.metrics["accuracy"](model, task.valid.tensors) > 0.93
    assert len(task.train) + len(task.valid) == 569
