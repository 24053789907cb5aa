"""hpt clean | compare | refine | add | stop | extend: commands over runs that exist. `cli` registers them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

_RUN = Annotated[Path, typer.Argument(help="the directory of a run")]
_WAIT_SECONDS = 5.0  # for a run to take a request up

if TYPE_CHECKING:
    from hpt_torch.refine import Refinement
    from hpt_torch.report.summary import Summary


def compare(
    runs: Annotated[list[Path], typer.Argument(help="two run directories or more")],
    form: Annotated[str, typer.Option("--format", help="text, or md for a pull request")] = "text",
    html: Annotated[Path | None, typer.Option(help="also write a page with curves to this file")] = None,
) -> None:
    """Shows runs side by side: what their recipes differ in, what each reached, and how soon."""
    from hpt_torch.report import compare as comparison
    from hpt_torch.report import compare_views as views

    if form not in ("text", "md"):
        raise typer.BadParameter(f"--format must be text or md, got {form!r}")
    if len(runs) < 2:
        raise typer.BadParameter("name two runs or more; hpt report shows one")
    found = comparison.read(runs)
    if form == "md":
        typer.echo(views.markdown(found), nl=False)
    else:
        views.print_comparison(found)
    if html is not None:
        _write(html, views.html(found))
        typer.echo(f"With curves: {html}", err=True)


def clean(
    run_dir: Annotated[Path, typer.Argument(help="the directory of a run that is not running")],
    yes: Annotated[bool, typer.Option("--yes", help="remove it; without, it is only shown")] = False,
) -> None:
    """Shows what of a run can go without losing a result, and removes it with --yes."""
    from rich.table import Table

    from hpt_torch.room import removable, remove, show_bytes, used
    from hpt_torch.rundir import RunDir

    found = removable(run_dir)
    if not found:
        typer.echo(f"{run_dir}: nothing can go of its {show_bytes(used(run_dir))}")
        return
    table = Table("what", "size", "why it can go")
    for item in found:
        table.add_row(str(item.path.relative_to(run_dir)), show_bytes(item.bytes), item.why)
    Console().print(table)
    total = show_bytes(sum(item.bytes for item in found))
    if not yes:
        typer.echo(f"{total} of {show_bytes(used(run_dir))}; remove it with hpt clean {run_dir} --yes")
        return
    with RunDir(run_dir):  # nobody writes it meanwhile
        for item in removable(run_dir):
            remove(item)
    typer.echo(f"{total} removed, {show_bytes(used(run_dir))} are left")


def refine(
    run_dir: Annotated[Path, typer.Argument(help="the directory of a run")],
    out: Annotated[Path | None, typer.Option(help="write the recipe with it to this file")] = None,
    run_it: Annotated[
        bool, typer.Option("--run", help="and search it, with the run's other settings")
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--run-dir", help="with --run: where (default: runs/NAME-refined)")
    ] = None,
    allow_import: Annotated[
        list[str] | None, typer.Option(help="with --run: a module that the recipe may import")
    ] = None,
) -> None:
    """Proposes the next search space from a run's trials, with the reason for every bound.

    Ranges are narrowed to where the best trials lie, and widened where these crowd at an end.
    """
    from hpt_torch.record import Record
    from hpt_torch.refine import refine as refined
    from hpt_torch.report.summary import summarise

    with Record(run_dir / "run.db", readonly=True) as record:
        summary = summarise(record)
        recipe = record.of_kind("run")[0].body["recipe"]
    found = refined(summary.space, summary.trials, summary.objective)
    _show(summary, found)
    for note in _notes(recipe, summary, found):
        typer.echo(note)
    if not (out or run_it):
        return
    if not found.changed:
        typer.echo("Nothing is changed, so no recipe is written and nothing is run.")
        return
    if recipe["task"]["kind"] == "python":
        typer.echo("The run was made from Python: give `tune` the space above.")
        return
    name = f"{recipe['name'][:55]}-refined"
    path = out or run_dir / "refined.toml"
    _write(path, f"# Refined from the run {run_dir.resolve().name}.\n{_recipe(recipe, name, found)}")
    typer.echo(f"Recipe: {path}")
    if run_it:
        from hpt_torch import cli  # which imports this module

        cli.run(str(path), run_dir=to, allow_import=allow_import)


def add(
    run_dir: _RUN,
    point: Annotated[list[str], typer.Argument(metavar="NAME=VALUE…", help="searched hyperparameters")],
) -> None:
    """Adds a trial with these hyperparameters to a run; what is left open its sampler fills in.

    It is trained when the round that is running has ended, beyond the number of trials of the recipe.
    """
    from hpt_torch.overrides import toml_value

    pairs = [text.partition("=") for text in point]
    if bad := next((text for text, (_, equals, _) in zip(point, pairs, strict=True) if not equals), None):
        raise typer.BadParameter(f"a hyperparameter must look like lr=0.01, got {bad!r}")
    _ask(run_dir, "add", {"point": {name.strip(): toml_value(value.strip()) for name, _, value in pairs}})


def stop(
    run_dir: _RUN, trial: Annotated[int, typer.Argument(min=0, help="its number, as hpt report shows it")]
) -> None:
    """Stops one trial of a run at its next step; the others go on. (To stop the run: Ctrl-C.)"""
    _ask(run_dir, "stop", {"trial": trial})


def extend(
    run_dir: _RUN,
    by: Annotated[list[str], typer.Argument(metavar="trials=+N timeout=+TIME", help="e.g. trials=+50")],
) -> None:
    """Extends a run's budget, also while it is running."""
    from hpt_torch.recipe_sections import parse_duration
    from hpt_torch.steering import MOST_TRIALS

    body: dict[str, float] = {"trials": 0, "seconds": 0.0}
    for text in by:
        name, _, value = text.partition("=+")
        if name == "trials" and value.isdecimal() and 0 < int(value) <= MOST_TRIALS:
            body["trials"] = int(value)
        elif name == "timeout" and value:
            try:
                body["seconds"] = parse_duration(value)
            except ValueError as error:
                raise typer.BadParameter(f"timeout {error}") from error
        else:
            raise typer.BadParameter(f"must be trials=+N or timeout=+TIME (+90s, +30m, +2h), got {text!r}")
    _ask(run_dir, "extend", body)


def _ask(run_dir: Path, kind: str, body: Mapping[str, Any]) -> None:
    from hpt_torch.record import Record
    from hpt_torch.rundir import RunDir
    from hpt_torch.steering import ask

    directory = RunDir(run_dir)
    if directory.record.is_file():
        directory.check_usable()
    file = ask(run_dir, kind, body)
    held = directory.is_run()
    deadline = time.monotonic() + _WAIT_SECONDS
    while held and file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if not file.exists():
        typer.echo(f"{run_dir}: taken up")
    elif held:
        typer.echo(f"{run_dir}: the run takes it up when its present round has ended")
    else:
        with Record(directory.record, readonly=True) as record:
            again = " --reopen-holdout" if record.last("holdout") else ""
        command = f"hpt run {directory.recipe} --run-dir {run_dir}{again}"
        typer.echo(f"{run_dir}: nobody runs it now; it is taken up by: {command}")


def _show(summary: Summary, found: Refinement) -> None:
    from rich.table import Table
    from rich.text import Text

    from hpt_torch.types import printable

    table = Table(title=f"The space after {summary.name}", title_justify="left")
    for label in ("", "searched", "next", "why"):
        table.add_column(label, overflow="fold")
    for name, old in summary.space.items():
        new = found.space.get(name)
        after = "" if name not in found.changed else "left out" if new is None else _values(new)
        row = (name, _values(old), after, found.reasons[name])
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table if summary.space else "Nothing was searched, so there is nothing to refine.")


def _values(dimension: Any) -> str:
    """A dimension without its default and condition: 0.0001 to 0.1; relu, gelu."""
    from hpt_torch.report.terminal import show_value
    from hpt_torch.space import Choice

    if isinstance(dimension, Choice):
        return ", ".join(show_value(option) for option in dimension.options)
    step = "" if dimension.step in (None, 1) else f", step {dimension.step:g}"
    return f"{dimension.low:g} to {dimension.high:g}{step}"


def _notes(recipe: Mapping[str, Any], summary: Summary, found: Refinement) -> list[str]:
    notes = []
    if summary.holdout_reads and found.changed:
        notes.append(
            "The hold-out rows were read by this run already: the figure of a refined one on them is a "
            "little less honest."
        )
    grid = recipe["search"]["sampler"] == "grid"
    if (
        grid
        and found.changed
        and not any(word in r for r in found.reasons.values() for word in ("widened", "is new"))
    ):
        notes.append(
            "Every point of the refined grid was tried already: search ranges (float, int) with "
            "search.sampler = tpe to look between them."
        )
    points = recipe["search"].get("points", [])
    outside = len(points) - len(_inside(points, found))
    if outside and found.changed:
        lie = "1 lies" if outside == 1 else f"{outside} lie"
        notes.append(
            f"Of the {len(points)} search.points {lie} outside of the refined space: its recipe leaves "
            f"{'it' if outside == 1 else 'them'} out."
        )
    return notes


def _inside(points: Sequence[Mapping[str, Any]], found: Refinement) -> list[Mapping[str, Any]]:
    """The points that the refined space has."""
    from hpt_torch.points import check_points

    return [point for point in points if not check_points([point], found.space)]


def _recipe(recipe: Mapping[str, Any], name: str, found: Refinement) -> str:
    """The run's recipe with the refined space, as TOML: what is not the default, a dimension a line."""
    import tomli_w

    from hpt_torch.needs import still_read
    from hpt_torch.recipe import Recipe
    from hpt_torch.space import dump_dimension

    def possible(parent: str, value: Any) -> bool:
        return parent in found.space and found.space[parent].contains(value)

    hparams = still_read(recipe["hparams"], recipe["space"], possible)
    search = {**recipe["search"], "points": _inside(recipe["search"].get("points", []), found)}
    given = Recipe.model_validate({**recipe, "name": name, "hparams": hparams, "search": search, "space": {}})
    raw = given.model_dump(exclude_defaults=True, exclude_none=True)
    raw = {"name": name, "task": {}, **raw}
    raw["task"] = {**{key: recipe["task"][key] for key in ("kind", "model", "data")}, **raw["task"]}
    text = tomli_w.dumps({key: value for key, value in raw.items() if value not in ({}, [])})
    lines = ["", "[space]"]
    for key, dimension in found.space.items():
        lines.append(f"{_key(key)} = {_inline(dump_dimension(dimension))}")
    return text + "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    """A value on one line of TOML; of texts, numbers and lists TOML's form is JSON's."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {_inline(item)}' for key, item in value.items())} }}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    plain = all(c.isascii() and (c.isalnum() or c in "_-") for c in name)
    return name if plain and name else json.dumps(name)


def _write(path: Path, text: str) -> None:
    """Raises RunError where the file cannot be written."""
    from hpt_torch.types import RunError

    try:
        path.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}; name another file") from error
