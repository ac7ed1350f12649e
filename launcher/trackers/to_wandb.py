"""A run in Weights & Biases, sent at once or kept for `wandb sync`."""

import os
from typing import Any

from launcher.report.points import Point
from launcher.trackers import About, Status

_LONGEST = 64
"""Characters of a tag."""


class WandB:
    """Logs points as `stage/name` over `stage/step`: W&B's own step only counts what was logged."""

    def __init__(self, asked: Any, about: About) -> None:
        # Errors inside W&B's client are not reported to its makers, unless the user wants it.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.asked, self.about = asked, about
        self.run: Any = None
        self.stages: set[str] = set()

    def begin(self, known: str | None) -> str:
        """Go on with a run, or make one."""
        import wandb

        self.run = wandb.init(
            id=known,
            # Offline, W&B cannot look whether there is such a run, and says so: the id alone joins them in `sync`.
            resume="allow" if known and self.asked.mode == "online" else None,
            mode=self.asked.mode,
            dir=self.about.run_dir,
            project=self.asked.project,
            entity=self.asked.entity,
            group=self.asked.group,
            name=self.about.name,
            tags=[f"{name}:{value}"[:_LONGEST] for name, value in self.asked.tags.items()],
            config=self.about.parameters | self.about.tags,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=30, x_disable_stats=True, disable_code=True
            ),
        )
        return str(self.run.id)

    def send(self, points: list[Point]) -> None:
        """Log points; what happened goes into the summary as `last_event`."""
        for point in points:
            if point.stage not in self.stages:
                self.stages.add(point.stage)
                self.run.define_metric(f"{point.stage}/*", step_metric=f"{point.stage}/step")
            if point.values:
                values = {f"{point.stage}/{name}": value for name, value in point.values.items()}
                self.run.log(values | {f"{point.stage}/step": point.step, "time": point.time_s})
            if point.remark:
                self.run.summary["last_event"] = f"{point.stage} {point.step}: {point.remark}"

    def end(self, status: Status, final: dict[str, float]) -> None:
        """Put the last numbers into the summary; wait until all is sent."""
        self.run.summary.update({"ended": status} | {f"final.{name}": each for name, each in final.items()})
        self.run.finish(exit_code=0 if status == "done" else 1)


create = WandB
