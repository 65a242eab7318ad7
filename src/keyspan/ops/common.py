"""xFormers' registry of operators. Keyspan has one attention operator, which all operator classes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, TypeVar

from torch import Tensor

Operator = TypeVar("Operator", bound="type[BaseOperator]")


def get_operator(library: str, name: str) -> Callable[..., NoReturn]:
    """A function that raises RuntimeError: keyspan has none of xFormers' compiled operators."""

    def no_such_operator(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{library}::{name} is an operator of xFormers, which keyspan does not have; call the function of "
            "keyspan.ops, or torch.ops.keyspan.attention_forward, whose signature is keyspan's own"
        )

    return no_such_operator


def get_xformers_operator(name: str) -> Callable[..., NoReturn]:
    """`get_operator("xformers", name)`."""
    return get_operator("xformers", name)


class BaseOperator:
    """An operator of xFormers by name."""

    NAME: ClassVar[str] = "keyspan"
    OPERATOR_CATEGORY: ClassVar[str] = ""
    OPERATOR: ClassVar[Any] = staticmethod(get_operator("xformers", "OPERATOR"))
    """Raises when called: no operator of keyspan has the signature of one of xFormers'."""

    @classmethod
    def is_available(cls) -> bool:
        """True: keyspan computes what the operator stands for."""
        return True


OPERATORS_REGISTRY: list[type[BaseOperator]] = []


def register_operator(cls: Operator) -> Operator:
    """Append a class to `OPERATORS_REGISTRY`."""
    OPERATORS_REGISTRY.append(cls)
    return cls


def _get_storage_base(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
