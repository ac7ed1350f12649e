"""The plan and the end of a run in words, for a terminal or a log."""

from typing import Any

from launcher.plan.plan import Plan, StageFacts


def plan_lines(plan: Plan, facts: tuple[StageFacts, ...], zero_stage: int, ds_name: str) -> list[str]:
    """Return the plan: what will be done, with the arithmetic of the batches."""
    kind = "GPU" if plan.world.device == "cuda" else "CPU"
    lines = [
        f"plan: {plan.world.num_workers} {kind} workers, ZeRO-{zero_stage} ({ds_name}), {plan.dtype}"
        + (f", {plan.model.num_parameters:,} parameters" if plan.model.num_parameters else "")
    ]
    for stage in plan.stages:
        about = "" if facts[stage.index].train.exact else "about "
        start = f"from stage {stage.starts_from}" if stage.starts_from else "from the model"
        lines.append(
            f"  {stage.name}: {start}; {about}{stage.num_samples:,} samples, {stage.num_steps:,} steps"
            f" of {stage.samples_per_step} = {stage.num_workers} workers x {stage.micro_batch} samples x"
            f" {stage.accumulation} micro-batches{_padding(stage)}; up to {stage.max_length} tokens;"
            f" lr {stage.schedule.learning_rate:g} {stage.schedule.kind}, {stage.schedule.warmup_steps} warm-up"
        )
        skipped = facts[stage.index].train.num_skipped
        if skipped:
            lines.append(f"    {skipped:,} rows bear no loss within max_length and are left out")
    return lines


def end_lines(summary: dict[str, Any], metric: str, run_dir: str) -> list[str]:
    """Return what a person wants to know at the end."""
    stages = summary["stages"]
    trained = [name for name in stages if name != "baseline"]
    lines = []
    for name in trained:
        values = "  ".join(f"{k} {v:.4f}" for k, v in stages[name].get("metrics", {}).items())
        lines.append(f"{name}: {values or 'not evaluated'}")
    last = stages[trained[-1]].get("metrics", {})
    alone = stages.get("baseline", {}).get("metrics", {})
    if metric in last and metric in alone:
        lines.append(
            f"{trained[-1]} {metric} with {', '.join(trained[:-1])} before it: {last[metric]:.4f}, without:"
            f" {alone[metric]:.4f} ({last[metric] - alone[metric]:+.4f})"
        )
    lines.append(f"model: {stages[trained[-1]].get('export')}")
    lines.append(f"run directory: {run_dir} (metrics.jsonl, summary.json, logs/)")
    lines.append(f"try it: python -m launcher.predict {run_dir}")
    return lines


def _padding(stage: Any) -> str:
    slots = stage.micro_batch * stage.accumulation * stage.num_workers
    spare = slots - stage.samples_per_step
    return f" ({spare} slots of weight zero)" if spare else ""
