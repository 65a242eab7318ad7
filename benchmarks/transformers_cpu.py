"""transformers' `sdpa` beside `keyspan` and `unpadded(model)`, on a CPU: padded batches, packed rows, decoding.

    python benchmarks/transformers_cpu.py            # needs keyspan[transformers]; some minutes

Models have random weights. The ways take turns in one process, so a loaded machine slows all of them. It prints the
smallest CPU time of `sdpa` and how many times as fast the others are.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import transformers as hf

from keyspan.interop.transformers import GrowingCache, register, replace_linears, unpadded

V = 4096
LENGTHS = (512, 410, 300, 205, 100, 60, 40, 20)
"""Real tokens of the rows of a batch of 8 x 512: 40 %."""
CACHED = 2048
Ways = dict[str, Callable[[], object]]


def bert() -> nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 12}
    return hf.BertModel(hf.BertConfig(vocab_size=V, max_position_embeddings=1024, **sizes))


def llama() -> nn.Module:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = hf.LlamaConfig(vocab_size=V, num_key_value_heads=4, max_position_embeddings=4096, **sizes)
    return hf.LlamaModel(config)


def by_implementation(build: Callable[[], nn.Module], dtype: torch.dtype, ways: list[str]) -> dict[str, nn.Module]:
    """The same weights once for each way; `linears` is `keyspan` after `replace_linears`."""
    models: dict[str, nn.Module] = {}
    for way in ways:
        model = build().to(dtype).eval()
        if models:
            model.load_state_dict(next(iter(models.values())).state_dict())
        if way == "unpadded":
            unpadded(model)
        else:
            model.set_attn_implementation("keyspan" if way == "linears" else way)  # type: ignore[operator]
        if way == "linears":
            replace_linears(model)
        models[way] = model
    return models


def seconds(ways: Ways, repeats: int) -> dict[str, float]:
    """Smallest CPU time of each, in turns, after one run that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, function in ways.items():
            start = time.process_time()
            function()
            if turn:
                found[name].append(time.process_time() - start)
    return {name: min(times) for name, times in found.items()}


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**inputs)


def train(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    states = model(**inputs).last_hidden_state
    real = inputs.get("attention_mask")
    (states if real is None else states[real.bool()]).float().square().mean().backward()


def batches(decoder: bool) -> dict[str, dict[str, Tensor]]:
    """A padded batch, and for decoders the same documents packed in one row."""
    lengths = torch.tensor(LENGTHS)
    real = torch.arange(max(LENGTHS)) < lengths[:, None]
    padded = {"input_ids": torch.randint(3, V, real.shape) * real, "attention_mask": real.long()}
    if not decoder:
        return {"padded to 40 %": padded}
    packed = {
        "input_ids": padded["input_ids"][real][None],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    }
    return {"padded to 40 %": padded | NO_CACHE, "packed": packed | NO_CACHE}


NO_CACHE = {"use_cache": False}


def decoding(model: nn.Module, cache: str) -> Callable[[], object]:
    """One token more for each of 4 sequences, again and again."""
    prompt = torch.randint(3, V, (4, CACHED))
    steps = 64
    past: hf.Cache
    if cache == "static":
        past = hf.StaticCache(model.config, max_cache_len=CACHED + steps)
    else:
        past = (GrowingCache if cache == "growing" else hf.DynamicCache)(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=past, use_cache=True)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=prompt[:, :1], past_key_values=past, use_cache=True)

    return step


def line(*names: str, times: dict[str, float]) -> None:
    ratios = {name: f"{times['sdpa'] / t:.2f}x" for name, t in times.items() if name != "sdpa"}
    ways = [ratios.get(way, "-") for way in ("keyspan", "unpadded", "linears")]
    cells = [*names, f"{times['sdpa'] * 1e3:.1f}", *ways]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    register()
    print("| model | dtype | batch | pass | sdpa, CPU ms | keyspan | unpadded | linears |")
    print("|---|---|---|---|--:|--:|--:|--:|")
    for name, build in (("BERT", bert), ("Llama", llama)):
        for dtype in (torch.float32, torch.bfloat16):
            for batch, inputs in batches(name == "Llama").items():
                ways = ["sdpa", "keyspan", *(["unpadded"] if "attention_mask" in inputs else [])]
                models = by_implementation(build, dtype, ways)
                for label, function in (("forward", forward), ("forward + backward", train)):
                    calls: Ways = {w: lambda m=m, f=function, x=inputs: f(m, x) for w, m in models.items()}
                    line(name, str(dtype)[6:], batch, label, times=seconds(calls, options.repeats))
    for dtype in (torch.float32, torch.bfloat16):
        for cache in ("dynamic", "growing", "static"):
            models = by_implementation(llama, dtype, ["sdpa", "keyspan", "linears"])
            # transformers' own has no growing cache: its dynamic one is what is used.
            calls = {
                way: decoding(model, "dynamic" if (way, cache) == ("sdpa", "growing") else cache)
                for way, model in models.items()
            }
            label = f"4 x {CACHED} cached, {cache} cache"
            line("Llama", str(dtype)[6:], label, "a token", times=seconds(calls, 5 * options.repeats))


if __name__ == "__main__":
    main()
