"""What a run shows while it trains: a progress bar and TensorBoard."""

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .card import confusion_figure
from .evaluation import Evaluation
from .stepper import StepResult


class Monitor:
    """Progress bar and TensorBoard of one run.

    Args:
        folder: Where TensorBoard's files go.
        title: Name of the run, shown before the bar.
        samples: Samples in the whole run, for the bar.
        bar: Whether to show the bar.
        state: What :meth:`state_dict` returned, on a resumed run.
    """

    def __init__(self, folder: Path, title: str, samples: int, *, bar: bool, state: dict | None = None):
        state = state or {"step": 0, "seen": 0, "results": []}
        step, seen = state["step"], state["seen"]
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self.bar = tqdm(
            total=samples, initial=seen, desc=title, unit="img", unit_scale=True, leave=False, disable=not bar
        )
        self.taken, self.seen, self.results = step, seen, [StepResult(*r) for r in state["results"]]

    def state_dict(self) -> dict:
        """Return the steps and samples so far, and the results of the epoch that has begun."""
        return {"step": self.taken, "seen": self.seen, "results": [astuple(r) for r in self.results]}

    def step(self, result: StepResult, groups: Sequence[dict]) -> None:
        """Show one optimizer step: loss now and averaged over the epoch, and the largest rate."""
        self.taken += 1
        self.seen += result.samples
        self.results.append(result)
        self.writer.add_scalar("train/loss", result.loss, self.taken)
        self.writer.add_scalar("train/gradient norm", result.norm, self.taken)
        lr = max(group["lr"] for group in groups)
        self.bar.set_postfix_str(f"loss {result.loss:.3f} ({self.mean_loss():.3f}) lr {lr:.1e}", refresh=False)
        self.bar.update(result.samples)

    def mean_loss(self) -> float:
        """Return the mean loss over the samples of this epoch so far."""
        return sum(r.loss * r.samples for r in self.results) / max(1, sum(r.samples for r in self.results))

    def epoch(self, groups: Sequence[dict], **scalars: float) -> None:
        """Log the end of an epoch: ``scalars``, the rate of each depth, the shares clipped and skipped."""
        steps = max(1, len(self.results))
        scalars["train/share clipped"] = sum(r.clipped for r in self.results) / steps
        scalars["train/share skipped"] = sum(r.skipped for r in self.results) / steps
        for group in groups:
            scalars[f"lr/depth {group['depth']:02d}"] = group["lr"]
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.taken)
        self.results = []

    def finish(self, settings: dict, test: Evaluation, classes: Sequence[str]) -> None:
        """Log the settings, what the test came to and its confusion matrix; then close."""
        self.writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```")
        figure = confusion_figure(test.targets, test.predictions, classes)
        self.writer.add_figure("test/confusion matrix", figure, self.taken)
        plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in settings.items()}
        metrics = {"test/accuracy": test.accuracy, "test/loss": test.loss}
        self.writer.add_hparams(plain, metrics, run_name=".", global_step=self.taken)
        self.close()

    def close(self) -> None:
        """Close the bar and flush TensorBoard's files."""
        self.bar.close()
        self.writer.close()
