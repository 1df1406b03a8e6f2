"""Seeded mutations of good messages: a million bad ones for each codec, in seconds.

ZTNA_MUTATIONS=20000 pytest tests/property          a quick local run
ZTNA_MUTATION_SEED=17 pytest tests/property         the very run that failed
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence

import pytest

MUTATIONS_DEFAULT = 1_000_000
MESSAGE_BYTES_MAX = 70_000
# Lengths, counts, types and signs that parsers get wrong.
INTERESTING = bytes.fromhex("000102030408 10202d2e2f303f 4045607f80c0dfedfeff") + b'"\\{}[],:9eEun'


def mutate(seed: int, corpus: Sequence[bytes], count: int) -> Iterator[bytes]:
    """Yield `count` messages, each a good one of the corpus with one to four changes; the same for a seed."""
    draw = random.Random(seed).random
    for _ in range(count):
        data = bytearray(corpus[int(draw() * len(corpus))])
        changes = 1 if draw() < 0.6 else 1 + int(draw() * 4)
        for _ in range(changes):
            _change(data, draw, corpus)
        yield bytes(data)


def _change(data: bytearray, draw: Callable[[], float], corpus: Sequence[bytes]) -> None:
    """Make one change in place."""
    kind = int(draw() * 9)
    at = int(draw() * len(data)) if data else 0
    if not data:
        data.append(int(draw() * 256))
    elif kind == 0:
        data[at] ^= 1 << int(draw() * 8)
    elif kind == 1:
        data[at] = int(draw() * 256)
    elif kind == 2:
        data[at] = INTERESTING[int(draw() * len(INTERESTING))]
    elif kind == 3:
        # Headers are at the front, where a random place rarely hits.
        data[int(draw() * min(len(data), 12))] = INTERESTING[int(draw() * len(INTERESTING))]
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        del data[at : at + 1 + int(draw() * 8)]
    elif kind == 6:
        data.insert(at, INTERESTING[int(draw() * len(INTERESTING))])
    elif kind == 7:
        data[at:at] = data[at : at + 1 + int(draw() * 32)]
    else:
        other = corpus[int(draw() * len(corpus))]
        data[at:] = other[int(draw() * len(other)) :]
    del data[MESSAGE_BYTES_MAX:]


def survive(
    capsys: pytest.CaptureFixture[str],
    name: str,
    corpus: Sequence[bytes],
    act: Callable[[bytes], object],
    allowed: type[Exception] | tuple[type[Exception], ...],
) -> None:
    """Give `act` the mutations; fail with seed, number and bytes at the first error that is not allowed.

    The count is ZTNA_MUTATIONS or a million, the seed ZTNA_MUTATION_SEED or a new one; both are printed.
    At least one mutation in a thousand must be refused, or the test tests nothing.
    """
    count = int(os.environ.get("ZTNA_MUTATIONS", MUTATIONS_DEFAULT))
    seed = int(os.environ.get("ZTNA_MUTATION_SEED", random.SystemRandom().randrange(2**32)))
    with capsys.disabled():
        print(f"\n{name}: {count} mutations, seed {seed}", flush=True)
    refused = 0
    for number, data in enumerate(mutate(seed, corpus, count)):
        try:
            act(data)
        except allowed:
            refused += 1
        except Exception as error:
            pytest.fail(f"{name}: mutation {number} of seed {seed} raised {error!r}: {data.hex()}")
    assert refused > count / 1000, f"{name}: only {refused} of {count} mutations were refused (seed {seed})"
