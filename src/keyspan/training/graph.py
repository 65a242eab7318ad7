"""A training step as CUDA graphs, for small models and batches: the GPU then does not wait for Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from keyspan.core.checks import check_type
from keyspan.models.gpt import GPT
from keyspan.training.config import TrainConfig
from keyspan.training.packing import IGNORE, Batch, to_device


def check_capture(config: TrainConfig, device: torch.device, ranks: int = 1) -> None:
    """Raise ValueError where a step cannot be captured, see `CapturedStep`."""
    for wrong, got, want in (
        (device.type != "cuda", f"device {device.type}", "cuda, whose graphs these are"),
        (config.precision == "fp16", "precision fp16", "bf16 or fp32: the host reads the scale of an fp16 loss"),
        (config.dropout > 0, f"dropout {config.dropout}", "0: a graph would repeat its seed"),
        (ranks > 1, f"{ranks} ranks", "one process: gradients of several are not summed in a graph"),
    ):
        if wrong:
            raise ValueError(f"cuda_graph: got {got}, want {want}")


class CapturedStep:
    """`take_step` as two CUDA graphs: loss and gradients of a micro-batch, then clipping and the optimizer.

    A graph replays the same kernels on the same memory, so each batch is copied into tensors of one size: `tokens` of
    them, the rest being one more document whose targets do not count. The graphs are captured by the first call.

    Args:
        model: on a CUDA device; its gradients are kept in place from now on.
        optimizer: a fused AdamW; it works on captured learning rates from now on, not on those of its groups.
        config: gives precision, clip and the most tokens of a batch.
        loss_of: what computes the loss, such as a compiled `model.loss`; None for `model.loss`.

    Raises:
        ValueError: without CUDA, with fp16 (whose loss scale is read by the host) and with dropout (whose seed a graph
            would repeat).
    """

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        loss_of: Callable[..., Tensor] | None = None,
    ) -> None:
        check_type("model", model, GPT)
        check_type("optimizer", optimizer, torch.optim.Optimizer)
        check_type("config", config, TrainConfig)
        device = next(model.parameters()).device
        check_capture(config, device)
        self.model, self.optimizer, self.config = model, optimizer, config
        self.loss_of = loss_of or model.loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        T = config.tokens
        self.tokens = torch.zeros(T, dtype=torch.int64, device=device)
        self.targets = torch.full((T,), IGNORE, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(T + 1, dtype=torch.int64, device=device)
        self.share, self.lr, self.loss, self.mean, self.norm, self.bad = (
            torch.zeros((), device=device) for _ in range(6)
        )
        self.captured: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def __call__(self, batches: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """As `take_step`: loss and gradient norm of the step, on the device. Nothing waits for it.

        Raises ValueError for a batch of more than `config.tokens` tokens, or where no target is scored.
        """
        scored = [batch.scored() for batch in batches]
        if not sum(scored):
            raise ValueError("batches: got no scored target, want at least one in a step")
        self.lr.fill_(lr)
        for batch, share in zip(batches, scored, strict=True):
            if share:
                self._load(batch, share / sum(scored))
                if self.captured is None:
                    self.captured = self._capture()
                self.captured[0].replay()
        assert self.captured is not None
        self.captured[1].replay()
        return self.mean.clone(), self.norm.clone()

    def _load(self, batch: Batch, share: float) -> None:
        T, n = len(self.tokens), len(batch.tokens)
        if n > T:
            raise ValueError(f"batches: got one of {n} tokens, want at most config.tokens = {T}")
        rest = torch.zeros(len(self.lengths), dtype=torch.int64)
        rest[: len(batch.lengths)] = torch.tensor(batch.lengths)
        rest[len(batch.lengths)] = T - n
        device = self.tokens.device
        self.tokens[:n].copy_(to_device(batch.tokens, device))
        self.targets.fill_(IGNORE)[:n].copy_(to_device(batch.targets, device))
        self.lengths.copy_(to_device(rest, device))
        self.share.fill_(share)

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self.lr, True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled and chosen, and calls recorded, before a graph captures them
                self._accumulate()
            self.loss.fill_(torch.nan)  # so that this step makes the optimizer's state and changes nothing
            self._finish()
        torch.cuda.current_stream().wait_stream(stream)
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._clear()
        self.bad.zero_()
        with torch.cuda.graph(graphs[0]):
            self._accumulate()
        with torch.cuda.graph(graphs[1], pool=graphs[0].pool()):
            self._finish()
        return graphs

    def _accumulate(self) -> None:
        """Loss and gradients of the loaded batch, added to those of the step."""
        dtype = torch.bfloat16 if self.config.precision == "bf16" else None
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            loss = self.loss_of(self.tokens, self.targets, self.lengths) * self.share
        loss.backward()
        self.loss += loss.detach()

    def _finish(self) -> None:
        """Clip and step. As in `take_step`, a loss or norm that is not finite stops this step and all later ones."""
        self.norm.copy_(nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
        self.mean.copy_(self.loss)
        self.bad.copy_(torch.maximum(self.bad, (~(self.mean.isfinite() & self.norm.isfinite())).float()))
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self._clear()

    def _clear(self) -> None:
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
        self.loss.zero_()
