"""What the shell and the help say: examples at the end of each command's help, names to complete."""

from __future__ import annotations

import typer

EXAMPLES = {
    "clean": ("hpt clean runs/digits_mlp_tpe", "hpt clean runs/digits_mlp_tpe --yes"),
    "run": (
        "hpt run digits_mlp_tpe",
        "hpt run recipes/digits_mlp_tpe.toml search.trials=20 seed=1",
        "hpt run digits_mlp_tpe lr=0.01 --run-dir runs/fixed-lr",
        "hpt run my_recipe.toml --allow-import mymodule",
        "hpt run digits_mlp_tpe --json-lines | jq 'select(.event == \"best\")'",
    ),
    "validate": (
        "hpt validate my_recipe.toml",
        "hpt validate my_recipe.toml space.lr={float=[1e-5,1e-2]}",
        "hpt validate --schema > recipe.schema.json",
    ),
    "report": (
        "hpt report runs/digits_mlp_tpe",
        "hpt report runs/digits_mlp_tpe --open",
        "hpt report runs/digits_mlp_tpe --format md >> pull_request.md",
    ),
    "replay": ("hpt replay runs/digits_mlp_pbt --seeds 5",),
    "compare": ("hpt compare runs/digits_mlp_tpe runs/digits_mlp_pbt",),
    "add": ("hpt add runs/digits_mlp_tpe lr=0.01 dropout=0.2",),
    "stop": ("hpt stop runs/digits_mlp_tpe 7",),
    "extend": ("hpt extend runs/digits_mlp_tpe trials=+50", "hpt extend runs/digits_mlp_tpe timeout=+30m"),
    "refine": ("hpt refine runs/digits_mlp_tpe",),
    "dashboard": ("hpt dashboard runs/digits_mlp_tpe --open",),
    "doctor": (
        "hpt doctor",
        "hpt doctor --json | jq .problems",
        "hpt doctor --calibrate",
    ),
    "list": ("hpt list", "hpt list --runs elsewhere/runs"),
}
_FIRST = ("hpt list", "hpt run digits_mlp_tpe", "hpt report runs/digits_mlp_tpe --open")


def add_examples(app: typer.Typer) -> None:
    """Gives the program and each of its commands their examples."""
    app.info.epilog = _epilog(_FIRST)
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        if name in EXAMPLES:
            command.epilog = _epilog(EXAMPLES[name])


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """(name, what it does) of the recipes that begin so, for the shell to complete."""
    from hpt_torch.catalog import list_recipes

    return [row for row in list_recipes() if row[0].startswith(incomplete)]


def _epilog(lines: tuple[str, ...]) -> str:
    """The mark \\b keeps click from filling the lines."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
