"""Loads the compiled library with ctypes and describes its C interface (native/params.h).

The interface is plain C, so one build serves every torch and Python version. The library is loaded when this module is
first imported, which is when a backend is first chosen.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ISAS = ("portable", "avx2", "avx512", "avx512bf16")
"""Instruction sets, from the least to the most capable; the library holds one build of its kernels for each."""

_Fields = tuple[tuple[str, str], ...]
"""(name, type) of each field of a C struct in order; type is `pointer`, `float`, or `int` and a count."""


def _fields(kind: str, names: str) -> _Fields:
    return tuple((name, kind) for name in names.split())


POINTER_FIELDS = _fields(
    "pointer",
    "q k v lo hi diagonal origin sequence block_table mask biases slopes table sinks k_scale v_scale seed out lse "
    "grad_out grad_lse "
    "dq dk dv dslopes dtable dsinks workspace",
)
STATE_FIELDS = _fields("int1", "isa threads")
NUMBER_FIELDS = (
    *_fields("int1", "dtype out_dtype stored k_run v_run B M N G H K V"),
    ("q_stride", "int5"),
    ("k_stride", "int4"),
    ("v_stride", "int4"),
    ("grad_out_stride", "int5"),
    *_fields("int1", "S RB sequences pages page_size bias_count slopes_by_batch reach fold_batch fold_groups"),
    *_fields("float", "scale softcap dropout_p"),
)
PARAMS_FIELDS: _Fields = (*POINTER_FIELDS, *STATE_FIELDS, *NUMBER_FIELDS)
"""Those of `Params`."""
DENSE_FIELDS: _Fields = (
    ("data", "pointer"),
    ("dtype", "int1"),
    ("stride", "int5"),
    ("grad", "pointer"),
    ("grad_stride", "int5"),
    ("columns", "int1"),
)
"""Those of `Dense`."""
LINEAR_FIELDS: _Fields = (
    *_fields("pointer", "x weight scale bias out"),
    *_fields("int1", "isa threads dtype storage applied rows inputs outputs x_stride weight_stride"),
)
"""Those of `Linear`, in native/linear.h."""
PRODUCT_FIELDS: _Fields = (
    *_fields("pointer", "a b bias out"),
    *_fields(
        "int1", "isa threads dtype b_dtype out_dtype a_transposed b_transposed accumulate M K N a_stride b_stride"
    ),
)
"""Those of `Product`, in native/product.h."""
LAYER_FIELDS: dict[str, _Fields] = {
    "rms_norm": (
        *_fields("pointer", "x residual weight total out inverse grad grad_total dx dresidual dweight"),
        *_fields("int1", "isa threads total_dtype residual_dtype out_dtype T D parts"),
        *_fields("float", "eps"),
    ),
    "layer_norm": (
        *_fields("pointer", "x residual weight bias out"),
        *_fields("int1", "isa threads dtype T D"),
        *_fields("float", "eps"),
    ),
    "rotary": (
        *_fields("pointer", "q k v cosine sine out"),
        *_fields("int1", "isa threads dtype T K"),
        *_fields("int3", "heads stride"),
        *_fields("int1", "out_stride back interleaved"),
    ),
    "gate": (*_fields("pointer", "x12 grad out dx12"), *_fields("int1", "isa threads dtype activation T D")),
    "cross_entropy": (
        *_fields("pointer", "z bias targets lse losses grads"),
        *_fields("int1", "isa threads dtype stride T C ignore_index gradient"),
        *_fields("float", "softcap z_loss"),
    ),
    "segment_mean": (*_fields("pointer", "x ends out"), *_fields("int1", "isa threads dtype count D")),
    "largest": (*_fields("pointer", "z best"), *_fields("int1", "isa threads dtype T C")),
    "gather": (*_fields("pointer", "from to index"), *_fields("int1", "threads T size")),
    "store": (
        *_fields("pointer", "from to scale slots"),
        *_fields("int1", "threads dtype stored T heads D from_stride"),
    ),
    "head_norm": (
        *_fields("pointer", "x weight inverse"),
        *_fields("int1", "isa threads dtype T D heads stride"),
        *_fields("float", "eps"),
    ),
}
"""Those of the structs of native/layers.h and native/program.cpp, by the name of the function that takes one."""
PROGRAM_FUNCTIONS = (
    "linear", "rms_norm", "rotary", "gate", "store", "head_norm", "layer_norm", "params", "gather", "largest",
    "segment_mean",
)  # fmt: skip
"""`Function` of native/program.cpp, each by the name of its struct."""


def _struct(fields: _Fields) -> struct.Struct:
    """Packs the values of these fields, all of 8 bytes."""
    codes = ("q" if kind == "pointer" else "d" if kind == "float" else f"{kind[3:]}q" for _, kind in fields)
    return struct.Struct("=" + "".join(codes))


POINTERS = _struct((*POINTER_FIELDS, *STATE_FIELDS))
"""The first part of `Params`: it changes from call to call."""
NUMBERS = _struct(NUMBER_FIELDS)
"""The second part of `Params`: repeated calls with the same signature reuse these bytes."""
DENSE = _struct(DENSE_FIELDS)
LINEAR = _struct(LINEAR_FIELDS)
PRODUCT = _struct(PRODUCT_FIELDS)
LAYERS = {name: _struct(fields) for name, fields in LAYER_FIELDS.items()}

_HERE = Path(__file__).parent
_WHY_NOT_BUILT = _HERE / "not_built.txt"
"""The build hook (hatch_build.py) writes it when the library cannot be compiled."""
_CHECKOUT = _HERE.parents[3] if _HERE.parents[2].name == "src" else None
"""Where native/ lies beside src/, in a source checkout."""
_COMMAND = "python native/build.py src/keyspan/backends/native"
_BUILD = f"install keyspan again, or in a checkout run `{_COMMAND}`"


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and the reason why it cannot be used."""
    found = sorted(_HERE.glob("libkeyspan.*"))
    if not found:
        return None, (
            _WHY_NOT_BUILT.read_text().strip()
            if _WHY_NOT_BUILT.exists()
            else f"the native library was not built: {_BUILD}"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        if _is_of_other_sources(library):
            reason = f"the native library was compiled from other sources than those in {_CHECKOUT}/native"
            warnings.warn(f"{reason}, and is not used: run `{_COMMAND}` there", stacklevel=2)
            return None, f"{reason}: {_BUILD}"
        structs = {"params": PARAMS_FIELDS, "dense": DENSE_FIELDS, "linear": LINEAR_FIELDS, "product": PRODUCT_FIELDS}
        structs |= LAYER_FIELDS
        for name, fields in structs.items():
            describe = getattr(library, f"keyspan_{name}_fields")
            describe.restype = ctypes.c_char_p
            difference = _difference(fields, describe().decode())
            if difference is not None:
                return None, f"the native library is of another version of keyspan ({name}: {difference}): {_BUILD}"
    except (OSError, AttributeError) as error:
        return None, f"the native library cannot be loaded: {error}"
    for name in ("forward", "backward", "supports"):
        getattr(library, f"keyspan_{name}").restype = ctypes.c_int64
    library.keyspan_supports.argtypes = [ctypes.c_int64]
    library.keyspan_threading.restype = ctypes.c_char_p
    library.keyspan_linear.restype = library.keyspan_product.restype = None
    library.keyspan_run.restype = None
    library.keyspan_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.keyspan_run_parts.restype = None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.keyspan_run_parts.argtypes = [
        pointer, number, pointer, number, pointer, number, pointer, number, pointer, number, number,
    ]  # fmt: skip
    return library, None


def _is_of_other_sources(library: ctypes.CDLL) -> bool:
    """Whether the library was compiled from other sources than those of the checkout that it lies in."""
    path = None if _CHECKOUT is None else _CHECKOUT / "native" / "build.py"
    spec = None if path is None or not path.exists() else importlib.util.spec_from_file_location("_native_build", path)
    if spec is None or spec.loader is None:
        return False
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    describe = getattr(library, "keyspan_stamp", None)
    if describe is None:
        return True
    describe.restype = ctypes.c_char_p
    return bool(describe().decode() != build.stamp())


def _difference(fields: _Fields, description: str) -> str | None:
    """The first field that the library's description of a struct has otherwise, or None."""
    here, there = [f"{name}:{kind}" for name, kind in fields], description.split()
    for n, (want, got) in enumerate(itertools.zip_longest(here, there, fillvalue="nothing")):
        if want != got:
            return f"field {n} is {got} there and {want} here"
    return None


LIBRARY, WHY_ABSENT = _load()
FORWARD: Any = getattr(LIBRARY, "keyspan_forward", None)
BACKWARD: Any = getattr(LIBRARY, "keyspan_backward", None)
LINEAR_PRODUCT: Any = getattr(LIBRARY, "keyspan_linear", None)
MATRIX_PRODUCT: Any = getattr(LIBRARY, "keyspan_product", None)
SUPPORTED = tuple(isa for number, isa in enumerate(ISAS) if LIBRARY is not None and LIBRARY.keyspan_supports(number))
"""Those of `ISAS` that this machine runs."""

_isa = len(SUPPORTED) - 1 if SUPPORTED else 0


def isa_number() -> int:
    """The number of the instruction set in use."""
    return _isa


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Inside, the native backend uses this instruction set instead of the best one that the machine has.

    Args:
        isa: one of `ISAS`.

    Raises:
        ValueError: for an unknown instruction set, or one that this machine does not run.
    """
    global _isa  # noqa: PLW0603
    if isa not in SUPPORTED:
        raise ValueError(f"isa: got {isa!r}, want one that this machine runs: {', '.join(SUPPORTED) or 'none'}")
    before, _isa = _isa, ISAS.index(isa)
    try:
        yield
    finally:
        _isa = before


def threading() -> str:
    """How the library runs its threads, and which OpenMP runtimes the process has loaded: several may contend."""
    if LIBRARY is None:
        return "none"
    name: str = LIBRARY.keyspan_threading().decode()
    maps = Path("/proc/self/maps")
    if name != "OpenMP" or not maps.exists():
        return name
    loaded = {line.split("/")[-1] for line in maps.read_text().splitlines() if "omp" in line.split("/")[-1]}
    runtimes = sorted(x for x in loaded if x.startswith(("libgomp", "libomp", "libiomp")))
    return f"OpenMP ({', '.join(runtimes)})"
