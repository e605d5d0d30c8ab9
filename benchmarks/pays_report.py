"""What benchmarks/pays.py found: the tables of its page, and small multiples of loss against processor time."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.pays_runs import COLUMNS, OTHERS, Store, diverged, final
from benchmarks.plot import plt

START, END = "<!-- measured -->", "<!-- end of what was measured -->"
COLOURS = {"AdamW": "tab:orange", "Muon": "tab:green", "SOAP": "tab:purple", "ours": "tab:blue"}
MORE = ("tab:cyan", "tab:red", "tab:brown", "tab:pink", "black")
Runs = list[dict[str, Any]]


class Result:
    """A problem: of every contender the runs that count, one per seed."""

    def __init__(self, store: Store) -> None:
        self.problem, self.store, self.runs = store.problem, store, {}
        every = [run for run in store.content["runs"] if run["steps"] == store.steps(run["name"])]
        for name in dict.fromkeys([*OTHERS, *(run["name"] for run in every)]):
            own = [run for run in every if run["name"] == name]
            trials = [run for run in own if len(run["rows"]) == 1]
            counted = [run for run in own if len(run["rows"]) > 1]
            if not counted:
                continue
            options = best_options(trials) if trials else counted[-1]["options"]
            if chosen := [run for run in counted if run["options"] == options]:
                self.runs[name] = sorted(chosen, key=lambda run: run["seed"])
        most = max((len(runs) for runs in self.runs.values()), default=0)
        self.runs = {name: runs for name, runs in self.runs.items() if len(runs) == most}  # not what is still going on
        self.others = [name for name in OTHERS if name in self.runs]
        self.ours = [name for name in self.runs if name not in OTHERS]

    def median(self, name: str, column: str) -> float | None:
        """Of the last looks; infinite where a run diverged, None where the problem has no such column."""
        at, runs = COLUMNS.index(column), self.runs[name]
        values = [math.inf if diverged(run) else run["rows"][-1][at] for run in runs]
        return None if None in values else statistics.median(values)

    def value(self, name: str, column: str) -> float:
        """The median; infinite where there is none, as for another that is not installed."""
        found = self.median(name, column) if name in self.runs else None
        return math.inf if found is None else found

    @property
    def best_other(self) -> str | None:
        return min(self.others, key=lambda name: self.value(name, "test_loss"), default=None)

    def time_to(self, name: str, rival: str) -> float:
        """Median over seeds: the share of the time in which `name` is first at the rival's final test loss."""
        goals = {run["seed"]: final(run) for run in self.runs[rival]}
        at, shares = COLUMNS.index("test_loss"), []
        for run in self.runs[name]:
            if run["seed"] in goals:
                there = (r[0] for r in run["rows"] if r[at] is not None and r[at] <= goals[run["seed"]])
                shares.append(next(there, math.inf) / run["steps"])
        return statistics.median(shares) if shares else math.inf


def best_options(trials: Runs) -> dict[str, Any]:
    """Those with the lowest final test loss, the mean over the tuning seeds; options tried on all of these only."""
    losses: dict[str, list[float]] = {}
    for run in trials:
        losses.setdefault(json.dumps(run["options"]), []).append(final(run))
    most = max(map(len, losses.values()))
    means = {key: statistics.fmean(found) for key, found in losses.items() if len(found) == most}
    return json.loads(min(means, key=lambda key: means[key]))


def write_page(path: Path, stores: list[Store]) -> str:
    """The tables, which replace what stands between START and END on the page; a new page holds nothing else."""
    results = [result for result in map(Result, stores) if result.runs]
    tables = (summary_table, test_table, time_table, training_table, tuned_table)
    text = "\n\n".join(table(results) for table in tables)
    page = path.read_text() if path.exists() else f"{START}\n{END}\n"
    before, after = page.partition(START)[0], page.partition(END)[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")
    return text


def test_table(results: list[Result]) -> str:
    """Final test losses and accuracies at equal processor time, and what that was for AdamW and the first of ours."""
    others, ours = names_of(results)
    lines = header(["test loss / accuracy", "seconds, AdamW / ours", *others, *ours])
    for result in results:
        cells = losses_of(result, [*others, *ours], "test_loss", "test_accuracy")
        seconds = [f"{result.median(n, 'seconds'):.1f}" for n in (*result.others[:1], *result.ours[:1])]
        lines.append(row([titled(result), " / ".join(seconds), *cells]))
    return "\n".join(lines)


def time_table(results: list[Result]) -> str:
    """What our steps cost, and when we are at the best other's loss."""
    ours = names_of(results)[1]
    lines = header(["cost of a step; share of the time to the best other's test loss", "best other", *ours])
    for result in results:
        cells = [time_cell(result, name) if name in result.runs else "" for name in ours]
        lines.append(row([titled(result), result.best_other or "", *cells]))
    return "\n".join(lines)


def time_cell(result: Result, name: str) -> str:
    cost, rival = result.store.cost(name), result.best_other
    if rival is None:
        return f"{cost:.2f}"
    share = result.time_to(name, rival)
    return f"{cost:.2f}; {share:.2f}" if math.isfinite(share) else f"{cost:.2f}; missed"


def training_table(results: list[Result]) -> str:
    """Training losses, and of all runs that count how many diverged."""
    others, ours = names_of(results)
    lines = header(["training loss / accuracy", *others, *ours])
    for result in results:
        cells = losses_of(result, [*others, *ours], "train_loss", "train_accuracy")
        lines.append(row([titled(result), *cells]))
    cells = []
    for name in (*others, *ours):
        runs = [run for result in results for run in result.runs.get(name, [])]
        cells.append(f"{sum(map(diverged, runs))} of {len(runs)}")
    return "\n".join([*lines, row(["runs that diverged", *cells])])


def tuned_table(results: list[Result]) -> str:
    """What the others were tuned to, and the steps of all."""
    others, ours = names_of(results)
    lines = header(["steps; rate, decay", *others, *ours])
    for result in results:
        cells = []
        for name in (*others, *ours):
            runs = result.runs.get(name)
            options = runs[0]["options"] if runs else {}
            chosen = f"; {options['lr']:g}, {options['weight_decay']:g}" if name in OTHERS and runs else ""
            cells.append(f"{runs[0]['steps']}{chosen}" if runs else "")
        lines.append(row([titled(result), *cells]))
    return "\n".join(lines)


def losses_of(result: Result, names: Iterable[str], loss: str, accuracy: str) -> list[str]:
    """A cell for each name; the lowest loss is bold."""
    values = {name: result.median(name, loss) for name in names if name in result.runs}
    lowest, cells = min(values.values(), default=math.inf), []
    for name in names:
        if name not in values:
            cells.append("")
            continue
        if not math.isfinite(values[name]):
            cells.append("diverged")
            continue
        text = f"**{values[name]:.3g}**" if values[name] == lowest else f"{values[name]:.3g}"
        right = result.median(name, accuracy)
        cells.append(text if right is None else f"{text} / {right:.3f}")
    return cells


def summary_table(results: list[Result]) -> str:
    """For each setting of ours, on how many problems it is ahead of AdamW, and of all of the others."""
    titles = ["test loss below AdamW's", "below all others'", "best accuracy", "sooner at the best other's test loss"]
    titles += ["training loss below AdamW's", "below all others'"]
    lines = header(["ahead on so many problems", *titles])
    for name in names_of(results)[1]:
        lines.append(row([name, *ahead([r for r in results if name in r.runs and r.others], name)]))
    return "\n".join(lines)


def ahead(results: list[Result], name: str) -> list[str]:
    def share(found: list[bool]) -> str:
        return f"{sum(found)} of {len(found)}"

    def below(column: str, rivals: list[str] | None = None) -> str:
        return share([all(r.value(name, column) < r.value(x, column) for x in rivals or r.others) for r in results])

    right = [[r.value(x, "test_accuracy") for x in (name, *r.others)] for r in results if r.problem.labels]
    return [
        below("test_loss", ["AdamW"]),
        below("test_loss"),
        share([own >= max(others) for own, *others in right]),
        share([r.time_to(name, r.best_other) < 1 for r in results if r.best_other]),
        below("train_loss", ["AdamW"]),
        below("train_loss"),
    ]


def names_of(results: list[Result]) -> tuple[list[str], list[str]]:
    others = [name for name in OTHERS if any(name in result.runs for result in results)]
    return others, list(dict.fromkeys(name for result in results for name in result.ours))


def titled(result: Result) -> str:
    return f"{result.problem.title} ({result.problem.batch})"


def header(titles: list[str]) -> list[str]:
    return [row(titles), row(["---"] * len(titles))]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(stores: list[Store], folder: Path) -> None:
    """pays-test.png and pays-train.png: a panel per problem, medians over the seeds."""
    results = [result for result in map(Result, stores) if result.runs]
    colours = COLOURS | dict(zip((n for n in names_of(results)[1] if n not in COLOURS), MORE, strict=False))
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("test", "train"):
        columns = min(4, len(results))
        rows = math.ceil(len(results) / columns)
        figure, grid = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False)
        for axes in grid.flat[len(results) :]:
            axes.set_axis_off()
        for axes, result in zip(grid.flat, results, strict=False):
            panel(axes, result, COLUMNS.index(f"{part}_loss"), colours)
        handles = {h.get_label(): h for axes in grid.flat for h in axes.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=9)
        figure.suptitle(f"{part} loss against processor seconds, all the same in the end", fontsize=11)
        figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
        figure.savefig(folder / f"pays-{part}.png", dpi=75)
        plt.close(figure)


def panel(axes: Any, result: Result, column: int, colours: dict[str, str]) -> None:
    """Time is the share of a run's steps times AdamW's seconds: the clock of a busy machine differs from run to run."""
    whole = result.median(next(iter(result.runs)), "seconds")
    for name, runs in result.runs.items():
        looks = [look for look in zip(*(run["rows"] for run in runs), strict=False) if _finite(look, column)]
        x = [whole * look[0][0] / runs[0]["steps"] for look in looks]
        y = [statistics.median(r[column] for r in look) for look in looks]
        axes.plot(x, y, color=colours.get(name), linewidth=1.4, label=name)
    axes.set_yscale("log")
    axes.set_title(f"{result.problem.title} ({result.problem.batch})", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.tick_params(which="minor", labelsize=6)
    axes.grid(True, which="both", alpha=0.2)


def _finite(look: tuple[list[Any], ...], column: int) -> bool:
    return all(r[column] is not None for r in look)
