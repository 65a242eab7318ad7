"""The script `keyspan`. A package of its own, so that Ctrl-C while keyspan imports torch ends without a traceback."""

from __future__ import annotations


def main() -> int:
    """Run `keyspan.cli.program`; 130, the exit status of an interrupted program, on Ctrl-C."""
    try:
        from keyspan.cli import program

        program()
    except KeyboardInterrupt:
        return 130
