"""An OpenMP runtime that counts what it is asked for."""

import ctypes


class CountedParallel:
    """Stands in for GOMP_parallel: all of a team's work is done on the calling thread.

    Attributes:
        address: for a kernel's `parallel`.
        teams: the threads that each parallel region was to have.
    """

    def __init__(self) -> None:
        self.teams: list[int] = []
        kind = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        )
        self._function = kind(self._run)  # which C calls, as long as it is kept
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value

    def _run(self, work: int, data: int, num_threads: int, _: int) -> None:
        self.teams.append(num_threads)
        for _ in range(num_threads):
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(data)
