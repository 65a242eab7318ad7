"""Tasks and text: right answers, lossless packing, a held-out side that training never meets, yardsticks by hand."""

import math
import zlib
from random import Random

import pytest
import torch
from torch import nn

from keyspan.inference.generate import generate
from keyspan.models.gpt import GPT, GPTConfig
from keyspan.training.data import (
    START,
    StandardLibrary,
    bigram_bits_per_byte,
    gzip_bits_per_byte,
    is_held_out,
    pack_bytes,
    python_files,
)
from keyspan.training.evaluate import evaluate
from keyspan.training.packing import IGNORE, Batch, pack
from keyspan.training.tasks import HELD_OUT_PROBLEMS, PROBLEMS, SyntheticTask

LONGEST = {"copy": 64, "reverse": 64, "sort": 24, "associative-recall": 16, "addition": 4}
LOWER, UPPER, DIGITS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
USED = {
    "copy": LOWER + UPPER + DIGITS,
    "reverse": LOWER + UPPER + DIGITS,
    "sort": LOWER,
    "associative-recall": LOWER + UPPER + DIGITS,
    "addition": DIGITS + "+",
}


def solve(name: str, prompt: str) -> tuple[str, int]:
    """(answer, length of the problem) of a prompt, found without the generator's code."""
    problem, _, asked = prompt.partition("=")
    if name == "copy":
        return problem + ".", len(problem)
    if name == "reverse":
        return "".join(problem[-1 - i] for i in range(len(problem))) + ".", len(problem)
    if name == "sort":
        return "".join(c * problem.count(c) for c in LOWER) + ".", len(problem)
    if name == "associative-recall":
        return problem[problem.index(asked) + 1] + ".", len(problem) // 2
    a, b = problem.split("+")
    answer = int(a) + int(b)
    digits = []
    while answer or not digits:
        answer, digit = divmod(answer, 10)
        digits.append(str(digit))
    return "".join(digits) + ".", max(len(a), len(b))


def unpack(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The (tokens, targets) of each document."""
    tokens, targets = batch.tokens.split(batch.lengths), batch.targets.split(batch.lengths)
    return [(x.tolist(), y.tolist()) for x, y in zip(tokens, targets, strict=True)]


def problems_of(task: SyntheticTask, batch: Batch) -> list[tuple[str, str]]:
    """The (prompt, answer) of each document, put together again from tokens and targets.

    Of a recall, each question makes a pair: ("k7q2=k", "7."), ("k7q2=q", "2.").
    """
    found = []
    for tokens, targets in unpack(batch):
        assert all(target in (IGNORE, token) for target, token in zip(targets, tokens[1:], strict=False))
        text = task.decode(tokens[1:])
        listed = text.index("=") + 1
        scored = "".join("-" if target == IGNORE else task.decode([target]) for target in targets)
        assert set(scored[:listed]) == {"-"}
        if task.name == "associative-recall":
            assert set(scored[listed::3]) == {"-"}
            asked = text[listed::3]
            assert sorted(asked) == sorted(text[: listed - 1 : 2])  # each letter once
            found += [(text[:listed] + key, scored[listed + 3 * i + 1 :][:2]) for i, key in enumerate(asked)]
        else:
            assert "-" not in scored[listed:]
            found.append((text[:listed], scored[listed:]))
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_answers_are_right_and_packing_loses_nothing(name):
    task = SyntheticTask(name, LONGEST[name])
    lengths, symbols = set(), set()
    for index in range(24):
        batch = task.train_batch(seed=1, index=index, tokens=2000)
        assert len(batch.tokens) == sum(batch.lengths) <= 2000
        assert len(batch.tokens) > 2000 - 130  # the next problem, of at most 130 tokens, did not fit
        for prompt, answer in problems_of(task, batch):
            right, length = solve(name, prompt)
            assert answer == right, prompt
            lengths.add(length)
            symbols |= set(prompt)
    assert lengths == set(range(1, LONGEST[name] + 1))
    assert symbols == set(USED[name]) | {"="}


@pytest.mark.parametrize("name", PROBLEMS)
def test_training_never_meets_a_held_out_prompt(name):
    task = SyntheticTask(name, 2)  # so short that the two sides would overlap if nothing kept them apart
    held_out = {prompt.partition("=")[0] for batch in task.held_out(512) for prompt, _ in problems_of(task, batch)}
    met = {
        prompt.partition("=")[0]
        for seed in range(3)
        for index in range(20)
        for prompt, _ in problems_of(task, task.train_batch(seed, index, 512))
    }
    assert held_out
    assert not held_out & met


def test_a_batch_is_a_function_of_seed_and_index():
    task = SyntheticTask("sort", 24)
    first = task.train_batch(0, 5, 512)
    assert torch.equal(first.tokens, SyntheticTask("sort", 24).train_batch(0, 5, 512).tokens)
    for other in (task.train_batch(0, 6, 512), task.train_batch(1, 5, 512)):
        assert first.tokens.tolist() != other.tokens.tolist()


def test_held_out_problems_and_their_limit():
    task = SyntheticTask("copy", 8)
    everything = task.held_out(512)
    assert sum(len(batch.lengths) for batch in everything) == HELD_OUT_PROBLEMS
    assert max(len(batch.tokens) for batch in everything) <= 512
    some = task.held_out(512, limit=2000)
    assert 2000 <= sum(len(batch.tokens) for batch in some) <= 2500
    assert [b.tokens.tolist() for b in some] == [b.tokens.tolist() for b in everything[: len(some)]]


def test_pack_by_hand():
    batch = pack([([7, 1, 2, 3], [False, False, True, True]), ([8, 4], [True, True])])
    assert batch.tokens.tolist() == [7, 1, 2, 8]
    assert batch.targets.tolist() == [IGNORE, 2, 3, 4]
    assert batch.lengths == [3, 1]
    assert batch.scored() == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SyntheticTask("divide", 4), "task: got 'divide', want one of copy"),
        (lambda: SyntheticTask("copy", 1), "max_length: got 1, want 2 to 512 for copy"),
        (lambda: SyntheticTask("associative-recall", 27), "max_length: got 27, want 2 to 26"),
        (lambda: SyntheticTask("copy", 4).encode("a!="), "prompt: got '!'"),
        (lambda: StandardLibrary(1), "max_length: got 1, want at least 2"),
    ],
)
def test_bad_tasks(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def library(tmp_path):
    """A folder of 200 small files, one long one, and some that must be left out; the files, by relative path."""
    random = Random(0)
    files = {f"package{i % 7}/module{i}.py": random.randbytes(random.randint(1, 60)) for i in range(200)}
    files["long.py"] = bytes(range(256)) * 3
    others = {"empty.py": b"", "site-packages/x.py": b"x", "json/test/y.py": b"y", "notes.txt": b"z"}
    for name, text in (files | others).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    return tmp_path, files


def test_python_files(library, tmp_path_factory):
    root, files = library
    assert python_files(root) == files
    assert list(python_files(root)) == sorted(files)
    with pytest.raises(ValueError, match="holds no Python source"):
        python_files(tmp_path_factory.mktemp("none"))


def test_split_is_disjoint_and_complete(library):
    root, files = library
    task = StandardLibrary(32, root)
    train, held_out = task.files(held_out=False), task.files(held_out=True)
    assert sorted(train + held_out) == sorted(files.values())
    assert sorted(held_out) == sorted(text for name, text in files.items() if is_held_out(name))
    assert b"".join(task.documents(held_out=False)) == b"".join(train)
    assert max(map(len, task.documents(held_out=False))) == 32


def text_of(batch: Batch) -> list[bytes]:
    """The documents of a batch of bytes, after checking that each input is the byte before its target."""
    for tokens, targets in unpack(batch):
        assert tokens == [START, *targets[:-1]]
    return [bytes(targets) for _, targets in unpack(batch)]


def test_packed_bytes_are_the_documents():
    documents = [b"abc", b"\xff", bytes(range(256))]
    assert text_of(pack_bytes(documents)) == documents


def test_an_epoch_is_every_byte_once_in_a_new_order(library):
    root, _ = library
    task = StandardLibrary(32, root)
    documents = task.documents(held_out=False)
    total = sum(map(len, documents))
    steps = -(-2 * total // 97)
    batches = [task.train_batch(3, index, 97) for index in range(steps)]
    assert all(len(batch.tokens) == 97 for batch in batches)
    stream = b"".join(text for batch in batches for text in text_of(batch))
    first, second = stream[:total], stream[total : 2 * total]
    assert first != second
    for epoch in (first, second):
        assert sorted(epoch) == sorted(b"".join(documents))
    # A document that no batch cuts in two comes whole, and there are many.
    pieces = [text for batch in batches for text in text_of(batch)]
    assert len(set(documents) & set(pieces)) > len(set(documents)) / 2


def test_held_out_text_is_whole(library):
    root, _ = library
    task = StandardLibrary(32, root)
    batches = task.held_out(64)
    assert b"".join(text for batch in batches for text in text_of(batch)) == b"".join(task.files(held_out=True))
    assert max(len(batch.tokens) for batch in batches) <= 64
    # A part of it comes from all over.
    documents = task.documents(held_out=True)
    part = [text for batch in task.held_out(64, limit=100) for text in text_of(batch)]
    assert 50 <= sum(map(len, part)) <= 200
    assert documents.index(part[0]) < len(documents) / 3
    assert documents.index(part[-1]) > len(documents) / 2


def test_text_and_tokens():
    task = StandardLibrary(32)
    assert task.encode("é") == [START, 0xC3, 0xA9]
    assert task.decode([START, 0xC3, 0xA9, 0xC3]) == "é\ufffd"


def test_bigram_by_hand():
    # Seen: START→a and a→b, once each. P(a) = P(b) = 2/258, P of any other = 1/258; one follower in each context.
    assert bigram_bits_per_byte([b"ab"], [b"ab"]) == pytest.approx(-math.log2((1 + 2 / 258) / 2))
    # c after START: (0 + 1/258) / 2. a after c, where nothing was ever seen: P(a) = 2/258.
    assert bigram_bits_per_byte([b"ab"], [b"ca"]) == pytest.approx((math.log2(516) + math.log2(129)) / 2)
    # Files are kept apart: b opens the second file, it does not follow a.
    assert bigram_bits_per_byte([b"ab"], [b"a", b"b"]) == pytest.approx(
        -(math.log2((1 + 2 / 258) / 2) + math.log2((2 / 258) / 2)) / 2
    )


def test_bigram_is_a_distribution():
    files = [b"the cat", b"then"]
    total = sum(2 ** -bigram_bits_per_byte(files, [bytes([byte])]) for byte in range(256))
    assert total == pytest.approx(1)


def test_gzip_by_hand():
    def size(text):
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        return len(deflate.compress(text) + deflate.flush()) + 18  # gzip's header and trailer

    files = [b"a" * 1000, b"abc"]
    assert gzip_bits_per_byte(files) == 8 * (size(files[0]) + size(files[1])) / 1003


class Echo(nn.Module):
    """A model that gives the token it has just read the probability 1/2, and the other `vocab_size` − 1 the rest."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens, lengths):
        return nn.functional.one_hot(tokens, self.vocab_size) * math.log(self.vocab_size - 1) + self.weight

    def logits(self, hidden):
        return hidden


def test_evaluation_by_hand():
    # Scored: 3 (right), 1 (right); 2 (wrong); 2 (right). Two of three documents are without an error.
    batch = Batch(torch.tensor([3, 1, 1, 2]), torch.tensor([3, 1, 2, 2]), [2, 1, 1])
    unscored = Batch(torch.tensor([0, 4]), torch.tensor([IGNORE, 4]), [2])
    result = evaluate(Echo(5), [batch, unscored])
    assert result.exact_match == 3 / 4
    assert result.loss == pytest.approx((4 * math.log(2) + math.log(8)) / 5)
    assert result.bits_per_byte == pytest.approx((4 + 3) / 5)


def test_exact_match_is_what_greedy_decoding_answers():
    model = GPT(GPTConfig(vocab_size=11, dim=16, layers=2, heads=2))
    random = Random(0)
    prompts = [random.choices(range(11), k=random.randint(1, 9)) for _ in range(24)]
    answers = generate(model, prompts, max_tokens=4, temperature=0.0)
    for answer in answers[::3]:  # an error in the first, middle or last token
        place = random.randrange(4)
        answer[place] = (answer[place] + 1) % 11
    batch = pack((p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompts, answers, strict=True))
    assert evaluate(model, [batch]).exact_match == 16 / 24


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_longest_problem_has_as_many_tokens_as_the_task_says(name):
    task = SyntheticTask(name, LONGEST[name])
    make = PROBLEMS[name][0]
    found = (make(Random(n), task.max_length) for n in range(300))
    lengths = [len(task.encode("".join(prompt + answer for prompt, answer in problem))) - 1 for problem in found]
    assert max(lengths) == task.longest
