"""Every op against torch's, at drawn shapes, layouts, masks and magnitudes: one table, one property."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import table
from hypothesis import HealthCheck, Phase, settings

TIERS = ("formula", "auto")
COMMON = settings(
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),  # to explain a failure traces every line
    suppress_health_check=[HealthCheck.too_slow],  # the first call of an op loads it
)
QUICK = settings(COMMON, derandomize=True, max_examples=20)
THOROUGH = settings(COMMON, derandomize=True, max_examples=100)

MODULES = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("properties_*.py"))]
PROPERTIES = [property for module in MODULES for property in module.PROPERTIES]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("property", PROPERTIES, ids=str)
def test_property(property, tier):
    property.hold(tier, QUICK)


@pytest.mark.release
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("property", PROPERTIES, ids=str)
def test_property_at_length(property, tier):
    property.hold(tier, THOROUGH)


def test_every_op_has_a_property():
    assert {p.op for p in PROPERTIES} == {case.op for case in table.CASES}
