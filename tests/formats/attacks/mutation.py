"""Damages a sound file the way bit rot, cut downloads and attackers do; the same seed gives the same file."""

import random

_WILD_NUMBERS = (0, 1, 2, 7, 8, 9, 31, 32, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1)


def mutate(data: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """One damage or a few, most of them in the first `header_bytes`."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        limit = header_bytes if rng.random() < 0.95 else len(data)
        data = rng.choice(_DAMAGES)(data, rng.randrange(max(1, min(limit, len(data)))), rng)
    return data


def _flip(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + bytes([(data[at] if at < len(data) else 0) ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _randomize(data: bytes, at: int, rng: random.Random) -> bytes:
    length = rng.randint(1, 16)
    return data[:at] + rng.randbytes(length) + data[at + length :]


def _wild_number(data: bytes, at: int, rng: random.Random) -> bytes:
    size = rng.choice((4, 8))
    number = (rng.choice(_WILD_NUMBERS) + rng.randint(-1, 1)) % (1 << 8 * size)
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def _nudge_number(data: bytes, at: int, rng: random.Random) -> bytes:
    """Adds a little to a 64-bit number; lengths that are wrong by one hide best."""
    number = int.from_bytes(data[at : at + 8], "little") + rng.choice((-8, -1, 1, 8, 32))
    return data[:at] + (number % 2**64).to_bytes(8, "little") + data[at + 8 :]


def _cut(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at]


def _remove(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + data[at + rng.randint(1, 64) :]


def _insert(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def _repeat(data: bytes, at: int, rng: random.Random) -> bytes:
    piece = data[at : at + rng.randint(1, 256)]
    return data[:at] + piece + data[at:]


def _move(data: bytes, at: int, rng: random.Random) -> bytes:
    source = rng.randrange(max(1, len(data)))
    piece = data[source : source + rng.randint(1, 64)]
    return data[:at] + piece + data[at + len(piece) :]


_DAMAGES = (_flip, _randomize, _wild_number, _wild_number, _nudge_number, _cut, _remove, _insert, _repeat, _move)
