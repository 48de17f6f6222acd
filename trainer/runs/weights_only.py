"""Checkpoints are read without running what is in them.

torch.load() unpickles, and a pickle may call anything. With weights_only=True it builds tensors, plain values
and the classes below, and refuses the rest; the environment variable makes that so for every call in this
process and its children, also for those inside DeepSpeed that ask for the contrary.

    python -m trainer.runs.weights_only …    DeepSpeed's converter (deepspeed.checkpoint.ds_to_universal …),
                                             so read
"""

import contextlib
import os
import pickle
import random
import runpy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.errors import RunError

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# All that DeepSpeed's files and the random states hold beside tensors and plain values.
KNOWN = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "_codecs.encode",
)


@contextlib.contextmanager
def no_unpickling(where: str | Path) -> Iterator[None]:
    """Every torch.load() in the block reads weights only. Raises RunError where a file of `where` holds
    anything else."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(known_classes()):
            yield
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"{where} holds something that no checkpoint of gensr holds: it is not loaded, and nothing in it "
            f"was run ({reason}). Take another checkpoint, or start a new run.dir."
        ) from error
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def known_classes() -> list[Any]:
    from numpy._core.multiarray import _reconstruct

    found: list[Any] = [_reconstruct]
    for name in KNOWN:
        module, _, attribute = name.rpartition(".")
        with contextlib.suppress(ImportError):  # without DeepSpeed none of its checkpoints is read
            found.append(getattr(import_module(module), attribute))
    return found


def check_random_states(path: Path) -> None:
    """accelerate goes on with other random numbers, and says nothing, when it cannot read those of a rank.
    Raises RunError then. A run on a CPU has left none for a GPU, which goes on with its own."""
    generator = random.Random()
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
        generator.setstate(states["random_state"])
        np.random.RandomState().set_state(states["numpy_random_seed"])
        torch.Generator().set_state(states["torch_manual_seed"])
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # whatever torch, numpy and zipfile say of a file that is cut short
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        raise RunError(
            f"{path}: the random numbers of this process cannot be read ({reason}). The "
            "run would continue with another dropout. Take another checkpoint, or start a new run.dir."
        ) from error


if __name__ == "__main__":
    with no_unpickling("the checkpoint"):
        runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__", alter_sys=True)
