"""What torch.nn.utils has for modules, on bptools' ops."""

from bptools.nn.utils import parametrizations

__all__ = ["parametrizations"]
