"""The report of a study: one HTML file, and its trials as CSV or Parquet."""

from momentum_tuner.report.files import check_ending
from momentum_tuner.report.page import PAGE_ENDINGS, write_report
from momentum_tuner.report.publication import Publication, prepare, publication
from momentum_tuner.report.trials import TABLE_ENDINGS, read_trials, trials_csv, write_trials

__all__ = [
    "PAGE_ENDINGS",
    "TABLE_ENDINGS",
    "Publication",
    "check_ending",
    "prepare",
    "publication",
    "read_trials",
    "trials_csv",
    "write_report",
    "write_trials",
]
