"""Whether a function gives a token the same bits packed, alone, in pieces, in a batch and on any number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor


def check_invariance(
    packed: Callable[[Sequence[Tensor]], Iterable[Tensor]],
    documents: Sequence[Tensor],
    *,
    batched: Callable[[Tensor], Tensor] | None = None,
    pieces: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
    threads: int | Sequence[int] = (1, 2, 3, 4),
    seed: int = 0,
) -> None:
    """Raise unless a function's result for a token depends on its document alone, bit by bit.

    The function may be a model, a layer or an attention call; it is given in up to three forms. What each document
    gives alone, on one thread, is compared with `torch.equal`, no tolerance, with what it gives

    - packed with all others in several orders, and with some of them, by `packed`;
    - at each place of a batch whose other entries hold other tokens, by `batched`;
    - in pieces, as generation and chunked prefill compute it, by `pieces`: whole, token by token and at random cuts;
    - on each number of threads.

    First it is computed twice in the same way, so that a function that does not repeat its own bits is called that.
    NaNs are equal to NaNs.

    Args:
        packed: results of documents that are computed together, in their order: one tensor `[n, …]` for each.
        documents: tensors `[n, …]` of inputs or token numbers, n ≥ 1 each; two or more, so that there is a pack.
        batched: results `[B, n, …]` of a batch of documents of one length, `[B, n, …]`.
        pieces: result `[n, …]` of one document computed by so many tokens at a time, each piece after those before it,
            e.g. with a cache of keys and values. The lengths add up to n.
        threads: number or numbers of threads that torch is set to; that before is restored.
        seed: of the orders and cuts.

    Raises:
        AssertionError: a result differs; it names the form, the document, the first token and how many entries differ.
        ValueError: there are too few documents, or an empty one; or a result is not one tensor `[n, …]` for each.

    >>> check_invariance(lambda documents: [x * 2 for x in documents], [torch.ones(3, 1), torch.ones(5, 1)])
    """
    if len(documents) < 2:
        raise ValueError(f"documents: got {len(documents)}, want two or more, so that there is a pack")
    for x in documents:
        if not isinstance(x, Tensor):
            raise ValueError(f"documents: got a {type(x).__name__}, want tensors [n, …]")
        if x.dim() < 1 or len(x) < 1:
            raise ValueError(f"documents: got shape {list(x.shape)}, want [n, …] with n ≥ 1")
    counts = [threads] if isinstance(threads, int) else list(threads)
    if not counts or min(counts) < 1:
        raise ValueError(f"threads: got {threads}, want numbers of threads, each at least 1")
    generator = torch.Generator().manual_seed(seed)
    before = torch.get_num_threads()

    def results(order: Sequence[int]) -> list[Tensor]:
        return _checked(packed([documents[d] for d in order]), [len(documents[d]) for d in order])

    try:
        torch.set_num_threads(1)
        alone = [results([d])[0] for d in range(len(documents))]
        for d, want in enumerate(alone):
            _compare(results([d])[0], want, f"document {d} computed a second time in the same way")
        for count in counts:
            torch.set_num_threads(count)
            on = f"on {count} thread{'s' * (count > 1)}"
            for d, want in enumerate(alone):
                _compare(results([d])[0], want, f"document {d} alone {on}")
            for order in _orders(len(documents), generator):
                for d, got in zip(order, results(order), strict=True):
                    _compare(got, alone[d], f"document {d} packed as {order} {on}")
            for d, (x, want) in enumerate(zip(documents, alone, strict=True)):
                if batched is not None:
                    for place in range(3):
                        batch = torch.stack([x.roll(entry - place, 0) for entry in range(3)])
                        _compare(batched(batch)[place], want, f"document {d} at place {place} of a batch of 3 {on}")
                if pieces is not None:
                    for lengths in _cuts(len(x), generator):
                        _compare(pieces(x, lengths), want, f"document {d} in pieces of {lengths} {on}")
    finally:
        torch.set_num_threads(before)


def _orders(count: int, generator: torch.Generator) -> Iterator[list[int]]:
    """All documents in two orders, and all but one."""
    yield list(range(count))
    yield torch.randperm(count, generator=generator).tolist()
    yield torch.randperm(count, generator=generator).tolist()[1:]


def _cuts(length: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Lengths of pieces: one, one of each token, some at random."""
    yield [length]
    yield [1] * length
    cuts = sorted({0, length, *torch.randint(length + 1, (3,), generator=generator).tolist()})
    yield [last - first for first, last in itertools.pairwise(cuts)]


def _checked(found: Iterable[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """The results of `packed`, as a list."""
    want = f"want a list of {len(lengths)}, for each document a tensor [n, …] with n = {', '.join(map(str, lengths))}"
    if isinstance(found, Tensor):
        raise ValueError(f"packed: got one tensor of shape {list(found.shape)} as results, {want}; use split(lengths)")
    results = list(found)
    for x in results:
        if not isinstance(x, Tensor):
            raise ValueError(f"packed: got a {type(x).__name__} among the results, {want}")
    got = [len(x) if x.dim() else None for x in results]
    if got != list(lengths):
        raise ValueError(f"packed: got results of shapes {', '.join(str(list(x.shape)) for x in results)}, {want}")
    return results


def _compare(got: Tensor, want: Tensor, where: str) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(
            f"{where}: got {got.dtype} of shape {list(got.shape)}, want {want.dtype} of shape {list(want.shape)}"
        )
    differs = (got != want) & ~(got.isnan() & want.isnan())
    if not bool(differs.any()):
        return
    first = int(differs.reshape(len(got), -1).any(1).nonzero()[0])
    largest = float((got.double() - want.double()).abs()[differs].max())
    raise AssertionError(
        f"{where}: {int(differs.sum())} of {got.numel()} entries differ from the document alone on one thread, from "
        f"token {first} on, by up to {largest:.3g}"
    )
