"""Which weights an evaluation is of, and whether training went on: RUN/model is the best so far at any
time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.evaluation.stored import evaluate_command
from trainer.runs.run_folder import RunFolder, describe_status, read_json


def evaluated_weights(run_dir: str | Path) -> dict[str, Any]:
    """{"model_step": optimizer steps that made RUN/model, "run_status": that of status.json}, which an
    evaluation's protocol holds; None where a run, an older one perhaps, does not say. A run without steps
    that began with another's weights adds "begun_with", their sha256."""
    run = RunFolder(run_dir)
    document = read_json(run.model / "model.json")
    stood = {"model_step": document.get("step"), "run_status": run.read_status().get("status")}
    return stood | ({"begun_with": document["begun_with"]} if "begun_with" in document else {})


def warnings_of(run_dir: str | Path, name: str, protocol: Mapping[str, Any]) -> list[str]:
    """What a reader of RUN/evaluation-NAME.json could get wrong: the run had not ended when it was made, or
    was trained on since. Nothing where the run does not say. protocol: of that file."""
    lines = []
    if unfinished := unfinished_line(run_dir, protocol.get("run_status"), protocol.get("model_step")):
        lines.append(f"warning: {unfinished}")
    if outdated := outdated_line(run_dir, name, protocol):
        lines.append(f"warning: {outdated}")
    return lines


def unfinished_line(run_dir: str | Path, status: Any, step: Any) -> str:
    """ "" for a run that had ended well."""
    if status in (None, "finished"):
        return ""
    how = describe_status(status)
    return f"{run_dir} is not finished (it {how}). This is its best model so far, of {_words(step)}"


def outdated_line(run_dir: str | Path, name: str, protocol: Mapping[str, Any]) -> str:
    """ "" where the evaluation is of the model that the run holds now."""
    then, now = protocol.get("model_step"), evaluated_weights(run_dir)["model_step"]
    if then is None or now is None or then == now:
        return ""
    return (
        f"{RunFolder(run_dir).evaluation(name)} is of {_words(then)}, RUN/model is now of "
        f"{_words(now)}. Evaluate again with: {evaluate_command(run_dir, name)}"
    )


def _words(step: Any) -> str:
    return f"step {step:,}" if isinstance(step, int) else "an unknown step"
