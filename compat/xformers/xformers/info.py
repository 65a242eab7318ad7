"""`python -m xformers.info`."""

from keyspan.interop.xformers.info import get_info, print_info

__all__ = ["get_info", "print_info"]

if __name__ == "__main__":
    print_info()
