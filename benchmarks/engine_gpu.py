"""The engine on a GPU: a Llama shape of 1.24 billion random weights in bf16, one request and many at once.

    PYTHONPATH=src python benchmarks/engine_gpu.py            # half a minute on an H100; needs torch and triton

First the answers with CUDA graphs are compared with those without. Steps are timed by the clock where every request is
answering, after as many steps that are not counted; bytes are those of the weights and of the keys and values read.
Then, where it is installed, transformers' continuous batching answers the same requests.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time

import torch

from keyspan.bench.clock import EventClock
from keyspan.inference import Engine, Sampling
from keyspan.models import GPT, GPTConfig, RopeScaling

CONFIG = GPTConfig(
    vocab_size=128256, dim=2048, layers=16, heads=32, kv_heads=8, hidden=8192, head_dim=64, rope_theta=500_000.0,
    rope_scaling=RopeScaling("llama3", 32.0),
)  # fmt: skip
DEVICE = torch.device("cuda")


def requests(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 100 to 300 tokens; one alone has 32."""
    draw = random.Random(seed)
    lengths = [draw.randrange(100, 300) if count > 1 else 32 for _ in range(count)]
    return [[draw.randrange(CONFIG.vocab_size) for _ in range(length)] for length in lengths]


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 2 GiB on the device."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = EventClock(200).times(lambda: target.copy_(source))
    return 2 * source.numel() / statistics.median(times)


def compare(model: GPT) -> None:
    """Answers by graphs, by plain steps, and alone by graphs (whose products are other kernels)."""
    prompts, sampling = requests(5, seed=1), Sampling(max_tokens=24, logprobs=0, ignore_end=True)
    plain = Engine(model, memory=2**30, graphs=False).generate(prompts, sampling)
    graphs = Engine(model, memory=2**30).generate(prompts, sampling)
    alone = [Engine(model, memory=2**30).generate([prompt], sampling)[0] for prompt in prompts]
    for name, found in (("graphs", graphs), ("alone", alone)):
        equal = sum(a.tokens == b.tokens for a, b in zip(plain, found, strict=True))
        far = max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(plain, found, strict=True))
        print(f"{name}: {equal} of {len(plain)} answers as without graphs, first log-probabilities {far:.1e} apart")


def timed(engine: Engine, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """Median seconds of a step in which all requests answer; tokens per second of the whole."""
    begin, steps = time.perf_counter(), []
    for prompt in prompts:
        engine.add(prompt, Sampling(max_tokens=new, ignore_end=True))
    while engine.busy():
        before = time.perf_counter()
        events = engine.step()
        if len(events) == len(prompts):
            steps.append(time.perf_counter() - before)
    return statistics.median(steps), len(prompts) * new / (time.perf_counter() - begin)


def theirs(prompts: list[list[int]], new: int) -> None:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, __version__

    config = LlamaConfig(
        vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.dim, num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads, num_key_value_heads=CONFIG.kv_heads, intermediate_size=CONFIG.hidden,
        head_dim=CONFIG.head_dim, tie_word_embeddings=True, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    with DEVICE:
        model = LlamaForCausalLM(config).bfloat16().eval()
    options = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        found = model.generate_batch(prompts, generation_config=options, persistent_manager=True)
        tokens = sum(len(answer.generated_tokens) for answer in found.values())
        best = max(best, tokens / (time.perf_counter() - begin))
    print(f"transformers {__version__}, continuous batching, {len(prompts)} requests: {best:.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200, help="new tokens of each answer")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="requests at once")
    options = parser.parse_args()
    torch.manual_seed(0)
    with DEVICE:
        model = GPT(CONFIG).bfloat16().eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e12:.2f} TB/s, weights {weights / 1e9:.2f} GB")
    compare(model)
    engine = Engine(model, memory=2**31)
    for count in options.batch:
        timed(engine, requests(count), options.tokens)  # kernels are compiled, graphs captured
        prompts = requests(count, seed=2)
        step, whole = timed(engine, prompts, options.tokens)
        cached = (
            (sum(map(len, prompts)) + count * options.tokens / 2)
            * 4
            * CONFIG.layers
            * CONFIG.kv_heads
            * CONFIG.head_dim
        )
        print(
            f"{count} requests: step {1e3 * step:.3f} ms, {count / step:.0f} tokens/s, with the prompts {whole:.0f}; "
            f"{(weights + cached) / step / rate:.2f} of the copy rate"
        )
    if importlib.util.find_spec("transformers") is not None:
        del engine, model
        theirs(requests(max(options.batch), seed=2), options.tokens)


if __name__ == "__main__":
    main()
