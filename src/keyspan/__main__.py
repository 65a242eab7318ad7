"""`python -m keyspan`: the command `keyspan`."""

from keyspan.cli import program

if __name__ == "__main__":
    program()
