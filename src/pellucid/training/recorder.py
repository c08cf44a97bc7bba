"""What happens after each optimiser step: log, evaluate, save, stop."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from pellucid.errors import CheckpointError, Collapsed, NumericsError, ResourceError, StepTooLong, Stopped
from pellucid.regular import read_regular
from pellucid.training.checkpoint import save_checkpoint, save_sharded, saving, thread_fingerprint, write_file
from pellucid.training.health import Verdict
from pellucid.training.learner import Learner
from pellucid.training.objective import Held
from pellucid.training.step_lengths import LIMIT, LONGEST, OF_A_LAYER, SAFE, step_lengths

SAVE_SECONDS = 600.0

SKIPS_AMONG = 1_000
"""Steps within which a run may leave out so many as ``max_skipped`` says."""


class StopFlag:
    """Set by a signal while the block runs: SIGINT, SIGTERM, or SIGUSR1, which SLURM sends before its limit.

    A second signal is not caught: it ends the process.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class Spikes:
    """Notices a loss that is far above those of the last steps, measured by how much these vary.

    The z-score is ``(loss - median) / (1.4826 * median absolute deviation)`` of the last ``window`` losses,
    with the deviation at least a thousandth of the median: that of a normal distribution, in which an outlier
    does not hide the next. A spike has a z-score above ``z`` and exceeds all of the last losses by a tenth of
    the median.
    """

    def __init__(self, window: int = 100, least: int = 30, z: float = 10.0) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.least, self.z = least, z

    def score(self, loss: float) -> float | None:
        """The z-score of a spike, or None; the loss joins the last ones."""
        last = list(self.losses)
        self.losses.append(loss)
        if len(last) < self.least or not math.isfinite(loss):
            return None
        median = statistics.median(last)
        deviation = 1.4826 * statistics.median(abs(one - median) for one in last)
        score = (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)
        return score if score > self.z and loss > max(last) + 0.1 * abs(median) else None


class Throughput:
    """Images or words per second since the last report, and how much of that time went by waiting for them.

    Args:
        waited: seconds that the loop has waited for data so far.
        units: of a step.
        unit: what they are.
    """

    def __init__(self, waited: Callable[[], float], units: int, unit: str = "images") -> None:
        self.waited, self.units, self.unit = waited, units, unit
        self.start()

    def start(self) -> None:
        """Count from now."""
        self.steps, self.since, self.waited_before = 0, time.monotonic(), self.waited()

    def step(self) -> None:
        self.steps += 1

    def told(self) -> str:
        """As the end of a line; empty while there is nothing to tell."""
        seconds = time.monotonic() - self.since
        if not self.steps or not self.units:
            return ""
        share = (self.waited() - self.waited_before) / seconds
        hint = " - more --workers may help" if share > 0.3 else ""
        speed = self.steps * self.units / seconds
        return f"; {speed:.0f} {self.unit}/s, {share:.0%} of it waiting for data{hint}"


class Bar(tqdm):
    """With a lock of this process alone.

    tqdm's own is shared with forked processes: one that is killed while it holds it leaves all others waiting
    for ever.
    """


Bar.set_lock(threading.RLock())


class Recorder:
    """Follows a learner through its run folder; an instance is the loop's ``after_step``.

    Args:
        out: the run's folder.
        learner: whose step has just been taken.
        held: what to evaluate on, asked whether the run is at its end.
        steps_per_epoch: may be a fraction.
        eval_every, save_every: in steps.
        data: fingerprint of the data, kept in every checkpoint.
        stop: asked after every step.
        sharded: each rank writes its part of a checkpoint.
        max_skipped: steps of any 1,000 that may be left out.
        list_batch: writes down what a step was made of, given its number and the reason; returns the file.
        stop_on_collapse: end when the objective's verdict is that its features have collapsed.
        stop_past_bound: end when a step of ISTA is so long that its LASSO may rise; else that is only said.
        waited: seconds that the loop has waited for data so far.
        units_per_step, unit: of all ranks, for the throughput.
        writes: False on all ranks but one.
        progress: draw a bar; where there is no terminal, say a line at every evaluation.
        say: gets those lines.
    """

    def __init__(
        self,
        out: Path,
        learner: Learner,
        held: Callable[[bool], Held],
        *,
        steps_per_epoch: float,
        eval_every: int,
        save_every: int,
        data: str,
        stop: StopFlag,
        sharded: bool = False,
        max_skipped: int = 0,
        list_batch: Callable[[int, str], Path] | None = None,
        stop_on_collapse: bool = False,
        stop_past_bound: bool = False,
        waited: Callable[[], float] = lambda: 0.0,
        units_per_step: int = 0,
        unit: str = "images",
        writes: bool = True,
        progress: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.out, self.learner, self.held = out, learner, held
        self.steps_per_epoch, self.eval_every, self.save_every = steps_per_epoch, eval_every, save_every
        self.log_every = max(1, min(50, round(steps_per_epoch)))
        self.data, self.stop, self.writes = data, stop, writes
        self.sharded, self.stop_on_collapse = sharded, stop_on_collapse
        self.clock = Throughput(waited, units_per_step, unit)
        self.stop_past_bound = stop_past_bound
        self.lengths: dict[str, float] = {}
        self.warned = 0.0
        self.history: list[dict[str, float]] = []
        self.health: Verdict | None = None
        self.refused = False  # to save a state that is not finite
        self.max_skipped, self.list_batch = max_skipped, list_batch
        self.skipped: list[int] = []
        self.spikes = Spikes()
        learner.may_skip = self.may_skip
        self.say = say if progress and not sys.stderr.isatty() else lambda line: None
        self.latest: dict[str, float] = {}
        self.window: dict[str, float] = {}
        self.started = self.saved_at = time.monotonic()
        self.earlier_seconds = 0.0
        self.bar = Bar(
            total=learner.total_steps,
            initial=learner.step,
            unit="step",
            dynamic_ncols=True,
            disable=not (progress and writes and sys.stderr.isatty()),
            mininterval=0.2,
        )

    def begin(self) -> None:
        """Before the first step: the measures of the untrained model, where a verdict needs them."""
        if self.learner.step == 0 and self.learner.objective.many_views:
            self.evaluate()
        self.clock.start()

    def __call__(self, parts: dict[str, Tensor]) -> None:
        step = self.learner.step
        self.clock.step()
        if step not in self.skipped:
            for key, value in parts.items():
                self.window[key] = self.window.get(key, 0.0) + value.item()
            self.window["steps"] = self.window.get("steps", 0) + 1
            self._look_for_a_spike(parts["loss"].item())
        self.bar.update()
        last = step == self.learner.total_steps
        if step % self.log_every == 0 or last:
            self._log_training()
        judged = step % self.eval_every == 0 or last
        if judged:
            self.evaluate()
        late = time.monotonic() - self.saved_at > SAVE_SECONDS
        # Right after a verdict only: a run that is resumed all the same has until the next one.
        collapsed = judged and self.stop_on_collapse and self._collapsed()
        too_long = judged and not last and self.stop_past_bound and self._longest() >= LIMIT
        # All ranks stop after the same step.
        stopping = self.learner.any_rank(bool(self.stop.name) or collapsed or too_long)
        if step % self.save_every == 0 or last or late or stopping:
            self.save()
        if collapsed and self.health is not None:
            raise Collapsed(
                f"{self.health.text} - stopped after step {step}, which is saved in {self.out}\n"
                f"take a lower --lr and --matrix-lr or a larger batch, or --objective simdino with its gamma"
            )
        if too_long:
            raise StepTooLong(
                f"{self._about_lengths(LIMIT)}: nothing says that such a step lowers its LASSO - stopped "
                f"after step {step}, which is saved in {self.out}\n"
                f"go on all the same with --resume --ista-bound warn, or start again with a lower "
                f"--matrix-lr or --model-arg step_size=..."
            )
        if stopping and not last:
            raise Stopped(
                f"stopped by {self.stop.name or 'a signal'}: saved step {step} of "
                f"{self.learner.total_steps} in {self.out} - run the same command with --resume to go on"
            )

    def may_skip(self, error: NumericsError) -> bool:
        """Whether the step about to be taken may be left out; it is written down with the state before it."""
        step = self.learner.step + 1
        recent = sum(step - one < SKIPS_AMONG for one in self.skipped)
        if recent >= self.max_skipped or self.list_batch is None:
            return False
        self.keep_before()
        self.skipped.append(step)
        if self.writes:
            path = self.list_batch(step, str(error))
            count = f"{recent + 1} of {self.max_skipped} allowed"
            self.warn(f"{error}: left out, {count}; its batch is listed in {path}")
        return True

    def keep_before(self) -> None:
        """The state before a step that is refused, beside the list of what it was made of."""
        try:
            tensors = self.learner.whole_tensors(self.writes)
            if self.writes:
                save_checkpoint(self.out / "bad", self.learner.step, tensors, {"data": self.data})
        except NumericsError:
            self.save()  # refuses too, and names what stands
            raise

    def _look_for_a_spike(self, loss: float) -> None:
        score = self.spikes.score(loss)
        if score is None or not self.writes:
            return
        step, said = self.learner.step, f"loss {loss:.4g}, {score:.0f} deviations above the last steps'"
        listed = "" if self.list_batch is None else f"; its batch is listed in {self.list_batch(step, said)}"
        self.warn(f"a spike at step {step}: {said}{listed}")

    def warn(self, line: str) -> None:
        """News that is told whether or not there is a bar."""
        self.bar.write(line, file=sys.stderr)

    def evaluate(self) -> None:
        """The objective on the evaluation batches, with the weights that the run would hand over now."""
        with self.learner.measured(self.writes) as (objective, weights):
            if not self.writes:
                return
            final = self.learner.step == self.learner.total_steps
            parts = objective.evaluate(weights, self.held(final))
            self.lengths = step_lengths(objective.model, weights)
        of_training = {k: v for k, v in self.latest.items() if not k.startswith("test ")}
        self.latest |= {f"test {key}": value for key, value in parts.items()}
        self.history.append({**of_training, **parts, "step": self.learner.step})
        self.health = self.learner.objective.verdict(self.history)
        self._show()
        told = {} if self.health is None else {"health": self.health.state, "verdict": self.health.text}
        lengths = {OF_A_LAYER + name: length for name, length in self.lengths.items()}
        longest = {LONGEST: self._longest()} if lengths else {}
        self._write("test", {**parts, **told, **longest, **lengths})
        self._look_at_lengths()
        shown = ", ".join(f"{key} {value:.3f}" for key, value in self.latest.items())
        self.say(f"step {self.learner.step} of {self.learner.total_steps}: {shown}{self.clock.told()}")
        if self.health is not None:
            self.tell(self.health.text)
        self.clock.start()

    def save(self) -> None:
        """A checkpoint of this very step."""
        if self.writes and not (self.out / "config.yaml").exists():
            raise ResourceError(
                f"the folder of the run is gone: {self.out} - nothing of it can be saved; start again, or "
                f"take another --out"
            )
        self.saved_at = time.monotonic()
        learner, folder = self.learner, self.out / "checkpoints"
        meta = {
            "data": self.data,
            "seconds": self.seconds,
            "window": self.window,
            "latest": self.latest,
            "history": self.history,
            "skipped": self.skipped,
            "saved": time.strftime("%Y-%m-%d %H:%M:%S"),
            "made_by": thread_fingerprint(),
        }
        try:
            if self.sharded:
                save_sharded(folder, learner.step, learner.tensors(), meta)
                return
            tensors = learner.whole_tensors(self.writes)
            if self.writes:
                save_checkpoint(folder, learner.step, tensors, meta)
        except NumericsError:
            self.refused = True
            raise

    def restore(self, meta: dict[str, Any]) -> None:
        """Go on where a checkpoint's log stood."""
        self.window, self.latest = dict(meta["window"]), dict(meta["latest"])
        self.history = list(meta.get("history", []))
        self.skipped = list(meta.get("skipped", []))
        if self.history:
            self.health = self.learner.objective.verdict(self.history)
        self.earlier_seconds = meta["seconds"]

    def drop_later_lines(self) -> None:
        """Lines of the log that lie after the learner's step will be written again."""
        path = self.out / "metrics.jsonl"
        if self.writes and path.exists():
            step = self.learner.step
            kept = [line for line in read_lines(path) if line["step"] <= step and step > 0]
            write_file(path, "".join(json.dumps(line) + "\n" for line in kept))

    @property
    def seconds(self) -> float:
        """Spent on the run, over all sittings."""
        return self.earlier_seconds + time.monotonic() - self.started

    def _log_training(self) -> None:
        steps = self.window.pop("steps", 0)
        if not steps:
            return
        means = {key: value / steps for key, value in self.window.items()}
        self.window = {}
        self.latest |= means
        self._show()
        self._write("train", {**means, "lr_factor": self.learner.lr_factor})

    def _look_at_lengths(self) -> None:
        """Told when the first step passes each of the two bounds."""
        for bound, meaning in (
            (LIMIT, "from 2 on nothing proves that it lowers its LASSO, which pellucid audit measures"),
            (SAFE, "below 2 it lowers its LASSO from any feasible start"),
        ):
            if self._longest() >= bound > self.warned:
                self.tell(f"{self._about_lengths(bound)}; {meaning}")
                self.warned = bound

    def _longest(self) -> float:
        return max(self.lengths.values(), default=0.0)

    def _about_lengths(self, bound: float) -> str:
        name = max(self.lengths, key=self.lengths.__getitem__)
        others = sum(length >= bound for length in self.lengths.values()) - 1
        beside = f" ({others} more past {bound:.0f})" if others else ""
        return f"{name}: its step of ISTA is at {self._longest():.2f}/||D||^2{beside}"

    def tell(self, line: str) -> None:
        """News that is worth a line on a terminal too."""
        if self.bar.disable:
            self.say(line)
        else:
            self.bar.write(line, file=sys.stderr)

    def _collapsed(self) -> bool:
        """Whether the last evaluation, or the last two, leave no doubt."""
        if self.health is None or self.health.state not in ("collapsing", "collapsed"):
            return False
        if self.health.state == "collapsed":
            return True
        before = self.learner.objective.verdict(self.history[:-1])
        return before is not None and before.state == "collapsing"

    def _show(self) -> None:
        names = ("loss", "test accuracy", "test knn accuracy", "test bits per byte")
        self.bar.set_postfix({key: f"{self.latest[key]:.3f}" for key in names if key in self.latest})

    def _write(self, split: str, values: Mapping[str, float | str]) -> None:
        if self.writes:
            step = self.learner.step
            line = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), "split": split, **values}
            text = json.dumps(line) + "\n"
            with saving(self.out, len(text)), open(self.out / "metrics.jsonl", "a", opener=_no_link) as file:
                file.write(text)


def _no_link(path: str, flags: int) -> int:
    """Whoever lays a link in the place of a log must not have the run write to where it leads."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


_WORDS = {"split", "health", "verdict"}
"""What a line of the log says in words; all else are numbers."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSON-lines file; a line that a killed process left half written is passed over."""
    try:
        text = read_regular(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the log {path} ({error.strerror}) - restore it") from error
    lines = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and _is_line(found):
            lines.append(found)
    return lines


def _is_line(found: dict[str, Any]) -> bool:
    return {"step", "epoch", "split"} <= found.keys() and all(
        isinstance(value, str) if key in _WORDS else isinstance(value, int | float)
        for key, value in found.items()
    )
