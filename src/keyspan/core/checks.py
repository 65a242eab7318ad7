"""Checks of what users give: each ValueError names the argument, what was got and what is wanted."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


def check_tensor(name: str, x: Any, like: Tensor | None = None, *, optional: bool = False) -> None:
    """A floating-point tensor with a dimension, on the device of `like`; or None where `optional`."""
    if optional and x is None:
        return
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, want a floating-point tensor")
    if not x.is_floating_point():
        raise ValueError(f"{name}: got {x.dtype}, want a floating-point tensor")
    if x.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions, want one at least")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, want one on {like.device} like the input")


def check_type(name: str, value: Any, *kinds: type) -> None:
    """An instance of one of `kinds`."""
    if not isinstance(value, kinds):
        wanted = " or ".join("a tensor" if kind is Tensor else kind.__name__ for kind in kinds)
        raise ValueError(f"{name}: got {type(value).__name__}, want {wanted}")


def as_path(name: str, path: Any) -> Path:
    """A path that is given as a str or a Path."""
    check_type(name, path, str, Path)
    return Path(path)


def check_bool(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, want True or False")


def check_int(name: str, value: Any, least: int = 1, bits: int = 63) -> None:
    """An int of at least `least` and less than 2**bits; a size of torch.compile too, but no tensor.

    Under `torch.jit.trace` sizes are tensors, and are taken.
    """
    untraced = isinstance(value, Tensor) and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    try:
        number = value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
        fits = not isinstance(value, bool) and not untraced and least <= number < 2**bits
    except TypeError:
        fits = number = False
    if not fits:
        limit = f" and less than 2**{bits}" if number >= 2**bits else ""
        raise ValueError(f"{name}: got {value!r}, want an int ≥ {least}{limit}")


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """A finite number that is not negative, or is `positive`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf if positive else 0 <= value < math.inf):
        raise ValueError(f"{name}: got {value!r}, want {'a positive number' if positive else 'a number ≥ 0'}")


def readable(x: Tensor) -> bool:
    """Whether reading the values neither waits for a device nor breaks a trace."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def check_index(
    name: str, x: Any, size: int, device: torch.device, dtypes: Sequence[torch.dtype] = (torch.int64, torch.int32)
) -> None:
    """Numbers 0 … size − 1, one-dimensional. They are read where they are `readable`."""
    check_type(name, x, Tensor)
    if x.dim() != 1 or x.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: got {x.dtype} of shape {list(x.shape)}, want {wanted} of one dimension")
    if x.device != device:
        raise ValueError(f"{name}: got a tensor on {x.device}, want one on {device}")
    if readable(x) and x.numel():
        low, high = (int(n) for n in x.aminmax())
        if not 0 <= low <= high < size:
            raise ValueError(f"{name}: got {low} … {high}, want 0 … {size - 1}")


def check_dtype(name: str, dtype: Any) -> None:
    """A floating-point dtype, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{name}: got {dtype!r}, want a floating-point torch.dtype or None")


def check_device(name: str, device: Any) -> torch.device:
    """A device of torch, or the name of one."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{name}: got {device!r}, want a torch.device or its name, as 'cpu' or 'cuda:0'") from None


def check_factory(device: Any, dtype: Any) -> None:
    """The device and the floating-point dtype of a module's parameters; None stands for torch's default."""
    if device is not None:
        check_device("device", device)
    check_dtype("dtype", dtype)


def check_fields(config: object) -> None:
    """Each field of a dataclass is of the type that it is declared with. Of `Literal` fields the class says more."""
    declared: Any = type(config)
    for name, kind in _types(declared).items():
        value = getattr(config, name)
        if get_origin(kind) is not Literal and not is_a(value, kind):
            raise ValueError(f"{name}: got {value!r}, want {in_words(kind)}")


@functools.cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def is_a(value: object, kind: Any, *, json: bool = False) -> bool:
    """Whether a value is of the type that a field is declared with; or what JSON writes for it."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list if json else tuple) and all(is_a(x, get_args(kind)[0], json=json) for x in value)
    if get_args(kind):  # a union
        return any(is_a(value, one, json=json) for one in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    accepted: dict[Any, Any] = {float: (int, float), Path: str if json else Path}
    return isinstance(value, accepted.get(kind, kind))


def in_words(kind: Any, *, json: bool = False) -> str:
    """The type of a field for a reader of Python or JSON."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a {'list' if json else 'tuple'}, each {in_words(get_args(kind)[0], json=json)}"
    if get_args(kind):
        return " or ".join(in_words(one, json=json) for one in get_args(kind))
    words: dict[Any, str] = {type(None): "null", Path: "a path"}
    if not json:
        words = {type(None): "None", Path: "a Path", int: "an int", float: "a number", str: "a str", bool: "a bool"}
    return words.get(kind, str(kind.__name__))
