import torch
from torch.utils.data import TensorDataset

from bptools.finetune.mistakes import mistakes_figure

CLASSES = ["a", "b", "c"]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def draw(figure):
    figure.savefig("/dev/null", format="png")
    return figure


def test_the_most_confident_mistakes_come_first():
    data = TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    sure = [0.99, 0.6, 0.9, 0.7]
    figure = draw(mistakes_figure(data, [0, 1, 2, 0], [0, 2, 1, 1], CLASSES, confidences=sure, most=2))
    assert texts(figure) == ["c → b (0.90)", "a → b (0.70)"]
    assert "3 of 4 images wrong, 2 shown" in figure._suptitle.get_text()


def test_colours_are_those_of_the_image():
    image = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1).expand(3, 4, 4)
    mean, std = [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]
    normal = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    data = TensorDataset(normal[None], torch.tensor([0]))
    figure = draw(mistakes_figure(data, [0], [1], CLASSES, mean=mean, std=std))
    drawn = torch.tensor(figure.axes[0].images[0].get_array())
    assert torch.allclose(drawn, image.permute(1, 2, 0), atol=1e-6)
    assert texts(figure) == ["a → b"]


def test_no_mistakes_are_said():
    data = TensorDataset(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    figure = draw(mistakes_figure(data, [0, 1], [0, 1], CLASSES))
    assert figure.texts[0].get_text() == "no mistakes in 2 images"
