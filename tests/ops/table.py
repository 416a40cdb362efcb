"""The one table of cases that the op contract runs over.

An op may have many cases; together they are its row in the support matrix. To add an op, add its cases to one of
the modules that are gathered here, `cases_*.py`; see CONTRIBUTING.md.
"""

import importlib
from pathlib import Path

from case import CAPABILITIES, Case, Maker

__all__ = ["CAPABILITIES", "CASES", "Case", "Maker"]
MODULES = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("cases_*.py"))]
CASES: list[Case] = [case for module in MODULES for case in module.CASES]
