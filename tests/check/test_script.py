"""A script that a failure carries says 1 while the defect is there, and 0 once it is mended."""

import contextlib
import enum
import functools
import io
import re
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

from bptools.check import check_function
from bptools.check._check import Failed, compare, load_checks
from bptools.check._subject import Point, Subject
from bptools.check.zoo import ZOO, by_number

CHECKS_WITHOUT_SCRIPT = {"distributed"}  # a process group for one rank is no script to read


def execute(script):
    """The exit status of a script run in a namespace of its own, and the exception it died of, if any."""
    path = list(sys.path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(script, "script.py", "exec"), {"__name__": "__main__"})
    except SystemExit as status:
        return status.code, None
    except Exception as error:
        return 1, f"{type(error).__name__}: {error}"
    finally:
        sys.path[:] = path
    return 0, None


def tells(failure):
    """Whether the script finds the defect: by its comparison, or by the very exception that was reported."""
    status, died = execute(failure.script)
    first_words = str(failure.got)[:40]
    return status == 1 and (died is None or (bool(first_words) and died.startswith(first_words)))


def findings(report):
    """One failure for each thing that is found."""
    return {(r.check, r.failure.what): r for r in report.failures}.values()


def failed_check(target, samples, check, **options):
    report = check_function(target, samples, checks=[check], dtypes=[torch.float64], **options)
    assert report.failures, f"{check} finds nothing: {report}"
    return report.failures[0].failure


# The zoo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_reference", [False, True], ids=["alone", "reference"])
@pytest.mark.parametrize("defect", [d for d in ZOO if d.visible == "cpu"], ids=lambda d: f"{d.number:02}-{d.name}")
def test_every_script_of_the_zoo_tells_the_broken_function_from_its_twin(defect, with_reference):
    checks = [name for name, check in load_checks().items() if defect.number in check.finds]
    reference = defect.reference if with_reference else None
    report = check_function(defect.broken, defect.samples, reference=reference, checks=checks)
    told = 0
    for result in findings(report):
        failure = result.failure
        if result.check in CHECKS_WITHOUT_SCRIPT:
            assert failure.script is None
            continue
        assert failure.script, f"{result.check} gives no script for: {failure.what}"
        mended, replaced = re.subn(rf"\b{defect.broken.__name__}\b", defect.correct.__name__, failure.script)
        assert replaced >= 2, "the script does not name the Function"  # in its head, and where it is called
        assert tells(failure), f"{result.check} does not reproduce: {failure.what}"
        assert execute(mended) == (0, None), f"{result.check} does not see that it is mended: {failure.what}"
        told += 1
    assert told


def test_a_script_runs_by_itself_without_the_auditor(tmp_path):
    defect = by_number(13)
    script = failed_check(defect.broken, defect.samples, "gradients").script
    guard = (
        "import sys\n"
        "for name in ('bptools.check._auditor', 'pytest', 'tyro', 'torchvision', 'rich'):\n"
        "    sys.modules[name] = None  # an import of it raises\n"
    )
    docstring, rest = script.split('"""\n\n', 1)
    path = tmp_path / "reproduce.py"
    path.write_text(f'{docstring}"""\n\n{guard}{rest}')
    found = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stderr) == (1, "")
    assert re.fullmatch(r"expected: .*\ngot: .*\n", found.stdout, re.DOTALL)


def test_the_head_says_what_is_wrong_and_on_what():
    defect = by_number(13)
    failure = failed_check(defect.broken, defect.samples, "gradients")
    head = failure.script.split('"""')[1]
    assert head.startswith("a gradient is wrong\n")
    assert failure.sample in head
    assert f"torch {torch.__version__}, seed 0" in head


# What is audited ----------------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    """y = 2x, with a gradient that forgets the two. The scripts import it from this file."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return dy


class DoubleMended(Double):
    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def plain_double(x):
    return Double.apply(x)


def plain_double_mended(x):
    return DoubleMended.apply(x)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -2.0, 1.5]))

    def forward(self, x):
        return Double.apply(x * self.weight)


class ScaleMended(Scale):
    def forward(self, x):
        return DoubleMended.apply(x * self.weight)


def x35():
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    ("target", "before", "after"),
    [
        (Double, "test_script.Double.apply", "test_script.DoubleMended.apply"),
        (Double.apply, "test_script.Double.apply", "test_script.DoubleMended.apply"),
        (plain_double, "test_script.plain_double", "test_script.plain_double_mended"),
        (
            functools.partial(plain_double),
            "functools.partial(test_script.plain_double)",
            "functools.partial(test_script.plain_double_mended)",
        ),
    ],
    ids=["Function", "apply", "function", "partial"],
)
def test_what_can_be_imported_is_imported(target, before, after):
    script = failed_check(target, x35(), "gradients").script
    assert "import test_script\n" in script
    assert execute(script) == (1, None)
    assert before in script
    assert execute(script.replace(before, after)) == (0, None)


def test_a_module_comes_as_a_pickle_with_its_parameters_as_inputs():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    script = failed_check(Scale(), x, "gradients").script
    assert "# weight" in script
    assert execute(script) == (1, None)
    mended = re.sub(r"module = .*", "module = test_script.ScaleMended()", script)
    assert execute(mended) == (0, None)


def test_a_module_is_compared_with_its_reference_module():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    script = failed_check(Scale(), x, "gradients", reference=ScaleMended()).script
    assert script.count("stateful(") >= 2
    assert execute(script) == (1, None)
    assert execute(re.sub(r"module = .*", "module = test_script.ScaleMended()", script)) == (0, None)


def test_a_function_defined_in_a_test_is_copied_with_what_it_refers_to():
    factor, table, where = 2.0, torch.tensor([1.0, 2.0]), torch.float64

    def doubled(x):
        return factor * x

    class Local(torch.autograd.Function):
        @staticmethod
        def forward(x: "torch.Tensor") -> "SomethingElse":  # noqa: F821
            return doubled(x) + table.to(where).sum()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, dy):
            return dy * (factor - 1)  # wrong

    class Child(Local):
        pass

    for target in (Local, Child):
        script = failed_check(target, x35(), "gradients").script
        assert "test_script" not in script
        assert execute(script) == (1, None)
        assert execute(script.replace("(factor - 1)", "factor")) == (0, None)


def test_a_lambda_is_copied():
    script = failed_check(lambda x: Double.apply(x) + 1, x35(), "gradients").script
    assert "function_0 = lambda x: Double.apply(x) + 1" in script
    assert execute(script) == (1, None)
    assert execute(script.replace("Double.apply(x)", "(2 * x)")) == (0, None)


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (lambda x: x * 2, "lambda x: x * 2"),
        (DoubleMended, "test_script.DoubleMended.apply"),
        (functools.partial(torch.mul, other=2), "functools.partial(torch.mul, other=2)"),
    ],
    ids=["lambda", "Function", "partial"],
)
def test_any_reference_goes_into_the_script(reference, code):
    script = failed_check(Double, x35(), "gradients", reference=reference).script
    assert code in script
    assert execute(script) == (1, None)
    assert execute(script.replace("test_script.Double.apply", "test_script.DoubleMended.apply")) == (0, None)


def test_two_lambdas_on_one_line_are_told_apart():
    pair = (lambda x: Double.apply(x) * 3, lambda x: Double.apply(x) * 5)
    for factor, target in zip((3, 5), pair, strict=True):
        script = failed_check(target, x35(), "gradients").script
        assert f"lambda x: Double.apply(x) * {factor}\n" in script
        assert execute(script) == (1, None)


def test_a_torch_function_is_called_by_its_name():
    point = Point(Subject.of(torch.tanh), (x35(),))
    with pytest.raises(Failed) as caught:
        compare(
            point, [torch.ones(2)], [torch.zeros(2)], what="made up", labels=["y"], how="expected, got = 1, call"
        )
    assert "call = bind(torch.tanh)" in caught.value.failure.script


class WithGenerator:
    """Cannot be pickled."""

    def __init__(self):
        self.generator = torch.Generator()
        self.hook = lambda x: x

    def __call__(self, x):
        return Double.apply(x)


def test_no_script_rather_than_one_that_cannot_run():
    """What can be neither imported nor copied nor pickled gives a failure that says all but the script."""
    failure = failed_check(WithGenerator(), x35(), "gradients")
    assert failure.script is None
    assert failure.input == "x"
    assert failure.got is not None


def test_no_script_for_code_that_was_never_in_a_file():
    space = {"Double": Double}
    exec("def nowhere(x):\n    return Double.apply(x)\n", space)
    assert failed_check(space["nowhere"], x35(), "gradients").script is None


def test_no_script_where_a_name_of_the_script_is_taken():
    dys = 2.0

    def clash(x):
        return Double.apply(x) * dys

    assert failed_check(clash, x35(), "gradients").script is None


def test_no_script_without_code_to_compute_both_sides():
    point = Point(Subject.of(plain_double), (x35(),))
    with pytest.raises(Failed) as caught:
        compare(point, [torch.ones(2)], [torch.zeros(2)], what="made up", labels=["y"], how="")
    assert caught.value.failure.script is None


# Samples ------------------------------------------------------------------------------------------------------


class Mode(enum.Enum):
    PLAIN = "plain"


def picky(x, *, mask, mode, shift, dtype, device, size, limits, other, function):
    assert mode is Mode.PLAIN
    assert (dtype, device, size) == (torch.float64, torch.device("cpu"), torch.Size([3, 5]))
    assert limits == {"low": float("-inf"), "high": [1, None, ...]}
    assert mask.dtype is torch.bool
    return Double.apply(x) * mask + shift + other.sum() + function(x).detach() * 0


def test_constants_of_every_sort_and_other_tensors_go_into_the_script():
    options = {
        "mask": x35() > 0,
        "mode": Mode.PLAIN,
        "shift": float("inf") * 0 if False else -0.25,
        "dtype": torch.float64,
        "device": torch.device("cpu"),
        "size": torch.Size([3, 5]),
        "limits": {"low": float("-inf"), "high": [1, None, ...]},
        "other": torch.arange(4).reshape(2, 2).t(),
        "function": torch.relu,
    }

    def samples(device, dtype, seed):
        yield (x35(),), options

    script = failed_check(picky, samples, "gradients").script
    assert execute(script) == (1, None)
    assert "as_strided" in script  # of the transposed one


def test_a_large_sample_is_packed_and_not_written_out():
    big = torch.randn(40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    point = Point(Subject.of(Double), (big,))
    with pytest.raises(Failed) as caught:
        load_checks()["gradients"].run(point)
    script = caught.value.failure.script
    assert "weights_only=True" in script
    assert execute(script) == (1, None)
    assert execute(script.replace("script.Double.", "script.DoubleMended.")) == (0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex128])
def test_tensors_come_back_bit_by_bit(dtype):
    from bptools.check._script import _tensor

    t = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    layouts = [t, t.t(), t[::2, 1:3], t[:1].expand(3, 6), t[0, 0], t[:0], torch.full((2,), float("nan")).to(dtype)]
    if dtype.is_complex:
        layouts.append(t.conj())
    for original in layouts:
        again = eval(_tensor(original))
        assert (again.dtype, again.shape) == (original.dtype, original.shape)
        assert torch.equal(again.nan_to_num(), original.nan_to_num())
        if original.numel() and not original.is_conj():
            assert again.stride() == original.stride()


class Conjugate(torch.autograd.Function):
    """y = x², complex, with a gradient that lacks the conjugate."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * dy * x


def test_complex_samples():
    z = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    script = failed_check(Conjugate, z, "gradients").script
    assert execute(script) == (1, None)
    mended = script.replace("test_script.Conjugate.apply", "torch.square")
    assert execute(mended) == (0, None)


class AddInPlace(torch.autograd.Function):
    """x ← x + x, marked dirty; the gradient forgets the two."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, dy):
        return dy


def test_a_function_that_writes_over_its_input_gets_copies():
    script = failed_check(AddInPlace, x35(), "gradients").script
    assert "it writes over its input" in script
    assert execute(script) == (1, None)
    assert execute(script.replace("test_script.AddInPlace.apply", "(lambda x: x.mul_(2))")) == (0, None)


def test_text_of_a_sample_cannot_break_out_of_the_docstring():
    def samples(device, dtype, seed):
        yield (x35(), '"""\n\\'), {}

    def noted(x, note):
        return Double.apply(x)

    script = failed_check(noted, samples, "gradients").script
    assert execute(script) == (1, None)


def test_a_main_program_is_copied_too(tmp_path, monkeypatch):
    """What a user tries first: a file that is run, with the Function, the audit and nothing else."""
    (tmp_path / "main.py").write_text(
        """
from pathlib import Path
import torch
from torch import nn
from bptools.check import check_function

FACTOR = 2

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(x): return FACTOR * x
    @staticmethod
    def setup_context(ctx, inputs, output): pass
    @staticmethod
    def backward(ctx, dy): return dy

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
    def forward(self, x): return Twice.apply(x * self.weight)

x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
for name, target in (("function", Twice), ("module", Layer())):
    report = check_function(target, x, checks=["gradients"])
    Path(name + ".py").write_text(report.failures[0].failure.script)
"""
    )

    monkeypatch.chdir(tmp_path)
    runpy.run_path("main.py", run_name="__main__")
    for name in ("function", "module"):
        with pytest.raises(SystemExit) as status:
            runpy.run_path(f"{name}.py", run_name="__main__")
        assert status.value.code == 1
        text = (tmp_path / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(text.replace("return dy", "return 2 * dy"))
        runpy.run_path(f"{name}.py", run_name="__main__")  # it would raise SystemExit


@pytest.mark.parametrize("check", ["gradients", "linearity", "double_backward", "jvp", "vmap", "mutation"])
def test_the_code_of_a_check_is_content_with_a_right_function_of_any_layout_and_many_arguments(check):
    """Force each check to fail on a right function: its script must then say that nothing is wrong."""

    def weighted(x, w, mask):
        return torch.tanh(x) * w * mask

    inputs = x35().detach().t().requires_grad_(), torch.tensor([2.0], dtype=torch.float64).requires_grad_()
    point = Point(Subject.of(weighted), (*inputs, (x35() > 0).t()))
    point.plain()
    wrong = [g + 1 for g in point._plain[2]]
    point._plain = (*point._plain[:2], wrong)
    if check in ("double_backward", "vmap", "mutation"):
        load_checks()[check].run(point)  # these do not look at the plain gradients
        return
    with pytest.raises(Failed) as caught:
        load_checks()[check].run(point)
    assert execute(caught.value.failure.script) == (0, None)
