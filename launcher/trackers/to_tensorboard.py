"""TensorBoard's event files, a folder for each stage, so that one chart shows the stages above each other."""

import json
import time
from pathlib import Path
from typing import Any

from launcher.report.points import Point
from launcher.trackers import About, Status

_SECTIONS = {"eval", "checkpoint", "again"}


class TensorBoard:
    """Writes event files as TensorBoard's own writer does; needs neither TensorFlow nor torch."""

    def __init__(self, asked: Any, about: About) -> None:
        self.about = about
        self.is_elsewhere = asked.folder is not None
        self.folder = Path(asked.folder) / about.name if asked.folder else about.run_dir / "tensorboard"
        self.writers: dict[str, Any] = {}

    def begin(self, known: str | None) -> str:
        """Begin new files beside those that are there: TensorBoard reads all of a folder's as one."""
        if known is None:
            self._take_a_new_folder()
            self._text("", 0, "recipe and ds config", _table(self.about.parameters))
            self._text("", 0, "tags", _table(self.about.tags))
        elif self.is_elsewhere:
            self.folder = Path(known)
        # The run directory may be moved; what lies in it is the same.
        return str(self.folder) if self.is_elsewhere else "tensorboard"

    def _take_a_new_folder(self) -> None:
        """Where another run of this name has been, perhaps before --fresh, its curves are not to be drawn over."""
        number, name = 1, self.folder.name
        while self.is_elsewhere and self.folder.exists():
            number += 1
            self.folder = self.folder.with_name(f"{name}.{number}")

    def send(self, points: list[Point]) -> None:
        """Write points, and flush."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        for point in points:
            values = [
                summary_pb2.Summary.Value(tag=_tag(name), simple_value=value)
                for name, value in point.values.items()
            ]
            if values:
                event = event_pb2.Event(wall_time=point.time_s, step=point.step)
                event.summary.value.extend(values)
                self._writer(point.stage).add_event(event)
            if point.remark:
                self._text(point.stage, point.step, "events", point.remark, point.time_s)
        for writer in self.writers.values():
            writer.flush()

    def end(self, status: Status, final: dict[str, float]) -> None:
        """Write the last numbers as a table, and close."""
        if status != "open":
            self._text("", 0, "end", _table({"ended": status, **final}))
        for writer in self.writers.values():
            writer.close()

    def _writer(self, stage: str) -> Any:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if stage not in self.writers:
            self.writers[stage] = EventFileWriter(str(self.folder / stage))
        return self.writers[stage]

    def _text(self, stage: str, step: int, tag: str, text: str, time_s: float | None = None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.plugins.text import metadata

        shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[text.encode()], tensor_shape=shape
        )
        value = summary_pb2.Summary.Value(
            tag=tag, metadata=metadata.create_summary_metadata(tag, ""), tensor=tensor
        )
        event = event_pb2.Event(wall_time=time_s or time.time(), step=step)
        event.summary.value.append(value)
        self._writer(stage).add_event(event)


def _tag(name: str) -> str:
    return name if name.partition("/")[0] in _SECTIONS else f"train/{name}"


def _table(values: dict[str, Any]) -> str:
    """A table in Markdown, as TensorBoard shows texts."""
    rows = [
        f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |"
        for name, value in values.items()
    ]
    return "\n".join(["| key | value |", "| --- | --- |", *rows])


create = TensorBoard
