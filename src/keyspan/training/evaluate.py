"""Loss and exact match of a model on held-out packed batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from keyspan.models.gpt import GPT
from keyspan.training.packing import IGNORE, Batch


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
def evaluate(model: GPT, batches: Iterable[Batch], bytes_per_token: float = 1.0) -> Evaluation:
    """Score the model, without dropout, under whatever autocast is on."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats, scored, right, documents = 0.0, 0, 0, 0
    for batch in batches:
        tokens, targets, lengths = batch.to(device)
        rows = targets != IGNORE
        logits = model.logits(model(tokens, lengths)[rows]).float()
        nats += float(F.cross_entropy(logits, targets[rows], reduction="sum"))
        wrong = torch.zeros_like(rows)
        wrong[rows] = logits.argmax(-1) != targets[rows]
        right += sum(not document.any() for document in wrong.cpu().split(lengths))
        scored += len(logits)
        documents += len(lengths)
    model.train(training)
    return Evaluation(nats / scored, right / documents, bytes_per_token)
