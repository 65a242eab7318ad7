"""Compiles the kernels of a call for another architecture and reads registers, spills and instructions of the result.

    python tests/gpu/offline.py sm_90 --all

prints one JSON object per kernel. Needs the triton wheel (its ptxas, cuobjdump and nvdisasm), no GPU and no driver.
Cannot run in a process whose kernels are decorated for the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": None}


class Compiled(NamedTuple):
    """One compiled kernel."""

    kernel: str
    shared: int
    registers: int
    spills: int
    """Local loads and stores in the machine code."""
    wgmma: int
    wgmma8: int
    """wgmma with fp8 operands."""
    mma: int
    mma8: int
    tma: int
    loop_spills: int
    """Those in the innermost loops that have wgmma."""
    serialised: list[str]
    """ptxas's C75xx notes: wgmma instructions that wait for each other."""
    lost: int
    """Descriptors of wgmma made of registers that were not set for it, see `_lost_descriptors`."""
    overlaid: int
    """Barriers of shared memory whose address plain instructions read or write, see `_overlaid_barriers`."""


class _Driver:
    """The parts of a driver that the compiler asks for."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(name: str) -> Any:
    """Inside, launches compile for `name` instead; yields the list of results."""
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a cache hit would print no log
        import triton
        from triton.backends.compiler import GPUTarget

        from keyspan.backends.triton import config, launch

        capability = TARGETS[name]
        if capability is None:
            found = GPUTarget("hip", name, 64)
        else:
            found = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        triton.runtime.driver.set_active(_Driver(found))
        family = config.family(capability or (9, 4), amd=capability is None)
        launch._family = lambda device: family
        launch._processors = lambda device: 132
        if capability is None:
            launch._precision = lambda: "ieee"
        launch._assembly = lambda x: "none" if capability is None else "pure" if capability[0] > 9 else "effectful"
        launch._descriptors_allowed = lambda x: x.element_size() <= 2 and family in ("hopper", "blackwell")
        results: list[Compiled] = []

        def run(kernel: Any, grid: Any, *args: Any, tile: Any) -> None:
            # Triton prints ptxas's log.
            with redirect_stdout(StringIO()) as log:
                made = kernel.warmup(*args, grid=grid, **tile.options())
            results.append(_read(kernel.fn.__name__, made, log.getvalue()))

        launch.run = run
        yield results


def _read(name: str, made: Any, log: str) -> Compiled:
    registers = spills = loop_spills = wgmma = wgmma8 = mma = mma8 = tma = lost = overlaid = 0
    if "cubin" in made.asm:
        import triton

        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
            ).stdout
            code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
        registers = int((re.search(r"REG:(\d+)", usage) or [0, "0"])[1])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        loop_spills = sum(bool(re.search(r"\b(?:LDL|STL)\b", line)) for loop in _product_loops(code) for line in loop)
        wgmma, wgmma8 = (len(re.findall(rf"\b{letter}GMMA", code)) for letter in "HQ")
        mma8 = len(re.findall(r"\bQMMA", code))
        mma = len(re.findall(r"\bHMMA", code)) + len(re.findall(r"tcgen05\.mma", made.asm["ptx"]))
        tma = len(re.findall(r"\bUTMALDG", code))
        lost = _lost_descriptors(code)
        overlaid = _overlaid_barriers(code)
    elif "amdgcn" in made.asm:
        mma = len(re.findall(r"v_mfma", made.asm["amdgcn"]))
        spills = int((re.search(r"\.vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"]) or [0, "0"])[1])
        registers = int((re.search(r"\.vgpr_count:\s+(\d+)", made.asm["amdgcn"]) or [0, "0"])[1])
    serialised = re.findall(r"(C75\d\d)", log)
    return Compiled(
        name,
        made.metadata.shared,
        registers,
        spills,
        wgmma,
        wgmma8,
        mma,
        mma8,
        tma,
        loop_spills,
        serialised,
        lost,
        overlaid,
    )


def _overlaid_barriers(code: str) -> int:
    """How many barriers (mbarrier) are initialised in memory that is also used as plain memory.

    Triton's allocator does that to barriers that nobody waits for. What is stored there gets lost now and then, when the
    GPU turns to another process.
    """
    at = re.compile(r"\[UR\d+\+(0x[0-9a-f]+)\]")
    lines = [(line, found[1]) for line in code.splitlines() if (found := at.search(line))]
    barriers = {address for line, address in lines if "SYNCS.EXCH" in line}
    return len(barriers & {address for line, address in lines if re.search(r"\b(?:LDS|STS|ATOMS)\b", line)})


def _lost_descriptors(code: str) -> int:
    """How many descriptors of shared memory are sums with a register that holds something else.

    ptxas 12.8 does that to `forward_kernel` with values of up to 16 columns that TMA cannot read: the upper half of an
    address is a constant plus 0, for which it takes a register that nothing set to 0. The program then reads memory that
    is not its own.
    """
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?(.*?);", code)
    lost = 0
    for n, op in enumerate(instructions):
        # The upper half: how rows are swizzled, and the distance of eight of them.
        found = re.match(r"UIADD3\.X UR\d+, UR(\d+), (-?0x[37]f\w{6}|0x4\w{7}), URZ, UP\d", op)
        if not found:
            continue
        source = int(found[1])
        for earlier in reversed(instructions[:n]):
            made = re.match(r"(U\w[\w.]*|R2UR\S*|VOTEU\S*) (?:UP\d, )*UR(\d+)\b(.*)", earlier)
            wide = 2 if made and (".64" in made[1] or "WIDE" in made[1]) else 1
            if made and int(made[2]) <= source < int(made[2]) + wide:
                lost += not (made[1] == "UMOV" and made[3] == ", URZ ")
                break
    return lost


def _product_loops(code: str) -> list[list[str]]:
    """The instructions of each innermost loop that has wgmma, from a disassembly."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if found := re.match(r"\s*(\.L_\w+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    # A loop repeats under a condition. Without one a branch returns from where the program waits for a barrier, at the end.
    branches = [(re.match(r"@.*\bBRA\b.*`\((\.L_\w+)\)", op), n) for n, op in enumerate(instructions)]
    loops = [(labels[found[1]], n) for found, n in branches if found and labels.get(found[1], n + 1) <= n]
    loops = [(a, b) for a, b in loops if any("GMMA" in op for op in instructions[a:b])]
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return [instructions[a : b + 1] for a, b in inner]


class Work(NamedTuple):
    """A problem whose forward and backward kernels are compiled."""

    dtype: str
    head_dim: int
    kind: str
    """causal, full, alibi, table, bias, decode, paged; one: one query of one head, whose keys are split (Triton
    specialises on arguments that are 1); invariant: documents, with invariant results; segments: the same with so many
    tiles and keys that a program adds up several segments; odd: two ranges, keys of `head_dim`
    and values of 3 elements, which TMA does not read."""
    stored: str = ""
    """Dtype of keys and values if it is not `dtype`: a scale per page of paged keys, else per head. A query of 8 bits has
    a scale per row."""


FORWARD = ("decode", "paged", "one")
"""Kinds with few rows; their backward is not compiled."""

FEW = {
    "sm_90": [("bfloat16", 128, "causal"), ("bfloat16", 64, "causal"), ("bfloat16", 128, "table"),
              ("bfloat16", 256, "full"), ("bfloat16", 128, "paged"), ("float8_e4m3fn", 128, "causal"),
              ("bfloat16", 64, "one"), ("bfloat16", 128, "segments"), ("bfloat16", 19, "odd"),
              ("bfloat16", 128, "decode", "int8"), ("bfloat16", 128, "paged", "float8_e4m3fn")],
    "sm_80": [("bfloat16", 64, "causal"), ("bfloat16", 128, "paged", "int8")],
    "sm_100": [("bfloat16", 64, "causal"), ("float8_e4m3fn", 128, "causal")],
    "gfx942": [("bfloat16", 64, "causal"), ("bfloat16", 128, "paged", "int8"), ("bfloat16", 16, "causal")],
}  # fmt: skip
"""The works compiled by default, of which only the first has gradients."""


def works(name: str, every: bool) -> list[Work]:
    """The works compiled for an architecture; `every`: all of them."""
    if not every:
        return [Work(*work) for work in FEW[name]]
    kinds = ("causal", "full", "alibi", "table", "bias")
    found = [Work(dtype, D, kind) for dtype in ("bfloat16", "float32") for D in (64, 128, 256) for kind in kinds]
    found += [Work(dtype, 128, kind) for dtype in ("bfloat16", "float16") for kind in ("decode", "paged")]
    found += [Work("float16", 128, "causal"), Work("bfloat16", 64, "one"), Work("bfloat16", 16, "causal")]
    invariant = ("invariant", "segments")
    found += [Work(dtype, D, kind) for dtype in ("bfloat16", "float32") for D in (64, 128, 256) for kind in invariant]
    found += [Work(dtype, D, "odd") for dtype in ("bfloat16", "float32") for D in (7, 19, 40, 100)]
    stored = ("int8",) if name == "sm_80" else ("int8", "float8_e4m3fn")
    found += [Work(dtype, D, kind, s) for s in stored for dtype, D, kind in (
        ("bfloat16", 128, "decode"), ("bfloat16", 128, "paged"), ("bfloat16", 64, "paged"), ("bfloat16", 256, "paged"),
        ("float16", 128, "paged"), ("bfloat16", 128, "causal"), ("bfloat16", 64, "causal"), ("bfloat16", 128, "bias"),
        ("float32", 128, "causal"))]  # fmt: skip
    if name != "sm_80":  # which has no e4m3
        found += [Work("float8_e4m3fn", D, kind) for D in (64, 128, 256) for kind in kinds]
        found += [Work("float8_e4m3fn", 128, kind) for kind in ("decode", "paged")]
    return found


def crowded(work: Work) -> bool:
    """Whether NaN repair needs more registers than there are."""
    return work.head_dim == 256 or (work.dtype == "float8_e4m3fn" and work.kind in ("decode", "paged"))


def problem_of(work: Work) -> Any:
    """A problem of this kind; its sizes matter only where the launcher reads them."""
    import torch

    import keyspan
    from keyspan.core.problem import STORED, make_problem

    M, N, G, H = 1024, 1024, 2, 1
    mask: keyspan.Mask | None = keyspan.Causal()
    bias: keyspan.Bias | torch.Tensor | None = None
    if work.kind == "full":
        mask = None
    elif work.kind == "two ranges":
        mask = keyspan.Causal() & keyspan.Window(100, 0) & keyspan.Sinks(4)
    elif work.kind == "invariant":
        mask = keyspan.Documents([700, 324]) & keyspan.Causal()
    elif work.kind == "segments":
        M = N = 12000
        mask = keyspan.Documents([11000, 1000]) & keyspan.Causal()
    elif work.kind == "odd":
        mask = keyspan.Documents([700, 324]) & keyspan.Window(300, 0) & keyspan.Prefix(5)
    elif work.kind == "alibi":
        bias = keyspan.Alibi(torch.rand(G))
    elif work.kind == "table":
        bias = keyspan.RelativeBias(torch.rand(G, 257))
    elif work.kind == "bias":
        bias = torch.zeros(G, M, N)
    elif work.kind == "decode":
        M, H = 1, 4
        mask = keyspan.KeyLengths(torch.tensor([900])) & keyspan.Causal("bottom_right")
    elif work.kind == "one":
        M, G, mask = 1, 1, None
    elif work.kind == "paged":
        M, H = 4, 4
        pages = torch.arange(16, dtype=torch.int32).view(4, 4)
        mask = keyspan.PagedKeys([1] * 4, [200] * 4, pages, 64) & keyspan.Causal("bottom_right")
    dtype = getattr(torch, work.dtype)
    stored = getattr(torch, work.stored or work.dtype)
    q, k, v = (
        torch.zeros(1, n, h, work.head_dim, dtype=t) for n, h, t in ((M, G * H, dtype), (N, G, stored), (N, G, stored))
    )
    if work.kind == "odd":
        v = torch.zeros(1, N, G, 3, dtype=dtype)
    scales = {}
    if stored in STORED:
        scale = torch.ones(1, 16 if work.kind == "paged" else 1, G)
        scales = {"key_scale": scale, "value_scale": scale}
    if dtype in STORED:
        scales["query_scale"] = torch.ones(1, M, G * H)
    return make_problem(q, k, v, mask=mask, bias=bias, invariant=work.kind in ("invariant", "segments"), **scales)[0]


HOPPER = [(64, "full"), (128, "causal"), (128, "table"), (256, "causal")]
"""What the Hopper kernels are compiled for by default; with `--all` it is `HOPPER_ALL`."""
HOPPER_ALL = [(64, kind) for kind in ("full", "causal", "two ranges")]
HOPPER_ALL += [(D, kind) for D in (128, 256) for kind in ("full", "causal", "two ranges", "alibi", "table")]


def hopper_main(every: bool) -> None:
    """Print what became of the Hopper kernels, where they have all that a problem asks for."""
    with target("sm_90") as results:
        import torch

        from keyspan.backends import Needs
        from keyspan.backends.triton import hopper, launch

        hopper.reason_against, hopper.backward_reason_against = hopper.missing, hopper.backward_missing
        hopper.keys_reason_against, hopper.queries_reason_against = hopper.keys_missing, hopper.queries_missing
        needs = Needs(True, True, True, False, False, False, [])
        for D, kind in HOPPER_ALL if every else HOPPER:
            problem = problem_of(Work("bfloat16", D, kind))
            if kind == "causal":
                problem = problem._replace(row_keys=8192)  # as of a long sequence, which can have another tile
            out, lse = launch.forward(problem)
            if None in (hopper.backward_missing(problem, needs), hopper.keys_missing(problem, needs)):
                launch.backward(problem, torch.zeros_like(out), None, out, lse, needs)
            for result in results:
                print(json.dumps({"head_dim": D, "kind": kind, **result._asdict()}), flush=True)
            results.clear()


def products_main(name: str) -> None:
    """Print what became of the product of `keyspan.layers.linear(invariant=True)`, each tile of the table."""
    with target(name) as results:
        import torch

        from keyspan.backends.triton import config, launch
        from keyspan.layers import triton_product

        family = config.family(TARGETS[name] or (9, 4), amd=TARGETS[name] is None)
        triton_product._device = lambda x: (family, 132)
        triton_product.run = lambda *args, tile: launch.run(
            *args, tile=config.TileConfig(tile.BM, tile.BN, tile.warps, tile.stages)
        )
        if TARGETS[name] is None:
            triton_product._precision = lambda: "ieee"
        for dtype in (torch.bfloat16, torch.float32):
            table = triton_product._SINGLE if dtype == torch.float32 else triton_product._HALF
            for tile in table.get(family, table[""]):
                triton_product.tile = lambda *form, tile=tile: tile
                x, weight = torch.zeros(64, 2048, dtype=dtype), torch.zeros(4096, 2048, dtype=dtype)
                triton_product.product(x, weight, None)
                print(json.dumps({"dtype": str(dtype)[6:], "tile": tile, **results[-1]._asdict()}), flush=True)


def _never(x):  # type: ignore[no-untyped-def]
    return False


def main(name: str, every: bool, plain: bool, part: int, parts: int) -> None:
    """Print the results of every `parts`-th work of an architecture from the `part`-th on.

    Args:
        plain: only forward of works that are `crowded`, compiled without NaN repair. Repair is inlined and has registers
            of its own; what remains is the code that every call runs.
    """
    import torch

    from keyspan.backends import Needs

    with target(name) as results:
        import triton

        from keyspan.backends.triton import forward_kernels, launch

        todo = works(name, every)[part::parts]
        if plain:
            forward_kernels.has_nan = triton.jit(_never)
            todo = [work for work in todo if crowded(work) and work.dtype != "float32"]
        for number, work in enumerate(todo):
            problem = problem_of(work)
            out, lse = launch.forward(problem)
            if (every or number == 0) and work.kind not in FORWARD and not problem.quantized and not plain:
                needs = Needs(True, True, True, False, problem.table is not None, False, [True] * len(problem.biases))
                launch.backward(problem, torch.zeros_like(out), None, out, lse, needs)
                # Without the query's gradient a kernel of its own makes the statistics.
                launch.backward(
                    problem, torch.zeros_like(out), None, out, lse, Needs(*[False] * 6, [False] * len(problem.biases))
                )
            for result in results:
                print(json.dumps({**work._asdict(), **result._asdict()}), flush=True)
            results.clear()


if __name__ == "__main__":
    if sys.argv[1] == "hopper":
        hopper_main("--all" in sys.argv)
    elif sys.argv[2] == "products":
        products_main(sys.argv[1])
    else:
        main(sys.argv[1], "--all" in sys.argv, "--plain" in sys.argv, int(sys.argv[2]), int(sys.argv[3]))
