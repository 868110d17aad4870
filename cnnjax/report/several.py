"""The content of the report on several runs: groups of seeds, what they differ in, and which is better."""

import json
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import altair as alt

from cnnjax.files import flatten, show
from cnnjax.report import figures, words
from cnnjax.report.analysis import Fit, differing, judge_fit
from cnnjax.runs.inspection import read_info
from cnnjax.runs.manifest import DECISIVE, read_manifest
from cnnjax.runs.records import read_record
from cnnjax.runs.run import Run
from cnnjax.runs.schema import own_metrics
from cnnjax.runs.statistics import Summary, describe, summarize, verdicts

MAX_PAIRS = 10  # Pairs of groups that are compared.


class Group(NamedTuple):
    """Runs of one configuration, on the same images, with different seeds.

    Attributes:
      facts: configuration, data and environment as a flat dict; those of the first run.
    """

    label: str
    runs: list[Run]
    facts: dict[str, Any]

    @property
    def scores(self) -> dict[int, float]:
        """The test accuracy of each finished seed."""
        return {run.config.seed: run.test_accuracy for run in self.runs if run.result is not None}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Returns the groups, in the order of their first runs, with labels that are all different."""
    groups: list[Group] = []
    keys: list[Any] = []
    for run in runs:
        record = read_record(run.run_dir)
        config = {name: value for name, value in record.config.items() if name not in ("seed", "name")}
        key = (config, record.data.sha256)
        seed = run.config.seed
        same = [g for g, k in zip(groups, keys, strict=True) if k == key and all(r.config.seed != seed for r in g.runs)]
        if same:
            same[0].runs.append(run)
            continue
        session = read_manifest(run.run_dir)["sessions"][-1]
        facts = {**config, "data": record.data.decisive(), **{name: session.get(name) for name in DECISIVE}}
        label = run.config.run_name.removesuffix(f"-seed{seed}")
        groups.append(Group(label, [run], flatten(facts)))
        keys.append(key)
    labels = [group.label for group in groups]
    return [
        group._replace(label=f"{group.label} ({labels[: i + 1].count(group.label)})")
        if labels.count(group.label) > 1
        else group
        for i, group in enumerate(groups)
    ]


def several_content(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the page of several runs shows, and its charts for files, {name: chart}."""
    groups = group_runs(runs)
    of_label = {group.label: group for group in groups}
    scores = {label: group.scores for label, group in of_label.items() if group.scores}
    summaries = {label: summarize([*of.values()], bounds=(0.0, 1.0)) for label, of in scores.items()}
    found = figures.overlaid_curves({label: [run.history for run in group.runs] for label, group in of_label.items()})
    files: dict[str, Any] = {}
    if found:
        drawn = [figure.draw(380).properties(title=figure.title) for figure in found]
        files["learning_curves"] = alt.concat(*drawn, columns=2)
    dots = figures.seed_scores(scores, summaries) if scores else None
    if dots is not None:
        files["scores"] = dots.draw(480)
    differences = differing([group.facts for group in groups]) if len(groups) > 1 else {}
    rows = [_run_row(group.label, run) for group in groups for run in group.runs]
    content = {
        "title": " and ".join(of_label) if len(of_label) <= 3 else f"{len(groups)} groups of runs",
        "groups": [_group_row(group, summaries.get(group.label)) for group in groups],
        "runs": rows,
        "unfinished": [row["folder"] for row in rows if row["accuracy"] is None],
        "curves": found,
        "fits": {label: text for label, group in of_label.items() if (text := words.explain_fits(_fits(group)))},
        "has_bands": any(len(group.runs) > 1 for group in groups),
        "scores": dots,
        "labels": [*of_label],
        "differences": {name: [_show(value) for value in row] for name, row in differences.items()},
        "verdicts": _verdicts({label: group.scores for label, group in of_label.items()}, of_label),
        "own": _own(of_label),
        "num_pairs": len(groups) * (len(groups) - 1) // 2,
    }
    return content, files


def _fits(group: Group) -> list[Fit]:
    histories = ((run.history, run.facts) for run in group.runs)
    return [
        judge_fit(history, facts.num_train_examples, facts.num_validation_examples)
        for history, facts in histories
        if len(history.get("epoch", ())) > 1
    ]


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "none" if text in ("null", "", "{}") else show(text)


def _group_row(group: Group, summary: Summary | None) -> dict[str, Any]:
    last = [result for run in group.runs if (result := run.result) is not None]
    return {
        "label": group.label,
        "count": len(group.runs),
        "summary": summary,
        "words": describe([*group.scores.values()]) if summary else "no run is finished",
        "num_params": last[0]["num_params"] if last else None,
        "time": words.duration(sum(x["training_seconds"] for x in last) / len(last)) if last else None,
    }


def _run_row(label: str, run: Run) -> dict[str, Any]:
    result, info = run.result, read_info(run.run_dir)
    return {
        "label": label,
        "folder": str(run.run_dir),
        "seed": run.config.seed,
        "state": info.state,
        "epochs": f"{len(info.rows)} of {info.config['num_epochs']}",
        "accuracy": None if result is None else result["test_accuracy"],
        "loss": None if result is None else result["test_loss"],
        "validation": None if result is None else result["best_validation_accuracy"],
        "time": None if result is None else words.duration(result["training_seconds"]),
        "device": "" if result is None else result["device"],
    }


def _own(groups: dict[str, Group]) -> dict[str, Any] | None:
    """Returns name, values and verdicts of the user's own score that selects the checkpoints, if one does."""
    name, *others = {group.runs[0].config.best_by for group in groups.values()}
    metric, scores = f"test_{name}", {}
    for label, group in groups.items():
        found = {run.config.seed: own_metrics(run.result).get(metric) for run in group.runs if run.result is not None}
        scores[label] = {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}
    if others or not any(scores.values()):
        return None
    described = {label: describe([*values.values()], metric) for label, values in scores.items() if values}
    return {"name": name, "words": described, "verdicts": _verdicts(scores, groups, metric)}


def _verdicts(
    scores: dict[str, dict[int, float]], groups: dict[str, Group], metric: str = "test_accuracy"
) -> list[tuple[str, list[str]]]:
    """Returns the names of every pair of groups, and the lines that `cnnjax compare` prints about them.

    If none can be compared, they share one line.

    Args:
      scores: of each seed of each group.
    """
    found = verdicts({label: values for label, values in scores.items() if len(values) > 1}, metric)
    if not found and len(groups) > 1:
        return [("All pairs", ["Train at least two seeds of each group to compare them: --seeds."])]
    digests = {
        label: {name: value for name, value in group.facts.items() if name.startswith("data.sha256.")}
        for label, group in groups.items()
    }
    shown = []
    for a, b in [*combinations(groups, 2)][:MAX_PAIRS]:
        lines = found.get((a, b), ["Both need at least two finished seeds to be compared. Train more: --seeds."])
        other = ["Their images or labels have different digests, see below."] if digests[a] != digests[b] else []
        shown.append((f"{a} and {b}", [*lines, *other] if (a, b) in found else lines))
    return shown
