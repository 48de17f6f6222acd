"""`gensr table --submit`: the missing cells as arrays of SLURM jobs: their training, then their evaluation,
each as soon as it has ended well. When all have ended, the same command without --submit writes the table."""

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError, RunError
from trainer.experiments import submit as jobs
from trainer.experiments.submit import INVALID_ENDS, Job, Machines, Submission, job_script
from trainer.experiments.table.cells import SPLIT, Cell, is_done
from trainer.experiments.table.plan import Plan, Request
from trainer.experiments.table.run import cells_of
from trainer.models.zoo import model_class
from trainer.runs.run_folder import read_json


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
    cells: Sequence[Cell],
    out: Path,
    candidates: Sequence[str],
    events: int,
    machines: Machines,
    command: str,
) -> Submission:
    """The arrays of any cells, with their scripts and output below `out`."""
    lines = _check(cells, machines)
    array, gpu = {"array": f"0-{len(cells) - 1}"}, {"gpus-per-node": "1"} if machines.gpus_per_node else {}
    output = {"output": f"{out.resolve()}/logs/%x-%A_%a.out"}
    words = [[str(cell.settings_file), f"run.dir={cell.run_dir}", *cell.words] for cell in cells]
    train = {**machines.options, **array, **output}
    made = [_job(out, "train", "train.sbatch", words, train, machines, command)]
    for kind in candidates:
        ranked = ["--split", SPLIT, "--candidates", kind, "--events", str(events), "--no-baselines"]
        own = {**gpu, **array, **output}
        runs = [[str(cell.run_dir), *ranked] for cell in cells]
        made.append(_job(out, f"evaluate-{kind}", "evaluate.sbatch", runs, own, machines, command))
    out.joinpath("logs").mkdir(parents=True, exist_ok=True)  # SLURM makes no folders
    return Submission(made, [f"{len(cells)} runs", *lines], [cell.run_dir for cell in cells])


def _job(
    out: Path,
    name: str,
    script: str,
    words: Sequence[Sequence[str]],
    own: dict[str, str],
    machines: Machines,
    command: str,
) -> Job:
    path = out / f"{name}.sbatch"
    text = job_script(script, words, own, [], machines.exports, command)
    return Job(path, text) if name == "train" else Job(path, text, "aftercorr:{0}", (INVALID_ENDS,))


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
        words = [f"run.dir={cell.run_dir}", *cell.words]
        lines = [f"{model}:", *jobs.checked(str(cell.settings_file), words, machines)[1]]
    return lines
