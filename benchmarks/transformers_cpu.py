"""transformers' `sdpa` beside Keyspan, on a CPU: padded batches, packed rows, decoding.

    python benchmarks/transformers_cpu.py            # needs keyspan[transformers]; some minutes

Models have random weights. The ways take turns in one process, so a loaded machine slows all of them. It prints the
smallest CPU time of `sdpa` and how many times as fast the others are.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import transformers as hf

from keyspan.interop.transformers import GrowingCache, register, replace_linears, unpadded, use_keyspan

V = 4096
LENGTHS = (512, 410, 300, 205, 100, 60, 40, 20)
"""Real tokens of the rows of a batch of 8 x 512: 40 %."""
Ways = dict[str, Callable[[], object]]


def bert() -> nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 12}
    return hf.BertModel(hf.BertConfig(vocab_size=V, max_position_embeddings=1024, **sizes))


def llama() -> nn.Module:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = hf.LlamaConfig(vocab_size=V, num_key_value_heads=4, max_position_embeddings=4096, **sizes)
    return hf.LlamaModel(config)


def by_implementation(build: Callable[[], nn.Module], dtype: torch.dtype, ways: list[str]) -> dict[str, nn.Module]:
    """The same weights once for each way: an attention implementation, or what is done to a model with `keyspan`."""
    models: dict[str, nn.Module] = {}
    for way in ways:
        model = build().to(dtype).eval()
        if models:
            model.load_state_dict(next(iter(models.values())).state_dict())
        change = {"unpadded": unpadded, "use_keyspan": use_keyspan, "linears": replace_linears}.get(way)
        model.set_attn_implementation("sdpa" if way == "sdpa" else "keyspan")  # type: ignore[operator]
        if change is not None:
            change(model)
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


def decoding(model: nn.Module, cache: str, cached: int, steps: int) -> Callable[[], object]:
    """One token more for each of 4 sequences, `steps` times."""
    prompt = torch.randint(3, V, (4, cached))
    past: hf.Cache
    if cache == "static":
        past = hf.StaticCache(model.config, max_cache_len=cached + steps)
    else:
        past = (GrowingCache if cache == "growing" else hf.DynamicCache)(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=past, use_cache=True)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=prompt[:, :1], past_key_values=past, use_cache=True)

    return step


def line(*names: str, times: dict[str, float], columns: Sequence[str]) -> None:
    ratios = {name: f"{times['sdpa'] / t:.2f}x" for name, t in times.items() if name != "sdpa"}
    cells = [*names, f"{times['sdpa'] * 1e3:.1f}", *(ratios.get(column, "-") for column in columns)]
    print("| " + " | ".join(cells) + " |", flush=True)


def head(*names: str) -> None:
    print("\n| " + " | ".join(names) + " |")
    print("|---" * names.index("sdpa, CPU ms") + "|--:" * (len(names) - names.index("sdpa, CPU ms")) + "|")


def passes(repeats: int) -> None:
    ways = ["keyspan", "use_keyspan", "unpadded"]
    head("model", "dtype", "batch", "pass", "sdpa, CPU ms", *ways)
    for name, build in (("BERT", bert), ("Llama", llama)):
        for dtype in (torch.float32, torch.bfloat16):
            for batch, inputs in batches(name == "Llama").items():
                models = by_implementation(build, dtype, ["sdpa", *ways[: 3 if "attention_mask" in inputs else 2]])
                for label, function in (("forward", forward), ("forward + backward", train)):
                    calls: Ways = {w: lambda m=m, f=function, x=inputs: f(m, x) for w, m in models.items()}
                    line(name, str(dtype)[6:], batch, label, times=seconds(calls, repeats), columns=ways)


def tokens(repeats: int) -> None:
    """One decoded token, by what a user writes: `register` alone, with one more call, with one call for all."""
    ways = ["keyspan", "linears", "growing", "use_keyspan"]
    head("Llama, cache", "dtype", "cached keys", "sdpa, CPU ms", *ways)
    for dtype in (torch.float32, torch.bfloat16):
        for cached in (64, 2048):
            for cache in ("dynamic", "static"):
                names = ["sdpa", *(way for way in ways if (way, cache) != ("growing", "static"))]
                models = by_implementation(llama, dtype, names)
                calls = {
                    way: decoding(model, way if way == "growing" else cache, cached, repeats + 1)
                    for way, model in models.items()
                }
                line(cache, str(dtype)[6:], f"4 x {cached}", times=seconds(calls, repeats), columns=ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["passes", "tokens"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    register()
    if options.only != "tokens":
        passes(options.repeats)
    if options.only != "passes":
        tokens(10 * options.repeats)


if __name__ == "__main__":
    main()
