"""One analysis: measure, write OUT/WHAT.json, draw, write OUT/WHAT.html."""

import json
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.analysis.pages import Section, write_page
from trainer.errors import ConfigError, DataError
from trainer.experiments.analyses.options import Options
from trainer.runtime.files import write_text
from trainer.runtime.progress import Notify, silent

# what → what it is read for, in the order of a report
ANALYSES = {
    "mutual-information": "how much does the output say about the input? (Table 1)",
    "gradients": "do search and recommendation pull shared parameters apart?",
    "space": "do both tasks share a space? (Figure 3)",
    "ablations": "is each part needed? (Figure 4)",
    "sensitivity": "how do settings such as τ and λ act? (Figure 5)",
    "transfer": "does one task help the other?",
    "separability": "Lemma 5.1 as an experiment; takes no RUN",
}
AS_THEY_ARE = Options()


def analyse(
    what: str,
    runs: Sequence[str | Path],
    out: str | Path,
    options: Options = AS_THEY_ARE,
    notify: Notify = silent,
) -> dict[str, Any]:
    """Writes OUT/WHAT.json, OUT/WHAT*.{png,svg} and OUT/WHAT.html → the document.

    Raises ConfigError for an unknown analysis, RunError or DataError for runs that it cannot be made of.
    """
    module, folder = _module(what), Path(out)
    document = module.measure([Path(run) for run in runs], options, notify)
    folder.mkdir(parents=True, exist_ok=True)
    if arrays := document.pop("arrays", None):
        module.save(arrays, folder)
    document = {"what": what, "split": options.split, "seed": options.seed, **_finite(document)}
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    write_text(_file(what, folder), text + "\n")
    section = module.section(document, folder)
    write_page(folder / f"{what}.html", section.title, f"gensr analyse {what}", [section])
    return document


def load_section(what: str, folder: Path) -> Section | None:
    """The part of a page from what analyse() wrote, drawn anew; None where it wrote nothing."""
    path = _file(what, folder)
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        section: Section = _module(what).section(document, folder)
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} is not what gensr analyse {what} writes: run it again") from error
    return section


def _file(what: str, folder: Path) -> Path:
    return folder / f"{what}.json"


def _module(what: str) -> Any:
    if what not in ANALYSES:
        raise ConfigError(f"there is no analysis {what}. There are: {', '.join(ANALYSES)}")
    return import_module(f"trainer.experiments.analyses.{what.replace('-', '_')}")


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them. Tuples become lists."""
    if isinstance(value, dict):
        return {key: _finite(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
