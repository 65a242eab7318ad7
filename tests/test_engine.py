"""The engine: answers are those of one request alone, whatever is batched, shared, chunked, guessed or preempted."""

import hashlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keyspan.inference import generate
from keyspan.inference.engine import Engine, QueueFullError
from keyspan.inference.pages import Held, PagedCache, PagePool
from keyspan.inference.sampling import Sampling, choose
from keyspan.inference.tokenizer import ByteTokenizer, Detokenizer
from keyspan.models import GPT, GPTConfig, gpt

CONFIGS = {
    "plain": GPTConfig(vocab_size=29, dim=32, layers=2, heads=4, kv_heads=2, embedding_std=1.0),
    "untied": GPTConfig(vocab_size=29, dim=32, layers=2, heads=4, kv_heads=2, embedding_std=1.0, tie_embeddings=False),
    "windows": GPTConfig(vocab_size=29, dim=32, layers=3, heads=4, kv_heads=2, embedding_std=1.0, windows=(6, None, 6)),
    "all windows": GPTConfig(vocab_size=29, dim=32, layers=2, heads=4, embedding_std=1.0, windows=(5, 9)),
}


def model(name="plain") -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIGS[name]).eval()


def pages(count: int, config: GPTConfig = CONFIGS["plain"], size: int = 4) -> int:
    """Memory for so many pages."""
    return count * PagedCache.bytes_per_page(config, size, torch.float32)


def draw(seed: int, *lengths: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(29) for _ in range(n)] for n in lengths]


def greedy(net: GPT, prompt: list[int], count: int) -> list[int]:
    return generate(net, [prompt], count, temperature=0)[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("step_tokens", [1, 7, 512])
@pytest.mark.parametrize("draft", [0, 3])
def test_answers_are_those_of_each_prompt_alone(name, step_tokens, draft):
    net = model(name)
    prompts = [*draw(0, 3, 17, 1, 9), [5, 6, 7] * 6]
    engine = Engine(net, memory=pages(64, net.config), page_size=4, step_tokens=step_tokens, draft=draft, ngram=2)
    answers = engine.generate(prompts, Sampling(max_tokens=12))
    assert [x.tokens for x in answers] == [greedy(net, prompt, 12) for prompt in prompts]
    assert {x.finished for x in answers} == {"length"}
    assert engine.counters.answer_tokens == 60
    assert not engine.busy()
    assert engine.cache.available() == engine.cache.pages, "every page is given back"


def test_guesses_are_made_and_accepted():
    net = model()
    prompt = draw(1, 6)[0]
    repeated = prompt + greedy(net, prompt, 30)  # greedy answers of so small a model run in circles
    engine = Engine(net, memory=pages(64), page_size=4, draft=4, ngram=2)
    plain = Engine(net, memory=pages(64), page_size=4)
    want, got = (e.generate([repeated], Sampling(max_tokens=30))[0] for e in (plain, engine))
    assert got == want
    assert engine.counters.accepted_tokens > 5
    assert engine.counters.steps < plain.counters.steps


def test_a_common_beginning_is_computed_once():
    net = model()
    start = draw(2, 22)[0]
    prompts = [start + tail for tail in draw(3, 3, 1, 6)]
    engine = Engine(net, memory=pages(64), page_size=4)
    first = engine.generate(prompts[:1], Sampling(max_tokens=5))
    rest = engine.generate(prompts[1:], Sampling(max_tokens=5))
    assert engine.counters.shared_tokens == 2 * 20  # full pages of four
    assert [x.tokens for x in first + rest] == [greedy(net, prompt, 5) for prompt in prompts]
    alone = Engine(net, memory=pages(64), page_size=4, share=False)
    assert [x.tokens for x in alone.generate(prompts, Sampling(max_tokens=5))] == [x.tokens for x in first + rest]
    assert alone.counters.shared_tokens == 0


@pytest.mark.parametrize("stored", [None, torch.int8])
def test_nobody_writes_to_a_shared_page(stored):
    """What copy on write is for: only full pages are shared, and each request writes its next tokens to its own."""
    net = model()
    start = draw(2, 22)[0]
    engine = Engine(net, memory=pages(64), page_size=4, draft=2, cache_dtype=stored)

    def bits(table):
        slots = [4 * page + n for page in table for n in range(4)]
        storages = [x for layer in range(2) for x in engine.cache.storage(layer) if x is not None]
        return [x.view(torch.uint8)[:, slots].clone() for x in storages]

    engine.add([*start, 3], Sampling(max_tokens=12, ignore_end=True))
    while not (engine._running and engine._running[0].held.tokens > 24):
        engine.step()
    first = engine._running[0].held
    shared = first.tables[None][:5]
    before = bits(shared)
    for tail in ([3], [4, 5], []):  # the same, another end, and an end within what is shared
        engine.add([*start[: 22 if tail else 20], *tail], Sampling(max_tokens=12, ignore_end=True))
    tables = []
    while engine.busy():
        engine.step()
        tables += [list(x.held.tables[None]) for x in engine._running]
        assert all(map(torch.equal, bits(shared), before))
    others = [table for table in tables if table[: len(shared)] == shared]
    assert len({tuple(table[5:6]) for table in others if len(table) > 5}) >= 3, "several requests go on behind them"


def test_pages_of_a_waiting_request_are_hashed_once(monkeypatch):
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))
    engine = Engine(model(), memory=pages(12), page_size=4)
    engine.add(draw(0, 8)[0], Sampling(max_tokens=30))
    engine.add(draw(1, 40)[0], Sampling(max_tokens=2))
    while engine.load != (1, 1):
        engine.step()
    for _ in range(8):
        engine.step()
    assert engine.load == (1, 1), "the second has no room"
    assert len(hashed) == len(set(hashed))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_lost_when_pages_run_out(name):
    net = model(name)
    prompts = draw(4, 9, 13, 6, 11, 8)
    engine = Engine(net, memory=pages(9, net.config), page_size=4, step_tokens=16)
    answers = engine.generate(prompts, Sampling(max_tokens=20))
    assert [x.tokens for x in answers] == [greedy(net, prompt, 20) for prompt in prompts]
    if name == "plain":
        assert engine.counters.preemptions > 0
    assert engine.cache.available() == 9


def test_pages_behind_a_window_are_given_back():
    net = model("all windows")
    engine = Engine(net, memory=pages(64, net.config), page_size=4, share=False)
    id = engine.add(draw(5, 40)[0], Sampling(max_tokens=3))
    while engine.load != (1, 0) or engine._running[0].held.tokens < 40:
        engine.step()
    held = engine._running[0].held
    assert sum(page >= 0 for page in held.tables[5]) <= 3
    assert sum(page >= 0 for page in held.tables[9]) <= 4
    engine.cancel(id)
    assert [event.finished for event in engine.step()] == ["cancelled"]
    assert engine.cache.available() == 64


@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_take_no_more_memory_than_is_given(name, stored):
    """Nor do they move to other memory while requests come and go."""
    for memory in (pages(9, CONFIGS[name]), pages(9, CONFIGS[name]) + 100):
        engine = Engine(model(name), memory=memory, page_size=4, cache_dtype=stored)
        tensors = [x for n in range(CONFIGS[name].layers) for x in engine.cache.storage(n) if x is not None]
        taken = sum(x.nbytes for x in tensors)
        assert memory - PagedCache.bytes_per_page(CONFIGS[name], 4, stored or torch.float32) < taken <= memory
        places = [x.data_ptr() for x in tensors]
        engine.generate(draw(4, 9, 13, 6, 11, 8), Sampling(max_tokens=20))
        kept = [x for n in range(CONFIGS[name].layers) for x in engine.cache.storage(n) if x is not None]
        assert [(x.data_ptr(), x.nbytes) for x in kept] == [(p, x.nbytes) for p, x in zip(places, tensors, strict=True)]


def test_a_step_reads_prompts_and_writes_answers_in_one_attention_call_a_layer(monkeypatch):
    net = model()
    net.backend = "chunked"  # so that it runs layer by layer
    engine = Engine(net, memory=pages(64), page_size=4, step_tokens=10)
    calls = []
    attend = gpt.attention
    monkeypatch.setattr(gpt, "attention", lambda q, *a, **k: calls.append(q.shape[1]) or attend(q, *a, **k))
    engine.add(draw(0, 3)[0], Sampling(max_tokens=9))
    engine.step()
    calls.clear()
    engine.add(draw(1, 25)[0], Sampling(max_tokens=2))
    events = [engine.step() for _ in range(3)]
    assert calls == [10, 10, 10, 10, 8, 8], "each of two layers once: one new token, and 9 + 9 + 7 of the prompt"
    assert [len(some) for some in events] == [1, 1, 2]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_arrivals_lengths_cancels_and_memory(data):
    net = model(data.draw(st.sampled_from(sorted(CONFIGS))))
    engine = Engine(
        net, memory=pages(data.draw(st.integers(12, 30)), net.config), page_size=4,
        step_tokens=data.draw(st.integers(3, 40)), running=data.draw(st.integers(1, 5)),
        share=data.draw(st.booleans()), draft=data.draw(st.sampled_from([0, 3])), ngram=1,
    )  # fmt: skip
    start = draw(6, 12)[0]
    wanted, got, cancelled, ended = {}, {}, set(), {}
    for n in range(data.draw(st.integers(1, 7))):
        prompt = start[: data.draw(st.integers(0, 12))] + draw(n, data.draw(st.integers(1, 12)))[0]
        heat = data.draw(st.sampled_from([0.0, 12.0]))
        sampling = Sampling(max_tokens=data.draw(st.integers(1, 12)), temperature=heat, seed=n)
        wanted[engine.add(prompt, sampling, id=str(n))] = (prompt, sampling)
        got[str(n)] = []
        for _ in range(data.draw(st.integers(0, 4))):
            for event in engine.step():
                got[event.id] += [] if event.token is None else [event.token]
                ended[event.id] = event.finished or ended.get(event.id)
        if data.draw(st.booleans()):
            cancelled.add(str(n))
            engine.cancel(str(n))
    while engine.busy():
        for event in engine.step():
            got[event.id] += [] if event.token is None else [event.token]
            ended[event.id] = event.finished or ended.get(event.id)
    for id, (prompt, sampling) in wanted.items():
        want = greedy(net, prompt, sampling.max_tokens)
        if sampling.temperature:
            want = Engine(net, memory=pages(64, net.config), page_size=4).generate([prompt], sampling)[0].tokens
        assert got[id] == want[: len(got[id])]
        assert ended[id] in ({"cancelled", "length"} if id in cancelled else {"length"})
        assert id in cancelled or got[id] == want
    assert engine.cache.available() == engine.cache.pages


def test_a_seeded_answer_does_not_depend_on_what_else_runs():
    net, prompts = model(), draw(7, 5, 8, 3)
    hot = {"max_tokens": 10, "temperature": 12.0}  # the logits of this small model are large
    each = [Sampling(**hot, top_k=9, top_p=0.9, seed=n, presence_penalty=0.5) for n in range(3)]
    together = Engine(net, memory=pages(64), page_size=4, step_tokens=5).generate(prompts, each)
    alone = [
        Engine(net, memory=pages(64), page_size=4).generate([prompt], one)[0]
        for prompt, one in zip(prompts, each, strict=True)
    ]
    assert together == alone
    guessed = Engine(net, memory=pages(64), page_size=4, draft=3, ngram=1).generate(prompts, each)
    assert guessed == alone
    other = Engine(net, memory=pages(64), page_size=4).generate(prompts[:1], Sampling(**hot))
    assert other[0].tokens != alone[0].tokens


def test_log_probabilities_are_the_models_own():
    net, prompt = model(), draw(8, 6)[0]
    engine = Engine(net, memory=pages(64), page_size=4)
    answer = engine.generate([prompt], Sampling(max_tokens=3, logprobs=2, temperature=0.7, seed=1))[0]
    tokens = torch.tensor(prompt + answer.tokens)
    want = net.logits(net(tokens, [len(tokens)])).log_softmax(-1)[len(prompt) - 1 : -1]
    want = want.gather(1, tokens[len(prompt) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), want, rtol=1e-4, atol=1e-5)


def test_choose_draws_from_the_distribution():
    logits = torch.tensor([0.0, 2.0, 1.0, -3.0])
    drawn = [choose(logits, Sampling(temperature=1.0), [], [], (n + 0.5) / 4000).token for n in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=1e-3)
    for limit, kept in (
        ({"min_p": 0.3}, {1, 2}),
        ({"top_p": 0.6}, {1}),
        ({"top_p": 0.7}, {1, 2}),
        ({"top_p": 0.95, "top_k": 2}, {1, 2}),
        ({"top_k": 3, "min_p": 0.2}, {1, 2}),
    ):
        few = [choose(logits, Sampling(temperature=1.0, **limit), [], [], (n + 0.5) / 100).token for n in range(100)]
        assert set(few) == kept, limit
    assert choose(logits, Sampling(temperature=1e-4), [], [], 0.999).token == 1
    assert choose(logits, Sampling(temperature=1.0, top_k=2), [], [], 1 - 1e-12).token == 2
    assert choose(logits, Sampling(repetition_penalty=4.0), [1], [], 0.0).token == 2
    assert choose(logits, Sampling(frequency_penalty=0.6), [1], [1, 1], 0.0).token == 2
    assert choose(logits, Sampling(presence_penalty=0.6), [], [1, 1], 0.0).token == 1
    assert choose(logits, Sampling(presence_penalty=1.1), [], [1], 0.0).token == 2
    assert choose(logits, Sampling(presence_penalty=1.1), [1], [], 0.0).token == 1, "of the prompt nothing is taken off"
    assert choose(logits - 4, Sampling(repetition_penalty=1.6), [1], [], 0.0).token == 2, "negative ones are multiplied"


def test_stop_texts_and_end_tokens():
    class Fixed(GPT):
        """Writes a text, whatever it reads."""

        def logits(self, hidden):
            out = torch.zeros(len(hidden), 300)
            out[:, list(b"abc<end>d")[len(written)]] = 1
            return out

    torch.manual_seed(0)
    net = Fixed(GPTConfig(vocab_size=300, dim=8, layers=1, heads=2))
    for stop, text, finished in (
        (("<end>",), "abc", "stop"),
        (("<endx",), "abc<end>d", "length"),
        ((), "abc<end>d", "length"),
    ):
        engine = Engine(net, ByteTokenizer(), memory=2**20, page_size=4)
        written: list[str] = []
        found = ""
        for event in engine.stream("hello", Sampling(max_tokens=9, stop=stop)):
            written.append(event.text)
            found += event.text
            last = event.finished
        assert (found, last) == (text, finished)
    engine = Engine(net, ByteTokenizer((ord("c"),)), memory=2**20, page_size=4)
    written = []
    events = []
    for event in engine.stream("hello", Sampling(max_tokens=9)):
        written.append(event.text)
        events.append(event)
    assert "".join(x.text for x in events) == "ab"
    assert events[-1].finished == "stop"


def test_detokenizer_holds_incomplete_characters_back():
    d = Detokenizer(ByteTokenizer())
    parts = [d.add(byte)[0] for byte in "aé€".encode()]
    assert parts == ["a", "", "é", "", "", "€"]
    d = Detokenizer(ByteTokenizer(), stop=("<stop>",))
    assert "".join(d.add(byte)[0] for byte in b"x<sto") == "x"
    assert d.finish() == ("<sto", False)


def test_a_stop_text_beside_an_incomplete_character_ends_the_answer():
    class Words(ByteTokenizer):
        """Token 256 is a space and two of the three bytes of a euro sign."""

        def decode(self, tokens):
            return b"".join(b" \xe2\x82" if token == 256 else bytes([token]) for token in tokens).decode(
                errors="replace"
            )

    d = Detokenizer(Words(), stop=(" ",))
    assert d.add(ord("a")) == ("a", False)
    assert d.add(256) == ("", False)
    assert d.finish() == ("", True)
    assert d.finish() == ("", False)


class Slow(Engine):
    """Lets another thread act behind the intake of what has arrived."""

    def _admit(self):
        engine = self

        class Arrived(type(self._arrived)):
            def __bool__(self):
                if not len(self) and engine.late is not None:
                    late, engine.late = engine.late, None
                    late()
                    return False
                return bool(len(self))

        self._arrived = Arrived(self._arrived)
        return super()._admit()


def test_a_request_that_is_added_and_cancelled_during_a_step_is_cancelled():
    engine = Slow(model(), memory=pages(16), page_size=4)
    engine.late = lambda: engine.cancel(engine.add([1, 2], Sampling(max_tokens=20), id="late"))
    events = [event for _ in range(3) for event in engine.step()]
    assert events[-1].finished == "cancelled"
    assert not engine.busy()
    assert engine.cache.available() == 16
    engine.cancel("next")
    engine.add([1, 2], Sampling(max_tokens=1), id="next")
    assert engine.step()[0].finished == "length"


def test_a_refused_prompt_leaves_nothing_behind():
    engine = Engine(model(), memory=pages(16), page_size=4)
    want = engine.generate([[1, 2]], Sampling(max_tokens=3))
    with pytest.raises(ValueError, match="prompt: got no token"):
        engine.generate([[3, 4], []], Sampling(max_tokens=3))
    other = engine.add([5, 6], Sampling(max_tokens=9))
    assert engine.generate([[1, 2]], Sampling(max_tokens=3)) == want
    assert engine._ids == {other}, "a request of others goes on, one of a refused call does not"


def test_guesses_take_no_turn_from_others():
    net = model()
    engine = Engine(net, memory=pages(64), page_size=4, step_tokens=5, draft=3, ngram=1)
    ids = {engine.add([n], Sampling(max_tokens=40)) for n in range(4)}
    engine.step()
    while sum(engine.load) == 4:
        assert {event.id for event in engine.step()} == ids
    assert engine.counters.drafted_tokens > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stop": "END"}, "stop: got 'END', want a tuple, each a str"),
        ({"seed": 10**4000}, "want a number of at most 64 bits"),
    ],
)
def test_sampling_that_would_mislead_or_fail_later_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_pool_evicts_what_is_longest_unused():
    pool = PagePool(2)
    a, b = pool.allocate(), pool.allocate()
    pool.publish(a, b"a")
    pool.publish(b, b"b")
    pool.release(a)
    pool.release(b)
    assert pool.available() == 2
    pool.use(pool.find(b"a"))
    assert pool.available() == 1
    assert pool.allocate() == b
    assert pool.find(b"b") is None
    assert pool.find(b"a") == a


def test_a_model_whose_weights_were_changed_is_refused():
    net = model()
    engine = Engine(net, memory=pages(16))
    engine.generate([[1, 2]], Sampling(max_tokens=2))
    with torch.no_grad():
        net.blocks[1].mlp.w3.weight.mul_(2)
    with pytest.raises(RuntimeError, match="make a new Engine"):
        engine.add([1, 2])
    assert not engine.busy()
    assert Engine(net, memory=pages(16)).generate([[1, 2]], Sampling(max_tokens=2))
    engine = Engine(net, memory=pages(16))
    net.invariant = True
    with pytest.raises(RuntimeError, match="or its `invariant`, have changed"):
        engine.add([1, 2])


def test_requests_longer_than_the_model_was_trained_for_are_refused():
    net = GPT(GPTConfig(vocab_size=61, dim=32, layers=1, heads=2, max_positions=40))
    engine = Engine(net, memory=2**20)
    assert engine.max_model_len == 40
    with pytest.raises(
        ValueError, match="got 30 tokens and max_tokens = 11, want at most 40 in all, the most that the"
    ):
        engine.add([1] * 30, Sampling(max_tokens=11))
    assert len(engine.generate([[1] * 30], Sampling(max_tokens=10))[0].tokens) == 10
    assert Engine(net, memory=2**20, max_model_len=8).max_model_len == 8
    longer = Engine(net, memory=2**20, max_model_len=60)  # asked for
    assert len(longer.generate([[1] * 30], Sampling(max_tokens=30))[0].tokens) == 30
    few = Engine(net, memory=PagedCache.bytes_per_page(net.config, 16, torch.float32), max_model_len=60)
    with pytest.raises(ValueError, match="want at most 16 in all, which the cache's memory holds"):
        few.add([1] * 10, Sampling(max_tokens=7))
    with pytest.raises(ValueError, match="max_model_len: got 0, want an int ≥ 1"):
        Engine(net, max_model_len=0)


def test_a_full_queue_and_wrong_requests_are_refused():
    net = model()
    engine = Engine(net, memory=pages(4), page_size=4, waiting=2)
    for prompt, sampling, message in (
        ([], Sampling(), "prompt: got no token"),
        ([29], Sampling(), r"prompt: got tokens 29 … 29, want 0 … 28"),
        ("text", Sampling(), "prompt: got text, want tokens"),
        ([1] * 10, Sampling(max_tokens=7), "prompt: got 10 tokens and max_tokens = 7, want at most 16 in all"),
        ([1], Sampling(max_tokens=1, stop=("x",)), "stop: got texts, want none without a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, sampling)
    engine.add([1], Sampling(max_tokens=1), id="a")
    with pytest.raises(ValueError, match="id: got 'a'"):
        engine.add([1], Sampling(max_tokens=1), id="a")
    engine.add([1], Sampling(max_tokens=1))
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.add([1], Sampling(max_tokens=1))
    with pytest.raises(ValueError, match="memory: got 10 bytes, want at least"):
        Engine(net, memory=10)
    with pytest.raises(ValueError, match="temperature: got -1"):
        Sampling(temperature=-1)
    assert Held().tokens == 0


@pytest.mark.parametrize("backend", [None, "chunked"])
@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize(
    "options", [{}, {"logprobs": 2}, {"repetition_penalty": 1.5}, {"temperature": 0.8, "seed": 1}], ids=str
)
def test_a_request_whose_logits_are_nan_ends_with_an_error_and_harms_nobody(backend, draft, options):
    torch.manual_seed(0)
    net = GPT(CONFIGS["untied"]).eval()
    with torch.no_grad():
        net.embedding.weight[28] = torch.nan
        net.head.weight[28] = 0  # so that no answer contains it
    net.backend = backend
    prompts = [[1, 2, 3, 1, 2, 3], [4, 28, 5], [6, 7, 8, 6, 7, 8, 9]]

    def make() -> Engine:
        return Engine(net, memory=pages(64, net.config), page_size=4, draft=draft, ngram=2)

    sampling = Sampling(max_tokens=6, **options)
    engine = make()
    answers = engine.generate(prompts, sampling)
    assert (answers[1].tokens, answers[1].finished) == ([], "error")
    assert "infinite or NaN" in answers[1].error
    for n in (0, 2):
        assert answers[n] == make().generate([prompts[n]], sampling)[0]
        assert answers[n].finished == "length"
    assert engine.generate([prompts[0]], sampling)[0] == answers[0], "the engine goes on"
    assert engine.cache.available() == engine.cache.pages, "every page is given back"


def test_penalties_that_leave_no_finite_logit_end_the_request():
    net = model()
    engine = Engine(net, memory=pages(64), page_size=4)
    few = Sampling(max_tokens=3, repetition_penalty=1e-45)
    bad, good = engine.generate([[1, 2, 3], [1, 2, 3]], [few, Sampling(max_tokens=3)])
    assert bad.finished == "error"
    assert "NaN or infinite" in bad.error
    assert good.tokens == greedy(net, [1, 2, 3], 3)
