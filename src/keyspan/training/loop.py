"""The training loop: from a configuration to a run folder.

RUN/config.json       the configuration
RUN/metrics.jsonl     one line a step, and one an evaluation
RUN/checkpoints/      see `keyspan.training.checkpoint`
RUN/loss.png          the curves
RUN/result.json       the last evaluation
RUN/.lock             locked by the process that trains here
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from keyspan import Alibi, Causal
from keyspan.core.checks import as_path, check_type
from keyspan.files import locked, write_file
from keyspan.info import explain, find_device
from keyspan.models.gpt import GPT, GPTConfig
from keyspan.training import checkpoint
from keyspan.training.checkpoint import Progress
from keyspan.training.config import FIXED, TrainConfig, sources
from keyspan.training.data import StandardLibrary
from keyspan.training.evaluate import evaluate
from keyspan.training.graph import CapturedStep, check_capture
from keyspan.training.guard import IN_A_ROW, Guard
from keyspan.training.packing import Batch, pinned, to_device
from keyspan.training.ranks import ALONE, Ranks, check_model, connected, is_cut, setting
from keyspan.training.report import (
    Report,
    in_words,
    peak_memory,
    peak_rate,
    plot,
    prepare_with_bar,
    read_metrics,
    step_flops,
)
from keyspan.training.sharded import Saver
from keyspan.training.tasks import SyntheticTask

if TYPE_CHECKING:
    from keyspan.training.corpus import Corpus
    from keyspan.training.mixture import Mixture

Task: TypeAlias = "SyntheticTask | StandardLibrary | Corpus | Mixture"
READ_EVERY = {"cpu": 1}
"""By type of device, 10 for others: steps between readings of loss and norm, which wait for the device."""
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a run after the step in hand, with a checkpoint."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run: str
    """Its folder."""
    step: int
    """Optimizer steps taken."""
    seconds: float
    """Time spent on steps, over all resumptions."""
    interrupted: bool
    """Whether Ctrl-C ended it."""
    metric: str
    """What `held_out` is: exact_match (a share) or bits_per_byte."""
    held_out: float | None
    """The figure on all held-out data after the last step; None for an interrupted run."""
    baselines: dict[str, float]
    """The same figure of simpler models."""


def make_task(config: TrainConfig, quiet: bool = True) -> Task:
    """The task of a configuration: its data and its alphabet. Unless `quiet`, a bar shows how text is prepared."""
    if config.task == "stdlib":
        return StandardLibrary(config.max_length)
    if config.data:
        from keyspan.training.corpus import Corpus
        from keyspan.training.mixture import Mixture

        folders, weights = zip(*sources(config.data), strict=True)
        corpora = [Corpus(_prepared(path, quiet), config.max_length, config.max_documents) for path in folders]
        return corpora[0] if len(corpora) == 1 else Mixture(corpora, weights)
    return SyntheticTask(config.task, config.max_length)


def _prepared(data: Path, quiet: bool) -> Path:
    """The folder of `keyspan prepare`; text is prepared first, beside itself."""
    if (data / "index.json").is_file():
        return data
    if not data.exists():
        raise ValueError(f"data: {data} is not there, want a folder of keyspan prepare, or text")
    from keyspan.training.prepare import Prepare

    return prepare_with_bar(Prepare((data,), data.with_name(f"{data.name}.prepared"), held_out=0.05), quiet)


def make_model(config: TrainConfig, vocab_size: int) -> GPT:
    """The model of a configuration, with weights drawn from torch's global generator, on the CPU."""
    sizes = GPTConfig(
        vocab_size=vocab_size,
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads or 0,
        hidden=config.hidden or 0,
        positions=config.positions,
        rope_theta=config.rope_theta,
        tie_embeddings=config.tie_embeddings,
        embedding_std=config.embedding_std,
        dropout=config.dropout,
    )
    return GPT(sizes, backend=config.backend, invariant=config.invariant)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only: a decayed gain or bias would be pulled from its neutral value for nothing."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """The loss scale for fp16, whose small gradients would vanish; a no-op for the other precisions."""
    return torch.amp.GradScaler(device=device.type, enabled=config.precision == "fp16")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, …: a line up to `lr` over `warmup` steps, then half a cosine down to `lr * lr_end`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.lr_end + (1 - config.lr_end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def train_batches(
    task: Task, config: TrainConfig, step: int, ranks: Ranks = ALONE, first: int | None = None
) -> list[Batch]:
    """A rank's micro-batches of a step; the ranks share out those of one.

    Args:
        first: number of the step's first micro-batch; by default that of a run whose accumulation never changed.
    """
    first = step * config.accumulation if first is None else first
    own = range(ranks.data_rank, config.accumulation, ranks.data)
    return [task.train_batch(config.seed, first + i, config.tokens) for i in own]


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The precision of a configuration as a context manager."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=config.precision != "fp32")


def take_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    config: TrainConfig,
    loss_of: Callable[..., Tensor] | None = None,
    ranks: Ranks = ALONE,
    guard: Guard | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on micro-batches, weighted so that it is the step of one batch that holds them all.

    Returns the loss (mean nats per scored token) and the gradient's norm before clipping, both still on the device:
    nothing waits for it, except with fp16. Where one of them is not finite, AdamW's fused kernel leaves the weights as
    they are, in this step and in all later ones of this optimizer; `check_finite` then says why. Both are those of all
    ranks, so that all decide alike.

    Args:
        optimizer: a fused one, such as `make_optimizer` makes.
        batches: of this rank.
        loss_of: what computes the loss, such as a compiled `model.loss`, which then gets lengths as a tensor; of
            several ranks, what `ranks.wrap` returned.
        guard: judges in its way whether the step is taken.
    """
    device = next(model.parameters()).device
    parts = [ranks.part(batch) for batch in batches]
    scored = [part.scored() for part, _ in parts]
    total: Any = sum(scored)
    if ranks.world > 1:
        total = ranks.sum(to_device(torch.tensor(float(total)), device))
    elif not total:
        raise ValueError("batches: got no scored target, want at least one in a step")
    losses = []
    for index, ((part, context), share) in enumerate(zip(parts, scored, strict=True)):
        if not share and ranks.world == 1:
            continue  # its mean loss is 0 / 0
        tokens, targets, lengths, _ = part.to(device)
        with autocast(config, device), ranks.synchronised(loss_of, index == len(parts) - 1):
            # As a tensor, lengths are data to the compiler. On the host, the choice of kernels reads them; DDP would
            # wait for its own copy.
            as_list = (loss_of is None and device.type == "cpu") or context is not None
            place = pinned if ranks.world == 1 else to_device
            given = lengths if as_list else place(torch.tensor(lengths), device)
            further = () if context is None else (context,)
            # DDP and FSDP give the mean of the gradients of such ranks, so each loss counts as often as there are any.
            loss = (loss_of or model.loss)(tokens, targets, given, *further) * (share * ranks.shared / total)
            scaler.scale(loss).backward()
        losses.append(loss.detach() if share else torch.zeros_like(loss))
    mean = ranks.sum(torch.stack(losses).sum()) / ranks.shared
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if is_cut(norm):
        norm = norm.full_tensor()  # type: ignore[attr-defined]
    overflows = scaler.is_enabled() and scaler.get_scale() > 1
    if guard is not None:
        optimizer.found_inf = guard.judge(mean, None if overflows else norm)  # type: ignore[attr-defined]
        if scaler.is_enabled() and guard.refused:  # the scaler has a found_inf of its own
            optimizer.zero_grad()
            scaler.update()
            return mean, norm
    elif scaler.is_enabled():
        check_finite(float(mean), float(norm), config, scaler)
    else:
        bad = (~(mean.isfinite() & norm.isfinite())).float()
        before = getattr(optimizer, "found_inf", None)
        # What GradScaler sets for a fused optimizer: the kernel skips the step where it is 1.
        optimizer.found_inf = bad if before is None else torch.maximum(before, bad)  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return mean, norm


def check_finite(loss: float, norm: float, config: TrainConfig, scaler: torch.amp.GradScaler) -> None:
    """FloatingPointError for a loss or norm that is not finite.

    With fp16 an infinite norm is how the scaler finds its scale: it skips the step and halves it. At a scale of 1 it is
    no overflow.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}; try a lower lr or clip" + _fp16_advice(config))
    if not math.isfinite(norm) and not (scaler.is_enabled() and scaler.get_scale() > 1):
        raise FloatingPointError(f"the gradient's norm is {norm}; try a lower lr" + _fp16_advice(config))


def _fp16_advice(config: TrainConfig) -> str:
    return ", or bf16, whose range is that of fp32" if config.precision == "fp16" else ""


def train(config: TrainConfig, *, quiet: bool = False) -> Result:
    """Train as configured (or go on with `config.resume`) and return how it ended; seeds torch's global generator.

    Ctrl-C (or SIGTERM, or SIGHUP) ends the run after the step in hand, with a checkpoint; a second one ends it at once.

    Raises:
        ValueError: for bad options, options that contradict the run to resume, damaged checkpoints, and a folder that
            another process trains in.
        NotImplementedError: where `config.backend` cannot compute the model's attention, or with `invariant` none can.
        FloatingPointError: for a loss or gradient that is not finite, and a loss that jumps; see `on_spike`.
    """
    check_type("config", config, TrainConfig)
    extras = ("matplotlib", "rich", "safetensors", *(("tensorboard",) if config.tensorboard else ()))
    for extra in extras:  # better missed now than when the work is done
        import_module(extra)
    with connected(config) as ranks:
        config = _restarted(config)
        changes = ranks.agree(lambda: _changes(config))
        device = ranks.device or find_device(config.device)
        torch.manual_seed(config.seed)
        ranks.agree(lambda: make_task(config, quiet) is None)  # the first rank prepares data that is not prepared
        task = make_task(config)
        model = make_model(config, task.vocab_size).to(device)
        _check_kernels(model, config, device)
        check_model(model, ranks.tensor)
        if config.cuda_graph:
            check_capture(config, device, ranks.world)
        with _run_folder(config, ranks) as run:
            objective = ranks.wrap(model, config)
            optimizer = make_optimizer(model, config)
            scaler = make_scaler(config, device)
            parts = _Parts(task, model, objective, optimizer, scaler, ranks)
            start = Progress(0, 0.0)
            if checkpoint.exists(run):
                folder = checkpoint.latest(run)
                with checkpoint.naming_older(run):
                    ranks.agree(lambda: checkpoint.verify(folder))
                    start = checkpoint.load(folder, model, optimizer, scaler, verified=True)
            if start.data is not None and not isinstance(task, (SyntheticTask, StandardLibrary)):
                task.seek(start.data, config.seed, config.tokens)
            if config.steps < start.step:
                raise ValueError(
                    f"steps: got {config.steps}, but {run} is at step {start.step}; want at least that many"
                )
            if ranks.first:
                write_file(run / "config.json", replace(config, out=None, resume=None).to_json().encode())
            return _run(config, run, start, parts, changes, quiet or not ranks.first)


class _Parts(NamedTuple):
    """What a run works with."""

    task: Task
    model: GPT
    objective: nn.Module
    """The model's loss, as `Ranks.wrap` made it."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ranks: Ranks


class _Pending(NamedTuple):
    """A step whose loss and norm are still on the device."""

    step: int
    lr: float
    tokens: int
    flops: float
    loss: Tensor
    norm: Tensor
    refused: Tensor
    limit: Tensor
    names: list[Callable[[], list[str]]]
    """Of the documents of its micro-batches."""


def _run(
    config: TrainConfig,
    run: Path,
    start: Progress,
    parts: _Parts,
    changes: list[str],
    quiet: bool,
) -> Result:
    """All steps from `start` on, evaluations and checkpoints included."""
    task, model, objective, optimizer, scaler, ranks = parts
    device = next(model.parameters()).device
    step, seconds = start.step, start.seconds
    board = config.tensorboard and ranks.first
    record = Report(run, step, config.steps, quiet=quiet, record=ranks.first, tensorboard=board)
    recent = ranks.agree(lambda: [r["loss"] for r in read_metrics(run) if "loss" in r and r["step"] <= step])
    guard = Guard(config, device, recent)
    with _interruption() as interrupted, record as report, Saver(run, ranks, step) as saver:

        def held_out(limit: int | None) -> float:
            batches = task.held_out(config.tokens, limit)
            with autocast(config, device):
                result = evaluate(model, batches, task.bytes_per_token, ranks, objective if ranks.world > 1 else None)
            value: float = getattr(result, task.metric)
            share = "all of" if limit is None else "a part of"
            text = f"{task.metric.replace('_', ' ')} {value:.4f}, loss {result.loss:.4f} on {share} the held-out data"
            report.held_out(step, text, **{task.metric: value}, held_out_loss=result.loss, seconds=seconds)
            return value

        report.say(f"{config.task}: {model.num_parameters():,} parameters, {config.precision} on {device}, in {run}")
        for change in changes:
            report.say(change)
        final = None
        stopping = False
        loss_of = torch.compile(model.loss, fullgraph=True) if config.compile else None
        if ranks.world > 1:
            loss_of = objective
        captured = CapturedStep(model, optimizer, config, loss_of) if config.cuda_graph else None
        pending: list[_Pending] = []
        in_a_row = 0  # steps refused
        rate = peak_rate(device, config.precision)
        began = time.perf_counter()

        def first_of(step: int) -> int:
            """Number of a step's first micro-batch; the run may have had another accumulation before."""
            return start.batches + (step - start.step) * config.accumulation

        def batches_of(step: int) -> list[Batch]:
            return train_batches(task, config, step, ranks, first_of(step))

        def progress() -> Progress:
            data = None
            if not isinstance(task, (SyntheticTask, StandardLibrary)):
                data = task.position(config.seed, first_of(step), config.tokens)
            return Progress(step, seconds, first_of(step), data)

        def stopped(step: int, error: FloatingPointError) -> FloatingPointError:
            saver.wait()
            return FloatingPointError(f"step {step}: {error}; {run} holds the run up to step {saver.saved}")

        def wrong(loss: float, norm: float, refused: float, limit: float) -> str | None:
            """Why a step was not taken."""
            try:
                check_finite(loss, norm, config, scaler)
            except FloatingPointError as error:
                return str(error)
            return guard.words(loss, limit) if refused else None

        def read_pending() -> None:
            """Wait for the device; check and record the steps since the last call."""
            nonlocal seconds, began, in_a_row
            figures_of = [(done.loss, done.norm, done.refused, done.limit) for done in pending]
            numbers = torch.stack([x.float() for of in figures_of for x in of]).double().view(-1, 4).tolist()
            elapsed = (time.perf_counter() - began) / len(pending)
            for done, (loss, norm, refused, limit) in zip(pending, numbers, strict=True):
                reason = wrong(loss, norm, refused, limit)
                in_a_row = 0 if reason is None else in_a_row + 1
                if reason is not None:
                    names = ranks.gather([name for make in done.names for name in make()])
                    report.refused(done.step, reason, names)
                    if config.on_spike == "stop" or in_a_row == IN_A_ROW:
                        times = f"; {in_a_row} steps in a row were skipped" if in_a_row > 1 else ""
                        raise stopped(done.step, FloatingPointError(reason + in_words(names) + times))
                    continue
                seconds += elapsed
                figures = {"loss": loss, "lr": done.lr, "grad_norm": norm, "tokens": done.tokens}
                figures["tokens_per_second"] = done.tokens / elapsed
                figures["filled"] = done.tokens / (config.tokens * config.accumulation)
                if rate:
                    figures["mfu"] = done.flops / elapsed / rate
                report.step(done.step, **figures, seconds=seconds, **peak_memory(device))
            pending.clear()
            began = time.perf_counter()

        with ThreadPoolExecutor(1) as pool:  # makes the next step's batches while the device computes
            ahead = pool.submit(batches_of, step)
            while step < config.steps and final is None and not stopping:
                batches = ahead.result()
                ahead = pool.submit(batches_of, step + 1)
                ranks.seed(config.seed, step)
                lr = learning_rate(config, step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                try:
                    if captured is not None:
                        found = captured(batches, lr)
                    else:
                        found = take_step(model, optimizer, scaler, batches, config, loss_of, ranks, guard)
                except FloatingPointError as error:
                    raise stopped(step + 1, error) from None
                step += 1
                tokens = sum(len(batch.tokens) for batch in batches)
                flops = step_flops(model, batches) / (ranks.context * ranks.tensor) if rate else 0.0
                names = [batch.names for batch in batches]
                judged = guard.refused, guard.limit
                pending.append(_Pending(step, lr, tokens * ranks.data, flops, *found, *judged, names))
                evaluates = step % config.eval_every == 0 and step < config.steps
                saves = step % config.checkpoint_every == 0
                stopping = ranks.world == 1 and interrupted.is_set()
                if len(pending) >= READ_EVERY.get(device.type, 10) or evaluates or saves:
                    read_pending()
                    stopping = ranks.any(interrupted.is_set())
                if evaluates:
                    share = held_out(config.eval_tokens)
                    if config.stop_at is not None and share >= config.stop_at:
                        share = held_out(None)
                        final = share if share >= config.stop_at else None
                if saves:
                    saver.save(progress(), model, optimizer, scaler)
                if evaluates or saves:
                    began = time.perf_counter()
            if pending:
                read_pending()
        if saver.begun < step:
            saver.save(progress(), model, optimizer, scaler)
        if final is None and not stopping:
            final = held_out(None)
    baselines = task.baselines() if ranks.first else {}
    result = Result(str(run), step, seconds, final is None, task.metric, final, baselines)
    if ranks.first:
        write_file(run / "result.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
        plot(run, task.metric, result.baselines, task.bytes_per_token)
    return result


def load_run(run: Path | str, device: str = "auto") -> tuple[TrainConfig, Task, GPT]:
    """The configuration, the task and the trained model of a run folder, to evaluate or to generate.

    The model is not `invariant`, whatever the run was; set it where results are to be. With rotary positions its
    `max_positions` are the tokens of the longest text of the training.
    """
    run = as_path("run", run)
    if (run / "config.json").is_file():
        checkpoint.latest(run)  # refuses a model's folder, whose config.json is of another kind
    config = read_config(run)
    task = make_task(config)
    model = make_model(replace(config, invariant=False), task.vocab_size)
    with checkpoint.naming_older(run):
        checkpoint.load_model(checkpoint.latest(run), model)
    if config.positions == "rope":
        longest = task.longest if isinstance(task, SyntheticTask) else config.max_length
        model.config = replace(model.config, max_positions=longest)
    return config, task, model.to(find_device(device)).eval()


def read_config(run: Path) -> TrainConfig:
    """The configuration of a run folder."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{run}: holds no config.json; want the folder of a training run")
    return TrainConfig.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))


def _check_kernels(model: GPT, config: TrainConfig, device: torch.device) -> None:
    """Refuse a backend that cannot compute the model's attention here, and invariant products where none are, before
    anything is written."""
    sizes = model.config
    query, key = (torch.empty(1, 1, n, sizes.head_dim, device=device) for n in (sizes.heads, sizes.kv_heads or 1))
    bias = Alibi(model.slopes) if sizes.positions == "alibi" else None
    with autocast(config, device):
        explain(
            query, key, key, mask=Causal(), bias=bias, dropout_p=config.dropout, backend=config.backend,
            invariant=config.invariant,
        )  # fmt: skip
        if config.invariant:
            with torch.no_grad():
                model.logits(torch.zeros(1, sizes.dim, device=device))


def _changes(config: TrainConfig) -> list[str]:
    """What a resumed run does otherwise than before, in words; ValueError where it contradicts the run."""
    if config.resume is None:
        return []
    changes = read_config(config.resume).changes(config)
    for name in FIXED:
        if name in changes:
            before, now = changes[name]
            raise ValueError(f"{name}: got {now}, but {config.resume} was begun with {before}; want that, or a new run")
    return [f"changed: {name} from {before} to {now}" for name, (before, now) in changes.items()]


def _restarted(config: TrainConfig) -> TrainConfig:
    """The configuration, to go on with the run that torchrun has started again."""
    again = setting("TORCHELASTIC_RESTART_COUNT", 0) > 0
    return replace(config, resume=config.out) if again and config.out and checkpoint.exists(config.out) else config


@contextmanager
def _run_folder(config: TrainConfig, ranks: Ranks) -> Iterator[Path]:
    """The folder of this run, which the first rank has locked."""
    with ExitStack() as stack:
        yield ranks.agree(lambda: stack.enter_context(_locked_folder(config)))


@contextmanager
def _locked_folder(config: TrainConfig) -> Iterator[Path]:
    """Where this run goes, locked: the folder that is resumed, the one asked for, or the first free of runs/TASK,
    runs/TASK-2, …

    A folder without a checkpoint, of a run that was killed before its first, may be used again.
    """
    if config.resume is not None and config.out not in (None, config.resume):
        raise ValueError(f"out: got {config.out}, want none, or the folder that is resumed, {config.resume}")
    run = config.resume or config.out
    if run is None:
        first = Path("runs") / config.task
        for n in count(1):
            run = first if n == 1 else Path(f"{first}-{n}")
            with suppress(FileExistsError):
                run.mkdir(parents=True)
                break
    assert run is not None
    run.mkdir(parents=True, exist_ok=True)
    with locked(run, "trains in this folder"):
        if config.resume is None and checkpoint.exists(run):
            raise ValueError(f"out: {run} holds a run already; want a new folder, or resume to go on with that run")
        yield run


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that is set by the first Ctrl-C, SIGTERM or SIGHUP; the second one does what it did before."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may listen to signals
        yield event
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupt(number: int, frame: FrameType | None) -> None:
        event.set()
        restore()

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield event
    finally:
        restore()
