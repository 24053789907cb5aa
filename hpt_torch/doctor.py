"""hpt doctor: what hpt_torch finds on this machine, and what is in its way. `cli` registers the command."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hpt_torch import __version__, limits
from hpt_torch.types import DamageError, RunError

_DISTRIBUTION = "hpt-torch"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="measure first what training together is worth on this machine"),
    ] = False,
    runs: Annotated[Path, typer.Option(help="where runs are kept")] = Path("runs"),
) -> None:
    """Shows versions, devices, settings, what is missing. Exit status 1: something keeps runs from working.

    Whether trials of a kind of model train faster together or one by one depends on the machine, and so does
    after how many steps it pays to compile them. With --calibrate that is measured, in a minute or two, and
    new runs plan with it; those that have begun do not.
    """
    if calibrate:
        _calibrate(err=as_json)
    found = examine(runs)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found)
    if found["problems"]:
        raise typer.Exit(1)


def _calibrate(err: bool) -> None:
    try:
        from hpt_torch import calibration

        typer.echo("Measuring how fast members train together, as a multiple of one by one:", err=err)
        calibration.calibrate(lambda line: typer.echo(f"  {line}", err=err))
    except ImportError as error:
        raise RunError(f"nothing can be measured: {error}; hpt doctor says what is missing") from error
    except KeyboardInterrupt:
        typer.echo("hpt: stopped; the cost table is as it was", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"Kept in {calibration.path()}: new runs plan with it.", err=err)
    typer.echo("Remove that file to go back to the table that comes with hpt_torch.", err=err)


# -- what there is -------------------------------------------------------------------------------------


def examine(runs: Path) -> dict[str, Any]:
    """All that hpt doctor shows, as plain data; "problems" are sentences on what keeps runs from working."""
    packages, extras, problems = _packages()
    found: dict[str, Any] = {
        "hpt_torch": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "compiler": _compiler(),
        "problems": problems,
    }
    if not problems:
        problems += _broken("torch", "torchvision")
    if not problems:
        found["cpu"], found["memory_bytes"] = _cpu(), limits.memory_bytes()
        found["settings"] = _settings()
        found["devices"], found["no_cuda"] = _devices(problems)
        found["costs"] = _costs(problems)
        found["disk"] = _disk(runs, problems)
    return found


def _packages() -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Versions of what hpt_torch needs, its extras, and what of the first is missing or too old."""
    needed: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    problems = []
    for name, least, extra in _requirements():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and _release(version) >= _release(least)
        item = {"version": version, "least": least, "fits": fits}
        if extra:
            install = f'pip install "{_DISTRIBUTION}[{extra}]"'
            known = extras.setdefault(extra, {"packages": {}, "complete": True, "install": install})
            known["packages"][name] = item
            known["complete"] &= fits
        else:
            needed[name] = item
            if not fits:
                has = "is not installed" if version is None else f"is {version}, which is too old"
                problems.append(f'{name} {has}: pip install "{name}>={least}"')
    return needed, extras, problems


def _requirements() -> Iterator[tuple[str, str, str]]:
    """(package, least version, extra or "") of each line that the package was installed with."""
    with contextlib.suppress(metadata.PackageNotFoundError):  # run from its source: nothing to compare with
        for line in metadata.requires(_DISTRIBUTION) or ():
            text, _, marker = line.partition(";")
            match = re.match(r"([\w.-]+)(?:\[[\w,-]*\])?\s*>=\s*([\d.]+)", text)
            extra = re.search(r"""extra == ['"]([\w-]+)['"]""", marker)
            if match is not None:
                yield match[1], match[2], extra[1] if extra is not None else ""


def _release(version: str) -> tuple[int, ...]:
    """2.14.1+cu130 as (2, 14, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _broken(*names: str) -> Iterator[str]:
    """Which of these modules cannot be imported: a library is missing, or two versions do not fit."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            yield f"{name} cannot be imported ({_first_line(error)}); install torch and torchvision again"
            return


def _compiler() -> dict[str, Any]:
    """What torch.compile builds its CPU kernels with."""
    names = (os.environ.get("CXX") or "", "g++", "clang++", "cl")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return {"path": path, "python_headers": headers.is_file()}


def _cpu() -> dict[str, Any]:
    import torch

    from hpt_torch.executors import processes

    return {
        "name": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": processes.cores(),
        "cores_of_machine": os.cpu_count(),
        "quota": limits.cpu_quota(),
        "threads": torch.get_num_threads(),
        "workers": processes.cores() if processes.supported() else None,
    }


def _settings() -> dict[str, Any]:
    """What hpt_torch sets, or leaves as it is, that speed and bits depend on."""
    import torch

    from hpt_torch.machine import are_denormals_zero, denormals_are_zero, keep_freed_memory

    with denormals_are_zero():
        flushed = are_denormals_zero()
    return {
        "denormals_are_zero": flushed,
        "keeps_freed_memory": keep_freed_memory(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _devices(problems: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The accelerators, and why there is no CUDA device where there is none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # such as a driver that is too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    devices: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count() if available else 0):
        device: dict[str, Any] = {"device": f"cuda:{i}"}
        devices.append(device)
        try:
            about = torch.cuda.get_device_properties(i)
            device |= {"name": about.name, "memory_bytes": about.total_memory}
            device["free_bytes"] = torch.cuda.mem_get_info(i)[0]
            torch.ones(2, device=f"cuda:{i}").sum().item()
        except RuntimeError as error:
            problems.append(f"cuda:{i} cannot be used ({_first_line(error)}); use trainer.device=cpu")
    if torch.backends.mps.is_available():
        devices.append({"device": "mps"})
    if available:
        return devices, ""
    if caught:
        return devices, _first_line(caught[0].message)
    built = torch.version.cuda
    return devices, f"torch is built for CUDA {built}" if built else "this build of torch is without CUDA"


def _costs(problems: list[str]) -> dict[str, Any]:
    import torch

    from hpt_torch import calibration

    about: dict[str, Any] = {"path": str(calibration.path())}
    try:
        table = calibration.present()
    except DamageError as error:
        problems.append(str(error))
        return {**about, "source": "damaged"}
    about |= {"source": "measured" if table.measured else "shipped", "measured": table.measured}
    about |= {
        "torch": table.torch,
        "other_torch": bool(table.torch) and table.torch != str(torch.__version__),
    }
    slow = {device: sorted(table.slow_together(device)) for device in table.ratios}
    return {
        **about,
        "sha256": table.sha256,
        "slow_together": slow,
        "ratios": table.ratios,
        "pays_after": table.pays_after,
    }


def _disk(runs: Path, problems: list[str]) -> dict[str, Any]:
    from hpt_torch.room import FREE_BYTES, check_free, free_bytes, standing

    place = standing(runs)
    try:
        check_free(runs)
    except RunError as error:
        problems.append(str(error))
    writable = os.access(place, os.W_OK | os.X_OK)
    if not writable:
        problems.append(f"{place} cannot be written, so no run can be kept in {runs}; use another --run-dir")
    free = free_bytes(runs)
    return {"path": str(runs), "free_bytes": free, "needed_bytes": FREE_BYTES, "writable": writable}


def _first_line(error: object) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


# -- how it is shown -----------------------------------------------------------------------------------


def _show(found: dict[str, Any]) -> None:
    """A table on a terminal; plain lines where it is piped."""
    console, rows = Console(), list(_rows(found))
    if console.is_terminal:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="hpt doctor", title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    else:
        for label, value in rows:
            typer.echo(f"{label:<16} {value}")
    for problem in found["problems"]:
        typer.echo(f"Problem: {problem}")
    if not found["problems"]:
        typer.echo("Nothing keeps hpt_torch from running here.")


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "hpt_torch", found["hpt_torch"]
    yield "Python", f"{found['python']} ({found['executable']})"
    yield "platform", found["platform"]
    yield "packages", ", ".join(_versions(found["packages"]))
    if "cpu" in found:
        yield from _machine_rows(found)
    yield "C++ compiler", _compiler_text(found["compiler"])
    for extra, about in found["extras"].items():
        there = ", ".join(_versions(about["packages"]))
        yield f"extra {extra}", there if about["complete"] else f"{there}: {about['install']}"


def _versions(packages: dict[str, Any]) -> Iterator[str]:
    for name, item in packages.items():
        if item["version"] is None:
            yield f"{name} missing"
        else:
            yield f"{name} {item['version']}" + ("" if item["fits"] else f" (needs {item['least']})")


def _machine_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from hpt_torch.room import show_bytes

    cpu, memory, disk = found["cpu"], found["memory_bytes"], found["disk"]
    cores = f"{cpu['cores']} of {cpu['cores_of_machine']} cores"
    if cpu["quota"] is not None and cpu["quota"] < cpu["cores"]:
        most = math.ceil(cpu["quota"])
        cores += f", of which a cgroup allows the time of {cpu['quota']:g}: set run.workers={most}"
    yield "CPU", f"{cpu['name']} ({cpu['capability']}), {cores}"
    yield "memory", "unknown" if memory is None else show_bytes(memory)
    yield "workers", _workers_text(cpu)
    for device in found["devices"]:
        size = f", {show_bytes(device['memory_bytes'])}" if "memory_bytes" in device else ""
        free = f", {show_bytes(device['free_bytes'])} free" if "free_bytes" in device else ""
        yield device["device"], f"{device.get('name', 'Apple GPU')}{size}{free}"
    if found["no_cuda"]:
        yield "CUDA", f"no device ({found['no_cuda']})"
    kept = found["settings"]["keeps_freed_memory"]
    yield "allocator", "freed memory is kept (glibc)" if kept else "as the system has it: glibc only is set"
    flushed = found["settings"]["denormals_are_zero"]
    yield "denormals", "count as 0 where a trial trains" if flushed else "are computed: slowly, on most CPUs"
    precision = found["settings"]["matmul_precision"]
    yield "matrix products", f"float32 with precision {precision!r} (trainer.tf32 lowers it on CUDA)"
    yield "disk", f"{show_bytes(disk['free_bytes'])} free for {disk['path']}"
    yield "cost table", _costs_text(found["costs"])


def _workers_text(cpu: dict[str, Any]) -> str:
    if cpu["workers"] is None:
        return f"none (forking needs Linux): trials train in one process of {cpu['threads']} threads"
    return f"{cpu['workers']} of one thread each; one trial alone on {cpu['threads']} threads"


def _compiler_text(compiler: dict[str, Any]) -> str:
    if compiler["path"] is None:
        return "none: torch.compile needs one for the CPU (Debian: apt-get install g++)"
    headers = "" if compiler["python_headers"] else ", without Python.h (Debian: apt-get install python3-dev)"
    return f"{compiler['path']}{headers}"


def _costs_text(costs: dict[str, Any]) -> str:
    if costs["source"] == "damaged":
        return f"damaged: {costs['path']}"
    slow = [f"{kind} ({device})" for device, kinds in costs["slow_together"].items() for kind in kinds]
    says = f"; faster one by one: {', '.join(slow) or 'nothing'}"
    for device, kinds in costs["pays_after"].items():
        for kind, steps in kinds.items():
            least = ", ".join(f"{after:,.0f} with {members}" for members, after in steps.items())
            says += f"; steps after which compiling pays, {kind} ({device}): {least} members"
    if costs["source"] == "shipped":
        return f"the shipped one{says}; hpt doctor --calibrate measures this machine's"
    other = "; this is another torch: hpt doctor --calibrate" if costs["other_torch"] else ""
    back = f"; remove {costs['path']} to go back to the shipped one"
    return f"measured {costs['measured']} with torch {costs['torch']}{other}{says}{back}"
