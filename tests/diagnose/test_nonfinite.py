import math
import os
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import bptools
from bptools.diagnose import NonFiniteError, detect_nonfinite


class Block(nn.Module):
    """Does one thing to what it is given."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Net(nn.Module):
    def __init__(self, function, again=False):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), Block(function), nn.Linear(4, 2)
        self.again = again

    def forward(self, x):
        x = self.first(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
        return self.last(x)


def train(model, x=None):
    given = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) if x is None else x
    model(given).square().sum().backward()


def found(model, x=None, **options):
    with pytest.raises(NonFiniteError) as caught, detect_nonfinite(**options):
        train(model, x)
    return caught.value


def log_of_negative(x):
    return torch.log(x)


def root_of_zero(x):
    return (x * 0).abs().sqrt()


def overflow(x):
    return torch.exp(1e4 * x) * 0


def in_place(x):
    return x.clone().div_(0).mul_(0)


@pytest.mark.parametrize(
    ("function", "op", "backward", "infinity", "again"),
    [
        (log_of_negative, "aten.log", "", None, False),
        (root_of_zero, "aten.mul", "AbsBackward0", ("aten.div", "SqrtBackward0"), False),
        (root_of_zero, "aten.mul", "AbsBackward0", ("aten.div", "SqrtBackward0"), True),
        (overflow, "aten.mul", "", ("aten.exp", ""), False),
        (in_place, "aten.mul_", "", ("aten.div_", ""), False),
    ],
)
def test_the_operation_the_module_the_pass_and_the_line(function, op, backward, infinity, again):
    error = found(Net(function, again))
    origin = error.origin
    assert (origin.what, origin.op, origin.module, origin.backward) == ("NaN", op, "Net.block", backward)
    line = function.__code__.co_firstlineno + 1
    assert origin.line.startswith(f"{__file__}:{line}, in {function.__name__}: return ")
    assert (error.infinity and (error.infinity.op, error.infinity.backward)) == infinity
    assert str(error).startswith(f"first NaN: Net.block, in the {'backward' if backward else 'forward'} pass")
    assert origin.brief.startswith(f"{op} in Net.block, in the ")
    assert "\n" not in origin.brief


def test_what_a_checkpoint_runs_once_more_is_a_forward_pass():
    calls = []

    def function(x):
        calls.append(1)
        return (x.abs() + (1 if len(calls) == 1 else -1e9)).log().tanh()

    origin = found(Net(function, again=True)).origin
    assert (len(calls), origin.module, origin.backward) == (2, "Net.block", "")


@pytest.mark.filterwarnings("ignore")
def test_what_torch_says():
    """What this is for: detect_anomaly names the gradient of an operation long after the one that made the NaN."""
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan values") as caught:
        train(Net(log_of_negative))
    assert "LogBackward" not in str(caught.value)


def test_values_are_told():
    zero = torch.zeros(1, 2)
    with pytest.raises(NonFiniteError) as caught, detect_nonfinite():
        overflow(torch.tensor([[1.0, -1.0, 0.0]]))
    assert caught.value.origin.result == "float32 (1, 3) of 0 with 1 NaN"
    assert caught.value.origin.arguments == "self float32 (1, 3) in [0, 1] with 1 inf, other 0"
    assert caught.value.infinity.arguments == "self float32 (1, 3) in [-1e+04, 1e+04]"
    with pytest.raises(NonFiniteError) as caught, detect_nonfinite():
        in_place(zero)
    assert caught.value.origin.arguments == "itself, in place, other 0"
    assert caught.value.origin.result == "float32 (1, 2) with 2 NaN"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu(),
        lambda x: (x + torch.full_like(x, -math.inf).triu(1)).softmax(-1),  # a mask
        lambda x: x.masked_fill(torch.eye(3, 4) > 0, -math.inf).softmax(-1),
        lambda x: torch.where(x > 0, x, -torch.inf).amax() + x,
        lambda x: x + torch.full((3, 4), math.nan).copy_(x),  # what was there is written over, as in new memory
        lambda x: x.clamp(-math.inf, math.inf),
    ],
)
def test_what_is_meant_is_no_error(function):
    model = Net(function)
    with detect_nonfinite():
        train(model, torch.linspace(-1, 1, 12).view(3, 4))


def test_infinities_are_errors_on_request_and_remembered_without():
    error = found(Net(lambda x: x / 0), inf=True)
    assert (error.origin.what, error.origin.op, error.origin.module) == ("inf", "aten.div", "Net.block")
    with detect_nonfinite() as seen:
        assert seen.infinity is None
        Net(lambda x: x / 0).block(torch.ones(2))
        torch.log(torch.zeros(2))
    assert (seen.infinity.op, seen.infinity.module) == ("aten.div", "Block")


def test_a_sum_that_overflows_is_finite_all_the_same():
    with detect_nonfinite(inf=True):
        torch.full((1000,), 3e38) * 1
        torch.full((1000,), 6e4, dtype=torch.float16) * 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes(dtype):
    with pytest.raises(NonFiniteError, match=f"returned {str(dtype)[6:]}"), detect_nonfinite():
        torch.zeros(3, dtype=dtype) / torch.zeros(3, dtype=dtype)


def test_what_comes_from_outside_is_named():
    model = Net(torch.relu)
    assert "mat1 float32 (1, 4) in [1, 3] with 1 NaN, which no operation made" in str(
        found(model, torch.tensor([[1.0, 2.0, 3.0, math.nan]]))
    )
    with torch.no_grad():
        model.last.weight[0, 1] = math.nan
    assert "Net.last.weight, float32 (4, 2)" in str(found(model))


def test_outside_of_modules():
    with pytest.raises(NonFiniteError, match="no module, in the forward pass") as caught, detect_nonfinite():
        Net(torch.tanh)(torch.ones(1, 4)).sub(100).log()
    assert caught.value.origin.module == ""
    with pytest.raises(NonFiniteError, match="no module, in the backward pass, SqrtBackward0"), detect_nonfinite():
        (Net(torch.tanh)(torch.ones(1, 4)) * 0).sqrt().mul(0).sum().backward()


def test_our_ops_and_lean():
    model = bptools.nn.Sequential(bptools.nn.Linear(4, 4), Block(log_of_negative), bptools.nn.LayerNorm(4))
    for context in (bptools.lean, bptools.backend):
        with context() if context is bptools.lean else context("formula"):
            assert found(model).origin.module == "Sequential.1"


class Loss(nn.Module):
    def forward(self, y):
        return y.square().mean()


class Force(nn.Module):
    """Goes back within its forward pass."""

    def forward(self, x):
        energy = (x * 0).square().sum(1).sqrt().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_module_is_not_blamed_for_what_ran_before_it():
    y = torch.zeros(3, requires_grad=True)
    with pytest.raises(NonFiniteError) as caught, detect_nonfinite():
        Loss()(torch.sqrt(y * y)).backward()
    assert (caught.value.origin.module, caught.value.origin.backward) == ("", "SqrtBackward0")


def test_a_backward_pass_within_a_forward_pass():
    with pytest.raises(NonFiniteError) as caught, detect_nonfinite():
        Force()(torch.ones(2, 3, requires_grad=True))
    assert (caught.value.origin.backward, caught.value.origin.module) == ("PowBackward0", "")
    assert "energy = " in caught.value.origin.line


def test_the_last_infinity_is_named_and_the_first_is_kept():
    with detect_nonfinite() as seen:
        torch.log(torch.zeros(2))  # harmless
        with pytest.raises(NonFiniteError) as caught:
            torch.exp(torch.full((2,), 1e3)) * 0
    assert seen.infinity.op == "aten.log"
    assert caught.value.infinity.op == "aten.exp"


def test_memory_that_was_not_set_and_what_is_written_over():
    index, one = torch.tensor([0, 1]), torch.ones(3, 2)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what is not set with NaN
    try:
        with detect_nonfinite():
            torch.empty(4)[index] = 0.0
            torch.empty_permuted((2, 3), (1, 0))
            y = torch.full((3,), math.nan)
            y[index] = 1.0
            y.fill_(0.0).add_(1)
            F.ctc_loss(
                torch.randn(9, 2, 5).log_softmax(2), torch.ones(2, 3, dtype=torch.long),
                torch.tensor([9, 5]), torch.tensor([3, 2]),
            )  # fmt: skip
            one.relu_()
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_step_of_an_optimizer(foreach):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    with pytest.raises(NonFiniteError, match="aten._foreach_add_" if foreach else "aten.add_"), detect_nonfinite():
        torch.optim.SGD([p], lr=math.inf, foreach=foreach).step()


def test_missing_data_may_be_marked_by_nan():
    x = torch.tensor([1.0, math.nan])
    with detect_nonfinite(outside=False):
        torch.where(x.isnan(), 0.0, x * 2).sum()
    with pytest.raises(NonFiniteError, match="which no operation made"), detect_nonfinite():
        x * 2
    with pytest.raises(NonFiniteError, match=r"aten\.sqrt"), detect_nonfinite(outside=False):
        (x * 2).nan_to_num(-1).neg().sqrt()


def test_lines_are_of_whoever_is_not_torch():
    boxes = torch.zeros(1, 4)
    with pytest.raises(NonFiniteError) as caught, detect_nonfinite():
        torchvision.ops.box_iou(boxes, boxes)
    assert f"{os.sep}torchvision{os.sep}ops" in caught.value.origin.line


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_looked_at_does_no_harm():
    linear = nn.Linear(3, 3)
    with detect_nonfinite():
        torch.func.jvp(linear, (torch.randn(3),), (torch.randn(3),))
        torch.func.hessian(lambda x: linear(x).square().sum())(torch.randn(3))
        linear(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]))
        torch.eye(3).to_sparse() @ torch.ones(3, 2)
        torch.ones(3, device="meta") / 0
        torch.empty(0) / 0
        torch.tensor(1.0) + 1


def test_errors_go_through_pickle_and_blocks_within_blocks():
    error = found(Net(overflow))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.origin, again.infinity) == (str(error), error.origin, error.infinity)
    with detect_nonfinite(), pytest.raises(NonFiniteError) as caught, detect_nonfinite():
        train(Net(root_of_zero))
    assert caught.value.origin.module == "Net.block"


def test_nothing_is_left_behind():
    before = F.linear.__module__, torch.is_anomaly_enabled(), len(nn.modules.module._global_forward_hooks)
    found(Net(log_of_negative))
    after = F.linear.__module__, torch.is_anomaly_enabled(), len(nn.modules.module._global_forward_hooks)
    assert before == after
    assert torch.log(-torch.ones(1)).isnan()


def test_values_and_gradients_are_as_without():
    model, x = Net(torch.tanh), torch.randn(3, 4)
    train(model, x)
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with detect_nonfinite():
            train(model, x)
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


def test_not_in_compiled_code():
    def step(x):
        with detect_nonfinite():
            return x + 1

    with pytest.raises(Exception, match=r"detect_nonfinite: cannot be used in what torch.compile compiles"):
        torch.compile(step, fullgraph=True, backend="eager")(torch.ones(2))


@pytest.mark.gpu
def test_on_a_gpu():
    model = Net(root_of_zero).cuda()
    error = found(model, torch.randn(3, 4, device="cuda"))
    assert (error.origin.backward, error.origin.module) == ("AbsBackward0", "Net.block")
