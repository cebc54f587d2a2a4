"""Short tasks with one exact answer, made from a seed: unlimited rows and nothing to download.

Every prompt is one line and every answer is right by construction; the tests solve each prompt again from
its text alone.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

from qlora_lab.data.rows import Row
from qlora_lab.errors import ConfigError, DataError, unknown_name

MAX_REFUSED_DRAWS = 2000  # in a row, before a family counts as used up

# Everyday words of three to six letters; most are a single token to current tokenizers.
WORD_LIST = """
apple arm bag ball bank barn bath beach bear bed bell bird boat bone book boot bowl box bread bridge
brush bus cake camp car card cat chair city clock cloud coat coin corn cow cup desk dog door dream
dress drum duck ear earth egg engine face farm field fire fish flag floor flower foot forest fox fruit
garden gate ghost glass glove goat gold grape grass green hair hall hammer hand hat hill honey horse
house ice ink island jacket jar key king kite knife lake lamp leaf lemon letter light lion lock map
market metal milk mirror moon mouse music nail needle nest night nose ocean onion orange oven paint
paper park pear pencil piano pig pilot planet plate pocket pond queen rabbit radio rain ring river
road robot rock roof room root rope rose sail salt sand school sea seed sheep ship shirt shoe silver
sky smoke snake snow soap song spoon star stone storm street sugar summer sun table tail tea tent tiger
tooth tower train tree truck uncle valley violin voice wagon wall water wheel wind window winter wolf
wood yard
"""
WORDS = tuple(WORD_LIST.split())
ORDINALS = ("first", "second", "third", "fourth", "fifth")

Task = tuple[str, str]


def add_numbers(rng: random.Random) -> Task:
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    return f"Add {left} and {right}.", str(left + right)


def sort_words(rng: random.Random) -> Task:
    words = rng.sample(WORDS, 4)
    return f"Sort these words from A to Z: {' '.join(words)}", " ".join(sorted(words))


def largest_number(rng: random.Random) -> Task:
    numbers = rng.sample(range(10, 100), 4)
    return f"Which number is the largest: {', '.join(map(str, numbers))}?", str(max(numbers))


def reverse_list(rng: random.Random) -> Task:
    words = rng.sample(WORDS, 4)
    return f"Reverse the order of this list: {' '.join(words)}", " ".join(reversed(words))


def nth_word(rng: random.Random) -> Task:
    words = rng.sample(WORDS, len(ORDINALS))
    index = rng.randrange(len(words))
    return f"What is the {ORDINALS[index]} word of this list: {' '.join(words)}", words[index]


def count_words(rng: random.Random) -> Task:
    words = rng.sample(WORDS, rng.randint(2, 9))
    return f"Count the words of this list: {' '.join(words)}", str(len(words))


FAMILIES: dict[str, Callable[[random.Random], Task]] = {
    "add_numbers": add_numbers,
    "sort_words": sort_words,
    "largest_number": largest_number,
    "reverse_list": reverse_list,
    "nth_word": nth_word,
    "count_words": count_words,
}


def procedural_rows(
    count: int,
    *,
    seed: int,
    role: str,
    families: Sequence[str] = (),
    exclude: AbstractSet[str] = frozenset(),
    distinct: bool = False,
) -> list[Row]:
    """Make rows of several task families, in turn, so that each family has as many rows (or one less).

    For one seed and role a shorter list is the beginning of a longer one.

    Args:
        count: rows to make.
        seed: the only source of chance, together with `role`.
        role: "training" or "evaluation"; equal seeds give different rows in different roles.
        families: names of FAMILIES; empty for all.
        exclude: source keys of rows that must not be made.
        distinct: no task twice; otherwise rows are independent draws, and a task may come again.

    Raises:
        ConfigError: an unknown family.
        DataError: a family has fewer tasks than are asked for.
    """
    names = list(families) or list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise ConfigError(unknown_name("data.source.families", name, FAMILIES))
    streams = {name: tasks(name, random.Random(f"{role} {name} {seed}"), set(exclude), distinct) for name in names}
    turns = itertools.islice(itertools.cycle(names), count)
    return [next(streams[name]) for name in turns]


def tasks(family: str, rng: random.Random, refused: set[str], distinct: bool) -> Iterator[Row]:
    """Yield rows of one family without end; with `distinct` each question only once."""
    for made in itertools.count():
        for _ in range(MAX_REFUSED_DRAWS):
            row = Row(*FAMILIES[family](rng), family=family)
            if row.source_key not in refused:
                break
        else:
            raise DataError(
                f"procedural family '{family}' has no more different tasks after {made} rows; ask for fewer "
                "rows, or name more families in data.source.families"
            )
        if distinct:
            refused.add(row.source_key)
        yield row
