"""What the programs import, for the server process that they are forked from (programs.py)."""

import os

# A thread pool that was started here would be missing in the forks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ddetr_d2.engine.launch  # noqa: E402, F401
import ddetr_d2.engine.trainer  # noqa: E402, F401
import ddetr_d2.export  # noqa: E402, F401
import ddetr_d2.visualization  # noqa: E402, F401
