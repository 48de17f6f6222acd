"""What a run will do, before it does it: batch arithmetic, steps, memory of a GPU by ZeRO stage, time. `gensr
train … --dry-run`.

Works without the prepared folder (then event and item counts come from the preset's `# sizes:` line) and
without the backbone's weights. Memory and time are estimates; where their constants come from stands beside
them.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_shards.schema import Manifest, read_manifest
from data_shards.secrets import mask_secrets
from data_shards.settings import read_yaml
from trainer.config import Config, preset_path
from trainer.data.node_cache import local_folder
from trainer.errors import ConfigError
from trainer.runtime.launch import Launch, filled_deepspeed_config, read_deepspeed_json, read_launch
from trainer.training.costs import (
    ASSUMED_FLOPS,
    CPU_EFFICIENCY,
    GB,
    T5_TOKENS,
    DataSize,
    ModelSize,
    efficiency,
    flops_per_event,
    largest_micro_batch,
    measured_flops,
    memory,
)
from trainer.training.schedule import Schedule, above_chance, chance, make_schedule

WORLD_SIZES = (1, 2, 4, 8, 16)
NAME_WIDTH = 12
CROSS_KEYS = re.compile(r"(EncDecAttention|cross_attn)\.(k|v|k_proj|v_proj)\.")
STAGES: dict[str, tuple[int | None, bool]] = {
    "no ZeRO": (None, False),
    "ZeRO-1": (1, False),
    "ZeRO-2": (2, False),
    "ZeRO-2, AdamW on the host": (2, True),
    "ZeRO-3": (3, False),
    "ZeRO-3, all on the host": (3, True),
}
GPU_MEMORY = {"H200": 141e9, "A100": 80e9}
MIN_GPU_S = 60.0  # below, a GPU waits for its host and the arithmetic says nothing
MAX_CPU_S = 100 * 3600.0
T5_FAMILY = {
    "model_type": "t5",
    "vocab_size": T5_TOKENS,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}


def _t5(width: int, ff: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        **T5_FAMILY,
        "d_model": width,
        "d_ff": ff,
        "d_kv": 64,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": layers,
    }


def _decoder(
    family: str,
    vocab: int,
    width: int,
    ff: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tied: bool = True,
) -> dict[str, Any]:
    shape = dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return {
        "model_type": family,
        **shape,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
    }


# config.json of published backbones, as far as sizes depend on it: no network and no weights are needed for a
# plan
KNOWN_BACKBONES: dict[str, dict[str, Any]] = {
    "google/flan-t5-small": _t5(512, 1024, 6, 8),
    "google/flan-t5-base": _t5(768, 2048, 12, 12),
    "google/flan-t5-large": _t5(1024, 2816, 16, 24),
    "google/flan-t5-xl": _t5(2048, 5120, 32, 24),
    "google/flan-t5-xxl": _t5(4096, 10240, 64, 24),
    "Qwen/Qwen2.5-0.5B": _decoder("qwen2", 151936, 896, 4864, 24, 14, 2, 64),
    "Qwen/Qwen2.5-1.5B": _decoder("qwen2", 151936, 1536, 8960, 28, 12, 2, 128),
    "Qwen/Qwen2.5-7B": _decoder("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, tied=False),
    "Qwen/Qwen3-0.6B": _decoder("qwen3", 151936, 1024, 3072, 28, 16, 8, 128),
    "Qwen/Qwen3-1.7B": _decoder("qwen3", 151936, 2048, 6144, 28, 16, 8, 128),
    "Qwen/Qwen3-4B": _decoder("qwen3", 151936, 2560, 9728, 36, 32, 8, 128),
    "meta-llama/Llama-3.2-1B": _decoder("llama", 128256, 2048, 8192, 16, 32, 8, 64),
    "meta-llama/Llama-3.2-3B": _decoder("llama", 128256, 3072, 8192, 28, 24, 8, 128),
    "meta-llama/Llama-3.1-8B": _decoder("llama", 128256, 4096, 14336, 32, 32, 8, 128, tied=False),
    "HuggingFaceTB/SmolLM2-135M": _decoder("llama", 49152, 576, 1536, 30, 9, 3, 64),
    "HuggingFaceTB/SmolLM2-360M": _decoder("llama", 49152, 960, 2560, 32, 15, 5, 64),
    "HuggingFaceTB/SmolLM2-1.7B": _decoder("llama", 49152, 2048, 8192, 24, 32, 32, 64),
}


# ---- sizes -------------------------------------------------------------------------------------------------


def data_size(config: Config, preset: str | None = None) -> DataSize:
    """From data.dir when it is given, else from the preset's `# sizes:` line. Raises ConfigError when neither
    says."""
    if config.data.dir:
        return size_of_folder(config.data.dir, read_manifest(local_folder(config.data)))
    if preset:
        documented = re.search(
            r"^# sizes: (.+)$", preset_path(preset).read_text(encoding="utf-8"), re.MULTILINE
        )
        if documented:
            counts = {
                key: int(value.replace("_", ""))
                for key, _, value in (part.partition("=") for part in documented[1].split())
            }
            return DataSize(**counts, source=f"documented in preset {preset}")
    raise ConfigError(
        "data.dir is not set, and there is no preset that documents typical sizes. Add data.dir=OUT (made by "
        "gensr prepare)."
    )


def size_of_folder(folder: str, manifest: Manifest) -> DataSize:
    return DataSize(
        train_events=manifest.num_events("train"),
        valid_events=manifest.num_events("valid"),
        items=manifest.num_items,
        queries=manifest.num_queries,
        words=manifest.num_words,
        num_negatives=manifest.num_negatives,
        vocab_size=int(manifest.raw["text"].get("vocab_size", T5_TOKENS)),
        source=mask_secrets(folder),
    )


def model_size(config: Config, num_words: int, vocab_size: int, cf_dim: int = 64) -> ModelSize:
    """Counts parameters on torch's meta device: exact, in a second, without memory or weights. Raises
    ConfigError for an unknown backbone."""
    import torch

    from trainer.models.backbones.families import build_backbone
    from trainer.models.gensr.model import GenSR
    from trainer.runs.weights import model_settings

    name, lora = config.model.backbone, config.model.lora
    with _architecture(name) as config_only, torch.device("meta"):
        lora_or_none = lora if lora.rank else None
        own_head = not _is_tied(name)
        backbone = build_backbone(
            name,
            vocab_size=vocab_size,
            dropout=0.0,
            lora=lora_or_none,
            config_only=config_only,
            own_head=own_head,
        )
        model = GenSR(model_settings(config, num_words, cf_dim), backbone, {}, (0, 1), None)  # type: ignore[arg-type]
    return size_of(model)


@contextmanager
def _architecture(name: str) -> Iterator[Path | None]:
    """A folder with the backbone's config.json, or None for one from scratch."""
    if name.startswith("scratch:"):
        yield None
    elif (Path(name) / "config.json").is_file():
        yield Path(name)
    elif name in KNOWN_BACKBONES:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(KNOWN_BACKBONES[name]), encoding="utf-8")
            yield Path(folder)
    else:
        raise ConfigError(
            f"model.backbone={name}: no local folder with a config.json, and no known name. Known: "
            f"{', '.join(KNOWN_BACKBONES)}; or scratch:SIZE. "
            f"Another hub model can be downloaded first, then named by its folder."
        )


def _is_tied(name: str) -> bool:
    """Whether the output table is the input table, as the weights have it."""
    if name.startswith("scratch:"):
        return True
    if name in KNOWN_BACKBONES:
        return bool(KNOWN_BACKBONES[name]["tie_word_embeddings"])
    weights, index = Path(name) / "model.safetensors", Path(name) / "model.safetensors.index.json"
    if index.is_file():
        return "lm_head.weight" not in json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if not weights.is_file():
        return True
    from safetensors import safe_open

    with safe_open(str(weights), framework="pt") as file:
        return "lm_head.weight" not in set(file.keys())


def size_of(model: Any) -> ModelSize:
    """Counts of a GenSR (on any device, meta included)."""
    parameters = list(model.parameters())
    every_token, once = model.backbone.stacks
    return ModelSize(
        total=sum(_numel(p) for p in parameters),
        trainable=sum(_numel(p) for p in parameters if p.requires_grad),
        width=model.backbone.width,
        layers=_num_layers(every_token),
        encoder=_read_once_a_token(every_token),
        decoder=_read_once_a_token(once) if once is not None else 0,
        cross=sum(_numel(p) for name, p in once.named_parameters() if CROSS_KEYS.search(name))
        if once is not None
        else 0,
        shared_first=model.backbone.shared_first,
    )


def _num_layers(stack: Any) -> int:
    return len(stack.block if hasattr(stack, "block") else stack.layers)


def _read_once_a_token(stack: Any) -> int:
    return sum(_numel(p) for name, p in stack.named_parameters() if "embed_tokens" not in name)


def _numel(parameter: Any) -> int:
    """Also for a parameter that ZeRO-3 has partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


# ---- the report --------------------------------------------------------------------------------------------


def batch_arithmetic(s: Schedule) -> str:
    """`64 events a step = 32 micro-batch × 2 processes × 1 accumulation step`."""
    ranks, passes = (
        _count(s.world_size, "process", "processes"),
        _count(s.grad_accum_steps, "accumulation step", "accumulation steps"),
    )
    return f"{s.global_batch_size} events a step = {s.micro_batch_size} micro-batch × {ranks} × {passes}"


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
    return [
        (
            "data",
            f"{data.source}: {data.train_events:,} training events, {data.items:,} items, {data.queries:,} "
            "queries",
        ),
        ("model", f"{config.model.backbone}, {config.model.variant}, {config.model.prompt} prompt"),
        ("parameters", f"{model.total:,}, of which {model.trainable:,} are trained"),
        ("batch", f"{batch_arithmetic(s)}; {1 + config.data.num_negatives} candidates an event"),
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
) -> list[tuple[str, str]]:
    """The block before training."""
    import torch

    return [
        *run_rows(config, data, model, schedule, launch),
        ("sample", f"{num_valid_events:,} validation events"),
        ("devices", f"{devices}, {torch.get_num_threads()} CPU threads a process"),
        ("run", config.run.dir),
        ("MLflow", f"run {mlflow_run_id}" if mlflow_run_id else "off"),
    ]


def launch_of_yaml(path: str | Path, num_processes: int = 0) -> Launch:
    """The Launch that an accelerate YAML would make, to check a cluster's configuration on a laptop."""
    import ds_configs

    file = (
        Path(path)
        if Path(path).is_file() or Path(path).name not in ds_configs.names()
        else ds_configs.path(Path(path).name)
    )
    document = read_yaml(file)
    world_size = num_processes or int(document.get("num_processes", 1))
    deepspeed = (
        document.get("deepspeed_config", {}) if document.get("distributed_type") == "DEEPSPEED" else {}
    )
    named = str(deepspeed.get("deepspeed_config_file", f"zero{deepspeed.get('zero_stage', 2)}.json"))
    json_file = named if Path(named).is_file() else str(ds_configs.path(Path(named).name))
    return Launch(
        world_size=world_size,
        local_world_size=max(1, world_size // int(document.get("num_machines", 1))),
        launched=True,
        deepspeed_file=json_file if deepspeed else "",
    )


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
    data = data_size(config, preset)
    schedule = make_schedule(config, data.train_events, launch.world_size)
    above_chance(config.run.select_metric, 1 + data.num_negatives, data.valid_events)
    if launch.deepspeed_file:
        filled_deepspeed_config(
            read_deepspeed_json(launch.deepspeed_file),
            config,
            schedule.grad_accum_steps,
            launch.deepspeed_file,
        )
    if config.data.dir:
        _check_folder(config)
    model = model_size(config, data.words, data.vocab_size)
    stage = launch.zero_stage
    here = memory(config, model, data, stage, launch.world_size, "offload" in launch.deepspeed_file)
    flops = flops_per_event(config, model) * schedule.num_events
    seconds = {
        f"{launch.world_size} × {name}": flops / rate / launch.world_size
        for name, rate in ASSUMED_FLOPS.items()
    }
    seconds = {name: value for name, value in seconds.items() if value >= MIN_GPU_S}
    on_cpu = flops / (measured_flops() * CPU_EFFICIENCY)
    if on_cpu <= MAX_CPU_S or not seconds:
        seconds["this machine's CPU, one process (rough)"] = on_cpu
    rows = [
        *run_rows(config, data, model, schedule, launch),
        (
            "launch",
            f"{_count(launch.world_size, 'process', 'processes')} on "
            f"{_count(launch.num_nodes, 'node', 'nodes')}",
        ),
        (
            "memory",
            f"≈ {here.total / GB:.1f} GB a process: "
            + ", ".join(
                f"{name} {value / GB:.1f}"
                for name, value in {**asdict(here), "AdamW": here.optimizer}.items()
                if name != "optimizer"
            ),
        ),
        *(("", line) for line in _memory_table(config, model, data)),
        ("micro-batch", _micro_batches(config, model, data, stage, launch.world_size)),
        *([("scaling", _scaling(config, model, schedule, launch))] if launch.world_size > 1 else []),
        *(
            ("time" if number == 0 else "", f"≈ {_hours(value)} on {name}")
            for number, (name, value) in enumerate(seconds.items())
        ),
    ]
    lines = [f"{name:<{NAME_WIDTH}}{text}" for name, text in rows]
    facts = {
        "data": asdict(data),
        "model": asdict(model),
        "schedule": asdict(schedule),
        "launch": {**asdict(launch), "zero_stage": stage},
        "memory_bytes": {**asdict(here), "total": here.total},
        "seconds": seconds,
    }
    return DryRun(lines, facts)


def _micro_batches(
    config: Config, model: ModelSize, data: DataSize, stage: int | None, world_size: int
) -> str:
    fits = {
        name: largest_micro_batch(config, model, data, stage, world_size, size)
        for name, size in GPU_MEMORY.items()
    }
    return "largest calculated to fit: " + ", ".join(
        f"{size or 'none'} on {name}" for name, size in fits.items()
    )


def _scaling(config: Config, model: ModelSize, schedule: Schedule, launch: Launch) -> str:
    worst, best = efficiency(config, model, launch.zero_stage, launch.world_size, schedule.grad_accum_steps)
    return f"{worst:.0%} to {best:.0%} of {launch.world_size} H200s' speed is left after communication (calculated: nothing of it hidden, all that can be)"


def _memory_table(config: Config, model: ModelSize, data: DataSize) -> list[str]:
    lines = [f"{'GB a GPU, by number of GPUs':<28}" + "".join(f"{n:>8}" for n in WORLD_SIZES)]
    for name, (stage, offload) in STAGES.items():
        cells = [memory(config, model, data, stage, n, offload).total / GB for n in WORLD_SIZES]
        lines.append(f"{name:<28}" + "".join(f"{cell:>8.1f}" for cell in cells))
    return lines


def _check_folder(config: Config) -> None:
    """The parts of a prepared folder that training opens first. Raises DataError naming what is missing or
    does not fit."""
    from trainer.data.cf_table import load_cf
    from trainer.runs.weights import answer_tokens, load_tokenizer

    folder = local_folder(config.data)
    manifest = read_manifest(folder)
    answer_tokens(load_tokenizer(folder / "tokenizer"))
    load_cf(folder, manifest)


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
