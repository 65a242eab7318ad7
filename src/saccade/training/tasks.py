"""The synthetic tasks: problems whose right answer is known, made on the fly. Knows nothing of models or training.

A problem is a line of text, a prompt and an answer that ends in `.`; one character is one token:

    copy                 banana=banana.
    reverse              banana=ananab.
    sort                 banana=aaabnn.
    associative-recall   k7q2a9=q2.          pairs of a letter and a digit, then the letter asked for
    addition             957+68=5201.        957 + 68 = 1025, lowest digit first

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
from itertools import islice
from random import Random

from saccade.training.packing import Batch, pack

SYMBOLS = string.ascii_lowercase
STOP = "."
ALPHABET = SYMBOLS + string.digits + "+=" + STOP
START = len(ALPHABET)
HELD_OUT_ONE_IN = 16
"""One prompt in so many is held out."""
HELD_OUT_PROBLEMS = 2000
"""Problems in the held-out set."""


def _copy(random: Random, length: int) -> tuple[str, str]:
    symbols = "".join(random.choices(SYMBOLS, k=length))
    return symbols + "=", symbols


def _reverse(random: Random, length: int) -> tuple[str, str]:
    symbols = "".join(random.choices(SYMBOLS, k=length))
    return symbols + "=", symbols[::-1]


def _sort(random: Random, length: int) -> tuple[str, str]:
    symbols = random.choices(SYMBOLS, k=length)
    return "".join(symbols) + "=", "".join(sorted(symbols))


def _associative_recall(random: Random, length: int) -> tuple[str, str]:
    keys = random.sample(SYMBOLS, length)
    values = random.choices(string.digits, k=length)
    asked = random.randrange(length)
    return "".join(k + v for k, v in zip(keys, values, strict=True)) + "=" + keys[asked], values[asked]


def _addition(random: Random, length: int) -> tuple[str, str]:
    a = random.randrange(10**length)
    b = random.randrange(10 ** random.randint(1, length))
    if random.random() < 0.5:
        a, b = b, a
    return f"{a}+{b}=", str(a + b)[::-1]


PROBLEMS: dict[str, tuple[Callable[[Random, int], tuple[str, str]], int]] = {
    "copy": (_copy, 512),
    "reverse": (_reverse, 512),
    "sort": (_sort, 512),
    "associative-recall": (_associative_recall, len(SYMBOLS)),
    "addition": (_addition, 512),
}
"""Each task: what makes (prompt, answer) of a given length, and the longest length that it can make."""


def is_held_out(prompt: str) -> bool:
    """Whether this prompt is kept from training."""
    return hashlib.blake2b(prompt.encode(), digest_size=4).digest()[0] % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class SyntheticTask:
    """One synthetic task: `name` is a key of `PROBLEMS`, `max_length` the most symbols, pairs or digits of a
    problem."""

    name: str
    max_length: int

    metric = "exact_match"
    vocab_size = START + 1
    stop = ALPHABET.index(STOP)

    def __post_init__(self) -> None:
        if self.name not in PROBLEMS:
            raise ValueError(f"task: got {self.name!r}, wanted one of {', '.join(PROBLEMS)}")
        longest = PROBLEMS[self.name][1]
        if not 2 <= self.max_length <= longest:
            raise ValueError(f"max_length: got {self.max_length}, wanted 2 to {longest} for {self.name}")

    def problems(self, random: Random, *, held_out: bool) -> Iterator[tuple[str, str]]:
        """Endless (prompt, answer) pairs, all held out or none; the answer ends in `.`."""
        make = PROBLEMS[self.name][0]
        while True:
            prompt, answer = make(random, random.randint(1, self.max_length))
            if is_held_out(prompt) == held_out:
                yield prompt, answer + STOP

    def train_batch(self, seed: int, index: int, tokens: int) -> Batch:
        """Micro-batch `index` of the run `seed`: whole problems, at most `tokens` tokens (or one problem)."""
        return next(self._batches(self.problems(Random(f"{seed} {self.name} {index}"), held_out=False), tokens))

    def held_out(self, tokens: int, limit: int | None = None) -> list[Batch]:
        """The held-out problems in batches of at most `tokens` tokens; with `limit`, about the first so many tokens."""
        problems = list(islice(self.problems(Random(f"held out {self.name}"), held_out=True), HELD_OUT_PROBLEMS))
        batches = []
        for batch in self._batches(iter(problems), tokens if limit is None else min(tokens, limit)):
            batches.append(batch)
            if limit is not None and (limit := limit - len(batch.tokens)) <= 0:
                break
        return batches

    def _batches(self, problems: Iterator[tuple[str, str]], tokens: int) -> Iterator[Batch]:
        examples: list[tuple[list[int], int]] = []
        used = 0
        for prompt, answer in problems:
            sequence = self.encode(prompt + answer)
            if examples and used + len(sequence) - 1 > tokens:
                yield pack(examples)
                examples, used = [], 0
            examples.append((sequence, 1 + len(prompt)))
            used += len(sequence) - 1
        yield pack(examples)

    def baselines(self) -> dict[str, float]:
        """No simpler model is worth showing: one that knows nothing is right next to never."""
        return {}

    def encode(self, text: str) -> list[int]:
        """`START`, then the token ids of a text; a character that the tasks do not use is a ValueError."""
        for character in text:
            if character not in ALPHABET:
                raise ValueError(f"prompt: got {character!r}, wanted only characters of {ALPHABET!r}")
        return [START, *(ALPHABET.index(character) for character in text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; `START` leaves nothing."""
        return "".join(ALPHABET[token] for token in tokens if token != START)
