"""The folder of a training: its lock, its checkpoint, its log; and the signals that stop it."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from common.cli import UserError, note
from common.distributed import all_gather_object, barrier, rank_and_world_size
from common.files import atomic_write

ROW_EVERY = 10  # steps
LINE_EVERY = 20  # seconds


@contextlib.contextmanager
def open_run_folder(path, steps: int, config: dict, may_change=(), may_differ=()):
    """The RunFolder of a training of `steps` steps. All ranks enter; rank 0 holds the lock.

    config: all that decides the run's results, plain values. They must be the checkpoint's, but for
    the names in may_change, and the same on all ranks, but for those in may_differ. Raises
    UserError if they are not, if another process trains in the folder, or if the folder holds
    something that is no run of this version.
    """
    path = Path(path)
    rank, _ = rank_and_world_size()
    # Locked before the run is read, so that the second of two commands in one folder is refused.
    with claim(path, config) if rank == 0 else contextlib.nullcontext():
        barrier()
        run = RunFolder(path, steps, config)
        if run.checkpoint:
            if changes := differences(run.checkpoint["config"], config, may_change):
                raise UserError(f"{path} has other settings or other data: {changes}; give another "
                                "--out, or the former settings to resume")
        of_ranks = all_gather_object(config | {"step": run.step})
        for other, theirs in enumerate(of_ranks):
            if changes := differences(of_ranks[0], theirs, may_differ):
                raise UserError(f"rank {other} differs from rank 0: {changes}; start all ranks "
                                "with the same flags, files and kind of machine")
        yield run


def claim(path: Path, config: dict):
    """Locks a run folder, which is made if there is none. Returns a context manager that releases
    it."""
    path.mkdir(parents=True, exist_ok=True)
    # The lock, and the temporary files that a killed write leaves behind, do not count.
    files = [file for file in path.glob("[!.]*") if file.name != "run.lock"]
    # Every run begins with its config.json, which has all fields.
    try:
        ours = not files or json.loads((path / "config.json").read_text()).keys() == config.keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{path} holds files, but no config.json of this program and version: "
                        "give another --out")
    try:
        return FileLock(path / "run.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training in {path}") from None


def differences(before: dict, after: dict, ignored) -> str:
    """The values of `after` that differ from those before, "lr 0.1 -> 0.2, ..."; "" if none do."""
    return ", ".join(f"{name} {before.get(name)!r} -> {value!r}" for name, value in after.items()
                     if name not in ignored and before.get(name) != value)


class RunFolder:
    """A run's files: model.pt, the newest checkpoint; config.json; and log.jsonl.

    checkpoint: the dict that save() wrote, None at the start. step: the last finished one, 0 at the
    start. Steps count from 1. replaced: {reason: samples} of this rank since start().
    """

    def __init__(self, path: Path, steps: int, config: dict):
        self.path, self.steps, self.config = path, steps, config
        self.rank, _ = rank_and_world_size()
        self.checkpoint, saved = None, {"step": 0, "seconds": 0.0, "log_bytes": 0, "replaced": {}}
        if (path / "model.pt").exists():
            keys = ["model", "lm", "optimizers", "config", *saved]
            saved = self.checkpoint = read_checkpoint(path, keys)
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.log_bytes, self.replaced_before = saved["log_bytes"], Counter(saved["replaced"])

    def start(self):
        """Writes config.json and starts the clock of the training."""
        # Frees a second copy of the weights.
        self.checkpoint = None
        self.replaced, self.waited = Counter(), 0.0
        self.last_step, self.last_time, self.next_line = self.step, time.perf_counter(), 0.0
        if self.rank == 0:
            with atomic_write(self.path / "config.json") as file:
                file.write(json.dumps(self.config, indent=1).encode())

    def print(self, text: str):
        """Once, however many ranks there are."""
        if self.rank == 0:
            print(text, flush=True)

    def fetch(self, loader):
        """Yields the loader's batches, and adds up how long each of them takes to come."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def log(self, step: int, images: int, **values):
        """Called after each step: writes a row of `values` every ROW_EVERY steps, and prints it
        every LINE_EVERY seconds. images: how many the step has."""
        self.step = step
        if self.rank != 0 or (step % ROW_EVERY and step != self.steps):
            return
        now = time.perf_counter()
        passed = now - self.last_time
        self.seconds += passed
        rate = (step - self.last_step) * images / passed
        row = dict(step=step, **values, images_per_s=rate, data_wait=self.waited / passed,
                   seconds=self.seconds)
        self.last_step, self.last_time, self.waited = step, now, 0.0
        line = json.dumps(row).encode() + b"\n"
        # A disk that is full now may have room again for the next checkpoint, so training goes on.
        try:
            with open(self.path / "log.jsonl", "ab") as file:
                # Cut off rows of steps that are taken again, and half a row on a full disk.
                self.log_bytes = min(self.log_bytes, file.tell())
                file.truncate(self.log_bytes)
                file.write(line)
            self.log_bytes += len(line)
            if now > self.next_line:
                minutes = (self.steps - step) * images / rate / 60
                print(f"step {step:,} of {self.steps:,}: loss {values['loss']:.3f}, accuracy "
                      f"{values['accuracy']:.3f}, {rate:,.0f} images/s, {minutes:.1f} min left",
                      flush=True)
                self.next_line = now + LINE_EVERY
        except OSError as error:
            note(f"the log of {self.path} lacks rows or lines: {error}; the training goes on")

    def save(self, state: dict, keep: bool = False):
        """Writes the checkpoint of the last finished step: `state` and what resuming needs besides.

        keep: a copy stays beside model.pt. Called by all ranks; when it returns, all is on disk.
        Returns {reason: samples replaced} of all ranks since the run's first step.
        """
        replaced = sum(all_gather_object(self.replaced), self.replaced_before)
        if self.rank == 0:
            # Into memory first: torch.save reports a full disk as a RuntimeError.
            buffer = io.BytesIO()
            torch.save(dict(state, config=self.config, step=self.step, seconds=self.seconds,
                            log_bytes=self.log_bytes, replaced=dict(replaced)), buffer)
            names = ["model.pt"]
            if keep:
                # The copy first: a run that is killed between the two takes its step again.
                names.insert(0, f"model-{self.step:08d}.pt")
            for name in names:
                with atomic_write(self.path / name) as file:
                    file.write(buffer.getbuffer())
        barrier()
        return replaced


def read_checkpoint(path, keys) -> dict:
    """The dict that save() wrote. Raises UserError unless path, a file or a run folder, holds one
    that is undamaged and has these keys."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.pt"
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    with open(path, "rb") as file:
        try:
            # torch.load checks no sums: a flipped bit would become a wrong weight.
            damaged = zipfile.ZipFile(file).testzip()
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            lacking = sorted(set(keys) - checkpoint.keys())
            if damaged or lacking:
                raise ValueError(f"damaged: {damaged}, lacking: {lacking}")
        # Unpickling damaged bytes may raise anything.
        except Exception as error:
            raise UserError(f"{path} is not a paraclip checkpoint, or was written by another "
                            f"version, or is damaged: {type(error).__name__}: {error}") from None
    return checkpoint


class StopSignals:
    """While it is entered, SIGINT, SIGTERM and SIGUSR1 only set `received`, so that the training
    can end after its step. A second Ctrl-C ends the program at once, with status 130 (not under
    torchrun, which then kills its ranks itself)."""

    def __enter__(self):
        self.received = self.interrupted = False
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.former = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        # torchrun hands a terminal's Ctrl-C on, so that its ranks get each one twice.
        if number == signal.SIGINT and self.interrupted and "RANK" not in os.environ:
            for worker in multiprocessing.active_children():
                worker.kill()
            # An ordinary exit would wait for a worker that hangs.
            os._exit(130)
        self.received = True
        self.interrupted |= number == signal.SIGINT
