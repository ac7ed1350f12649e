"""The plan and the end of a run in words, for a terminal or a log."""

from typing import Any

from launcher.plan.plan import Plan, SplitFacts, StageFacts, StagePlan


def plan_lines(plan: Plan, facts: tuple[StageFacts, ...], zero_stage: int, ds_name: str) -> list[str]:
    """Return the plan: what will be done, with the arithmetic of the batches."""
    kind = "GPU" if plan.world.device == "cuda" else "CPU"
    lines = [
        f"plan: {plan.world.num_workers} {kind} workers, ZeRO-{zero_stage} ({ds_name}), {plan.dtype}"
        + (f", {plan.model.num_parameters:,} parameters" if plan.model.num_parameters else "")
    ]
    for stage in plan.stages:
        train = facts[stage.index].train
        about = "" if train.is_whole or train.is_settled and stage.kind != "packed" else "about "
        start = f"from stage {stage.starts_from}" if stage.starts_from else "from the model"
        units = f"{about}{stage.num_units:,}" if stage.num_units else "a number still unknown of"
        lines.append(
            f"  {stage.name}: {start}; {units} {stage.unit}, {stage.num_steps:,} steps"
            f" of {stage.units_per_step} = {stage.num_workers} workers x {stage.micro_batch} {stage.unit}"
            f" x {stage.accumulation} micro-batches{_padding(stage)}, {_KINDS[stage.kind]}; up to"
            f" {stage.max_length} tokens;"
            f" lr {stage.schedule.learning_rate:g} {stage.schedule.kind}, {stage.schedule.warmup_steps} warm-up"
        )
        lines += [f"    {line}" for line in _losses(train)]
    return lines


def end_lines(summary: dict[str, Any], metric: str, run_dir: str) -> list[str]:
    """Return what a person wants to know at the end."""
    stages = summary["stages"]
    trained = [name for name in stages if name != "baseline"]
    lines = []
    for name in trained:
        values = "  ".join(f"{k} {v:.4f}" for k, v in stages[name].get("metrics", {}).items())
        lines.append(f"{name}: {values or 'not evaluated'}{_shares(stages[name])}")
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


def _shares(stage: dict[str, Any]) -> str:
    if "padding" not in stage:
        return ""
    return f"  (padding {stage['padding']:.1%}, waited for data {stage['data_wait']:.2%} of the time)"


_KINDS = {"random": "drawn at random", "bucketed": "of like length", "packed": "several samples in each"}


def _padding(stage: StagePlan) -> str:
    slots = stage.micro_batch * stage.accumulation * stage.num_workers
    spare = slots - stage.units_per_step
    zero = f" ({spare} slots of weight zero)" if spare > 0 else ""
    if stage.budget_tokens is None or stage.kind == "packed":
        return zero
    return f"{zero} (or more short ones, up to {stage.budget_tokens:,} tokens)"


def _losses(train: SplitFacts) -> list[str]:
    """What of the rows is not trained on."""
    lines = []
    if train.stores and not train.is_whole:
        lines.append("the rest of its data is prepared beside the training")
    if train.num_skipped:
        lines.append(f"{train.num_skipped:,} rows bear no loss within max_length and are left out")
    if train.num_cut:
        share = train.num_cut_tokens / max(1, train.num_tokens + train.num_cut_tokens)
        lines.append(
            f"{train.num_cut:,} samples are cut to max_length and lose {train.num_cut_tokens:,} tokens"
            f" ({share:.1%} of all)"
        )
    if train.num_bad:
        lines.append(f"{train.num_bad:,} bad rows are left out: see bad_rows.jsonl in {train.stores[0]}")
    return lines
