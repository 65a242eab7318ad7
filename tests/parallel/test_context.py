"""Context-parallel attention equals attention on one device."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_training_ranks import CONFIG, curve

import keyspan as S
from keyspan import parallel
from keyspan.core.biases import DenseBias
from keyspan.core.ranges import KeyRanges
from keyspan.parallel import ContextMask, Partition, context_attention
from keyspan.testing import peak_memory, results, textbook, tolerances, worst
from keyspan.testing.cases import CASES
from keyspan.training.loop import train

COVERED = [
    case
    for case in CASES
    if not case.dropout and case.stored is None and "paged" not in case.name
    and case.hiding is None  # parts are merged as exactly as their lse says, and these are large
]  # fmt: skip


def scattered(length: int, ranks: int, seed: int) -> Partition:
    """Runs of random lengths dealt to random ranks."""
    generator = torch.Generator().manual_seed(seed)
    cuts = sorted({0, length, *torch.randint(0, length + 1, (3 * ranks,), generator=generator).tolist()})
    pieces: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for first, stop in pairwise(cuts):
        pieces[int(torch.randint(0, ranks, (1,), generator=generator))].append((first, stop))
    return Partition(tuple(map(tuple, pieces)))


def cut(problem, exchange, backend, queries=None, keys=None):
    """(out, lse) of a whole problem with this rank's rows in place, and zeros in the others'."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    M, N = problem.query.shape[1], problem.key.shape[1]
    queries = queries or scattered(M, ranks, M)
    keys = keys or (queries if M == N else scattered(N, ranks, N + 1))
    ranges = None
    if problem.lo is not None:
        ranges = KeyRanges(problem.lo, problem.hi, problem.diagonal, origin=problem.origin, dense=problem.dense, keys=N)
    terms: list = [DenseBias(x) for x in problem.biases]
    if problem.slopes is not None:
        terms.append(S.Alibi(problem.slopes if problem.slopes.shape[0] > 1 else problem.slopes[0]))
    if problem.table is not None:
        terms.append(S.RelativeBias(problem.table))
    mask = ContextMask(ranges, queries, keys, batch=problem.query.shape[0], exchange=exchange)
    key, value = (keys.take(x, rank)[:, :, :, None] for x in (problem.key, problem.value))
    out, lse = context_attention(
        queries.take(problem.query, rank), key, value, mask, sum(terms) if terms else None, scale=problem.scale,
        softcap=problem.softcap or None, sinks=problem.sinks, return_lse=True, backend=backend,
    )  # fmt: skip
    shape, of_lse = problem.shapes
    whole = out.new_zeros(shape).index_copy(1, mask.rows, out)
    return whole, lse.new_zeros(of_lse).index_copy(3, mask.rows, lse)


def total(found):
    """Sums over the ranks, whose tensors may lie in memory in different orders."""
    found = {name: x.contiguous() for name, x in found.items()}
    for x in found.values():
        dist.all_reduce(x)
    return found


def compare(case, exchange, backend, dtype, **partitions):
    """What differs from the textbook by more than the tolerance."""
    problem = case.problem(dtype)
    exact = results(lambda p: textbook(p, torch.float64), problem, torch.float64)
    got = total(results(lambda p: cut(p, exchange, backend, **partitions), problem, dtype))
    allowed = tolerances(problem, dtype, exact)
    return [
        (case.name, exchange, dtype, name, worst(got[name], x), allowed[name])
        for name, x in exact.items()
        if not worst(got[name], x) <= allowed[name]
    ]


def poison() -> None:
    """As in conftest.py: memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def every_case(step: str) -> None:
    poison()
    wrong = []
    for number, case in enumerate(COVERED[:: int(step)]):
        for exchange in ("ring", "gather")[:: 1 if step == "1" else 2 * (number % 2) - 1][: 2 if step == "1" else 1]:
            wrong += compare(case, exchange, "chunked", torch.float64)
    assert not wrong, "\n".join(map(str, wrong))


def product() -> None:
    """Every kind of mask × query heads per key head × every kind of bias, at 40 rows."""
    poison()
    M, rank, ranks = 40, dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(2, 1, M, M, generator=generator) < 0.6
    lengths = torch.tensor([33, 40], dtype=torch.int32)
    given = [
        None, S.Causal(), S.Causal() & S.Window(5, 0), S.Window(3, 4), S.Documents([7, 0, 20, 13]),
        S.Documents([7, 20, 13]) & S.Causal(), S.Documents([7, 20, 13]) & S.Window(4, 0), S.KeyLengths(lengths),
        S.KeyLengths(lengths) & S.Causal(), S.Causal() & S.Prefix(6), S.Causal() & S.Window(6, 0) & S.Sinks(2),
        S.SharedPrompt([10], [[12, 18]]), visible, S.Causal() & visible,
    ]  # fmt: skip

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wrong = []
    for number, mask in enumerate(given):
        parallel.masks.LEAST_ROWS = 2**16 if number % 4 == 1 else 1  # where keys are gathered: all heads, or in slices
        B = 1 if "Documents" in repr(mask) or "SharedPrompt" in repr(mask) else 2
        partition = scattered(M, ranks, number)
        for groups in (4, 2, 1):
            for kind in ("none", "alibi", "table", "dense", "all"):
                inputs = {"q": draw(B, M, 4, 8), "k": draw(B, M, groups, 8), "v": draw(B, M, groups, 4)}
                if kind in ("alibi", "all"):
                    inputs["slopes"] = draw(4).abs()
                if kind in ("table", "all"):
                    inputs["table"] = draw(4, 9)
                if kind in ("dense", "all"):
                    inputs["dense"] = draw(B, 1, M, M)
                if kind == "all":
                    inputs["sinks"] = draw(4)
                results = []
                for cut in (False, True):
                    x = {name: y.clone().requires_grad_() for name, y in inputs.items()}
                    terms = [S.Alibi(x["slopes"])] if "slopes" in x else []
                    terms += [S.RelativeBias(x["table"])] if "table" in x else []
                    terms += [DenseBias(x["dense"])] if "dense" in x else []
                    options = {"bias": sum(terms) if terms else None, "sinks": x.get("sinks"), "return_lse": True}
                    options["softcap"] = 3.0 if kind == "all" else None
                    qkv = [x["q"], x["k"], x["v"]]
                    if cut:
                        exchange = "gather" if number % 2 else "ring"
                        of = ContextMask(mask, partition, batch=B, exchange=exchange)
                        out, lse = context_attention(*(partition.take(y, rank) for y in qkv), of, **options)
                        out = out.new_zeros(B, M, 4, 4).index_copy(1, of.rows, out)
                        lse = lse.new_zeros(B, 4, M).index_copy(2, of.rows, lse)
                    else:
                        out, lse = S.attention(*qkv, mask=mask, backend="reference", **options)
                    seen = lse.detach().isfinite()
                    grads = torch.autograd.grad((out.sin().sum(), torch.where(seen, lse, 0).cos().sum()), [*x.values()])
                    results.append({"out": out.detach(), "lse": torch.where(seen, lse, 0).detach()})
                    results[-1] |= dict(zip(x, grads, strict=True))
                want, got = results[0], total(results[1])
                wrong += [
                    (mask, groups, kind, name, float((got[name] - y).abs().max()))
                    for name, y in want.items()
                    if not torch.allclose(got[name], y, rtol=1e-10, atol=1e-10)
                ]
    parallel.masks.LEAST_ROWS = 2**16
    assert not wrong, "\n".join(map(str, wrong))


def dropped() -> None:
    """Backward draws the pattern of forward: outputs are linear in values, so that both products are equal."""
    mask = S.Causal()
    partition = Partition.balanced(mask, 64, dist.get_world_size())
    for exchange in ("ring", "gather"):
        parallel.masks.LEAST_ROWS = 1
        cut_mask = ContextMask(mask, partition, exchange=exchange)
        q, k, v = (torch.randn(1, len(cut_mask.rows), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
        out = context_attention(q, k, v, cut_mask, dropout_p=0.4)
        weight = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, v, weight)
        sums = total({"out": (out * weight).sum().detach(), "values": (grad * v).sum().detach()})
        torch.testing.assert_close(sums["out"], sums["values"], rtol=1e-12, atol=1e-12)
        assert not torch.equal(out, context_attention(q, k, v, cut_mask))
    parallel.masks.LEAST_ROWS = 2**16


def other_dtypes() -> None:
    poison()
    names = {"gqa", "documents", "window and sinks", "relative table, documents, gqa", "alibi by batch", "everything"}
    found = [case for case in COVERED if case.name in names]
    assert len(found) == len(names) - 1 or len(found) == len(names)
    wrong = []
    for case in found:
        for dtype in (torch.float32, torch.bfloat16):
            wrong += compare(case, "auto", None, dtype)
    assert not wrong, "\n".join(map(str, wrong))


def peaks() -> None:
    """The peak memory of a call with gradients falls as 1 / ranks, but for keys that travel."""
    M, found = 4096, {}
    parallel.masks.LEAST_ROWS = 1  # heads in slices, as in larger problems
    for mask, exchange in ((S.Causal() & S.Window(99, 0), "gather"), (S.Causal(), "ring")):
        for ranks in (1, 2, 4):
            group = dist.new_group(list(range(ranks)))
            if dist.get_rank() >= ranks:
                continue
            cut_mask = ContextMask(mask, Partition.balanced(mask, M, ranks), group=group, exchange=exchange)
            q, k, v = (torch.randn(1, len(cut_mask.rows), 4, 32, requires_grad=True) for _ in range(3))

            def call(mask=cut_mask, q=q, k=k, v=v):
                context_attention(q, k, v, mask).sum().backward()

            call()
            found[exchange, ranks] = peak_memory(call)
    if dist.get_rank() == 0:
        print(found)
        for ranks in (2, 4):
            in_order = 2 * (M / ranks + 99) * 4 * 32 * 4  # bytes of the keys and values that a rank's rows see
            assert found["gather", ranks] < 1.2 * (found["gather", 1] / ranks + in_order), found
        assert found["ring", 4] < 0.9 * found["ring", 1], found  # how many rounds' keys are held is a matter of timing


def test_one_process_without_a_group_is_attention():
    q, k, v = (torch.randn(2, 50, 4, 8, requires_grad=True) for _ in range(3))
    mask = S.Causal() & S.Window(9, 0)
    cut_mask = ContextMask(mask, Partition.balanced(mask, 50, 1), batch=2)
    out = context_attention(q, k, v, cut_mask)
    want = S.attention(q, k, v, mask=mask)
    assert torch.equal(out, want)
    for got, x in zip(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (out, want)), strict=True):
        assert torch.equal(got, x)


def test_balanced_partitions():
    generator = torch.Generator().manual_seed(0)
    for length, ranks in [(1, 1), (3, 4), (0, 2), (1000, 3), (4097, 8)]:
        lengths = []
        while sum(lengths) < length:
            lengths.append(min(int(torch.randint(1, 300, (1,), generator=generator)), length - sum(lengths)))
        for mask in (None, S.Causal(), S.Documents(lengths) & S.Causal(), S.Documents(lengths) & S.Window(5, 5)):
            partition = Partition.balanced(mask, length, ranks)
            rows = [partition.rows(rank) for rank in range(ranks)]
            assert torch.cat(rows).sort().values.tolist() == list(range(length))
            assert max(map(len, rows)) - min(map(len, rows)) <= 16
            if length >= 1000:
                ranges = (S.core.masks.Combined(()) if mask is None else mask).lower(1, length, length)
                area = (ranges.hi - ranges.lo)[0, 0].double()
                areas = torch.stack([area[x].sum() for x in rows])
                assert float(areas.max() / areas.mean()) < 1.06
            x = torch.randn(2, length, 3)
            assert torch.equal(partition.join([partition.take(x, rank) for rank in range(ranks)]), x)


def test_the_causal_partition_is_the_zig_zag():
    assert Partition.balanced(S.Causal(), 64, 4).pieces == tuple(
        ((8 * r, 8 * r + 8), (56 - 8 * r, 64 - 8 * r)) if r < 3 else ((24, 40),) for r in range(4)
    )


def traffic() -> None:
    """Keys travel only where they are seen: none between packed documents, a window's width else."""
    lengths = [30, 34, 40, 24]
    for mask, want in [
        (S.Documents([64, 64]) & S.Causal(), 0),
        (S.Documents(lengths) & S.Causal(), 0),
        (S.Causal() & S.Window(10, 0), 10),
        (S.Causal(), 64),
        (S.Window(10, 5), 15),
    ]:
        cut_mask = ContextMask(mask, Partition.contiguous(128, 2))
        assert sum(map(sum, cut_mask.travelling)) == want, mask
        assert all(
            sum(part.transfer.receive) == sum(cut_mask.travelling[dist.get_rank()])
            for part in cut_mask.parts("gather", False)
            if part.transfer is not None
        )
    long = ContextMask(S.Causal(), Partition.balanced(S.Causal(), 2**16, 2))
    assert long.form(8, 8) == ("gather", 4)
    assert long.form(2, 2) == ("gather", 1)  # too little work for slices
    assert long.form(16, 4) == ("gather", 1)  # few keys travel: four query heads share each
    assert long.form(16, 16) == ("gather", 4)  # more would wait for less, but each costs time
    short = S.Documents([2**12 + 1] * 15 + [2**12 - 15]) & S.Causal()
    assert ContextMask(short, Partition.balanced(short, 2**16, 2)).form(8, 8) == ("gather", 1)


def on_two_ranks() -> None:
    traffic()
    product()
    dropped()
    every_case("1")
    other_dtypes()


def test_two_ranks_equal_one_device():
    """Every case in both forms, low precision on the chosen backend, and which keys travel."""
    run_ranks(on_two_ranks, 2, timeout=400)


def on_four_ranks(run: str) -> None:
    every_case("4")
    cut_mask = ContextMask(S.Causal(), Partition.balanced(S.Causal(), 128, 4))
    assert cut_mask.form(4, 4) == ("ring", 1)  # the keys of three ranks are more than a rank's queries and outputs
    assert cut_mask.form(8, 2) == ("gather", 1)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    peaks()
    train(replace(CONFIG, context=2, out=Path(run)), quiet=True)


def test_four_ranks_equal_one_device(tmp_path):
    """Every fourth case, the peak memory, and a training run of two micro-batches a step, each on two ranks."""
    run_ranks(on_four_ranks, 4, str(tmp_path / "four"), timeout=400)
    train(replace(CONFIG, out=tmp_path / "one"), quiet=True)
    assert curve(tmp_path / "four")[0] == pytest.approx(curve(tmp_path / "one")[0], abs=1e-5)
    assert curve(tmp_path / "four")[1] == curve(tmp_path / "one")[1]


@pytest.fixture
def events(monkeypatch):
    """What a rank of four that talks to nobody does, in order: a message is sent or waited for, a part is computed."""
    found: list[tuple[str, int]] = []
    numbers = count()

    class Work:
        def __init__(self):
            self.number = next(numbers)
            found.append(("sent", self.number))

        def wait(self):
            found.append(("waited for", self.number))

    def all_to_all_single(received, sent, received_sizes, sent_sizes, group=None, async_op=False):
        assert async_op, "a collective that is waited for at once overlaps nothing"
        received.zero_()
        return Work()

    def computed(function):
        def recorded(*given):
            found.append(("computed", len([kind for kind, _ in found if kind == "computed"])))
            return function(*given)

        return recorded

    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 4}.items():
        monkeypatch.setattr(dist, name, lambda group=None, value=value: value)
    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    monkeypatch.setattr(parallel.context, "attend", computed(parallel.context.attend))
    monkeypatch.setattr(parallel.context, "gradients", computed(parallel.context.gradients))
    monkeypatch.setattr(parallel.masks, "LEAST_ROWS", 1)
    return found


@pytest.mark.parametrize("form", [("ring", 1), ("gather", 4)], ids=["ring", "gather in slices"])
def test_messages_travel_while_parts_are_computed(form, events):
    """Between the start of a message and the wait for it a part is computed, but where there is nothing left to do."""
    mask = ContextMask(None, Partition.contiguous(32, 4), exchange=form[0])
    q = torch.randn(1, 8, 4, 8, requires_grad=True)
    k, v = (torch.randn(1, 8, 4, 8, requires_grad=True) for _ in range(2))
    assert mask.form(4, 4) == form
    out = context_attention(q, k, v, mask, backend="chunked")
    parts = 4  # of four ranks, or slices of heads
    assert [kind for kind, _ in events].count("computed") == parts
    first = form[0] == "gather"  # the first part is the rank's own keys, or has to come
    assert idle(events) == ([0] if first else [])
    events.clear()
    torch.autograd.grad(out.sum(), (q, k, v))
    assert [kind for kind, _ in events].count("computed") == parts
    sent = [number for kind, number in events if kind == "sent"]
    assert len(sent) == 2 * parts - (not first) * 2  # keys, and the gradients of those of others
    assert idle(events) == [*(sent[:1] if first else []), sent[-1]], "the last gradients have nothing beside them"


def idle(events):
    """The messages between whose start and end nothing was computed."""
    ends = {number: at for at, (kind, number) in enumerate(events) if kind == "waited for"}
    starts = {number: at for at, (kind, number) in enumerate(events) if kind == "sent"}
    assert starts.keys() == ends.keys(), "each message that is sent is waited for"
    return [n for n, at in starts.items() if "computed" not in [kind for kind, _ in events[at : ends[n]]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, m: context_attention(q[:, :3], q, q, m), "query: got 3 rows, want 8, those of rank 0"),
        (lambda q, m: context_attention(q, q, q, S.Causal()), "mask: got Causal, want ContextMask"),
        (lambda q, m: ContextMask(None, Partition.contiguous(8, 2)), "partition: got pieces for 2 ranks, want 1"),
        (lambda q, m: ContextMask(None, Partition.contiguous(8, 1), exchange="all"), "exchange: got 'all'"),
        (lambda q, m: ContextMask(S.Documents([7]), Partition.contiguous(8, 1)), "q_lengths: got 7 in all"),
        (lambda q, m: Partition((((0, 3),), ((4, 8),))), "pieces: got a run from row 4 behind row 3"),
        (lambda q, m: Partition((((3, 8), (0, 3)),)), "pieces: got .* in ascending order"),
        (lambda q, m: Partition.balanced(None, 8, 0), "ranks: got 0, want an int ≥ 1"),
        (lambda q, m: m.queries.take(q[:, :5], 0), "x: got 5 rows along dim 1, want 8"),
    ],
)
def test_wrong_arguments(call, message):
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(ValueError, match=message):
        call(q, ContextMask(None, Partition.contiguous(8, 1)))
