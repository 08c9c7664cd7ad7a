"""The doctor on real faults: it names each, says how to mend it, and changes nothing."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from momentum_tuner.cli import cli
from momentum_tuner.doctor import Finding, examine, machine, stores
from momentum_tuner.doctor.finding import checked
from momentum_tuner.doctor.machine import (
    check_cores,
    check_devices,
    check_disks,
    check_extras,
    check_memory,
    check_packages,
    check_python,
)
from momentum_tuner.doctor.stores import check_checkpoints, check_database, check_tracking, local_folders


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name in ("MOMENTUM_TUNER_STORAGE", "MOMENTUM_TUNER_CHECKPOINTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only(findings) -> Finding:
    (found,) = findings
    return found


def fault(findings) -> Finding:
    (found,) = [f for f in findings if f.status != "ok"]
    assert found.mend
    return found


@contextmanager
def locked_folder():
    """A folder in which nothing can be made, not even by root, who is somebody else meanwhile."""
    place = Path(tempfile.mkdtemp())  # not below pytest's, which others than root cannot enter
    place.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield place
    finally:
        os.seteuid(user)
        place.chmod(0o755)
        shutil.rmtree(place)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The command


def test_a_sound_machine_gets_a_line_for_each_check_and_exit_code_0(folder):
    found = CliRunner().invoke(cli, ["doctor", "--json"])
    report = json.loads(found.output)
    assert [f for f in report["findings"] if f["status"] == "fail"] == []
    assert (found.exit_code, report["ok"]) == (0, True)
    names = ["Python", "torch", "optuna", "mlflow", "sqlalchemy", "packages", "cpu", "GPU", "CPU", "memory"]
    names += ["database", "MLflow", "checkpoints", "disk", "extra postgres", "extra ray", "extra s3", "extra dashboard"]
    assert set(names) <= {f["check"] for f in report["findings"]}
    assert list(folder.iterdir()) == []


def test_a_fault_gets_its_mend_below_it_and_exit_code_1(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    port = free_port()
    found = CliRunner().invoke(cli, ["doctor", "--tracking-uri", f"http://127.0.0.1:{port}"])
    assert found.exit_code == 1
    lines = found.output.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("FAIL")]
    assert f"http://127.0.0.1:{port} does not answer" in lines[at]
    assert any(line.strip().startswith("-> start it (momentum-tuner ui)") for line in lines[at + 1 : at + 4])
    assert re.fullmatch(r"1 fault, \d warnings?\.", lines[-1].strip())


def test_a_check_that_breaks_off_is_a_fault_and_keeps_no_other_from_its_turn():
    def broken():
        yield Finding("a", "ok", "fine")
        raise ValueError("no answer from postgresql://anna:hunter2@host")

    found = only(checked("a", broken))
    assert (found.status, found.mend) == ("fail", "this should not happen: please report it")
    assert "ValueError: no answer from postgresql://***@host" in found.found


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_options_in_a_database_url_do_not_bring_its_password_into_the_findings(folder, form):
    storage = "postgresql://ann:hunter2@127.0.0.1:1/db?sslmode=require"
    said = CliRunner().invoke(cli, ["doctor", "--tracking-uri", "none", "--storage", storage, *form])
    assert said.exit_code == 1
    assert "hunter2" not in said.output


@pytest.mark.parametrize("options", ["", "?sslmode=require"])
def test_checkpoints_are_looked_for_where_a_run_keeps_them(folder, options):
    postgresql = f"postgresql://ann:hunter2@127.0.0.1:1/db{options}"
    found = only(check_checkpoints(None, postgresql)).found
    assert found == f"{folder}/momentum_tuner.checkpoints: not there yet, the first study makes it"
    assert local_folders(postgresql, "none", None) == {"checkpoints": folder}
    found = only(check_checkpoints(None, f"sqlite:///a.db{options}")).found
    assert found == f"{folder}/a.checkpoints: not there yet, the first study makes it"


def test_a_database_url_that_cannot_be_used_is_one_fault_not_one_of_the_checkpoints_too(folder):
    assert list(check_checkpoints(None, "mysql://u:hunter2@h/d?ssl=1")) == []
    assert local_folders("mysql://u:hunter2@h/d?ssl=1", "none", None) == {}


def test_a_url_of_each_kind_that_cannot_be_used_is_a_fault_of_its_own():
    found = {f.check: f for f in examine("mysql://u:hunter2@h/d", "./mlruns", "ftq://x/y") if f.status == "fail"}
    assert set(found) == {"database", "MLflow", "checkpoints"}
    assert (found["database"].found, found["database"].mend) == (
        "--storage: 'mysql' is not supported",
        "use sqlite or postgresql",
    )
    assert found["MLflow"].mend == "write sqlite:///mlflow.db or http://host:5000 (MLflow 3 has no file store)"
    assert found["checkpoints"].mend == "write a folder, or a URL as s3://bucket/prefix"
    assert "hunter2" not in str(found)


# Python and packages


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Pretend that a package is installed in a version: its metadata come first on the path."""

    def install(name, version, *lines):
        place = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir(parents=True)
        text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
        (place / "METADATA").write_text(f"{text}\n")
        monkeypatch.syspath_prepend(tmp_path / "site")

    return install


def test_a_package_of_another_version_is_a_fault_with_the_command_that_mends_it(installed):
    installed("mlflow", "2.9.1")
    installed("rich", "1.0")
    found = {f.check: f for f in check_packages() if f.status == "fail"}
    assert set(found) == {"mlflow", "rich"}
    assert found["mlflow"].found.startswith("2.9.1, but it needs ")
    assert re.fullmatch(r"pip install 'mlflow[<>=.,\d]+'", found["mlflow"].mend)
    assert found["rich"].mend == "pip install 'rich>=14'"


def test_a_missing_package_and_another_python_are_faults(installed):
    installed("momentum-tuner", "0.1.0", "Requires-Python: >=99", "Requires-Dist: no-such-package>=2")
    assert fault(check_packages()) == Finding(
        "no-such-package", "fail", "not installed", "pip install 'no-such-package>=2'"
    )
    found = fault(check_python())
    assert found.found.endswith("but it needs >=99")
    assert found.mend == "install a Python >=99, and a new venv"


def test_extras_are_shown_as_they_are(installed):
    extras = [f"Provides-Extra: {name}" for name in ("a", "b", "c", "test")]
    needs = {"a": "no-such-package>=2", "b": "rich>=14", "c": "rich<14", "test": "no-such-package"}
    lines = [f'Requires-Dist: {package}; extra == "{extra}"' for extra, package in needs.items()]
    installed("momentum-tuner", "0.1.0", *extras, *lines)
    a, b, c = check_extras()
    assert a == Finding("extra a", "ok", "not installed (pip install 'momentum-tuner[a]')")
    assert (b.status, b.found.split()[0]) == ("ok", "rich")
    assert (c.status, c.mend) == ("warn", "pip install 'momentum-tuner[c]'")
    assert "but it needs <14" in c.found


# Devices, cores, memory, disks


def test_the_cpu_takes_a_gradient_and_a_wrong_one_is_a_fault(monkeypatch):
    import torch

    assert {f.check: f.status for f in check_devices()}["cpu"] == "ok"
    monkeypatch.setattr(torch.func, "grad", lambda f: lambda row: row)
    assert "computes a wrong gradient" in fault(check_devices()).found
    monkeypatch.setattr(torch.func, "grad", lambda f: 1 / 0)
    assert "ZeroDivisionError" in fault(check_devices()).found


def test_a_gpu_that_torch_cannot_use_is_a_fault(monkeypatch):
    import torch

    monkeypatch.setattr(machine, "may_have_gpu", lambda: True)
    monkeypatch.setattr(machine, "visible_gpus", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = fault(check_devices())
    assert found.found.endswith("is a CPU build")
    assert "https://pytorch.org/get-started/locally/" in found.mend
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = fault(check_devices())
    assert "torch cannot use it: torch is built for 12.8" in found.found
    assert "update the driver" in found.mend


def test_a_container_with_fewer_cores_than_it_shows_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_cores", lambda: 8)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine._cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    quota = machine._cpu_quota(tmp_path)
    monkeypatch.setattr(machine, "_cpu_quota", lambda: quota)
    found = fault(check_cores())
    assert (found.status, found.mend) == ("warn", "run with --workers 2")
    assert "only 2.5" in found.found


def test_the_older_kind_of_control_group_is_read_too(tmp_path):
    for name, text in {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine._cpu_quota(tmp_path) == 0.5
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1")
    assert machine._cpu_quota(tmp_path) is None
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("4096\n")
    assert machine._memory_limit(tmp_path) == 4096


@pytest.mark.parametrize(
    ("limit", "status", "mend"), [(1 << 30, "warn", "--workers 2"), (1 << 28, "fail", "end other")]
)
def test_little_memory_is_said_with_the_workers_that_fit(monkeypatch, limit, status, mend):
    monkeypatch.setattr(machine, "available_cores", lambda: 8)
    monkeypatch.setattr(machine, "_memory_limit", lambda: limit)
    found = fault(check_memory())
    assert found.status == status
    assert mend in found.mend


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_full_disk_is_a_fault(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets root not mount")
    try:
        folders = local_folders(f"sqlite:///{disk}/a.db", "none", str(tmp_path / "not/there"))
        assert folders == {"database": disk, "checkpoints": tmp_path}
        findings = list(check_disks(folders))
        found = fault([f for f in findings if str(disk) in f.found])
        assert (found.status, found.found) == ("fail", f"1 MiB of 1 MiB free for database ({disk})")
    finally:
        subprocess.run(["umount", disk], check=True)


# The database


def test_a_database_of_this_version_is_sound_and_is_left_as_it_is(database):
    findings = list(check_database(database.text))
    assert [f.status for f in findings] == ["ok"]
    assert "can be written; its tables are of this version" in findings[0].found
    with database.read() as session:
        assert session.scalar(sa.text("SELECT count(*) FROM workers")) == 0


def test_a_database_without_tables_is_sound_and_gets_none(empty_url, tmp_path):
    found = only(check_database(empty_url))
    assert found.status == "ok"
    assert list(tmp_path.iterdir()) == []
    if empty_url.startswith("postgresql"):
        engine = sa.create_engine(empty_url.replace("postgresql:", "postgresql+psycopg:"))
        assert sa.inspect(engine).get_table_names() == []
        engine.dispose()


def test_a_server_that_does_not_run_is_a_fault():
    found = fault(check_database(f"postgresql://anna:hunter2@127.0.0.1:{free_port()}/d"))
    assert found.status == "fail"
    assert "does not answer" in found.found and "hunter2" not in found.found
    assert found.mend == "start the server, or name another one with --storage"


def test_a_folder_that_cannot_be_written_is_a_fault_of_each_store():
    with locked_folder() as place:
        for findings, mend in (
            (check_database(f"sqlite:///{place}/a.db"), f"make {place} writable, or name another place with --storage"),
            (check_tracking(f"sqlite:///{place}/m.db"), f"make {place} writable, or name another --tracking-uri"),
            (check_checkpoints(str(place), "sqlite:///a.db"), "name another folder or URL"),
            (
                check_checkpoints(str(place / "below"), "sqlite:///a.db"),
                f"make {place} writable, or name another place with --checkpoints",
            ),
        ):
            found = fault(findings)
            assert "Permission denied" in found.found
            assert found.mend == mend


def test_a_database_file_that_cannot_be_written_is_a_fault(migrated_sqlite, empty_mlflow):
    with locked_folder() as place:
        user = os.geteuid()
        os.seteuid(os.getuid())
        for name, file in (("a.db", migrated_sqlite), ("m.db", empty_mlflow)):
            shutil.copy(file, place / name)
            (place / name).chmod(0o444)
        os.seteuid(user)
        found = fault(check_database(f"sqlite:///{place}/a.db"))
        assert "readonly database" in found.found or "unable to open" in found.found
        assert found.mend.startswith(f"make {place}/a.db and its folder writable")
        found = fault(check_tracking(f"sqlite:///{place}/m.db"))
        assert "cannot be written" in found.found


def test_a_role_without_the_right_to_write_is_a_fault(postgresql, postgresql_database):
    name = postgresql_database.url.database
    role = f"reader_{name}"
    postgresql.execute(f"CREATE ROLE {role} LOGIN")
    with postgresql_database.write() as session:
        session.execute(sa.text(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"))
    found = fault(check_database(postgresql.url(name).replace("postgres@", f"{role}@")))
    assert "permission denied for table workers" in found.found
    assert found.mend == "ask its administrator for that right"
    with postgresql_database.write() as session:
        session.execute(sa.text(f"DROP OWNED BY {role}"))
    postgresql.execute(f"DROP ROLE {role}")


def test_optunas_tables_of_another_version_are_a_fault(database):
    with database.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = 'v2.6.0.a'"))
    found = fault(check_database(database.text))
    assert found.status == "fail"
    assert "holds Optuna's tables in version v2.6.0.a" in found.found
    assert "optuna storage upgrade" in found.mend


def test_tables_of_a_newer_momentum_tuner_are_a_fault(sqlite_database):
    with sqlite_database.write() as session:
        session.execute(sa.text("UPDATE momentum_tuner_version SET version_num = '9999'"))
    found = fault(check_database(sqlite_database.text))
    assert "written by a newer momentum-tuner (version 9999)" in found.found
    assert found.mend == "upgrade this one: pip install -U momentum-tuner"


def test_a_file_that_is_no_database_is_a_fault(tmp_path):
    (tmp_path / "a.db").write_text("name: study\n" * 100)
    assert "is not an SQLite database" in fault(check_database("sqlite:///a.db")).found
    assert (tmp_path / "a.db").read_text() == "name: study\n" * 100


def test_sqlite_on_a_network_drive_is_warned_of(sqlite_database, monkeypatch):
    monkeypatch.setattr(stores, "file_system", lambda folder: "nfs4")
    found = fault(check_database(sqlite_database.text))
    assert (found.status, found.mend) == ("warn", "put it on a disk of this machine, or use PostgreSQL")


def test_the_kind_of_file_system_is_that_of_the_nearest_mount():
    shown = subprocess.run(["stat", "-f", "-c", "%T", "/proc"], capture_output=True, text=True).stdout.strip()
    assert stores.file_system(Path("/proc/self")) == shown == "proc"


# MLflow


def test_mlflows_file_is_sound_and_one_of_an_older_mlflow_is_a_fault(tmp_path, empty_mlflow):
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    assert only(check_tracking("sqlite:///mlflow.db")).status == "ok"
    engine = sa.create_engine(f"sqlite:///{tmp_path}/mlflow.db")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'cc1f77228345'"))
    engine.dispose()
    found = fault(check_tracking("sqlite:///mlflow.db"))
    assert "out-of-date database schema" in found.found
    assert found.mend.startswith("mlflow db upgrade sqlite:///mlflow.db (keep a copy)")


def test_no_mlflow_is_sound():
    assert only(check_tracking("none")) == Finding("MLflow", "ok", "not used")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def strict_server(tmp_path, empty_mlflow):
    """A real MLflow server that lets in only who calls it by another name."""
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--allowed-hosts", "mlflow.example"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_does_not_know_the_name_it_is_called_by_is_a_fault(strict_server):
    found = fault(check_tracking(strict_server))
    assert found.found == f"{strict_server} refuses requests from here (403 Forbidden)"
    assert "--allowed-hosts" in found.mend
