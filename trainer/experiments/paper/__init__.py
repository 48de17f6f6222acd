"""`gensr paper NAME --out DIR`: the paper's whole evaluation on one data set, as one command and one page.

recipes.yaml  the data sets, the systems, the variants of GenSR; recipes.py reads it
budget.py     minutes → seeds, systems, grid, epochs; what that costs in trust
finished.py   a table that is there, for --table
plan.py       the runs, as arguments and cells of a table
run.py        the story: download → prepare → CF → table → variants → analyses → page
page.py       DIR/report.html
"""

from trainer.experiments.paper.finished import FinishedTable
from trainer.experiments.paper.plan import PaperRequest, dry_run
from trainer.experiments.paper.run import make_paper

__all__ = ["FinishedTable", "PaperRequest", "dry_run", "make_paper"]
