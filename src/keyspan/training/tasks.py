"""The synthetic tasks: problems whose right answer is known, generated on the fly.

A problem is a line of text: a prompt, and an answer that ends in `.`; one character is one token:

    copy                 banana=banana.
    reverse              banana=ananab.
    sort                 banana=aaabnn.
    addition             957+68=5201.        957 + 68 = 1025, lowest digit first
    associative-recall   k7qBa9=qB.a9.k7.    pairs of a letter and its value, then each letter in turn and its value

The symbols of copy and reverse are letters of both cases and digits; those of sort, lower-case letters, in alphabetic
order. Recall asks for every pair, in random order (after Arora et al., "Zoology", 2023): the lower-case letters asked
for are prompts, their values, digits or capitals, are answers, and all of them must be right.

Addition writes its answer lowest digit first, so that each digit depends on two digits and on the carry just made
(a known aid: Lee et al., "Teaching Arithmetic to Small Transformers", 2023). Lengths are drawn uniformly from 1 to
the longest. A batch is a function of (seed, index) alone, so a resumed run sees what it would have seen without the
stop. A hash of its prompt says whether a problem is held out: training meets no held-out prompt, whatever its seed.
Each document opens with the token `START`, which has no character.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from random import Random

from keyspan.training.packing import Batch, pack

LETTERS = string.ascii_lowercase
VALUES = string.digits + string.ascii_uppercase
SYMBOLS = LETTERS + VALUES
STOP = "."
ALPHABET = SYMBOLS + "+=" + STOP
START = len(ALPHABET)
HELD_OUT_ONE_IN = 16
"""One prompt in so many is held out."""
HELD_OUT_PROBLEMS = 2000
"""Problems in the held-out set."""


Problem = list[tuple[str, str]]
"""Turns: a prompt and the answer to it, then perhaps another prompt and its answer, …"""


def _copy(random: Random, length: int) -> Problem:
    symbols = "".join(random.choices(SYMBOLS, k=length))
    return [(symbols + "=", symbols + STOP)]


def _reverse(random: Random, length: int) -> Problem:
    symbols = "".join(random.choices(SYMBOLS, k=length))
    return [(symbols + "=", symbols[::-1] + STOP)]


def _sort(random: Random, length: int) -> Problem:
    symbols = random.choices(LETTERS, k=length)
    return [("".join(symbols) + "=", "".join(sorted(symbols)) + STOP)]


def _associative_recall(random: Random, length: int) -> Problem:
    keys = random.sample(LETTERS, length)
    values = random.choices(VALUES, k=length)
    pairs = list(zip(keys, values, strict=True))
    listed = "".join(key + value for key, value in pairs) + "="
    random.shuffle(pairs)
    return [(listed + key if i == 0 else key, value + STOP) for i, (key, value) in enumerate(pairs)]


def _addition(random: Random, length: int) -> Problem:
    a = random.randrange(10**length)
    b = random.randrange(10 ** random.randint(1, length))
    if random.random() < 0.5:
        a, b = b, a
    return [(f"{a}+{b}=", str(a + b)[::-1] + STOP)]


PROBLEMS: dict[str, tuple[Callable[[Random, int], Problem], int]] = {
    "copy": (_copy, 512),
    "reverse": (_reverse, 512),
    "sort": (_sort, 512),
    "associative-recall": (_associative_recall, len(LETTERS)),
    "addition": (_addition, 512),
}
"""Each task: what makes a problem of a given length, and the longest length that it can make."""


def is_held_out(prompt: str) -> bool:
    """Whether a problem that opens with this prompt is kept from training; the part before `=` decides."""
    return hashlib.blake2b(prompt.partition("=")[0].encode(), digest_size=1).digest()[0] % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class SyntheticTask:
    """One synthetic task: `name` is a key of `PROBLEMS`, `max_length` the most symbols, pairs or digits of a
    problem."""

    name: str
    max_length: int

    metric = "exact_match"
    vocab_size = START + 1
    stop = ALPHABET.index(STOP)
    bytes_per_token = 1.0

    def __post_init__(self) -> None:
        if self.name not in PROBLEMS:
            raise ValueError(f"task: got {self.name!r}, want one of {', '.join(PROBLEMS)}")
        longest = PROBLEMS[self.name][1]
        if not 2 <= self.max_length <= longest:
            raise ValueError(f"max_length: got {self.max_length}, want 2 to {longest} for {self.name}")

    @property
    def longest(self) -> int:
        """Tokens of the longest problem that a model reads in training: all but the last, with `START` before them."""
        n = self.max_length
        return {"associative-recall": 5 * n + 1, "addition": 3 * n + 4}.get(self.name, 2 * n + 2)

    def problems(self, random: Random, *, held_out: bool) -> Iterator[Problem]:
        """Endless problems, all held out or none."""
        make = PROBLEMS[self.name][0]
        while True:
            problem = make(random, random.randint(1, self.max_length))
            if is_held_out(problem[0][0]) == held_out:
                yield problem

    def train_batch(self, seed: int, index: int, tokens: int) -> Batch:
        """Micro-batch `index` of the run `seed`: whole problems, at most `tokens` tokens (or one problem)."""
        return next(self._batches(self.problems(Random(f"{seed} {self.name} {index}"), held_out=False), tokens))

    def held_out(self, tokens: int, limit: int | None = None) -> list[Batch]:
        """The held-out problems in batches of at most `tokens` tokens; with `limit`, about the first so many tokens."""
        batches = []
        problems = _held_out_problems(self, HELD_OUT_PROBLEMS)
        for batch in self._batches(iter(problems), tokens if limit is None else min(tokens, limit)):
            batches.append(batch)
            if limit is not None and (limit := limit - len(batch.tokens)) <= 0:
                break
        return batches

    def _batches(self, problems: Iterator[Problem], tokens: int) -> Iterator[Batch]:
        examples: list[tuple[list[int], list[bool]]] = []
        used = 0
        for problem in problems:
            sequence = self.encode("".join(prompt + answer for prompt, answer in problem))
            if examples and used + len(sequence) - 1 > tokens:
                yield pack(examples)
                examples, used = [], 0
            scored = [False]  # START
            for prompt, answer in problem:
                scored += [False] * len(prompt) + [True] * len(answer)
            examples.append((sequence, scored))
            used += len(sequence) - 1
        yield pack(examples)

    def baselines(self) -> dict[str, float]:
        """None: a model that guesses is almost never right."""
        return {}

    def encode(self, text: str) -> list[int]:
        """`START`, then the token ids of a text; a character that the tasks do not use is a ValueError."""
        for character in text:
            if character not in ALPHABET:
                raise ValueError(f"prompt: got {character!r}, want only characters of {ALPHABET!r}")
        return [START, *(ALPHABET.index(character) for character in text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; `START` leaves nothing."""
        return "".join(ALPHABET[token] for token in tokens if token != START)


@lru_cache(maxsize=8)
def _held_out_problems(task: SyntheticTask, count: int) -> tuple[Problem, ...]:
    # Cached: most problems drawn are not held out, so this takes half a second, and every evaluation needs it.
    return tuple(islice(task.problems(Random(f"held out {task.name}"), held_out=True), count))
