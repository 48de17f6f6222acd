"""`gensr analyse WHAT RUN… OUT`: the paper's analyses, offline, from run folders of any model.

Each is a file with measure() → what OUT/WHAT.json holds, and section() → pictures (PNG and SVG) and its part
of a page, both from that document alone.

mutual_information.py   Table 1
gradients.py            do the tasks' gradients conflict?
space.py                Figure 3
groups.py               runs by their settings: what the next three share
ablations.py            Figure 4
sensitivity.py          Figure 5
transfer.py             does one task help the other?
separability.py         the appendix' lemma, as an experiment; reads no run
"""

from trainer.experiments.analyses.run import ANALYSES, Options, analyse, load_section

__all__ = ["ANALYSES", "Options", "analyse", "load_section"]
