"""A bar on a terminal that follows a schedule's steps."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """Moves up to ``last`` steps, with tqdm where that is installed; nothing happens where stderr is no terminal."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._bar: Any = None
        self._asked: tuple[Any, bool] = (None, False)  # a stream, and whether it is a terminal

    @property
    def visible(self) -> bool:
        if self._asked[0] is not sys.stderr:  # every step asks, and the answer is a system call
            self._asked = (sys.stderr, sys.stderr.isatty())
        return self._asked[1]

    def show(self, step: int, zeros: float) -> None:
        """Move to ``step``, with the share of zeros beside it."""
        if not self.visible or step > self._last:
            return
        if self._bar is None:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=self._last, desc="pruning", leave=False, initial=step - 1)
        self._bar.update()
        self._bar.set_postfix_str(f"{zeros:.1%} zeros", refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
