"""`gensr report RUN`: RUN/report/report.html, one file that loads nothing, beside its pictures.

asked.py     what the run's model says about some test events: calibration, examples
sections.py  a section of the page each
write.py     the page
"""

from trainer.analysis.report.write import write_report

__all__ = ["write_report"]
