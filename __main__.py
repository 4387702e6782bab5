"""The ``doratune`` command, and ``python -m doratune``: the command line with a watch on Ctrl-C.

Light, since each worker that a command starts imports the main module too.
"""

from __future__ import annotations

import contextlib
import sys
from typing import NoReturn

from .terminal import interrupts


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    interrupts.watch()
    code: str | int | None = 0
    try:
        from .cli import main as command

        command()
    except KeyboardInterrupt:
        code = interrupts.INTERRUPTED
    except SystemExit as leaving:
        code = leaving.code
    except Exception:
        if not interrupts.seen():
            raise
        code = interrupts.INTERRUPTED  # an import that is interrupted fails in its own way
    if interrupts.seen() or code == interrupts.INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        interrupts.end()
    interrupts.end_at_once_from_now_on()
    sys.exit(code)


if __name__ == "__main__":
    main()
