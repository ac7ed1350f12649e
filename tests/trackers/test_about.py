"""What trackers are told of a run once: nothing that opens doors."""

import json
from pathlib import Path

from launcher import recipe as recipes
from launcher.trackers import follow
from tests.report.directories import RECIPE, write


def test_no_secret_goes_to_a_tracker(tmp_path: Path) -> None:
    tree = json.loads(json.dumps(RECIPE))
    tree["stages"][0]["data"] = {"train": ["s3://KEY:hush@bucket/a.csv"], "eval": "https://h/x.csv?sig=hush"}
    tracker = {"kind": "tensorboard", "tags": {"data": "https://h/x.csv?token=hush"}}
    write(tmp_path, "recipe.yaml", tree | {"trackers": [tracker]})
    write(tmp_path, "ds.json", {"comms_config": {"place": "s3://KEY:hush@bucket"}})
    (asked,) = recipes.parse(tree | {"trackers": [tracker]}).trackers
    about = follow.about(tmp_path, asked)
    assert "hush" not in str(about)
    assert "s3://***@bucket/a.csv" in str(about.parameters)
    assert about.tags["data"] == "https://h/x.csv?token=***"
