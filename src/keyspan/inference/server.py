"""An HTTP server with OpenAI's interface over an engine: completions, chat, models, health, metrics.

The engine runs in a thread of its own; each request has a queue of events. An option that cannot be honoured is an
error (400), never ignored.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any, Literal, cast

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Message_

from keyspan.inference.engine import Engine, Event, QueueFullError
from keyspan.inference.sampling import Sampling
from keyspan.inference.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Limits:
    """What one client may take from the others."""

    body_bytes: int = 2**20
    """Largest body of a request."""
    body_seconds: float = 10.0
    """Longest time in which a body must arrive."""
    max_tokens: int = 4096
    """Most new tokens of one answer."""
    answers: int = 16
    """Most answers to one request: prompts × n."""
    seconds: float = 600.0
    """Longest time of one request; then its answers end with what they have (`length`)."""


class EngineThread(threading.Thread):
    """Steps an engine for as long as it has requests, and hands events to asyncio queues."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="keyspan-engine", daemon=True)
        self.engine = engine
        self.failure: BaseException | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._queues: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Event | None]]] = {}

    def submit(self, prompt: str | list[int], sampling: Sampling) -> tuple[str, asyncio.Queue[Event | None]]:
        """Queue a request; its events come through the queue. None in the queue: the engine has failed."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        id = uuid.uuid4().hex
        with self._wake:
            if self._closing or self.failure is not None:
                raise HTTPException(503, "the server is shutting down" if self._closing else "the engine has stopped")
            self._queues[id] = asyncio.get_running_loop(), queue
            try:
                self.engine.add(prompt, sampling, id)
            except BaseException:
                del self._queues[id]
                raise
            self._wake.notify()
        return id, queue

    def cancel(self, id: str) -> None:
        """End a request that is not finished."""
        with self._wake:
            if id in self._queues:
                self.engine.cancel(id)
                self._wake.notify()

    def close(self) -> None:
        """Finish the step in hand, end all requests, and wait for the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self.join()

    def run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._closing and not self.engine.busy():
                        self._wake.wait()
                    if self._closing:
                        break
                for event in self.engine.step():
                    self._hand(event)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._wake:
                for loop, queue in self._queues.values():
                    loop.call_soon_threadsafe(queue.put_nowait, None)
                self._queues.clear()

    def _hand(self, event: Event) -> None:
        with self._wake:
            found = self._queues.get(event.id)
            if event.finished is not None:
                self._queues.pop(event.id, None)
        if found is not None:
            loop, queue = found
            loop.call_soon_threadsafe(queue.put_nowait, event)


# Requests


class _Options(BaseModel):
    """What completions and chat share. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    user: str | None = None
    """Accepted and not used, as is `metadata`: they change no answer."""
    metadata: dict[str, str] | None = None

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

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None
    logit_bias: None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return cast("list[str | list[int]]", self.prompt)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat; text only."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(_Options):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: None = None
    tool_choice: None = None
    logit_bias: None = None


# The application


@dataclass
class _Server:
    engine: Engine
    name: str
    limits: Limits
    keys: tuple[str, ...]
    thread: EngineThread
    started: float = field(default_factory=time.time)
    open: int = 0
    """Requests that have not been answered."""


def make_app(engine: Engine, name: str, limits: Limits | None = None, keys: tuple[str, ...] = ()) -> FastAPI:
    """The ASGI application.

    Args:
        engine: what answers; the application runs it, from startup to shutdown.
        name: of the model, which requests must give.
        limits: for each request.
        keys: API keys, one of which every request under /v1 must bring as `Authorization: Bearer KEY`; none: open.
    """
    server = _Server(engine, name, limits or Limits(), keys, EngineThread(engine))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.thread.start()
        yield
        await asyncio.to_thread(server.thread.close)

    app = FastAPI(title="keyspan", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard, server=server)
    _routes(app, server)
    return app


class _Guard:
    """ASGI middleware: checks the key, and takes the whole body within its limits before anything else runs."""

    def __init__(self, app: ASGIApp, server: _Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal, body = self._check_key(scope), b""
        if refusal is None:
            refusal, body = await self._body(receive)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        first: list[Message_] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message_:
            return first.pop() if first else await receive()

        await self._app(scope, replay, send)

    def _check_key(self, scope: Scope) -> Response | None:
        keys = self._server.keys
        if not keys or not scope["path"].startswith("/v1/"):
            return None
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        if sum(hmac.compare_digest(given, key.encode()) for key in keys):  # every key is compared, in constant time
            return None
        return _error(401, "a valid API key is missing: Authorization: Bearer KEY", "invalid_api_key")

    async def _body(self, receive: Receive) -> tuple[Response | None, bytes]:
        limits, body, more = self._server.limits, bytearray(), True
        deadline = time.monotonic() + limits.body_seconds
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                text = f"the body did not arrive within {limits.body_seconds:g} s"
                return _error(408, text, "timeout", close=True), b""
            if message["type"] == "http.disconnect":
                return Response(status_code=499), b""
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limits.body_bytes:
                text = f"the body is larger than {limits.body_bytes} bytes"
                return _error(413, text, "too_large", close=True), b""
        return None, bytes(body)


def _error(status: int, message: str, code: str, close: bool = False) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers={"connection": "close"} if close else None)


def _routes(app: FastAPI, server: _Server) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"][1:])
        return _error(400, f"{where}: {first['msg']}", "invalid_value")

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return _error(400, str(error), "invalid_value")

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        response = _error(429, str(error), "too_many_requests")
        response.headers["retry-after"] = "1"
        return response

    @app.exception_handler(StarletteHTTPException)  # fastapi's own, and those of unknown paths
    async def failed(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), "unavailable")

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = server.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        registry = CollectorRegistry()
        registry.register(_Metrics(server))
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> HTMLResponse:
        text = files("keyspan.inference").joinpath("chat.html").read_text(encoding="utf-8")
        return HTMLResponse(text.replace("{{model}}", escape(server.name)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(server)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(server, name)
        return _model(server)

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        _check_model(server, body.model)
        _check_count(server, len(body.prompts()) * body.n)
        prompts = [prompt for prompt in body.prompts() for _ in range(body.n)]
        each = [body.sampling(server.limits, body.logprobs, 16, n % body.n) for n in range(len(prompts))]
        return await _answer(server, request, body, prompts, each, _CompletionForm(server))

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        _check_model(server, body.model)
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
        room = server.engine.cache.pages * server.engine.cache.page_size - len(tokens)
        default = max(0, min(server.limits.max_tokens, room))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        each = [body.sampling(server.limits, logprobs, default, n) for n in range(body.n)]
        return await _answer(server, request, body, [tokens] * body.n, each, _ChatForm(server))


def _model(server: _Server) -> dict[str, Any]:
    return {"id": server.name, "object": "model", "created": int(server.started), "owned_by": "keyspan"}


def _check_model(server: _Server, name: str) -> None:
    if name != server.name:
        raise HTTPException(404, f"model: got {name!r}, want {server.name!r}")


def _check_count(server: _Server, answers: int) -> None:
    """Before anything is made for each answer."""
    if not 1 <= answers <= server.limits.answers:
        raise ValueError(f"n: got {answers} answers in all, want 1 … {server.limits.answers}")


class _Metrics:
    """Prometheus' view of an engine."""

    def __init__(self, server: _Server) -> None:
        self._server = server

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engine = self._server.engine
        for name, value in vars(engine.counters).items():
            yield CounterMetricFamily(f"keyspan_{name}", name.replace("_", " "), value)
        running, waiting = engine.load
        for name, value in (
            ("running_requests", running),
            ("waiting_requests", waiting),
            ("open_http_requests", self._server.open),
            ("pages", engine.cache.pages),
            ("available_pages", engine.cache.available()),
        ):
            yield GaugeMetricFamily(f"keyspan_{name}", name.replace("_", " "), value)


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
    submitted: list[tuple[str, asyncio.Queue[Event | None]]] = []
    try:
        for prompt, sampling in zip(prompts, each, strict=True):
            submitted.append(server.thread.submit(prompt, sampling))
    except BaseException:
        for id, _ in submitted:
            server.thread.cancel(id)
        raise
    usage = _Usage(sum(map(len, prompts[:: body.n])))
    events = _merge(server, submitted)
    if body.stream:
        parts = _stream(server, body, form, events, usage)
        return _Parts(server, [id for id, _ in submitted], parts)
    return await _whole(server, request, form, events, usage, len(prompts))


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


async def _merge(
    server: _Server, submitted: list[tuple[str, asyncio.Queue[Event | None]]]
) -> AsyncIterator[tuple[int, Event]]:
    """The events of several requests as they come. Leaving it, for whatever reason, cancels what is not finished."""
    merged: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

    async def forward(index: int, queue: asyncio.Queue[Event | None]) -> None:
        while True:
            event = await queue.get()
            await merged.put((index, event))
            if event is None or event.finished is not None:
                return

    tasks = [asyncio.create_task(forward(n, queue)) for n, (_, queue) in enumerate(submitted)]
    server.open += 1
    left = set(range(len(submitted)))
    deadline = time.monotonic() + server.limits.seconds
    try:
        while left:
            index, event = await asyncio.wait_for(merged.get(), max(0.0, deadline - time.monotonic()))
            if event is None:
                raise HTTPException(503, "the engine has stopped")
            if event.finished is not None:
                left.discard(index)
            yield index, event
    except asyncio.TimeoutError:
        for index in sorted(left):
            yield index, Event(submitted[index][0], finished="length")
    finally:
        server.open -= 1
        for task in tasks:
            task.cancel()
        for index in left:
            server.thread.cancel(submitted[index][0])


async def _whole(
    server: _Server,
    request: Request,
    form: _CompletionForm | _ChatForm,
    events: AsyncIterator[tuple[int, Event]],
    usage: _Usage,
    count: int,
) -> Response:
    found: list[list[Event]] = [[] for _ in range(count)]

    async def collect() -> None:
        async for index, event in events:
            found[index].append(event)
            usage.answer += event.token is not None

    task = asyncio.create_task(collect())
    while not task.done():
        await asyncio.wait([task], timeout=0.5)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            return Response(status_code=499)
    await task
    choices = [
        form.choice(n, "".join(x.text for x in one), one, one[-1].finished, stream=False) for n, one in enumerate(found)
    ]
    return JSONResponse({**_head(server, form, form.whole), "choices": choices, "usage": usage.count()})


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
    return {"id": form.id, "object": kind, "created": int(time.time()), "model": server.name}
