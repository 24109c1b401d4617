"""A trained language model behind EleutherAI's lm-eval, and the evaluation of a run's folder with it."""

import errno
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..archs import atomic_write
from ..archs.registry import unknown
from .data.corpus import encode
from .eval_options import EvalOptions
from .log import to_json
from .sample import generate_text, load_run

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError("lm-eval is not installed: pip install 'grassland[eval]'") from error

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "eval.json"
SAMPLING = ("temperature", "top_k", "top_p")
# lm-eval resamples metrics that have no closed form of the standard error, such as perplexities.
RESAMPLES = 1000
Request = tuple[Any, list[int], list[int]]


class GrasslandLM(TemplateLM):
    """model: of `create_model`. tokenizer: the one it has been trained with; text is encoded as it was in training.

    prefix: a token of the vocabulary before every text; without one the first token of a text is context alone, its
    probability is not counted, and an empty context has no answer. max_len: longest context, the model's own by
    default. ValueError names a bad argument.

    `loglikelihood_rolling` scores disjoint windows of max_len tokens, with one token of context (the last window: with
    what fills it up), so it agrees with `evaluate_text` where windows come out even, and is a little better elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "Tokenizer",
        batch_size: int = 8,
        prefix: str | None = None,
        max_len: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model: Any = model.eval()
        self.vocabulary, self.batch_size, self.seed = tokenizer, batch_size, seed
        own = self.model.config.max_len
        self.max_len = own if max_len is None else max_len
        if not 2 <= self.max_len <= own:
            raise ValueError(f"max_len must be in [2, {own}], got {max_len!r}")
        self.prefix = None if prefix is None else tokenizer.token_to_id(prefix)
        if prefix is not None and self.prefix is None:
            raise ValueError(f"prefix {prefix!r} is not a token of the vocabulary")

    @property
    def eot_token_id(self) -> int:
        if self.prefix is None:
            raise ValueError("a request has an empty context, and the vocabulary no mark for it: give a prefix")
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return f"grassland-{self.vocabulary.get_vocab_size()}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode(self.vocabulary, string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(Σ log p, whether greedy decoding gives it) of continuations given contexts, both as tokens."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # The longest first, so that what does not fit in memory shows at once.
        order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index][1:])))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, answer in zip(batch, self._score([requests[index] for index in batch]), strict=True):
                answers[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return answers

    @torch.no_grad()
    def _score(self, batch: list[Request]) -> Iterator[tuple[float, bool]]:
        rows = [self._fitted(context, continuation) for _, context, continuation in batch]
        # Padding on the right, where a causal model does not see it.
        ids = torch.zeros(len(rows), max(1, *(len(row) - 1 for row in rows)), dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row) - 1] = torch.tensor(row[:-1])
        logits = self.model(ids.to(self._place()))
        for scores, row, (_, _, continuation) in zip(logits, rows, batch, strict=True):
            yield _likelihood(scores[: len(row) - 1], row, len(continuation))

    def _fitted(self, context: list[int], continuation: list[int]) -> list[int]:
        """Both together, the context cut on the left to what the model takes."""
        if len(continuation) > self.max_len:
            wanted = f"at most max_len={self.max_len} tokens"
            raise ValueError(f"a continuation has {len(continuation)} tokens, and must have {wanted}")
        if not context:
            raise ValueError("a continuation needs at least one token of context")
        return [*context, *continuation][-(self.max_len + 1) :]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        totals = [sum(next(scores)[0] for _ in text) for text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> list[Request]:
        tokens = self.tok_encode(text)
        if self.prefix is not None:
            prefix = self.prefix
        elif tokens:
            prefix, *tokens = tokens
        else:
            return []
        windows = utils.get_rolling_token_windows(tokens, prefix, self.max_len, context_len=1)
        return [(None, *utils.make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the stop texts. Options other than until, max_gen_toks, do_sample,
        temperature, top_k and top_p are a ValueError."""
        answers = []
        for request in requests:
            context, options = request.args
            answers.append(self._continue(context, dict(options)))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options))
        stops, tokens = [stop for stop in settings.pop("until") if stop], settings.pop("max_gen_toks")
        sampled = settings.pop("do_sample", False)
        choice: dict[str, Any] = {name: settings.pop(name) for name in SAMPLING if name in settings}
        if settings:
            raise ValueError(f"generation options {', '.join(settings)} are not supported; {', '.join(SAMPLING)} are")
        if not sampled:
            choice = {"temperature": 0.0}
        text = ""
        pieces = generate_text(self.model, self.vocabulary, context, tokens=tokens, seed=self.seed, **choice)
        for piece in pieces:
            text += piece
            if any(stop in text for stop in stops):
                break
        # The model is back in its mode only when the generator is done.
        pieces.close()  # type: ignore[attr-defined]
        return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]

    def _place(self) -> torch.device:
        return next(self.model.parameters()).device


def evaluate_run(options: EvalOptions, device: torch.device) -> dict[str, Any]:
    """lm-eval's results of the model in a run's folder, written as JSON, too.

    Raises ValueError for unknown tasks, and FileNotFoundError or CheckpointError for what is missing or damaged; before
    anything is evaluated OSError if the JSON cannot be written.
    """
    if not options.tasks:
        raise ValueError("--tasks: name at least one task")
    manager = _manager(options)
    model, tokenizer = load_run(options.folder, device)
    target = options.out or options.folder / FILE
    _check_target(target)  # an evaluation may take hours
    seeds = {f"{kind}_seed": options.seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    evaluate: Any = simple_evaluate  # its decorator hides the signature
    found = evaluate(
        GrasslandLM(model, tokenizer, options.batch_size, options.prefix, seed=options.seed),
        tasks=list(options.tasks),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
        task_manager=manager,
        **seeds,
    )
    results = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
    results = json.loads(json.dumps({"folder": str(options.folder), **results}, default=_plain))
    atomic_write(target, (to_json(results, indent=2) + "\n").encode())
    return results


def table(results: dict[str, Any]) -> str:
    """The metrics of `evaluate_run`, one a line."""
    lines = []
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            spread = f" ± {error:.4g}" if isinstance(error, float) else ""
            lines.append(f"{task}  {metric}{'' if filtered == 'none' else f' ({filtered})'}  {value:.6g}{spread}")
    return "\n".join(lines)


def _check_target(path: Path) -> None:
    """OSError that names what is in the way if the file cannot be written; its folder is made."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not the file to write", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _manager(options: EvalOptions) -> TaskManager:
    path = options.include_path
    if path is not None and not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    # Reading lm-eval's own thousands of tasks takes seconds.
    if path is not None:
        local = TaskManager(include_path=str(path), include_defaults=False)
        if set(options.tasks) <= set(local.all_tasks):
            return local
    manager = TaskManager(include_path=None if path is None else str(path))
    for name in options.tasks:
        if name not in manager.all_tasks:
            raise unknown("task", name, manager.all_tasks)
    return manager


def _likelihood(logits: Tensor, row: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` tokens of `row`, from the logits (len(row) − 1, V) of all but the first."""
    if count == 0:
        return 0.0, True
    targets = torch.tensor(row[-count:], device=logits.device)
    log_p = logits[-count:].float().log_softmax(-1)
    chosen = log_p.gather(-1, targets[:, None])
    return float(chosen.double().sum()), bool((log_p.argmax(-1) == targets).all())


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
