"""One numerics of the layers and the model on a GPU: bits of products, layers and log-probabilities, and what it costs.

    PYTHONPATH=src python tests/gpu/device_layers.py [PART ...]

runs the parts named, or all: those that compare bits together, then those that measure time. It is no test of pytest's:
it needs a GPU, and prints. A line with DIFFERS is a defect.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keyspan.inference import Engine, Sampling
from keyspan.inference.graphs import DecodeGraphs
from keyspan.inference.pages import Held, PagedCache
from keyspan.layers import (
    add_rms_norm,
    geglu,
    linear,
    linear_cross_entropy,
    log_softmax,
    rms_norm,
    rotary_table,
    rotate_qkv,
    swiglu,
)  # fmt: skip
from keyspan.models import GPT, GPTConfig
from keyspan.testing import check_invariance

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = (1, 2, 7, 16, 17, 64, 65, 500, 1000, 4096, 32768)


def summarize(what: str) -> None:
    print(f"{what}: {COUNTS[True]} the same, {COUNTS[False]} differ", flush=True)
    COUNTS.update({True: 0, False: 0})


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


COUNTS = {True: 0, False: 0}
"""Comparisons that found the same bits, and others."""


def report(what: str, good: bool) -> None:
    COUNTS[good] += 1
    if not good and COUNTS[False] <= 12:
        print("DIFFERS", what, flush=True)


def same_rows(what: str, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare a function of the first rows of x, and of some in the middle, with its rows of all of x."""
    want = function(x)
    bad = []
    for rows in (n for n in ROWS if n <= len(x)):
        for first in {0, min(333, len(x) - rows)}:
            part = slice(first, first + rows)
            if not torch.equal(function(x[part].clone()), want[part]):
                bad.append((first, rows))
    report(f"{what} {list(x.shape)} {bad or ''}", not bad)


def products(name: str) -> None:
    """Products of all counts of rows, and by every tile of the table."""
    from keyspan.layers import triton_product

    dtype = DTYPES[name]
    for N, K in ((2304, 768), (768, 2048), (50257, 768), (130, 771)):
        weight, bias = draw(N, K, dtype=dtype), draw(N, dtype=dtype)
        x = draw(32768 if N < 9999 else 4096, K, dtype=dtype)
        x[::7] *= 100
        x[:, ::5] *= 30
        same_rows(f"linear {name} {N}", lambda x, w=weight, b=bias: linear(x, w, b, invariant=True), x)
        x, chosen = x[:1000].clone(), triton_product.tile
        want = linear(x, weight, bias, invariant=True)
        table = triton_product._SINGLE if dtype == torch.float32 else triton_product._HALF
        for tile in table["hopper"]:
            triton_product.tile = lambda *form, tile=tile: tile
            report(
                f"linear {name} {N} {K} by {tuple(tile)}", torch.equal(linear(x, weight, bias, invariant=True), want)
            )
        triton_product.tile = chosen
        exact, plain = x.double() @ weight.double().t() + bias.double(), linear(x, weight, bias)
        ours, torchs = (float((y.double() - exact).norm() / exact.norm()) for y in (want, plain))
        print(f"        error of {name} {N} {K}: {ours:.2e}, torch's {torchs:.2e}", flush=True)


def layers(name: str) -> None:
    dtype = DTYPES[name]
    for D in (64, 768, 2048, 1000):
        x, weight = draw(32768, D, dtype=dtype), draw(D)
        same_rows(f"rms_norm {name}", lambda x, w=weight: rms_norm(x, w), x)
        more = draw(32768, D, dtype=dtype)
        both = torch.stack([x, more], 1)
        same_rows(f"add_rms_norm {name}", lambda x, w=weight: torch.cat(add_rms_norm(x[:, 0], x[:, 1], w), 1), both)
    w12, w3 = draw(2 * 512, 256, dtype=dtype), draw(256, 512, dtype=dtype)
    for layer in (swiglu, geglu):
        same_rows(
            f"{layer.__name__} {name}",
            lambda x, f=layer: f(x, w12, None, w3, None, True),
            draw(32768, 256, dtype=dtype),
        )
    turn = rotary_table(torch.arange(32768, device="cuda"), 64)
    table = torch.cat([*turn, draw(32768, 6 * 64, dtype=dtype).float()], 1)
    same_rows(
        f"rotate_qkv {name}",
        lambda x: torch.cat(
            rotate_qkv(x[:, 64:].to(dtype), tuple(t.contiguous() for t in x[:, :64].chunk(2, 1)), (3, 1, 2)), 2
        )[0],
        table,
    )
    for C in (640, 50257, 50304):
        z = draw(1000, C, dtype=dtype)
        same_rows(f"log_softmax {name}", log_softmax, z)
        report(
            f"log_softmax {name} of a row {C}",
            torch.equal(torch.stack([log_softmax(row) for row in z[:9]]), log_softmax(z)[:9]),
        )
    x, head, targets = (
        draw(4096, 256, dtype=dtype),
        draw(5003, 256, dtype=dtype),
        torch.randint(5003, (4096,), device="cuda"),
    )
    want = log_softmax(linear(x, head, invariant=True)).gather(1, targets[:, None])[:, 0]
    for chunk in (100, 1000, None):
        losses = linear_cross_entropy(x, head, targets, reduction="none", chunk=chunk, invariant=True)
        report(f"linear_cross_entropy {name} {chunk}", torch.equal(-losses, want))


BASE: dict[str, Any] = {"vocab_size": 1003, "dim": 256, "layers": 3, "heads": 4, "kv_heads": 2, "hidden": 640}
CONFIGS = {
    "plain": GPTConfig(**BASE),
    "windows": GPTConfig(**BASE, windows=(70, None, 70), tie_embeddings=False),
    "alibi, biases": GPTConfig(**BASE, positions="alibi", qkv_bias=True, mlp_bias=True),
    "norms": GPTConfig(**BASE, qk_norm=True, post_norms=True, activation="gelu_tanh", embedding_scale=9.8),
}  # fmt: skip


def trained(config: GPTConfig) -> GPT:
    """A model after some steps on packed documents, so that its probabilities are not those of noise."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT(config, invariant=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        tokens = torch.randint(0, 60, (2048,), device="cuda").cumsum(0) % config.vocab_size
        lengths = [700, 48, 1000, 300]
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens, tokens.roll(-1), lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"        loss {float(loss.detach()):.3f}", flush=True)
    return model


def model(name: str, kind: str) -> None:
    """Log-probabilities of the engine, with and without graphs, beside those of a training step; `mixed`: under autocast,
    of fp32 weights."""
    if name == "mixed":
        with torch.autocast("cuda", torch.bfloat16):
            check_model(f"{kind} {name}", trained(CONFIGS[kind]))
        return
    net = trained(CONFIGS[kind]).to(DTYPES[name])
    check_model(f"{kind} {name}", net)
    if kind == "norms":
        summarize(f"model {name} {kind}")
        net.invariant = False
        check_model(f"{kind} {name} without the switch", net)


def check_model(what: str, net: GPT) -> None:
    source = torch.Generator().manual_seed(1)
    prompts = [torch.randint(net.config.vocab_size, (n,), generator=source).tolist() for n in (5, 190, 1, 64, 33, 700)]
    sampling = [Sampling(40 + n, temperature=1.0, seed=n, logprobs=1, ignore_end=True) for n in range(len(prompts))]
    found = {}
    for graphs in (True, False):
        engine = Engine(net, memory=2**28, step_tokens=256, graphs=graphs)
        found[graphs] = engine.generate(prompts, sampling)
        alone = Engine(net, memory=2**28, graphs=graphs).generate(prompts[:1], sampling[0])
        report(f"{what}: answer alone and in a batch, graphs {graphs}", alone == found[graphs][:1])
    report(f"{what}: answers with and without graphs", found[True] == found[False])
    documents = [prompt + answer.tokens for prompt, answer in zip(prompts, found[True], strict=True)]
    tokens = torch.tensor([token for document in documents for token in document], device="cuda")
    net.train()
    hidden = net(tokens, list(map(len, documents)))
    wanted = tokens.roll(-1)
    logprobs = log_softmax(net.logits(hidden)).gather(1, wanted[:, None])[:, 0]
    losses = linear_cross_entropy(hidden, net.head_weight, wanted, reduction="none", invariant=net.invariant)
    net.eval()
    assert logprobs.requires_grad
    start = 0
    for prompt, answer, document in zip(prompts, found[True], documents, strict=True):
        rows = slice(start + len(prompt) - 1, start + len(document) - 1)
        want = torch.tensor(answer.logprobs)
        for kind, got in (("log_softmax", logprobs), ("loss", -losses)):
            mine = got[rows].detach().cpu()
            report(f"{what}: {kind} of a training step, {len(prompt)} + {len(answer.tokens)} tokens, largest difference "
                   f"{float((mine - want).abs().max()):.1e}", torch.equal(mine, want))  # fmt: skip
        start += len(document)
    if not net.invariant:
        return
    with torch.no_grad():
        try:
            check_invariance(
                lambda xs: net.logits(net(torch.cat(list(xs)), [len(x) for x in xs])).split([len(x) for x in xs]),
                [x.cuda() for x in tokens.cpu().split(list(map(len, documents)))], threads=(1,),
            )  # fmt: skip
            report(f"{what}: check_invariance", True)
        except AssertionError as error:
            report(f"{what}: check_invariance: {error}", False)


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(x) for name, x in times.items()}


def switched(net: GPT, value: bool, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        net.invariant = value
        return call()

    return run


def cost_training() -> None:
    """124M parameters, 32768 tokens in documents of 2048, bf16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = GPT(GPTConfig(50304, 768, 12, 12, hidden=2048)).bfloat16()
    tokens, lengths = torch.randint(50304, (32768,), device="cuda"), [2048] * 16

    def forward() -> None:
        with torch.no_grad():
            net(tokens, lengths)

    def step() -> None:
        net.loss(tokens, tokens.roll(-1), lengths).backward()

    def loss() -> None:
        with torch.no_grad():
            net.loss(tokens, tokens.roll(-1), lengths)

    for name, call in (("forward to hidden states", forward), ("loss", loss), ("loss and gradients", step)):
        calls = {"with": switched(net, True, call), "without": switched(net, False, call)}
        for run in (*calls.values(), *calls.values()):
            run()
        took = interleaved(calls, 9)
        print(
            f"124M, 32768 tokens, {name}: {took['with']:.1f} / {took['without']:.1f} ms",
            took["with"] / took["without"],
            flush=True,
        )


def cost_decoding() -> None:
    """A step of 1.24B parameters (Llama 3.2's shape), bf16, by CUDA graphs; sequences of 256 tokens."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        net = GPT(GPTConfig(128256, 2048, 16, 32, 8, 8192, 64)).eval()
    torch.set_default_dtype(torch.float32)
    for batch in (1, 64):
        calls, kept = {}, []
        for value in (True, False):
            net.invariant = value
            cache = PagedCache(net.config, 20 * batch, 16, torch.bfloat16, torch.device("cuda"), spare=True)
            graphs = DecodeGraphs(net, cache, batch)
            kept.append((cache, graphs))
            held = [Held() for _ in range(batch)]
            for one in held:
                cache.reserve(one, 300)
                one.tokens = 256
            with torch.inference_mode():
                graphs.step(held, [5] * batch)
            calls["with" if value else "without"] = next(iter(graphs._replays.values()))
        took = interleaved(calls, 21)
        print(
            f"1.24B, decoding step of {batch}: {took['with']:.3f} / {took['without']:.3f} ms",
            took["with"] / took["without"],
            flush=True,
        )


BITS = {
    f"{part} {name}": [(part, name, *kind) for kind in kinds]
    for part, names, kinds in (
        ("model", ("bf16", "fp32", "mixed"), [(kind,) for kind in CONFIGS]),
        ("products", DTYPES, [()]),
        ("layers", ("bf16", "fp32"), [()]),
    )
    for name in names
}
"""Arguments of the processes of each part: most of their time is for compiling."""
TIMES = ["cost_decoding", "cost_training"]


def main(parts: list[str]) -> None:
    start = time.perf_counter()
    running = [
        (of, subprocess.Popen([sys.executable, __file__, "one", *of]))
        for part in parts
        if part in BITS
        for of in BITS[part]
    ]
    for of, process in running:
        try:
            code = process.wait(max(1, 150 - (time.perf_counter() - start)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = -1
        print(f"{' '.join(of)}: exit {code}, {time.perf_counter() - start:.0f} s", flush=True)
    for part in (x for x in parts if x in TIMES):
        subprocess.run([sys.executable, __file__, "one", part], check=False, timeout=100)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        globals()[sys.argv[2]](*sys.argv[3:])
        summarize(" ".join(sys.argv[2:]))
    else:
        main(sys.argv[1:] or [*BITS, *TIMES])
