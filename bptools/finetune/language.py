"""Recurrent language models: text in parallel streams, a state that is carried, and what n-grams come to.

A text of N tokens is cut into n streams of N/n tokens, side by side. A batch is the next chunk of each, so the
state after it is where the next batch goes on: gradients end at the chunk's border, memory does not (truncated
backpropagation through time). The state is a buffer of the model: checkpoints hold it, and a run that was killed
goes on with it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

import bptools.nn

from .batches import Batch, LossFn
from .errors import InputError

CELLS = {"lstm": bptools.nn.LSTM, "gru": bptools.nn.GRU, "rnn": bptools.nn.RNN}
State = Tensor  # (parts, layers, streams, width); an LSTM's has two parts, h and c, others have h


def read_text(path: str | Path) -> str:
    """Return the text of a file, or of all ``.txt`` and ``.md`` files in a folder, in the order of their names.

    Raises:
        InputError: If there is none, or it is not UTF-8.
    """
    path = Path(path)
    files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"--data {path}: expected .txt or .md files, found none")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"--data {file}: expected UTF-8, got other bytes") from error
        except OSError as error:
            raise InputError(f"--data {file}: {error.strerror}") from error
    return "\n".join(texts)


class Streams(Dataset):
    """A text as chunks of parallel streams: sample ``k * streams + row`` is chunk ``k`` of stream ``row``.

    Batches of ``streams`` samples in order, which several processes may share, are the chunks one after the other.
    What is left over at the end of the text is dropped.

    Args:
        ids: The text, in tokens ``(N,)``.
        streams: How many.
        chunk: Tokens in a chunk; gradients reach back so far.

    Raises:
        InputError: If the text is too short for a chunk of each stream.
    """

    def __init__(self, ids: Tensor, streams: int, chunk: int):
        length = (len(ids) - 1) // streams
        if length < chunk:
            wanted = streams * chunk + 1
            raise InputError(f"--data: expected {wanted} tokens or more, for {streams} streams, got {len(ids)}")
        self.inputs = ids[: streams * length].view(streams, length)
        self.targets = ids[1 : streams * length + 1].view(streams, length)
        self.streams, self.chunk = streams, chunk

    def __len__(self) -> int:
        return self.streams * (self.inputs.shape[1] // self.chunk)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        k, row = divmod(index, self.streams)
        place = slice(k * self.chunk, (k + 1) * self.chunk)
        found = {"ids": self.inputs[row, place], "labels": self.targets[row, place]}
        return {**found, "row": torch.tensor(row), "first": torch.tensor(k == 0)}


class RecurrentLanguageModel(nn.Module):
    """Embedding, recurrent layers, and a linear head with its loss in one op, which never holds the logits.

    Args:
        tokens: How many there are.
        width: Of embedding and hidden state.
        layers: Recurrent ones.
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"`` (tanh).
        streams: How many states are carried; see :class:`Streams`.
        dropout: Between layers.
        checkpoint_every: As of `bptools.nn.LSTM`: keep every so many states only, and make the others again.
    """

    state: Tensor

    def __init__(
        self,
        tokens: int,
        width: int = 128,
        layers: int = 1,
        cell: str = "lstm",
        *,
        streams: int = 1,
        dropout: float = 0.0,
        checkpoint_every: int | str | None = None,
    ):
        super().__init__()
        self.embedding = bptools.nn.Embedding(tokens, width)
        inner = dropout if layers > 1 else 0.0
        self.recurrent = CELLS[cell](width, width, layers, batch_first=True, dropout=inner)
        self.recurrent.checkpoint_every = checkpoint_every
        self.dropout = bptools.nn.Dropout(dropout)
        self.head = bptools.nn.Linear(width, tokens)
        self.parts = 2 if cell == "lstm" else 1
        self.register_buffer("state", torch.zeros(self.parts, layers, streams, width))

    def hidden(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Return hidden states (n, t, width) over tokens (n, t), and the state after them."""
        first = tuple(state) if self.parts == 2 else state[0]
        y, last = self.recurrent(self.embedding(ids), first)
        return self.dropout(y), torch.stack(last) if self.parts == 2 else last[None]

    def forward(self, ids: Tensor, labels: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the mean cross-entropy per token, in nats, and the state after them, without its history."""
        y, last = self.hidden(ids, state)
        loss = bptools.functional.linear_cross_entropy(
            y.flatten(0, 1), self.head.weight, labels.flatten(), linear_bias=self.head.bias
        )
        return loss, last.detach()

    def next_logits(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits (n, tokens) of what comes after ``ids`` (n, t), and the state after them."""
        y, last = self.hidden(ids, state)
        return self.head(y[:, -1]), last

    def carried(self, batch: Batch) -> State:
        """Return the state in which the streams of ``batch`` are; zero where the text begins."""
        state = self.state[:, :, batch["row"]]
        return state.masked_fill(batch["first"].view(1, 1, -1, 1), 0.0)


def carried_loss(model: RecurrentLanguageModel, carry: bool = True) -> LossFn:
    """Return the loss for a :class:`Stepper`; in training it moves the model's state on.

    Args:
        model: Holds the state.
        carry: Whether chunks go on from the state of the last; otherwise each begins at zero.
    """

    def loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        before = model.carried(batch)
        value, after = module(batch["ids"], batch["labels"], before if carry else torch.zeros_like(before))
        if model.training:  # what only looks leaves it
            _move_on(model.state, batch["row"], after.to(model.state.dtype))
        return value

    return loss


@torch.no_grad()
def _move_on(state: State, rows: Tensor, after: State) -> None:
    """Write the states of ``rows``; all processes then have the states of all."""
    if dist.is_initialized():
        theirs, mine = torch.zeros_like(state), torch.zeros(state.shape[2], device=state.device)
        theirs[:, :, rows], mine[rows] = after, 1.0
        dist.all_reduce(theirs)
        dist.all_reduce(mine)
        state.copy_(torch.where(mine.view(1, 1, -1, 1) > 0, theirs, state))
    else:
        state[:, :, rows] = after


def perplexity(loss: float) -> float:
    """Return the perplexity of a loss in nats; that of a loss beyond all bounds stays finite."""
    return math.exp(min(loss, 700.0))


@torch.inference_mode()
def text_loss(
    model: RecurrentLanguageModel, ids: Tensor, *, chunk: int, carry: bool = True, streams: int = 16
) -> float:
    """Return the mean cross-entropy per token of a text, in nats; the model's own state is left alone.

    Args:
        model: It stays in evaluation mode.
        ids: The text ``(N,)``.
        chunk: Tokens after which the state begins at zero, where it is not carried.
        carry: As for :func:`carried_loss`.
        streams: The text is cut in so many, which are read side by side.
    """
    model.eval()
    device = model.head.weight.device
    streams = max(1, min(streams, (len(ids) - 1) // chunk))
    length = (len(ids) - 1) // streams
    inputs = ids[: streams * length].view(streams, length).to(device)
    targets = ids[1 : streams * length + 1].view(streams, length).to(device)
    zero = model.state.new_zeros(*model.state.shape[:2], streams, model.state.shape[3])
    total, state = 0.0, zero
    for x, y in zip(inputs.split(chunk, 1), targets.split(chunk, 1), strict=True):
        loss, state = model(x, y, state if carry else zero)
        total += loss.item() * y.numel()
    return total / targets.numel()


@torch.inference_mode()
def continue_text(
    model: RecurrentLanguageModel, ids: Tensor, count: int, *, temperature: float = 0.8, seed: int = 0
) -> list[int]:
    """Return ``count`` tokens, drawn to follow ``ids`` (t,); at a low temperature the likely ones."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    device = model.head.weight.device
    state = model.state.new_zeros(*model.state.shape[:2], 1, model.state.shape[3])
    drawn, ids = [], ids[None].to(device)
    for _ in range(count):
        logits, state = model.next_logits(ids, state)
        shares = (logits[0].float().cpu() / temperature).softmax(0)
        drawn.append(int(torch.multinomial(shares, 1, generator=generator)))
        ids = torch.tensor([[drawn[-1]]], device=device)
    return drawn


class NGrams:
    """Interpolated Kneser-Ney n-grams: the strongest simple language model, and so the one to beat.

    Args:
        ids: The training text, in tokens.
        order: Tokens in the longest runs that are counted.
        tokens: How many tokens there are.
        discount: What each count gives away to shorter runs.

    Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1998, eq. 26.
    """

    def __init__(self, ids: Sequence[int], order: int, tokens: int, discount: float = 0.75):
        if order < 1:
            raise ValueError(f"order: expected at least 1, got {order}")
        self.order, self.tokens, self.discount = order, tokens, discount
        runs = Counter(zip(*(ids[i:] for i in range(order)), strict=False))
        self.levels = []
        for _ in range(order, 0, -1):
            totals, kinds = Counter(), Counter()
            for run, count in runs.items():
                totals[run[:-1]] += count
                kinds[run[:-1]] += 1
            self.levels.append((runs, totals, kinds))
            runs = Counter(run[1:] for run in runs)  # how many tokens stand before it

    def probability(self, context: tuple[int, ...], token: int) -> float:
        """Return the probability of ``token`` after ``context``, of which the last ``order - 1`` are looked at."""
        value = 1.0 / self.tokens
        for n, (runs, totals, kinds) in zip(range(1, self.order + 1), reversed(self.levels), strict=True):
            before = context[len(context) - n + 1 :]
            total = totals.get(before)
            if total is None or len(before) < n - 1:
                break
            kept = max(runs.get((*before, token), 0) - self.discount, 0.0)
            value = (kept + self.discount * kinds[before] * value) / total
        return value

    def loss(self, ids: Sequence[int]) -> float:
        """Return the mean of -log p over the tokens of a text but the first, in nats."""
        places = range(1, len(ids))
        found = (self.probability(tuple(ids[max(0, i - self.order + 1) : i]), ids[i]) for i in places)
        return -sum(map(math.log, found)) / len(places)
