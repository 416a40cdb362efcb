"""The floor: the fewest bytes from which everything that the backward pass asks for could be had.

What is asked for can be kept, or be made from its ingredients by a cheap operation if all of these can be had. So
what is kept must lie on every way, from ingredients to what is made of them, that leads from a content that can be
kept only to one that is asked for: a cut through the vertices of a directed graph. A maximum flow finds the
cheapest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)
MOST = 2**31 - 1  # scipy counts in int32


def cheapest(
    asked: Iterable[Node], made_of: Callable[[Node], Iterable[Node] | None], price: Callable[[Node], int]
) -> dict[Node, int]:
    """Return which nodes to keep, and the price of each, so that all that are asked for can be had.

    Of several cheapest choices it is the one nearest to what is asked for.

    Args:
        asked: the nodes that must be had.
        made_of: the nodes that a node can be made of, or None if it can only be kept.
        price: of keeping a node, in bytes; one that costs 0 is not in the result.
    """
    asked = list(asked)
    sources: dict[Node, list[Node] | None] = {}
    todo = list(asked)
    while todo:
        node = todo.pop()
        if node not in sources:
            found = made_of(node) if price(node) else ()
            sources[node] = None if found is None else list(found)
            todo += sources[node] or ()
    prices = {node: price(node) for node in sources}
    kept = _vertex_cut(sources, prices, dict.fromkeys(asked))
    return {node: prices[node] for node in kept if prices[node]}


def _vertex_cut(
    sources: dict[Node, list[Node] | None], prices: dict[Node, int], asked: Iterable[Node]
) -> list[Node]:
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    # Bytes in units that fit. Where their greatest common divisor does not do, prices are rounded up a little.
    unit = max(math.gcd(*prices.values()), -(-sum(prices.values()) // (MOST - len(prices) - 1)), 1)
    start, end = 0, 1
    enter = {node: 2 + 2 * i for i, node in enumerate(sources)}  # one leaves at enter + 1
    edges: dict[tuple[int, int], int] = {}
    for node, ingredients in sources.items():
        edges[enter[node], enter[node] + 1] = -(-prices[node] // unit)
        if ingredients is None:
            edges[start, enter[node]] = MOST
        for other in ingredients or ():
            edges[enter[other] + 1, enter[node]] = MOST
    for node in asked:
        edges[enter[node] + 1, end] = MOST
    rows, columns = np.array(list(edges), np.int32).reshape(-1, 2).T
    n = 2 + 2 * len(sources)
    capacity = csr_array((np.array(list(edges.values()), np.int32), (rows, columns)), shape=(n, n))
    left = csr_array(capacity - maximum_flow(capacity, start, end).flow)
    left.eliminate_zeros()
    beyond = np.zeros(n, bool)  # what more could flow from to the end
    beyond[breadth_first_order(left.T.tocsr(), end, return_predecessors=False)] = True
    return [node for node, i in enter.items() if beyond[i + 1] and not beyond[i]]
