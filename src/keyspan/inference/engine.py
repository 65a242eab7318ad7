"""Continuous batching: many requests at once through one model and one paged cache, without padding.

A step is one forward pass over packed tokens: one new token of every request that is answering, and chunks of prompts
that are being read ("chunked prefill", Agrawal et al., "Sarathi", 2023). Requests join and leave between steps. When
pages run out, the request that came last gives its pages back and starts again later; none is lost.
"""

from __future__ import annotations

import itertools
import operator
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keyspan.core.checks import check_bool, check_int, check_type
from keyspan.core.problem import STORED, names
from keyspan.inference.graphs import DecodeGraphs
from keyspan.inference.pages import Held, Key, PagedCache
from keyspan.inference.program import DecoderProgram
from keyspan.inference.sampling import Chosen, Sampling, choose
from keyspan.inference.tokenizer import Detokenizer, Tokenizer
from keyspan.models.gpt import GPT


class QueueFullError(RuntimeError):
    """The engine has as many waiting requests as it may have; try again later."""


@dataclass
class Event:
    """What became of a request in a step: one token of its answer, or its end, or both."""

    id: str
    token: int | None = None
    text: str = ""
    """What the answer's text grew by. It lags behind the tokens where characters or stop texts are not complete."""
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    finished: str | None = None
    """stop (an end token or a stop text), length (max_tokens), cancelled, or error."""
    error: str = ""
    """Why no token could be chosen; other requests go on."""


@dataclass
class Answer:
    """A finished request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: str = ""
    """As `Event.finished`."""
    error: str = ""
    """As `Event.error`."""
    logprobs: list[float] = field(default_factory=list)


@dataclass(eq=False)
class _Request:
    id: str
    prompt: list[int]
    sampling: Sampling
    seed: int
    detokenizer: Detokenizer | None
    answer: list[int] = field(default_factory=list)
    held: Held = field(default_factory=Held)
    number: int = 0
    tokens: list[int] = field(default_factory=list)
    """Prompt and answer."""
    keys: list[Key] = field(default_factory=list)
    """What its full pages hold or would hold, for as many as were asked for."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    def append(self, token: int) -> None:
        """One more token of the answer."""
        self.answer.append(token)
        self.tokens.append(token)

    @property
    def left(self) -> int:
        """Tokens that are known and not yet stored."""
        return len(self.tokens) - self.held.tokens

    def draw(self) -> float:
        """A uniform number for the next token, a function of the seed and the token's position."""
        return random.Random(f"{self.seed}/{len(self.answer)}").random()


@dataclass
class Counters:
    """What an engine has done so far."""

    requests: int = 0
    prompt_tokens: int = 0
    """Tokens of prompts whose keys were computed, again after a preemption."""
    shared_tokens: int = 0
    """Tokens of prompts whose keys were found in the cache."""
    answer_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Drafted ones that turned out right."""
    preemptions: int = 0
    steps: int = 0
    busy_seconds: float = 0.0


class Engine:
    """Answers requests with a model.

    Args:
        model: on its device, in evaluation mode; `GPT.invariant` as it is now.
        tokenizer: for prompts that are text and for the text of answers; None for tokens alone.
        memory: bytes for keys and values, at most.
        page_size: tokens a page of the cache.
        step_tokens: most tokens of a step. More of them read prompts faster and let answers wait longer.
        running: most requests that are read or answered at the same time.
        waiting: most requests that wait; one more is a `QueueFullError`.
        share: whether requests with a common beginning share its pages.
        draft: most tokens a step that are guessed for each answer, and checked by the same forward pass: what followed
            the last `ngram` tokens where they stood before ("prompt lookup decoding", Saxena, 2023). The tokens of an
            answer are those of `draft=0`.
        ngram: how many tokens must agree for a guess.
        cache_dtype: of keys and values; None for the weights' dtype. `torch.int8` and `torch.float8_e4m3fn` store them
            in 8 bits with a scale for each token and head: about half of the memory of 16 bits, and other answers.
        max_model_len: most tokens of a prompt and its answer; None: as many as the model was trained to read
            (`GPTConfig.max_positions`). More may be asked for. Memory may hold fewer.
        graphs: on a GPU, whether steps that add one token to each request are captured as CUDA graphs; a page is set
            apart for them.

    Not safe for use by several threads, but that `add` and `cancel` may be called while another thread steps.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        *,
        memory: int = 2**30,
        page_size: int = 16,
        step_tokens: int = 512,
        running: int = 64,
        waiting: int = 1024,
        share: bool = True,
        draft: int = 0,
        ngram: int = 3,
        cache_dtype: torch.dtype | None = None,
        max_model_len: int | None = None,
        graphs: bool = True,
    ) -> None:
        check_type("model", model, GPT)
        for name, value, least in (
            ("memory", memory, 0), ("page_size", page_size, 1), ("step_tokens", step_tokens, 1),
            ("running", running, 1), ("waiting", waiting, 1), ("draft", draft, 0),
            ("ngram", ngram, 1), ("max_model_len", max_model_len, 1),
        ):  # fmt: skip
            if value is not None or name != "max_model_len":
                check_int(name, value, least, bits=63 if name == "memory" else 31)
        check_bool("graphs", graphs)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.step_tokens, self.running_limit, self.waiting_limit = step_tokens, running, waiting
        self.draft, self.ngram = draft, ngram
        weight = model.embedding.weight
        stored = cache_dtype or weight.dtype
        if stored not in (weight.dtype, *STORED):
            raise ValueError(f"cache_dtype: got {stored}, want {names(*STORED)}, or None for {names(weight.dtype)}")
        per_page = PagedCache.bytes_per_page(model.config, page_size, stored)
        spare = graphs and DecodeGraphs.reason_against(model) is None
        pages = memory // per_page - spare
        if pages < 1:
            raise ValueError(
                f"memory: got {memory} bytes, want at least {per_page * (1 + spare)}: "
                f"{1 + spare} pages of {page_size} tokens"
            )
        self.cache = PagedCache(model.config, pages, page_size, stored, weight.device, share=share, spare=spare)
        limits = {
            pages * page_size: "which the cache's memory holds",
            max_model_len or model.config.max_positions or pages * page_size: "the most that the model may read",
        }
        self.max_model_len = min(limits)
        """Most tokens of a prompt and its answer, by `max_model_len`, by the model and by memory."""
        self._why_not_more = limits[self.max_model_len]
        self._graphs = DecodeGraphs(model, self.cache, running) if spare else None
        self._program: DecoderProgram | None = None
        if DecoderProgram.reason_against(model) is None:
            self._program = DecoderProgram(model, self.cache, step_tokens)
        self.counters = Counters()
        self._arrived: deque[_Request] = deque()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._cancelled: set[str] = set()
        self._numbers = itertools.count()
        self._ids: set[str] = set()
        self._weights = _versions(model)

    # Requests

    def add(self, prompt: str | Sequence[int], sampling: Sampling | None = None, id: str | None = None) -> str:
        """Queue a request; returns its id.

        Raises:
            ValueError: for an empty prompt, a token outside the vocabulary, a request of more than `max_model_len`
                tokens, text without a tokenizer, an id that is in use.
            QueueFullError: where too many requests wait.
            RuntimeError: where a weight of the model, or its `invariant`, was changed since the engine was made.
        """
        if _versions(self.model) != self._weights:
            raise RuntimeError(
                "the model's weights, or its `invariant`, have changed since this engine was made, whose cached keys, "
                "packed weights and graphs are those of the old ones: make a new Engine"
            )
        sampling = sampling or Sampling()
        check_type("sampling", sampling, Sampling)
        tokens = self._tokens(prompt)
        if len(tokens) + sampling.max_tokens > self.max_model_len:
            raise ValueError(
                f"prompt: got {len(tokens)} tokens and max_tokens = {sampling.max_tokens}, "
                f"want at most {self.max_model_len} in all, {self._why_not_more}"
            )
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: got texts, want none without a tokenizer")
        C = self.model.config.vocab_size
        if not all(0 <= token < C for token in sampling.stop_tokens):
            raise ValueError(f"stop_tokens: got {sampling.stop_tokens!s:.100}, want tokens 0 … {C - 1}")
        if len(self._waiting) + len(self._arrived) >= self.waiting_limit:
            raise QueueFullError(f"{self.waiting_limit} requests wait already")
        number = next(self._numbers)
        id = f"request-{number}" if id is None else id
        if id in self._ids:
            raise ValueError(f"id: got {id!r}, want one that no unfinished request has")
        seed = random.SystemRandom().getrandbits(63) if sampling.seed is None else sampling.seed
        detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, sampling.stop)
        self._ids.add(id)
        self._arrived.append(_Request(id, tokens, sampling, seed, detokenizer, number=number))
        return id

    def cancel(self, id: str) -> None:
        """End a request at the next step; an unknown id is ignored."""
        if id in self._ids:
            self._cancelled.add(id)

    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._ids)

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        return len(self._running), len(self._waiting) + len(self._arrived)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Answer]:
        """The answers to all prompts, which are run together, in their order; events of other requests are lost.

        A prompt that is refused cancels those before it.
        """
        check_type("prompts", prompts, list, tuple)
        each = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"sampling: got {len(each)}, want one for each of {len(prompts)} prompts")
        answers: dict[str, Answer] = {}
        left = deque(zip(prompts, each, strict=True))
        try:
            while left or not self._ids.isdisjoint(answers):
                while left and self.load[1] < self.waiting_limit:
                    answers[self.add(*left.popleft())] = Answer()
                for event in self.step():
                    if event.id in answers:
                        _note(answers[event.id], event)
        finally:
            for id in answers:
                self.cancel(id)
        return list(answers.values())

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Iterator[Event]:
        """The events of one request as they come; those of other requests are lost. Closing the iterator cancels it."""
        id = self.add(prompt, sampling)
        try:
            while id in self._ids:
                yield from (event for event in self.step() if event.id == id)
        finally:
            if id in self._ids:
                self.cancel(id)
                self.step()

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt: got text, want tokens: the engine has no tokenizer")
            prompt = self.tokenizer.encode(prompt)
        try:
            tokens = [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(f"prompt: got {type(prompt).__name__}, want text, or a list of int, the tokens") from None
        C = self.model.config.vocab_size
        if not tokens:
            raise ValueError("prompt: got no token, want at least one")
        if not 0 <= min(tokens) <= max(tokens) < C:
            raise ValueError(f"prompt: got tokens {min(tokens)} … {max(tokens)}, want 0 … {C - 1}")
        return tokens

    # Steps

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass over the requests that can go on; returns their events, none where there is no request."""
        begin = time.perf_counter()
        events = self._admit()
        batch = self._schedule()
        if batch:
            events += self._forward(batch)
            self.counters.steps += 1
            self.counters.busy_seconds += time.perf_counter() - begin
        return events

    def _admit(self) -> list[Event]:
        """Take in what has arrived, and end what was cancelled."""
        # Taken first: a request is added before it is cancelled, so that all of these are found below.
        cancelled = [self._cancelled.pop() for _ in range(len(self._cancelled))]
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
            self.counters.requests += 1
        events = []
        for id in cancelled:
            for request in (*self._running, *self._waiting):
                if request.id == id:
                    if request in self._waiting:
                        self._waiting.remove(request)
                    events.append(self._finish(request, Event(id, finished="cancelled")))
        for request in [x for x in self._waiting if x.sampling.max_tokens == 0]:
            self._waiting.remove(request)
            events.append(self._finish(request, Event(request.id, finished="length")))
        return events

    def _schedule(self) -> list[tuple[_Request, int, list[int]]]:
        """Who goes on in this step: requests, how many of their known tokens, and what is guessed to follow."""
        batch: list[tuple[_Request, int, list[int]]] = []
        budget = self.step_tokens
        # Answers first, in the order of arrival; then prompts.
        order = sorted(self._running, key=lambda x: (x.left > 1, x.number))
        for later, request in zip(range(len(order) - 1, -1, -1), order, strict=True):
            if request not in self._running or budget < 1:  # preempted meanwhile
                continue
            count = min(request.left, budget)
            # Guesses leave a token for each request behind.
            guess = self._guess(request, budget - count - later) if count == request.left else []
            if not self._make_room(request, count, guess, batch):
                continue
            batch.append((request, count, guess))
            budget -= count + len(guess)
        while budget > 0 and self._waiting and len(self._running) < self.running_limit:
            request = self._waiting[0]
            self.cache.adopt(request.held, request.tokens, request.keys)
            # Admitted only where its whole prompt has room, so that it does not have to leave at once.
            if self.cache.needed(request.held, len(request.tokens) + 1) > self.cache.available():
                self.cache.truncate(request.held, 0)
                break
            self.counters.shared_tokens += request.held.tokens
            self._running.append(self._waiting.popleft())
            count = min(request.left, budget)
            self.cache.reserve(request.held, request.held.tokens + count)
            batch.append((request, count, []))
            budget -= count
        return batch

    def _make_room(
        self, request: _Request, count: int, guess: list[int], batch: list[tuple[_Request, int, list[int]]]
    ) -> bool:
        """Pages for a request's new tokens, if need be those of requests that came later; False where it must leave."""
        total = request.held.tokens + count
        if self.cache.needed(request.held, total + len(guess)) > self.cache.available():
            guess.clear()
        while self.cache.needed(request.held, total) > self.cache.available():
            scheduled = {id(other) for other, _, _ in batch}
            last = max((x for x in self._running if id(x) not in scheduled), key=lambda x: x.number)
            self._preempt(last)
            if last is request:
                return False
        self.cache.reserve(request.held, total + len(guess))
        return True

    def _preempt(self, request: _Request) -> None:
        self.cache.truncate(request.held, 0)
        request.held = Held()
        self._running.remove(request)
        later = next((n for n, x in enumerate(self._waiting) if x.number > request.number), len(self._waiting))
        self._waiting.insert(later, request)
        self.counters.preemptions += 1

    def _guess(self, request: _Request, room: int) -> list[int]:
        """What followed the last tokens where they stood before, the latest time."""
        most = min(self.draft, room, request.sampling.max_tokens - len(request.answer) - 1)
        tokens = request.tokens
        if most < 1 or len(tokens) <= self.ngram:
            return []
        last = tokens[-self.ngram :]
        for start in range(len(tokens) - self.ngram - 1, -1, -1):
            if tokens[start] == last[0] and tokens[start : start + self.ngram] == last:
                return tokens[start + self.ngram : start + self.ngram + most]
        return []

    def _forward(self, batch: list[tuple[_Request, int, list[int]]]) -> list[Event]:
        device = self.model.embedding.weight.device
        fed: list[int] = []
        lengths: list[int] = []
        rows: list[int] = []
        ends: list[int] = []
        """Where a request's logits begin among those that are made, for those whose known tokens end in this step."""
        for request, count, guess in batch:
            start = request.held.tokens
            done = count == request.left
            new = request.tokens[start : start + count] + guess
            if done:
                ends.append(len(rows))
                last = len(fed) + count - 1
                rows += range(last, last + 1 + len(guess))
            fed += new
            lengths.append(len(new))
        held = [request.held for request, _, _ in batch]
        logits = best = None
        # Both compute in the weights' dtype.
        graphs, program = (None, None) if torch.is_autocast_enabled(device.type) else (self._graphs, self._program)
        if graphs is not None and len(rows) == len(fed) == len(batch):
            logits, likeliest = graphs.step(held, fed)
            best = likeliest.tolist()
        else:
            self.cache.begin(held, lengths, device)
            if program is not None and len(rows) == len(fed) <= program.most_answers:
                best = program.likeliest(fed)
                if not all(request.sampling.plain for request, _, _ in batch):
                    logits = program.answers(len(fed))
            elif program is not None:
                hidden = program.hidden(fed)
            else:
                hidden = self.model(torch.tensor(fed, device=device), lengths, cache=self.cache)
            if rows and best is None:
                wanted = hidden if len(rows) == len(fed) else hidden[torch.tensor(rows, device=device)]
                logits = (self.model if program is None else program).logits(wanted)
                largest = logits.argmax(-1, keepdim=True)
                finite = logits.gather(-1, largest).isfinite()
                best = torch.where(finite, largest, -1 - largest).flatten().tolist()
        events: list[Event] = []
        starts = iter(ends)
        for request, count, guess in batch:
            self.counters.prompt_tokens += max(0, min(len(request.prompt) - request.held.tokens, count))
            if count < request.left:
                self.cache.stored(request.held, request.tokens[: request.held.tokens + count], request.keys)
                continue
            assert best is not None
            events += self._answer(request, guess, logits, best, next(starts))
        return events

    def _answer(
        self, request: _Request, guess: list[int], logits: Tensor | None, best: list[int], row: int
    ) -> list[Event]:
        """Choose tokens for as long as the guess was right; store what was computed for them.

        `logits` are for a request that does not just take the likeliest tokens; `best` is negative where the largest is
        infinite or NaN, which ends the request.
        """
        events: list[Event] = []
        known = len(request.tokens)
        for n in range(len(guess) + 1):
            try:
                chosen = _choose(request, logits, best, row + n)
            except ValueError as error:  # what was computed is not stored for others
                rest = "" if request.detokenizer is None else request.detokenizer.finish()[0]
                events.append(Event(request.id, text=rest, finished="error", error=str(error)))
                self._finish(request, events[-1])
                return events
            request.append(chosen.token)
            self.counters.answer_tokens += 1
            events.append(self._event(request, chosen))
            if events[-1].finished or n == len(guess) or chosen.token != guess[n]:
                break
        accepted = len(events) - 1
        self.counters.drafted_tokens += len(guess)
        self.counters.accepted_tokens += accepted
        valid = known + accepted
        self.cache.stored(request.held, request.tokens[:valid], request.keys)
        self.cache.truncate(request.held, valid)
        if events[-1].finished:
            self._finish(request, events[-1])
        return events

    def _event(self, request: _Request, chosen: Chosen) -> Event:
        event = Event(request.id, chosen.token, "", chosen.logprob, chosen.likeliest)
        sampling = request.sampling
        ends = set(sampling.stop_tokens)
        if not sampling.ignore_end and self.tokenizer is not None:
            ends |= set(self.tokenizer.end_tokens)
        if chosen.token in ends:
            event.finished = "stop"
        elif request.detokenizer is not None:
            event.text, stopped = request.detokenizer.add(chosen.token)
            event.finished = "stop" if stopped else None
        if event.finished is None and len(request.answer) >= sampling.max_tokens:
            event.finished = "length"
        if event.finished is not None and request.detokenizer is not None:
            rest, stopped = request.detokenizer.finish()
            event.text += rest
            event.finished = "stop" if stopped else event.finished
        return event

    def _finish(self, request: _Request, event: Event) -> Event:
        self.cache.truncate(request.held, 0)
        if request in self._running:
            self._running.remove(request)
        self._ids.discard(request.id)
        self._cancelled.discard(request.id)
        return event


def _choose(request: _Request, logits: Tensor | None, best: list[int], row: int) -> Chosen:
    """The next token. Raises ValueError where the largest logit is infinite or NaN."""
    if best[row] < 0:
        raise ValueError(
            f"logits of token {len(request.answer)} of the answer: got a largest one that is infinite or NaN, want a "
            "finite one; numbers beyond the dtype's range (fp16) or damaged weights may be the cause"
        )
    if request.sampling.plain:
        return Chosen(best[row], None, ())
    assert logits is not None
    return choose(logits[row], request.sampling, request.prompt, request.answer, request.draw())


def _note(answer: Answer, event: Event) -> None:
    if event.token is not None:
        answer.tokens.append(event.token)
    if event.logprob is not None:
        answer.logprobs.append(event.logprob)
    answer.text += event.text
    answer.finished = event.finished or answer.finished
    answer.error = event.error or answer.error


def _versions(model: GPT) -> list[tuple[int, int]]:
    """Whether the model is invariant; address of each weight, and how often it was written to."""
    weights = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in model.parameters()]
    return [(int(model.invariant), 0), *weights]
