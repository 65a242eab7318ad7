"""Loss and exact match of a model on held-out packed batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from keyspan.models.gpt import GPT
from keyspan.training.packing import IGNORE, Batch
from keyspan.training.ranks import ALONE, Ranks


class Evaluation(NamedTuple):
    """What a model scores on held-out documents."""

    loss: float
    """Mean nats per scored token."""
    exact_match: float
    """Share of documents whose every scored token is the model's first choice. As each choice is made after a right
    answer so far, this is the share that greedy decoding answers without an error."""

    bytes_per_token: float = 1.0
    """Bytes of text that a scored token stands for, on the average."""

    @property
    def bits_per_byte(self) -> float:
        """Mean bits per byte of text."""
        return self.loss / math.log(2) / self.bytes_per_token


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Sequence[Batch],
    bytes_per_token: float = 1.0,
    ranks: Ranks = ALONE,
    objective: nn.Module | None = None,
) -> Evaluation:
    """Score the model, without dropout, under whatever autocast is on.

    Args:
        ranks: each scores a part of the batches; all return the same.
        objective: the model as `ranks` wrapped it, where they did.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)  # nats, scored tokens, right documents, documents
    for first in range(0, len(batches), ranks.data):
        # All ranks call the model equally often: those without a batch of their own score one that does not count.
        own = first + ranks.data_rank
        batch = batches[min(own, len(batches) - 1)]
        part, context = ranks.part(batch)
        tokens, targets, lengths, _ = part.to(device)
        rows = targets != IGNORE
        if objective is None:
            logits = model.logits(model(tokens, lengths)[rows]).float()
        else:
            logits = objective(tokens, targets, lengths, context, scores=True)[rows].float()
        nats = F.cross_entropy(logits, targets[rows], reduction="sum")
        wrong = torch.zeros(rows.shape, dtype=torch.int64, device=device)
        wrong[rows] = (logits.argmax(-1) != targets[rows]).long()
        document = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        if context is not None:
            document = context.partition.take(document, ranks.context_rank, 0)
        by_document = torch.zeros(len(lengths), dtype=torch.int64, device=device).index_add_(0, document, wrong)
        if context is not None:
            dist.all_reduce(by_document, group=ranks.context_group)
        if own < len(batches):
            documents = len(lengths) if ranks.context_rank == 0 else 0
            right = int((by_document == 0).sum()) if documents else 0
            totals += torch.tensor([float(nats), len(logits), right, documents], dtype=torch.float64)
    model.train(training)
    nats, scored, right, documents = ranks.sum(totals).tolist()
    return Evaluation(nats / scored, right / documents, bytes_per_token)
