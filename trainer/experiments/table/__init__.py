"""`gensr table`: every system of the zoo on one prepared folder, trained, tuned, evaluated and compared.

plan.py        what was asked for, and TABLE/settings/MODEL.yaml: each system's settings
budget.py      minutes → each system's epochs, from ../costs.py
tuning.py      the same number of trials for each trained system
results.py     run folders → table.json
render.py      table.json → table.md, table.csv, table.html
run.py         the story
submission.py  its runs as arrays of SLURM jobs
"""

from trainer.experiments.table.plan import Request, dry_run
from trainer.experiments.table.run import make_table

__all__ = ["Request", "dry_run", "make_table"]
