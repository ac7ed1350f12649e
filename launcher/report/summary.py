"""The plan and the end of a run in words, for a terminal or a log."""

from typing import Any

from launcher.plan.plan import Plan, SplitFacts, StageFacts, StagePlan
from launcher.report import memory, words


def plan_lines(plan: Plan, facts: tuple[StageFacts, ...], zero_stage: int, ds_name: str) -> list[str]:
    """Return the plan: what will be done, with the arithmetic of the batches."""
    kind = plan.world.kind
    lines = [
        f"plan: {plan.world.num_workers} {kind} workers, ZeRO-{zero_stage} ({ds_name}), {plan.dtype}"
        + (f", {plan.model.num_parameters:,} parameters" if plan.model.num_parameters else "")
    ]
    for stage in plan.stages:
        train = facts[stage.index].train
        about = "" if train.is_whole or train.is_settled and stage.kind != "packed" else "about "
        start = f"from stage {stage.starts_from}" if stage.starts_from else "from the model"
        beside = [other.name for other in stage.beside]
        start += f", in each step beside {', '.join(beside)}" if beside else ""
        units = f"{about}{stage.num_units:,}" if stage.num_units else "a number still unknown of"
        lines.append(
            f"  {stage.name}: {start}; {units} {stage.unit}, {stage.num_steps:,} steps"
            f" of {stage.units_per_step} = {_workers(stage)} x {stage.micro_batch} {stage.unit}"
            f" x {stage.accumulation} micro-batches{_padding(stage)}, {_KINDS[stage.kind]}; up to"
            f" {stage.max_length} tokens;"
            f" lr {stage.schedule.learning_rate:g} {stage.schedule.kind}, {stage.schedule.warmup_steps} warm-up"
        )
        lines += [f"    {line}" for line in (*_shared(stage), *_losses(train))]
    return lines


def data_tree(facts: dict[str, StageFacts]) -> dict[str, Any]:
    """Return as JSON values what is known of each stage's data when the training begins.

    Args:
        facts: by stage.
    """
    return {
        name: {split: _split(getattr(each, split)) for split in ("train", "eval") if getattr(each, split)}
        for name, each in facts.items()
    }


def _split(facts: SplitFacts) -> dict[str, int | None]:
    """Counts that are not whole yet are left out, not told too low."""
    told = {"rows": facts.about_rows, "samples": facts.num_samples if facts.is_settled else None}
    if facts.is_whole:
        told |= {
            "tokens": facts.num_tokens,
            "skipped": facts.num_skipped,
            "cut": facts.num_cut,
            "bad": facts.num_bad,
        }
    return told


def end_lines(summary: dict[str, Any], run_dir: str) -> list[str]:
    """Return what a person wants to know at the end."""
    stages = summary["stages"]
    trained = [name for name in stages if name != "baseline"]
    lines = []
    for name in trained:
        values = words.metrics(stages[name].get("metrics", {}))
        lines.append(f"{name}: {values or 'not evaluated'}{_effort(stages[name])}{_shares(stages[name])}")
        if compared := memory.line(stages[name].get("memory", {})):
            lines.append(f"  {compared}")
    lines += transfer_lines(summary.get("transfer", {}))
    lines.append(f"model: {stages[trained[-1]].get('export')}")
    lines.append(f"run directory: {run_dir} (report.html, metrics.jsonl, summary.json, logs/)")
    lines.append(f"try it: python -m launcher.predict {run_dir}")
    return lines


def transfer(stages: dict[str, Any], metric: str, is_joint: bool) -> dict[str, Any]:
    """Return what the stages before the last one gave to it, and what they lost.

    Args:
        stages: by name what `done.json` says, with `after` where a stage was evaluated again at the end,
            and perhaps `baseline`: the last stage without the others.
        metric: the one that judges the last stage.
        is_joint: whether all were trained at once.
    """
    *before, last = [name for name in stages if name != "baseline"]
    if not before:
        return {}
    result: dict[str, Any] = {"metric": metric, "target": last, "sources": before, "is_joint": is_joint}
    with_it = stages[last].get("metrics", {}).get(metric)
    without = stages.get("baseline", {}).get("metrics", {}).get(metric)
    if with_it is not None and without is not None:
        result |= {"with": with_it, "without": without, "gain": with_it - without}
    result["forgetting"] = {
        name: {"before": stages[name]["metrics"], "after": stages[name]["after"]}
        for name in before
        if "after" in stages[name]
    }
    return result


def transfer_lines(found: dict[str, Any]) -> list[str]:
    """Return a transfer's figures in words."""
    lines = []
    if "gain" in found:
        how = "trained beside it" if found["is_joint"] else "before it"
        lines.append(
            f"{found['target']} {found['metric']} with {', '.join(found['sources'])} {how}: {found['with']:.4f},"
            f" without: {found['without']:.4f} ({found['gain']:+.4f})"
        )
    for name, values in found.get("forgetting", {}).items():
        shared = [key for key in values["before"] if key in values["after"]]
        if shared:
            key = shared[0]
            lines.append(
                f"{name} {key} after its own stage: {values['before'][key]:.4f}, on the trunk that"
                f" {found['target']} left: {values['after'][key]:.4f}"
            )
    return lines


def seeds_lines(together: dict[str, Any], run_dir: str) -> list[str]:
    """Return mean and spread over several seeds in words."""
    lines = [f"{together['num_seeds']} seeds, mean ± standard deviation:"]
    for name, stage in together["stages"].items():
        lines.append(f"  {name}: {_spreads(stage['metrics']) or 'not evaluated'}")
        if stage["after"]:
            lines.append(f"  {name} again, after the last stage: {_spreads(stage['after'])}")
    if "transfer" in together:
        gain = together["transfer"]["gain"]
        metric = together["transfer"]["metric"]
        lines.append(f"  gain in {metric} by the stages before: {gain['mean']:+.4f} ± {gain['stdev']:.4f}")
    lines.append(f"run directories: {run_dir}/seed-0 … (summary.json there and in {run_dir})")
    return lines


def _spreads(metrics: dict[str, Any]) -> str:
    return "  ".join(f"{name} {each['mean']:.4f} ± {each['stdev']:.4f}" for name, each in metrics.items())


def _effort(stage: dict[str, Any]) -> str:
    if "num_parameters" not in stage:
        return ""
    best = f", the best of them at step {stage['best_step']}" if "best_step" in stage else ""
    return (
        f"\n  {stage['num_trainable']:,} of {stage['num_parameters']:,} parameters trained on"
        f" {stage['samples']:,} samples in {stage['steps']:,} steps{best}"
    )


def _shares(stage: dict[str, Any]) -> str:
    if "padding" not in stage:
        return ""
    return f"  (padding {stage['padding']:.1%}, waited for data {stage['data_wait']:.2%} of the time)"


_KINDS = {"random": "drawn at random", "bucketed": "of like length", "packed": "several samples in each"}


def _workers(stage: StagePlan) -> str:
    if stage.team == 1:
        return f"{stage.num_workers} workers"
    return f"{stage.num_teams} team{'s' * (stage.num_teams > 1)} of {stage.team} workers"


def _shared(stage: StagePlan) -> list[str]:
    """How long samples are divided."""
    lines = []
    if stage.team > 1:
        lines.append(
            f"{stage.team} workers share each sample: up to {stage.share_length:,} tokens each"
            " (sequence parallelism)"
        )
    if stage.mlp_tile is not None:
        lines.append(f"feed-forward networks run in tiles of {stage.mlp_tile:,} tokens")
    return lines


def _padding(stage: StagePlan) -> str:
    slots = stage.micro_batch * stage.accumulation * stage.num_teams
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
