"""Kills searches of hpt_torch and of its peers at random instants, and counts what becomes of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from peers_torture import EPOCHS, PEERS, TRIALS

HERE = Path(__file__).parent
HANG_SECONDS = 300.0
RECIPE = f"""
[hparams]
hidden_sizes = [64, 64]
batch_norm = true
batch_size = 32
[space]
lr = {{ float = [1e-4, 1e-1] }}
dropout = {{ float = [0.0, 0.5] }}
[search]
trials = {TRIALS}
[trainer]
epochs = {EPOCHS}
[run]
checkpoint_every_seconds = 0.5
"""
LABELS = {
    "hpt": "`hpt run`",
    "optuna_sqlite": "Optuna, SQLite",
    "optuna_heartbeat": "Optuna, SQLite, heartbeat and retry",
    "optuna_journal": "Optuna, journal file",
    "ray": "Ray Tune, `Tuner.restore`",
}


def _command(peer: str, folder: Path) -> list[str]:
    if peer != "hpt":
        return [sys.executable, str(HERE / "peers_torture.py"), peer, str(folder)]
    (folder / "recipe.toml").write_text(RECIPE)
    arguments = ["run", str(folder / "recipe.toml"), "--run-dir", str(folder / "run"), "--quiet"]
    return [sys.executable, "-m", "hpt_torch", *arguments]


def _trials(peer: str, folder: Path, output: str) -> list[dict[str, Any]]:
    if peer != "hpt":
        return json.loads(output.strip().splitlines()[-1])  # type: ignore[no-any-return]
    from hpt_torch.record import Record

    with Record(folder / "run" / "run.db", readonly=True) as record:
        return [
            {"state": t.state.name, "params": dict(t.hparams), "value": t.metrics.get("valid/accuracy")}
            for t in record.in_order()
        ]


def _session(peer: str, folder: Path, kill_after: float | None) -> tuple[str, str, float]:
    """How a session ended (killed, done, failed, hung), what it said, and its seconds."""
    start = time.monotonic()
    with open(folder / "output.txt", "w+") as output, open(folder / "errors.txt", "a") as errors:
        process = subprocess.Popen(
            _command(peer, folder), stdout=output, stderr=errors, start_new_session=True
        )
        try:
            code = process.wait(HANG_SECONDS if kill_after is None else kill_after)
            how = "failed" if code else "done"
        except subprocess.TimeoutExpired:
            how = "hung" if kill_after is None else "killed"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return how, output.read(), time.monotonic() - start


def _key(trial: dict[str, Any]) -> str:
    return json.dumps(trial["params"], sort_keys=True)


def torture(
    runs: Annotated[int, typer.Option(min=1, help="of each, every one killed up to twice")] = 6,
    seed: int = 0,
    peers: Annotated[str, typer.Option(help="a,b of hpt and the peers; all unless given")] = "",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """What is lost, left or changed where the process group is killed with SIGKILL and the same command
    given again until it ends: 12 trials of one MLP, beside Optuna and Ray Tune."""
    names = peers.split(",") if peers else list(LABELS)
    rows = []
    for peer in names:
        assert peer == "hpt" or peer in PEERS, peer
        draw, counts = random.Random(seed), Counter[str]()
        with tempfile.TemporaryDirectory(prefix="kill-", ignore_cleanup_errors=True) as root:
            peace = Path(root) / "peace"
            peace.mkdir()
            how, output, seconds = _session(peer, peace, None)
            assert how == "done", (peace / "errors.txt").read_text()
            expected = sorted((_key(t), t["value"]) for t in _trials(peer, peace, output))
            for run in range(runs):
                folder = Path(root) / f"run-{run}"
                folder.mkdir()
                # The first quarter is starting up: nothing is there to be lost.
                moments = [draw.uniform(0.25, 1.0) * seconds, draw.uniform(0.25, 1.0) * seconds, None]
                for moment in moments:
                    how, output, _ = _session(peer, folder, moment)
                    counts["kills"] += how == "killed"
                    if how != "killed":
                        break
                _judge(peer, folder, how, output, expected, counts)
        rows.append({"peer": peer, "seconds": seconds, "runs": runs, **counts})
        print(f"{peer}: {dict(counts)}", file=sys.stderr, flush=True)
    columns = ("kills", "not ended", "lost", "left running", "failed", "trained twice", "different")
    print(f"| {TRIALS} trials | runs | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for row in rows:
        cells = " | ".join(str(row.get(column, 0)) for column in columns)
        print(f"| {LABELS[row['peer']]} | {row['runs']} | {cells} |")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")


def _judge(peer: str, folder: Path, how: str, output: str, expected: list[Any], counts: Counter[str]) -> None:
    if how != "done":
        counts["not ended"] += 1
        with contextlib.suppress(OSError):
            print((folder / "errors.txt").read_text()[-600:], file=sys.stderr)
        return
    trials = _trials(peer, folder, output)
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
    keys = Counter(_key(trial) for trial in complete)
    if (folder / "trained.txt").exists():  # also where a result was lost and the trial trained again
        keys = Counter((folder / "trained.txt").read_text().splitlines())
    counts["lost"] += max(0, TRIALS - len(complete))
    counts["left running"] += sum(trial["state"] == "RUNNING" for trial in trials)
    counts["failed"] += sum(trial["state"] in ("FAIL", "FAILED", "ERROR") for trial in trials)
    counts["trained twice"] += sum(count - 1 for count in keys.values())
    counts["different"] += sorted((_key(trial), trial["value"]) for trial in complete) != expected
