"""The training loop of all stages: data, steps, checkpoints, logs, several processes."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from scfeat_ros.acceleration import has_bfloat16
from scfeat_ros.cpu import cpu_name
from scfeat_ros.errors import InputError, ScfeatError, import_optional
from scfeat_ros.extractor import select_device
from scfeat_ros.memory import keep_freed_memory
from scfeat_ros.staging import staged_file
from scfeat_training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from scfeat_training.config import TrainConfig
from scfeat_training.datasets import ImageCache
from scfeat_training.ema import Ema
from scfeat_training.fast_layers import accelerate, cpu_has_bfloat16
from scfeat_training.networks import load_network, load_weights, make_model
from scfeat_training.sampling_order import Numbered, StepSampler, collate
from scfeat_training.scenes import HELD_OUT_FROM, Scene, has_pairs, read_scenes, split_scenes
from scfeat_training.stages import STAGE_CLASSES
from scfeat_training.validation import Validation

LOG = "log.jsonl"
STOP_SIGNALS = signal.SIGTERM, signal.SIGINT
MAX_SKIPPED_IN_A_ROW = 50
KEPT_MEMORY = 2**31 - 1
"""Most bytes of freed memory that a run on the CPU keeps for the next step."""


def hardware(device: torch.device) -> str:
    """Description of the hardware that the run uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores of {cpu_name()}"


def _start_worker(number: int) -> None:
    os.setsid()  # do not receive signals sent to the trainer's process group
    for one in STOP_SIGNALS:
        signal.signal(one, signal.SIG_IGN)  # discards pending signals
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for one in STOP_SIGNALS:
        signal.signal(one, signal.SIG_DFL)  # PyTorch terminates stuck workers by these
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals that stop a run, also in processes that are started meanwhile.

    A signal is often sent to the whole process group, but the trainer needs its data workers until
    it ends: a worker leaves the group before it unblocks signals.
    """
    resource_tracker.ensure_running()  # starting it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Keep other processes from training in a run's folder.

    Raises:
        InputError: another one does.
    """
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{run}: another process is training there; wait until it ends or give another "
                "folder by --run"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


class LeftOut:
    """Collects messages about bad inputs that were left out, and prints each once.

    Args:
        tell: whether to print them.
    """

    def __init__(self, tell: bool = True) -> None:
        self.tell = tell
        self.lines: dict[str, None] = {}

    def __call__(self, line: str) -> None:
        """Add the message about an input."""
        if self.tell and line not in self.lines:
            print(f"left out: {line}", file=sys.stderr)
        self.lines[line] = None

    def __str__(self) -> str:
        """Suffix for the final message; empty if nothing was left out."""
        return f", {len(self.lines)} bad inputs left out" if self.lines else ""


class Trainer:
    """Trains one stage.

    Args:
        config: the stage's settings.
        run: folder of checkpoint, log and TensorBoard files.
        resume: continue from the run's checkpoint.
        init: checkpoint of an earlier stage whose averaged weights this one starts from (or, in
            the distillation, learns from), a file of exported weights, or an installed model.
        skip_bad: continue without unreadable images and wrong cameras.
        device: torch device; "auto" is CUDA where there is one.
        command: the command line, for the record.

    Attributes:
        left_out: the bad inputs that were left out by this process; after training, by all.
        signal: number of the signal that stopped the training, None if none did.

    With torchrun's environment variables set, the process joins the group and takes its share
    of each batch; the first process alone writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: str | Path,
        resume: bool = False,
        init: str | Path | None = None,
        skip_bad: bool = False,
        device: str = "auto",
        command: str = "",
    ) -> None:
        import_optional("tensorboard", "training", "'.[train]'")
        self.config = config
        self.run = Path(run)
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = _device(device)
        if config.batch % self.world:
            raise InputError(f"batch {config.batch} cannot be split over {self.world} processes")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if config.threads:
            torch.set_num_threads(config.threads)
        if not resume and (self.run / CHECKPOINT).exists():
            raise InputError(
                f"{self.run / CHECKPOINT}: there is a run already; continue it by --resume or "
                "give another folder by --run"
            )
        state = load_checkpoint(self.run) if resume else None
        self.run.mkdir(parents=True, exist_ok=True)
        self.left_out = LeftOut(tell=self.rank == 0)
        self.train_scenes, self.held_out = _scenes(config, skip_bad, self.left_out)
        self.left_out.tell = True  # from here on every process finds different inputs
        self.skip_bad = skip_bad

        self.model = make_model(config).eval()  # batch norm stays frozen; nothing else differs
        self.history: list[dict[str, Any]] = []
        self.model.to(self.device, memory_format=torch.channels_last)
        self.stage = STAGE_CLASSES[config.stage](config, self.model)
        if state is None and init is not None:
            earlier, provenance = load_network(init)
            self.history = list(provenance.get("history", []))
            self.stage.start(earlier, str(init))
        elif state is None and self.stage.needs_earlier:
            raise InputError(f"{config.stage}: give the network to learn from by --init")
        elif state is None and config.stage != "warmup" and self.rank == 0:
            print(f"{config.stage}: from random weights, without --init", file=sys.stderr)
        self.step = 0
        self.ema = Ema(self.model, config.ema)
        groups = self.stage.parameter_groups()
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay)
        if state is not None:
            self._restore(state)
        if self.device.type == "cpu":
            keep_freed_memory(KEPT_MEMORY)
            if cpu_has_bfloat16():
                accelerate(self.stage.network)
        network: nn.Module = self.stage.network
        if config.compile:
            network = torch.compile(network)
        if self.world > 1:
            network = DistributedDataParallel(network)
        self.network = network
        self.history.append(
            {
                "stage": config.stage,
                "command": command,
                "seed": config.seed,
                "from_step": self.step,
                "to_step": self.step,
                "seconds": 0.0,
                "hardware": hardware(self.device),
                "processes": self.world,
                "scenes": [scene.name for scene in self.train_scenes],
                "config": asdict(config),
            }
        )
        self._autocast = self.device.type == "cuda" and has_bfloat16(self.device)
        self.signal: int | None = None
        self._skipped_in_a_row = 0

    def _restore(self, state: dict[str, Any]) -> None:
        if state["stage"] != self.config.stage:
            raise InputError(
                f"{self.run}: holds a run of stage '{state['stage']}', not '{self.config.stage}'"
            )
        frozen = state["history"][-1]["config"].get("frozen", [])
        if set(frozen) != set(self.config.frozen):
            raise InputError(
                f"{self.run}: was begun with 'frozen: {frozen}', not {self.config.frozen}, and a "
                f"run goes on with the parts it trains; set it back, or begin another run with "
                f"--init {self.run}"
            )
        load_weights(self.model, state["model"], str(self.run))
        load_weights(self.ema.model, state["ema"], str(self.run))
        self.stage.load_state_dict(state.get("stage_state", {}))
        rates = [(group["peak"], group["weight_decay"]) for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:  # PyTorch's message says nothing to a user
            raise InputError(
                f"{self.run}: the run trains other parts of the network, since 'loss: scores' was "
                f"0 and is not, or the reverse; set it back, or begin another run"
            ) from error
        # the checkpoint brings the rates that the run was begun with; those of the settings count
        for group, (peak, decay) in zip(self.optimizer.param_groups, rates, strict=True):
            group |= {"peak": peak, "weight_decay": decay}
        before, now = state["history"][-1]["config"], asdict(self.config)
        changed = [
            f"{name} {now[name]} (was {before[name]})"
            for name in now
            if name in before and before[name] != now[name]
        ]
        if changed and self.rank == 0:
            print(f"{self.run}: goes on with other settings: {', '.join(changed)}", file=sys.stderr)
        self.step = state["step"]
        self.history = state["history"]
        torch.set_rng_state(state["rng"])

    def checkpoint(self) -> None:
        """Write the run's state; only the first process does."""
        if self.rank == 0:
            save_checkpoint(
                self.run / CHECKPOINT,
                {
                    "stage": self.config.stage,
                    "step": self.step,
                    "stage_state": self.stage.state_dict(),
                    "model": self.model.state_dict(),
                    "ema": self.ema.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "rng": torch.get_rng_state(),
                    "history": self.history,
                },
            )

    def _loader(self, end: int) -> Iterator[dict[str, Any]]:
        config = self.config
        images = ImageCache()
        dataset = self.stage.dataset(self.train_scenes, self.skip_bad, images)
        loader = DataLoader(
            Numbered(dataset, images),
            batch_sampler=StepSampler(self.step, end, config.batch, self.rank, self.world),
            num_workers=config.workers,
            collate_fn=collate,
            worker_init_fn=_start_worker,
            prefetch_factor=4 if config.workers else None,
            # children of this process itself: PyTorch workers exit when their parent does
            multiprocessing_context="spawn" if config.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        with _signals_blocked() if config.workers else nullcontext():
            return iter(loader)

    def _validation(self) -> Validation | None:
        """Validation on the held-out images; None, with a message, if there are none."""
        config = self.config
        if not config.validation_pairs:
            return None
        if not self.held_out:
            print(
                f"no validation: images are held out of scenes of {HELD_OUT_FROM} or more",
                file=sys.stderr,
            )
            return None
        if not has_pairs(self.held_out):
            print(
                "validation by homographies alone: the held-out images are in no posed pairs",
                file=sys.stderr,
            )
        size = tuple(config.size)
        pairs = config.validation_pairs
        return Validation(self.held_out, pairs, size, self.skip_bad, self.left_out)

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        config = self.config
        rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
        if config.schedule == "constant":
            return rise
        progress = min(1.0, step / config.steps)
        return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def train(self, stop_at: int | None = None, time_limit: float | None = None) -> int:
        """Train until the last step, a signal, `stop_at` or `time_limit` minutes.

        Returns:
            the step reached; the checkpoint of it is written.

        Raises:
            InputError: another process trains in the run's folder, or data cannot be used.
            ScfeatError: a data process is gone.
        """
        try:
            with only_writer(self.run) if self.rank == 0 else nullcontext():
                return self._train(stop_at, time_limit)
        except (ConnectionError, EOFError, RuntimeError) as error:
            # PyTorch says so in a handler of a signal, anywhere, or where the next batch is taken
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise ScfeatError(
                "a data process was ended from outside, perhaps for want of memory; go on by "
                "--resume, if need be with fewer --workers"
            ) from error

    def _train(self, stop_at: int | None, time_limit: float | None) -> int:
        config = self.config
        end = config.steps if stop_at is None else min(stop_at, config.steps)
        started = time.monotonic()
        before = self.history[-1]["seconds"]
        log = _Log(self.run, self.step) if self.rank == 0 else None
        validation = self._validation() if self.rank == 0 else None
        handlers = {s: signal.signal(s, self._on_signal) for s in STOP_SIGNALS}
        means = _Means()
        bar = tqdm(total=end, initial=self.step, unit="step", disable=None if log else True)
        batches = None
        try:
            batches = self._loader(end)
            while self.step < end:
                late = time_limit is not None and time.monotonic() - started > 60 * time_limit
                # all processes leave the loop together
                if self._any(torch.tensor(late or self.signal is not None)):
                    break
                batch = _to_device(self._usable(next(batches)), self.device)
                means.add(self._one_step(batch, log))
                self.step += 1
                bar.update()
                now = time.monotonic()
                self.history[-1] |= {"to_step": self.step, "seconds": before + now - started}
                if self.step % config.log_every == 0:
                    terms = self._over_processes(means.take())
                    if log and terms:
                        bar.set_postfix(loss=f"{terms['loss']:.3f}")
                        log.scalars(self.step, terms | {"seconds": now - started})
                if log and self.step % config.picture_every == 0:
                    log.pictures(self.step, self.stage.pictures(self.ema.model, batch))
                if validation and (self.step % config.validate_every == 0 or self.step == end):
                    tested = time.monotonic()
                    figures = validation(self.ema.model, detector=self.stage.detects)
                    figures["validation_seconds"] = time.monotonic() - tested
                    log.validation(self.step, figures)
                    line = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
                    tqdm.write(f"step {self.step}: {line}")
                if self.step % config.checkpoint_every == 0:
                    self.checkpoint()
            self.checkpoint()
            for lines in self._of_all_processes(list(self.left_out.lines)):
                self.left_out.lines |= dict.fromkeys(lines)
        finally:
            batches = None  # ends the data workers now
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if log:
                log.close()
        return self.step

    def _usable(self, batch: dict[str, Any] | ScfeatError) -> dict[str, Any]:
        """A batch of `Numbered` without its messages, which are collected; raises its error."""
        if isinstance(batch, ScfeatError):
            raise batch
        for line in "\n".join(filter(None, batch.pop("left_out"))).splitlines():
            self.left_out(line)
        return batch

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _forward(self, *inputs: torch.Tensor) -> Any:
        """The network's output, on a GPU with bf16 convolutions; losses are computed in fp32."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self._autocast):
            return self.network(*inputs)

    def _one_step(self, batch: dict[str, Any], log: _Log | None) -> dict[str, torch.Tensor]:
        """One update; returns its terms for the log, none if loss or gradient are not finite."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.rate(self.step)
        losses, terms = self.stage.losses(self._forward, batch)
        bad = ~losses.detach().isfinite()
        if self._any(bad.any()):
            self._skip([n for n, b in zip(batch["name"], bad.tolist(), strict=True) if b], log)
            return {}
        self.optimizer.zero_grad(set_to_none=True)
        loss = losses.mean()
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        if not norm.isfinite():
            self._skip(list(batch["name"]), log)
            return {}
        self.optimizer.step()
        self.ema.update(self.model, self.step)
        self._skipped_in_a_row = 0
        return {"loss": loss.detach(), **terms, "gradient": norm}

    def _any(self, flag: torch.Tensor) -> bool:
        """Whether the flag is set in any of the processes."""
        if self.world == 1:
            return bool(flag)
        flag = flag.to(self.device).float()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _of_all_processes(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def _over_processes(self, terms: dict[str, float]) -> dict[str, float]:
        """Means over the processes; a term may be absent in some of them."""
        rows = self._of_all_processes(terms)
        names = sorted({name for row in rows for name in row})
        found = {name: [row[name] for row in rows if name in row] for name in names}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _skip(self, names: list[str], log: _Log | None) -> None:
        self._skipped_in_a_row += 1
        names = [name for some in self._of_all_processes(names) for name in some]
        if log:
            where = "; ".join(names)
            line = f"step {self.step}: loss or gradient not finite, skipped ({where})"
            print(line, file=sys.stderr)
            log.row({"step": self.step, "skipped": names})
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise ScfeatError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row without a finite loss: the run has "
                "diverged; resume it with a smaller lr"
            )


class _Means:
    """Means of the terms over the steps since the last `take`."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class _Log:
    """TensorBoard files and a file of JSON lines.

    Args:
        run: their folder; entries of a killed run after step `step` are dropped, since these
            steps will be repeated.
    """

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(run), purge_step=step + 1)
        if (run / LOG).exists():
            _drop_later_rows(run / LOG, step)
        self.file = (run / LOG).open("a", encoding="utf-8")

    def row(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def scalars(self, step: int, values: dict[str, float], group: str = "train") -> None:
        self.row({"step": step, group: {k: round(v, 5) for k, v in values.items()}})
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def validation(self, step: int, values: dict[str, float]) -> None:
        self.scalars(step, values, "validation")

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
        self.file.close()


def _drop_later_rows(path: Path, step: int) -> None:
    """Remove the log's rows after a step."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the row that a killed run was writing
            continue
        # a row about a skipped step has the number of steps before it
        if row["step"] + ("skipped" in row) <= step:
            kept.append(line + "\n")
    with staged_file(path, overwrite=True) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def _device(name: str) -> torch.device:
    number = os.environ.get("LOCAL_RANK")
    if number is not None and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{number}"  # at once, since a look at another one takes memory there
    device = select_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _scenes(
    config: TrainConfig, skip_bad: bool, on_bad: LeftOut
) -> tuple[list[Scene], list[Scene]]:
    scenes = read_scenes(config.data, skip_bad, on_bad, config.scenes)
    train, held_out = split_scenes(scenes)
    if not train:
        raise InputError(f"{config.data}: all scenes are held out for validation, none to train on")
    return train, held_out


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
