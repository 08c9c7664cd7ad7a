"""Workers on a real Ray cluster: two nodes on this machine, which a process of its own starts and takes away."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import sqlalchemy as sa

from momentum_tuner.errors import DeviceError, InputError
from momentum_tuner.launcher.ray import Demand, Node, RayOptions, RayWorkers
from momentum_tuner.launcher.ray.cluster import check_device, choose_demand, connect, only_machine

pytestmark = pytest.mark.timeout(600)

CLUSTER = """
import sys
from ray.cluster_utils import Cluster

small = {"object_store_memory": 80 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
nodes = {}
print(cluster.address, cluster.head_node.node_id, flush=True)
for line in sys.stdin:
    word, argument = line.split()
    if word == "add":
        node = cluster.add_node(num_cpus=1, num_gpus=int(argument), **small)
        nodes[node.node_id] = node
        print(node.node_id, flush=True)
    else:
        cluster.remove_node(nodes.pop(argument), allow_graceful=False)
        if word == "remove":
            cluster.wait_for_nodes(60)
        print("gone", flush=True)
cluster.shutdown()
"""
TASK = """
import time
from pathlib import Path

import torch

from momentum_tuner import Task


class Bowl(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.point = torch.nn.Parameter(torch.ones(2))

    def forward(self):
        return self.point.square().sum()


def height(model, batch):
    slow = Path(__file__).with_name("slow")
    if slow.exists():
        time.sleep(float(slow.read_text()))
    return model()


def build():
    return Task(model=Bowl, loss=height, steps_per_epoch=1)
"""
STUDY = """
name: bowl
task: {factory: "bowl.py:build"}
optimizers: [sgd, momentum]
space: {learning_rate: {low: 0.01, high: 0.1}, momentum: {low: 0.0, high: 0.9}}
budget: {trials: 16, epochs: 4}
confirm: {seeds: 0}
pruner: {name: none}
"""
RAY = ("--engine", "ray")


class RayCluster:
    """A cluster with a head and, at first, one more node, of one CPU each."""

    def __init__(self, process):
        self.process = process
        self.address, self.head = process.stdout.readline().split()

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def add(self, gpus=0):
        return self.ask(f"add {gpus}")

    def lose(self, node):
        assert self.ask(f"lose {node}") == "gone"

    def remove(self, node):
        """As `lose`, and until Ray has noticed: it may never place an actor that it was about to place there."""
        assert self.ask(f"remove {node}") == "gone"


@pytest.fixture(scope="module")
def cluster():
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield RayCluster(process)
    process.communicate(timeout=60)


class Shell:
    """The real command line in a folder with a study, which is slow while there is a file `slow`."""

    def __init__(self, folder, storage):
        self.folder = folder
        self.storage = storage
        self.started = []
        (folder / "bowl.py").write_text(TASK)
        (folder / "bowl.yaml").write_text(STUDY)

    def start(self, *arguments):
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("MOMENTUM_TUNER_", "MLFLOW_", "RAY_"))}
        process = subprocess.Popen(
            [sys.executable, "-m", "momentum_tuner", *arguments],
            cwd=self.folder,
            env={**mine, "PYTHONPATH": os.getcwd(), "COLUMNS": "140", "MOMENTUM_TUNER_STORAGE": self.storage},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments, code=0):
        return self.end(self.start(*arguments), code)

    def end(self, process, code=0):
        """What it wrote; nothing of Ray's own, and never the password."""
        out, error = process.communicate(timeout=240)
        assert process.returncode == code, out + error
        assert not re.search(r"Traceback|raylet|ray::|secret", out + error), out + error
        return out + error

    def close(self):
        for process in self.started:
            process.kill()
            process.communicate()

    def status(self):
        return json.loads(self.run("status", "bowl", "--json"))

    def read(self, query):
        engine = sa.create_engine(self.storage.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]

    def wait(self, process, query, wanted):
        """Until the query gives what is wanted."""
        rows = None
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            with contextlib.suppress(sa.exc.DBAPIError):  # the tables are not there yet
                rows = self.read(query)
            if rows is not None and wanted(rows):
                return rows
            time.sleep(0.2)
        raise AssertionError(f"{query}: {rows}")

    def slow(self, seconds):
        (self.folder / "slow").write_text(str(seconds))

    def fast(self):
        (self.folder / "slow").unlink()

    def complete_and_exact(self):
        status = self.status()
        assert status["phase"] == "done"
        assert status["workers"] == []
        assert all((o["tickets"], o["complete"], o["failed"]) == (16, 16, 0) for o in status["optimizers"])
        numbers = self.read("SELECT optimizer, trial_number FROM tickets ORDER BY 1, 2")
        assert numbers == [(optimizer, number) for optimizer in ("momentum", "sgd") for number in range(16)]
        asked = self.read("SELECT study_name, count(*) FROM trials JOIN studies USING (study_id) GROUP BY 1 ORDER BY 1")
        assert asked == [("bowl/momentum", 16), ("bowl/sgd", 16)]


@pytest.fixture
def sqlite_shell(tmp_path):
    shell = Shell(tmp_path, f"sqlite:///{tmp_path / 'momentum_tuner.db'}")
    yield shell
    shell.close()


@pytest.fixture
def shell(tmp_path, postgresql_database):
    """The study on PostgreSQL, with a password in its URL."""
    storage = postgresql_database.text.replace("+psycopg", "").replace("postgres@", "postgres:secret@")
    shell = Shell(tmp_path, storage)
    yield shell
    shell.close()


BUSY = "SELECT node FROM workers WHERE state = 'running' AND slots > 0 ORDER BY started_at"


def on_nodes(*ids):
    """Whether there is one busy worker on each of these nodes and no other."""
    return lambda rows: sorted(re.findall(r"\((\w+)\)", str(rows))) == sorted(name[:8] for name in ids)


def test_workers_follow_nodes_that_leave_and_join_and_no_trial_is_lost_or_doubled(cluster, shell):
    second = cluster.add()
    shell.slow(1.5)
    process = shell.start("run", "bowl.yaml", *RAY, "--ray-address", cluster.address, "--slots", "3", "-v")
    shell.wait(process, BUSY, on_nodes(cluster.head, second))
    assert on_nodes(cluster.head, second)([w["node"] for w in shell.status()["workers"]])
    cluster.lose(second)
    shell.wait(process, BUSY, on_nodes(cluster.head))
    [(pid,)] = shell.read(f"SELECT pid FROM workers WHERE node LIKE '%{cluster.head[:8]}%'")
    os.kill(pid, signal.SIGKILL)
    third = cluster.add()
    shell.wait(process, BUSY, on_nodes(cluster.head, third))
    shell.fast()
    said = shell.end(process)
    assert f"({second[:8]}) was lost; another one takes over its trials" in said
    assert f"({cluster.head[:8]}) was lost; another one takes over its trials" in said
    shell.complete_and_exact()
    cluster.remove(third)


def test_a_pretended_gpu_gets_two_workers_of_half_of_it_which_say_that_torch_sees_none(cluster, shell):
    node = cluster.add(gpus=1)
    command = ("run", "bowl.yaml", *RAY, "--ray-address", cluster.address, "--gpus-per-worker", "0.5")
    said = shell.run(*command, code=2)
    assert re.search(rf"^Error: Ray gives a GPU of \S+ \({node[:8]}\), but torch sees none", said, re.MULTILINE)
    cluster.remove(node)


def test_an_error_of_a_worker_is_one_line_and_is_not_tried_again(cluster, sqlite_shell):
    sqlite_shell.run("submit", "bowl.yaml")
    said = sqlite_shell.run("worker", "bowl", *RAY, "--ray-address", cluster.address, "--tracking-uri", "none", code=2)
    assert said.count("is not trusted: add --trust") == 1
    assert "was lost" not in said


def test_ctrl_c_gives_trials_back_and_ends_a_ray_of_its_own_and_resume_goes_on(cluster, sqlite_shell):
    shell = sqlite_shell
    shell.slow(0.3)
    process = shell.start("run", "bowl.yaml", *RAY, "--workers", "1", "--slots", "2", "--tracking-uri", "none")
    shell.wait(process, "SELECT count(*) FROM tickets WHERE state = 'done'", lambda rows: rows[0][0] > 0)
    family = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = shell.end(process, code=130)
    assert time.monotonic() - started < 20
    assert "resume bowl" in said
    assert psutil.wait_procs(family, timeout=10)[1] == []
    status = shell.status()
    assert status["workers"] == []
    assert sum(o["running"] for o in status["optimizers"]) == 0
    assert 0 < sum(o["done"] for o in status["optimizers"]) < 32
    shell.fast()
    trust = ("--trust", "bowl.py", "--tracking-uri", "none")
    shell.run("resume", "bowl", *RAY, "--ray-address", cluster.address, *trust)
    shell.complete_and_exact()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ray-address", "auto"), "need --engine ray"),
        (("--gpus-per-worker", "0.5"), "need --engine ray"),
        ((*RAY, "--ray-address", "127.0.0.1:9"), "no Ray cluster answers there"),
    ],
)
def test_wrong_use_is_one_line_and_changes_nothing(sqlite_shell, arguments, message):
    said = sqlite_shell.run("run", "bowl.yaml", *arguments, code=2)
    assert [line for line in said.splitlines() if line.startswith("Error: ")] == [said.splitlines()[-1]]
    assert message in said
    assert not (sqlite_shell.folder / "momentum_tuner.db").exists()


def test_without_ray_one_line_names_the_extra(sqlite_shell):
    command = [sys.executable, "-c", WITHOUT_RAY, "run", "bowl.yaml", *RAY]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, cwd=sqlite_shell.folder, env=environment, capture_output=True, text=True)
    expected = "Error: --engine ray needs the extra 'ray': pip install 'momentum-tuner[ray]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from momentum_tuner.cli import main; main()"


def node(name="a", address="10.0.0.1", host="one", **resources):
    return Node(name * 56, address, host, resources)


@pytest.mark.parametrize(
    ("demand", "resources", "room"),
    [
        (Demand(), {"CPU": 4.0}, 4),
        (Demand(), {"GPU": 2.0}, 0),
        (Demand(gpus=1.0), {"CPU": 16.0, "GPU": 4.0}, 4),
        (Demand(gpus=0.5), {"CPU": 16.0, "GPU": 4.0}, 8),
        (Demand(gpus=0.3), {"CPU": 16.0, "GPU": 2.0}, 6),
        (Demand(gpus=0.1), {"CPU": 16.0, "GPU": 1.0}, 10),
        (Demand(gpus=0.1), {"CPU": 4.0, "GPU": 1.0}, 4),
        (Demand(gpus=1.0), {"CPU": 4.0}, 0),
    ],
)
def test_a_node_has_room_for_as_many_workers_as_its_gpus_and_cores_take(demand, resources, room):
    assert demand.room(node(**resources)) == room


def test_workers_on_one_file_have_room_on_its_machine_only():
    demand = Demand(address="10.0.0.1")
    assert demand.room(node(CPU=4.0)) == 4
    assert demand.room(node(address="10.0.0.2", CPU=4.0)) == 0
    assert demand.resources() == {"node:10.0.0.1": 0.001}


def test_workers_that_share_a_device_know_how_many_they_are():
    assert Demand(gpus=0.5).sharing(node(CPU=8.0, GPU=4.0)) == 2
    assert Demand().sharing(node(CPU=8.0)) == 8


@pytest.mark.parametrize(
    ("device", "part", "gpus", "expected"),
    [
        ("auto", None, 0, ("cpu", 0)),
        ("auto", None, 2, ("cuda:0", 1)),
        ("cpu", None, 2, ("cpu", 0)),
        ("cuda", None, 0, ("cuda:0", 1)),
        ("auto", 0.25, 0, ("cuda:0", 0.25)),
    ],
)
def test_workers_take_gpus_where_the_cluster_has_any_or_they_are_asked_for(device, part, gpus, expected):
    demand = choose_demand(device, part, [node(CPU=4.0), node(CPU=4.0, GPU=float(gpus))], ours=False)
    assert (demand.device, demand.gpus) == expected


def test_a_ray_of_our_own_without_a_gpu_waits_for_none():
    with pytest.raises(DeviceError, match="Ray finds no GPU on this machine; use --device cpu"):
        choose_demand("cuda", None, [node(CPU=4.0)], ours=True)


@pytest.mark.parametrize(
    ("device", "part", "message"),
    [
        ("cuda:0", None, "--device 'cuda:0': with --engine ray write auto, cpu or cuda"),
        ("auto", 2.0, "--gpus-per-worker 2: write 1, or a part of a GPU"),
        ("auto", 0.0, "--gpus-per-worker 0: write 1, or a part of a GPU"),
        ("auto", float("nan"), "--gpus-per-worker nan: write 1, or a part of a GPU"),
        ("cpu", 0.5, "workers with --device cpu take no GPU"),
    ],
)
def test_a_device_that_ray_cannot_choose_is_refused(device, part, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check_device(device, part)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "somewhere", ":6379"])
def test_an_address_that_is_none_is_refused_before_ray_tries_it(address):
    with pytest.raises(InputError, match="write auto, or host:port"):
        connect(address)


def test_an_sqlite_file_and_a_node_on_another_machine_are_refused():
    here = node()
    assert only_machine([here, node("b")], here, "sqlite:///x.db") == "10.0.0.1"
    for other in (node("b", address="10.0.0.2", host="two"), node("b", host="two")):
        with pytest.raises(InputError, match=r"cannot reach sqlite:///x.db, a file on this machine; use postgresql"):
            only_machine([here, other], here, "sqlite:///x.db")


@pytest.mark.parametrize("workers", ["0", "-1", "two", ""])
def test_a_number_of_workers_that_is_none_is_refused(sqlite_database, workers):
    from momentum_tuner.worker_options import WorkerOptions

    with pytest.raises(InputError, match="write a number above 0, or auto"):
        RayWorkers(sqlite_database, WorkerOptions(), RayOptions(None, workers, "cpu", None), print)
