"""`scfeat bag --ray` and `scfeat images --ray`: many inputs over cores, GPUs and machines by Ray.

Every input is one task, which runs the command for this input with a folder of its own under the
output. Ray restarts a task elsewhere when its worker is lost. An output folder gets its name only
when it is complete, so partial output of a lost worker is ignored, and finished tasks are not
repeated, in this run or in a later one with the same output. All machines need the package, and
must see inputs and output under the same paths.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from scfeat_ros.cli import DAMAGED, ERROR, OK
from scfeat_ros.errors import InputError, ScfeatError, import_optional
from scfeat_ros.staging import SUMMARY

CONNECT_TIMEOUT = 5.0
"""Seconds."""
MAX_RETRIES = 3
"""How often a task is restarted after its worker was lost."""


class JobResult(NamedTuple):
    """How one input ended."""

    input: Path
    code: int
    """Exit code of the command, see `scfeat --help`."""
    error: str = ""
    skipped: bool = False
    """Its output existed already."""


def run(arguments: argparse.Namespace) -> list[JobResult]:
    """Process every input of a parsed `bag` or `images` command on a Ray cluster.

    Args:
        arguments: `input` is a list of paths, `output` the folder for all, `ray` the address of a
            cluster ("auto" for the one of this machine, "local" to start one for this run).

    Returns:
        One result per input, in the order of the inputs.

    Raises:
        InputError: two inputs would have the same output folder, or no machine of the cluster has
            the cores or the GPU that a task asks for.
        ScfeatError: Ray is not installed or the cluster cannot be reached.
    """
    outputs = _outputs(arguments.input, arguments.output)
    ray = import_optional("ray", "--ray")
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, arguments.ray)
    try:
        return _collect(ray, arguments, outputs)
    finally:
        if not connected:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    start = {"include_dashboard": False} if address == "local" else {}
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself would go on trying for minutes
            socket.create_connection(
                (host.removeprefix("ray://").strip("[]"), int(port)), CONNECT_TIMEOUT
            ).close()
        ray.init(address=address, log_to_driver=False, logging_level="warning", **start)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        first = str(error).splitlines()[0]
        raise ScfeatError(f"--ray {address}: no cluster was reached ({first})") from error


def _outputs(inputs: list[Path], folder: Path) -> dict[Path, Path]:
    """Input -> its own output folder."""
    outputs = {path: folder.absolute() / (path.stem or path.resolve().name) for path in inputs}
    counts = Counter(outputs.values())
    for path, output in outputs.items():
        if counts[output] > 1 or len(inputs) != len(outputs):
            raise InputError(f"{path}: another input has the same output, {output}")
    return outputs


def _collect(ray: Any, arguments: argparse.Namespace, outputs: dict) -> list[JobResult]:
    gpus = ray.cluster_resources().get("GPU", 0)
    wants_gpu = arguments.device.startswith("cuda") or (arguments.device == "auto" and gpus)
    threads = arguments.threads or 1
    _check_resources(ray, threads, arguments.device if wants_gpu else None)
    task = ray.remote(num_cpus=threads, num_gpus=1 if wants_gpu else 0, max_retries=MAX_RETRIES)(
        _process_one
    )
    jobs = {}
    for path, output in outputs.items():
        job = copy.copy(arguments)
        job.input, job.output = [path.absolute()], output
        job.ray, job.quiet, job.threads = None, True, threads
        if wants_gpu and job.device != "auto":
            job.device = "cuda"  # the task's only one, whatever its number elsewhere
        jobs[task.options(name=f"scfeat {path.name} -> {output}").remote(job)] = path
    results = {}
    waiting = list(jobs)
    with tqdm(total=len(jobs), unit="input", disable=arguments.quiet or None) as bar:
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            path = jobs[done]
            try:
                results[path] = ray.get(done)._replace(input=path)
            except ray.exceptions.RayTaskError as error:  # not tried again
                results[path] = JobResult(path, ERROR, f"{path}: {str(error).splitlines()[-1]}")
            except ray.exceptions.RayError as error:
                first = str(error).strip().splitlines()[0]
                text = f"{path}: given up after {MAX_RETRIES + 1} attempts ({first})"
                results[path] = JobResult(path, ERROR, text)
            if results[path].error:
                tqdm.write(f"scfeat: error: {results[path].error}", file=sys.stderr)
            bar.update()
    return [results[path] for path in outputs]


def _check_resources(ray: Any, threads: int, gpu: str | None) -> None:
    """Check that some machine can run a task: Ray itself would wait for one forever.

    Args:
        threads: cores per task.
        gpu: the requested device if tasks need a GPU.

    Raises:
        InputError: no machine can.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpu:
        machines = [machine for machine in machines if machine.get("GPU", 0) >= 1]
        if not machines:
            raise InputError(f"--device {gpu}: no machine of the cluster has a GPU; use cpu")
    most = max((machine.get("CPU", 0) for machine in machines), default=0)
    if most < threads:
        raise InputError(
            f"--threads {threads}: no machine of the cluster {'with a GPU ' if gpu else ''}has "
            f"more than {most:.0f} cores; give no more than it has"
        )


def _process_one(arguments: argparse.Namespace) -> JobResult:
    """One input, on a worker."""
    (path,) = arguments.input
    # the worker may have been lost after it had completed the output
    if (arguments.output / SUMMARY).is_file() and not arguments.overwrite:
        done = json.loads((arguments.output / SUMMARY).read_text(encoding="utf-8"))
        return JobResult(path, DAMAGED if done["damaged"] else OK, skipped=True)
    try:
        # do not print the summary of a single input
        with open(os.devnull, "w") as nowhere:
            stdout, sys.stdout = sys.stdout, nowhere
            try:
                return JobResult(path, arguments.run(arguments))
            finally:
                sys.stdout = stdout
    except (ScfeatError, ValueError, OSError) as error:
        return JobResult(path, ERROR, " ".join(str(error).split()))


def summary(results: list[JobResult]) -> str:
    """One line about all inputs."""
    skipped = sum(result.skipped for result in results)
    failed = sum(bool(result.error) for result in results)
    done = len(results) - skipped - failed
    return f"{done} done, {skipped} were done already, {failed} failed"
