"""Near-duplicates by MinHash: rows whose sets of word triples overlap by more than a share.

Signatures and their comparison are arrays: about 0.7 kB a row. (datasketch, the library
for this, keeps 5 kB a row in its index and takes three times as long.)

Source: Broder 1997, "On the resemblance and containment of documents"; banding: Leskovec, Rajaraman, Ullman, "Mining of
Massive Datasets", section 3.4.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from qlora_lab.data.rows import normalise

HASHES = 128
SHINGLE_WORDS = 3
PRIME = np.uint64((1 << 31) - 1)  # products of two numbers below it fit 64 bits
SEED = 1
NEVER_MISSED = 0.98  # chance that a pair exactly as alike as the threshold shares a band


def shingles(text: str) -> list[int]:
    """Return the hashes of a text's word triples; of a shorter text, of the whole."""
    words = normalise(text).encode().split()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return [zlib.crc32(b" ".join(words[start : start + SHINGLE_WORDS])) for start in range(count)]


def signatures(texts: Sequence[str]) -> np.ndarray:
    """Return the MinHash signature of each text, (texts, 128) uint32."""
    sets = [shingles(text) for text in texts]
    starts = np.cumsum([0, *(len(hashes) for hashes in sets[:-1])])
    values = np.concatenate([np.array(hashes, dtype=np.uint64) for hashes in sets]) % PRIME
    rng = np.random.default_rng(SEED)
    factors, offsets = rng.integers(1, int(PRIME), (2, HASHES), dtype=np.uint64)
    found = np.empty((len(texts), HASHES), dtype=np.uint32)
    for number, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        found[:, number] = np.minimum.reduceat((values * factor + offset) % PRIME, starts)
    return found


def rows_a_band(similarity: float) -> int:
    """Return the longest band that a pair of this similarity still shares with a chance of `NEVER_MISSED`."""
    fitting = [size for size in (1, 2, 4, 8, 16) if 1 - (1 - similarity**size) ** (HASHES // size) >= NEVER_MISSED]
    return max(fitting, default=1)


def duplicates_of(signed: np.ndarray, similarity: float) -> np.ndarray:
    """Return for each row the earlier kept row that it is a near-duplicate of, or -1, (rows,) int64.

    A row is compared with the kept rows alone: what is like a row that went, but not like one that stays, stays.

    Args:
        signed: as `signatures` gives them.
        similarity: least share of equal values; it estimates the shared part of two texts' triples.
    """
    size = rows_a_band(similarity)
    count = HASHES // size
    bands = np.ascontiguousarray(signed).view(np.dtype((np.void, 4 * size)))  # (rows, bands)
    groups = np.empty((len(signed), count), dtype=np.int32)
    for band in range(count):
        groups[:, band] = np.unique(bands[:, band], return_inverse=True)[1].reshape(-1)
    shared = [np.bincount(groups[:, band])[groups[:, band]] > 1 for band in range(count)]
    duplicate_of = np.full(len(signed), -1, dtype=np.int64)
    kept_in: dict[tuple[int, int], list[int]] = {}
    for row in np.flatnonzero(np.any(shared, axis=0)).tolist():
        places = [(band, int(groups[row, band])) for band in range(count) if shared[band][row]]
        candidates = sorted({other for place in places for other in kept_in.get(place, ())})
        if candidates:
            alike = (signed[candidates] == signed[row]).mean(axis=1) >= similarity
            if alike.any():
                duplicate_of[row] = candidates[int(alike.argmax())]
                continue
        for place in places:
            kept_in.setdefault(place, []).append(row)
    return duplicate_of
