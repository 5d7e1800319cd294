"""Friendly names for cells, such as `brave-otter-417`."""

import secrets
from collections.abc import Iterable, Iterator

_ADJECTIVES = """
    able amber brave bright brisk calm candid clever cosmic curious daring deft eager early fair fancy fleet
    gentle glad golden grand happy hardy honest humble jolly keen kind light lively loyal lucid lucky mellow
    merry mighty neat nimble noble patient placid plucky polite proud quick quiet rapid ready royal serene
    sharp silent silver smart snug solar sound spry stable steady stout sunny swift tidy tranquil true vivid
    warm wise witty zesty
"""
_ANIMALS = """
    adder alpaca badger beaver bison bobcat camel caribou cheetah cobra condor cougar crane crow dingo dolphin
    eagle egret falcon ferret finch fox gecko gibbon hare hawk heron hornet ibex ibis iguana impala jackal
    jaguar kestrel koala lark lemur leopard lion llama lynx magpie marlin marmot marten mole moose newt ocelot
    orca osprey otter owl panda parrot pelican puffin puma quail rabbit raven robin salmon seal shrew sparrow
    stork swan tapir tiger toucan trout turtle viper walrus weasel wombat yak zebra
"""


def fresh_names(taken: Iterable[str]) -> Iterator[str]:
    """Endless names that are not taken yet."""
    taken = set(taken)
    adjectives, animals = _ADJECTIVES.split(), _ANIMALS.split()
    while True:
        name = f"{secrets.choice(adjectives)}-{secrets.choice(animals)}-{secrets.randbelow(1000)}"
        if name not in taken:
            taken.add(name)
            yield name
