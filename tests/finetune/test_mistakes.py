import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from bptools.finetune.evaluation import Evaluation
from bptools.finetune.mistakes import mistakes_figure


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_surest_mistakes_come_first_as_they_look(channels):
    images = torch.linspace(-3, 5, 4).reshape(4, 1, 1, 1) * torch.rand(4, channels, 8, 8)
    test = Evaluation(1.0, 25.0, [0, 1, 1, 0], [1, 1, 0, 1], [0.6, 0.99, 0.97, 0.8])
    figure = mistakes_figure(TensorDataset(images, torch.tensor(test.targets)), test, ("a", "b"), most=2)
    assert titles(figure) == ["b → a  97 %", "a → b  80 %"]
    assert "the 2 surest of 3, in 4 images" in figure.get_suptitle()
    for axes, i in zip(figure.axes, (2, 3), strict=True):
        shown = np.asarray(axes.images[0].get_array())
        assert (shown.min(), shown.max()) == (0, 1)
        image = images[i].movedim(0, -1) if channels == 3 else images[i, 0]
        np.testing.assert_allclose(shown, (image - image.min()) / (image.max() - image.min()), atol=1e-6)


def test_flat_images_and_long_names(tmp_path):
    test = Evaluation(1.0, 0.0, [0, 1, 0], [1, 0, 1], [0.5, 0.6, 0.7])
    classes = ("a name as long as a sentence", "another name as long as that")
    figure = mistakes_figure(TensorDataset(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, 0])), test, classes)
    assert titles(figure)[0] == "a name …entence →\nanother…as that  70 %"
    figure.savefig(tmp_path / "f.png")


def test_no_mistakes():
    test = Evaluation(0.1, 100.0, [0, 1], [0, 1], [0.9, 0.9])
    figure = mistakes_figure(TensorDataset(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])), test, ("a", "b"))
    assert [text.get_text() for text in figure.texts] == ["no mistakes in 2 images"]
