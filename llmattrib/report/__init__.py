"""The report of a run: everything that was measured, on one page."""
