"""One numerics: the bits of a row do not depend on its pack, chunk, batch, layout of keys or number of threads."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import keyspan
from invariance_cases import Random, check_forms, gradients, gradients_in_a_batch
from keyspan.backends.native import binding
from keyspan.backends.triton import hopper
from keyspan.core.problem import make_problem
from keyspan.dispatch.choose import choose
from keyspan.testing import check_invariance

BACKENDS = [*(f"native, {isa}" for isa in binding.SUPPORTED), "chunked"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [*itertools.product(BACKENDS, DTYPES), ("chunked", torch.float64)]


def test_the_switch_changes_nothing_on_a_cpu():
    q, k, v = (torch.randn(1, 50, 2, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    for backend in ("native", "chunked"):
        for _ in range(2):  # computed, then replayed
            got, want = (
                keyspan.attention(q, k, v, mask=keyspan.Causal(), backend=backend, invariant=x) for x in (True, False)
            )
            assert torch.equal(got, want)


def test_backends_that_do_not_promise_it_refuse():
    problem, _ = make_problem(*(torch.randn(1, 5, 2, 8) for _ in range(3)), invariant=True)
    elsewhere = problem._replace(
        query=SimpleNamespace(device=torch.device("mps"), is_cuda=False, is_cpu=False, dtype=torch.float32)
    )
    assert choose(elsewhere._replace(invariant=False), None) == "chunked"
    with pytest.raises(NotImplementedError, match=r"no backend can: native: .*; chunked: results are to be invariant"):
        choose(elsewhere, None)
    assert hopper.missing(
        problem._replace(query=problem.query.half(), key=problem.key.half(), output_dtype=torch.half)
    ) == ("results are to be invariant")


@pytest.mark.parametrize(("backend", "dtype"), FORMS, ids=str)
def test_a_row_has_the_same_bits_in_every_form(backend, dtype):
    for seed in seeds(backend, 12):
        try:
            check_forms(backend, dtype, seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), FORMS, ids=str)
def test_a_row_has_the_same_bits_in_every_form_with_keys_of_8_bits(backend, dtype, stored):
    for seed in seeds(backend, 3):
        try:
            check_forms(backend, dtype, 20 + seed, stored=stored)
        except AssertionError as error:
            raise AssertionError(f"seed {20 + seed}: {error}") from error


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def seeds(backend, count):
    """Fewer for the slow backend."""
    return range(count if backend.startswith("native") else count // 3)


@pytest.mark.parametrize(("backend", "dtype"), FORMS, ids=str)
def test_gradients_do_not_depend_on_threads_or_the_pack(backend, dtype, threads_restored):
    for seed in seeds(backend, 8):
        case = Random(100 + seed, dtype)
        if seed % 2:  # several chunks of one document
            case.extend(1700)
        order = list(range(len(case.keys)))
        want, of_document = gradients(case, backend, order, 1)
        for threads in (2, 3):
            got, _ = gradients(case, backend, order, threads)
            for name, x in want.items():
                assert torch.equal(got[name], x), f"seed {seed}: d{name} with {threads} threads"
        for d in order:
            _, alone = gradients(case, backend, [d], 2)
            for name, x, y in zip("qkv", alone[d], of_document[d], strict=True):
                assert torch.equal(x, y), f"seed {seed}: d{name} of document {d}"


@pytest.mark.parametrize(("backend", "dtype"), FORMS, ids=str)
def test_gradients_do_not_depend_on_the_batch(backend, dtype, threads_restored):
    for seed in seeds(backend, 12):
        case = Random(200 + seed, dtype)
        torch.set_num_threads(1)
        want = gradients_in_a_batch(case, backend, 1, 0)
        for batch, at, threads in ((2, 1, 2), (5, 3, 1), (7, 0, 3)):
            torch.set_num_threads(threads)
            for name, x in gradients_in_a_batch(case, backend, batch, at).items():
                assert torch.equal(x, want[name]), f"seed {seed}: d{name} of entry {at} of {batch}, {threads} threads"


# ---- the checker ----------------------------------------------------------------------------------------------------


def numbers(documents):
    """A function without any context."""
    return [x * 2 for x in documents]


DOCUMENTS = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (4, 1, 7)]


def test_the_checker_accepts_what_is_invariant():
    with_nan = [*DOCUMENTS, torch.full((2, 3), torch.nan)]
    check_invariance(
        numbers, with_nan, batched=lambda x: x * 2, pieces=lambda x, lengths: torch.cat(numbers(x.split(lengths)))
    )


def on_threads(documents):
    return [x + (torch.get_num_threads() == 3) for x in documents]


@pytest.mark.parametrize(
    ("message", "packed", "options"),
    [
        (r"document 0 packed as .* from token 0 on, by up to", lambda docs: [x + len(docs) for x in docs], {}),
        ("document 1 packed as", lambda documents: [x + n for n, x in enumerate(documents)], {}),
        ("document 0 alone on 3 threads: 12 of 12 entries", on_threads, {}),
        ("document 0 computed a second time in the same way", lambda docs: [torch.rand_like(x) for x in docs], {}),
        ("at place 1 of a batch of 3", numbers, {"batched": lambda x: x * 2 + torch.arange(3)[:, None, None]}),
        (r"document 0 in pieces of \[1, 1, 1, 1\] .*: 9 of 12 .* from token 1 on", numbers,
         {"pieces": lambda x, lengths: torch.cat([part * 2 + (n > 0) for n, part in enumerate(x.split(lengths))])}),
        ("got torch.float64", numbers, {"batched": lambda x: x.double() * 2}),
    ],
)  # fmt: skip
def test_the_checker_finds_what_is_not(message, packed, options):
    with pytest.raises(AssertionError, match=message):
        check_invariance(packed, DOCUMENTS, **options)


def test_the_checker_finds_what_torch_gives_packed_rows():
    def attend(documents):
        x, lengths = torch.cat(documents)[None, None], torch.tensor([len(x) for x in documents])
        document = torch.arange(len(documents)).repeat_interleave(lengths)
        mask = (document[:, None] == document) & torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(x, x, x, mask)[0, 0].split(lengths.tolist())

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(
        AssertionError, match=r"document \d packed as .* entries differ from the document alone on one thread"
    ):
        check_invariance(attend, [torch.randn(n, 32, generator=generator) for n in (300, 41, 700)], threads=1)


@pytest.mark.parametrize(
    ("message", "packed", "options"),
    [
        (r"packed: got one tensor of shape \[4, 3\] as results, want a list of 1, .* n = 4; use split", torch.cat, {}),
        (r"packed: got a list among the results", lambda docs: [x.tolist() for x in docs], {}),
        (r"packed: got results of shapes \[4, 3\], want a list of 3, .* n = 4, 1, 7", lambda docs: [docs[0]], {}),
        (r"packed: got results of shapes \[\], want a list of 1", lambda docs: [x.sum() for x in docs], {}),
        (r"threads: got \(\), want", numbers, {"threads": ()}),
        (r"threads: got 0, want", numbers, {"threads": 0}),
    ],
)  # fmt: skip
def test_the_checker_refuses_results_of_another_form(message, packed, options):
    with pytest.raises(ValueError, match=message):
        check_invariance(packed, DOCUMENTS, **options)


@pytest.mark.parametrize(
    "documents", [DOCUMENTS[:1], [*DOCUMENTS, torch.zeros(0, 3)], [torch.tensor(1.0)] * 2, [[1, 2], [3]]]
)
def test_the_checker_refuses_too_few_tokens(documents):
    with pytest.raises(ValueError, match=r"documents: got .*, want "):
        check_invariance(numbers, documents)
