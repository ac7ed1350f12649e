"""What files of a run directory are called, where more than one module knows of them."""

DONE = "done.json"
"""In a stage's folder: what it came to. Without it the stage is not done."""
AFTER = "after.json"
"""In a stage's folder: its metrics on the trunk that the last stage ended with."""
HALVINGS = "halvings.json"
"""In the run directory: by stage, how often its micro-batch was halved for want of memory."""
