"""Print the measurements that docs/reproduction.md states, from the results of the studies.

A difference is taken seed by seed; "±" is the standard deviation over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from figures import RATE, Results, parser, reader

LONGER = "4e-3"  # the rate of the longer runs
HIGHEST = "6.4e-2"
WIDTHS_RATE = 9e-3  # the best of those run at width 64


class Runs:
    """The runs of a study, or those of some choices."""

    def __init__(self, results: Results, **choices: str) -> None:
        wanted = {key.replace("_", "-"): value for key, value in choices.items()}
        self.runs = [run for run in results["runs"] if run["choices"].items() >= wanted.items()]
        self.profiles = [each for each in results["profiles"] if each["choices"].items() >= wanted.items()]

    @property
    def finished(self) -> bool:
        """Whether all finished, and there are any."""
        return bool(self.runs) and all(run["status"] == "finished" for run in self.runs)

    @property
    def diverged(self) -> str:
        """How many diverged, of how many."""
        return f"{sum(run['status'] == 'diverged' for run in self.runs)} of {len(self.runs)}"

    def by_seed(self, measure: str = "validation_loss") -> dict[int, float]:
        """Return a measure of the runs that finished."""
        return {run["seed"]: run["measures"][measure] for run in self.runs if run["status"] == "finished"}

    def mean(self, measure: str = "validation_loss", form: str = ".3f") -> str:
        """Return a measure's mean, and its deviation."""
        return _spread(self.by_seed(measure).values(), form)

    def average(self) -> float:
        """Return the mean validation loss of those that finished; infinite if none did."""
        return statistics.fmean(self.by_seed().values()) if self.by_seed() else math.inf

    def each(self, measure: str, form: str = ",.0f") -> str:
        """Return a measure of every seed."""
        return ", ".join(f"{value:{form}}" for _, value in sorted(self.by_seed(measure).items()))

    def over(self, other: Runs, measure: str = "validation_loss", form: str = "+.3f") -> str:
        """Return how much higher a measure is than that of ``other``, seed by seed."""
        ours, theirs = self.by_seed(measure), other.by_seed(measure)
        return _spread((ours[seed] - theirs[seed] for seed in ours if seed in theirs), form)

    def total(self, measure: str) -> str:
        """Return a measure's sum over the runs, and their number."""
        values = [run["measures"][measure] for run in self.runs if run["status"] == "finished"]
        return f"{sum(values):.0f} in {len(values)}"

    def layer(self, statistic: str, time: int, layer: int) -> str:
        """Return the geometric mean of a layer's statistic, at the first time or the last."""
        return f"{statistics.geometric_mean(each[statistic][time][layer] for each in self.profiles):.2g}"


def _spread(values: Iterable[float], form: str) -> str:
    values = list(values)
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}"


def measurements(results: Callable[[str], Results]) -> dict[str, str]:
    """Return what the page states by what it is."""
    sweep, longer, ablations = results("learning_rate"), results("longer"), results("ablations")
    rates = sorted({run["choices"]["lr"] for run in sweep["runs"]}, key=float)

    def at(placement: str, rate: str) -> Runs:
        return Runs(sweep, norm_placement=placement, lr=rate)

    long = {name: Runs(longer, norm_placement=name) for name in ("peri", "pre", "post", "output")}
    frozen = Runs(ablations, variant="peri, output norms frozen")
    bare = Runs(ablations, variant="peri, no embedding norm")
    embedded = Runs(ablations, variant="pre, embedding norm")
    found = {}
    for rate in rates:
        found[f"loss of Pre-LN over Peri-LN's at {rate}"] = at("pre", rate).over(at("peri", rate))
        for placement in long:
            found[f"loss of {placement} at {rate}"] = at(placement, rate).mean()
            found[f"diverged runs of {placement} at {rate}"] = at(placement, rate).diverged
            spread = at(placement, rate).mean("gradient_spread", ".1f")
            found[f"gradient norm, largest over smallest layer, {placement} at {rate}"] = spread
        for placement in ("peri", "pre"):
            runs = at(placement, rate)
            found[f"variance of {placement}'s last layer at {rate}"] = runs.mean("variance_at_end", ",.3g")
            found[f"max |x| of {placement} at {rate}"] = runs.each("largest_activation")
            found[f"steps above 5 medians, {placement} at {rate}"] = runs.mean("gradient_outliers", ".1f")
    best = {name: min((at(name, rate) for rate in rates), key=Runs.average) for name in ("peri", "pre")}
    found["loss of Pre-LN at its best rate over Peri-LN's at its"] = best["pre"].over(best["peri"])
    for placement in ("peri", "pre"):
        first, last = at(placement, LONGER), at(placement, HIGHEST)
        found[f"loss of {placement} at {HIGHEST} over {LONGER}"] = last.over(first)
        runs = Runs(sweep, norm_placement=placement)
        found[f"diverged runs of {placement}"] = runs.diverged
        found[f"gradient spikes that the monitor finds, {placement}"] = runs.total("gradient_spikes")
    found["loss of Pre-LN over Peri-LN's, longer"] = long["pre"].over(long["peri"])
    for placement, runs in long.items():
        found[f"gradient norm at initialization, {placement}: first layer"] = runs.layer(
            "gradient_norm", 0, 1
        )
        found[f"gradient norm after training, {placement}: first layer"] = runs.layer("gradient_norm", 1, 1)
        found[f"gradient norm after training, {placement}: last layer"] = runs.layer("gradient_norm", 1, -1)
        found[f"loss of {placement}, longer"] = runs.mean()
        found[f"gradient norm, largest over smallest layer, {placement}"] = runs.mean(
            "gradient_spread", ".1f"
        )
        found[f"gradient norm, largest over median, {placement}"] = runs.mean("gradient_peak", ".0f")
        found[f"angular distance of {placement}"] = runs.mean("angular_distance")
    peri, pre = at("peri", RATE), at("pre", RATE)
    found["loss of Pre-LN with an embedding norm over Peri-LN's"] = embedded.over(peri)
    found["loss of Peri-LN without its embedding norm over its own"] = bare.over(peri)
    found["loss of Peri-LN without its embedding norm over Pre-LN's"] = bare.over(pre)
    found["loss of Peri-LN with frozen output norms over its own"] = frozen.over(peri)
    return found


def variants(results: Callable[[str], Results]) -> str:
    """Return the table of the variants, each against its placement in the sweep."""
    sweep = results("learning_rate")
    whole = {name: Runs(sweep, norm_placement=name, lr=RATE) for name in ("peri", "pre")}
    rows: list[tuple[str, Runs, Runs]] = [
        (f"{name}, of the sweep", runs, runs) for name, runs in whole.items()
    ]
    for study in ("ablations", "surroundings"):
        for row in results(study)["summary"]:
            name = row["choices"]["variant"]
            rows.append((name, Runs(results(study), variant=name), whole[name.partition(",")[0]]))
    lines = [
        "| variant | diverged | validation loss | difference | gradient norm, largest / median "
        "| max \\|x\\| |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs, reference in rows:
        cells: list[Any] = [name, runs.diverged]
        if runs.by_seed():
            peaks = (
                statistics.fmean(runs.by_seed(m).values()) for m in ("gradient_peak", "largest_activation")
            )
            difference = "0" if runs is reference else runs.over(reference)
            cells += [
                runs.mean(),
                difference,
                *(f"{peak:,.{i}f}" for peak, i in zip(peaks, (1, 0), strict=True)),
            ]
        else:
            cells += ["-"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def widths(results: Callable[[str], Results]) -> str:
    """Return the table of the study of widths: the best rate of each, where all its rates were run."""
    study = results("width")
    lines = [
        "| width | Pre-LN: best rate | lowest loss | loss at 9e-3 "
        "| Peri-LN: best rate | lowest loss | loss at 9e-3 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rates = list(dict.fromkeys(run["choices"]["lr"] for run in study["runs"]))
    names = sorted(
        {run["choices"]["width"] for run in study["runs"]}, key=lambda name: (int(name.split()[0]), name)
    )
    for name in names:
        cells = [name]
        for placement in ("pre", "peri"):
            runs = {float(rate): Runs(study, width=name, norm_placement=placement, lr=rate) for rate in rates}
            if all(each.by_seed() for each in runs.values()):
                losses = {rate: each.average() for rate, each in runs.items()}
                cells += [best_rate(losses), f"{min(losses.values()):.3f}", f"{losses[WIDTHS_RATE]:.3f}"]
            else:
                cells += ["not run", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rules(results: Callable[[str], Results]) -> str:
    """Return the table of all rules, each beside Peri-LN: at its best rate, and over the rates that train.

    A best rate has the lowest mean of those at which every seed finished. The lowest rate of all, at which
    no model learns, is left out.
    """
    study = results("rules")
    names, rates = (dict.fromkeys(run["choices"][key] for run in study["runs"]) for key in ("rule", "lr"))
    learning = sorted(rates, key=float)[1:]
    by_rate = {name: {rate: Runs(study, rule=name, lr=rate) for rate in learning} for name in names}
    best = {
        name: min(of_rates.items(), key=lambda item: (not item[1].finished, item[1].average()))
        for name, of_rates in by_rate.items()
    }
    lines = [
        "| rule | diverged | best rate | loss there | over Peri-LN's at its best | the same, mean of rates "
        "| max \\|x\\| | variance, last layer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted(by_rate, key=lambda name: (not best[name][1].finished, best[name][1].average())):
        ends = [run["status"] for each in by_rate[name].values() for run in each.runs]
        diverged, finished = ends.count("diverged"), ends.count("finished")
        cells = [f"`{name}`", f"{diverged} of {diverged + finished}"]
        rate, there = best[name]
        if there.finished:
            sizes = (there.by_seed(name).values() for name in ("largest_activation", "variance_at_end"))
            others = ["0", "0"]
            if name != "peri":
                others = [there.over(best["peri"][1]), _over_rates(by_rate[name], by_rate["peri"])]
            cells += [rate, there.mean(), *others, *(f"{statistics.fmean(size):,.3g}" for size in sizes)]
        else:
            cells += ["-"] * 6
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_rates(ours: dict[str, Runs], theirs: dict[str, Runs]) -> str:
    """Return how much higher the mean loss over the rates is, seed by seed, if every run of both finished."""
    if not all(runs.finished for runs in (*ours.values(), *theirs.values())):
        return "-"
    pairs = [(ours[rate].by_seed(), theirs[rate].by_seed()) for rate in ours]
    return _spread((statistics.fmean(a[seed] - b[seed] for a, b in pairs) for seed in pairs[0][0]), "+.3f")


def best_rate(losses: dict[float, float]) -> str:
    """Return where the parabola through the lowest loss and its neighbours, over log(rate), is lowest.

    The rates are a geometric sequence; at its ends only a bound is known.
    """
    rates = sorted(losses)
    lowest = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if lowest in (0, len(rates) - 1):
        return f"{'at most' if lowest == 0 else 'at least'} {rates[lowest]:.1e}"
    below, here, above = (losses[rate] for rate in rates[lowest - 1 : lowest + 2])
    steps = (below - above) / (below - 2 * here + above) / 2
    return f"{rates[lowest] * (rates[lowest + 1] / rates[lowest]) ** steps:.1e}"


def main() -> None:
    """Print them."""
    results = reader(parser(__doc__).parse_args().results)
    for name, value in measurements(results).items():
        print(f"{name}: {value}")
    print(variants(results))
    print(widths(results))
    print(rules(results))


if __name__ == "__main__":
    main()
