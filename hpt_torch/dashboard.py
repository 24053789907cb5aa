"""hpt dashboard: Optuna's dashboard on a run. `cli` registers the command."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpt_torch.types import RunError

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer


def dashboard(
    run_dir: Annotated[Path, typer.Argument(help="a run directory")],
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="the port; 0: one that is free")] = 8080,
    open_page: Annotated[bool, typer.Option("--open", help="show it in a browser")] = False,
) -> None:
    """Opens optuna-dashboard on a run, as it is now, until Ctrl-C. The run itself is not changed."""
    with _server(host, port, _application(run_dir)) as server:
        url = f"http://{host}:{server.server_port}/"
        typer.echo(f"{run_dir}: {url} (Ctrl-C ends it)", err=True)
        if open_page:
            import webbrowser

            webbrowser.open_new_tab(url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return  # that is how it ends


def _application(run_dir: Path) -> Callable[..., Any]:
    """The dashboard as a WSGI application, on a copy of the run's trials in memory."""
    try:
        import optuna_dashboard
    except ImportError as error:
        raise RunError("hpt dashboard needs optuna-dashboard: pip install 'hpt-torch[dashboard]'") from error
    import optuna

    from hpt_torch.record import Record
    from hpt_torch.report import summarise
    from hpt_torch.samplers import make_study

    with Record(run_dir / "run.db", readonly=True) as record:
        summary = summarise(record).as_searched
        when = {
            trial.number: (
                record.reported_at(trial.number, trial.reports[0].epoch) - trial.reports[0].seconds,
                record.reported_at(trial.number, trial.reports[-1].epoch),
            )
            for trial in summary.trials
            if trial.reports
        }
    study = make_study(summary.space, summary.trials, summary.objective, summary.second)
    storage = optuna.storages.InMemoryStorage()
    shown = optuna.create_study(storage=storage, study_name=summary.name, directions=study.directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # it may go: only a label
        shown.set_metric_names([one.metric for one in (summary.objective, summary.second) if one])
    trials = study.trials
    for trial, frozen in zip(summary.trials, trials, strict=True):
        if trial.number in when:  # else the timeline would show when this copy was made
            frozen.datetime_start, ended = map(datetime.fromtimestamp, when[trial.number])
            frozen.datetime_complete = ended if trial.state.is_finished else None
    shown.add_trials(trials)
    application: Callable[..., Any] = optuna_dashboard.wsgi(storage)
    return application


def _server(host: str, port: int, application: Callable[..., Any]) -> WSGIServer:
    """A server of a thread a request. The imports wait until they are needed: `hpt --help` is to be quick."""
    import socketserver
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    class Threads(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = True

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """A line a request is of no use to anybody here."""

    try:
        return make_server(host, port, application, server_class=Threads, handler_class=Quiet)
    except OSError as error:
        raise RunError(
            f"{host}:{port} cannot be listened on ({error.strerror}); name another --port"
        ) from error
