"""What an earlier stage's task has lost by the end of the run."""

from launcher import storage
from launcher.assembly import Context, reassemble
from launcher.files import AFTER
from launcher.plan.plan import StagePlan


def measure_again(context: Context, plan: StagePlan, last: StagePlan) -> None:
    """Evaluate an earlier stage on the trunk that the last one ended with: what was forgotten since.

    Args:
        context: of this rank.
        plan: of the earlier stage; nothing happens if it has no eval split.
        last: the plan of the last stage.
    """
    facts = context.prepared.facts[plan.index]
    if facts.eval is None or storage.read_json(context.stage_dir(plan.name) / AFTER) is not None:
        return
    context.pulse.begin(plan.name)
    built = reassemble(context, plan, context.export_of(last.name))
    context.pulse.phase = "evaluate"
    metrics = built.engine.evaluate(0, context.pulse.counted(built.parts[0].eval_batches()))
    built.engine.close()
    context.recorder.write("after", stage=plan.name, last=last.name, metrics=metrics)
    if context.rank == 0:
        storage.write_json(context.stage_dir(plan.name) / AFTER, {"metrics": metrics})
