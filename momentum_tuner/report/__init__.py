"""The report of a study: one HTML file, and its trials as CSV or Parquet."""

from momentum_tuner.report.page import write_report
from momentum_tuner.report.publication import Publication, prepare, publication
from momentum_tuner.report.trials import trials_csv, write_trials

__all__ = ["Publication", "prepare", "publication", "trials_csv", "write_report", "write_trials"]
