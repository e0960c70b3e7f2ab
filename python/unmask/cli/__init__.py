"""The command line tool: `unmask generate`, `unmask policies`, `unmask inspect`, `unmask doctor`, `unmask bench`. Commands import torch only once their arguments are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130
"""Exit code after Ctrl-C (128 + SIGINT)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 bad arguments or model, 130 interrupted."""
    from .options import read_arguments

    args = read_arguments(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ImportError as error:  # the op library is missing, or is not one
        print(f"unmask: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError) as error:
        if "UNMASK_" not in str(error):  # an environment variable with a value that does not exist
            raise
        print(f"unmask: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except (
        BrokenPipeError
    ):  # the reader of our output has gone: no traceback, and none from the interpreter's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
