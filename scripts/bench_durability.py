"""`scripts/bench durability`: what it costs that nothing is lost, as a share of training."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import hpt_torch as hpt
from hpt_torch import checkpoint, tasks
from hpt_torch.record import Record
from hpt_torch.seeding import generator
from hpt_torch.tuner import Tuner


def _data(rows: int) -> hpt.Data:
    inputs = generator(0, "bench", "durability").standard_normal((rows + 500, 784), dtype="float32")
    whole = hpt.Rows({"inputs": torch.from_numpy(inputs), "targets": torch.arange(rows + 500) % 10})
    return hpt.Data(
        train=hpt.Rows(whole.slice(0, rows)), valid=hpt.Rows(whole.slice(rows, rows + 500)), out_features=10
    )


def _run(members: int, rows: int, epochs: int) -> dict[str, Any]:
    """One group of that many MLPs 784-128-128-10 with Adam, everything as by default. The time in commits and
    in state files is measured where they are called."""
    spent: dict[str, list[float]] = {"commit": [], "state": [], "run": []}
    size = [0]

    def timed(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **named)
            spent[kind].append(time.perf_counter() - start)
            if kind == "state":
                size[0] = max(size[0], arguments[0].stat().st_size)
            return result

        return wrapper

    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        mock.patch.object(Record, "append", timed("commit", Record.append)),
        mock.patch.object(Tuner, "run", timed("run", Tuner.run)),
        mock.patch.object(checkpoint, "save", timed("state", checkpoint.save)),
    ):
        hpt.tune(
            hpt.Classification(tasks.MODELS["mlp"], _data(rows)),
            {"lr": hpt.Float(1e-5, 1e-3, log=True)}, trials=members, epochs=epochs,
            hparams={"hidden_sizes": [128, 128], "batch_size": 64}, sampler="random", progress=False,
            run_dir=Path(folder) / "run", tensorboard=False, executor="inline", round_size=members,
        )  # fmt: skip
    (seconds,) = spent.pop("run")
    return {
        "members": members, "epochs": epochs, "seconds": seconds, "commits": len(spent["commit"]),
        "commit_ms": 1e3 * statistics.median(spent["commit"]), "states": len(spent["state"]),
        "state_ms": 1e3 * statistics.median(spent["state"]), "state_mb": size[0] / 1e6,
        "share": sum(map(sum, spent.values())) / seconds,
    }  # fmt: skip


def durability(json_path: Path | None = None) -> None:
    """What commits and state files take of a training with epochs of about a second."""
    torch.set_num_threads(1)
    results = [_run(members, rows, 75) for members, rows in ((1, 60_000), (8, 12_000), (32, 3_000))]
    print("| members at once | epoch, s | commits | ms each | state files | MB, ms each | share |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        epoch = r["seconds"] / r["epochs"]
        print(
            f"| {r['members']} | {epoch:.2f} | {r['commits']} | {r['commit_ms']:.2f} | {r['states']} | "
            f"{r['state_mb']:.1f}, {r['state_ms']:.0f} | {r['share']:.2%} |"
        )
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1))
