"""What the tests have a process of its own do. Light to import, since every such process does."""

from __future__ import annotations

import os
import time


def answering():
    """Doubles numbers, and misbehaves when told to."""

    def answer(request):
        if request == "memory":
            import torch

            raise torch.OutOfMemoryError("much text")
        if request == "cpu memory":
            import torch

            torch.empty(2**60, dtype=torch.int8)
        if request == "crash":
            print("last words", flush=True)
            os._exit(7)
        if request == "sleep":
            time.sleep(60)
        return 2 * request

    return answer
