import pytest

from bptools.finetune import EarlyStopping


def test_stops_and_says_why():
    stopper = EarlyStopping(2)
    assert [stopper.update(v) for v in (1.0, 0.5, 0.6)] == [True, True, False]
    assert not stopper.exhausted
    stopper.update(0.5)  # a tie is no gain
    assert stopper.exhausted
    assert stopper.reason() == "no gain for 2 epochs, best at epoch 2 of 4"


def test_reason_when_all_epochs_ran():
    stopper = EarlyStopping(5)
    for value in (3.0, 2.0, 1.0):
        stopper.update(value)
    assert stopper.reason() == "all 3 epochs ran, best at epoch 3"


def test_zero_patience_never_stops():
    stopper = EarlyStopping(0)
    for value in range(9):
        stopper.update(value)
    assert not stopper.exhausted


def test_larger_is_better_and_min_delta():
    stopper = EarlyStopping(1, larger_is_better=True, min_delta=0.1)
    assert [stopper.update(v) for v in (0.5, 0.55, 0.7)] == [True, False, True]


def test_a_phase_has_its_own_patience_but_not_its_own_best():
    stopper = EarlyStopping(1)
    stopper.update(1.0)
    stopper.update(2.0)
    assert stopper.exhausted
    stopper.start_phase()
    assert not stopper.exhausted
    assert not stopper.update(1.5)


def test_patience_survives_a_resume():
    stopper = EarlyStopping(3)
    for value in (1.0, 2.0, 2.0):
        stopper.update(value)
    resumed = EarlyStopping(3)
    resumed.load_state_dict(stopper.state_dict())
    assert not resumed.exhausted
    assert not resumed.update(1.5)
    assert resumed.exhausted
    assert resumed.reason() == "no gain for 3 epochs, best at epoch 1 of 4"


def test_error():
    with pytest.raises(ValueError, match=r"patience: .* got -1"):
        EarlyStopping(-1)
