"""`gensr table --submit`: the missing cells as arrays of SLURM jobs: their training, then their evaluation,
each as soon as it has ended well. When all have ended, the same command without --submit writes the table."""

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError, RunError
from trainer.experiments import submit as jobs
from trainer.experiments.cells import SPLIT, Cell, is_done
from trainer.experiments.submit import INVALID_ENDS, Job, Machines, Submission, job_script
from trainer.experiments.table.plan import Plan, Request
from trainer.experiments.table.run import cells_of
from trainer.models.zoo import model_class
from trainer.runs.run_folder import RunFolder, read_json


def plan_submission(plan: Plan, machines: Machines, command: str) -> Submission:
    """Raises a GensrError for whatever would end a run at its start, for systems that are still to be tuned,
    for a cell whose job waits or runs already, and when nothing is missing. Account, partition and time limit
    are read by sbatch from SBATCH_ACCOUNT, SBATCH_PARTITION and SBATCH_TIMELIMIT."""
    request = plan.request
    cells = [
        cell
        for model in plan.configs
        for cell in cells_of(request, model, _tuned_settings(request, model))
        if not is_done(cell, request.candidates)
    ]
    if not cells:
        raise RunError(f"{request.out}: every run is done. Without --submit the command writes the table")
    return plan_cells(cells, request.out, request.candidates, request.events, machines, command)


def plan_cells(
    cells: Sequence[Cell], out: Path, candidates: Sequence[str], events: int, machines: Machines, command: str
) -> Submission:
    """The arrays of any cells, with their scripts and output below `out`."""
    lines = _check(cells, machines)
    array, gpu = {"array": f"0-{len(cells) - 1}"}, {"gpus-per-node": "1"} if machines.gpus_per_node else {}
    output = {"output": f"{out.resolve()}/logs/%x-%A_%a.out"}
    made: list[Job] = []
    for number, stage in enumerate([*_earlier(cells), cells], start=1):
        name = "train" if stage is cells else f"train-stage-{number}"
        words = [[str(run.settings_file), *run.training_overrides] for run in stage]
        own = {**machines.options, "array": f"0-{len(stage) - 1}", **output}
        # whatever came of the stage before: what cannot go on says so, and the others do
        after = f"afterany:{{{number - 2}}}" if number > 1 else ""
        made.append(Job(out / f"{name}.sbatch", job_script("train", words, own, machines, command), after))
    after = f"aftercorr:{{{len(made) - 1}}}"
    for kind in candidates:
        ranked = ["--split", SPLIT, "--candidates", kind, "--events", str(events), "--no-baselines"]
        words = [[str(cell.run_dir), *ranked] for cell in cells]
        text = job_script("evaluate", words, {**gpu, **array, **output}, machines, command)
        made.append(Job(out / f"evaluate-{kind}.sbatch", text, after, (INVALID_ENDS,)))
    out.joinpath("logs").mkdir(parents=True, exist_ok=True)  # SLURM makes no folders
    return Submission(made, [f"{len(cells)} runs", *lines], [cell.run_dir for cell in cells])


def _earlier(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The runs of all stages but the last that are still to be made, stage by stage."""
    stages: list[list[Cell]] = []
    for cell in cells:
        for place, run in enumerate(cell.runs[:-1]):
            if place == len(stages):
                stages.append([])
            if not RunFolder(run.run_dir).has_ended_well:
                stages[place].append(run)
    return [stage for stage in stages if stage]


def _tuned_settings(request: Request, model: str) -> dict[str, object]:
    if not request.trials_of(model):
        return {}
    if found := read_json(request.tuning_file(model)):
        return dict(found["settings"])
    raise ConfigError(f"--submit: {model} is still to be tuned. Run the command without --submit first")


def _check(cells: Sequence[Cell], machines: Machines) -> list[str]:
    """What `gensr train --dry-run` says of the last trained system."""
    lines: list[str] = []
    for cell in cells:
        if state := jobs.job_state(cell.run_dir):
            raise RunError(f"{cell.run_dir} has a job already: {state}. Wait for it, or end it with scancel")
    for model, cell in {cell.model: cell for cell in cells if model_class(cell.model).trained}.items():
        first = cell.runs[0]  # a later stage begins with a run that is not there yet
        lines = [f"{model}:", *jobs.checked(str(first.settings_file), first.training_overrides, machines)[1]]
    return lines
