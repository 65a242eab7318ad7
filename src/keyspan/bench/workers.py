"""Runs functions in a pool of processes, because most of a check's time is compilation; a failed call is a result too.

A function is pickled by its module's name, so it must be importable: one defined in a script does not work.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as Late
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes, which know no CUDA yet; at the end they are stopped, whatever they are at."""
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        started = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.terminate()


def arriving(futures: Iterable[Future[T]], seconds: float) -> Iterator[T]:
    """Results as they come; after so many seconds those that have not come are given up."""
    futures = list(futures)
    try:
        for future in as_completed(futures, timeout=seconds):
            yield future.result()
    except Late:
        pass
    for future in futures:
        future.cancel()


def guarded(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What the function returns, with its arguments as `name` and the time it took; its error where it fails."""
    began = time.time()
    try:
        found = function(*args)
    except Exception as error:  # a failing case is a result, and the others go on
        found = {"error": f"{type(error).__name__}: {error}"[-600:], "trace": traceback.format_exc()[-1500:]}
    return {"name": " · ".join(map(str, args)), "seconds": round(time.time() - began, 1), **found}


def guarded_print(function: Callable[..., T], *args: Any) -> T | None:
    """What the function returns; where it fails, None, and the failure is printed."""
    try:
        return function(*args)
    except Exception:
        print("BAD", traceback.format_exc()[-800:], flush=True)
        return None
