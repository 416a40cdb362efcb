"""Early stopping that says why it stopped."""


class EarlyStopping:
    """Stop a phase when its metric has not improved for ``patience`` epochs.

    Args:
        patience: Epochs without improvement before :attr:`exhausted`; 0 never stops.
        larger_is_better: Whether the metric is to grow (accuracy) or to fall (loss).
        min_delta: Smallest change that counts as an improvement.

    Attributes:
        best: Best value so far over all phases, or ``None``.
        best_epoch: Epoch of the best value, counted from 1 over all phases.
        epoch: Epochs seen.
        waited: Epochs since the last improvement, within the phase.
    """

    def __init__(self, patience: int, *, larger_is_better: bool = False, min_delta: float = 0.0):
        if patience < 0:
            raise ValueError(f"patience: expected 0 or more epochs, got {patience}")
        self.patience, self.larger_is_better, self.min_delta = patience, larger_is_better, min_delta
        self.best: float | None = None
        self.best_epoch = self.epoch = self.waited = 0

    def update(self, value: float) -> bool:
        """Count one epoch with the metric at ``value`` and return whether it is the best so far."""
        self.epoch += 1
        gain = 0.0 if self.best is None else value - self.best if self.larger_is_better else self.best - value
        if self.best is None or gain > self.min_delta:
            self.best, self.best_epoch, self.waited = value, self.epoch, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the patience of this phase has run out."""
        return 0 < self.patience <= self.waited

    def start_phase(self) -> None:
        """Give the next phase its full patience; the best value is kept."""
        self.waited = 0

    def reason(self) -> str:
        """Return why training ended, in words."""
        best = f"best at epoch {self.best_epoch}"
        if self.exhausted:
            return f"no gain for {self.waited} epochs, {best} of {self.epoch}"
        return f"all {self.epoch} epochs ran, {best}"

    def state_dict(self) -> dict:
        """Return the progress; the settings are not part of it."""
        return {k: getattr(self, k) for k in ("best", "best_epoch", "epoch", "waited")}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        for key in self.state_dict():
            setattr(self, key, state[key])
