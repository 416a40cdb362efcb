"""The traps of fine-tuning: each test falls into one, and shows that bptools.finetune does not."""

import copy
import math

import numpy as np
import peft
import pytest
import torch
import transformers
import traps_worker
from test_distributed import python
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.ops import StochasticDepth

from bptools import finetune as ft
from bptools.finetune.verify import StopAfter

DEFAULT_SCALE = 2.0**16
LOSS = ft.supervised(nn.CrossEntropyLoss())


def product(module, batch):
    """A loss whose gradient with respect to the weight of a linear layer is the mean input."""
    return module(batch[0]).mean()


def batch(n, seed=0, inputs=4, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, inputs, generator=generator), torch.randint(0, classes, (n,), generator=generator)


def seeded(*layers):
    """Return a network of what the functions ``layers`` make."""
    torch.manual_seed(0)
    return nn.Sequential(*(make() for make in layers))


def layered(*extra):
    """A body that is to be frozen, of a linear layer and ``extra``, and a head."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 4), *extra), lambda: nn.Linear(4, 3))


def adamw(model, lr=0.1, weight_decay=0.0):
    depths = ft.parameter_depths(model, torch.zeros(1, 4))
    return torch.optim.AdamW(ft.parameter_groups(model, depths, lr, weight_decay))


def sgd(model, loss=LOSS, lr=0.1, **options):
    return ft.Stepper(model, torch.optim.SGD(model.parameters(), lr=lr), loss, **options)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(model):
    return flat(p.grad for p in model.parameters())


def off(found, right):
    return float(((found - right).norm() / right.norm()).detach())


# What is frozen -----------------------------------------------------------------------------------------------


def test_01_frozen_batch_norm_keeps_its_statistics():
    inputs, targets = batch(32)
    inputs = inputs + 5

    def means(set_modes, freeze):
        model = layered(nn.BatchNorm1d(4))
        freeze(model)
        for _ in range(2):  # epochs
            set_modes(model)
            LOSS(model, (inputs, targets))
        return model[0][1].running_mean

    def freeze(model):
        model[0].requires_grad_(False)
        model[0].eval()  # once, which the next train() undoes

    assert means(nn.Module.train, freeze).norm() > 0.5
    ours = means(ft.set_modes, lambda model: ft.enter_phase(model, adamw(model), ft.Phase(("1",), 2)))
    assert torch.equal(ours, torch.zeros(4))


def test_02_a_frozen_batch_norm_trains_on_what_it_is_evaluated_on():
    inputs = batch(64)[0]
    inputs = 7 + (inputs - inputs.mean(0)) / inputs.std(0, correction=0)

    def means(set_modes, **options):
        model = seeded(lambda: nn.BatchNorm1d(4).requires_grad_(False), lambda: nn.Linear(4, 3))
        for name, value in options.items():
            setattr(model[0], name, value)
        set_modes(model)
        train = model[0](inputs)
        return train.mean().item(), model[0].eval()(inputs).mean().item()

    assert means(nn.Module.train, track_running_stats=False) == pytest.approx((0.0, 7.0), abs=1e-4)
    assert means(ft.set_modes) == pytest.approx((7.0, 7.0), abs=1e-4)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), StochasticDepth(0.5, "row")], ids=["dropout", "drop path"])
def test_03_dropout_in_frozen_parts_is_a_choice_that_is_told(layer):
    model, inputs = layered(layer), batch(64)[0]

    def varies():
        return not torch.equal(model[0](inputs), model[0](inputs))

    model[0].requires_grad_(False)
    model.train()
    assert varies()

    optimizer, modes = adamw(model), {}
    for active in (False, True):
        phase = ft.Phase(("1",), 1, frozen_dropout=active)
        ft.enter_phase(model, optimizer, phase)
        table = ft.trainability_report(model, optimizer, phase)
        layers, mode = (list(table.columns[i].cells) for i in (0, 6))
        modes[varies()] = mode[layers.index("frozen")]
    assert modes == {False: "eval", True: "train"}


# The step -----------------------------------------------------------------------------------------------------


def test_04_gradients_are_unscaled_before_clipping_and_once():
    naive, ours, part = layered(), layered(), batch(16)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(naive.parameters(), lr=0.1)
    scaler.scale(LOSS(naive, part)).backward()
    nn.utils.clip_grad_norm_(naive.parameters(), 0.1)
    scaler.unscale_(optimizer)
    assert gradient(naive).norm() == pytest.approx(0.1 / DEFAULT_SCALE, rel=1e-3)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)

    result = sgd(ours, amp="fp16", clip=0.1).step([part, part])
    assert gradient(ours).norm() == pytest.approx(0.1, rel=1e-3)
    assert 0.1 < result.norm < 10


def test_05_clipping_is_of_the_whole_gradient():
    # Gradients (50, 0) and (0, 0.5) of the halves: the sum is clipped to (1, 0.01), and not to (0.89, 0.45).
    parts = [(torch.tensor([[100.0, 0.0]]),), (torch.tensor([[0.0, 1.0]]),)]
    naive, ours = (seeded(lambda: nn.Linear(2, 1, bias=False)) for _ in range(2))
    for part in parts:
        (product(naive, part) / 2).backward()
        nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
    sgd(ours, product, clip=1.0).step(parts)
    right = torch.tensor([1.0, 0.01]) / math.hypot(1.0, 0.01)
    assert off(gradient(naive), right) == pytest.approx(0.45, abs=0.01)
    assert off(gradient(ours), right) < 1e-5


class Large(nn.Module):
    """A network whose gradients in half precision overflow at the scale that a scaler begins with, by far."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) * 30.0


def large_loss(module, batch):
    return module(batch[0]).float().sum()


def skips(stepper, steps):
    return [stepper.step([batch(1)]).skipped for _ in range(steps)]


def scaled():
    return sgd(Large(), large_loss, lr=1e-6, amp="fp16")


def test_06_the_scaler_goes_on_with_its_scale():
    stepper = scaled()
    first = skips(stepper, 12)
    assert 3 < sum(first) < 12  # until the scale is low enough
    naive, ours = scaled(), scaled()
    for other in (naive, ours):
        other.model.load_state_dict(stepper.model.state_dict())
        other.optimizer.load_state_dict(stepper.optimizer.state_dict())
    ours.load_state_dict(stepper.state_dict())
    assert skips(naive, 12) == first
    assert skips(ours, 12) == [False] * 12


def test_07_the_schedule_waits_where_the_scaler_skips():
    naive, ours = (scaled() for _ in range(2))
    schedule = ft.make_schedule("linear", naive.optimizer, 10, warmup=0.0)
    naive.optimizer._opt_called = True  # or torch warns, of the very first step alone
    for _ in range(3):
        assert naive.step([batch(1)]).skipped
        schedule.step()
    assert naive.optimizer.param_groups[0]["lr"] == pytest.approx(0.7e-6)
    ours.schedule = ft.make_schedule("linear", ours.optimizer, 10, warmup=0.0)
    assert skips(ours, 3) == [True] * 3
    assert ours.optimizer.param_groups[0]["lr"] == 1e-6


def test_08_tokens_weigh_the_same_in_every_batch():
    generator = torch.Generator().manual_seed(117)
    torch.manual_seed(117)
    model, parts = nn.Linear(6, 5).double(), []
    for count in (500, 20, 20, 20):
        inputs = torch.randn(1, count, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 5, (1, count), generator=generator)
        padded = nn.functional.pad(inputs, (0, 0, 0, 500 - count))
        parts.append({"inputs": padded, "labels": nn.functional.pad(labels, (0, 500 - count), value=-100)})

    def loss(module, part):
        return nn.functional.cross_entropy(module(part["inputs"]).flatten(0, 1), part["labels"].flatten())

    def gradient_of(some, divisor=1):
        model.zero_grad()
        for part in some:
            (loss(model, part) / divisor).backward()
        return gradient(model)

    right = gradient_of([{key: torch.cat([part[key] for part in parts]) for key in parts[0]}])
    assert off(gradient_of(parts, 4), right) == pytest.approx(1.25, abs=0.05)
    result = sgd(model, loss, count=ft.count_tokens(shift=False)).step(parts)
    assert result.samples == 560
    assert off(gradient(model), right) < 1e-5


def test_09_the_last_window_weighs_as_much_as_it_has():
    parts = [batch(8, seed) for seed in range(5)]
    naive, ours, right = layered(), layered(), layered()
    LOSS(right, parts[4]).backward()
    for number, part in enumerate(parts):
        if number % 4 == 0:
            naive.zero_grad()
        (LOSS(naive, part) / 4).backward()
    assert off(gradient(naive), gradient(right)) == pytest.approx(0.75, abs=1e-4)

    stepper = sgd(ours, lr=0.0)
    samples = [stepper.step(window).samples for window in ft.windows(parts, 4)]
    assert samples == [32, 8]  # nor is it dropped
    assert off(gradient(ours), gradient(right)) < 1e-5


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes found in the traps 10 and 20."""
    folder = tmp_path_factory.mktemp("processes")
    python(traps_worker.__file__, folder, "averaging", "unfreezing")
    return torch.load(folder / "rank0.pt")


@needs_gloo
def test_10_two_processes_have_the_gradient_of_one(processes):
    found = processes["averaging"]
    assert found["mean of means"] > 1  # of 30 and 2 tokens
    assert found["sum over the total"] == pytest.approx(0.5)  # as DDP divides by the two processes
    assert found["ours"] < 1e-6
    assert found["samples"] == 32


# What trains --------------------------------------------------------------------------------------------------


def test_11_parameters_are_told_apart_by_identity():
    def norms():
        return nn.Sequential(*(nn.LayerNorm(4) for _ in range(4)))

    def trained(model, optimizer):
        before = [p.detach().clone() for p in model.parameters()]
        (model(batch(8)[0]) - 1).square().sum().backward()
        optimizer.step()
        return sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    naive = norms()
    optimizer = torch.optim.SGD(naive[2:].parameters(), lr=0.1)
    held = optimizer.param_groups[0]["params"]
    optimizer.add_param_group({"params": [p for p in naive[:2].parameters() if not any(map(p.equal, held))]})
    assert trained(naive, optimizer) == 4  # of 8: fresh norms are equal
    with pytest.raises(ValueError, match=r"it lacks 4, such as '0.weight'"):
        ft.check_optimizer(naive, optimizer)

    ours = norms()
    optimizer = adamw(ours)
    ft.enter_phase(ours, optimizer, ft.Phase(("2", "3"), 1))
    ft.enter_phase(ours, optimizer, ft.Phase(("all",), 1))
    assert trained(ours, optimizer) == 8


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda optimizer: LambdaLR(optimizer, lambda step: 1.0), ValueError, "shorter"),
        (lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=10), KeyError, "initial_lr"),
    ],
)
def test_12_groups_are_made_before_the_schedule(make, error, message):
    model = layered()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    schedule = make(optimizer)
    optimizer.step()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(error, match=message):
        schedule.step()

    optimizer = adamw(model)
    for name in ft.SCHEDULES:
        for pattern in ("1", "all"):
            ft.enter_phase(model, optimizer, ft.Phase((pattern,), 1))
            stepper = ft.Stepper(model, optimizer, LOSS)
            stepper.schedule = ft.make_schedule(name, optimizer, 4)
            before = flat(model[0].parameters())
            for _ in range(2):
                stepper.step([batch(8)])
            assert torch.equal(before, flat(model[0].parameters())) == (pattern == "1")
        assert len(optimizer.param_groups) == 4  # two depths, with decay and without


def test_13_frozen_weights_do_not_drift():
    def drift(freeze):
        model = seeded(*[lambda: nn.Linear(4, 4, bias=False)] * 2)
        optimizer = adamw(model, lr=0.01)
        ft.enter_phase(model, optimizer, ft.Phase(("all",), 1))
        for number in range(10):
            if number == 5:
                freeze(model, optimizer)
                before = model[0].weight.detach().clone()
            optimizer.zero_grad(set_to_none=False)
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.ones_like(p)
            optimizer.step()
        return float((model[0].weight - before).abs().max().detach()), model, optimizer

    moved, model, optimizer = drift(lambda model, _: model[0].requires_grad_(False))
    assert moved == pytest.approx(0.034, abs=5e-4)
    with pytest.raises(ValueError, match="1 frozen parameters have gradients"):
        ft.check_optimizer(model, optimizer)

    moved, model, optimizer = drift(lambda *both: ft.enter_phase(*both, ft.Phase(("1",), 1)))
    assert moved == 0
    ft.check_optimizer(model, optimizer)


def test_14_norms_biases_and_frozen_weights_do_not_decay():
    def decayed(optimizer_of):
        model = seeded(*[lambda: nn.Linear(4, 4)] * 2, lambda: nn.LayerNorm(4), lambda: nn.Linear(4, 3))
        optimizer = optimizer_of(model)
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    def naive(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        model(batch(4)[0]).sum().backward()
        model[0].requires_grad_(False)
        optimizer.zero_grad(set_to_none=False)
        return optimizer

    def ours(model):
        optimizer = adamw(model, weight_decay=0.1)
        model(batch(4)[0]).sum().backward()
        ft.enter_phase(model, optimizer, ft.Phase(("1", "2", "3"), 1))
        return optimizer

    weights = {"1.weight", "3.weight"}
    assert decayed(naive) == weights | {"0.weight", "0.bias", "1.bias", "2.weight", "3.bias"}
    assert decayed(ours) == weights


# Adapters -----------------------------------------------------------------------------------------------------


def convolutions():
    return seeded(
        lambda: nn.Conv2d(3, 8, 3), lambda: nn.BatchNorm2d(8), nn.ReLU, lambda: nn.Conv2d(8, 8, 3),
        lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(8, 3),
    )  # fmt: skip


IMAGES = 5 + 3 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def learn(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(10):
        model.train()
        optimizer.zero_grad()
        LOSS(model, (IMAGES, torch.arange(8) % 3)).backward()
        optimizer.step()
    return model.eval()


def test_15_a_fresh_head_is_saved_with_the_adapter(tmp_path):
    naive = peft.get_peft_model(convolutions(), peft.LoraConfig(target_modules=["0", "3"]))
    naive.get_base_model()[6].requires_grad_(True)  # the head, which modules_to_save lacks
    learn(naive).save_pretrained(tmp_path / "naive")
    again = peft.PeftModel.from_pretrained(convolutions(), tmp_path / "naive")
    assert torch.equal(again.get_base_model()[6].weight, convolutions()[6].weight)  # all forgotten
    with pytest.raises(ft.InputError, match=r"2 trainable parameters, such as '.*6.weight', .* would be lost"):
        ft.save_adapter(naive, tmp_path / "refused")

    ours = learn(ft.add_adapter(convolutions(), ft.Adapter(), head="6"))
    ft.save_adapter(ours, tmp_path / "ours")
    again = ft.load_adapter(convolutions(), tmp_path / "ours")
    assert torch.equal(again(IMAGES), ours(IMAGES))


def test_16_the_statistics_of_batch_norms_are_saved_with_the_adapter(tmp_path):
    ours = learn(ft.add_adapter(convolutions(), ft.Adapter(), head="6"))
    ours.save_pretrained(tmp_path / "naive")
    naive = peft.PeftModel.from_pretrained(convolutions(), tmp_path / "naive").eval()
    assert torch.equal(naive.get_base_model()[1].running_mean, torch.zeros(8))
    assert off(naive(IMAGES), ours(IMAGES)) > 0.1
    ft.save_adapter(ours, tmp_path / "ours")
    again = ft.load_adapter(convolutions(), tmp_path / "ours")
    assert torch.equal(again(IMAGES), ours(IMAGES))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=99, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft's way
def test_17_tied_embeddings_stay_tied_and_merge(tmp_path):
    tokens = torch.arange(3, 19).view(2, 8)

    def logits(model):
        return model(input_ids=tokens).logits

    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        naive = peft.get_peft_model(gpt2(), config).eval()
    expected = logits(naive)  # the output's weight with an update, the embedding's without
    with pytest.warns(UserWarning, match="tied_target_modules"):
        merged = naive.merge_and_unload()
    assert off(logits(merged), expected) > 0.1  # both with it

    with pytest.raises(ft.InputError, match=r"'lm_head' cannot be adapted, as .* are one tensor"):
        ft.add_adapter(gpt2(), ft.Adapter(targets=("lm_head",)))
    ours = ft.add_adapter(gpt2(), ft.Adapter())
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    ft.export(ours, tmp_path / "model")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    assert again.lm_head.weight is again.transformer.wte.weight
    assert off(logits(again), logits(ours)) < 1e-4 < off(logits(gpt2()), logits(ours))


def test_18_weights_that_train_are_not_in_half_precision():
    naive = layered().half()
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(naive.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        scaler.scale(LOSS(naive, batch(8))).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)

    with pytest.raises(ValueError, match=r"float32 weights under fp16, got float16 in '0\.0\.weight'"):
        sgd(naive, amp="fp16")  # before a step was computed
    ours = ft.add_adapter(layered().half(), ft.Adapter(targets=("0.0",)))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert not sgd(ours, amp="fp16").step([batch(8)]).skipped


# Around the model ---------------------------------------------------------------------------------------------


def test_19_what_saves_memory_keeps_the_gradients_behind_frozen_inputs():
    def gradients(reentrant=None, **options):
        model = seeded(
            lambda: nn.Linear(4, 8).requires_grad_(False), lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()),
            lambda: nn.Linear(8, 3),
        )  # fmt: skip
        body = model[1].forward
        if reentrant is not None:
            model[1].forward = lambda x: checkpoint(body, x, use_reentrant=reentrant)
        sgd(model, **options).step([batch(16)])
        return [p.grad for p in model[1].parameters()] + [p.grad for p in model[2].parameters()]

    plain = gradients()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        naive = gradients(reentrant=True)
    assert [g is None for g in naive] == [True, True, False, False]
    for ours in (gradients(lean=True), gradients(reentrant=False)):
        assert all(map(torch.equal, ours, plain))


@needs_gloo
def test_20_processes_are_told_what_trains(processes):
    found = processes["unfreezing"]
    assert found["naive, processes"] > 0.1  # each learned by itself what was unfrozen after wrapping
    assert found["naive"] > 0.1
    assert found["ours, processes"] == 0
    assert found["ours"] < 1e-12
    assert "Expected to have finished reduction" in found["frozen after wrapping"]


def moved(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def with_new_head(model):
    model[1] = nn.Linear(4, 2)
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(("change", "stale"), [(moved, 4), (with_new_head, 2)])
def test_21_an_optimizer_of_stale_parameters_is_noticed(change, stale):
    model = layered()
    optimizer = adamw(model)
    model = change(model)
    before = flat(model.parameters())
    model(batch(8)[0].to(model[1].weight.dtype)).square().sum().backward()
    optimizer.step()
    assert torch.equal(before, flat(model.parameters()))  # it learns nothing, and nobody is told

    with pytest.raises(ValueError, match=r"optimizer: "):
        ft.check_optimizer(model, optimizer)
    for p in model.parameters():
        p.grad = None
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad]})
    with pytest.raises(ValueError, match=f"{stale} of its .* parameters are not the model's"):
        ft.check_optimizer(model, optimizer)


# Resuming -----------------------------------------------------------------------------------------------------


def data():
    return TensorDataset(*batch(24, classes=2))


def make(folder, *, epochs=4, loss=LOSS, amp="off", **options):
    """A run of six windows an epoch, as its recipe makes it anew in each life."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    stepper = ft.Stepper(model, adamw(model, lr=0.05), loss, amp=amp)
    return ft.Run(
        folder, stepper, [ft.Phase(("all",), epochs)],
        lambda epoch: ft.make_loader(data(), 2, seed=(0, epoch)), **{"accumulate": 2, **options},
    )  # fmt: skip


def live(run, each=lambda run: None, losses=None):
    """Go on to the end, or until it is stopped; return what ``each`` makes of the run after each step."""
    seen = []
    try:
        for _ in run.phases():
            for epoch in run.epochs():
                for window in run.windows():
                    seen.append(None)
                    try:
                        run.step(window)
                    finally:
                        seen[-1] = each(run)
                run.validate(losses[epoch] if losses else 1.0 / (1 + epoch))
        run.load_best()
    except ft.Stopped:
        pass
    return seen


def test_22_a_resumed_epoch_does_not_replay_the_first(tmp_path):
    def naive_life(epochs):
        torch.manual_seed(0)  # as at the top of the script
        return [torch.randperm(24).tolist() + nn.Dropout()(torch.ones(24)).tolist() for _ in epochs]

    whole = naive_life(range(4))
    first, second = naive_life(range(2)), naive_life(range(2, 4))
    assert second == first != whole[2:]

    def each(run):
        return run.stepper.optimizer.state[run.model[0].weight]["exp_avg"].tolist()  # of all that was drawn

    whole = live(make(tmp_path / "whole"), each)
    first = live(make(tmp_path / "two", interrupt=StopAfter(14)), each)
    second = live(make(tmp_path / "two"), each)
    assert len(first) < len(whole) == 24
    assert first + second == whole


class Noisy(Dataset):
    """Numbers drawn from a generator of its own, or from NumPy's."""

    def __init__(self, own):
        self.random = np.random.RandomState(0) if own else np.random

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return float(self.random.rand()), index


def drawn(loader):
    return [number for numbers, _ in loader for number in numbers.tolist()]


def test_23_workers_do_not_draw_the_same_numbers():
    copied = DataLoader(Noisy(own=True), 2, num_workers=2)
    assert [len(set(drawn(copied))), drawn(copied)] == [4, drawn(copied)]  # of 8, and in each epoch again
    seeded_alike = DataLoader(Noisy(own=False), 2, num_workers=2, worker_init_fn=lambda _: np.random.seed(0))
    assert len(set(drawn(seeded_alike))) == 4

    ours = ft.Augmented(Noisy(own=False))
    epochs = [drawn(ft.make_loader(ours, 2, seed=(0, epoch), workers=2)) for epoch in (0, 1)]
    assert len({*epochs[0], *epochs[1]}) == 16
    assert drawn(ft.make_loader(ours, 2, seed=(0, 0))) == epochs[0]  # with no worker at all


LOSSES = [1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]


def test_24_patience_goes_on_waiting(tmp_path):
    epochs = 0
    for begin in range(0, 8, 2):  # lives of two epochs
        stopper = ft.EarlyStopping(3)
        for loss in LOSSES[begin : begin + 2]:
            stopper.update(loss)
            epochs += 1
        assert not stopper.exhausted
    assert epochs == 8  # patience of 3 never ran out

    trained = 0
    for _ in range(8):
        trained += bool(live(make(tmp_path, epochs=8, patience=3, interrupt=StopAfter(13)), losses=LOSSES))
    run = make(tmp_path, epochs=8, patience=3)
    assert 1 < trained < 8
    assert [epoch["loss"] for epoch in run.history] == LOSSES[:5]
    assert run.stopper.reason() == "no gain for 3 epochs, best at epoch 2 of 5"


def test_25_rates_go_on_falling(tmp_path):
    def naive_life(state=None):
        optimizer = torch.optim.AdamW(layered().parameters(), lr=0.05)
        if state:
            optimizer.load_state_dict(state)
        schedule = ft.make_schedule("cosine", optimizer, 24, warmup=0.0)
        rates = []
        for _ in range(12):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return rates, optimizer.state_dict()

    first, state = naive_life()
    assert naive_life(state)[0] == first

    def rate(run):
        return run.optimizer.param_groups[0]["lr"], run.model[
            0
        ].weight.tolist()  # and what the step did at its own

    whole = live(make(tmp_path / "whole"), rate)
    rates = live(make(tmp_path / "two", interrupt=StopAfter(14)), rate)
    assert rates + live(make(tmp_path / "two"), rate) == whole
    falling = [lr for lr, _ in whole][3:]
    assert falling == sorted(set(falling), reverse=True)


def test_26_what_torch_compile_saved_is_loaded(tmp_path):
    trained, naive, ours = layered(), layered(), layered()
    before = flat(naive.parameters())
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(1)
    torch.save(torch.compile(trained).state_dict(), tmp_path / "compiled.pt")
    state = torch.load(tmp_path / "compiled.pt")
    assert all(name.startswith("_orig_mod.") for name in state)
    naive.load_state_dict(state, strict=False)
    assert torch.equal(flat(naive.parameters()), before)  # nothing was loaded

    assert ft.load_weights(ours, tmp_path / "compiled.pt") == []
    assert torch.equal(flat(ours.parameters()), flat(trained.parameters()))


def test_27_the_logged_loss_does_not_depend_on_accumulation(tmp_path):
    parts = [batch(n, seed) for seed, n in enumerate((8, 8, 8, 4))]
    right = LOSS(layered(), tuple(map(torch.cat, zip(*parts, strict=True)))).item()
    model = layered()
    naive = [(LOSS(model, part) / 4).item() for part in parts]
    assert sum(naive) / 4 == pytest.approx(right / 4, rel=0.1)
    assert sgd(layered()).step(parts).loss == pytest.approx(right, rel=1e-5)

    losses = []
    for accumulate in (1, 4):
        run = make(tmp_path / str(accumulate), epochs=1, accumulate=accumulate)
        run.model[1].p = 0.0
        for group in run.optimizer.param_groups:
            group["base_lr"] = 0.0
        live(run)
        losses.append(run.history[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_28_a_finished_run_is_not_run_again(tmp_path):
    def naive_life(saved, stop, ahead):
        """Epochs of six steps; saved is the epoch, and training goes on with it, or the one after it."""
        steps = 0
        for epoch in range(saved + ahead if saved is not None else 0, 4):
            saved = epoch
            for _ in range(6):
                steps += 1
                if steps == stop:
                    return steps, saved
        return steps, saved

    def naive_lives(ahead):
        first, saved = naive_life(None, 14, ahead)  # stopped within the third epoch
        second, saved = naive_life(saved, None, ahead)
        third, _ = naive_life(saved, None, ahead)  # and called once more
        return first, second, third

    assert naive_lives(ahead=0) == (14, 12, 6)  # of 24 steps, 8 are repeated
    assert naive_lives(ahead=1) == (14, 6, 0)  # and 4 skipped

    lives = [live(make(tmp_path, interrupt=StopAfter(14)), lambda run: run.taken)]
    lives += [live(run := make(tmp_path), lambda run: run.taken) for _ in range(2)]
    assert [len(lived) > 0 for lived in lives] == [True, True, False]
    assert [taken for lived in lives for taken in lived] == list(range(1, 25))
    assert len(run.history) == 4
