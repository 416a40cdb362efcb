"""transformers' own progress bars and reports of what it loaded, switched off where we say it ourselves."""

import logging as standard
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers print nothing but errors within the block."""
    from transformers.utils import logging

    hub = standard.getLogger("huggingface_hub")
    level, verbosity, bars = hub.level, logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.setLevel(standard.ERROR)  # it tells of each new try
    logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
