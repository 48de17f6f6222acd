"""Imports for the process that forks a table's runs (trainer/experiments/forked.py). It is imported by name
there and nowhere else: it changes how the process handles signals.

The process must outlive its children, which have to save first: its own session keeps Ctrl-C away, and
SIGTERM stays blocked. Children unblock it.
"""

import contextlib
import importlib
import os
import signal

from gensr.own import prefer

MODULES = (  # what takes most of the time of training and evaluating a small model
    "torch",
    "torch._dynamo",  # an optimizer imports it
    "accelerate",
    "transformers",
    "pandas",
    "matplotlib.pyplot",
    "trainer.cli",
    "trainer.training.loop",
    "trainer.evaluation.sampled",
    "trainer.evaluation.full",
    "trainer.evaluation.summary",
    "trainer.runtime.launch",
    "trainer.tracking.tracker",
    "mlflow.store.tracking.sqlalchemy_store",
)

os.setsid()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
prefer()
for name in MODULES:
    with contextlib.suppress(ImportError):  # an extra that is not installed: a run says so, where it needs it
        importlib.import_module(name)
