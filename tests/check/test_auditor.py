"""`check_function`: what it takes, what it says, what it leaves alone, and that it does not cry wolf."""

import functools
import json
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bptools.check import Audit, check_function
from bptools.check._check import load_checks

QUICK = [name for name, check in load_checks().items() if check.default and name != "compiled"]
FEW = ["gradients", "linearity", "masks", "mutation"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(*shape, seed=0, dtype=torch.float64):
    return draw(*shape, seed=seed, dtype=dtype).requires_grad_()


def results(report):
    """All but `runs`, which is always asked."""
    return [r for r in report.results if r.check != "runs"]


def verdicts(report):
    return {check: report.verdict(check) for check in {r.check: None for r in results(report)}}


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


class SquareWrong(Square):
    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 3 * x * dy


class SquareOldForm(torch.autograd.Function):
    """Right, and with neither jvp nor vmap: both are refused by torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


# Subjects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "kind", "name"),
    [
        (Square, SquareWrong, "Function", "Square"),
        (Square.apply, SquareWrong.apply, "Function", "Square"),
        (torch.square, lambda x: SquareWrong.apply(x), "function", "square"),
        (nn.Softplus(), nn.Sequential(nn.Tanh()), "module", "Softplus"),
    ],
    ids=["Function", "apply", "function", "module"],
)
def test_it_takes_every_kind_of_callable(good, bad, kind, name):
    report = check_function(good, leaf(3, 5), checks=FEW)
    assert report.ok, report
    assert (report.kind, report.name) == (kind, name)
    if kind != "module":
        assert check_function(bad, leaf(3, 5), checks=FEW).verdict("gradients") == "fail"


def test_the_whole_default_audit_of_a_right_function():
    report = check_function(Square, leaf(3, 5), reference=torch.square)
    assert report.ok, report
    assert verdicts(report)["compiled"] == "pass"
    assert verdicts(report)["double_backward"] == "pass"
    # one differentiable input, no CUDA, no module, no custom op: these do not apply, and do not count as passed
    assert {c for c, v in verdicts(report).items() if v == "skipped"} >= {
        "masks",
        "cuda_graph",
        "module_copies",
        "opcheck",
    }


class WrongWeight(nn.Linear):
    def forward(self, x):
        return x @ Detached.apply(self.weight).t() + self.bias


class Detached(Square):
    """Identity whose gradient is forgotten."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 0 * dy


def test_the_parameters_of_a_module_are_inputs():
    torch.manual_seed(0)
    assert check_function(nn.Linear(3, 2), leaf(4, 3), checks=FEW).ok
    report = check_function(WrongWeight(3, 2), leaf(4, 3), checks=["gradients"])
    assert report.failures[0].failure.input == "weight"


def test_a_module_may_write_to_its_buffers():
    module = nn.BatchNorm1d(3).double()
    before = module.running_mean.clone()
    report = check_function(module, leaf(6, 3), checks=["gradients", "mutation"])
    assert verdicts(report) == {"gradients": "pass", "mutation": "pass"}
    assert torch.equal(module.running_mean, before), "the audit ran on the module's own buffer"


def test_a_function_must_not_write_to_its_arguments():
    def counting(x, count):
        count.add_(1)
        return x * 2

    report = check_function(counting, (leaf(3), torch.zeros(1)), checks=["mutation"])
    assert report.failures[0].failure.input == "count"


def test_a_module_is_compared_with_a_module_of_the_same_parameters():
    torch.manual_seed(0)
    module = WrongWeight(3, 2)
    report = check_function(module, leaf(4, 3), reference=nn.Linear(3, 2), checks=["values", "gradients"])
    assert verdicts(report) == {"values": "pass", "gradients": "fail"}


@torch.library.custom_op("bptools_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x * x * x


cube.register_fake(lambda x: torch.empty_like(x))
cube.register_autograd(
    lambda ctx, dy: dy * 3 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("bptools_tests::cube_without_fake", mutates_args=())
def cube_without_fake(x: torch.Tensor) -> torch.Tensor:
    return x * x * x


cube_without_fake.register_autograd(
    lambda ctx, dy: dy * 2 * ctx.saved_tensors[0] ** 2,  # wrong
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("op", [cube, torch.ops.bptools_tests.cube.default], ids=["custom_op", "overload"])
def test_a_custom_op_is_audited_and_passes_opcheck(op):
    report = check_function(op, leaf(3, 5), reference=lambda x: x**3, checks=["gradients", "values", "opcheck"])
    assert set(verdicts(report).values()) == {"pass"}, report


def test_a_custom_op_that_is_registered_badly_fails_both_ways():
    report = check_function(cube_without_fake, leaf(3, 5), checks=["gradients", "opcheck"])
    assert verdicts(report) == {"gradients": "fail", "opcheck": "fail"}


class DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class DoubleInPlaceUnmarked(DoubleInPlace):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        return x.clone()


def test_a_function_may_write_over_its_input_if_it_says_so():
    report = check_function(DoubleInPlace, leaf(3, 5), checks=["gradients", "linearity", "mutation"])
    assert verdicts(report)["gradients"] == "pass", report
    report = check_function(DoubleInPlaceUnmarked, leaf(3, 5), checks=["mutation"])
    assert report.verdict("mutation") == "fail"


def test_inputs_in_lists_and_keywords():
    def mixed(pair, *, bias, scale=1.0):
        a, (b, c) = pair
        return a * b + c * scale + bias

    def samples(device, dtype, seed):
        a, b, c, bias = (draw(3, 4, seed=seed + k).to(dtype).requires_grad_() for k in range(4))
        yield ([a, (b, c)],), {"bias": bias, "scale": 2.0}

    report = check_function(mixed, samples, checks=FEW)
    assert report.ok, report

    def wrong(pair, *, bias, scale=1.0):
        return mixed(pair, bias=SquareWrong.apply(bias), scale=scale)

    failure = check_function(wrong, samples, checks=["gradients"]).failures[0].failure
    assert failure.input == "bias"
    assert "pair[0] float64" in failure.sample


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2, x.sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.size = inputs[0].shape[-1]

    @staticmethod
    def backward(ctx, da, db):
        return da * 2 + db.unsqueeze(-1)


class TwoOutputsWrong(TwoOutputs):
    @staticmethod
    def backward(ctx, da, db):
        return da * 2


def test_several_outputs():
    checks = ["gradients", "unused_outputs", "non_differentiable"]
    assert set(verdicts(check_function(TwoOutputs, leaf(3, 5), checks=checks)).values()) == {"pass"}
    report = check_function(TwoOutputsWrong, leaf(3, 5), checks=checks)
    assert report.verdict("gradients") == "fail"
    assert report.verdict("non_differentiable") == "fail"  # nothing comes from the second


def test_outputs_that_are_no_floats_are_left_out():
    def peak(x):
        values, places = x.max(-1)
        return values, places, x > 0

    assert check_function(peak, leaf(3, 5), checks=FEW).ok


class ConjugateForgotten(Square):
    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


def test_complex_functions():
    z = torch.complex(draw(3, 4), draw(3, 4, seed=1)).requires_grad_()
    report = check_function(torch.square, z, checks=[*FEW, "double_backward", "jvp"])
    assert report.ok, report
    failure = check_function(ConjugateForgotten, z, checks=["gradients"]).failures[0].failure
    assert "a complex conjugate is missing" in failure.guess
    assert isinstance(failure.expected, complex)


# Samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "count"),
    [
        (leaf(3, 5), 1),
        ((leaf(3, 5), leaf(3, 5, seed=1)), 1),
        ([(leaf(3, 5), leaf(3, 5, seed=1)), (leaf(2), leaf(2, seed=1))], 2),
        ([((leaf(3, 5),), {"other": leaf(3, 5, seed=1)})], 1),
    ],
    ids=["tensor", "tuple", "list", "args and kwargs"],
)
def test_plain_tensors_are_samples_in_every_dtype(samples, count):
    def product(input, other=2.0):
        return input * other

    report = check_function(product, samples, checks=["gradients", "dtypes"])
    assert report.ok, report
    found = {(r.check, r.sample, r.dtype) for r in results(report)}
    low = ("float32", "bfloat16", "float16")
    assert found == {("gradients", str(i), "float64") for i in range(count)} | {
        ("dtypes", str(i), dtype) for i in range(count) for dtype in low
    }


def test_samples_are_drawn_once_for_each_dtype_with_device_and_seed():
    asked = []

    def samples(device, dtype, seed):
        asked.append((device, dtype, seed))
        yield (torch.ones(2, device=device, dtype=dtype, requires_grad=True),), {}

    check_function(torch.exp, samples, checks=["gradients", "linearity"], dtypes=[torch.float64], seed=7)
    assert asked == [("cpu", torch.float64, 7)]


def test_a_dtype_without_samples_is_skipped():
    def samples(device, dtype, seed):
        if dtype is not torch.bfloat16:
            yield (draw(3).to(dtype).requires_grad_(),), {}

    report = check_function(torch.exp, samples, checks=["dtypes"])
    by_dtype = {r.dtype: (r.verdict, r.reason) for r in results(report)}
    assert by_dtype["bfloat16"] == ("skipped", "samples gives none in bfloat16")
    assert by_dtype["float32"][0] == by_dtype["float16"][0] == "pass"


def test_no_samples_at_all_is_not_ok():
    report = check_function(torch.exp, [], checks=FEW)
    assert not report.ok
    assert {r.verdict for r in results(report)} == {"skipped"}


# Arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"fn": 3}, TypeError, r"fn must be an autograd\.Function, .* or a torch\.library\.custom_op, got int"),
        ({"reference": "tanh"}, TypeError, r"reference must be .* got str"),
        ({"reference": nn.Tanh()}, TypeError, r"reference of a Function must be a function, got a module"),
        (
            {"fn": nn.Tanh(), "reference": torch.tanh},
            TypeError,
            r"reference of a module must be a module .* got a function",
        ),
        ({"checks": "gradient"}, ValueError, r"checks must be .* got 'gradient'; did you mean 'gradients'\?"),
        ({"checks": ["zzz"]}, ValueError, r"checks must be .* got 'zzz'; known are runs, values, gradients"),
        ({"dtypes": [torch.int64]}, TypeError, r"dtypes must hold real floating dtypes, got torch\.int64"),
        ({"dtypes": ["float32"]}, TypeError, r"dtypes must hold real floating dtypes, got 'float32'"),
        ({"dtypes": []}, ValueError, r"dtypes must hold at least one dtype, got none"),
        ({"expect": {"nothing": "supported"}}, ValueError, r"expect names 'nothing'; known are runs, values"),
        (
            {"expect": {"vmap": "maybe"}},
            ValueError,
            r"expect\['vmap'\] must be 'supported', 'unsupported' or .* got 'maybe'",
        ),
        ({"samples": draw(3)}, ValueError, r"samples must hold a tensor that requires a gradient, and sample 0"),
        ({"samples": [3]}, TypeError, r"sample 0 must be \(args, kwargs\), .* got int"),
        ({"samples": [leaf(2), "x"]}, TypeError, r"sample 1 must be .* got str"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(arguments, error, said):
    with pytest.raises(error, match=rf"check_function: .*{said}"):
        check_function(**{"fn": Square, "samples": leaf(3, 5), "checks": FEW} | arguments)


def test_one_dtype_and_one_check_need_no_list():
    report = check_function(Square, leaf(3), checks="dtypes", dtypes=torch.float64)
    assert results(report) == []  # the only dtype is the widest, and `dtypes` asks about the others
    assert not report.ok
    assert check_function(Square, leaf(3), checks="gradients", dtypes=torch.float64).ok


# Verdicts -----------------------------------------------------------------------------------------------------


def test_what_was_only_skipped_has_not_passed():
    report = check_function(Square, leaf(3), checks=["opcheck", "cuda_graph", "values"])
    assert {r.verdict for r in results(report)} == {"skipped"}
    assert all(r.reason for r in results(report))
    assert report.failures == []
    assert not report.ok
    with pytest.raises(AssertionError, match="skipped"):
        report.raise_if_failed()


def test_a_refusal_is_unsupported_and_no_failure():
    report = check_function(SquareOldForm, leaf(3, 5), checks=["gradients", "jvp", "vmap"])
    assert verdicts(report) == {"gradients": "pass", "jvp": "unsupported", "vmap": "unsupported"}
    assert report.ok


@pytest.mark.parametrize(
    ("fn", "check", "expected", "verdict", "said"),
    [
        (SquareOldForm, "vmap", "unsupported", "unsupported", "setup_context"),
        (SquareOldForm, "vmap", (RuntimeError, "setup_context"), "unsupported", "setup_context"),
        (SquareOldForm, "vmap", (RuntimeError, "no such words"), "fail", "expected RuntimeError matching"),
        (SquareOldForm, "vmap", (KeyError, "setup_context"), "fail", "expected KeyError matching"),
        (SquareOldForm, "vmap", "supported", "fail", "expected to be supported, and refused"),
        (SquareOldForm, "func", "unsupported", "unsupported", ""),
        (Square, "vmap", "supported", "pass", ""),
        (Square, "vmap", "unsupported", "fail", "the expectation is stale"),
        (Square, "vmap", (RuntimeError, ""), "fail", "the expectation is stale"),
        (Square, "opcheck", "unsupported", "skipped", "not a custom op"),
    ],
)
def test_expectations(fn, check, expected, verdict, said):
    report = check_function(fn, leaf(3, 5), checks=[check], expect={check: expected})
    (result,) = results(report)
    assert result.verdict == verdict
    text = result.failure.what if result.failure else result.reason
    assert said in text
    assert (result.failure is not None) == (verdict == "fail")


class OnlyFloat32(Square):
    @staticmethod
    def forward(x):
        if x.dtype is not torch.float32:
            raise TypeError(f"takes float32, got {x.dtype}")
        return x * x


def test_a_function_of_one_dtype_is_asked_in_that():
    report = check_function(OnlyFloat32, leaf(3, 5), checks=["gradients", "linearity"])
    assert {r.dtype for r in results(report)} == {"float32"}
    assert report.verdict("linearity") == "pass"
    assert report.verdict("gradients") == "skipped"  # a numerical derivative in float32 says too little
    report = check_function(OnlyFloat32, leaf(3, 5), reference=torch.square, checks=["gradients"])
    assert report.verdict("gradients") == "pass"
    wrong = check_function(OnlyFloat32, leaf(3, 5), reference=torch.exp, checks=["gradients"])
    assert wrong.verdict("gradients") == "fail"


def test_a_dtype_that_is_refused_is_unsupported_unless_it_is_expected():
    given = {"checks": ["dtypes"], "dtypes": [torch.float32, torch.float16]}
    report = check_function(OnlyFloat32, leaf(3, 5), **given)
    found = {(r.check, r.dtype): r for r in report.results}
    assert found["runs", "float32"].verdict == "pass"
    assert found["runs", "float16"].verdict == "unsupported"
    assert "takes float32, got torch.float16" in found["runs", "float16"].reason
    assert found["dtypes", "float16"].verdict == "skipped"
    report = check_function(OnlyFloat32, leaf(3, 5), **given, expect={"runs": "supported"})
    assert [(r.check, r.dtype) for r in report.failures] == [("runs", "float16")]


def test_a_forward_that_raises_fails_with_its_words_and_nothing_else_is_asked():
    def broken(x):
        raise KeyError("no such table")

    report = check_function(broken, leaf(3), checks=["gradients", "jvp"], dtypes=torch.float64)
    assert [(r.check, r.verdict) for r in report.results] == [
        ("runs", "fail"),
        ("gradients", "skipped"),
        ("jvp", "skipped"),
    ]
    assert "KeyError: 'no such table'" in report.failures[0].failure.what


def test_a_backward_that_raises_fails_with_its_words():
    class Raising(Square):
        @staticmethod
        def backward(ctx, dy):
            raise RuntimeError("to be written")

    report = check_function(Raising, leaf(3), checks=["gradients"])
    assert "RuntimeError: to be written" in report.failures[0].failure.what


def test_an_output_without_a_graph_fails():
    report = check_function(lambda x: x.detach() * 2, leaf(3), checks=["gradients"])
    assert "no output requires a gradient" in report.failures[0].failure.what


def test_a_reference_with_other_outputs_is_no_reference():
    report = check_function(
        Square, leaf(3, 5), reference=lambda x: (x * x).sum(-1), checks=["gradients", "values"]
    )
    assert report.verdict("values") == "fail"
    gradients = next(r for r in results(report) if r.check == "gradients")
    assert gradients.verdict == "skipped"
    assert "(3,)" in gradients.reason
    assert "(3, 5)" in gradients.reason


# The case -----------------------------------------------------------------------------------------------------


def test_a_failure_names_the_place_and_both_values():
    class OneWrong(Square):
        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            dx = 2 * x * dy
            dx[1, 2] = 77.0
            return dx

    x = leaf(3, 5)
    for reference in (None, torch.square):
        failure = check_function(OneWrong, x, reference, checks=["gradients"], dtypes=[torch.float64])
        failure = failure.failures[0].failure
        assert failure.what == "a gradient is wrong"
        assert (failure.input, failure.output, failure.index) == ("x", 0, (1, 2))
        assert failure.got == 77.0
        assert failure.error == pytest.approx(abs(77.0 - failure.expected))


def test_the_smallest_failing_sample_is_smaller_and_fails():
    report = check_function(SquareWrong, leaf(6, 10), checks=["gradients"], dtypes=[torch.float64])
    failure = report.failures[0].failure
    shape = re.fullmatch(r"x float64\((\d+), (\d+)\)", failure.sample)
    sizes = [int(n) for n in shape.groups()]
    assert sizes[0] * sizes[1] < 60
    assert check_function(SquareWrong, leaf(*sizes), checks=["gradients"]).verdict("gradients") == "fail"
    assert f".view({tuple(sizes)})" in failure.script


def test_a_sample_is_cut_only_as_far_as_the_same_thing_is_wrong():
    class LongRows(Square):
        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return (2 if x.shape[-1] < 4 else 3) * x * dy

    failure = (
        check_function(LongRows, leaf(6, 8), checks=["gradients"], dtypes=[torch.float64]).failures[0].failure
    )
    rows, columns = map(int, re.fullmatch(r"x float64\((\d+), (\d+)\)", failure.sample).groups())
    assert columns == 4
    assert rows < 6


# Around it ----------------------------------------------------------------------------------------------------


def test_it_leaves_the_world_as_it_was():
    x = leaf(3, 5)
    x.grad = torch.full((3, 5), 7.0, dtype=torch.float64)
    module = nn.Linear(5, 2).double()
    before = {
        "random state": torch.random.get_rng_state().clone(),
        "threads": torch.get_num_threads(),
        "filters": list(warnings.filters),
        "default dtype": torch.get_default_dtype(),
        "parameters": [p.detach().clone() for p in module.parameters()],
    }
    with torch.no_grad():
        report = check_function(Square, x, checks=QUICK)
        module_report = check_function(module, x, checks=QUICK)
        assert not torch.is_grad_enabled()
    assert report.ok, report
    assert module_report.ok, module_report
    assert torch.equal(torch.random.get_rng_state(), before["random state"])
    assert torch.get_num_threads() == before["threads"]
    assert warnings.filters == before["filters"]
    assert torch.get_default_dtype() == before["default dtype"]
    assert torch.equal(x.grad, torch.full((3, 5), 7.0, dtype=torch.float64))
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(a, p) for a, p in zip(before["parameters"], module.parameters(), strict=True))
    assert torch.is_grad_enabled()


def without_times(report):
    document = json.loads(report.to_json())
    return {**document, "seconds": 0, "results": [{**r, "seconds": 0} for r in document["results"]]}


def test_the_same_seed_gives_the_same_report_to_the_last_digit():
    def samples(device, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        yield (torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),), {}

    first, second, other = (
        without_times(check_function(SquareWrong, samples, checks=FEW, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == second
    assert first["results"] != other["results"]
    assert [r["verdict"] for r in first["results"]] == [r["verdict"] for r in other["results"]]


def test_samples_that_draw_from_the_global_state_are_the_same_each_time():
    def samples(device, dtype, seed):
        yield (torch.randn(3, 5, dtype=dtype, requires_grad=True),), {}

    torch.manual_seed(1)
    first = without_times(check_function(SquareWrong, samples, checks=FEW))
    torch.manual_seed(2)
    assert without_times(check_function(SquareWrong, samples, checks=FEW)) == first


def test_the_tasks_are_known_before_they_are_asked():
    audit = Audit(SquareWrong, leaf(3, 5), checks=["gradients", "dtypes"], dtypes=[torch.float64, torch.float32])
    tasks = {task.key: task for task in audit.tasks() if task.check.name != "runs"}
    assert list(tasks) == ["0-gradients-float64", "0-dtypes-float32"]
    result = audit.ask(tasks["0-gradients-float64"])
    assert (result.key, result.verdict) == ("0-gradients-float64", "fail")


# No false alarms ----------------------------------------------------------------------------------------------


def positive(*shape, seed=0):
    return draw(*shape, seed=seed).abs().add(0.5).requires_grad_()


WITH_ZEROS = torch.tensor([[0.0, -1.0, 2.0], [3.0, 0.0, -0.5]], dtype=torch.float64, requires_grad=True)
TIES = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)

RIGHT = {
    "relu at 0": (torch.relu, WITH_ZEROS),
    "abs at 0": (torch.abs, WITH_ZEROS),
    "norm at 0": (functools.partial(torch.linalg.vector_norm, dim=-1), torch.zeros(2, 3).requires_grad_()),
    "max with ties": (functools.partial(torch.amax, dim=-1), TIES),
    "max with places": (lambda x: x.max(-1), TIES),
    "sort": (lambda x: x.sort(-1), leaf(3, 4)),
    "topk": (lambda x: x.topk(2), leaf(3, 4)),
    "cumsum": (functools.partial(torch.cumsum, dim=0), leaf(3, 4)),
    "where": (torch.where, (draw(3, 4) > 0, leaf(3, 4, seed=1), leaf(3, 4, seed=2))),
    "gather": (lambda x, i: x.gather(1, i), (leaf(3, 4), torch.tensor([[0, 0], [1, 3], [2, 1]]))),
    "embedding": (lambda i, w: F.embedding(i, w), (torch.tensor([0, 2, 2, 1]), leaf(4, 3))),
    "softmax": (functools.partial(torch.softmax, dim=-1), leaf(3, 4)),
    "cross entropy": (F.cross_entropy, (leaf(4, 3), torch.tensor([0, 2, 1, 1]))),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), (leaf(3, 5), leaf(5, seed=1), leaf(5, seed=2))),
    "linear": (F.linear, (leaf(4, 3), leaf(2, 3, seed=1), leaf(2, seed=2))),
    "conv2d": (F.conv2d, (leaf(2, 2, 5, 4), leaf(3, 2, 3, 2, seed=1), leaf(3, seed=2))),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), leaf(2, 3, 4, 6)),
    "inverse": (torch.linalg.inv, (draw(3, 3) + 3 * torch.eye(3, dtype=torch.float64)).requires_grad_()),
    "logarithm": (torch.log, positive(3, 4)),
    "division": (torch.div, (leaf(3, 4), positive(4, seed=1))),
    "dropout": (lambda x: F.dropout(x, 0.4), leaf(4, 6)),
    "several outputs": (lambda x: torch.var_mean(x, dim=-1), leaf(3, 5)),
    "views": (lambda x: x.unbind(-1), leaf(4, 2)),
    "complex": (
        lambda x: torch.fft.rfft(x),
        leaf(3, 6),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_no_false_alarm_on_ordinary_functions(name):
    fn, samples = RIGHT[name]
    report = check_function(fn, samples, checks=QUICK)
    assert report.failures == [], report
    assert report.verdict("gradients") == "pass"
    assert report.verdict("kinks") in ("pass", "skipped")


def test_no_false_alarm_when_compiled():
    report = check_function(
        lambda x, y: (torch.relu(x) * y).sum(-1), (leaf(3, 4), leaf(4, seed=1)), checks="compiled"
    )
    assert report.verdict("compiled") == "pass", report
