"""Prepared data: every document once, the same bytes whatever happens on the way, full batches, no leaks."""

import gzip
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keyspan import cli
from keyspan.files import locked
from keyspan.inference.tokenizer import FolderTokenizer
from keyspan.models import GPT, GPTConfig
from keyspan.training import loop
from keyspan.training.config import TrainConfig, preset
from keyspan.training.corpus import GROUP, Corpus, Piece, pack
from keyspan.training.loop import take_step, train
from keyspan.training.mixture import Mixture
from keyspan.training.prepare import Prepare, prepare, verify
from keyspan.training.ranks import Ranks


def texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [
        f"{n} " + "".join(source.choice("abcdé €\n") for _ in range(int(source.lognormvariate(3.5, 1))))
        for n in range(count)
    ]


def write_lines(path: Path, documents) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def stored(folder: Path, side: str) -> list[bytes]:
    """The documents of a side, as bytes."""
    corpus = Corpus(folder, 10**6)
    found = []
    for n in range(len(corpus._shards(side))):
        data = corpus._mapped(side, n)
        for piece in corpus._pieces(side, n):
            tokens = data[piece.start : piece.start + piece.length].tolist()
            assert tokens[-1] == corpus.stop
            found.append(corpus.decode(tokens[:-1]))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_is_stored_once_and_read_from_every_format(tmp_path, monkeypatch):
    documents = texts(60)
    source = tmp_path / "source"
    source.mkdir()
    write_lines(source / "a.jsonl", documents[:20])
    write_lines(source / "b.jsonl.gz", [*documents[20:40], documents[0], ""])
    (source / "c.txt").write_text(documents[40], newline="")
    import pyarrow
    import zstandard
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": documents[41:50]}), source / "d.parquet")
    frames = [write_lines(tmp_path / "e", of).read_bytes() for of in (documents[50:55], documents[55:])]
    (source / "e.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
    (source / ".hidden").write_text("no")
    said, read = [], []
    monkeypatch.setattr("keyspan.training.prepare.time", SimpleNamespace(monotonic=itertools.count().__next__))
    options = Prepare((source,), tmp_path / "out", held_out=0.2, shard_tokens=500)
    out = prepare(options, said.append, lambda *of: read.append(of))
    size = sum(path.stat().st_size for path in source.iterdir() if path.name != ".hidden")
    assert {total for _, total in read} == {size}
    assert [done for done, _ in read] == sorted(done for done, _ in read)
    assert read[-1] == (size, size)
    assert len({done for done, _ in read}) >= 5
    assert re.fullmatch(r"60 documents, \d+ tokens", said[-1])
    train_side, held_out = stored(out, "train"), stored(out, "held-out")
    assert sorted(train_side + held_out) == sorted(documents)
    assert 3 <= len(held_out) <= 25
    index = json.loads((out / "index.json").read_text())
    assert index["counts"] == {"documents": 60, "duplicates": 1, "empty": 1, "bad": 0, "named": []}
    assert sum(x["bytes"] for x in index["shards"]) == sum(len(x.encode()) for x in documents)
    assert prepare(Prepare((source,), out, held_out=0.2, shard_tokens=500)) == out, "finished data stay as they are"
    with pytest.raises(ValueError, match=r"holds other data, or the same under other options"):
        prepare(Prepare((source,), out, held_out=0.3, shard_tokens=500))


def test_bad_records_are_counted_and_named_or_stop(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": 3}\n\nnot json\n{"other": "x"}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfd")
    packed = write_lines(tmp_path / "c.jsonl.gz", texts(50))
    packed.write_bytes(packed.read_bytes()[:-30])
    out = prepare(Prepare((path, tmp_path / "b.txt", packed), tmp_path / "out", held_out=0.0))
    counts = json.loads((out / "index.json").read_text())["counts"]
    assert counts["bad"] == 5
    assert counts["named"][0] == f"{path}:2: holds no text under 'text'"
    assert counts["named"][1].startswith(f"{path}:4: no JSON")
    assert "is not UTF-8 text" in counts["named"][3]
    assert str(packed) in counts["named"][4]
    with pytest.raises(ValueError, match=r"a.jsonl:2: holds no text under 'text'"):
        prepare(Prepare((path,), tmp_path / "other", on_error="stop"))


def test_every_kind_of_damage_is_counted(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one"}\n' + "[" * 100_000 + '\n{"text": "\\ud800"}\n{"text": "two"}\n')
    packed = write_lines(tmp_path / "b.jsonl.gz", texts(2000, seed=3))
    data = bytearray(packed.read_bytes())
    data[10] = 255  # the first byte behind the header: a block of a type that does not exist
    packed.write_bytes(data)
    (tmp_path / "c.jsonl.zst").write_bytes(b"no archive")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    out = prepare(Prepare((tmp_path,), tmp_path / "out", tokenizer="train:300", held_out=0.0))
    counts = json.loads((out / "index.json").read_text())["counts"]
    named = counts["named"]
    assert counts["documents"] == 2
    assert [Path(x.partition(":")[0].partition(",")[0]).name for x in named] == [
        "a.jsonl", "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"
    ]  # fmt: skip
    assert "half a surrogate pair" in named[1]


def test_a_long_file_without_lines_is_never_held_whole(tmp_path, monkeypatch):
    from keyspan.training import prepare as module

    monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 4000)
    blocks = []
    monkeypatch.setattr(module, "_bytes", lambda x, plain=module._bytes: blocks.append(sum(map(len, x))) or plain(x))
    text = "".join(texts(3000, seed=4)).replace("\n", " ")
    (tmp_path / "a.txt").write_text(text)
    out = prepare(Prepare((tmp_path / "a.txt",), tmp_path / "out", held_out=0.2))
    assert max(blocks) < 6000
    assert sum(blocks) == len(text)
    found = stored(out, "train") + stored(out, "held-out")
    assert max(map(len, found)) == 2000
    assert sorted(found) == sorted(text[n : n + 2000] for n in range(0, len(text), 2000))


@pytest.mark.parametrize("index", ["{}", "[]", "no JSON", '{"format": 2}'])
def test_an_index_that_is_none_is_refused(tmp_path, index):
    source = write_lines(tmp_path / "a.jsonl", texts(3))
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"holds other data|index.json: .* want (a )?JSON"):
        prepare(Prepare((source,), tmp_path))
    with pytest.raises(ValueError, match=r"index.json: (got format|.* want (a )?JSON)"):
        Corpus(tmp_path, 50)


def test_the_tokenizer_of_another_plan_is_not_taken(tmp_path, monkeypatch):
    from keyspan.training import prepare as module

    source = write_lines(tmp_path / "a.jsonl", texts(400))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(module, "_Encoder", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(Prepare((source,), out, tokenizer="train:300"))
    assert (out / "tokenizer.json").is_file()
    prepare(Prepare((source,), out, tokenizer="train:270"))
    want = prepare(Prepare((source,), tmp_path / "want", tokenizer="train:270"))
    assert content(out) == content(want)


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_a_run_that_is_killed_ends_with_the_same_bytes(tmp_path, tokenizer):
    documents = texts(12_000, seed=1)
    source = write_lines(tmp_path / "a.jsonl", [*documents, *documents[:3000]])
    words = ["prepare", str(source), "--tokenizer", tokenizer, "--shard-tokens", "60000", "--held-out", "0.1", "--out"]
    assert cli.main([*words, str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    kills = 0
    for wait in (0.0, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-m", "keyspan", *words, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        before = len(list(out.glob("*.bin"))) if out.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob("*.bin"))) > before:
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    assert kills >= 1
    assert cli.main([*words, str(out)]) == 0
    assert content(out) == content(tmp_path / "whole")
    assert len(list(out.glob("train-*.bin"))) > 3


def test_a_trained_tokenizer_gives_the_text_back(tmp_path):
    documents = texts(400)
    source = write_lines(tmp_path / "a.jsonl", documents)
    out = prepare(Prepare((source,), tmp_path / "out", tokenizer="train:400", held_out=0.1))
    corpus = Corpus(out, 64)
    assert corpus.vocab_size <= 400
    assert sorted(stored(out, "train") + stored(out, "held-out")) == sorted(documents)
    assert corpus.encode("abc")[0] == corpus.stop
    assert corpus.decode(corpus.encode("abé €\n")) == "abé €\n"
    assert 1.0 < corpus.bytes_per_token < 10
    again = prepare(Prepare((source,), tmp_path / "again", tokenizer=str(out / "tokenizer.json"), held_out=0.1))
    assert (again / "train-00000.bin").read_bytes() == (out / "train-00000.bin").read_bytes()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_lines(folder / "a.jsonl", texts(3000, seed=2))
    return Corpus(prepare(Prepare((folder / "a.jsonl",), folder / "out", held_out=0.05, shard_tokens=8000)), 200)


OPTIONS = ["--held-out", "0.05", "--shard-tokens", "8000"]
"""Of the fixture's data."""


def test_an_epoch_holds_every_token_once_in_full_batches(corpus):
    total = sum(x["tokens"] for x in corpus._shards("train"))
    seen: list[Piece] = []
    index = 0
    while sum(piece.length for piece in seen) < total:
        seen += corpus._plans.batch(7, index, 1024)
        index += 1
    assert sum(piece.length for piece in seen) == total
    assert len(set(seen)) == len(seen)
    assert {(p.shard, p.start) for p in seen} == {
        (p.shard, p.start) for n in range(len(corpus._shards("train"))) for p in corpus._pieces("train", n)
    }
    assert corpus.filled(7, index - 2, 1024) >= 0.99


def test_a_batch_is_a_function_of_its_numbers(corpus):
    again = Corpus(corpus.folder, corpus.max_length)
    for index in (0, 1, 5, 40, 3):
        a, b = corpus.train_batch(1, index, 512), again.train_batch(1, index, 512)
        assert torch.equal(a.tokens, b.tokens)
        assert a.lengths == b.lengths
    assert not torch.equal(corpus.train_batch(2, 0, 512).tokens[:50], corpus.train_batch(1, 0, 512).tokens[:50])


def test_inputs_are_the_targets_one_token_before(corpus):
    batch = corpus.train_batch(0, 0, 1024)
    for tokens, targets in zip(batch.tokens.split(batch.lengths), batch.targets.split(batch.lengths), strict=True):
        assert torch.equal(tokens[1:], targets[:-1])
    assert sum(batch.lengths) == len(batch.tokens) <= 1024
    first = next(p for n in range(50) for p in corpus._plans.batch(0, n, 1024) if not p.first)
    data = corpus._mapped("train", first.shard)
    cut = corpus._batch([first])
    assert cut.tokens[0] == data[first.start - 1], "a piece of a longer document begins with the token before it"


def test_no_document_sees_another(corpus):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=corpus.vocab_size, dim=16, layers=2, heads=2))
    batch = corpus.train_batch(0, 0, 512)
    hidden = []
    model.embedding.register_forward_hook(lambda _, __, out: hidden.append(out) or out.retain_grad())
    logits = model.logits(model(batch.tokens, batch.lengths))
    start, stop = batch.lengths[0], batch.lengths[0] + batch.lengths[1]
    logits[start:stop].sum().backward()
    reached = hidden[0].grad.abs().sum(1) > 0
    assert reached[start:stop].any()
    assert not reached[:start].any()
    assert not reached[stop:].any()


def test_held_out_batches_hold_all_held_out_documents(corpus):
    batches = corpus.held_out(512)
    assert sum(len(batch.tokens) for batch in batches) == sum(x["tokens"] for x in corpus._shards("held-out"))
    few = corpus.held_out(512, limit=600)
    assert 200 <= sum(len(batch.tokens) for batch in few) <= 1200


def pieces_of(lengths) -> list[Piece]:
    return [Piece(0, n, length, True) for n, length in enumerate(lengths)]


def test_packs_by_hand():
    full, rest = pack(pieces_of([5, 3, 7, 2, 4, 9]), 10, 1.0)  # 30 tokens: into three
    assert [sorted(p.length for p in x) for x in full] == [[3, 7]]
    assert [sorted(p.length for p in x) for x in rest] == [[9], [4, 5], [2]]
    assert len(pack(pieces_of([5, 3, 7, 2, 4, 9]), 10, 0.9)[0]) == 3
    full, rest = pack(pieces_of([4, 4, 1, 1, 1, 1]), 6, 1.0)  # not [4, 1, 1] twice alone: the costs are equal too
    assert [[p.length for p in x] for x in full] == [[4, 1, 1]] * 2
    assert not rest


def test_packs_are_full_and_cost_alike():
    source = random.Random(0)
    lengths = [min(int(source.lognormvariate(6, 1.3)) + 1, 1024) for _ in range(5000)]
    for most in (None, 32):
        full, rest = pack(pieces_of(lengths), 8192, 0.99, most)
        assert sum(map(len, full)) + sum(map(len, rest)) == len(lengths)
        assert len(rest) <= (1 if most is None else 8)
        tokens = [sum(p.length for p in x) for x in full]
        assert max(tokens) <= 8192
        assert sum(tokens) >= 0.99 * 8192 * len(full)
        costs = np.array([sum(p.length**2 for p in x) for x in full])
        assert costs.max() < 1.02 * costs.mean()
        assert most is None or max(map(len, full)) <= most
    # Lengths that fit together in few ways: as full as best fit makes them.
    coarse = pack(pieces_of([min(int(source.lognormvariate(8, 1)) + 1, 4096) for _ in range(900)]), 8192, 0.99)
    assert len(coarse.rest) < 0.05 * len(coarse.full)
    capped = pack(pieces_of([10] * 1000), 1000, 0.99, 16)
    assert all(len(x) == 16 for x in capped.full)
    assert sum(map(len, capped.full)) + sum(map(len, capped.rest)) == 1000


def test_altered_and_missing_shards_are_refused(corpus, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in content(corpus.folder).items():
        (folder / name).write_bytes(data)
    verify(folder)
    path = folder / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00000.bin: its checksum is not that of index.json"):
        verify(folder)
    assert cli.main(["prepare", str(corpus.folder.parent / "a.jsonl"), *OPTIONS, "--out", str(folder)]) == 1
    assert "train-00000.bin: its checksum is not that of index.json" in capsys.readouterr().err
    path.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=r"train-00000.bin: want a file of"):
        Corpus(folder, 100)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000.bin is not there"):
        verify(folder)
    with pytest.raises(ValueError, match=r"holds no index.json"):
        Corpus(tmp_path, 100)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_train_on_prepared_data_and_on_a_folder_of_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    for n, text in enumerate(texts(200, seed=3)):
        (source / f"{n}.txt").write_text(text)
    small = (
        "--steps 3 --dim 16 --layers 1 --heads 2 --kv-heads 2 --tokens 256 --max-length 64 --eval-tokens 256 --lr 0.01"
    )
    assert cli.main(["train", "--data", str(source), *small.split(), "--out", "run"]) == 0
    assert "bits per byte on held-out data after 3 steps" in capsys.readouterr().out
    assert (tmp_path / "source.prepared" / "index.json").is_file()
    assert cli.main(["train", "--data", "source.prepared", *small.split(), "--out", "again"]) == 0
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for run in ("run", "again")
    ]
    assert losses[0] == losses[1]
    assert cli.main(["generate", "run", "--prompt", "1 a", "--max-tokens", "4"]) == 0


SMALL = {
    "task": "data", "dim": 16, "layers": 1, "heads": 2, "tokens": 256, "max_length": 100, "eval_tokens": 256,
    "device": "cpu",
}  # fmt: skip


def test_a_run_is_resumed_with_its_own_data_alone(tmp_path):
    """Neither with another folder nor with other documents in the same one; with those of then it goes on."""
    sources = [write_lines(tmp_path / f"{n}.jsonl", texts(300, seed=n)) for n in (0, 1)]
    data, kept = (prepare(Prepare((sources[0],), tmp_path / name, held_out=0.1)) for name in ("data", "kept"))
    run = tmp_path / "run"
    train(TrainConfig(**SMALL, data=(str(data),), steps=2, out=run), quiet=True)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    again = TrainConfig(**SMALL, data=(str(data),), steps=3, resume=run)
    with pytest.raises(ValueError, match=r"data: got .*kept.*, but .*run was begun with .*data.*; want that, or a new"):
        train(replace(again, data=(str(kept),)), quiet=True)
    shutil.rmtree(data)
    prepare(Prepare((sources[1],), data, held_out=0.1))
    with pytest.raises(ValueError, match=r"data: .*data is not what the run was begun with: it was prepared anew"):
        train(again, quiet=True)
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    shutil.rmtree(data)
    kept.rename(data)
    assert train(again, quiet=True).step == 3


def test_a_run_takes_every_micro_batch_once_whatever_the_accumulation(tmp_path, corpus, monkeypatch):
    taken = []
    monkeypatch.setattr(loop, "take_step", lambda *x: taken.append([batch.tokens for batch in x[3]]) or take_step(*x))
    config = TrainConfig(**SMALL, data=(str(corpus.folder),), steps=3, accumulation=2, out=tmp_path / "run")
    train(config, quiet=True)
    for steps, accumulation in ((5, 3), (7, 1)):
        train(replace(config, steps=steps, accumulation=accumulation, out=None, resume=config.out), quiet=True)
    assert list(map(len, taken)) == [2, 2, 2, 3, 3, 1, 1]
    own = Corpus(corpus.folder, 100)
    for n, tokens in enumerate(x for step in taken for x in step):
        assert torch.equal(tokens, own.train_batch(0, n, 256).tokens)


def test_each_rank_reads_its_own_micro_batches(corpus, monkeypatch):
    config = TrainConfig(**SMALL, data=(str(corpus.folder),), accumulation=4)
    whole = loop.train_batches(Corpus(corpus.folder, 100), config, 3)
    read, mapped = [], Corpus._mapped
    monkeypatch.setattr(Corpus, "_mapped", lambda self, side, n: read.append(n) or mapped(self, side, n))
    for rank in range(2):
        read.clear()
        found = loop.train_batches(Corpus(corpus.folder, 100), config, 3, Ranks(rank, 2))
        assert len(read) == sum(len(batch.lengths) for batch in found)  # a document each
        assert [x.tokens.tolist() for x in found] == [x.tokens.tolist() for x in whole[rank::2]]


def test_resumed_training_continues_the_order_of_the_data(tmp_path, corpus):
    options = {
        "task": "data", "data": (str(corpus.folder),), "dim": 16, "layers": 1, "heads": 2, "tokens": 256,
        "max_length": 100, "steps": 6, "eval_tokens": 256, "checkpoint_every": 3, "device": "cpu",
    }  # fmt: skip
    train(TrainConfig(**options, out=tmp_path / "whole"), quiet=True)
    train(TrainConfig(**{**options, "steps": 3}, out=tmp_path / "parts"), quiet=True)
    config = TrainConfig(**options, resume=tmp_path / "parts")
    train(config, quiet=True)
    whole, parts = (
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    tokens = [[record["tokens"] for record in records if "tokens" in record] for records in (whole, parts)]
    assert tokens[0] == tokens[1]
    shares = [record["filled"] for record in whole if "tokens" in record]
    assert shares == [n / 256 for n in tokens[0]]
    assert sum(shares) / len(shares) >= 0.99


def test_sources_are_mixed_by_weights(corpus, tmp_path):
    """Each has its share of any run of micro-batches, in its own order; a position leads on from anywhere."""
    folder = tmp_path / "other"
    other = Corpus(prepare(Prepare((write_lines(tmp_path / "a.jsonl", texts(400, seed=9)),), folder)), 200)
    mixed = Mixture([corpus, other], [3, 1])
    own: list[list[torch.Tensor]] = [[], []]
    for n in range(400):
        batch = mixed.train_batch(1, n, 512)
        own[int(batch.names()[0].startswith(folder.name))].append(batch.tokens)
        assert len({name.split("/")[0] for name in batch.names()}) == 1
        assert abs(len(own[0]) - 0.75 * (n + 1)) < 3
    for source, batches in zip((corpus, other), own, strict=True):
        assert all(torch.equal(source.train_batch(1, n, 512).tokens, x) for n, x in enumerate(batches))
    for n in (0, 1, 57, 256, 399):
        mixed.train_batch(1, n + 1, 512)
        position = json.loads(json.dumps(mixed.position(1, n, 512)))
        mixed = Mixture([Corpus(x.folder, 200) for x in (corpus, other)], [3, 1])
        mixed.seek(position, 1, 512)
        again = Mixture([corpus, other], [3, 1]).train_batch(1, n, 512)
        assert torch.equal(mixed.train_batch(1, n, 512).tokens, again.tokens)
    held_out = sum(x["tokens"] for c in (corpus, other) for x in c._shards("held-out"))
    assert sum(len(batch.tokens) for batch in mixed.held_out(512)) == held_out
    assert sum(len(batch.tokens) for batch in mixed.held_out(512, limit=800)) < 2000
    words = Prepare((tmp_path / "a.jsonl",), tmp_path / "bpe", tokenizer="train:300", held_out=0.1)
    foreign = Corpus(prepare(words), 200)
    with pytest.raises(ValueError, match="of other tokenizers"):
        Mixture([corpus, foreign], [1, 1])


def test_a_step_that_is_not_taken_names_its_documents(tmp_path, corpus, monkeypatch):
    options = {
        "task": "data", "data": (str(corpus.folder),), "dim": 16, "layers": 1, "heads": 2, "tokens": 256,
        "max_length": 100, "steps": 3, "eval_tokens": 256, "accumulation": 2, "device": "cpu",
    }  # fmt: skip
    config = TrainConfig(**options, out=tmp_path / "run")
    monkeypatch.setattr(GPT, "loss", lambda *_: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan.*; documents .*/train-0\d+:\d+, .* more"):
        train(config, quiet=True)
    (record,) = records(tmp_path / "run")
    own = Corpus(corpus.folder, 100)
    names = [name for n in range(2) for name in own.train_batch(0, n, 256).names()]
    assert record["documents"] == names
    assert len(names) == sum(len(own.train_batch(0, n, 256).lengths) for n in range(2))


def test_a_folder_is_prepared_by_one_process(corpus, tmp_path):
    options = Prepare((corpus.folder.parent / "a.jsonl",), tmp_path)
    with locked(tmp_path, "prepares data"), pytest.raises(ValueError, match="another process prepares data in this"):
        prepare(options)
    prepare(options)


def test_a_plan_goes_on_from_its_position(corpus, monkeypatch):
    """From any micro-batch, in the second epoch and at the second resume too; nothing before its group is planned."""
    seed, tokens = 3, 2048
    wanted = [corpus.train_batch(seed, n, tokens) for n in range(200)]
    fresh = Corpus(corpus.folder, corpus.max_length)
    epochs = set()
    planned = []
    pieces = Corpus._pieces
    monkeypatch.setattr(Corpus, "_pieces", lambda self, side, n: planned.append(n) or pieces(self, side, n))
    for n in range(0, 199, 5):
        fresh.train_batch(seed, n + 1, tokens)  # batches are made ahead
        position = json.loads(json.dumps(fresh.position(seed, n, tokens)))
        epochs.add(position["epoch"])
        fresh = Corpus(corpus.folder, corpus.max_length)
        fresh.seek(position, seed, tokens)
        planned.clear()
        assert torch.equal(fresh.train_batch(seed, n, tokens).tokens, wanted[n].tokens)
        assert len(planned) <= 2 * GROUP
    assert epochs == {0, 1}
    other = Corpus(corpus.folder, corpus.max_length)
    other.seek(position, seed, 2 * tokens)  # of another size: from the start
    assert other.train_batch(seed, 0, 2 * tokens).tokens.numel() > tokens


LIMITED = """
import resource, sys
import numpy as np
from keyspan import cli

size, limit, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.ones(size // 8)
except MemoryError:
    print("the data does not fit")
sys.exit(cli.main(["train", "--data", folder, *sys.argv[4:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits a process's own memory on Linux alone")
def test_training_on_ten_times_the_memory_that_the_process_may_have(tmp_path):
    limit, rows, count = 600 * 2**20, 5_000_000, 640  # 6.4 GB of uint16, in files with holes
    folder = tmp_path / "data"
    folder.mkdir()
    prepared = prepare(Prepare((write_lines(tmp_path / "a.jsonl", texts(300)),), tmp_path / "small", held_out=0.1))
    index = json.loads((prepared / "index.json").read_text())
    shards = [x for x in index["shards"] if x["side"] == "held-out"]
    for x in shards:
        for suffix in ("bin", "ends"):
            (folder / f"{x['stem']}.{suffix}").write_bytes((prepared / f"{x['stem']}.{suffix}").read_bytes())
    ends = np.arange(5000, rows + 1, 5000, dtype="<u8")
    for n in range(count):
        with (folder / f"train-{n:05d}.bin").open("wb") as file:
            file.truncate(2 * rows)
        (folder / f"train-{n:05d}.ends").write_bytes(ends.tobytes())
        shards.append({"side": "train", "stem": f"train-{n:05d}", "documents": len(ends), "tokens": rows, "bytes": rows,
                       "sha256": {}})  # fmt: skip
    (folder / "index.json").write_text(json.dumps({**index, "shards": shards}))
    assert count * rows * 2 >= 10 * limit
    options = "--steps 12 --dim 16 --layers 1 --heads 2 --kv-heads 2 --tokens 5000 --max-length 5000 --eval-tokens 256"
    words = [str(count * rows * 2), str(limit), str(folder), *options.split(), "--device", "cpu", "--out"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words, str(tmp_path / "run")], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the data does not fit")
    assert len([x for x in records(tmp_path / "run") if "loss" in x]) == 12


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_a_run_on_text_is_exported_with_its_tokenizer(tmp_path, tokenizer, capsys):
    """The folder's model and tokenizer continue a text as the run does; answers end with the end token."""
    write_lines(tmp_path / "a.jsonl", texts(300, seed=5))
    words = f"prepare {tmp_path / 'a.jsonl'} --out {tmp_path / 'data'} --tokenizer {tokenizer} --held-out 0.1"
    assert cli.main(words.split()) == 0
    small = (
        "--steps 4 --dim 16 --layers 1 --heads 2 --kv-heads 2 --tokens 256 --max-length 64 --eval-tokens 256 --lr 0.01"
    )
    assert cli.main(["train", "--data", str(tmp_path / "data"), *small.split(), "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    answers = []
    for folder in ("run", "model"):
        capsys.readouterr()
        assert cli.main(["generate", str(tmp_path / folder), "--prompt", "1 ab", "--max-tokens", "12"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    tokenizer = FolderTokenizer(tmp_path / "model")
    own = Corpus(tmp_path / "data", 64)
    assert tokenizer.encode("1 ab €") == own.encode("1 ab €")
    assert tokenizer.end_tokens == (own.stop,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "inputs: got none"),
        ({"inputs": (Path("nowhere"),)}, "inputs: nowhere is not there"),
        ({"held_out": 1.0}, "held_out: got 1.0"),
        ({"on_error": "shout"}, "on_error: got 'shout'"),
        ({"shard_tokens": 0}, "shard_tokens: got 0"),
        ({"tokenizer": "train:5"}, "tokenizer: got 'train:5', want train:VOCAB, at least 258"),
        ({"tokenizer": "missing.json"}, "tokenizer: got 'missing.json', want bytes"),
    ],
)
def test_wrong_options(change, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    with pytest.raises(ValueError, match=message):
        prepare(Prepare(**{"inputs": (path,), "out": tmp_path / "out", **change}))


@pytest.mark.parametrize(
    ("line", "message"),
    [("", "got no text, but 0 empty and 0 bad"), ('{"a": 1}', r"0 empty and 1 bad .* a.jsonl:1: ho")],
)
def test_inputs_without_text(tmp_path, monkeypatch, capsys, line, message):
    """Nothing is finished then, so that the same command may be given with other options."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(line)
    for _ in range(2):
        assert cli.main(["prepare", "a.jsonl", "--out", "out"]) == 1
        assert re.search(f"^keyspan: inputs: .*{message}", capsys.readouterr().err)
    assert not Path("out/index.json").exists()


def test_data_that_are_not_there(tmp_path, capsys):
    assert cli.main(["train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == 1
    assert re.search(
        "^keyspan: data: .*nowhere is not there, want a folder of keyspan prepare", capsys.readouterr().err
    )


def test_the_task_needs_its_data():
    with pytest.raises(ValueError, match=r"data: got none for the task data"):
        preset("data")
    with pytest.raises(ValueError, match=r"data: got x for the task copy"):
        TrainConfig(task="copy", data=("x",))
