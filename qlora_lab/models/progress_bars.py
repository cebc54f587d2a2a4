"""transformers' progress bars: welcome in a terminal, noise in the log of a job."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def bars_in_terminals_only() -> Iterator[None]:
    """Show no progress bars inside unless somebody watches; whether they are shown afterwards stays as it was."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
