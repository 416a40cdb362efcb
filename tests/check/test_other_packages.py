"""What the auditor says of other people's Functions that come with the project's own dependencies.

The wrong ones are pinned, so that we hear when they are mended upstream; the others must pass without alarm.
PEERS.md, written by audit_peers.py, has the whole story.
"""

import functools
import importlib.metadata
import warnings

import peers
import pytest
import torch

from bptools.check import check_function

NUMBERS = ("values", "gradients", "linearity", "magnitudes")
# For the clean ones: all that says whether numbers are right, or whether anything is written to.
CLEAN = (
    *NUMBERS,
    "same_tensor_twice",
    "unused_outputs",
    "mutation",
    "backward_twice",
    "interleaved",
    "randomness",
    "determinism",
    "grad_layouts",
    "leaks",
)

# (package, name): the checks that fail, and must go on failing.
WRONG = {
    ("peft", "BlockCircularConvolution"): ("gradients",),
    ("peft", "HadaWeightCP"): ("gradients",),
    ("torch", "CrossMapLRN2d"): ("values", "gradients"),
    ("torch", "_fake_quantize_learnable_per_tensor_affine"): ("empty",),
    ("torch", "scan"): ("double_backward", "modified_later"),
}
# (package, name): checks that say something by design; PEERS.md has the reasons.
EXPECTED = {
    ("transformers", "SqrtBoundDerivative"): {"magnitudes"},  # clips the gradient
    ("transformers", "PhimoeMultiplier"): {"magnitudes"},  # an argument that should move with the scores does not
    ("transformers", "_InputOnlyGrad"): {"backward_twice"},  # refused: the graph within is freed
}
CLEAN_PEERS = [
    *(("torchvision", t.name) for t in peers.TORCHVISION),
    *(("peft", name) for name in ("VeloraFunction", "UniqueBaseGrad", "HadaWeight")),
    *(("torch", name) for name in ("linear_cross_entropy (chunked)", "ModIndex", "FakeQuantPerChannel")),
    *(("transformers", t.name) for t in peers.TRANSFORMERS if not t.env),
]


@functools.cache
def audited(package, name, checks):
    target = next(t for t in peers.TARGETS if (t.package, t.name) == (package, name))
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        try:
            fn = target.load()
        except (ImportError, AttributeError) as error:
            pytest.skip(f"this {package} has no {name}: {error}")
        return check_function(fn, target.samples, target.reference, checks, (torch.float64, torch.float32))


# torch's scan is compiled anew at every call.
SLOW = {("torch", "scan")}


@pytest.mark.parametrize(
    ("package", "name"),
    [pytest.param(*key, marks=pytest.mark.slow if key in SLOW else ()) for key in WRONG],
    ids=lambda value: value,
)
def test_what_is_wrong_upstream_is_still_found(package, name):
    report = audited(package, name, WRONG[package, name])
    for check in WRONG[package, name]:
        assert report.verdict(check) == "fail", (
            f"{package} {name} passes {check}: mended upstream: take it off PEERS.md"
        )


@pytest.mark.parametrize(("package", "name"), CLEAN_PEERS, ids=lambda value: value)
def test_what_is_right_raises_no_alarm(package, name):
    report = audited(package, name, CLEAN)
    failed = {r.check for r in report.failures} - EXPECTED.get((package, name), set())
    assert not failed, str(report)
    assert report.verdict("gradients") == "pass", str(report)
