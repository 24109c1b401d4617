"""The training loop: one for every task."""

import math
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from ..kernels.machine import commit, machine, versions
from ..kernels.products import multiplies_halves
from . import parallel
from .checkpoint import CheckpointError, load_state, save_run_config, save_state
from .config import RunConfig
from .data.errors import WorkerError, is_obituary
from .env import peak_flops, peak_memory
from .experts import ExpertLoad
from .log import Meter, MetricsLog, NoLog, ProgressLine, duration
from .optim import build_optimizer, parts
from .plot import try_plot
from .record import Recorded, RecordedUpdate, recordable
from .schedule import in_steps, multiplier, total_steps
from .seeds import rng_state, seed_everything, set_rng_state
from .signals import StopSignals
from .spread import Spread, gathered, load_into, shard_state
from .tasks.base import Task
from .watch import MAX_SKIPS, Buffers, Watch

# Steps between checkpoints, where neither they nor epochs are given.
SAVE_EVERY = 200


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what is saved."""


class Trainer:
    """A run of `task` in `folder`: a new one, or with `config.resume` the one saved there.

    All processes of a run have one. The first one logs and saves; the numbers are those of one process.
    Raises CheckpointError if the saved states are damaged or belong to other data, and ValueError for a `cuda_graph`
    where none can be recorded.
    """

    def __init__(self, task: Task, config: RunConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        if config.cuda_graph and (task.device.type != "cuda" or parallel.size() > 1 or not task.recordable):
            raise ValueError(
                f"cuda_graph is for one process with a GPU and train lm, not for train {task.name} on {task.device} "
                f"with {parallel.size()} processes"
            )
        self.steps = total_steps(config, task.batches_per_epoch)
        self.warmup = in_steps(config, config.warmup_epochs, task.batches_per_epoch, config.warmup)
        self.eval_every = in_steps(config, config.eval_epochs, task.batches_per_epoch, config.eval_every)
        save_every = in_steps(config, config.eval_epochs, task.batches_per_epoch, SAVE_EVERY)
        self.save_every = save_every if config.save_every is None else config.save_every
        peak = peak_flops(task.device, config.dtype)
        # Counted before the model is spread: counting runs it.
        self.flops_per_unit = task.flops_per_unit
        self.peak_units = None if peak is None else peak * parallel.size() / self.flops_per_unit
        self.spread = Spread(task.models(), config.parallel or "none", task.device)
        self.optimizer = build_optimizer(
            task.model,
            config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=config.betas,
            **task.optimizer_options(),
        )
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.model: Any = torch.compile(self.spread.module) if config.compile else self.spread.module
        self._gradients: Callable[[Any], torch.Tensor] = self._backward
        self._update: RecordedUpdate | None = None
        if config.cuda_graph:
            self._gradients = Recorded(self._backward, task.model, accumulate=config.grad_accum > 1)
            # Skipping a step is decided on the host.
            if config.on_nan == "stop" and recordable(self.optimizer):
                self._update = RecordedUpdate(self._clip, self.optimizer)
        self.experts = ExpertLoad(task.model)
        self.meter, self.line = Meter(), ProgressLine(silent=not parallel.is_main())
        self.watch, self.agreement = Watch(config.on_nan), parallel.Agreement()
        self.step = self.position = self.saved_step = 0
        self.best, self.best_step, self.elapsed, self.peak = math.inf, 0, 0.0, 0
        self.started = time.perf_counter()
        self.log = self._resume() if config.resume else self._start()
        self.stream: Iterator[Any] = task.batches(self.position)

    def run(self) -> int:
        """Train to the end, or to SIGINT or SIGTERM; the exit code of the process.

        Raises TrainingError for a loss that is not finite, a full disk, a data worker or another process that has died:
        the last checkpoint is intact then.
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
                    stop = self.agreement(signals.received)
                    if stop and not last:
                        return self.interrupt(stop)
            return self.finish()
        except (OSError, WorkerError) as error:
            raise self._stopped_by(error) from error
        except RuntimeError as error:
            if is_obituary(error):
                raise self._stopped_by(WorkerError.of(error)) from error
            if parallel.size() == 1 or isinstance(error, TrainingError) or not parallel.is_lost_peer(error):
                raise
            reason = f"another process of the run is gone, its own message says why; at step {self.step}"
            raise TrainingError(f"{self.folder}: {reason}; {self._advice()}") from error
        finally:
            self.log.close()

    def _stopped_by(self, error: OSError | WorkerError) -> TrainingError:
        reason = getattr(error, "strerror", None) or str(error)
        return TrainingError(f"{self.folder}: {reason} at step {self.step}; {self._advice()}")

    def advance(self) -> None:
        """One optimiser step."""
        config = self.config
        self._set_learning_rates()
        buffers = Buffers(self.task.model) if config.on_nan == "skip" else None
        total = torch.zeros((), device=self.task.device)
        batches = self.task.step_batches(self.stream, config.grad_accum)
        for index in range(config.grad_accum):
            with self.spread.backward_of(last=index == config.grad_accum - 1):
                total += self._gradients(next(batches))
        norm = self._clip() if self._update is None else self._update()
        bad = self.watch.skips(total, norm)
        if bad is None:
            if self._update is None:
                self.optimizer.step()
            self.spread.after_step()
            self.task.after_step()
            self.watch.add(total, norm)
        elif buffers is not None:
            buffers.restore()
        if not config.cuda_graph:
            self.optimizer.zero_grad(set_to_none=True)
        elif config.grad_accum > 1:
            self.optimizer.zero_grad(set_to_none=False)
        self.step, self.position = self.step + 1, self.position + config.grad_accum
        self.meter.step()
        if bad is not None:
            self._skipped(*bad)

    def _clip(self) -> torch.Tensor:
        return self.spread.clip(self.config.clip or math.inf)

    def _backward(self, batch: Any) -> torch.Tensor:
        """A micro-batch's share of the step's loss; its gradients are added to the parameters'."""
        with self._autocast():
            loss = self.task.loss(self.model, batch) / self.config.grad_accum
        loss.backward()
        return loss.detach()

    def report(self) -> None:
        """Write what happened since the last report: the mean loss, and the last step's gradient norm."""
        seen = self._look()
        self.meter.pause()
        rate = self._units_per_second(self.meter.take())
        # All steps may have been skipped.
        loss, norm = (sum(loss for loss, _ in seen) / len(seen), seen[-1][1]) if seen else (None, None)
        lr, epoch = self.optimizer.param_groups[0]["lr"], self.position / self.task.batches_per_epoch
        values = {"loss": loss, "lr": lr, "grad_norm": norm, "epoch": epoch, f"{self.task.unit}_per_s": rate}
        mfu = None if rate is None or self.peak_units is None else rate / self.peak_units
        counted = {**self.experts.take(), **self.task.train_metrics()}
        if self.config.on_nan == "skip":
            counted["skipped_steps"] = self.watch.skipped
        self.watch.clear()
        self.log.write("train", self.step, **values, **counted, mfu=mfu, elapsed_s=self._elapsed())
        speed = "" if rate is None else f"  {rate:,.0f} {self.task.unit}/s  ETA {duration(self._remaining(rate))}"
        share = "" if mfu is None else f"  MFU {mfu:.1%}"
        mean = "-" if loss is None else f"{loss:.4f}"
        self.line.update(f"step {self.step}/{self.steps}  loss {mean}  lr {lr:.2e}{speed}{share}")
        self.meter.go_on()

    def validate(self) -> None:
        """Evaluate on the validation split, and keep the model if it is the best so far."""
        self._look()
        self.meter.pause()
        metrics = self._evaluate(self.task.eval_model, "valid")
        better = metrics[self.task.metric] < self.best
        if better:
            self.best, self.best_step = metrics[self.task.metric], self.step
            self._save_model()
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
        if parallel.is_main():
            try_plot(self.folder)
        return 128 + number

    def finish(self) -> int:
        """Judge the best model on the test split, show samples and curves."""
        self.agreement.settle()
        parallel.barrier()  # the first process has written it
        best = self.task.best_model(self.folder)
        metrics = self._evaluate(best, "test")
        self.log.write("test", self.best_step, **metrics)
        self.line.say(f"test, best checkpoint (step {self.best_step}): {_format(metrics)}")
        if not parallel.is_main():
            return 0
        self.task.write_results(self.folder)
        samples = self.task.samples(best, self.config.samples, self.config.seed)
        for sample in samples:
            self.line.say(f"--- sample ---\n{sample}")
        rate = self._units_per_second(self.meter.average())
        ending = {"elapsed_s": self._elapsed(), f"{self.task.unit}_per_s": rate, "samples": samples}
        cost = {"peak_bytes": self._peak(), "flops_per_unit": self.flops_per_unit}
        self.log.write("end", self.step, **ending, **cost, best_step=self.best_step)
        self.line.say(f"run: {self.folder}  ({duration(self._elapsed())}; {try_plot(self.folder)})")
        return 0

    def resume_command(self) -> str:
        """What continues this run."""
        program = "python" if parallel.size() == 1 else f"torchrun --nproc-per-node {parallel.size()}"
        return f"continue with: {program} -m grassland.train {self.task.name} --resume {self.folder}"

    def _advice(self) -> str:
        return f"the checkpoint of step {self.saved_step} is intact: {self.resume_command()}"

    def _start(self) -> MetricsLog:
        log = self._open_log(0)
        facts = {"task": self.task.name, "steps": self.steps, **self.task.describe()}
        log.write("start", 0, **facts, **_origin(), config=self.config.to_dict())
        self.log = log
        if (epoch := self.task.batches_per_epoch) < 1:
            size, rows = self.config.batch_size, round(epoch * self.config.batch_size)
            self.line.say(f"batch_size {size} is more than the {rows} rows of training data: a batch repeats some")
        if self.config.dtype == "bf16" and self.task.device.type == "cpu" and not multiplies_halves():
            self.line.say("dtype bf16 is for processors with AVX512_BF16, which this one lacks: float32 is faster here")
        # From here on there is always a model to load and a state to resume, and a full disk shows at once.
        self._save_model()
        self.save()
        return log

    def _open_log(self, offset: int) -> MetricsLog:
        """The log from `offset` on, in the first process, without what an earlier process died in the middle of."""
        if not parallel.is_main():
            return NoLog()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        return MetricsLog(self.folder, offset, self.config.tensorboard)

    def _save_model(self) -> None:
        with gathered(self.task.eval_model):
            if parallel.is_main():
                self.task.save(self.folder, self.config)

    def _resume(self) -> MetricsLog:
        state = load_state(self.folder, self.spread.mesh)
        if state["identity"] != self.task.identity():
            now = self.task.identity()
            raise CheckpointError(f"{self.folder}: saved for the data {state['identity']}, but now it is {now}")
        load_into(self.task.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        shard_state(parts(self.optimizer))
        self.step, self.position = state["step"], state["position"]
        self.best, self.best_step, self.elapsed = state["best"], state["best_step"], state["elapsed"]
        self.watch.load_state(state["watch"])
        self.saved_step = self.step
        self.task.load_state(state["task"])
        self.experts.load_state(state["experts"])
        # Older states do not say.
        self.meter.total, self.peak = state.get("meter", [0, 0.0]), state.get("peak_bytes", 0)
        log = self.log = self._open_log(state["metrics_offset"])
        log.write("resume", self.step, steps=self.steps, **_origin())
        if self.step > self.steps:
            self.line.say(f"the run has made {self.step} steps, more than {self.steps}: it is judged, not trained on")
        self._check_model()
        self._set_rng(state["rng"])  # last: building a model draws numbers
        return log

    def _set_rng(self, states: list[Any]) -> None:
        """Each process goes on with its own random numbers; another number of processes with fresh ones."""
        if len(states) == parallel.size():
            set_rng_state(states[parallel.rank()])
        else:
            seed_everything(self.config.seed, self.step, parallel.rank())

    def _check_model(self) -> None:
        """See that the best model so far can be read, and put the present one in its place if not."""
        try:
            self.task.best_model(self.folder)
            if parallel.is_main():
                save_run_config(self.folder, self.config)
            problem = None
        except CheckpointError as error:
            problem = str(error)
        problem = parallel.from_main(lambda: problem)
        if problem is not None:
            self.line.say(f"{problem}; the model of step {self.step} takes its place")
            self.best = math.inf
            self._save_model()

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self.task.identity(),
            "run": self.config.to_dict(),
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "task": self.task.state(),
            "experts": self.experts.state(),
            "step": self.step,
            "position": self.position,
            "best": self.best,
            "best_step": self.best_step,
            "elapsed": self._elapsed(),
            "watch": self.watch.state(),
            "meter": self.meter.total,
            "peak_bytes": self._peak(),
            "rng": parallel.gather(rng_state()),
            "metrics_offset": self.log.offset(),
        }

    def _set_learning_rates(self) -> None:
        config = self.config
        shape = {"decay": config.decay, "floor": config.floor, "milestones": config.milestones}
        factor = multiplier(self.step, self.steps, config.schedule, warmup=self.warmup, **shape)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor

    def _look(self) -> list[tuple[float, float]]:
        """Losses and gradient norms since the last report; TrainingError at the first that is not finite."""
        seen = self.watch.look()
        for index, (loss, norm) in enumerate(seen):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                behind = len(seen) - index
                position = self.position - behind * self.config.grad_accum
                where = self._place("nan", self.step - behind + 1, position, loss, norm)
                raise TrainingError(f"{where}; {self._advice()} --on-nan skip, which leaves out such steps")
        return seen

    def _skipped(self, loss: float, norm: float) -> None:
        """Say which data a step without effect has seen; TrainingError if there have been too many in a row."""
        where = self._place("skip", self.step, self.position - self.config.grad_accum, loss, norm)
        self.line.say(f"{where}: skipped")
        if self.watch.in_a_row == MAX_SKIPS:
            skipped = f"{where}, and {MAX_SKIPS} steps in a row skipped"
            raise TrainingError(f"{skipped}; {self._advice()}; else try a lower --lr")

    def _place(self, event: str, step: int, position: int, loss: float, norm: float) -> str:
        """Log where the numbers are not finite; the same as a message."""
        epoch = position / self.task.batches_per_epoch
        # As text: NaN is no JSON.
        self.log.write(event, step, position=position, epoch=epoch, loss=str(loss), grad_norm=str(norm))
        place = f"step {step} (micro-batch {position}, epoch {epoch:.3f})"
        return f"{self.folder}: loss {loss}, gradient norm {norm} at {place}"

    def _evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        with self._autocast():
            return self.task.evaluate(model, split)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.task.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _elapsed(self) -> float:
        return self.elapsed + time.perf_counter() - self.started

    def _peak(self) -> int:
        return max(self.peak, peak_memory(self.task.device))

    def _units_per_second(self, steps_per_second: float | None) -> float | None:
        units = self.task.units_per_batch * self.config.grad_accum
        return None if steps_per_second is None else steps_per_second * units

    def _remaining(self, rate: float) -> float:
        return (self.steps - self.step) * self.config.grad_accum * self.task.units_per_batch / rate


def _origin() -> dict[str, Any]:
    """With which code, where and when a process trains."""
    return {"versions": versions(), "machine": machine(), "commit": commit(), "date": date.today().isoformat()}


def _format(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
