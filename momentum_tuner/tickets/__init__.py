"""Who may run which trial: studies, tickets and workers in the database."""

from momentum_tuner.tickets.progress import (
    BestSetting,
    OptimizerProgress,
    StudyProgress,
    WorkerProgress,
    best_settings,
    study_progress,
)
from momentum_tuner.tickets.queue import (
    Claim,
    Result,
    begin_finish,
    claim,
    end_finish,
    epoch_record,
    give_back,
    read_epochs,
    record_epochs,
    set_trials,
    with_trial,
)
from momentum_tuner.tickets.studies import (
    StudyRecord,
    delete_study,
    find_study,
    finish_study,
    list_studies,
    submit_study,
)
from momentum_tuner.tickets.workers import (
    Heartbeat,
    WorkerIdentity,
    assign_worker,
    register_worker,
    stop_worker,
)

__all__ = [
    "BestSetting",
    "Claim",
    "Heartbeat",
    "OptimizerProgress",
    "Result",
    "StudyProgress",
    "StudyRecord",
    "WorkerIdentity",
    "WorkerProgress",
    "assign_worker",
    "begin_finish",
    "best_settings",
    "claim",
    "delete_study",
    "end_finish",
    "epoch_record",
    "find_study",
    "finish_study",
    "give_back",
    "list_studies",
    "read_epochs",
    "record_epochs",
    "register_worker",
    "set_trials",
    "stop_worker",
    "study_progress",
    "submit_study",
    "with_trial",
]
