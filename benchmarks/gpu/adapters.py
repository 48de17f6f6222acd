"""LoRA on decoders of 1.5 and 8 billion parameters with random weights, made on the device; the first also in
4 bits, where bitsandbytes is there."""

import importlib.util
from typing import Any

import torch

from benchmarks.gpu import speed
from benchmarks.gpu.report import Report, failure
from benchmarks.gpu.task import Task
from trainer.models.backbones.families import SCRATCH_SIZES
from trainer.runtime.device import default_device, has_gpu

# Qwen2.5-1.5B and Llama-3.1-8B, from their published configurations
SHAPES: dict[str, dict[str, Any]] = {
    "1.5 B": dict(
        model_type="qwen2",
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "8 B": dict(
        model_type="llama",
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=False,
    ),
}
TINY = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
LORA = ("model.lora.rank=16", "model.prompt=compact", "run.precision=bf16")


def measure(task: Task, report: Report, what: str, backbone: str, *more: str) -> None:
    pairs = 20 if task.rehearse else 80
    for mode in ("train", "evaluate"):
        try:
            request = speed.request_of(
                task, mode, pairs, 1 if task.rehearse else 5, f"model.backbone={backbone}", *LORA, *more
            )
            found = speed.measure(request)
        except Exception as error:  # out of memory, or a library that refuses: the others go on
            report.note(f"{what}, {speed.NAME[mode]}", failure(error))
            continue
        report.add(f"{what}, {speed.NAME[mode]}", found["per_s"], speed.UNIT[mode])
        report.add(f"{what}, {speed.NAME[mode]}: memory", found["peak_memory_bytes"] / 1e9, "GB")


def run(task: Task, report: Report) -> None:
    for name, shape in SHAPES.items():
        size = name.replace(" ", "_")
        special = dict(pad_token_id=0, bos_token_id=0, eos_token_id=1)
        SCRATCH_SIZES[size] = {**shape, **special, **(TINY if task.rehearse else {})}
        measure(task, report, f"LoRA 16, {name}", f"scratch:{size}")
    if importlib.util.find_spec("bitsandbytes") is None:
        report.note("4 bits", "skipped: bitsandbytes is not installed")
    elif not has_gpu():
        report.note("4 bits", "skipped: no GPU")
    else:
        folder = task.work / "decoder"
        save_decoder(SHAPES["1.5 B"], str(folder))
        measure(task, report, "LoRA 16, 1.5 B, 4 bits", str(folder), "model.lora.four_bit=true")


def save_decoder(shape: dict[str, Any], folder: str) -> None:
    """Random weights in bf16, for from_pretrained: only that reads into 4 bits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(default_device()):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
