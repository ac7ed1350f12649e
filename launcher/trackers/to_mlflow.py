"""A run in MLflow, on a server or in a database."""

import os
import re
import time
from typing import Any

from launcher.errors import RecipeError
from launcher.report.points import Point
from launcher.trackers import About, Status, need

_ENDS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_METRICS, _PARAMETERS, _LONGEST = 1000, 100, 5000
"""MLflow's limits of one request, and of a value."""
_NOT_IN_A_NAME = re.compile(r"[^\w./ :-]")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# A server that is not there is told soon, and asked again later. No usage data are sent, unless the user wants it.
_QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MLflow:
    """Sends points as metrics named `stage/name`, each at its stage's step."""

    def __init__(self, asked: Any, about: About) -> None:
        for name, value in _QUICK.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.asked, self.about = asked, about
        self.client = MlflowClient(tracking_uri=asked.uri or os.environ["MLFLOW_TRACKING_URI"])
        self.id = ""

    def begin(self, known: str | None) -> str:
        """Go on with a run, or make one with all parameters and tags."""
        if known is not None and self._is_there(known):
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return known
        experiment = self.client.get_experiment_by_name(self.asked.experiment)
        place = experiment.experiment_id if experiment else self._new_experiment()
        run = self.client.create_run(place, run_name=self.about.name, tags=self.about.tags)
        self.id = run.info.run_id
        self._tell_parameters()
        return self.id

    def send(self, points: list[Point]) -> None:
        """Send points; what happened goes into the tag `last_event`."""
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(_name(f"{point.stage}/{name}"), value, int(point.time_s * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for i in range(0, len(metrics), _METRICS):
            self.client.log_batch(self.id, metrics=metrics[i : i + _METRICS], synchronous=True)
        if remarks := [point for point in points if point.remark]:
            text = f"{remarks[-1].stage} {remarks[-1].step}: {remarks[-1].remark}"
            tag = RunTag("last_event", text[:_LONGEST])
            self.client.log_batch(self.id, tags=[tag], synchronous=True)

    def end(self, status: Status, final: dict[str, float]) -> None:
        """Send the last numbers as metrics `final.…`, and the run's status."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(_name(f"final.{name}"), value, now_ms, 0) for name, value in final.items()]
        for i in range(0, len(metrics), _METRICS):
            self.client.log_batch(self.id, metrics=metrics[i : i + _METRICS], synchronous=True)
        if status in _ENDS:
            self.client.set_terminated(self.id, _ENDS[status])

    def _is_there(self, known: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(known).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False  # Somebody has deleted it: the record is sent once more, to a new one.
            raise

    def _new_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.create_experiment(self.asked.experiment))
        except MlflowException:
            # Another run has made it meanwhile.
            found = self.client.get_experiment_by_name(self.asked.experiment)
            if found is None:
                raise
            return str(found.experiment_id)

    def _tell_parameters(self) -> None:
        from mlflow.entities import Param

        each = [Param(_name(name), str(value)[:_LONGEST]) for name, value in self.about.parameters.items()]
        for i in range(0, len(each), _PARAMETERS):
            self.client.log_batch(self.id, params=each[i : i + _PARAMETERS], synchronous=True)


def _name(text: str) -> str:
    """A name as MLflow takes it: a column or a metric may be called anything."""
    return _NOT_IN_A_NAME.sub("_", text)


def check(asked: Any) -> None:
    """Refuse a tracker that does not know where to write.

    Raises:
        RecipeError: no uri, or a database without the library for it.
    """
    uri = asked.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise RecipeError("trackers: mlflow has no uri: give it one, or export MLFLOW_TRACKING_URI")
    if uri.startswith(_DATABASES):
        need("sqlalchemy", "sqlalchemy alembic", "trackers: what mlflow needs for a database")


create = MLflow
