"""The story of `gensr paper`. Every step is skipped where it is done, so the same command goes on."""

import json
from pathlib import Path

from data_shards.simulate.oracle import OPTIMUM_FILE
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, DataError, GensrError, RunError
from trainer.evaluation.optimum import write_optimum
from trainer.experiments.analyses import Options, analyse, load_section
from trainer.experiments.cells import first_line, is_done, run_cells
from trainer.experiments.paper.page import write_paper_page
from trainer.experiments.paper.plan import (
    VARIANT_CANDIDATES,
    PaperPlan,
    PaperRequest,
    keep,
    make_plan,
    size_of_data,
)
from trainer.experiments.pool import environments, interruptible
from trainer.experiments.submit import Machines, Submission
from trainer.experiments.table import make_table
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runtime.files import write_text
from trainer.runtime.progress import Notify, StageLines

RIVAL = "unisar"  # the discriminative model of Table 1 and Figure 3


def make_paper(request: PaperRequest, notify: Notify) -> Path:
    """DIR/report.html → its path. What fails (a run, an analysis) is named on the page; the rest goes on.
    Raises a GensrError where there is no data to work on, KeyboardInterrupt when it is stopped."""
    with interruptible():
        request.recipe  # noqa: B018  (an unknown name is said before anything is fetched)
        environments(request.jobs)  # so are too many jobs
        prepare_data(request, notify)
        plan = keep(make_plan(request, size_of_data(request)))
        errors: dict[str, str] = {}
        if request.finished:
            notify(f"budget {plan.budget.name}: {request.finished.out} has {len(plan.systems)} systems")
            request.finished.copy_to(request.out / "table")
        else:
            notify(f"budget {plan.budget.name}: table of {len(plan.systems)} systems")
            make_table(plan.table, notify)
        run_variants(plan, errors, notify)
        run_analyses(plan, errors, notify)
        return write_paper_page(plan, errors)


def prepare_data(request: PaperRequest, notify: Notify) -> None:
    """Raw logs, prepared folder, CF table: what is missing of them."""
    from data_shards.prepare import prepare
    from trainer.cf.build import train_cf

    recipe = request.recipe
    if request.finished:
        request.finished.check(request.data_dir, PreparedFolder.at(request.data_dir).manifest.hash)
        return
    if not (request.data_dir / "manifest.json").is_file():
        if request.data is not None:
            raise ConfigError(f"--data {request.data} is not a prepared folder. Make one with: gensr prepare")
        _raw(request, notify)
        notify(f"prepare {request.data_dir}")
        words = recipe.get("prepare", ())
        prepare(recipe["source"], request.raw_dir, request.data_dir, words, progress=StageLines())
    if "simulate" in recipe and request.data is None and not (request.data_dir / OPTIMUM_FILE).is_file():
        notify("planted optimum")
        write_optimum(PreparedFolder.at(request.data_dir), request.raw_dir)
    if not (request.data_dir / "cf" / "lightgcn.safetensors").is_file():
        notify("CF table")
        train_cf(request.data_dir, recipe.get("cf", ()), progress=notify)


def _raw(request: PaperRequest, notify: Notify) -> None:
    recipe = request.recipe
    if request.raw is not None:
        return
    if "simulate" in recipe:
        from data_shards.simulate import simulate

        if not (request.raw_dir / "simulated.json").is_file():
            notify(f"simulate {request.raw_dir}")
            simulate(request.raw_dir, **recipe["simulate"], progress=StageLines())
    elif "download" in recipe:
        from data_shards.download import download

        notify(f"download {recipe['download']} into {request.raw_dir}")
        download(recipe["download"], request.raw_dir, progress=StageLines())
    else:
        raise ConfigError(
            f"gensr paper {request.name} downloads nothing: give the folder of raw files with --raw, or a "
            "prepared folder with --data"
        )


def run_variants(plan: PaperPlan, errors: dict[str, str], notify: Notify) -> None:
    """GenSR with other settings, on sampled candidates. A failure goes into `errors`."""
    cells = {cell.name: cell for cell in plan.cells()}
    errors.update(run_cells(cells, VARIANT_CANDIDATES, plan.budget.events, plan.request.jobs, notify))


def run_analyses(plan: PaperPlan, errors: dict[str, str], notify: Notify) -> None:
    """Into DIR/analyses. One whose runs are the same as when it was made is not made again."""
    options = Options(num_events=plan.budget.events)
    for what, runs in runs_of(plan).items():
        if what != "separability" and not runs:
            continue
        stamp = plan.request.analyses / f"{what}.runs.json"
        wanted = {"runs": [[str(run), _age(run)] for run in runs], "events": options.num_events}
        if read_json(stamp) == json.loads(json.dumps(wanted)) and _is_there(what, plan.request.analyses):
            continue
        notify(f"analysis: {what}")
        try:
            analyse(what, runs, plan.request.analyses, options, notify)
        except GensrError as error:
            errors[what] = first_line(error)
            notify(f"  {what} failed: {errors[what]}")
            continue
        write_text(stamp, json.dumps(wanted) + "\n")


def _is_there(what: str, analyses: Path) -> bool:
    """Its document, which somebody may have removed or damaged."""
    try:
        return load_section(what, analyses) is not None
    except DataError:
        return False


def _age(run: Path) -> int:
    """When a run was evaluated: its analyses are older or newer than that."""
    return RunFolder(run).evaluation("test").stat().st_mtime_ns


def runs_of(plan: PaperPlan) -> dict[str, list[Path]]:
    """Analysis → finished runs, the reference first."""
    own = [run for run in plan.gensr_runs(plan.budget.seeds) if _is_evaluated(run)]
    rival = plan.table.runs_of(RIVAL) / "seed-0"
    both = [run for run in (rival, *own[:1]) if _is_evaluated(run)]
    found: dict[str, list[Path]] = {"mutual-information": both, "space": both, "gradients": both}
    base = own[: plan.budget.variant_seeds]
    compared: dict[str, tuple[str, ...]] = {
        "ablations": ("ablations", "ours"),
        "sensitivity": ("sensitivity",),
        "transfer": ("transfer",),
    }
    for what, groups in compared.items():
        others = [cell.run_dir for cell in plan.cells(*groups) if is_done(cell, VARIANT_CANDIDATES)]
        if what == "sensitivity":  # λ = 0 is an ablation, too, and made once
            others += _shared(plan)
        found[what] = [*base, *others] if base and others else []
    return {**found, "separability": []}


def _shared(plan: PaperPlan) -> list[Path]:
    """Runs of the ablations that are points of the grid."""
    names = {v.name for v in plan.variants if v.overrides == ("model.contrastive_weight=0.0",)}
    if not any(variant.analysis == "sensitivity" for variant in plan.variants):
        return []
    return [
        cell.run_dir
        for cell in plan.cells("ablations")
        if cell.run_dir.parent.name in names and is_done(cell, VARIANT_CANDIDATES)
    ]


def _is_evaluated(run: Path) -> bool:
    return RunFolder(run).evaluation("test").is_file()


def submit_paper(request: PaperRequest, gpus_per_node: int, command: str, notify: Notify) -> list[Submission]:
    """Prepares the data here, then submits every missing run → the submissions, table first. Without --submit
    the same command, when all jobs have ended, makes analyses and page."""
    from trainer.experiments.table.plan import make_plan as plan_table
    from trainer.experiments.table.submission import plan_cells, plan_submission

    prepare_data(request, notify)
    plan = keep(make_plan(request, size_of_data(request)))
    machines = Machines(gpus_per_node=gpus_per_node)
    missing = [cell for cell in plan.cells() if not is_done(cell, VARIANT_CANDIDATES)]
    found = []
    if not request.finished:
        try:
            found.append(plan_submission(plan_table(plan.table), machines, command))
        except RunError as error:  # every run of the table is done
            notify(str(error))
    if missing:
        variants = request.out / "variants"
        found.append(plan_cells(missing, variants, VARIANT_CANDIDATES, plan.budget.events, machines, command))
    return found
