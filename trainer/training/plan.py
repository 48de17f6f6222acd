"""What a run will do, before it does it: batch arithmetic, steps, memory of a GPU by ZeRO stage, time. `gensr
train … --dry-run`.

Works without the prepared folder (then event and item counts come from the preset's `# sizes:` line) and
without the backbone's weights. Memory and time are estimates; where their constants come from stands beside
them.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_shards.schema import TASKS
from trainer.config import Config
from trainer.configs import documented_sizes
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError
from trainer.models.backbones.known import T5_TOKENS
from trainer.models.contract import Cost, numel
from trainer.models.layers.embedding import ItemTable
from trainer.models.zoo import model_class
from trainer.runs.weights import learnable_tasks
from trainer.runs.world import load_tokenizer, sizes_only
from trainer.runtime.device import has_gpu
from trainer.runtime.launch import Launch, filled_deepspeed_config, read_deepspeed_json, read_launch
from trainer.runtime.progress import in_bytes, in_time
from trainer.training.costs import (
    ASSUMED_FLOPS,
    CPU_EFFICIENCY,
    GB,
    DataSize,
    ModelSize,
    efficiency,
    largest_micro_batch,
    measured_flops,
    memory,
    rows_read,
)
from trainer.training.schedule import Schedule, above_chance, chance, check_measured, make_schedule
from trainer.training.sparse_rows import large_tables

WORLD_SIZES = (1, 2, 4, 8, 16)
NAME_WIDTH = 12
ON_CPU = "a run on a CPU reports the whole process, Python, its libraries (half a GB) and data included"
SMALL = 0.05 * GB  # a model that takes less in training fits anywhere: no table of GPUs
STAGES: dict[str, tuple[int | None, bool]] = {
    "no ZeRO": (None, False),
    "ZeRO-1": (1, False),
    "ZeRO-2": (2, False),
    "ZeRO-2, AdamW on the host": (2, True),
    "ZeRO-3": (3, False),
    "ZeRO-3, all on the host": (3, True),
}
GPU_MEMORY = {"H200": 141e9, "A100": 80e9}
PAYS = 0.1  # optim.sparse_rows where a step reads at most this share of a table: a row costs more alone
SPARSE_ROWS = 100_000  # what the dry run suggests
MIN_GPU_S = 60.0  # below, a GPU waits for its host and the arithmetic says nothing
MAX_CPU_S = 100 * 3600.0
# ---- sizes -------------------------------------------------------------------------------------------------


def data_size(config: Config, preset: str | None = None) -> DataSize:
    """From data.dir when it is given, else from the preset's `# sizes:` line. Raises ConfigError when neither
    says."""
    folder = _folder(config)
    return size_of_folder(folder) if folder is not None else _documented_size(preset)


def _folder(config: Config) -> PreparedFolder | None:
    return PreparedFolder.open(config.data) if config.data.dir else None


def _documented_size(preset: str | None) -> DataSize:
    if preset and (counts := documented_sizes(preset)):
        return DataSize(**counts, source=f"documented in preset {preset}")
    raise ConfigError(
        "data.dir is not set, and there is no preset that documents typical sizes. Add data.dir=OUT (made by "
        "gensr prepare)."
    )


def size_of_folder(folder: PreparedFolder) -> DataSize:
    manifest = folder.manifest
    return DataSize(
        train_events=manifest.num_events("train"),
        valid_events=manifest.num_events("valid"),
        users=manifest.num_users,
        items=manifest.num_items,
        queries=manifest.num_queries,
        words=manifest.num_words,
        categories=manifest.num_categories,
        num_negatives=manifest.num_negatives,
        vocab_size=int(manifest.raw["text"].get("vocab_size", T5_TOKENS)),
        source=folder.name,
    )


def _trained_events(config: Config, data: DataSize, folder: PreparedFolder | None) -> int:
    """Events of an epoch: those of the model's tasks alone. Without a folder nobody knows how many those are;
    which of them cf.holdout=last leaves out is not counted."""
    if folder is None:
        return data.train_events
    counts = folder.manifest.raw["counts"]["train"]
    return sum(counts[TASKS[task]] for task in learnable_tasks(model_class(config.model.name), folder))


def model_size(config: Config, data: DataSize, cf_dim: int = 64) -> ModelSize:
    """Counts parameters on torch's meta device: exact, in a second, without memory or weights. Raises
    ConfigError for an unknown backbone."""
    import torch

    kind = model_class(config.model.name)
    with torch.device("meta"):
        return size_of(kind(config.model, sizes_only(config, data, cf_dim)), config.optim.sparse_rows)


def size_of(model: Any, sparse_rows: int = 0) -> ModelSize:
    """Counts of a model (on any device, meta included). sparse_rows: optim.sparse_rows."""
    parameters = list(model.parameters())
    tables = [module for module in model.modules() if isinstance(module, ItemTable)]
    return ModelSize(
        total=sum(numel(p) for p in parameters),
        trainable=sum(numel(p) for p in parameters if p.requires_grad),
        cost=model.cost() or Cost(flops=6.0 * sum(numel(p) for p in parameters), activation_bytes=0.0),
        needs=model.reads(model.settings),
        largest_table=max((_shape(table) for table in tables), default=(0, 0)),
        by_rows=tuple(_shape(table) for table in large_tables(model, sparse_rows)),
    )


def _shape(table: ItemTable) -> tuple[int, int]:
    return 1 + table.num_items, numel(table.weight) // (1 + table.num_items)


# ---- the report --------------------------------------------------------------------------------------------


def batch_arithmetic(s: Schedule) -> str:
    """`64 events a step = 32 micro-batch × 2 processes × 1 accumulation step`."""
    ranks = _count(s.world_size, "process", "processes")
    passes = _count(s.grad_accum_steps, "accumulation step", "accumulation steps")
    return f"{s.global_batch_size} events a step = {s.micro_batch_size} micro-batch × {ranks} × {passes}"


def _lowered(config: Config) -> list[str]:
    """Why the micro-batch is not the preset's, and whether that changes what is learned."""
    optim = config.optim
    if not optim.preset_micro_batch_size:
        return []
    lines = [f"micro-batch lowered from the preset's {optim.preset_micro_batch_size}, to divide the batch"]
    if model_class(config.model.name).in_batch:
        lines.append("the loss compares events of one forward pass: fewer in a smaller micro-batch")
    return lines


def _trained(model: ModelSize) -> str:
    if model.trainable == model.total:
        return "all trained" if model.total else "none to train"
    return f"of which {model.trainable:,} are trained"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def run_rows(
    config: Config, data: DataSize, model: ModelSize, schedule: Schedule, launch: Launch
) -> list[tuple[str, str]]:
    """(name, value) lines that the banner and --dry-run share."""
    s, stage = schedule, launch.zero_stage
    mean, _ = chance(config.run.select_metric, 1 + data.num_negatives)
    deepspeed = (
        "no DeepSpeed" if stage is None else f"DeepSpeed ZeRO-{stage} ({Path(launch.deepspeed_file).name})"
    )
    what = [
        (
            "data",
            f"{data.source}: {data.train_events:,} training events, {data.items:,} items, {data.queries:,} "
            "queries",
        ),
        ("model", config.model.describe()),
        ("parameters", f"{model.total:,}, {_trained(model)}"),
    ]
    if not makes_steps(config):
        begun = f" with the weights of {config.run.init_from}" if config.run.init_from else ""
        return [*what, ("steps", f"none: the model is measured and saved as it begins{begun}")]
    return [
        *what,
        ("batch", f"{batch_arithmetic(s)}; {1 + config.data.num_negatives} candidates an event"),
        *(("", line) for line in _lowered(config)),
        (
            "steps",
            f"{s.num_steps:,} ({s.num_epochs:.2f} epochs), warm-up {s.warmup_steps}, peak lr "
            f"{config.optim.lr:g}",
        ),
        (
            "validation",
            f"every {s.validate_every_steps:,} steps, checkpoint every {s.checkpoint_every_steps:,}; "
            f"{config.run.select_metric} picks the best "
            f"(chance {mean:.4f})",
        ),
        ("precision", f"{config.run.precision}, {deepspeed}"),
    ]


def banner_rows(
    config: Config,
    data: DataSize,
    model: ModelSize,
    schedule: Schedule,
    launch: Launch,
    num_valid_events: int,
    devices: str,
    mlflow_run_id: str,
    mlflow_page: str = "",
) -> list[tuple[str, str]]:
    """The block before training."""
    import torch

    not_open = "not open yet, points are kept" if config.tracking.enabled else "off"
    return [
        *run_rows(config, data, model, schedule, launch),
        ("sample", f"{num_valid_events:,} validation events"),
        ("devices", f"{devices}, {_count(torch.get_num_threads(), 'CPU thread', 'CPU threads')} a process"),
        ("run", config.run.dir),
        ("MLflow", f"run {mlflow_run_id}" if mlflow_run_id else not_open),
        *([("page", mlflow_page)] if mlflow_page else []),
    ]


@dataclass(frozen=True)
class DryRun:
    """`lines` for people, `facts` for --json."""

    lines: list[str]
    facts: dict[str, Any]


def dry_run(config: Config, preset: str | None = None, launch: Launch | None = None) -> DryRun:
    """Check everything that can be checked without training and say what the run would be. Nothing is
    written.

    Raises ConfigError or DataError for whatever would stop the run at its start.
    """
    launch = launch or read_launch()
    folder = _folder(config)
    data = size_of_folder(folder) if folder is not None else _documented_size(preset)
    schedule = make_schedule(config, _trained_events(config, data, folder), launch.world_size)
    if not makes_steps(config):
        schedule = replace(schedule, num_steps=0, warmup_steps=0)
    above_chance(config.run.select_metric, 1 + data.num_negatives, data.valid_events)
    if launch.deepspeed_file:
        filled_deepspeed_config(
            read_deepspeed_json(launch.deepspeed_file),
            config,
            schedule.grad_accum_steps,
            launch.deepspeed_file,
        )
    if folder is not None:
        _check_folder(config, folder)
    check_stage(config, launch)
    model = model_size(config, data)
    facts = {
        "data": asdict(data),
        "model": asdict(model),
        "schedule": asdict(schedule),
        "launch": {**asdict(launch), "zero_stage": launch.zero_stage},
    }
    rows = run_rows(config, data, model, schedule, launch)
    if makes_steps(config):
        more, costs = _costs(config, data, model, schedule, launch)
        rows, facts = [*rows, *more], {**facts, **costs}
    return DryRun([f"{name:<{NAME_WIDTH}}{text}" for name, text in rows], facts)


def _costs(
    config: Config, data: DataSize, model: ModelSize, schedule: Schedule, launch: Launch
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Memory and time of training → rows for people, facts."""
    stage = launch.zero_stage
    here = memory(config, model, data, stage, launch.world_size, "offload" in launch.deepspeed_file)
    parts: dict[str, float | None] = asdict(here)
    on_top = ""
    if not model.counts_activations:
        parts["activations"], on_top = None, f"; activations, not calculated for {config.model.name}, on top"
    flops = model.cost.flops * schedule.num_events
    seconds = {
        f"{launch.world_size} × {name}": flops / rate / launch.world_size
        for name, rate in ASSUMED_FLOPS.items()
    }
    seconds = {name: value for name, value in seconds.items() if value >= MIN_GPU_S}
    on_cpu = flops / (measured_flops() * CPU_EFFICIENCY)
    if on_cpu <= MAX_CPU_S or not seconds:
        seconds["this machine's CPU, one process (rough)"] = on_cpu
    rows = [
        (
            "launch",
            f"{_count(launch.world_size, 'process', 'processes')} on "
            f"{_count(launch.num_nodes, 'node', 'nodes')}",
        ),
        (
            "memory",
            f"≈ {in_bytes(here.total)} of tensors a process: "
            + ", ".join(
                f"{name} {in_bytes(value)}"
                for name, value in {**parts, "AdamW": here.optimizer}.items()
                if name != "optimizer" and value is not None
            )
            + on_top,
        ),
        *([] if has_gpu() else [("", ON_CPU)]),
        *(("", line) for line in _memory_table(config, model, data)),
        *(("large table", line) for line in _large_table(config, model, launch.world_size)),
        ("micro-batch", _micro_batches(config, model, data, stage, schedule)),
        *([("scaling", _scaling(config, model, schedule, launch))] if launch.world_size > 1 else []),
        *(
            ("time" if number == 0 else "", f"≈ {in_time(value)} on {name}")
            for number, (name, value) in enumerate(seconds.items())
        ),
    ]
    return rows, {"memory_bytes": {**parts, "total": here.total}, "seconds": seconds}


def _micro_batches(
    config: Config, model: ModelSize, data: DataSize, stage: int | None, schedule: Schedule
) -> str:
    if not model.counts_activations:
        return f"not calculated for {config.model.name}; measured by gensr bench micro-batch"
    share = schedule.global_batch_size // schedule.world_size
    fits = {
        name: largest_micro_batch(config, model, data, stage, schedule.world_size, size)
        for name, size in GPU_MEMORY.items()
    }
    whole = "the whole batch" if schedule.world_size == 1 else "a process's whole share of the batch"
    return "largest calculated to fit: " + ", ".join(
        f"{whole if size == share else size or 'none'} on {name}" for name, size in fits.items()
    )


def _scaling(config: Config, model: ModelSize, schedule: Schedule, launch: Launch) -> str:
    worst, best = efficiency(config, model, launch.zero_stage, launch.world_size, schedule.grad_accum_steps)
    return (
        f"{worst:.0%} to {best:.0%} of {launch.world_size} H200s' speed is left after communication "
        "(calculated: nothing of it hidden, all that can be)"
    )


def _large_table(config: Config, model: ModelSize, world_size: int) -> list[str]:
    """Whether optim.sparse_rows pays, where a table of items or users has a gradient worth speaking of."""
    rows, width = model.largest_table
    gradient = 4.0 * rows * width
    if gradient < SMALL:
        return []
    read = min(rows, rows_read(config, world_size))
    facts = f"{rows:,} rows × {width}; a step of one process reads at most {read:,} of them"
    if model.by_rows:
        return [f"{facts}: sparse rows, {in_bytes(4.0 * read * (1 + width))} instead of {in_bytes(gradient)}"]
    if read * world_size > PAYS * rows:
        return [f"{facts}: optim.sparse_rows would save nothing"]
    return [
        f"{facts}, has a gradient of {in_bytes(gradient)}. optim.sparse_rows={SPARSE_ROWS} sends and updates "
        "what was read, unless the loss scores every item"
    ]


def _memory_table(config: Config, model: ModelSize, data: DataSize) -> list[str]:
    """By ZeRO stage and number of GPUs, in MB where one GPU takes less than a GB; nothing for a model that
    fits anywhere."""
    whole = memory(config, model, data, None, 1, False).total
    if whole < SMALL:
        return []
    unit, size, places = ("GB", GB, 1) if whole >= GB else ("MB", 1e6, 0)
    lines = [f"{f'{unit} a GPU, by number of GPUs':<28}" + "".join(f"{n:>8}" for n in WORLD_SIZES)]
    for name, (stage, offload) in STAGES.items():
        cells = [memory(config, model, data, stage, n, offload).total / size for n in WORLD_SIZES]
        lines.append(f"{name:<28}" + "".join(f"{cell:>8.{places}f}" for cell in cells))
    return lines


def makes_steps(config: Config) -> bool:
    """False for a model that is counted (popularity), and for run.max_epochs=0."""
    return model_class(config.model.name).trained and bool(config.run.max_steps or config.run.max_epochs)


def check_stage(config: Config, launch: Launch) -> None:
    """Raises ConfigError for settings of the model that the launcher's ZeRO stage does not allow."""
    refused = model_class(config.model.name).refusals(config.model, launch.zero_stage)
    if refused:
        raise ConfigError(
            f"{' and '.join(refused)} is not supported under ZeRO-{launch.zero_stage} "
            f"({launch.deepspeed_file}). Use zero2.json or turn the setting off"
        )


def check_metric(config: Config, tasks: tuple[int, ...]) -> None:
    """Raises ConfigError when run.select_metric is not measured, or of a task that the model has not, or
    that there are no training events of."""
    check_measured(config.run.select_metric)
    part, names = config.run.select_metric.partition("/")[0], [TASKS[task] for task in tasks]
    if part in TASKS and part not in names:
        raise ConfigError(
            f"run.select_metric={config.run.select_metric}, but only {names[0]} is learned here. Set it to "
            f"mean/ndcg@10 or {names[0]}/ndcg@10"
        )


def selected(config: Config, metrics: dict[str, float]) -> float:
    """The value of run.select_metric. Raises ConfigError when there are no validation events for it."""
    name = config.run.select_metric
    if name not in metrics:
        raise ConfigError(
            f"run.select_metric={name} is not measured on this data. There are: {', '.join(sorted(metrics))}"
        )
    return metrics[name]


def check_tokenizer(config: Config, folder: PreparedFolder) -> None:
    """Raises DataError when a new model cannot work with the folder's tokenizer."""
    is_trained = folder.manifest.raw["text"].get("tokenizer") == "trained"
    tokenizer = load_tokenizer(folder.tokenizer)
    model_class(config.model.name).check_tokenizer(tokenizer, config.model, is_trained)


def _check_folder(config: Config, folder: PreparedFolder) -> None:
    """The parts of a prepared folder that training opens first. Raises DataError naming what is missing or
    does not fit."""
    kind = model_class(config.model.name)
    folder.check_settings(config.data)
    check_metric(config, learnable_tasks(kind, folder))
    check_tokenizer(config, folder)
    folder.tables(kind.reads(config.model))
