"""Starts `hpt run`, kills it as it is told, starts it again until it ends, and judges what is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torture_hook
from torture_hook import Plug

from hpt_torch import promotion
from hpt_torch.record import Record
from hpt_torch.report import canonical, summarise
from hpt_torch.types import HptError

ORPHAN_SECONDS, HANG_SECONDS = 10.0, 180.0
_LEFT_BY_A_KILL = (".tmp", "-wal", "-shm", "-journal")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill. step: at this durable step of its session; or else seconds: so long after its start."""

    target: str
    step: int = 0
    moment: str = "before"
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.step:
            return f"{self.target} {self.moment} step {self.step}"
        return f"{self.target} after {self.seconds:.3f} s"


@dataclass
class Life:
    """A run from its first start to its end, and what was found wrong with it."""

    kills: Sequence[Kill]  # one a session; the session after the last is left in peace
    delivered: list[Kill] = field(default_factory=list)  # the others came too late
    steps: list[str] = field(default_factory=list)  # the durable steps of the last session
    seconds: float = 0.0  # of the last session
    failures: list[str] = field(default_factory=list)


class Process:
    """`hpt run` in a session, and so a process group, of its own.

    fast: forked from this process, which has loaded everything, instead of started anew.
    """

    def __init__(self, arguments: Sequence[str], plug: Plug, output: Path, *, fast: bool) -> None:
        setting = "|".join(map(str, (plug.step, plug.moment, plug.target, plug.log, plug.root)))
        self._popen: subprocess.Popen[bytes] | None = None
        self._code: int | None = None
        environment = {**os.environ, "HPT_TORTURE": setting}
        if not fast:
            command = [sys.executable, torture_hook.__file__, *arguments]
            with open(output, "ab") as file:
                self._popen = subprocess.Popen(
                    command, stdout=file, stderr=file, start_new_session=True, env=environment
                )
            self.pid = self._popen.pid
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            while self.poll() is None and os.getpgid(self.pid) != self.pid:
                time.sleep(0.0005)  # it does not lead its group yet
            return
        code = 70
        try:
            os.setsid()
            file_descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file_descriptor, 1)
            os.dup2(file_descriptor, 2)
            os.environ.update(environment)
            torture_hook.main(list(arguments))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._popen is not None:
            return self._popen.poll()
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, seconds: float) -> int | None:
        """The exit status as soon as it has ended; None where it has not in so many seconds."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return code


def living(session: int) -> list[int]:
    """The processes of this session id that run; one that only waits to be buried does not."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, of = (folder / "stat").read_text().rpartition(") ")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(of) == session and state not in "ZX":
                found.append(int(folder.name))
    return found


def live(recipe: Path, folder: Path, kills: Sequence[Kill], *, fast: bool) -> Life:
    """One life in `folder`. Its run directory is `folder`/run, its output `folder`/output.txt."""
    folder.mkdir(parents=True)
    life, run, log = Life(kills), folder / "run", folder / "steps.txt"
    arguments = ["run", str(recipe), "--run-dir", str(run)]
    sessions: list[tuple[int, Kill | None]] = []
    for kill in (*kills, None):
        log.unlink(missing_ok=True)
        plug = Plug(log=log, root=run)
        if kill is not None and kill.step:
            plug = Plug(log=log, root=run, step=kill.step, moment=kill.moment, target=kill.target)
        start = time.monotonic()
        process = Process(arguments, plug, folder / "output.txt", fast=fast)
        sessions.append((process.pid, kill))
        hit = False
        if kill is not None and not kill.step and process.wait(kill.seconds) is None:
            hit = torture_hook.kill(process.pid, kill.target)
            while not hit and kill.target == "worker" and process.wait(0.01) is None:
                hit = torture_hook.kill(process.pid, kill.target)  # none was there yet
        code = process.wait(HANG_SECONDS)
        life.seconds = time.monotonic() - start
        lines = log.read_text().splitlines() if log.exists() else []
        life.steps = [line.partition(" ")[2] for line in lines if not line.startswith("pulled")]
        hit = hit or any(line.startswith("pulled") for line in lines)
        if kill is not None and not kill.step and kill.target != "worker":
            hit = hit and code == -signal.SIGKILL  # it may have ended in the instant before
        if kill is not None and hit:
            life.delivered.append(kill)
        if code is None:
            life.failures.append(f"hangs after {kill}")
            torture_hook.kill(process.pid, "group")
            process.wait(ORPHAN_SECONDS)
            return life
        if code != (-signal.SIGKILL if kill is not None and hit and kill.target != "worker" else 0):
            life.failures.append(f"exit status {code}, after {kill}")
            return life
        if code == 0:
            break
    # Only now: a session begins at once, beside whatever the kill before it has left.
    life.failures += [problem for session, kill in sessions for problem in _orphans(session, kill)]
    return life


def _orphans(session: int, kill: Kill | None) -> list[str]:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := living(session)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if left:
        os.killpg(session, signal.SIGKILL)
    return [f"{len(left)} processes live {ORPHAN_SECONDS:g} s after {kill or 'the end'}"] if left else []


# -- judging -------------------------------------------------------------------------------------------


def reports_of(run: Path) -> dict[str, str]:
    """The canonical reports of a run and of those inside it (baselines, confirmations), by their place."""
    reports = {}
    for path in sorted(run.rglob("run.db")):
        with Record(path, readonly=True) as record:
            reports[str(path.parent.relative_to(run))] = canonical(summarise(record))
    return reports


def judge(run: Path, expected: dict[str, str]) -> list[str]:
    """What is wrong with a run that has ended: nothing, where it is as the run that was left in peace."""
    try:
        found = reports_of(run)
    except HptError as error:
        return [f"not readable: {error}"]
    problems = [f"{place}: missing" for place in sorted(expected.keys() - found.keys())]
    problems += [f"{place}: not in the reference" for place in sorted(found.keys() - expected.keys())]
    problems += [
        f"{place}: another canonical report"
        for place in sorted(found.keys() & expected.keys())
        if found[place] != expected[place]
    ]
    for path in sorted(run.rglob("run.db")):
        problems += [f"{path.parent.relative_to(run)}: {problem}" for problem in _trials(path)]
    for path in sorted(run.rglob("*")):
        if path.name.endswith(_LEFT_BY_A_KILL) or path.name == "owner.json":
            problems.append(f"{path.relative_to(run)} is left")
    return problems


def _trials(path: Path) -> list[str]:
    """Trials lost, double or not ended, and state files that nothing names or that are not there."""
    with Record(path, readonly=True) as record:
        planned = Counter(event.body["trial"] for event in record.of_kind("trial"))
        ended = Counter(event.body["trial"] for event in record.of_kind("finish"))
        reported = Counter((event.body["trial"], event.body["epoch"]) for event in record.of_kind("report"))
        running = [trial.number for trial in record.in_order() if not trial.state.is_finished]
        kept = {files[-1].name for key, files in record.state_files.items() if key in ("best", "refit")}
        promoted = [number for e in record.of_kind("promotion") for number, _ in e.body["trials"]]
        ended.subtract(promoted)  # each has ended once more
        waiting = {f.name for key in promotion.needed(record) for f in record.state_files.get(key, [])}
    problems = [f"trial {n} is lost" for n in range(max(planned) + 1) if n not in planned]
    for what, counts in (("planned", planned), ("ended", ended), ("reported", reported)):
        problems += [f"{name} is {what} {count} times" for name, count in counts.items() if count > 1]
    problems += [f"trial {number} has not ended" for number in running]
    there = {file.name for file in (path.parent / "checkpoints").iterdir()}
    problems += [f"{name} is left" for name in sorted(there - kept - waiting)]
    return problems + [f"{name} is missing" for name in sorted(kept - there)]


# -- drawing -------------------------------------------------------------------------------------------


def step_lives(
    steps: Sequence[str], count: int, targets: Sequence[str], draw: random.Random
) -> list[list[Kill]]:
    """Lives that are killed at durable steps: `count` kills, spread evenly over every step and both sides of
    it; every second life is killed again soon after it has begun to go on."""
    places = []
    for number, name in enumerate(steps, start=1):
        places += [(number, m) for m in torture_hook.MOMENTS if m != "half" or name.startswith("write")]
    lives: list[list[Kill]] = []
    order = sorted({round(i * (len(places) - 1) / max(1, count - 1)) for i in range(count)})
    for place in order:
        step, moment = places[place]
        kills = [Kill(target=targets[len(lives) % len(targets)], step=step, moment=moment)]
        if len(lives) % 2:
            kills.append(
                Kill(target="group", step=draw.randint(1, 20), moment=draw.choice(["before", "after"]))
            )
        lives.append(kills)
    return lives


def instant_life(seconds: float, targets: Sequence[str], draw: random.Random) -> list[Kill]:
    """One to four sessions, each killed at an instant of the time that the whole run takes."""
    return [
        Kill(target=draw.choice(list(targets)), seconds=draw.uniform(0.0, seconds))
        for _ in range(draw.randint(1, 4))
    ]
