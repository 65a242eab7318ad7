"""`python -m xformers.info`: the available backends, in xFormers' line format."""

from __future__ import annotations

from keyspan.info import collect
from keyspan.interop.xformers import __version__, _is_triton_available
from keyspan.ops.fmha import ALL_BW_OPS, ALL_FW_OPS


def get_info() -> dict[str, str]:
    """Name to value, in the order of printing."""
    found = collect()
    backends = found.pop("backends")
    return {
        "xFormers": f"{__version__} (keyspan {found['keyspan']})",
        **{f"memory_efficient_attention.{name}": why or "available" for name, why in backends.items()},
        **{f"memory_efficient_attention.{op.NAME}": "accepted as a hint" for op in [*ALL_FW_OPS, *ALL_BW_OPS]},
        "is_triton_available": str(_is_triton_available()),
        "pytorch.version": found["torch"],
        "pytorch.cuda": "available" if found["cuda"] else "not available",
        "gpu.name": ", ".join(found["cuda"]) or "none",
        "python.version": found["python"],
    }


def print_info() -> None:
    info = get_info()
    width = max(map(len, info)) + 2
    for name, value in info.items():
        print(f"{name + ':':<{width}}{value}")


if __name__ == "__main__":
    print_info()
