"""The tensors of a model's folder: found, compared with what a module wants, and copied into its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from keyspan.files import read_json


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: tensors laid one behind the other, and what makes ours of them."""

    ours: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of each tensor."""
    read: Callable[[Tensor], Tensor] | None = None


class Tensors(Protocol):
    """The tensors of a file or folder, by Hugging Face's names."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> list[int]: ...

    def tensor(self, name: str) -> Tensor: ...


class FolderTensors:
    """The tensors of a folder's safetensors files, memory-mapped.

    Args:
        folder: holds model.safetensors, or shards with model.safetensors.index.json.
        stack: closes the files.

    Raises ValueError for a file that is missing, outside the folder, or damaged, and for a malformed index.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        files = [single.name]
        if index.exists() and not single.exists():  # as transformers: an index may be left of weights before these
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
                raise ValueError(f"{index}: got weight_map {shards!r:.100}, want the file of each tensor")
            files = sorted(set(shards.values()))
        self._by_name: dict[str, Any] = {}
        for file in files:
            path = folder / file
            if path.parent != folder or not path.is_file():
                raise ValueError(f"{folder}: holds no {file}; want model.safetensors, or its shards and their index")
            try:
                opened = stack.enter_context(safe_open(str(path), framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path}: {error}; the file is damaged or cut off") from None
            self._by_name |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> set[str]:
        return set(self._by_name)

    def shape(self, name: str) -> list[int]:
        return list(self._by_name[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self._by_name[name].get_tensor(name)
        return found


def check_tensors(config_file: Path, stored: Tensors, sources: Sequence[Source], ignored: Collection[str] = ()) -> None:
    """Raise ValueError unless every tensor is there in its shape, and no other but those that are ignored."""
    wanted = {name: list(shape) for source in sources for name, shape in zip(source.names, source.shapes, strict=True)}
    names = stored.names()
    wrong = [f"{name} is missing" for name in sorted(set(wanted) - names)]
    wrong += [f"{name} is not part of this architecture" for name in sorted(names - set(wanted) - set(ignored))]
    for name, shape in wanted.items():
        if name in names and stored.shape(name) != shape:
            wrong.append(f"{name}: got shape {stored.shape(name)}, want {shape}")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(f"{config_file}: the weights do not fit: {'; '.join(wrong[:5])}{more}")


def fill(
    model: nn.Module,
    stored: Tensors,
    sources: Sequence[Source],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device | str,
) -> None:
    """Give a model on the meta device its parameters, each of the dtype that its name has, read tensor by tensor."""
    for name, shape in {name: p.shape for name, p in model.named_parameters()}.items():
        module, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype_of(name), device=device))
        setattr(model.get_submodule(module), attribute, parameter)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for source in sources:
            parts = [stored.tensor(name) for name in source.names]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
            parameters[source.ours].copy_(x if source.read is None else source.read(x))
