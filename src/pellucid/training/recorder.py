"""What happens after each optimiser step: log, evaluate, save, stop."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from pellucid.errors import Stopped
from pellucid.training.checkpoint import save_checkpoint, saving, thread_fingerprint, write_file
from pellucid.training.learner import Learner
from pellucid.training.objective import Batches

SAVE_SECONDS = 600.0


class StopFlag:
    """Set by SIGINT and SIGTERM while the block runs. A second signal is not caught: it ends the process."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class Recorder:
    """Follows a learner through its run folder; an instance is the loop's ``after_step``.

    Args:
        out: the run's folder.
        learner: whose step has just been taken.
        evaluation: batches of training images to compare with, and batches to evaluate on.
        steps_per_epoch: may be a fraction.
        eval_every, save_every: in steps.
        data: fingerprint of the data, kept in every checkpoint.
        stop: asked after every step.
        writes: False on all ranks but one.
        progress: draw a bar; where there is no terminal, say a line at every evaluation.
        say: gets those lines.
    """

    def __init__(
        self,
        out: Path,
        learner: Learner,
        evaluation: Callable[[], tuple[Batches, Batches]],
        *,
        steps_per_epoch: float,
        eval_every: int,
        save_every: int,
        data: str,
        stop: StopFlag,
        writes: bool = True,
        progress: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.out, self.learner, self.evaluation = out, learner, evaluation
        self.steps_per_epoch, self.eval_every, self.save_every = steps_per_epoch, eval_every, save_every
        self.log_every = max(1, min(50, round(steps_per_epoch)))
        self.data, self.stop, self.writes = data, stop, writes
        self.say = say if progress and not sys.stderr.isatty() else lambda line: None
        self.latest: dict[str, float] = {}
        self.window: dict[str, float] = {}
        self.started = self.saved_at = time.monotonic()
        self.earlier_seconds = 0.0
        self.bar = tqdm(
            total=learner.total_steps,
            initial=learner.step,
            unit="step",
            dynamic_ncols=True,
            disable=not (progress and writes and sys.stderr.isatty()),
            mininterval=0.2,
        )

    def __call__(self, parts: dict[str, Tensor]) -> None:
        step = self.learner.step
        for key, value in parts.items():
            self.window[key] = self.window.get(key, 0.0) + value.item()
        self.window["steps"] = self.window.get("steps", 0) + 1
        self.bar.update()
        last = step == self.learner.total_steps
        if step % self.log_every == 0 or last:
            self._log_training()
        if step % self.eval_every == 0 or last:
            self.evaluate()
        late = time.monotonic() - self.saved_at > SAVE_SECONDS
        stopping = self.learner.any_rank(bool(self.stop.name))  # all ranks stop after the same step
        if step % self.save_every == 0 or last or late or stopping:
            self.save()
        if stopping and not last:
            raise Stopped(
                f"stopped by {self.stop.name or 'a signal'}: saved step {step} of "
                f"{self.learner.total_steps} in {self.out} - run the same command with --resume to go on"
            )

    def evaluate(self) -> None:
        """The objective on the evaluation batches, with the weights that the run would hand over now."""
        if not self.writes:
            return
        parts = self.learner.objective.evaluate(self.learner.final_weights(), *self.evaluation())
        self.latest |= {f"test {key}": value for key, value in parts.items()}
        self._show()
        self._write("test", parts)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in self.latest.items())
        self.say(f"step {self.learner.step} of {self.learner.total_steps}: {shown}")

    def save(self) -> None:
        """A checkpoint of this very step."""
        self.saved_at = time.monotonic()
        if self.writes:
            meta = {
                "data": self.data,
                "seconds": self.seconds,
                "window": self.window,
                "latest": self.latest,
                "made_by": thread_fingerprint(),
            }
            save_checkpoint(self.out / "checkpoints", self.learner.step, self.learner.tensors(), meta)

    def restore(self, meta: dict[str, Any]) -> None:
        """Go on where a checkpoint's log stood."""
        self.window, self.latest = dict(meta["window"]), dict(meta["latest"])
        self.earlier_seconds = meta["seconds"]

    def drop_later_lines(self) -> None:
        """Lines of the log that lie after the learner's step will be written again."""
        path = self.out / "metrics.jsonl"
        if self.writes and path.exists():
            kept = [line for line in read_lines(path) if line["step"] <= self.learner.step]
            write_file(path, "".join(json.dumps(line) + "\n" for line in kept))

    @property
    def seconds(self) -> float:
        """Spent on the run, over all sittings."""
        return self.earlier_seconds + time.monotonic() - self.started

    def _log_training(self) -> None:
        steps = self.window.pop("steps")
        means = {key: value / steps for key, value in self.window.items()}
        self.window = {}
        self.latest |= means
        self._show()
        self._write("train", {**means, "lr_factor": self.learner.lr_factor})

    def _show(self) -> None:
        names = ("loss", "test accuracy")
        self.bar.set_postfix({key: f"{self.latest[key]:.3f}" for key in names if key in self.latest})

    def _write(self, split: str, values: dict[str, float]) -> None:
        if self.writes:
            step = self.learner.step
            line = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), "split": split, **values}
            text = json.dumps(line) + "\n"
            with saving(self.out, len(text)), open(self.out / "metrics.jsonl", "a") as file:
                file.write(text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSON-lines file; a line that a killed process left half written is passed over."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
