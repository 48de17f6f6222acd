"""[--items N --width D --kind random|clustered --queries N --threads N]: retrieval from a catalogue of
vectors that mean nothing.

Prints the memory that the plan says and the memory it took, time to build, recall@100 and @500 against exact
search (of queries that building never saw), and the time of one request: one index, and the union of two as a
request asks it (400 candidates, 20 seen items left out). Random vectors are the hard case: they have no
clusters and no axis that matters more than another. The vectors themselves lie in memory already, as the CF
table does.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import psutil

from trainer.runtime.memory import peak_memory_bytes
from trainer.serving.index import CHUNK_ITEMS, Index, build_index, plan_index, recall, unit
from trainer.serving.retrieval import union

CENTRES, NOISE = 2000, 1.25  # clustered: the noise around a centre is this much longer than the centre
HISTORY, CANDIDATES, CUTOFFS = 20, 400, (100, 500)


def make_vectors(num_items: int, width: int, kind: str) -> np.ndarray:
    """[num_items, width] float32, unit length, made chunk by chunk."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, width), dtype=np.float32)
    table = np.empty((num_items, width), np.float32)
    for start in range(0, num_items, CHUNK_ITEMS):
        part = rng.standard_normal((min(CHUNK_ITEMS, num_items - start), width), dtype=np.float32)
        if kind == "clustered":
            part = centres[rng.integers(CENTRES, size=len(part))] + NOISE * part
        table[start : start + len(part)] = unit(part)
    return table


def exact_rows(table: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Brute force by faiss, without a copy of the table."""
    rows: np.ndarray = faiss.knn(queries, table, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return rows


def timed(ask: Callable[[np.ndarray], Any], queries: np.ndarray) -> dict[str, float]:
    """Milliseconds of one query at a time: wall clock, and CPU of all threads, which other programs do not
    lengthen as much."""
    wall, cpu = [], []
    for query in queries:
        started, started_cpu = time.perf_counter(), time.process_time()
        ask(query)
        wall.append((time.perf_counter() - started) * 1e3)
        cpu.append((time.process_time() - started_cpu) * 1e3)
    figures = {"wall": wall, "cpu": cpu}
    return {
        f"{name}_p{p}_ms": round(float(np.percentile(values, p)), 2)
        for name, values in figures.items()
        for p in (50, 95)
    }


def build(table: np.ndarray, options: argparse.Namespace) -> tuple[Index, dict[str, Any]]:
    plan = plan_index(options.items, options.width)
    print(plan.line(options.kind, options.items, options.width), file=sys.stderr, flush=True)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    started_cpu = time.process_time()
    index = build_index(lambda rows: table[rows], options.items, options.width)
    assert index is not None
    seconds = {
        "build_wall_s": round(time.perf_counter() - started, 1),
        "build_cpu_s": round(time.process_time() - started_cpu, 1),
    }
    memory = {
        "rss_bytes": psutil.Process().memory_info().rss - before,
        "peak_bytes": peak_memory_bytes() - before,
    }
    return index, {
        **index.facts,
        "planned_bytes": plan.num_bytes,
        "planned_build_bytes": plan.build_bytes,
        **memory,
        **seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("items", 6_890_707), ("width", 64), ("queries", 200), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind", choices=("random", "clustered"), default="random")
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    table = make_vectors(options.items, options.width, options.kind)
    index, document = build(table, options)
    rng = np.random.default_rng(1)
    histories = rng.integers(options.items, size=(options.queries, HISTORY))
    queries = unit(table[histories[:, :3]].mean(1))  # near three items, as a user with one interest would be
    exact = exact_rows(table, queries, max(CUTOFFS))
    found = np.concatenate([index.search(query[None], max(CUTOFFS))[0] for query in queries])
    document["measured_recall"] = {
        f"recall@{k}": round(recall(found[:, :k], exact[:, :k]), 4) for k in CUTOFFS
    }
    document["one_index"] = timed(lambda query: index.search(query[None], CANDIDATES), queries)
    document["two_indexes_and_union"] = timed(
        lambda query: union([(index, query, 0.5), (index, -query, 0.5)], CANDIDATES, histories[0].tolist()),
        queries,
    )
    print(json.dumps({"options": vars(options), **document}))


if __name__ == "__main__":
    main()
