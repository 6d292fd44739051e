"""Bounds the bodies of a layer in all the graphs that an engine captures.

An engine captures dozens of batch sizes of dozens of layers. Every body beyond the first takes memory and start-up
time in each of them. So they go to the sizes at which choosing on the device saves most.
"""

from __future__ import annotations

from collections.abc import Iterable

from .capture import GraphDispatch

MOST_BODIES = 24
"""Most bodies of a layer beyond the first of each of its graphs. In a model of 48 layers these are 1,152."""


def where_it_pays(graphs: GraphDispatch, sizes: Iterable[int], most: int = MOST_BODIES) -> frozenset[int]:
    """Batch sizes, among those that are captured, at which the device shall choose.

    They save the largest shares of their time by it, by the cost model, and have at most `most` further bodies
    together. Raises KernelError if no candidate is left for a graph.
    """
    offers = {n: graphs.outlook(n)[2] for n in sizes}
    saved = {n: (s.gain_us - s.overhead_us) / s.expected_us for n, s in offers.items() if s.pays}
    found = set[int]()
    for n in sorted(saved, key=lambda n: (-saved[n], n)):
        bodies = len(offers[n].columns) - 1
        if bodies <= most:
            found.add(n)
            most -= bodies
    return frozenset(found)
