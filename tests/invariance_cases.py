"""Random documents, and the same documents packed, alone, in chunks, in other layouts of keys and in a batch."""

import contextlib
import itertools
import random

import torch

import keyspan
from keyspan.backends.native import use_isa
from keyspan.core.problem import make_problem
from keyspan.dispatch.op import attend

S = keyspan


def chosen(backend):
    """Name of a backend, and a context in which its instruction set is used."""
    name, _, isa = backend.partition(", ")
    return name, use_isa(isa) if isa else contextlib.nullcontext()


def run(backend, q, k, v, mask, bias=None, **options):
    """(out, lse) of packed rows."""
    name, isa = chosen(backend)
    problem, layout = make_problem(q, k, v, mask=mask, bias=bias, invariant=True, **options)
    with torch.no_grad(), isa:
        out, lse = attend(problem, name, cached=False)
    return layout.output(out), layout.lse(lse)


def moved(x):
    """The same numbers, one element behind where a tensor begins, in rows that are one element longer."""
    memory = x.new_full((x.numel() // x.shape[-1] * (x.shape[-1] + 1) + 1,), torch.nan)
    return memory[1:].view(*x.shape[:-1], -1)[..., : x.shape[-1]].copy_(x)


class Random:
    """A random problem of several documents, and the same documents in other forms."""

    device = torch.device("cpu")
    stored = None
    """Dtype of keys and values where they have 8 bits, with a scale for each key."""

    def __init__(self, seed, dtype, small=False):
        rng = self.rng = random.Random(seed)
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        count = rng.randint(1, 4)
        long = rng.random() < 0.3
        lengths = [1, 2, 5, 17, 64, 65, 100, 255, 256, 257, 300] + [700, 1200] * long
        if small:
            lengths = [1, 2, 5, 17, 31, 32, 33] + [70, 130] * long
        self.keys = [rng.choice(lengths) for _ in range(count)]
        self.queries = [rng.choice([n, min(n, rng.randint(1, 9)), rng.randint(1, n)]) for n in self.keys]
        self.G, self.H = rng.choice([(1, 1), (2, 1), (2, 3), (1, 4), (1, 2) if small else (2, 7)])
        self.K, self.V = rng.choice([(16, 16), (8, 24), (40, 72), (64, 64), (19, 3), (160, 32)])
        self.visible = rng.choice([
            S.Causal("bottom_right"), None, S.Window(9, 2, align="bottom_right"),
            S.Causal("bottom_right") & S.Window(70), S.Causal("bottom_right") & S.Window(6) & S.Sinks(3),
            S.Window(300, 0, align="bottom_right") & S.Prefix(5), S.Causal("bottom_right") & S.Prefix(70),
        ])  # fmt: skip
        self.term = rng.choice(["none", "none", "alibi", "table", "bias", "mask"])
        if self.visible is None and self.term in ("alibi", "table"):
            # Everything is visible, but positions count from the last key: from the first they change with a cut.
            self.visible = S.Window(10**6, 10**6, align="bottom_right")
        self.options = {"softcap": rng.choice([None, None, 3.0])}
        heads = self.G * self.H
        if rng.random() < 0.3:
            self.options["sinks"] = self.tensor(heads)
        if rng.random() < 0.3:
            self.options["scale"] = rng.choice([1.5, 0.05, -0.3])
        self.slopes, self.table = self.tensor(heads).abs(), self.tensor(heads, 2 * 7 + 1)
        self.fill()

    def extend(self, length):
        """Makes the first document longer; few heads and keys then do."""
        self.G, self.H = 1, min(self.H, 2)
        self.queries[0], self.keys[0], self.visible = length, 70, None
        self.slopes, self.table = self.slopes[: self.H], self.table[: self.H]
        if "sinks" in self.options:
            self.options["sinks"] = self.options["sinks"][: self.H]
        self.fill()

    def fill(self):
        heads = self.G * self.H
        self.q = [self.tensor(m, heads, self.K) for m in self.queries]
        self.k = [self.tensor(n, self.G, self.K) for n in self.keys]
        self.v = [self.tensor(n, self.G, self.V) for n in self.keys]
        self.dense = [self.tensor(heads, m, n) for m, n in zip(self.queries, self.keys, strict=True)]
        if self.term == "mask":
            self.dense = [x > -0.3 for x in self.dense]

    def tensor(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def masked(self, layout, dense):
        """The mask of a layout, and the bias; `dense` [heads, M, N] is used where the problem has one."""
        bias = {"alibi": S.Alibi(self.slopes), "table": S.RelativeBias(self.table), "bias": dense}.get(self.term)
        mask = layout if self.visible is None else layout & self.visible
        return mask & dense if self.term == "mask" else mask, bias

    def run(self, backend, q, k, v, layout, dense):
        out, lse = self.attend(backend, q[None], k[None], v[None], *self.masked(layout, dense))
        return out[0], lse[0]

    def attend(self, backend, q, k, v, mask, bias):
        scales = {}
        if self.stored is not None:
            k, scales["key_scale"] = S.quantize(k, self.stored, run=1)
            v, scales["value_scale"] = S.quantize(v, self.stored, run=1)
        return run(backend, q, k, v, mask, bias, **self.options, **scales)

    def alone(self, backend, d, first=0, last=None, place=lambda x: x):
        """Rows first to last - 1 of document d, with all its keys that they may see; `place` puts tensors elsewhere."""
        last = self.queries[d] if last is None else last
        stop = self.keys[d] - (self.queries[d] - last)
        layout = S.Documents([last - first], [stop])
        tensors = (self.q[d][first:last], self.k[d][:stop], self.v[d][:stop])
        return self.run(backend, *map(place, tensors), layout, self.dense[d][:, first:last, :stop])

    def packed(self, backend, order):
        """The documents in this order, as results of each document."""
        rows = sum(self.queries[d] for d in order)
        columns = sum(self.keys[d] for d in order)
        dense = torch.zeros(self.G * self.H, rows, columns, dtype=self.dense[0].dtype, device=self.device)
        i = j = 0
        for d in order:
            dense[:, i : i + self.queries[d], j : j + self.keys[d]] = self.dense[d]
            i, j = i + self.queries[d], j + self.keys[d]
        layout = S.Documents([self.queries[d] for d in order], [self.keys[d] for d in order])
        out, lse = self.run(
            backend, *(torch.cat([x[d] for d in order]) for x in (self.q, self.k, self.v)), layout, dense
        )
        parts = zip(
            out.split([self.queries[d] for d in order]), lse.split([self.queries[d] for d in order], -1), strict=True
        )
        return dict(zip(order, parts, strict=True))

    def slots(self, backend, kind):
        """All documents with their keys in slots of a padded, gappy or paged cache, NaN between them."""
        page, size = 16, max(self.keys) + 5
        size += -size % page
        order = list(range(len(self.keys)))
        self.rng.shuffle(order)
        heads = self.G * self.H
        room = size * len(order)
        if kind == "paged":
            pages = torch.randperm(room // page, generator=self.generator).view(len(order), -1).int().to(self.device)
            where = [
                (pages[d].cpu().long()[:, None] * page + torch.arange(page)).flatten()[:n]
                for d, n in enumerate(self.keys)
            ]
            layout = S.PagedKeys(self.queries, self.keys, pages, page)
            width, columns = size, [torch.arange(n) for n in self.keys]
        else:
            gap = 0 if kind == "padded" else 3
            starts = [(d if kind == "padded" else order[d]) * size + gap for d in range(len(order))]
            where = [torch.arange(n) + start for n, start in zip(self.keys, starts, strict=True)]
            layout = (
                S.PaddedKeys(self.queries, self.keys, size)
                if kind == "padded"
                else S.GappyKeys(self.queries, starts, self.keys)
            )
            width, columns = room, where
        k, v = (
            torch.full((room, self.G, dim), torch.nan, dtype=self.dtype, device=self.device) for dim in (self.K, self.V)
        )
        dense = torch.zeros(heads, sum(self.queries), width, dtype=self.dense[0].dtype, device=self.device)
        i = 0
        for d, at in enumerate(where):
            k[at], v[at] = self.k[d], self.v[d]
            dense[:, i : i + self.queries[d], columns[d]] = self.dense[d]
            i += self.queries[d]
        out, lse = self.run(backend, torch.cat(self.q), k, v, layout, dense)
        return list(zip(out.split(self.queries), lse.split(self.queries, -1), strict=True))

    def batch(self, backend, d, copies, at):
        """Document d as entry `at` of a batch whose other entries have other queries, keys and lengths."""
        M, N = self.queries[d], self.keys[d]
        pad = self.rng.choice([0, 7])
        q, k, v = (
            self.tensor(copies, n, *x.shape[1:])
            for n, x in ((M, self.q[d]), (N + pad, self.k[d]), (N + pad, self.v[d]))
        )
        q[at], k[at, pad:], v[at, pad:] = self.q[d], self.k[d], self.v[d]
        lengths, starts = [N + pad] * copies, [0] * copies
        lengths[at], starts[at] = N, pad
        dense = torch.zeros(copies, self.G * self.H, M, N + pad, dtype=self.dense[0].dtype, device=self.device)
        dense[at, :, :, pad:] = self.dense[d]
        out, lse = self.attend(backend, q, k, v, *self.masked(S.KeyLengths(lengths, starts), dense))
        return out[at], lse[at]


def same(got, want, context):
    for name, x, y in zip(("out", "lse"), got, want, strict=True):
        assert torch.equal(x, y), f"{name} of {context}: {int((x != y).sum())} of {x.numel()} differ"


def check_forms(backend, dtype, seed, small=False, stored=None):
    case = Random(seed, dtype, small)
    if stored is not None:
        # A scale of a single key is one for all keys, which a GPU multiplies by elsewhere.
        case.stored, case.keys = stored, [max(2, n) for n in case.keys]
        case.fill()
    rng = case.rng
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = [case.alone(backend, d) for d in range(len(case.keys))]
        torch.set_num_threads(rng.choice([1, 2, 3, 4]))
        order = list(range(len(case.keys)))
        rng.shuffle(order)
        for d, got in case.packed(backend, order).items():
            same(got, want[d], f"document {d} packed")
        for kind in ("padded", "gappy", "paged"):
            for d, got in enumerate(case.slots(backend, kind)):
                same(got, want[d], f"document {d} with {kind} keys")
        d = seed % len(order)
        same(case.alone(backend, d, place=moved), want[d], f"document {d} in rows that are apart")
        d = rng.choice(order)
        same(case.batch(backend, d, 3, rng.randint(0, 2)), want[d], f"document {d} in a batch")
        # Chunks of rows see no keys behind them only where the mask is causal.
        future = case.visible is None or any(
            name in repr(case.visible) for name in ("left=9", "left=1000000", "Prefix")
        )
        for d, M in enumerate(case.queries):
            cuts = sorted({0, M, *(rng.randint(0, M) for _ in range(3)), *range(max(0, M - 2), M)})
            for first, last in itertools.pairwise(cuts):
                if (not future or last == M) and (stored is None or case.keys[d] - (M - last) > 1):
                    got = case.alone(backend, d, first, last)
                    part = want[d][0][first:last], want[d][1][:, first:last]
                    same(got, part, f"rows {first} to {last - 1} of {M} of document {d}")
    finally:
        torch.set_num_threads(before)


def gradients(case, backend, order, threads):
    """Gradients of the documents in this order, packed: of all inputs by name, and dq, dk, dv of each document."""
    name, isa = chosen(backend)
    torch.set_num_threads(threads)
    q, k, v = (torch.cat([x[d] for d in order])[None].requires_grad_() for x in (case.q, case.k, case.v))
    rows, columns = q.shape[1], k.shape[1]
    dense = torch.zeros(case.G * case.H, rows, columns, dtype=case.dense[0].dtype, device=case.device)
    i = j = 0
    for d in order:
        dense[:, i : i + case.queries[d], j : j + case.keys[d]] = case.dense[d]
        i, j = i + case.queries[d], j + case.keys[d]
    layout = S.Documents([case.queries[d] for d in order], [case.keys[d] for d in order])
    inputs = {"q": q, "k": k, "v": v, "slopes": case.slopes.detach().requires_grad_(),
              "table": case.table.detach().requires_grad_()}  # fmt: skip
    if case.term == "bias":
        inputs["bias"] = dense.requires_grad_()
    options = dict(case.options)
    if "sinks" in options:
        inputs["sinks"] = options["sinks"] = options["sinks"].detach().requires_grad_()
    bias = {"alibi": S.Alibi(inputs["slopes"]), "table": S.RelativeBias(inputs["table"]), "bias": dense}.get(case.term)
    mask = layout if case.visible is None else layout & case.visible
    mask = mask & dense if case.term == "mask" else mask
    problem, _ = make_problem(q, k, v, mask=mask, bias=bias, invariant=True, **options)
    with isa:
        out, _ = attend(problem, name, cached=False)
        grads = torch.Generator().manual_seed(1)
        parts = [torch.randn(case.queries[d], *out.shape[2:], generator=grads) for d in range(len(case.queries))]
        grad = torch.cat([parts[d] for d in order])[None].to(out)
        found = torch.autograd.grad((out * grad).sum(), list(inputs.values()), allow_unused=True)
    found = {name: x for name, x in zip(inputs, found, strict=True) if x is not None}
    split = [[case.queries[d] for d in order], *[[case.keys[d] for d in order]] * 2]
    parts = zip(*(found[x][0].split(lengths) for x, lengths in zip("qkv", split, strict=True)), strict=True)
    return found, dict(zip(order, parts, strict=True))


def gradients_in_a_batch(case, backend, batch, at):
    """Gradients of the first document as entry `at` of a batch whose other entries hold other numbers and lengths: of
    query, key and value, and of a bias that each entry has for itself."""
    name, isa = chosen(backend)
    M, N, heads = case.queries[0], case.keys[0], case.G * case.H
    noise = torch.Generator().manual_seed(batch)

    def entries(x):
        found = torch.randn((batch, *x.shape), generator=noise).to(x)
        found[at] = x
        return found

    q, k, v = (entries(x[0]).requires_grad_() for x in (case.q, case.k, case.v))
    inputs = {"q": q, "k": k, "v": v}
    dense = None
    if case.term == "mask":
        dense = torch.ones(batch, heads, M, N, dtype=torch.bool, device=case.device)
        dense[at] = case.dense[0]
    elif case.term == "bias":
        inputs["bias"] = dense = entries(case.dense[0]).requires_grad_()
    lengths = [max(1, N // 2)] * batch
    lengths[at] = N
    mask, bias = case.masked(S.KeyLengths(lengths), dense)
    problem, _ = make_problem(q, k, v, mask=mask, bias=bias, invariant=True, **case.options)
    with isa:
        out, _ = attend(problem, name, cached=False)
        grad = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(1))
        loss = (out * entries(grad.to(out)).view_as(out)).sum()
        found = torch.autograd.grad(loss, list(inputs.values()))
    return {name: x[at] for name, x in zip(inputs, found, strict=True)}
