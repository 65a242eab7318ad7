"""An HTTP server with OpenAI's interface over an encoder: /v1/embeddings.

Texts of all requests that wait are embedded together, packed without padding, a text of each request in turns: a
request with many texts does not hold up one with few.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import Field
from torch import Tensor

from keyspan.inference.embedding import Embedder
from keyspan.inference.http import Body, Limits, Metric, Prompts, Site, as_list, make_site, while_connected

_ROWS_AT_A_TIME = 64
"""Embeddings that are turned into JSON before others are served."""


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    """Most tokens of a text, longer ones lose their end; −1: as many as the model reads. None: those are refused."""
    user: str | None = None
    """Accepted and not used."""


@dataclass(eq=False)
class _Job:
    """The texts of one request."""

    sequences: Sequence[Sequence[int]]
    rows: Tensor
    done: asyncio.Future[Tensor]
    taken: int = 0
    finished: int = 0


class Batcher:
    """Embeds texts of several requests together; for one event loop."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.texts = self.tokens = self.steps = 0
        self.busy_seconds = 0.0
        self._stopped = False
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "keyspan-embedder")

    @property
    def waiting(self) -> int:
        """Texts that no forward pass has begun with."""
        return sum(len(job.sequences) - job.taken for job in self._jobs)

    async def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings [sequences, dim] of tokens that `Embedder.check` accepts. Cancelling it takes them out again."""
        if self._stopped:
            raise HTTPException(503, "the server is shutting down")
        job = _Job(
            sequences, torch.empty(len(sequences), self.embedder.dim), asyncio.get_running_loop().create_future()
        )
        self._jobs.append(job)
        self._wake.set()
        try:
            return await job.done
        finally:
            if job in self._jobs:
                self._jobs.remove(job)

    async def run(self) -> None:
        """Work until cancelled; then those that wait get HTTP's 503."""
        try:
            while True:
                await self._wake.wait()
                batch = self._take()
                if batch:
                    await self._step(batch)
                else:
                    self._wake.clear()
        finally:
            self._stopped = True
            for job in self._jobs:
                self._fail(job, HTTPException(503, "the server is shutting down"))
            self._thread.shutdown(wait=False)

    async def _step(self, batch: list[tuple[_Job, int]]) -> None:
        begin = time.perf_counter()
        sequences = [job.sequences[n] for job, n in batch]
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._thread, self.embedder.embed, sequences)
        except Exception as error:
            for job, _ in batch:
                self._fail(job, error)
            return
        except asyncio.CancelledError:
            for job, _ in batch:
                self._fail(job, HTTPException(503, "the server is shutting down"))
            raise
        self.steps += 1
        self.texts += len(batch)
        self.tokens += sum(map(len, sequences))
        self.busy_seconds += time.perf_counter() - begin
        for (job, n), row in zip(batch, rows, strict=True):
            job.rows[n] = row
            job.finished += 1
            if job.finished == len(job.sequences) and not job.done.done():
                job.done.set_result(job.rows)

    def _take(self) -> list[tuple[_Job, int]]:
        """Texts for one forward pass, of each request in turns."""
        batch: list[tuple[_Job, int]] = []
        room = self.embedder.step_tokens
        while self._jobs:
            job = self._jobs[0]
            length = len(job.sequences[job.taken])
            if batch and length > room:
                break
            batch.append((job, job.taken))
            room -= length
            job.taken += 1
            self._jobs.rotate(-1)
            if job.taken == len(job.sequences):
                self._jobs.pop()
        return batch

    @staticmethod
    def _fail(job: _Job, error: Exception) -> None:
        if not job.done.done():
            job.done.set_exception(error)


def make_embedding_app(
    embedder: Embedder, name: str, limits: Limits | None = None, keys: tuple[str, ...] = (), waiting: int = 1024
) -> FastAPI:
    """The ASGI application.

    Args:
        embedder: what answers.
        name: of the model, which requests must give.
        limits: for each request.
        keys: API keys, one of which every request under /v1 must bring as `Authorization: Bearer KEY`; none: open.
        waiting: most requests that are worked on; more are answered 429.
    """
    batcher = Batcher(embedder)
    task: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task.append(asyncio.create_task(batcher.run()))
        yield
        stop()
        await asyncio.wait(task)

    def failure() -> str | None:
        return "the embedder has stopped" if not task or task[0].done() else None

    def metrics() -> Iterator[Metric]:
        yield CounterMetricFamily, "embedded_texts", batcher.texts
        yield CounterMetricFamily, "embedded_tokens", batcher.tokens
        yield CounterMetricFamily, "steps", batcher.steps
        yield CounterMetricFamily, "busy_seconds", batcher.busy_seconds
        yield GaugeMetricFamily, "waiting_texts", batcher.waiting

    def stop() -> None:
        for running in task:
            running.cancel()

    site = Site(name, limits or Limits(), keys, failure, metrics, most=waiting, stop=stop)
    app = make_site(site, lifespan)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        site.check_model(body.model)
        embedder.check_dimensions(body.dimensions)
        inputs = as_list(body.input)
        if not 1 <= len(inputs) <= site.limits.inputs:
            raise ValueError(f"input: got {len(inputs)} texts, want 1 … {site.limits.inputs}")
        sequences = await _tokens(embedder, inputs, body.truncate_prompt_tokens)
        work = asyncio.wait_for(batcher.embed(sequences), site.limits.seconds)
        try:
            rows = await while_connected(request, work)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"not embedded within {site.limits.seconds:g} s") from None
        if rows is None:
            return Response(status_code=499)
        bad = (~rows.isfinite()).any(-1).nonzero()
        if len(bad):
            raise HTTPException(500, f"input: the embedding of text {int(bad[0])} is infinite or NaN")
        content = await _content(embedder.cut(rows, body.dimensions), body.encoding_format)
        count = sum(map(len, sequences))
        more = {"object": "list", "model": name, "usage": {"prompt_tokens": count, "total_tokens": count}}
        return Response(f'{json.dumps(more)[:-1]}, "data": [{content}]}}', media_type="application/json")

    return app


async def _tokens(
    embedder: Embedder, inputs: Sequence[str | list[int]], truncate: int | None
) -> Sequence[Sequence[int]]:
    most = embedder.longest if truncate == -1 else truncate
    if isinstance(inputs[0], str):  # in another thread: long texts take a while, in which others are answered
        return await asyncio.to_thread(embedder.tokenize, cast("list[str]", inputs), most)
    embedder.check_truncation(most)
    sequences = [tokens[:most] for tokens in cast("list[list[int]]", inputs)]
    embedder.check(sequences)
    return sequences


async def _content(rows: Tensor, encoding: str) -> str:
    """The entries of `data`, made in parts between which others are served."""
    parts = []
    for first in range(0, len(rows), _ROWS_AT_A_TIME):
        for n, row in enumerate(rows[first : first + _ROWS_AT_A_TIME].tolist(), first):
            embedding: Any = row
            if encoding == "base64":
                numbers = array("f", row)
                if sys.byteorder == "big":
                    numbers.byteswap()
                embedding = base64.b64encode(numbers.tobytes()).decode()
            parts.append(json.dumps({"object": "embedding", "index": n, "embedding": embedding}))
        await asyncio.sleep(0)
    return ", ".join(parts)
