"""Layers on a GPU: linear_cross_entropy beside Liger's and Apple's, and the gated layers beside torch's formula.

    PYTHONPATH=src python benchmarks/layers_gpu.py            # half a minute on an H100; needs torch and triton

Liger Kernel (`liger_kernel`) and cut-cross-entropy (`cut_cross_entropy`) are timed where they are installed. Hidden
states, weight and products are bf16. Errors are of the gradients, ‖got − want‖ / ‖want‖, against fp64 on some tokens.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from keyspan.bench.clock import EventClock
from keyspan.bench.report import markdown_table
from keyspan.layers import geglu, linear_cross_entropy, swiglu

DEVICE = torch.device("cuda")
CLOCK = EventClock(400, 12)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean cross-entropy in nats of targets [T], given hidden [T, D] and weight [C, D]."""


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, options: tuple[object, ...]) -> Tensor:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    loss: Tensor = module.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *options)[0]
    return loss


def cut_loss(hidden: Tensor, weight: Tensor, targets: Tensor, filter_eps: str | None) -> Tensor:
    module = importlib.import_module("cut_cross_entropy")
    loss: Tensor = module.linear_cross_entropy(hidden, weight, targets, filter_eps=filter_eps)
    return loss


# Arguments of Liger's function, by position: bias, class weights, ignore_index, z-loss, smoothing, reduction, softcap,
# whether to return the z-loss, the dtype in which the weight's gradient is summed, five more, and the size of chunks.
_LIGER = (None, None, -100, 0.0, 0.0, "mean", None, False)
_WIDE_CHUNKS = (torch.float32, False, False, False, None, None, 16)
LOSSES: dict[str, Loss] = {
    "Keyspan": linear_cross_entropy,
    "Keyspan, reduction none": lambda h, w, t: linear_cross_entropy(h, w, t, reduction="none").mean(),
    "Liger": partial(liger_loss, options=_LIGER),
    "Liger, weight's gradient summed in fp32": partial(liger_loss, options=(*_LIGER, torch.float32)),
    "Liger, likewise, 16 times as much memory": partial(liger_loss, options=(*_LIGER, *_WIDE_CHUNKS)),
    "cut-cross-entropy": partial(cut_loss, filter_eps="high"),
    "cut-cross-entropy, no gradient left out": partial(cut_loss, filter_eps=None),
    "torch": torch_loss,
    "torch, compiled": torch.compile(torch_loss),
}


def seconds(call: Callable[[], object]) -> float:
    for _ in range(2):
        call()
    return statistics.median(CLOCK.times(call))


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))


def extra_memory(call: Callable[[], object]) -> float:
    """GiB allocated at most during a call, beyond what was there, gradients of the inputs included."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def inputs(T: int, D: int, C: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation `scale`."""
    torch.manual_seed(0)
    hidden = torch.randn(T, D, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(C, D, device=DEVICE) * scale / D**0.5).to(torch.bfloat16).requires_grad_()
    return hidden, weight, torch.randint(C, (T,), device=DEVICE)


def errors(loss: Loss, D: int, C: int, scale: float) -> tuple[float, float]:
    """Of the gradients of hidden and weight, 2048 tokens."""
    hidden, weight, targets = inputs(2048, D, C, scale)
    got = gradients(loss, hidden, weight, targets)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = torch.autograd.grad(F.cross_entropy(F.linear(*wide), targets), wide)
    first, second = (float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))
    return first, second


def compare_losses(T: int, D: int, C: int, scale: float) -> None:
    hidden, weight, targets = inputs(T, D, C, scale)
    products = seconds(lambda: hidden.detach() @ weight.detach().t())
    print(f"\nlinear_cross_entropy, {T} × {D} × {C}, logits of deviation {scale}; one product {products * 1e3:.2f} ms")
    lines = []
    for name, loss in LOSSES.items():
        try:
            call = partial(gradients, loss, hidden, weight, targets)
            taken = seconds(call)
            figures = (f"{taken * 1e3:.1f}", f"{taken / (4 * products):.2f}", f"{extra_memory(call):.2f}")
            lines.append((name, *figures, *(f"{x:.1e}" for x in errors(loss, D, C, scale))))
        except Exception as error:  # one that is not installed, or fails here
            lines.append((name, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}", *[""] * 4))
        print(lines[-1], flush=True)
        torch.cuda.empty_cache()
    header = ("", "ms", "÷ four products", "GiB beyond inputs", "error, hidden", "error, weight")
    print(markdown_table(header, lines))


def compare_gates(T: int, D: int, hidden: int) -> None:
    """Forward and backward of the whole layers, whose products are the same, beside torch's formula."""
    torch.manual_seed(0)
    x, w12, w3 = (
        torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5).requires_grad_()
        for shape in ((T, D), (2 * hidden, D), (D, hidden))
    )
    grad = torch.randn(T, D, device=DEVICE, dtype=torch.bfloat16)

    def plain(activation: Callable[[Tensor], Tensor]) -> Tensor:
        a, b = F.linear(x, w12).chunk(2, -1)
        return F.linear(activation(a) * b, w3)

    gelu = partial(F.gelu, approximate="tanh")
    layers: dict[str, Callable[[], Tensor]] = {
        "geglu": lambda: geglu(x, w12, None, w3, None),
        "geglu, torch": lambda: plain(gelu),
        "geglu, torch, compiled": torch.compile(lambda: plain(gelu)),
        "swiglu": lambda: swiglu(x, w12, None, w3, None),
        "swiglu, torch": lambda: plain(F.silu),
        "swiglu, torch, compiled": torch.compile(lambda: plain(F.silu)),
    }

    def backward(layer: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(), (x, w12, w3), grad)

    products = seconds(lambda: F.linear(x.detach(), w12.detach())) * 4.5  # 3 of this size, 3 of half of it
    print(f"\ngated layers, {T} × {D}, hidden {hidden}, forward and backward; products alone {products * 1e3:.2f} ms")
    lines = []
    for name, layer in layers.items():
        call = partial(backward, layer)
        taken = seconds(call)
        lines.append((name, f"{taken * 1e3:.2f}", f"{taken / products:.2f}", f"{extra_memory(call):.2f}"))
    print(markdown_table(("", "ms", "÷ products", "GiB beyond inputs"), lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--classes", type=int, default=50304)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for scale in (1.0, 5.0):  # of a model at first, and of a trained one, most of whose classes have no weight
        compare_losses(options.tokens, options.width, options.classes, scale)
    compare_gates(options.tokens, options.width, 64 * round(options.width * 8 / 3 / 64))


if __name__ == "__main__":
    main()
