"""Commands about MLflow: ui, publish."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec

import click

from momentum_tuner.cli.options import name_argument, open_database, storage_option, tracking_option
from momentum_tuner.errors import InputError, MissingExtraError, TrackingError, redact

LAST_PORT = 65535


@click.command(epilog="Example: momentum-tuner ui --port 5001")
@storage_option
@tracking_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(1, LAST_PORT), default=5000, show_default=True, help="Port of the MLflow UI."
)
@click.option("--dashboard", is_flag=True, help="Also start optuna-dashboard, on the next port.")
def ui(storage: str, tracking_uri: str, host: str, port: int, dashboard: bool) -> None:
    """The MLflow UI on the right store."""
    from momentum_tuner.tracking import check_tracking_uri, quiet_mlflow

    if dashboard and find_spec("optuna_dashboard") is None:
        raise MissingExtraError("--dashboard needs the extra 'dashboard': pip install 'momentum-tuner[dashboard]'")
    if dashboard and port == LAST_PORT:
        raise InputError(f"the dashboard is on the port after --port; name one below {LAST_PORT}")
    quiet_mlflow()
    # MLflow would start eight more processes for jobs, which a view of runs has none of.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    uri = check_tracking_uri(tracking_uri)
    commands: list[list[str]] = []
    shown: list[str] = []
    if uri.startswith(("http://", "https://")):
        shown.append(f"MLflow: {redact(uri)} is a server already; open it in a browser")
    else:
        if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
            raise TrackingError(
                f"there is no MLflow store {uri} yet; run a study first, or name another --tracking-uri"
            )
        _check_free(host, port, "name another with --port")
        commands.append(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--backend-store-uri",
                uri,
                "--host",
                host,
                "--port",
                str(port),
                "--workers",
                "1",
            ]
        )
        shown.append(f"MLflow: http://{host}:{port}")
    if dashboard:
        database = open_database(storage)
        _check_free(host, port + 1, "the dashboard is on the one after --port; name another with --port")
        commands.append([_beside_python("optuna-dashboard"), database.text, "--host", host, "--port", str(port + 1)])
        shown.append(f"Optuna dashboard: http://{host}:{port + 1}")
    for line in shown:
        click.echo(line)
    if commands:
        click.echo("Ctrl-C stops.")
        _run_all(commands)


def _check_free(host: str, port: int, mend: str) -> None:
    """See that a server could listen there: the address of one that cannot would lead to somebody else's.

    Raises:
        InputError: it could not.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: one that ended is no hindrance
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is taken; {mend}") from None
        reason = error.strerror or error
        raise InputError(f"nothing can listen on {host}:{port}: {reason}; name another --host or --port") from None


def _beside_python(program: str) -> str:
    """A program of this Python's environment, which need not be the active one."""
    return shutil.which(program, path=os.path.dirname(sys.executable)) or program


def _run_all(commands: list[list[str]]) -> None:
    """Run servers until one ends or Ctrl-C comes; then end all."""
    servers = [subprocess.Popen(command, start_new_session=True) for command in commands]

    def stop(*_: object) -> None:
        for server in servers:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    codes = [server.wait() for server in servers[:1]]
    stop()
    codes += [server.wait() for server in servers[1:]]
    if any(code > 0 for code in codes):
        sys.exit(1)


@click.command(epilog="Example: momentum-tuner publish digits-mlp")
@name_argument
@storage_option
@tracking_option
def publish(name: str, storage: str, tracking_uri: str) -> None:
    """Bring MLflow up to date from the database, or rebuild it where its store was deleted."""
    import uuid

    from momentum_tuner.tickets import find_study
    from momentum_tuner.tracking import Publisher, check_tracking_uri, short_reason

    database = open_database(storage)
    study = find_study(database, name)
    uri = check_tracking_uri(tracking_uri)
    publisher = Publisher(database, study, uri, f"publish-{uuid.uuid4().hex[:12]}")
    try:
        result = publisher.publish()
    except Exception as error:
        raise TrackingError(f"MLflow at {redact(uri)} does not answer: {short_reason(error)}") from error
    finally:
        publisher.close()
    if result.busy:
        raise TrackingError(f"another process publishes {name!r} now; try again in half a minute")
    if result.refused:
        raise TrackingError(f"MLflow does not take {result.refused} trial(s) of {name!r}; what it said stands above")
    click.echo(f"MLflow has all finished trials of {name}: {result.trials} brought up to date now.")
