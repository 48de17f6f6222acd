"""Every preset passes --dry-run, and its header says what a user needs. ds_configs keep "auto" for each
number the run owns."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import ds_configs
from data_shards.settings import read_yaml
from tests.tiny_folder import make_tiny_folder
from trainer.configs import load_config, preset_names, preset_path
from trainer.errors import ConfigError, EnvironmentProblem
from trainer.experiments.costs import read_speeds
from trainer.runtime.launch import (
    Launch,
    filled_deepspeed_config,
    make_accelerator,
    read_deepspeed_json,
    read_launch,
)
from trainer.training.plan import check_stage, dry_run
from trainer.training.schedule import make_schedule

PRESETS = [
    "amazon_kindle_flan_t5_base",
    "demo",
    "kuaisar_flan_t5_base",
    "kuaisar_flan_t5_xl_lora",
    "scientific_paper",
    "scientific_small",
]
JSONS = [name for name in ds_configs.names() if name.endswith(".json")]
YAMLS = [name for name in ds_configs.names() if name.endswith(".yaml")]


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


def test_the_promised_presets_are_there() -> None:
    assert set(PRESETS) <= set(preset_names())


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_passes_dry_run_without_data_or_hub(preset: str) -> None:
    plan = dry_run(load_config(preset), preset)
    text = "\n".join(plan.lines)
    assert "documented in preset" in text and "ZeRO-3" in text and "memory" in text
    assert plan.facts["schedule"]["num_steps"] > 100 and plan.facts["seconds"]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_fits_so_many_processes(preset: str, world_size: int) -> None:
    schedule = make_schedule(load_config(preset, [], world_size), 10_000, world_size)
    assert schedule.micro_batch_size * schedule.grad_accum_steps * world_size == schedule.global_batch_size


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_header_has_launch_line_memory_time_and_sizes(preset: str) -> None:
    header = header_of(preset)
    for part in (f"# {preset}:", "# launch ", "# memory ", "# time ", "# sizes: "):
        assert part in header, part
    assert re.search(rf"trainer train {preset} |make demo", header)
    for named in re.findall(r"ds_configs/(\S+\.yaml)|--deepspeed_config_file (\S+)", header):
        assert (named[0] or named[1]) in ds_configs.names()


def header_of(preset: str) -> str:
    path = preset_path(preset)
    assert path is not None
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


def test_headers_say_the_speed_that_plans_are_made_of() -> None:
    for name, speed in read_speeds()["models"].items():
        if name in preset_names() and not speed.get("preset"):
            assert f"# time     {speed['events_per_s']:,} events/s on one" in header_of(name), name


@pytest.mark.parametrize("preset", ["demo", "scientific_small"])
def test_dry_run_reads_a_prepared_folder(preset: str, tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path / "data")
    plan = dry_run(load_config(preset, [f"data.dir={folder}"]), preset)
    assert plan.facts["data"]["train_events"] == 96 and plan.facts["data"]["items"] == 130
    assert "largest calculated to fit: the whole batch on" in "\n".join(plan.lines)


def test_dry_run_fits_eight_gpus_and_two_nodes() -> None:
    config = load_config("kuaisar_flan_t5_base")
    one, node, nodes = (
        dry_run(config, "kuaisar_flan_t5_base", launch)
        for launch in (Launch(), *map(launch_of_yaml, YAMLS_OF_CLUSTERS))
    )
    assert (node.facts["launch"]["world_size"], nodes.facts["launch"]["world_size"]) == (8, 16)
    assert "2 nodes" in "\n".join(nodes.lines) and "ZeRO-2" in "\n".join(nodes.lines)
    assert one.facts["schedule"]["num_steps"] == nodes.facts["schedule"]["num_steps"], (
        "the global batch does not depend on the launch"
    )
    assert one.facts["memory_bytes"]["total"] > node.facts["memory_bytes"]["total"]


YAMLS_OF_CLUSTERS = ("accelerate_gpu_8.yaml", "accelerate_multinode.yaml")

# ---- ds_configs --------------------------------------------------------------------------------------------


def test_the_promised_files_are_there() -> None:
    wanted = {f"zero{stage}.json" for stage in range(4)} | {"zero2_offload.json", "zero3_offload.json"}
    wanted |= {
        f"accelerate_{name}.yaml" for name in ("cpu_1", "cpu_2", "gpu_1", "gpu_1_zero2", "gpu_8", "multinode")
    }
    assert wanted <= set(ds_configs.names())
    with pytest.raises(FileNotFoundError, match=r"zero2\.json"):
        ds_configs.path("zero9.json")


@pytest.mark.parametrize("name", JSONS)
def test_json_owns_no_number_of_the_run(name: str) -> None:
    document = read_deepspeed_json(ds_configs.path(name))
    assert str(document["zero_optimization"]["stage"]) in name
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert document[key] == "auto"
    config = load_config(
        None,
        [
            "optim.global_batch_size=64",
            "optim.micro_batch_size=8",
            "run.precision=bf16",
            "optim.grad_clip=0.5",
        ],
    )
    filled = filled_deepspeed_config(document, config, grad_accum_steps=4, where=name)
    assert (
        filled["train_batch_size"],
        filled["train_micro_batch_size_per_gpu"],
        filled["gradient_accumulation_steps"],
    ) == (64, 8, 4)
    assert filled["gradient_clipping"] == 0.5 and filled["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
    }
    assert '"auto"' not in json.dumps(filled)
    assert document["train_batch_size"] == "auto", "the document itself is left alone"


def test_a_conflict_shows_both_values() -> None:
    document = {
        **read_deepspeed_json(ds_configs.path("zero2.json")),
        "train_batch_size": 17,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam"},
    }
    with pytest.raises(ConfigError) as error:
        filled_deepspeed_config(document, load_config(None), 1, "mine.json")
    text = str(error.value)
    assert (
        "mine.json" in text
        and "train_batch_size: 17 in the file, 64 in the run (optim.global_batch_size)" in text
    )
    assert "bf16.enabled: True in the file" in text and "optimizer: given in the file" in text


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_is_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = ds_configs.path(name)
    loaded = load_config_from_file(str(path))  # raises on an unknown key
    document = yaml.safe_load(path.read_text())
    assert loaded.num_processes == document["num_processes"]
    assert "mixed_precision" not in document, "run.precision decides"
    if document["distributed_type"] == "DEEPSPEED":
        assert not document.get("use_cpu"), "accelerate would drop DeepSpeed silently"
        assert document["deepspeed_config"]["deepspeed_config_file"] in ds_configs.names()
    assert "accelerate launch --config_file ds_configs/" in path.read_text()


@pytest.mark.parametrize(
    ("name", "visible"),
    [("accelerate_cpu_2.yaml", "-1"), ("accelerate_gpu_1_zero2.yaml", "3"), ("accelerate_gpu_8.yaml", "3")],
)
def test_a_launch_file_for_cpus_hides_gpus_and_the_others_leave_them_as_they_are(
    name: str, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    args = launch_command_parser().parse_args(["--config_file", str(ds_configs.path(name)), "-m", "trainer"])
    args, _, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(args)
    assert environment["CUDA_VISIBLE_DEVICES"] == visible


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        EnvironmentProblem, match=r"Process 1 of this node has no GPU: 1 can be seen.*CUDA_VISIBLE_DEVICES="
    ):
        make_accelerator(
            load_config(None),
            Launch(world_size=2, rank=1, local_rank=1, local_world_size=2, launched=True),
            1,
        )


@pytest.mark.parametrize(
    ("environment", "ends"),
    [
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero3.json"}, "zero3.json"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1.json"),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "zero2_offload.json",
        ),
    ],
)
def test_the_launcher_names_the_deepspeed_file(
    environment: dict[str, str], ends: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # a bare name works from any folder
    for key, value in {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        **environment,
    }.items():
        monkeypatch.setenv(key, value)
    launch = read_launch()
    assert launch.deepspeed_file == str(ds_configs.path(ends)) and launch.zero_stage == int(ends[4])
    assert (launch.world_size, launch.rank, launch.num_nodes) == (4, 3, 2)


def test_an_unknown_deepspeed_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero7.json")
    with pytest.raises(ConfigError, match=r"zero7\.json.*zero0\.json"):
        read_launch()


@pytest.mark.parametrize("key", ["model.compile", "model.lora.four_bit"])
def test_what_zero3_cannot_do_is_refused(key: str) -> None:
    config = load_config(None, [f"{key}=true"])
    with pytest.raises(ConfigError, match=f"{key}=true is not supported under ZeRO-3"):
        check_stage(config, Launch(deepspeed_file=str(ds_configs.path("zero3.json"))))
    check_stage(config, Launch(deepspeed_file=str(ds_configs.path("zero2.json"))))


# ---- launch lines that are documented ----------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "ds_configs").glob("*.md"),
    *(ROOT / "slurm").glob("*.md"),
    *(ROOT / "trainer").rglob("*.md"),
    *(ROOT / "trainer").rglob("*.yaml"),
    *(ROOT / "trainer" / "cli").glob("*.py"),
)
LAUNCHES = re.compile(r"(?:accelerate launch (?:.*?) -m trainer train|gensr submit) .*")


def documented_launches() -> list[tuple[str, str]]:
    """(file, line) of every `accelerate launch … -m trainer train PRESET …` and `gensr submit PRESET …`."""
    found = []
    for path in DOCUMENTS:
        text = re.sub(r"\\\n#?\s*", "", path.read_text(encoding="utf-8"))
        found += [(path.name, match[0]) for match in map(LAUNCHES.search, text.splitlines()) if match]
    return [(name, line) for name, line in found if preset_of(line)]


def preset_of(line: str) -> str:
    words = re.split(r"[\s`\"]+", line.partition(" -m trainer train ")[2] or line.partition(" submit ")[2])
    return next((word for word in words if word in preset_names()), "")


def world_size_of(line: str) -> int:
    def number(option: str) -> int:
        given = re.search(rf"--{option} (\d+)", line)
        return int(given[1]) if given else 0

    if "gensr submit" in line:
        return max(1, number("nodes")) * max(1, number("gpus-per-node"))
    file = re.search(r"--config_file (\S+)", line)
    assert file, line
    return launch_of_yaml(file[1], number("num_processes")).world_size


@pytest.mark.parametrize(("file", "line"), documented_launches())
def test_a_documented_launch_is_accepted(file: str, line: str) -> None:
    """The preset's batches fit the processes of the line."""
    sizes = re.findall(r"optim\.\w+=\d+", line)
    schedule = make_schedule(
        load_config(preset_of(line), sizes, world_size_of(line)), 10_000, world_size_of(line)
    )
    assert schedule.world_size == world_size_of(line)


def test_documented_launches_are_found() -> None:
    worlds = {world_size_of(line) for _, line in documented_launches()}
    assert {1, 2, 8, 16, 32} <= worlds
