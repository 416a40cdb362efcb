"""45 deliberately broken autograd.Functions, each beside a correct twin.

An auditor of Functions is itself to be audited: it has to find what is wrong with each broken one, and to have
nothing to say about the twins. The files follow five questions: does it depend on how a tensor lies in memory
(`layout`), does it keep autograd's contract (`contract`), what does it remember (`state`), are its numbers right
(`numerics`), does it compose with the rest of torch (`composition`)?
"""

from __future__ import annotations

from bptools.check.zoo import composition, contract, layout, numerics, state
from bptools.check.zoo._defect import Defect

ZOO: tuple[Defect, ...] = (
    *layout.DEFECTS,
    *contract.DEFECTS,
    *state.DEFECTS,
    *numerics.DEFECTS,
    *composition.DEFECTS,
)

__all__ = ["ZOO", "Defect", "by_number"]


def by_number(number: int) -> Defect:
    """The defect of that number, 1 to 45."""
    for defect in ZOO:
        if defect.number == number:
            return defect
    raise KeyError(f"the zoo has the defects 1 to {len(ZOO)}; got {number}")
