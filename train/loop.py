"""The training loop: one for every task."""

import math
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from ..kernels.machine import commit, machine, versions
from .checkpoint import CheckpointError, load_state, rng_state, save_run_config, save_state, set_rng_state
from .config import RunConfig
from .env import peak_flops, peak_memory
from .log import Meter, MetricsLog, ProgressLine, duration
from .optim import build_optimizer
from .plot import try_plot
from .schedule import multiplier
from .signals import StopSignals
from .tasks.base import Task


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what is saved."""


class Trainer:
    """A run of `task` in `folder`: a new one, or with `config.resume` the one saved there.

    Raises CheckpointError if the saved state is damaged or belongs to other data.
    """

    def __init__(self, task: Task, config: RunConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.steps = total_steps(config, task.batches_per_epoch)
        self.warmup = in_steps(config, config.warmup_epochs, task.batches_per_epoch, config.warmup)
        self.eval_every = in_steps(config, config.eval_epochs, task.batches_per_epoch, config.eval_every)
        self.save_every = in_steps(config, config.eval_epochs, task.batches_per_epoch, config.save_every)
        self.optimizer = build_optimizer(
            task.model,
            config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=config.betas,
            **task.optimizer_options(),
        )
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.model: Any = torch.compile(task.model) if config.compile else task.model
        self.meter, self.line = Meter(), ProgressLine()
        self.step = self.position = self.saved_step = self.validated_step = 0
        self.best, self.best_step, self.elapsed = math.inf, 0, 0.0
        self.pending: list[Tensor] = []  # loss and gradient norm of each step since the last look at them
        self.started = time.perf_counter()
        self.log = self._resume() if config.resume else self._start()
        self.stream: Iterator[Any] = task.batches(self.position)

    def run(self) -> int:
        """Train to the end, or to SIGINT or SIGTERM; the exit code of the process.

        Raises TrainingError for a loss that is not finite and for a disk that is full, the last checkpoint intact.
        """
        try:
            self.task.model.train()
            with StopSignals() as signals:
                while self.step < self.steps:
                    self.advance()
                    last = self.step == self.steps
                    if self.step % self.config.log_every == 0 or last:
                        self.report()
                    if self._due(self.eval_every) or last:
                        self.validate()
                    if self._due(self.save_every) or last:
                        self.save()
                    if signals.received and not last:
                        return self.interrupt(signals.received)
            return self.finish()
        except OSError as error:
            raise TrainingError(
                f"{self.folder}: {error.strerror or error} at step {self.step}; "
                f"the checkpoint of step {self.saved_step} is intact: {self.resume_command()}"
            ) from error
        finally:
            self.log.close()

    def advance(self) -> None:
        """One optimiser step."""
        config = self.config
        self._set_learning_rates()
        total = torch.zeros((), device=self.task.device)
        for _ in range(config.grad_accum):
            with self._autocast():
                loss = self.task.loss(self.model, next(self.stream)) / config.grad_accum
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        self.step, self.position = self.step + 1, self.position + config.grad_accum
        # Left on the device: looking at it every step would make a GPU wait.
        self.pending.append(torch.stack([total, norm.detach().to(total)]))
        self.meter.step()

    def report(self) -> None:
        """Write what happened since the last report: the mean loss, and the last step's gradient norm."""
        losses, norms = self._look()
        self.meter.pause()
        rate = self._units_per_second(self.meter.take())
        self.pending.clear()
        loss, lr = sum(losses) / len(losses), self.optimizer.param_groups[0]["lr"]
        epoch = self.position / self.task.batches_per_epoch
        values = {"loss": loss, "lr": lr, "grad_norm": norms[-1], "epoch": epoch, f"{self.task.unit}_per_s": rate}
        mfu = self._mfu(rate)
        counted = self.task.train_metrics()
        self.log.write("train", self.step, **values, **counted, mfu=mfu, elapsed_s=self._elapsed())
        speed = "" if rate is None else f"  {rate:,.0f} {self.task.unit}/s  ETA {duration(self._remaining(rate))}"
        share = "" if mfu is None else f"  MFU {mfu:.1%}"
        self.line.update(f"step {self.step}/{self.steps}  loss {loss:.4f}  lr {lr:.2e}{speed}{share}")
        self.meter.go_on()

    def validate(self) -> None:
        """Evaluate on the validation split, and keep the model if it is the best so far."""
        self._look()
        self.meter.pause()
        metrics = self._evaluate(self.task.eval_model, "valid")
        better = metrics[self.task.metric] < self.best
        if better:
            self.best, self.best_step = metrics[self.task.metric], self.step
            self.task.save(self.folder, self.config)
        self.validated_step = self.step
        self.log.write("valid", self.step, **metrics, best=better, elapsed_s=self._elapsed())
        self.line.say(f"step {self.step}/{self.steps}  valid: {_format(metrics)}{'  (best)' if better else ''}")
        self.meter.go_on()

    def save(self) -> None:
        """Write the resumable state."""
        self._look()
        self.meter.pause()
        save_state(self.folder, self._state())
        self.saved_step = self.step
        self.meter.go_on()

    def interrupt(self, number: int) -> int:
        """Save and leave."""
        self.save()
        self.line.say(f"stopped by {Signals(number).name}, saved at step {self.step}: {self.resume_command()}")
        try_plot(self.folder)
        return 128 + number

    def finish(self) -> int:
        """Judge the best model on the test split, show samples and curves."""
        best = self.task.best_model(self.folder)
        metrics = self._evaluate(best, "test")
        self.log.write("test", self.best_step, **metrics)
        self.line.say(f"test, best checkpoint (step {self.best_step}): {_format(metrics)}")
        samples = self.task.samples(best, self.config.samples, self.config.seed)
        for sample in samples:
            self.line.say(f"--- sample ---\n{sample}")
        rate = self._units_per_second(self.meter.average())
        ending = {"elapsed_s": self._elapsed(), f"{self.task.unit}_per_s": rate, "samples": samples}
        cost = {"peak_bytes": peak_memory(self.task.device), "flops_per_unit": self.task.flops_per_unit}
        self.log.write("end", self.step, **ending, **cost, best_step=self.best_step)
        self.line.say(f"run: {self.folder}  ({duration(self._elapsed())}; {try_plot(self.folder)})")
        return 0

    def resume_command(self) -> str:
        """What continues this run."""
        return f"continue with: python -m grassland.train {self.task.name} --resume {self.folder}"

    def _start(self) -> MetricsLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(self.folder, tensorboard=self.config.tensorboard)
        facts = {"task": self.task.name, "steps": self.steps, **self.task.describe()}
        facts |= {"versions": versions(), "machine": machine(), "commit": commit(), "date": date.today().isoformat()}
        log.write("start", 0, **facts, config=self.config.to_dict())
        self.log = log
        # From here on there is always a model to load and a state to resume, and a full disk shows at once.
        self.task.save(self.folder, self.config)
        self.save()
        return log

    def _resume(self) -> MetricsLog:
        state = load_state(self.folder)
        if state["identity"] != self.task.identity():
            now = self.task.identity()
            raise CheckpointError(f"{self.folder}: saved for the data {state['identity']}, but now it is {now}")
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.position = state["step"], state["position"]
        self.best, self.best_step, self.elapsed = state["best"], state["best_step"], state["elapsed"]
        self.pending = [entry.to(self.task.device) for entry in state["pending"]]
        self.saved_step = self.step
        self.task.load_state(state["task"])
        set_rng_state(state["rng"])
        save_run_config(self.folder, self.config)
        log = MetricsLog(self.folder, state["metrics_offset"], self.config.tensorboard)
        log.write("resume", self.step, steps=self.steps, versions=versions(), machine=machine())
        return log

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self.task.identity(),
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "task": self.task.state(),
            "step": self.step,
            "position": self.position,
            "best": self.best,
            "best_step": self.best_step,
            "elapsed": self._elapsed(),
            "pending": self.pending,
            "rng": rng_state(),
            "metrics_offset": self.log.offset(),
        }

    def _set_learning_rates(self) -> None:
        config = self.config
        shape = {"decay": config.decay, "floor": config.floor, "milestones": config.milestones}
        factor = multiplier(self.step, self.steps, config.schedule, warmup=self.warmup, **shape)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor

    def _look(self) -> tuple[list[float], list[float]]:
        """Losses and gradient norms since the last report; TrainingError at the first that is not finite."""
        values = torch.stack(self.pending).tolist() if self.pending else []
        for index, (loss, norm) in enumerate(values):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                step = self.step - len(values) + index + 1
                position = self.position - (len(values) - index) * self.config.grad_accum
                raise TrainingError(
                    f"{self.folder}: loss {loss}, gradient norm {norm} at step {step} (micro-batch {position}, epoch "
                    f"{position / self.task.batches_per_epoch:.3f}); the checkpoint of step {self.saved_step} is intact"
                )
        return [loss for loss, _ in values], [norm for _, norm in values]

    def _evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        with self._autocast():
            return self.task.evaluate(model, split)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.task.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _elapsed(self) -> float:
        return self.elapsed + time.perf_counter() - self.started

    def _units_per_second(self, steps_per_second: float | None) -> float | None:
        units = self.task.units_per_batch * self.config.grad_accum
        return None if steps_per_second is None else steps_per_second * units

    def _remaining(self, rate: float) -> float:
        return (self.steps - self.step) * self.config.grad_accum * self.task.units_per_batch / rate

    def _mfu(self, rate: float | None) -> float | None:
        peak = peak_flops(self.task.device, self.config.dtype)
        return None if rate is None or peak is None else rate * self.task.flops_per_unit / peak


def total_steps(config: RunConfig, batches_per_epoch: float) -> int:
    """The optimiser steps of a run; epochs are rounded up to whole steps."""
    if config.epochs is None:
        return config.steps or 0
    return math.ceil(config.epochs * batches_per_epoch / config.grad_accum)


def in_steps(config: RunConfig, epochs: float | None, batches_per_epoch: float, otherwise: int) -> int:
    """So many epochs as optimiser steps, at least one; `otherwise` if no epochs are given."""
    if epochs is None:
        return otherwise
    return max(1, round(epochs * batches_per_epoch / config.grad_accum)) if epochs > 0 else 0


def _format(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
