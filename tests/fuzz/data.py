"""Mutations of bytes and of values that all formats share. Everything is drawn from one seeded generator."""
from random import Random
from typing import Any

WORDS = (
    '', '.', '..', '../../evil', '/tmp/evil', 'C:\\evil', 'a\\b', 'CON', 'x' * 300, 'é', '\u202e', '\ud800', '\x00',
    '\n', ' ', '-1', '1e999', 'nan', '__class__', 'os', 'head.weight', 'pos_embed', 'norm.bias', 'module.', 'backbone.',
)


def number(rng: Random) -> int:
    """Return a number at which programs break."""
    size = rng.choice((0, 1, 2, 7, 49, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30))
    return size * rng.choice((1, 1, 1, -1)) + rng.choice((0, 0, -1, 1))


def word(rng: Random) -> str:
    """Return a string at which programs break."""
    return rng.choice(WORDS)


def _place(rng: Random, size: int) -> int:
    # headers stand at both ends, and they are what is read most closely
    edge = min(size, rng.choice((64, 512, 4096)))
    return min(size, rng.choice((rng.randrange(edge + 1), size - rng.randrange(edge + 1), rng.randrange(size + 1))))


def _once(rng: Random, data: bytes, other: bytes) -> bytes:
    i, j = _place(rng, len(data)), _place(rng, len(data))
    low, high = min(i, j), max(i, j)
    kind = rng.randrange(9)
    if kind <= 2:  # some bits
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 16)) if data else 0):
            flipped[min(_place(rng, len(data)), len(data) - 1)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 3:  # the end or the beginning gone
        return data[:i] if rng.random() < .8 else data[i:]
    if kind == 4:  # a piece gone, twice or cleared
        return data[:low] + rng.choice((b'', 2 * data[low:high], bytes(high - low))) + data[high:]
    if kind == 5:  # a piece of another file
        k = _place(rng, len(other))
        return data[:i] + other[k:k + rng.choice((8, 512, len(other)))] + data[rng.choice((i, j)):]
    if kind == 6:
        value = (number(rng) % 2**64).to_bytes(8, rng.choice(('little', 'big')))[:rng.choice((1, 2, 4, 8))]
        return data[:i] + value + data[i + len(value):]
    if kind == 7:
        return data[:i] + rng.randbytes(rng.choice((1, 4, 100))) + data[i:]
    return data[:i] + word(rng).encode('utf-8', 'surrogatepass') + data[i:]


def mutate_bytes(rng: Random, data: bytes, other: bytes) -> bytes:
    """Flip bits, cut, repeat and insert, and splice in pieces of another file."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data = _once(rng, data, other)
    return data


def mutate_json(rng: Random, value: Any) -> Any:
    """Return a JSON value with one of its parts replaced, dropped, repeated or renamed."""
    if isinstance(value, dict) and value and rng.random() < .9:
        key = rng.choice(list(value))
        changed = {k: v for k, v in value.items() if k != key}
        kind = rng.randrange(8)
        if kind == 0:
            return changed
        name = word(rng) if kind == 1 else rng.choice(list(value)) if kind == 2 else key
        return {**changed, name: mutate_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < .8:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice(([], [value[i]] * 2, [mutate_json(rng, value[i])])) + value[i + 1:]
    return rng.choice((None, True, [], {}, [None], {'a': 1}, .5, 1e308, number(rng), number(rng), word(rng)))
