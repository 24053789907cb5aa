"""The command line: hpt run | validate | report | compare | refine | replay | list | dashboard | doctor."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hpt_torch import __version__, cli_help, commands, dashboard, doctor
from hpt_torch.types import HptError, Interrupted, printable

if TYPE_CHECKING:
    from hpt_torch.recipe import Recipe
    from hpt_torch.session import Checked

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Hyperparameter tuning for PyTorch. A run that was stopped or killed goes on with the same command.",
)
_RECIPE = Annotated[
    str,
    typer.Argument(
        help="a recipe file, or the name of one that `hpt list` shows", autocompletion=cli_help.recipes
    ),
]
_OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="such as search.trials=20, seed=1, or lr=0.01 to fix it"),
]
_ALLOW = Annotated[
    list[str] | None, typer.Option(help="a module that the recipe may import (for module:factory)")
]


class _Stopped(BaseException):
    """A signal ends the command at once. Not a KeyboardInterrupt, on which typer exits without a word."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        self.signal = number


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Before a session listens to signals, and after it, the first of them stops at once; then the second."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt as second:
        raise _Stopped(*second.args) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
@_stoppable()
def run(
    recipe: _RECIPE,
    overrides: _OVERRIDES = None,
    run_dir: Annotated[Path | None, typer.Option(help="where the run is kept (default: runs/NAME)")] = None,
    allow_import: _ALLOW = None,
    accept_changed_code: Annotated[
        bool, typer.Option(help="continue although the task's code changed")
    ] = False,
    reopen_holdout: Annotated[bool, typer.Option(help="search on after the hold-out rows were read")] = False,
    quiet: Annotated[bool, typer.Option(help="no progress, only the result")] = False,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="for programs: one JSON object a line and event, no report")
    ] = False,
) -> None:
    """Tunes what RECIPE describes. Run again with the same command, it goes on where it was."""
    observers: list[Any] = []
    if json_lines:
        from hpt_torch.observers.json_lines import JsonLinesObserver, own_stdout

        observers = [JsonLinesObserver(own_stdout())]  # first: building the task may print, too
    checked = _checked(recipe, overrides or [], allow_import or [], run_dir)
    from hpt_torch import baselines, session
    from hpt_torch.observers.progress import ProgressObserver
    from hpt_torch.observers.tensorboard import TensorBoardObserver
    from hpt_torch.report.advice import print_findings
    from hpt_torch.report.diagnosis import of_run
    from hpt_torch.report.terminal import print_report
    from hpt_torch.result import Result

    path = run_dir if run_dir is not None else session.run_dir_for(checked.recipe.name)
    if not (quiet or json_lines):
        observers.append(ProgressObserver())
    if checked.recipe.run.tensorboard:
        observers.append(TensorBoardObserver())
    try:
        baselines.run(
            checked,
            path,
            observers=observers,
            accept_changed_code=accept_changed_code,
            reopen_holdout=reopen_holdout,
        )
    except Interrupted as stop:
        _error_line(f"{stop.message}. The same command goes on: hpt {_again()}")
        raise typer.Exit(128 + stop.signal) from None
    result = Result(path, checked.task)
    if json_lines:
        return
    console = Console()
    print_report(result.summary, console)
    print_findings(of_run(path, result.summary), console)
    console.print()
    if (path / "best").is_dir():
        console.print(f"Best model   {path / 'best'}", highlight=False)
    console.print(f"All trials   {path / 'trials.csv'}", highlight=False)
    if checked.recipe.run.tensorboard:
        console.print(f"Curves       tensorboard --logdir {path / 'tensorboard'}", highlight=False)
    if (path / "report.html").is_file():
        console.print(f"With plots   {path / 'report.html'}", highlight=False)
    console.print(f"This report  hpt report {path}", highlight=False)


@app.command()
def validate(
    recipe: Annotated[str | None, typer.Argument(help="a recipe file or name")] = None,
    overrides: _OVERRIDES = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of recipes, for editors")
    ] = False,
    allow_import: _ALLOW = None,
) -> None:
    """Checks a recipe and shows every problem at once. Writes nothing."""
    if schema:
        from hpt_torch.recipe import schema as recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=2))
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe, or ask for --schema")
    checked = _checked(recipe, overrides or [], allow_import or [])
    space, search = checked.recipe.space, checked.recipe.search
    dynamic = sorted(set(space) & checked.task.dynamic_hparams)
    static = sorted(set(space) - set(dynamic))
    typer.echo(f"{recipe}: valid")
    typer.echo(f"  task       {checked.task.name}, {checked.objective.direction} {checked.objective.metric}")
    typer.echo(
        f"  search     {search.sampler}, {_trials(checked.recipe)} of {checked.recipe.trainer.epochs} epochs"
    )
    from hpt_torch.data.folds import chosen_splitter
    from hpt_torch.recipe import folding_of, pruner_of, scheduler_of, second_of
    from hpt_torch.schedulers import PBT, Halving, Pruning, Schedule

    if (second := second_of(checked.recipe)) is not None:
        typer.echo(f"  second     {second.direction} {second.metric}; what is best is decided by the first")
    epochs = checked.recipe.trainer.epochs
    match scheduler_of(checked.recipe) or pruner_of(checked.recipe):
        case PBT() as pbt:
            typer.echo(f"  scheduler  pbt: {pbt.exploit}, a decision every {pbt.interval_epochs} epochs")
        case Schedule(changes=changes):
            typer.echo(f"  scheduler  schedule: changes after epochs {[after for after, _ in changes]}")
        case Halving() as halving:
            typer.echo(f"  scheduler  {halving.kind}: rungs after epochs {halving.rungs(epochs)}")
        case Pruning() as pruning:
            typer.echo(f"  scheduler  {pruning.kind} pruner, every {pruning.interval_epochs} epochs")
    folding, final = folding_of(checked.recipe), checked.recipe.final
    if folding is not None:
        repeats = f", {folding.repeats} times" if folding.repeats > 1 else ""
        typer.echo(f"  folds      {folding.folds} ({chosen_splitter(checked.task.data(), folding)}{repeats})")
    if final.confirm is not None:
        typer.echo(f"  confirm    the best {final.confirm} with {final.seeds} new seeds")
    typer.echo(f"  dynamic    {', '.join(dynamic) or 'none'}")
    typer.echo(f"  static     {', '.join(static) or 'none'}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="a run directory")],
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
    canonical: Annotated[
        bool, typer.Option("--canonical", help="sorted JSON that equal runs have in common")
    ] = False,
    form: Annotated[str, typer.Option("--format", help="text, or md for a pull request")] = "text",
    open_page: Annotated[bool, typer.Option("--open", help="show report.html in a browser")] = False,
) -> None:
    """Shows what a run has found, also while it goes on; writes report.html, trials.csv and best/."""
    from hpt_torch.record import Record
    from hpt_torch.report import canonical as canonical_text
    from hpt_torch.report import summarise
    from hpt_torch.report.advice import as_markdown, print_findings
    from hpt_torch.report.diagnosis import of_run
    from hpt_torch.report.export import write_exports, write_page
    from hpt_torch.report.markdown import markdown
    from hpt_torch.report.summary import as_dict
    from hpt_torch.report.terminal import print_report
    from hpt_torch.rundir import RunDir

    if form not in ("text", "md"):
        raise typer.BadParameter(f"--format must be text or md, got {form!r}")
    if (as_json or canonical) and (form != "text" or open_page):
        raise typer.BadParameter("--json and --canonical go with neither --format nor --open")
    with Record(run_dir / "run.db", readonly=True) as record:
        summary = summarise(record)
        if canonical:
            sys.stdout.write(canonical_text(summary))
            return
        RunDir(run_dir).check_usable()  # nothing is written through a link
        write_exports(record, summary, run_dir)
        page = None if as_json else write_page(record, summary, run_dir)
    found = of_run(run_dir, summary)
    if as_json:
        findings = [dataclasses.asdict(finding) for finding in found]
        typer.echo(json.dumps({**as_dict(summary), "findings": findings}, indent=1))
        return
    if form == "md":
        typer.echo(markdown(summary) + as_markdown(found), nl=False)
    else:
        print_report(summary)
        print_findings(found)
    if page is not None:
        _error_line(f"With plots: {page}")  # on stderr: what is piped stays as it was
        if open_page:
            import webbrowser

            webbrowser.open_new_tab(page.resolve().as_uri())


@app.command()
@_stoppable()
def replay(
    run_dir: Annotated[Path, typer.Argument(help="the directory of a run that has ended")],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="how often")] = 5,
    allow_import: _ALLOW = None,
    quiet: Annotated[bool, typer.Option(help="no progress, only the result")] = False,
) -> None:
    """Trains a run's best trial again from scratch, on its schedule, with other seeds: does it hold?

    Run again with the same command, it goes on where it was.
    """
    checked = _checked(str(run_dir / "recipe.toml"), [], allow_import or [])
    from hpt_torch.observers.progress import ProgressObserver
    from hpt_torch.replay import FOLDER
    from hpt_torch.replay import replay as replay_run

    try:
        found = replay_run(
            run_dir, checked.task, seeds=seeds, observers=[] if quiet else [ProgressObserver()]
        )
    except Interrupted as stop:
        _error_line(f"{stop.message}. The same command goes on: hpt {_again()}")
        raise typer.Exit(128 + stop.signal) from None
    typer.echo(f"{run_dir}: {found.verdict}")
    if found.scores:
        typer.echo(f"  valid      {_scores(found.scores)}")
    if found.holdouts:
        before = "" if found.holdout is None else f" (the run's best: {found.holdout:.4f})"
        typer.echo(f"  hold-out   {_scores(found.holdouts)}{before}")
    if found.failed:
        typer.echo(f"  failed     {found.failed}")
    typer.echo(f"  runs       {run_dir / FOLDER}")


app.command()(commands.compare)
app.command()(commands.clean)
app.command()(commands.refine)
app.command()(commands.add)
app.command()(commands.stop)
app.command()(commands.extend)


@app.command("list")
def list_command(
    runs: Annotated[Path, typer.Option(help="where runs are kept")] = Path("runs"),
) -> None:
    """Shows the recipes at hand and the runs under runs/."""
    from rich.table import Table

    from hpt_torch.catalog import list_recipes, list_runs

    console = Console()
    recipes = Table(title="Recipes", title_justify="left")
    recipes.add_column("recipe")
    recipes.add_column("what it does")
    for name, about in list_recipes():
        recipes.add_row(name, about)
    console.print(recipes)
    table = Table(title=f"Runs in {runs}", title_justify="left")
    for label in ("run", "trials", "best", "wall-clock"):
        table.add_column(label)
    rows = list_runs(runs)
    for row in rows:
        table.add_row(*row)
    console.print(table if rows else f"No runs in {runs} yet.")


def _checked(
    name: str, overrides: list[str], allow_import: list[str], run_dir: Path | None = None
) -> Checked:
    """The recipe, loaded and fitted to its task. run_dir: of the run that may go on with it, unless it lies
    where runs of its name do."""
    from hpt_torch import catalog
    from hpt_torch import recipe as recipes

    path = catalog.find_recipe(name)
    recipe = recipes.load(path, overrides)
    from hpt_torch import session, tasks
    from hpt_torch.types import Problem, RecipeError, TaskError

    if allow_import and "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the recipe's user, as with python -m
    try:
        made = tasks.from_names(**recipe.task.model_dump(), seed=recipe.seed, allow_import=allow_import)
    except TaskError as error:
        where, _, what = str(error).partition(": ")
        raise RecipeError(str(path), [Problem(where, what)]) from error
    directory = session.run_dir_for(recipe.name) if run_dir is None else run_dir
    return session.check(recipe, made, source=str(path), run_dir=directory)


def _trials(recipe: Recipe) -> str:
    from hpt_torch.recipe import planned_trials

    count, timeout = planned_trials(recipe), recipe.search.timeout
    text = "as many trials as fit" if count is None else f"{count} trial{'s' if count != 1 else ''}"
    return text if timeout is None else f"{text}, at most {timeout:g} s,"


def _scores(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _again() -> str:
    import shlex

    return shlex.join(sys.argv[1:])


def _error_line(text: str) -> None:
    typer.echo(text, err=True)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"hpt_torch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


app.command()(dashboard.dashboard)
app.command()(doctor.doctor)
cli_help.add_examples(app)


def main() -> None:
    """Entry point of `hpt`: our own errors are one message and exit status 2, not a traceback."""
    try:
        app()
    except HptError as error:
        _error_line("\n".join(printable(line, 3000) for line in f"hpt: {error}".split("\n")))
        sys.exit(2)
    except _Stopped as stop:
        _error_line(
            f"hpt: stopped at once; everything recorded is intact. The same command goes on: hpt {_again()}"
        )
        sys.exit(128 + stop.signal)
