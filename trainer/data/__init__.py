"""Shards → batches. The order of training data is a function of (seed, position) alone: docs/checkpoints.md,
"The order of training data".

blocks.py                        tar entry → Arrow → numpy
order.py                         position → event
train_stream.py, eval_stream.py  this rank's batches
"""

from trainer.data.blocks import read_blocks
from trainer.data.eval_stream import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.data.prefetch import prefetched
from trainer.data.train_stream import TrainStream

__all__ = ["EvalStream", "PreparedFolder", "TrainStream", "prefetched", "read_blocks"]
