"""[--edges N --users N --items N --steps N --turns N]: one training step of our LightGCN and
one of torch_geometric's, alternately.

Each turn is a process of its own, on a GPU where there is one.

Same graph, batch, negatives, BPR loss and Adam. Prints a line for each turn and a JSON object: steps per CPU
second, seconds per step, peak memory beyond the imported libraries and the clicks, and the ratios
(torch_geometric / ours).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
import torch

from data_shards.negatives import user_item_keys
from trainer.runtime.device import default_device, wait_for
from trainer.runtime.memory import keep_freed_memory, peak_memory_bytes

DIM, LAYERS, LR, REG = 64, 2, 5e-3, 1e-2
DEVICE = default_device()


def random_clicks(num_edges: int, num_users: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """About num_edges unique clicks; popularity of items falls as a power."""
    generator = np.random.default_rng(0)
    users = generator.integers(num_users, size=num_edges)
    items = (num_items * generator.random(num_edges) ** 3).astype(np.int64)
    keys = user_item_keys(users, items, num_items)
    return keys // num_items, keys % num_items


def our_step(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> Any:
    from trainer.cf.lightgcn import LightGCN, build_graph

    keep_freed_memory()  # as gensr cf does
    graph = build_graph(users, items, num_users, num_items).to(DEVICE)
    model = LightGCN(num_users, num_items, DIM, LAYERS).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def step(user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(graph, user, positive, negative, REG).backward()
        optimizer.step()

    return step


def geometric_step(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> Any:
    from torch_geometric.nn.models import LightGCN

    edges = torch.from_numpy(np.stack([users, items + num_users]))
    edges = torch.cat([edges, edges.flip(0)], dim=1).to(DEVICE)
    model = LightGCN(num_users + num_items, DIM, LAYERS).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def step(user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        vectors = model.get_embedding(edges)
        scores = [(vectors[user] * vectors[other + num_users]).sum(-1) for other in (positive, negative)]
        nodes = torch.cat([user, positive + num_users, negative + num_users])
        model.recommendation_loss(*scores, node_id=nodes, lambda_reg=REG / 2).backward()
        optimizer.step()

    return step


STEPS = {"ours": our_step, "torch_geometric": geometric_step}


def measure(which: str, options: argparse.Namespace) -> dict[str, float]:
    """In this process: build, one step to warm up, `steps` steps."""
    torch.set_num_threads(options.threads)
    users, items = random_clicks(options.edges, options.users, options.items)
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else psutil.Process().memory_info().rss
    step = STEPS[which](users, items, options.users, options.items)
    generator, cpu_s, wall_s = np.random.default_rng(1), 0.0, 0.0
    for number in range(options.steps + 1):
        chosen = generator.integers(len(users), size=options.batch)
        batch = [
            torch.from_numpy(values).to(DEVICE)
            for values in (
                users[chosen],
                items[chosen],
                generator.integers(options.items, size=options.batch),
            )
        ]
        wait_for(DEVICE)
        cpu, wall = time.process_time(), time.perf_counter()
        step(*batch)
        wait_for(DEVICE)
        if number:
            cpu_s, wall_s = cpu_s + time.process_time() - cpu, wall_s + time.perf_counter() - wall
    return {
        "cpu_s_per_step": cpu_s / options.steps,
        "wall_s_per_step": wall_s / options.steps,
        "peak_bytes": peak_memory_bytes() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("edges", 1_000_000),
        ("users", 25_877),
        ("items", 400_000),
        ("batch", 65_536),
        ("steps", 5),
        ("turns", 2),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--only", choices=STEPS, help="measure one of them in this process and print its JSON"
    )
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    for turn in range(options.turns):
        for name in STEPS:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            answer = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            turns[name].append(json.loads(answer.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}  {name:<16} {turns[name][-1]}", file=sys.stderr)
    means = {
        name: {key: float(np.mean([turn[key] for turn in values])) for key in values[0]}
        for name, values in turns.items()
    }
    ratios = {key: round(means["torch_geometric"][key] / value, 2) for key, value in means["ours"].items()}
    print(json.dumps({"options": vars(options), **means, "torch_geometric_to_ours": ratios}))


if __name__ == "__main__":
    main()
