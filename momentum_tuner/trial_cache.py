"""Optuna's trials as a worker reads them: anew from the database once per batch of trials, not once per trial."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial


class TrialCache(_CachedStorage):
    """Optuna's cache of finished trials, which within a batch keeps those that run too.

    Whoever asks for a trial or prunes one wants all trials of its study, and those that run are read from the database
    each time: for a batch of trials that grows with its square.

    Args:
        backend: the storage.
    """

    def __init__(self, backend: optuna.storages.RDBStorage) -> None:
        super().__init__(backend)
        self._read: set[int] | None = None

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Meanwhile what others write of a study is seen as it was when its trials were first wanted."""
        before, self._read = self._read, set()
        try:
            yield
        finally:
            self._read = before

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        if self._read is not None and study_id in self._read:
            return
        super()._read_trials_from_remote_storage(study_id)
        if self._read is not None:
            self._read.add(study_id)

    def _keep(self, trial_id: int, section: str, name: Any, value: Any) -> None:
        """Add what was written to the cached trial, if it is kept in this batch.

        It becomes another object: who was given the trial before goes on with what it was, as from the database.
        """
        known = self._known(trial_id)
        if known is not None:
            changed = copy.copy(known)
            setattr(changed, section, {**getattr(changed, section), name: value})
            self._studies[self._trial_id_to_study_id_and_number[trial_id][0]].trials[known.number] = changed

    def _known(self, trial_id: int) -> FrozenTrial | None:
        """The cached trial, if it is kept in this batch."""
        if not self._read or trial_id not in self._trial_id_to_study_id_and_number:
            return None
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        return self._studies[study_id].trials.get(number) if study_id in self._read else None

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """The trial; in a batch as it is kept. That others have finished it meanwhile, the next write finds out."""
        known = self._known(trial_id)
        return super().get_trial(trial_id) if known is None else known

    def get_trial_number_from_id(self, trial_id: int) -> int:
        """Its number, which never changes."""
        if trial_id in self._trial_id_to_study_id_and_number:
            return self._trial_id_to_study_id_and_number[trial_id][1]
        return super().get_trial_number_from_id(trial_id)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Write it, and keep what was written."""
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._keep(trial_id, "distributions", param_name, distribution)
        self._keep(trial_id, "params", param_name, distribution.to_external_repr(param_value_internal))

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Write it, and keep what was written."""
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._keep(trial_id, "intermediate_values", step, intermediate_value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write it, and keep what was written."""
        super().set_trial_system_attr(trial_id, key, value)
        self._keep(trial_id, "system_attrs", key, value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write it, and keep what was written."""
        super().set_trial_user_attr(trial_id, key, value)
        self._keep(trial_id, "user_attrs", key, value)
