"""RUN → RUN/report/report.html."""

from pathlib import Path

from trainer.analysis.figures import read_records
from trainer.analysis.pages import write_page
from trainer.analysis.report import sections
from trainer.analysis.report.asked import ask
from trainer.errors import GensrError, RunError
from trainer.models.zoo import model_class
from trainer.runs.run_folder import RunFolder


def write_report(run_dir: str | Path, num_events: int = 200) -> Path:
    """The page, RUN/report/asked.json with what the model was asked, and pictures as PNG and SVG → the page's
    path.

    num_events: of each task, that the model is asked about; 0 leaves calibration and examples out. Where the
    model or its data is not at hand the page says so. Raises RunError for a folder that holds no run.
    """
    run = RunFolder(run_dir)
    config = run.read_config()
    records = read_records(run_dir) if run.metrics.is_file() else []
    run.report.mkdir(parents=True, exist_ok=True)
    title = model_class(config.model.name).title
    found = [*sections.results(run), *sections.training(run, records), *sections.segments(run)]
    if num_events:
        try:
            asked = ask(run_dir, num_events)
        except (GensrError, OSError) as error:
            found += sections.left_out(str(error))
        else:
            sections.write_asked(asked, run.report / "asked.json")
            found += [*sections.calibration(run, asked), *sections.examples(asked)]
    if not found:
        raise RunError(f"{run_dir} has neither trained nor been evaluated: there is nothing to report")
    found += sections.provenance(run)
    lead = f"{run_dir}: {title} on {Path(config.data.dir).name}, seed {config.run.seed}"
    return write_page(run.report / "report.html", f"{title}: run {Path(run_dir).name}", lead, found)
