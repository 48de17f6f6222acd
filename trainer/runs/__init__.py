"""Everything in a run folder."""
