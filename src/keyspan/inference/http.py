"""What every server of a model shares: limits, keys, errors in OpenAI's form, health, metrics, models.

An option that cannot be honoured is an error (400), never ignored.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Annotated, Any, TypeVar, cast

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from keyspan.inference.engine import QueueFullError

T = TypeVar("T")
Metric = tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, float]
"""Its kind, its name without the prefix `keyspan_`, its value."""


@dataclass(frozen=True)
class Limits:
    """What one client may take from the others."""

    body_bytes: int = 2**20
    """Largest body of a request."""
    body_seconds: float = 10.0
    """Longest time in which a body must arrive."""
    idle_seconds: float = 10.0
    """Longest time in which the head of a request must arrive on a connection, and a client must read something."""
    max_tokens: int = 4096
    """Most new tokens of one answer."""
    answers: int = 16
    """Most answers to one request: prompts × n."""
    inputs: int = 2048
    """Most texts of one request for embeddings."""
    seconds: float = 600.0
    """Longest time of one request; then its answers end with what they have (`length`), and embeddings with 504."""


@dataclass
class Site:
    """A server of one model."""

    name: str
    """Of the model, which requests must give."""
    limits: Limits
    keys: tuple[str, ...]
    failure: Callable[[], str | None]
    """Why nothing is answered any more, or None."""
    metrics: Callable[[], Iterable[Metric]]
    most: int
    """Requests for the model that are worked on at once; one more is answered 429."""
    stop: Callable[[], None]
    """End what is worked on, and refuse more; called on the event loop when the server shuts down."""
    started: float = field(default_factory=time.time)
    open: int = 0
    """Requests for the model whose bodies have arrived, and whose answers have not been sent."""
    statuses: Counter[int] = field(default_factory=Counter)
    """How many requests were answered with each HTTP status."""

    def model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": int(self.started), "owned_by": "keyspan"}

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise HTTPException(404, f"model: got {name!r:.200}, want {self.name!r}")


def make_site(site: Site, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    """An application with everything but the paths that ask the model."""
    app = FastAPI(title="keyspan", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.stop = site.stop
    app.add_middleware(_Guard, site=site)
    _handle_errors(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        failure = site.failure()
        return JSONResponse({"status": failure or "ok"}, 503 if failure else 200)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        registry = CollectorRegistry()
        registry.register(_Metrics(site))
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [site.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        site.check_model(name)
        return site.model()

    return app


class _Metrics:
    """Prometheus' view of a site."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for kind, name, value in (*self._site.metrics(), (GaugeMetricFamily, "open_http_requests", self._site.open)):
            yield kind(f"keyspan_{name}", name.replace("_", " "), value)
        answered = CounterMetricFamily("keyspan_http_responses", "responses by HTTP status", labels=["status"])
        for status, count in sorted(self._site.statuses.items()):
            answered.add_metric([str(status)], count)
        yield answered


# Bodies


def few_keys(value: Any) -> Any:
    """Before a JSON object is validated: an error for each of 100,000 unknown keys would hold everybody up."""
    if isinstance(value, dict) and len(value) > 64:
        raise ValueError(f"got {len(value)} keys, want at most 64")
    return value


class Body(BaseModel):
    """An object in a body of a request. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")
    _few = model_validator(mode="before")(few_keys)


Text = Annotated[str, StringConstraints(min_length=0)]
"""Unicode: a string with a constraint may have no half of a surrogate pair, which no tokenizer reads."""
Tokens = Annotated[list[int], Field(fail_fast=True)]
Prompts = Text | Annotated[list[Text], Field(fail_fast=True)] | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
"""One prompt or several, text or tokens. A long list of wrong entries is refused at the first."""


def as_list(prompts: Prompts) -> list[str | list[int]]:
    """Several prompts."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]
    return cast("list[str | list[int]]", prompts)


# Errors

_CODES = {404: "not_found", 405: "method_not_allowed", 503: "unavailable"}


def error_response(status: int, message: str, code: str, close: bool = False) -> JSONResponse:
    """An error as OpenAI words it. The middle of a long message, which repeats what the client sent, is left out."""
    if len(message) > 1000:
        message = f"{message[:500]} … {message[-500:]}"
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers={"connection": "close"} if close else None)


def _too_many(message: str) -> JSONResponse:
    response = error_response(429, f"{message}; try again later", "too_many_requests")
    response.headers["retry-after"] = "1"
    return response


def _is_field(part: str | int) -> bool:
    """Whether a part of a location is a field or an index, not a branch of a union such as `list[int]`."""
    return isinstance(part, int) or part.isidentifier()


def _telling(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first error; of a union, the error of the branch that fits most of what was given."""
    where: tuple[str | int, ...] = errors[0]["loc"]
    branch = next((n for n, part in enumerate(where[2:], 2) if not _is_field(part)), None)
    if branch is None:
        return errors[0]

    same = [x for x in errors if x["loc"][:branch] == where[:branch]]

    def fit(error: dict[str, Any]) -> tuple[int, int, bool]:
        inside = error["loc"][branch + 1 :]
        return len(inside), next((x for x in inside if isinstance(x, int)), 0), not error["type"].endswith("_type")

    return max(same, key=fit)


def _complaint(error: dict[str, Any], headers: Mapping[str, str]) -> str:
    """pydantic's account of a wrong body in our words: what, got, want."""
    if error["type"] == "json_invalid":
        return f"body: got no JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    # Not the branches of unions, which pydantic puts in too, such as `constrained-str` and `list[int]`.
    parts = [str(part) for part in error["loc"][1:]]
    where = ".".join(part for n, part in enumerate(parts) if part.isidentifier() or part.isdecimal() or not n)
    if not where:
        kind = headers.get("content-type", "none")
        if "json" not in kind:
            return f"body: got content-type {kind!r:.100}, want application/json"
        where = "body"
    if error["type"] == "missing":
        return f"{where:.200}: {error['msg']}"
    return f"{where:.200}: got {_SHORT.repr(error['input'])}; {error['msg']}"


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(400, _complaint(_telling(error.errors()), request.headers), "invalid_value")

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return error_response(400, str(error), "invalid_value")

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        return _too_many(str(error))

    @app.exception_handler(StarletteHTTPException)  # fastapi's own, and those of unknown paths
    async def failed(request: Request, error: StarletteHTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "invalid_value")
        response = error_response(error.status_code, str(error.detail), code)
        response.headers.update(error.headers or {})  # such as Allow
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"an error of the server: {type(error).__name__}", "server_error")


# Clients


class _Guard:
    """ASGI middleware: checks the key, and takes the whole body within its limits before anything else runs."""

    def __init__(self, app: ASGIApp, site: Site) -> None:
        self._app, self._site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._site.statuses[message["status"]] += 1
            await send(message)

        refusal, body = self._check_key(scope), b""
        if refusal is None:
            refusal, body = await self._body(receive)
        if refusal is not None:
            await refusal(scope, receive, counted)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        if scope["method"] != "POST":
            await self._app(scope, replay, counted)
        elif self._site.open >= self._site.most:  # before its text is tokenized
            await _too_many(f"{self._site.most} requests are worked on already")(scope, receive, counted)
        else:
            self._site.open += 1
            try:
                await self._app(scope, replay, counted)
            finally:
                self._site.open -= 1

    def _check_key(self, scope: Scope) -> Response | None:
        keys = self._site.keys
        if not keys or not scope["path"].startswith("/v1/"):
            return None
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # Every key is compared, in constant time.
        if scheme.lower() == b"bearer" and sum(hmac.compare_digest(given, key.encode()) for key in keys):
            return None
        text = "a valid API key is missing: Authorization: Bearer KEY"
        response = error_response(401, text, "invalid_api_key", close=True)
        response.headers["www-authenticate"] = "Bearer"
        return response

    async def _body(self, receive: Receive) -> tuple[Response | None, bytes]:
        limits, body, more = self._site.limits, bytearray(), True
        deadline = time.monotonic() + limits.body_seconds
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                text = f"the body did not arrive within {limits.body_seconds:g} s"
                return error_response(408, text, "timeout", close=True), b""
            if message["type"] == "http.disconnect":
                return Response(status_code=499), b""
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limits.body_bytes:
                text = f"the body is larger than {limits.body_bytes} bytes"
                return error_response(413, text, "too_large", close=True), b""
        return None, bytes(body)


async def while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """The result of some work, which is cancelled where the client leaves; then None."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.5)
            if not task.done() and await request.is_disconnected():
                return None
        return await task
    finally:
        task.cancel()


class Server(uvicorn.Server):
    """uvicorn's, which waits at its end for clients to have their answers; these end when the wait begins."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.stop()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to the addresses of a host, before a model is loaded for them; port 0: one that is free.

    Raises ValueError for a port or a host that cannot be listened on.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port: got {port}, want 0 … 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ValueError(f"host: got {host!r}, want a name or address of this machine ({error.strerror})") from None
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        one = socket.socket(family, kind, protocol)
        sockets.append(one)
        try:
            if sys.platform != "win32":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
        except OSError as error:
            for opened in sockets:
                opened.close()
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port: {host}:{port} is in use, want a free one (another server?)") from None
            raise ValueError(f"host: cannot listen on {host}:{port}: {error.strerror}") from None
        port = one.getsockname()[1]
    return sockets


def make_config(app: ASGIApp, limits: Limits, connections: int, **options: Any) -> Config:
    """What uvicorn runs an application with, so that silent and slow connections are closed.

    Args:
        limits: those of the application.
        connections: most of them; a request on one more is answered 503.
        options: more of `uvicorn.Config`.
    """
    return Config(
        app, http=_timed(limits), ws="none", limit_concurrency=connections, timeout_graceful_shutdown=5, **options
    )


def _timed(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's protocol with limits on time, which it lacks: for the head of a request, and for reading an answer."""
    patience, longest = limits.idle_seconds, limits.body_seconds + limits.seconds
    base: Any = AutoHTTPProtocol

    class Timed(base):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._request: tuple[Any, float] = (None, time.monotonic())
            """What is being answered (None: nothing), since when."""
            self._unread: tuple[int, float] = (0, time.monotonic())
            """Bytes of answers that the client has not taken, since when they are so many."""
            self._look()

        def connection_lost(self, error: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(error)

        def _look(self) -> None:
            now = time.monotonic()
            request = None if self.cycle is None or self.cycle.response_complete else self.cycle
            unread = self.transport.get_write_buffer_size()
            if request is not self._request[0]:
                self._request = request, now
            if unread != self._unread[0]:
                self._unread = unread, now
            stalled = unread > 0 and now - self._unread[1] > patience
            if stalled or now - self._request[1] > (patience if request is None else longest):
                self.transport.abort()  # close() would wait until the client has read everything
            else:
                self._timer = asyncio.get_running_loop().call_later(patience / 4, self._look)

    return Timed
