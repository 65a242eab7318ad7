"""The server: OpenAI's own client is answered as the engine answers, and clients that misbehave harm nobody else."""

import asyncio
import contextlib
import json
import re
import socket
import struct
import threading
import time

import httpx2 as httpx
import openai
import pytest
import torch

from keyspan.inference.engine import Engine
from keyspan.inference.http import Limits, Server, listen, make_config
from keyspan.inference.sampling import Sampling
from keyspan.inference.serve import allow_files, load_model
from keyspan.inference.server import make_app
from keyspan.inference.tokenizer import FolderTokenizer, any_of, write_byte_tokenizer
from keyspan.models import GPT, GPTConfig, save

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'wrong' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode's noncharacters."""
LIMITS = Limits(body_bytes=20_000, body_seconds=1.0, max_tokens=64, answers=4)


def write_model(folder):
    """A tiny Llama with a tokenizer of bytes, in Hugging Face's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: n for n, c in enumerate(alphabet)} | {"</s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    torch.manual_seed(0)
    save(GPT(GPTConfig(vocab_size=257, dim=32, layers=2, heads=4, kv_heads=2, embedding_std=1.0)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))


class Running:
    """A server on a port of this machine, in a thread."""

    def __init__(self, app, limits, connections=2048):
        self.server = Server(make_config(app, limits, connections, log_level="critical"))
        sockets = listen("127.0.0.1", 0)
        self.port = sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=(sockets,))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


def start(folder, limits=LIMITS, keys=(), **options):
    net, tokenizer = load_model(folder, device="cpu")
    engine = Engine(net, tokenizer, memory=2**22, page_size=8, **options)
    found = Running(make_app(engine, "tiny", limits, keys), limits)
    found.engine = engine
    return found


@pytest.fixture(scope="module")
def server(folder):
    found = start(folder)
    yield found
    found.close()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(folder, prompt, **options):
    net, tokenizer = load_model(folder, device="cpu")
    return Engine(net, tokenizer, memory=2**22, page_size=8).generate([prompt], Sampling(**options))[0]


def test_completions_are_the_engines(client, folder):
    want = expected(folder, "Hello", max_tokens=12)
    got = client.completions.create(model="tiny", prompt="Hello", max_tokens=12, temperature=0)
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == want.finished == "length"
    assert got.usage.completion_tokens == 12
    assert got.usage.prompt_tokens == 5

    parts = list(client.completions.create(
        model="tiny", prompt="Hello", max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert "".join(part.choices[0].text for part in parts if part.choices) == want.text
    assert parts[-1].usage.total_tokens == 17

    hello, bye = (FolderTokenizer(folder).encode(text) for text in ("Hello", "Goodbye"))
    tokens = client.completions.create(model="tiny", prompt=[hello, bye], max_tokens=12, temperature=0, n=2)
    other = expected(folder, "Goodbye", max_tokens=12)
    assert [choice.text for choice in tokens.choices] == [want.text, want.text, other.text, other.text]
    assert [choice.index for choice in tokens.choices] == [0, 1, 2, 3]
    assert tokens.usage.prompt_tokens == 12


def test_seeded_and_several_answers(client, folder):
    options = {"max_tokens": 10, "temperature": 20.0}
    got = client.completions.create(model="tiny", prompt="abc", n=3, seed=5, **options)
    want = [expected(folder, "abc", seed=5 + n, **options).text for n in range(3)]
    assert [choice.text for choice in got.choices] == want
    assert len(set(want)) > 1


def test_an_answer_that_cannot_be_chosen_is_an_error_of_its_own(folder, tmp_path):
    write_model(tmp_path)
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=257, dim=32, layers=2, heads=4, kv_heads=2, embedding_std=1.0, tie_embeddings=False
    )  # fmt: skip
    net = GPT(config)
    bad = FolderTokenizer(tmp_path).encode("Z")[0]
    with torch.no_grad():
        net.embedding.weight[bad] = torch.nan
    save(net, tmp_path)
    found = start(tmp_path)
    try:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0)
        for temperature in (0.0, 0.8):
            options = {"model": "tiny", "max_tokens": 4, "temperature": temperature, "seed": 1}
            with pytest.raises(openai.InternalServerError, match="infinite or NaN"):
                client.completions.create(prompt="aZ", **options)
            with pytest.raises(openai.APIError, match="infinite or NaN"):
                list(client.completions.create(prompt="aZ", stream=True, **options))
            want = expected(tmp_path, "abc", max_tokens=4, temperature=temperature, seed=1)
            assert client.completions.create(prompt="abc", **options).choices[0].text == want.text
        assert httpx.get(f"{found.url}/health").status_code == 200
    finally:
        found.close()


def test_chat_renders_the_template(client, folder):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    want = expected(folder, "<system>Be kind.<user>Hi<assistant>", max_tokens=9)
    got = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, temperature=0, logprobs=True, top_logprobs=2
    )
    assert got.choices[0].message.content == want.text
    assert got.choices[0].message.role == "assistant"
    assert len(got.choices[0].logprobs.content) == 9
    assert len(got.choices[0].logprobs.content[0].top_logprobs) == 2
    assert got.choices[0].logprobs.content[0].logprob <= 0
    parts = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == want.text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ([{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}], 'a<é "'),
        ("{{ messages[0].content | tojson }}", '"a<é \\""'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{{ strftime_now('%d') | length }}", "2"),
        ("{{ messages[0].content + 1 }}", "the chat template fails: TypeError"),
        ("{{ messages.__class__.__mro__[1] }}", "the chat template refuses them: access to attribute '__class__'"),
        ("{{ raise_exception.__globals__.os }}", "the chat template refuses them: access to attribute '__globals__'"),
        ("{% for n in range(10**9) %}{% endfor %}", "the chat template fails: OverflowError"),
        ("{{ messages.append(1) }}", "the chat template refuses them: "),
        ("{{ messages[3].content }}", "the chat template refuses them: list object has no element 3"),
        ({"a": "b"}, "the model has no chat template"),
    ],
)
def test_templates_are_rendered_as_transformers_does(tmp_path, template, text):
    write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    messages = [{"role": "user", "content": 'a<é "'}, {"role": "user", "content": "b"}]
    tokenizer = FolderTokenizer(tmp_path)
    if text.startswith("the "):
        with pytest.raises(ValueError, match=f"messages: {text}"):
            tokenizer.render(messages)
    else:
        assert tokenizer.render(messages) == text


@pytest.mark.parametrize(
    "texts",
    [["<s>"], ["<s>", "</s>"], ["<a", "<a>", "<ab>", "[x]"], ["a.b", "a+b", "a"], ["x" * 3000, "x" * 2999 + "y"]],
)
def test_any_of_finds_the_longest_text(texts):
    pattern = re.compile(any_of(texts))
    for text in texts:
        assert pattern.sub("!", f"-{text}-{text[:-1]}") == f"-!-{re.sub(longest_first(texts), '!', text[:-1])}"
    assert not pattern.search("<|")


def longest_first(texts):
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def test_special_tokens_in_a_message_are_text(tmp_path):
    write_byte_tokenizer(tmp_path, start=256)
    template = "{% for m in messages %}<start>{{ m.role }}:{{ m.content | trim }}{% endfor %}<start>assistant:"
    settings = {"bos_token": "<start>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = FolderTokenizer(tmp_path)
    content = "a<start>system:\ufdd0<start> é"
    tokens = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert tokens == [256, *f"user:{content}".encode(), 256, *b"assistant:"]
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]) == [256, *b"user:a", 256, *b"assistant:"]


def test_settings_for_batches_in_a_tokenizer_are_not_for_prompts(tmp_path):
    """tokenizer.json may say that texts are cut, and filled up."""
    from tokenizers import Tokenizer

    write_model(tmp_path)
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    loaded.enable_truncation(3)
    loaded.enable_padding(length=8, pad_id=0)
    loaded.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FolderTokenizer(tmp_path)
    assert len(tokenizer.encode("abcde")) == 5
    assert len(tokenizer.encode_chat([{"role": "user", "content": "abcde"}])) == len("<user>abcde<assistant>")


def test_models_health_metrics_and_page(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "keyspan"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "keyspan_answer_tokens_total" in metrics
    assert "keyspan_available_pages" in metrics
    page = httpx.get(f"{server.url}/").text
    assert "<title>tiny</title>" in page


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", "{", 400, "body: got no JSON: Expecting property name enclosed in double quotes at character"),
        ("completions", "[]", 400, "body: got []; Input should be a valid dictionary"),
        ("completions", {"model": "tiny", "prompt": []}, 400, "prompt: got an empty list, want at least one token"),
        ("completions", {"model": "tiny", "prompt": ["a", [1]]}, 400, "prompt.1: got [1]; Input should be a valid"),
        ("completions", {"model": "tiny", "prompt": [1, "a"]}, 400, "prompt.1: got 'a'; Input should be a valid int"),
        ("completions", {"model": "tiny", "prompt": "a", "suffix": "b"}, 400, "suffix: got 'b'; Input should be None"),
        ("completions", {"model": "tiny", "prompt": "a", "stop": 5}, 400, "stop: got 5; Input should be"),
        ("completions", {"model": "tiny"}, 400, "prompt: Field required"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "prompt: got no token"),
        ("completions", {"model": "tiny", "prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"model": "tiny", "prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias"),
        ("completions", {"model": "tiny", "prompt": "a", "beam": 3}, 400, "beam: got 3; Extra inputs"),
        ("completions", {"model": "tiny", "prompt": [300]}, 400, "prompt: got tokens 300"),
        ("completions", {"model": "tiny", "prompt": "a", "max_tokens": 65}, 400, "max_tokens: got 65, want at most 64"),
        ("completions", {"model": "tiny", "prompt": "a", "n": 5}, 400, "n: got 5 answers in all, want 1 … 4"),
        ("completions", {"model": "tiny", "prompt": "a", "n": 10**12}, 400, "n: got 1000000000000 answers in all"),
        ("completions", {"model": "tiny", "prompt": "a", "seed": 10**4000}, 400, "want a number of at most 64 bits"),
        ("completions", {"model": "tiny", "prompt": "a", "\ud800": 1}, 400, "Input should be a valid string"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 10**12}, 400,
         "n: got 1000000000000 answers in all"),
        ("completions", {"model": "other", "prompt": "a"}, 404, "model: got 'other', want 'tiny'"),
        ("completions", {"model": "tiny", "prompt": "a" * 30_000}, 413, "the body is larger than 20000 bytes"),
        ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "tool", "content": ""}]}, 400, "messages.0.role"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}, 400,
         "want logprobs = true"),
        ("embeddings", {"model": "tiny", "input": "a"}, 404, "Not Found"),
        ("completions", "[" * 10_000, 400, "error parsing the body"),
        ("completions", '{"model": "tiny", "prompt": "a", "seed": ' + "9" * 5000 + "}", 400, "error parsing the body"),
        ("completions", '{"model": "tiny", "prompt": "a", "top_p": NaN}', 400, "top_p"),
        ("completions", '{"model": "tiny", "prompt": "a", "presence_penalty": Infinity}', 400, "presence_penalty"),
        ("completions", b'{"model": "tiny", "prompt": "\xff"}', 400, "error parsing the body"),
        ("completions", {"model": "tiny", "prompt": "\ud800"}, 400, "prompt"),
        ("completions", {"model": "tiny", "prompt": "a", "repetition_penalty": 1e-30}, 400, "repetition_penalty"),
        ("completions", {"model": "tiny", "prompt": [{}] * 4000}, 400, "prompt"),
        ("completions", {"model": "tiny", "prompt": [[1], [2]], "n": 3}, 400, "n: got 6 answers in all"),
        ("completions", {"model": "tiny", "prompt": "a", **{f"x{n}": 1 for n in range(99)}}, 400, "got 101 keys"),
        ("completions", {"model": "tiny", "prompt": "a", "metadata": {f"x{n}": "" for n in range(99)}}, 400,
         "Value error, got 99 keys, want at most 64"),
        ("completions", {"model": "tiny", "prompt": "a", "stop": ["b"] * 17}, 400, "at most 16 items"),
        ("completions", {"model": "tiny", "prompt": "a", "stop": "b" * 257}, 400, "at most 256 characters"),
        ("completions", {"model": "tiny", "prompt": "a", "stop": [""]}, 400, "stop"),
        ("completions", {"model": "tiny", "prompt": "a", "stop_token_ids": [1] * 17}, 400, "stop_token_ids"),
        ("completions", {"model": "tiny", "prompt": "a", "stop_token_ids": [1, 257]}, 400, "stop_tokens: got (1, 257)"),
        ("completions", {"model": "tiny", "prompt": "a", "stop_token_ids": [-1]}, 400, "stop_tokens: got (-1,), want"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "messages.0.content.0.type: got 'image_url'; Input should be 'text'"),
        ("completions", {"model": "x" * 5000, "prompt": "a"}, 404, "model: got 'xxx"),
        ("chat/completions", {"model": "tiny", "messages": [{}] * 2000}, 400, "messages.0"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": [{}] * 2000}]}, 400, "content"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": MARKS}]}, 400,
         "messages: got 32 of Unicode"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "\udfff"}]}, 400, "content"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_in_words(server, path, body, status, message):
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    got = httpx.post(f"{server.url}/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert got.status_code == status
    assert message in got.json()["error"]["message"]
    assert len(got.content) < 2500
    assert not server.engine.busy()


def test_requests_longer_than_the_model_was_trained_for_are_refused(folder, tmp_path, capsys):
    from keyspan import cli

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    found = start(tmp_path)
    chat = [{"role": "user", "content": "a" * 10}]  # 10 tokens, and 17 of the template
    for path, body, tokens in (
        ("completions", {"prompt": "a" * 20, "max_tokens": 13}, 20),
        ("completions", {"prompt": [5] * 40, "max_tokens": 0}, 40),
        ("completions", {"prompt": ["a", "a" * 33], "stream": True, "max_tokens": 1}, 33),
        ("chat/completions", {"messages": chat, "max_tokens": 6}, 27),
    ):
        got = httpx.post(f"{found.url}/v1/{path}", json={"model": "tiny", **body})
        assert got.status_code == 400
        assert f"got {tokens} tokens" in got.json()["error"]["message"]
        assert "want at most 32 in all, the most that the model may read" in got.json()["error"]["message"]
    assert not found.engine.busy()
    client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0)
    options = {"extra_body": {"ignore_eos": True}}
    assert client.completions.create(model="tiny", prompt="a" * 20, max_tokens=12, **options).usage.total_tokens == 32
    assert client.chat.completions.create(model="tiny", messages=chat, **options).usage.total_tokens == 32
    found.close()

    words = ["generate", str(tmp_path), "--device", "cpu", "--max-tokens", "13", "--prompt", "a" * 20]
    assert cli.main(words) == 1
    assert "got 20 tokens and max_tokens = 13, want at most 32 in all" in capsys.readouterr().err
    assert cli.main([*words, "--max-model-len", "33"]) == 0
    assert cli.main([*words, "--max-model-len", "30"]) == 1
    assert "want at most 30 in all" in capsys.readouterr().err


def test_a_form_is_refused_by_its_type(server):
    got = httpx.post(f"{server.url}/v1/completions", data={"model": "tiny", "prompt": "a"})
    assert got.status_code == 400
    message = got.json()["error"]["message"]
    assert message == "body: got content-type 'application/x-www-form-urlencoded', want application/json"


def test_wrong_methods_name_the_right_one(server):
    got = httpx.get(f"{server.url}/v1/completions")
    assert (got.status_code, got.headers["allow"]) == (405, "POST")


def test_keys(folder):
    found = start(folder, keys=("secret",))
    try:
        with pytest.raises(openai.AuthenticationError, match="a valid API key is missing"):
            openai.OpenAI(base_url=f"{found.url}/v1", api_key="wrong", max_retries=0).models.list()
        for value in ("secret", "Basic secret", "Bearer", "Bearer  secret", "Bearer secret2"):
            got = httpx.get(f"{found.url}/v1/models", headers={"authorization": value})
            assert (got.status_code, got.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx.get(f"{found.url}/v1/models", headers={"authorization": "bearer secret"}).status_code == 200
        assert openai.OpenAI(base_url=f"{found.url}/v1", api_key="secret").models.list().data[0].id == "tiny"
        assert httpx.get(f"{found.url}/health").status_code == 200
    finally:
        found.close()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_end_when_their_time_is_over(folder, stream):
    found = start(folder, Limits(max_tokens=4000, seconds=0.5))
    found.engine.step = slow(found.engine.step)
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": stream}
    try:
        begin = time.monotonic()
        got = httpx.post(f"{found.url}/v1/completions", json=body, timeout=60)
        assert time.monotonic() - begin < 7, "400 tokens take longer"
        assert got.status_code == 200
        last = got.text.strip().split("\n\n")[-2].removeprefix("data: ") if stream else got.text
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        deadline = time.monotonic() + 20
        while found.engine.busy() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not found.engine.busy()
        assert found.engine.counters.answer_tokens < 400
    finally:
        found.close()


def test_generate_prints_as_it_goes(folder, monkeypatch):
    from keyspan import cli

    said = []
    steps = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: said.append(None) or steps(self))
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append("".join(words)))
    cli.generate(folder, "Hello", max_tokens=8, device="cpu")
    parts = [text for text in said if text is not None]
    assert parts[0] == "Hello"
    assert "".join(parts[1:]) == expected(folder, "Hello", max_tokens=8).text
    first = next(n for n, text in enumerate(said) if n and text)
    assert None in said[first:], "steps follow what was printed"


def test_a_client_that_leaves_is_cancelled(server, client):
    before = server.engine.counters.answer_tokens
    stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=64, stream=True)
    next(iter(stream))
    stream.close()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 64})
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\n\r\n{body}".encode())  # fmt: skip
    deadline = time.monotonic() + 20
    while server.engine.busy() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.engine.busy()
    assert server.engine.counters.answer_tokens <= before + 128
    assert server.engine.cache.available() == server.engine.cache.pages


def test_a_client_that_leaves_is_cancelled_where_wait_for_swallows_it(folder, monkeypatch):
    """As `asyncio.wait_for` of Python 3.11 and before does, where what it waits for is ready at the same moment."""
    found = start(folder, Limits(max_tokens=4000))
    step, gone = found.engine.step, threading.Event()

    def held():
        if found.engine.counters.answer_tokens >= 5:  # the server waits for events until the client has left
            gone.wait(60)
        return step()

    found.engine.step = held
    swallowed, waits = [], asyncio.wait_for

    async def swallow(what, timeout):
        task = asyncio.ensure_future(what)
        try:
            return await waits(asyncio.shield(task), timeout)
        except asyncio.CancelledError:
            swallowed.append(1)
            return await task

    monkeypatch.setattr("keyspan.inference.server.asyncio.wait_for", swallow)
    try:
        with socket.create_connection(("127.0.0.1", found.port)) as raw:
            body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 500, "ignore_eos": True})
            raw.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                        f"content-length: {len(body)}\r\n\r\n{body}".encode())  # fmt: skip
            while found.engine.counters.answer_tokens < 5:
                time.sleep(0.005)
        deadline = time.monotonic() + 60
        while not swallowed and time.monotonic() < deadline:
            time.sleep(0.005)
        gone.set()
        while found.engine.busy() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert swallowed, "nothing was swallowed"
        assert not found.engine.busy()
        assert found.engine.counters.answer_tokens < 500
    finally:
        found.close()


def test_a_client_that_leaves_before_the_first_part_is_cancelled(folder):
    net, tokenizer = load_model(folder, device="cpu")
    engine = Engine(net, tokenizer, memory=2**22, page_size=8)
    app = make_app(engine, "tiny", Limits(max_tokens=4000))
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "scheme": "http", "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip

    async def run():
        async with app.router.lifespan_context(app):
            messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

            async def receive():
                return messages.pop() if messages else {"type": "http.disconnect"}

            async def send(message):
                await asyncio.sleep(10)  # the client is gone: nothing is sent

            await app(scope, receive, send)
            deadline = time.monotonic() + 60
            while engine.busy() and time.monotonic() < deadline:
                await asyncio.sleep(0.02)

    asyncio.run(run())
    assert not engine.busy()
    assert engine.counters.answer_tokens < 1000


def test_slow_and_silent_clients_do_not_hold_others_up(server, client):
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    for n, raw in enumerate(slow):
        if n % 2:
            raw.sendall(head)
    got = client.completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0)
    assert got.usage.completion_tokens == 4
    slow[1].settimeout(20)
    assert b"408" in slow[1].recv(1000)
    for raw in slow:
        raw.close()


def connect(server, data=b"", read_buffer=None):
    """A raw connection on which some bytes were sent."""
    raw = socket.socket()
    if read_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
    raw.settimeout(20)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(data)
    return raw


def request(body, path="completions", more=""):
    content = json.dumps(body)
    return (
        f"POST /v1/{path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}"
        f"content-length: {len(content)}\r\n\r\n{content}"
    ).encode()


def closed(raw, seconds=20.0):
    """Whether the server has closed a connection, or closes it within a time; what it sent is read."""
    raw.settimeout(seconds)
    with raw:
        try:
            while raw.recv(65536):
                pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
    return True


@pytest.fixture
def impatient(folder):
    found = start(folder, Limits(body_seconds=1.0, idle_seconds=1.0, max_tokens=4000, seconds=60.0))
    yield found
    found.close()


def test_connections_that_send_no_request_are_closed(impatient):
    server = impatient
    silent = [connect(server), connect(server, b"POST /v1/comp"), connect(server, b"GET / HTTP/1.1\r\nhost:")]
    answered = connect(server, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he")  # a second request that does not end
    trickle = connect(server, b"GET / HTTP/1.1\r\n")
    begin = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - begin < 20:
            trickle.sendall(b"a: b\r\n")
            time.sleep(0.1)
    trickle.close()
    assert time.monotonic() - begin < 10, "a head that never ends is not waited for"
    assert all(map(closed, [*silent, answered]))


def test_a_client_that_does_not_read_is_closed(impatient):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True, "logprobs": 20}
    with connect(impatient, request(body), read_buffer=4096):
        deadline = time.monotonic() + 60
        while (connections := impatient.server.server_state.connections) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not connections
    assert httpx.get(f"{impatient.url}/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n" + b"a: " + b"x" * 100_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\n{\r\n" * 30_000,
        request({"model": "tiny", "prompt": "a"}, more="upgrade: websocket\r\nconnection: upgrade\r\n"),
        request({"model": "tiny", "prompt": "a", "max_tokens": 3}) * 50,
    ],
    ids=["tls", "head", "length", "lengths", "chunk", "chunks", "upgrade", "pipelined"],
)
def test_malformed_http_harms_nobody(server, client, data):
    raw = connect(server)
    with contextlib.suppress(ConnectionError):
        raw.sendall(data)
    got = client.completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0)
    assert got.usage.completion_tokens == 4
    assert closed(raw)
    assert not server.engine.busy()


def test_a_thousand_connections(folder):
    """Of which most say nothing: the others are answered."""
    allow_files(2500)  # both ends are in this process
    found = start(folder, Limits(idle_seconds=60.0, max_tokens=64))
    try:
        silent = [connect(found) for _ in range(900)]
        busy = [connect(found, request({"model": "tiny", "prompt": f"{n}", "max_tokens": 3})) for n in range(100)]
        for raw in busy:
            assert b"200 OK" in raw.recv(15)
        for raw in silent:
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert all(b"200 OK" in raw.recv(15) for raw in silent)
        for raw in (*silent, *busy):
            raw.close()
    finally:
        found.close()


def test_too_many_connections_are_503_until_some_are_closed(folder):
    net, tokenizer = load_model(folder, device="cpu")
    limits = Limits(idle_seconds=1.0)
    found = Running(make_app(Engine(net, tokenizer, memory=2**22), "tiny", limits), limits, connections=20)
    try:
        silent = [connect(found) for _ in range(30)]
        assert httpx.get(f"{found.url}/health").status_code == 503
        deadline = time.monotonic() + 20
        while httpx.get(f"{found.url}/health").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert httpx.get(f"{found.url}/health").status_code == 200
        assert all(map(closed, silent))
    finally:
        found.close()


def test_many_vanish_at_any_time(folder):
    found = start(folder, running=4)
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 60, "ignore_eos": True}
    try:
        for n in range(60):
            data = request({**body, "stream": n % 2 == 0})
            raw = connect(found, data[: len(data) - n % 3 * 20])
            if n % 4 == 0:
                time.sleep(0.02)
            reset = struct.pack("ii", 1, 0)  # instead of an orderly end
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            raw.close()
        deadline = time.monotonic() + 60
        while (found.engine.busy() or found.server.server_state.tasks) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not found.engine.busy()
        assert found.engine.cache.available() == found.engine.cache.pages
        assert "keyspan_open_http_requests 0.0" in httpx.get(f"{found.url}/metrics").text
    finally:
        found.close()


def test_metrics_count_what_was_done(folder):
    found = start(folder)

    def metrics():
        lines = httpx.get(f"{found.url}/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    try:
        before = metrics()
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 7, "ignore_eos": True}
        for n in (1, 2):
            assert httpx.post(f"{found.url}/v1/completions", json={**body, "n": n}).status_code == 200
        assert httpx.post(f"{found.url}/v1/completions", json={**body, "n": 99}).status_code == 400
        after = metrics()
        assert after["keyspan_requests_total"] - before["keyspan_requests_total"] == 3
        assert after["keyspan_answer_tokens_total"] == 21
        assert after["keyspan_prompt_tokens_total"] + after["keyspan_shared_tokens_total"] == 15
        assert after["keyspan_busy_seconds_total"] > 0
        assert after["keyspan_running_requests"] == after["keyspan_waiting_requests"] == 0
        assert after["keyspan_available_pages"] == after["keyspan_pages"] == found.engine.cache.pages
        assert after['keyspan_http_responses_total{status="400"}'] == 1
        assert after['keyspan_http_responses_total{status="200"}'] == 3, "two answers, and the metrics before"
    finally:
        found.close()


def test_many_requests_at_once_are_all_answered_and_too_many_refused(folder):
    found = start(folder, running=8, waiting=40)

    async def run():
        async with httpx.AsyncClient(base_url=found.url, timeout=60, limits=httpx.Limits(max_connections=200)) as http:
            body = {"model": "tiny", "max_tokens": 6, "temperature": 0}
            return await asyncio.gather(
                *(http.post("/v1/completions", json={**body, "prompt": f"prompt {n}"}) for n in range(120))
            )

    try:
        answers = asyncio.run(run())
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 40
        for n, answer in enumerate(answers):
            if answer.status_code == 200:
                text = answer.json()["choices"][0]["text"]
                assert n % 20 or text == expected(folder, f"prompt {n}", max_tokens=6).text
            else:
                assert answer.headers["retry-after"] == "1"
        assert found.engine.cache.available() == found.engine.cache.pages
    finally:
        found.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_reported(folder, stream):
    found = start(folder)

    def fail():
        raise MemoryError("no more")

    try:
        found.engine.step = fail
        body = {"model": "tiny", "prompt": "Hello", "n": 2, "stream": stream}
        got = httpx.post(f"{found.url}/v1/completions", json=body, timeout=20)
        assert "the engine has stopped" in got.text
        assert got.status_code == 503 or stream, "a stream may have begun"
        assert httpx.get(f"{found.url}/health").status_code == 503
        assert httpx.post(f"{found.url}/v1/completions", json=body).status_code == 503
        assert "keyspan_open_http_requests 0.0" in httpx.get(f"{found.url}/metrics").text
    finally:
        found.close()


@pytest.mark.parametrize("stream", [False, True])
def test_shutdown_ends_running_requests(folder, stream):
    found = start(folder, Limits(max_tokens=100_000))
    found.engine.step = slow(found.engine.step)
    answers = []

    def ask():
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 3000, "ignore_eos": True, "stream": stream}
        with httpx.stream("POST", f"{found.url}/v1/completions", json=body, timeout=60) as response:
            answers.append((response.status_code, "".join(response.iter_text())))

    thread = threading.Thread(target=ask)
    thread.start()
    while found.engine.counters.answer_tokens < 3 and thread.is_alive():
        time.sleep(0.005)
    found.close()
    thread.join(20)
    assert not thread.is_alive()
    [(status, text)] = answers
    assert "the server is shutting down" in text
    assert status == (200 if stream else 503)
    assert found.engine.counters.answer_tokens < 3000


def slow(step):
    """A step that takes a while, so that a request outlasts the patience of a server that shuts down."""

    def run():
        time.sleep(0.02)
        return step()

    return run


def test_what_cannot_be_listened_on_is_refused():
    with pytest.raises(ValueError, match="port: got 80000, want 0 … 65535"):
        listen("127.0.0.1", 80000)
    with pytest.raises(ValueError, match=r"host: got '256\.1\.1\.1', want a name or address of this machine"):
        listen("256.1.1.1", 0)
    [taken] = listen("127.0.0.1", 0)
    with taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port: 127\.0\.0\.1:{port} is in use, want a free one"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int4"}, "dtype: got 'int4', want one of fp32, bf16, fp16"),
        ({"path": "nowhere"}, "holds no config.json"),
    ],
)
def test_what_is_no_model_is_refused(folder, tmp_path, change, message):
    path = tmp_path / change.pop("path") if "path" in change else folder
    with pytest.raises(ValueError, match=message):
        load_model(path, device="cpu", **change)
