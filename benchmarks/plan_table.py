"""The table of docs/RESULTS.md: memory, time and scaling of backbones on H200s, calculated by what `gensr
train --dry-run` calculates with.

python -m benchmarks.plan_table
"""

from typing import Any

from trainer.config import Config
from trainer.configs import load_config
from trainer.training.costs import (
    ASSUMED_FLOPS,
    GB,
    DataSize,
    ModelSize,
    efficiency,
    largest_micro_batch,
    memory,
)
from trainer.training.plan import GPU_MEMORY, data_size, model_size

PRESET = "kuaisar_flan_t5_base"  # its data, prompt and batch; the backbone varies
LORA = "model.lora.rank=16"
BACKBONES = (
    ("google/flan-t5-small", ""),
    ("google/flan-t5-base", ""),
    ("google/flan-t5-base", LORA),
    ("google/flan-t5-large", ""),
    ("google/flan-t5-xl", ""),
    ("google/flan-t5-xl", LORA),
    ("google/flan-t5-xxl", ""),
    ("google/flan-t5-xxl", LORA),
    ("HuggingFaceTB/SmolLM2-360M", ""),
    ("Qwen/Qwen3-0.6B", ""),
    ("Qwen/Qwen2.5-1.5B", ""),
    ("Qwen/Qwen2.5-1.5B", LORA),
    ("Qwen/Qwen3-4B", LORA),
    ("meta-llama/Llama-3.1-8B", LORA),
)
MEMORY_COLUMNS: tuple[tuple[int | None, int], ...] = ((None, 1), (1, 8), (2, 8), (3, 8), (3, 64))
SCALING_COLUMNS = (8, 16, 64)


def main() -> None:
    heads = ["no ZeRO, 1" if stage is None else f"ZeRO-{stage}, {n}" for stage, n in MEMORY_COLUMNS]
    header = [
        "backbone",
        "trained / all (M)",
        *heads,
        "micro-batch on 1",
        "hours an epoch, 1",
        *(f"speed kept, {n}" for n in SCALING_COLUMNS),
    ]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, lora in BACKBONES:
        config = load_config(PRESET, [f"model.backbone={name}", *([lora] if lora else [])])
        data = data_size(config, PRESET)
        print("| " + " | ".join(row(config, data, model_size(config, data), lora)) + " |")


def row(config: Config, data: DataSize, model: ModelSize, lora: str) -> list[str]:
    gigabytes = [f"{memory(config, model, data, stage, n).total / GB:.1f}" for stage, n in MEMORY_COLUMNS]
    hours = model.cost.flops * data.train_events / next(iter(ASSUMED_FLOPS.values())) / 3600
    stage = 2 if memory(config, model, data, 2, 8).total < 0.85 * GPU_MEMORY["H200"] else 3
    kept = [
        f"{worst:.0%} to {best:.0%}"
        for worst, best in (efficiency(config, model, stage, n) for n in SCALING_COLUMNS)
    ]
    fits = largest_micro_batch(config, model, data, None, 1, GPU_MEMORY["H200"])
    settings: Any = config.model
    name = settings.backbone + (", LoRA 16" if lora else "")
    return [
        name,
        f"{model.trainable / 1e6:,.0f} / {model.total / 1e6:,.0f}",
        *gigabytes,
        str(fits or "none"),
        f"{hours:.1f}",
        *kept,
    ]


if __name__ == "__main__":
    main()
