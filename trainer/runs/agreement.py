"""Processes that train one run were started with the same settings, on the same prepared folder, by the same
version. Otherwise each would train a run of its own, and all would average their gradients."""

import platform
from typing import TYPE_CHECKING

from data_shards.settings import changes, flat_as_json, to_dict
from trainer import __version__
from trainer.config import Config
from trainer.data.folder import PreparedFolder
from trainer.errors import RunError
from trainer.models.zoo import model_class
from trainer.runtime.distributed import gather_objects

if TYPE_CHECKING:
    from accelerate import Accelerator

# where a node finds and keeps things, and how many hands it has
OF_A_NODE = {"data.dir", "data.cache_dir", "data.num_workers", "run.dir", "run.threads"}


def check_agreement(accelerator: "Accelerator", config: Config, folder: PreparedFolder) -> None:
    """Raises RunError on all ranks that shows every difference between the first rank and the first one that
    differs from it."""
    settings = {
        key: value
        for key, value in flat_as_json(to_dict(config)).items()
        if key not in OF_A_NODE and not key.startswith(("tracking.", "serving."))
    }
    mine = {**settings, "prepared folder": folder.manifest.hash[:16], "gensr": __version__}
    if model_class(config.model.name).reads(config.model) & {"cf", "cf_users"}:
        mine["CF table"] = folder.cf_file_sha256[:16]  # a node's copy may be older than the others'
    of_ranks = gather_objects(accelerator, (platform.node(), mine))
    first_node, first = of_ranks[0]
    for rank, (node, other) in enumerate(of_ranks):
        if differences := changes(first, other):
            names = f"rank 0 on {first_node} and rank {rank} on {node}"
            lines = [f"  {one.key}: {one.was} and {one.now}" for one in differences]
            fix = "Give the same command on every node, with the same prepared folder"
            raise RunError("\n".join([f"the processes of this run disagree: {names} have", *lines, fix]))
