"""An HTTP server with OpenAI's interface over an engine: completions, chat, and a page to chat in.

The engine runs in a thread of its own; each request has a queue of events. An option that cannot be honoured is an
error (400), never ignored.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BeforeValidator, Field, StringConstraints
from starlette.types import Receive, Scope, Send

from keyspan.inference.engine import Engine, Event
from keyspan.inference.http import (
    Body,
    Limits,
    Metric,
    Prompts,
    Site,
    Text,
    as_list,
    few_keys,
    make_site,
    while_connected,
)
from keyspan.inference.sampling import Sampling
from keyspan.inference.tokenizer import ChatTokenizer

MOST_STOPS = 16
"""Texts and tokens that may end an answer: each is looked for at each token."""


Events = asyncio.Queue[Event | None]
"""Of one or several requests. None: the engine has stopped."""


class EngineThread(threading.Thread):
    """Steps an engine for as long as it has requests, and hands events to asyncio queues."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="keyspan-engine", daemon=True)
        self.engine = engine
        self.failure: BaseException | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._queues: dict[str, tuple[asyncio.AbstractEventLoop, Events]] = {}

    def submit(self, prompt: str | list[int], sampling: Sampling, queue: Events) -> str:
        """Queue a request, whose events come through the queue; returns its id."""
        id = uuid.uuid4().hex
        with self._wake:
            if self._closing or self.failure is not None:
                raise HTTPException(503, self.reason())
            self._queues[id] = asyncio.get_running_loop(), queue
            try:
                self.engine.add(prompt, sampling, id)
            except BaseException:
                del self._queues[id]
                raise
            self._wake.notify()
        return id

    def cancel(self, id: str) -> None:
        """End a request that is not finished."""
        with self._wake:
            if id in self._queues:
                self.engine.cancel(id)
                self._wake.notify()

    def stop(self) -> None:
        """Finish the step in hand, then end all requests."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def reason(self) -> str:
        """Why requests end without a word of the engine."""
        return "the server is shutting down" if self._closing else "the engine has stopped"

    def run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._closing and not self.engine.busy():
                        self._wake.wait()
                    if self._closing:
                        break
                self._hand(self.engine.step())
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._wake:
                for loop, queue in self._queues.values():
                    loop.call_soon_threadsafe(queue.put_nowait, None)
                self._queues.clear()

    def _hand(self, events: list[Event]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Events, Event]]] = {}
        with self._wake:
            for event in events:
                found = self._queues.get(event.id)
                if event.finished is not None:
                    self._queues.pop(event.id, None)
                if found is not None:
                    by_loop.setdefault(found[0], []).append((found[1], event))
        for loop, some in by_loop.items():  # a loop is woken once a step
            loop.call_soon_threadsafe(_put, some)


def _put(events: list[tuple[Events, Event]]) -> None:
    for queue, event in events:
        queue.put_nowait(event)


# Requests

_Stop = Annotated[str, StringConstraints(max_length=256)]


_StreamOptions = Annotated[dict[Literal["include_usage"], bool], BeforeValidator(few_keys)]
_Metadata = Annotated[dict[str, str], BeforeValidator(few_keys)]
_Format = Annotated[dict[Literal["type"], Literal["text"]], BeforeValidator(few_keys)]


class _Options(Body):
    """What completions and chat share."""

    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stop_token_ids: list[int] = Field(default=[], max_length=MOST_STOPS, fail_fast=True)
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    user: str | None = None
    """Accepted and not used, as is `metadata`: they change no answer."""
    metadata: _Metadata | None = None

    def sampling(self, limits: Limits, logprobs: int | None, default_tokens: int, index: int) -> Sampling:
        wanted = default_tokens if self.max_tokens is None else self.max_tokens
        if wanted > limits.max_tokens:
            raise ValueError(f"max_tokens: got {wanted}, want at most {limits.max_tokens}")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=wanted,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed + index,
            stop=tuple(stop),
            stop_tokens=tuple(self.stop_token_ids),
            ignore_end=self.ignore_eos,
            logprobs=logprobs,
        )


class Completion(_Options):
    """The body of /v1/completions."""

    prompt: Prompts
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None
    logit_bias: None = None


class _Part(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a chat; text only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[_Part], Field(fail_fast=True)]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(_Options):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: _Format | None = None
    tools: None = None
    tool_choice: None = None
    logit_bias: None = None


# The application


@dataclass
class _Server:
    engine: Engine
    thread: EngineThread
    site: Site

    @property
    def limits(self) -> Limits:
        return self.site.limits


def make_app(engine: Engine, name: str, limits: Limits | None = None, keys: tuple[str, ...] = ()) -> FastAPI:
    """The ASGI application.

    Args:
        engine: what answers; the application runs it, from startup to shutdown.
        name: of the model, which requests must give.
        limits: for each request.
        keys: API keys, one of which every request under /v1 must bring as `Authorization: Bearer KEY`; none: open.
    """
    thread = EngineThread(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        thread.start()
        yield
        thread.stop()
        await asyncio.to_thread(thread.join)

    site = Site(
        name,
        limits or Limits(),
        keys,
        lambda: None if thread.is_alive() else thread.reason(),
        lambda: _metrics(engine),
        most=engine.running_limit + engine.waiting_limit,
        stop=thread.stop,
    )
    app = make_site(site, lifespan)
    _routes(app, _Server(engine, thread, site))
    return app


def _metrics(engine: Engine) -> Iterator[Metric]:
    for name, value in vars(engine.counters).items():
        yield CounterMetricFamily, name, value
    running, waiting = engine.load
    yield GaugeMetricFamily, "running_requests", running
    yield GaugeMetricFamily, "waiting_requests", waiting
    yield GaugeMetricFamily, "pages", engine.cache.pages
    yield GaugeMetricFamily, "available_pages", engine.cache.available()


def _routes(app: FastAPI, server: _Server) -> None:
    @app.get("/")
    async def page() -> HTMLResponse:
        text = files("keyspan.inference").joinpath("chat.html").read_text(encoding="utf-8")
        return HTMLResponse(text.replace("{{model}}", escape(server.site.name)))

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        server.site.check_model(body.model)
        prompts = as_list(body.prompt)
        if not prompts:
            raise ValueError("prompt: got an empty list, want at least one token or text")
        _check_count(server, len(prompts) * body.n)
        prompts = [prompt for prompt in prompts for _ in range(body.n)]
        each = [body.sampling(server.limits, body.logprobs, 16, n % body.n) for n in range(len(prompts))]
        return await _answer(server, request, body, prompts, each, _CompletionForm(server))

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        server.site.check_model(body.model)
        tokenizer = server.engine.tokenizer
        if not isinstance(tokenizer, ChatTokenizer):
            raise ValueError("messages: the model has no chat template; use /v1/completions")
        _check_count(server, body.n)
        messages = [message.plain() for message in body.messages]
        tokens = await asyncio.to_thread(tokenizer.encode_chat, messages)
        if body.top_logprobs is not None and not body.logprobs:
            raise ValueError("top_logprobs: got a number, want logprobs = true with it")
        if body.max_completion_tokens is not None:
            body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
        room = server.engine.max_model_len - len(tokens)
        default = max(0, min(server.limits.max_tokens, room))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        each = [body.sampling(server.limits, logprobs, default, n) for n in range(body.n)]
        return await _answer(server, request, body, [tokens] * body.n, each, _ChatForm(server))


def _check_count(server: _Server, answers: int) -> None:
    """Before anything is made for each answer."""
    if not 1 <= answers <= server.limits.answers:
        raise ValueError(f"n: got {answers} answers in all, want 1 … {server.limits.answers}")


# Answers


class _CompletionForm:
    """How /v1/completions words its answers."""

    whole, part = "text_completion", "text_completion"

    def __init__(self, server: _Server) -> None:
        self.server = server
        self.id = f"cmpl-{uuid.uuid4().hex}"

    def choice(self, index: int, text: str, events: list[Event], finished: str | None, stream: bool) -> dict[str, Any]:
        known = [x for x in events if x.logprob is not None]
        logprobs = None
        if known:
            logprobs = {
                "tokens": [_decode(self.server, x.token) for x in known],
                "token_logprobs": [x.logprob for x in known],
                "top_logprobs": [{_decode(self.server, t): p for t, p in x.likeliest} for x in known],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finished}


class _ChatForm:
    """How /v1/chat/completions words its answers."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(self, server: _Server) -> None:
        self.server = server
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._begun: set[int] = set()

    def choice(self, index: int, text: str, events: list[Event], finished: str | None, stream: bool) -> dict[str, Any]:
        known = [x for x in events if x.logprob is not None]
        logprobs = {"content": [self._token(x) for x in known], "refusal": None} if known else None
        message: dict[str, Any] = {"content": text}
        if index not in self._begun:
            message = {"role": "assistant", **message}
            self._begun.add(index)
        key = "delta" if stream else "message"
        return {"index": index, key: message, "logprobs": logprobs, "finish_reason": finished}

    def _token(self, event: Event) -> dict[str, Any]:
        def entry(token: int | None, logprob: float | None) -> dict[str, Any]:
            text = _decode(self.server, token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = [entry(token, logprob) for token, logprob in event.likeliest]
        return {**entry(event.token, event.logprob), "top_logprobs": top}


def _decode(server: _Server, token: int | None) -> str:
    tokenizer = server.engine.tokenizer
    return "" if tokenizer is None or token is None else tokenizer.decode([token])


async def _answer(
    server: _Server,
    request: Request,
    body: _Options,
    prompts: list[str | list[int]],
    each: list[Sampling],
    form: _CompletionForm | _ChatForm,
) -> Response:
    engine = server.engine
    if engine.tokenizer is not None:  # in another thread: a long text takes a while, in which others are answered
        encode = engine.tokenizer.encode
        prompts = [await asyncio.to_thread(encode, x) if isinstance(x, str) else x for x in prompts]
    queue: Events = asyncio.Queue()
    ids: list[str] = []
    try:
        for prompt, sampling in zip(prompts, each, strict=True):
            ids.append(server.thread.submit(prompt, sampling, queue))
    except BaseException:
        for id in ids:
            server.thread.cancel(id)
        raise
    usage = _Usage(sum(map(len, prompts[:: body.n])))
    events = _events(server, ids, queue)
    if body.stream:
        parts = _stream(server, body, form, events, usage)
        return _Parts(server, ids, parts)
    try:
        return await _whole(server, request, form, events, usage, len(prompts))
    finally:  # cancelling a task does not always reach what it waits for: Python 3.11's wait_for may swallow it
        for id in ids:
            server.thread.cancel(id)


class _Parts(StreamingResponse):
    """Answers as server-sent events. Requests are cancelled also where the client has left before the first one."""

    def __init__(self, server: _Server, ids: list[str], parts: AsyncIterator[str]) -> None:
        super().__init__(parts, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._server, self._ids = server, ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for id in self._ids:
                self._server.thread.cancel(id)


@dataclass
class _Usage:
    prompt: int
    answer: int = 0

    def count(self) -> dict[str, int]:
        total = self.prompt + self.answer
        return {"prompt_tokens": self.prompt, "completion_tokens": self.answer, "total_tokens": total}


async def _events(server: _Server, ids: list[str], queue: Events) -> AsyncIterator[tuple[int, Event]]:
    """The events of several requests as they come, each with the number of its request.

    Leaving it, for whatever reason, cancels what is not finished.
    """
    left = {id: n for n, id in enumerate(ids)}
    deadline = time.monotonic() + server.limits.seconds
    try:
        while left:
            event = await asyncio.wait_for(queue.get(), max(0.0, deadline - time.monotonic()))
            if event is None:
                raise HTTPException(503, server.thread.reason())
            if event.finished == "error":
                raise HTTPException(500, event.error)
            yield left[event.id] if event.finished is None else left.pop(event.id), event
    except asyncio.TimeoutError:
        for id, index in left.items():
            yield index, Event(id, finished="length")
    finally:
        for id in left:
            server.thread.cancel(id)


async def _whole(
    server: _Server,
    request: Request,
    form: _CompletionForm | _ChatForm,
    events: AsyncIterator[tuple[int, Event]],
    usage: _Usage,
    count: int,
) -> Response:
    found: list[list[Event]] = [[] for _ in range(count)]

    async def collect() -> bool:
        async for index, event in events:
            found[index].append(event)
            usage.answer += event.token is not None
        return True

    if await while_connected(request, collect()) is None:
        return Response(status_code=499)
    head = _head(server, form, form.whole)

    def content() -> str:  # a choice at a time, in another thread: with many log-probabilities it takes a while
        each = enumerate(zip(found, ("".join(x.text for x in one) for one in found), strict=True))
        choices = (form.choice(n, text, one, one[-1].finished, stream=False) for n, (one, text) in each)
        return (
            f'{json.dumps({**head, "usage": usage.count()})[:-1]}, "choices": [{", ".join(map(json.dumps, choices))}]}}'
        )

    return Response(await asyncio.to_thread(content), media_type="application/json")


async def _stream(
    server: _Server,
    body: _Options,
    form: _CompletionForm | _ChatForm,
    events: AsyncIterator[tuple[int, Event]],
    usage: _Usage,
) -> AsyncIterator[str]:
    head = _head(server, form, form.part)
    with_usage = bool(body.stream_options and body.stream_options.get("include_usage"))
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    try:
        async for index, event in events:
            usage.answer += event.token is not None
            if event.text or event.finished is not None or event.logprob is not None:
                choice = form.choice(index, event.text, [event], event.finished, stream=True)
                yield f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n"
        if with_usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage.count()})}\n\n"
        yield "data: [DONE]\n\n"
    except HTTPException as error:
        yield f"data: {json.dumps({'error': {'message': str(error.detail), 'type': 'server_error'}})}\n\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]


def _head(server: _Server, form: _CompletionForm | _ChatForm, kind: str) -> dict[str, Any]:
    return {"id": form.id, "object": kind, "created": int(time.time()), "model": server.site.name}
