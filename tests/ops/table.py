"""The one table of cases that the op contract runs over.

An op may have many cases; together they are its row in the support matrix. To add an op, add its cases to one of
the modules that are gathered here; see CONTRIBUTING.md.
"""

import cases_foundation
from case import CAPABILITIES, Case, Maker

__all__ = ["CAPABILITIES", "CASES", "Case", "Maker"]
CASES: list[Case] = [*cases_foundation.CASES]
