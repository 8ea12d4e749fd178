"""How often `frechet-merge suggest` is right: its decisions made again without each family, and
judged on it.

    python bench/suggest.py        reads results/quality_*.csv, sizes_*.csv and anchor.csv, and runs
        nothing

A family is one training of experts, with all sets of its models. What its rules leave to
measurement is chosen on the other families alone: whose side is shared, and the anchor, by the best
mean accuracy over those that share the rule's condition (over all others, where none does), each
family counting once; the geometry by how many families it is the best one on (by the mean, one
family of large differences decides; it is written beside). Then it is looked up how good that
choice was on the family that was left out.

Three situations: *both*, with statistics and unlabelled examples of each task; *metrics*, with
statistics and no examples to find an anchor on; *nothing*, where the tables have scales that
labels chose, for all methods alike (what a fixed scale costs is in `suggest_scales.py`). *Best* is
the best of our methods that the situation allows, of those in the table of the family; *fixed* is
the better one on that family of the two rules that ask nothing: always TSV-M, at a scale that
labels chose, and always the pullback mean, with anchor and side by outputs (without examples: the
default anchor; with nothing: always the average). Standard errors are over examples; of two methods
of which neither is TSV-M, an upper bound from those of their differences from it, if these are not
anticorrelated. A *hit* is less than two of them below the best."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

from adapters import about, write_rows

RESULTS = Path(__file__).parent/"results"
FAMILIES = ("text_lora", "experts_full", "experts_lora", "images_full", "images_lora")
SIDES = {
    "right": "pullback(share='right'), by outputs",
    "left": "pullback(share='left'), by outputs",
    "right or left": "pullback(share='right' or 'left'), by outputs",
}
# what needs no more than a scale
SCALED = ("mean", "task arithmetic", "TIES 20 %", "TSV-M", "Iso-C")
ANCHORS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12)
# the size of a sum from which it is large
LARGE = 0.3


class Set(NamedTuple):
    "Models that were merged by every method."

    family: str
    T: int
    size: float  # of the sum of their updates
    rows: dict  # method → row of a result

    @property
    def reads(self):
        return "pictures" if self.family.startswith("images") else "text"

    @property
    def cell(self):
        "What the rules about anchors tell apart."
        if self.T < 3 or self.size >= LARGE:
            return "large or two"
        return "small, three" if self.T == 3 else "small, more"

    def of(self, method):
        return float(self.rows[method]["mean"])

    def error(self, a, b):
        "Of the difference of two methods, at most."
        if a == b:
            return 0.0
        of_each = [float(self.rows[m]["se_from"] or 0) for m in (a, b)]
        return sum(e*e for e in of_each)**0.5


def read(name):
    return list(csv.DictReader((RESULTS/f"{name}.csv").open(newline="")))


def sets():
    "All sets of models of all families; those of one number of models are one row there."
    sizes = {r["family"]: float(r["sum / weights, spectral"]) for r in read("anchor")}
    for family in FAMILIES:
        rows = {r["method"]: r for r in read(f"quality_{family}")}
        yield Set(family, 6, sizes[family], rows)
        every = read(f"sizes_{family}")
        for T in dict.fromkeys(r["models"] for r in every):
            rows = {r["method"]: r for r in every if r["models"] == T}
            said = next(iter(rows.values())).get("sum / weights, spectral")
            # where it was not measured: that of fewer models is less than that of six
            size = max(map(float, said.split("; "))) if said else sizes[family]
            yield Set(family, int(T), size, rows)


def by_family(method, seen):
    "Family → mean difference from TSV-M over its sets, where the method was run."
    found = {}
    for s in seen:
        if method in s.rows:
            found.setdefault(s.family, []).append(s.of(method) - s.of("TSV-M"))
    return {family: sum(v)/len(v) for family, v in found.items()}


def chosen(options, seen):
    "The method with the best mean accuracy on sets, each family counting once."

    def mean(method):
        each = by_family(method, seen).values()
        return sum(each)/len(each) if each else float("-inf")

    return max(options, key=mean)


def most(options, seen):
    "The method that is the best one on most families."
    options = list(options)
    each = {m: by_family(m, seen) for m in options}
    best = [
        max(options, key=lambda m: each[m].get(family, float("-inf")))
        for family in dict.fromkeys(s.family for s in seen)
    ]
    return max(options, key=best.count)


def alike(key, s, others):
    "Those of other sets that share a condition, or all if none does."
    same = [o for o in others if getattr(o, key) == getattr(s, key)]
    return same or others


def anchored(c):
    return f"pullback(anchor={c:g})"


def both(s, others):
    "With statistics and examples: whose side is shared, and whether the pullback mean is taken."
    side = chosen(SIDES.values(), alike("reads", s, others))
    return most((side, "TSV-M, by outputs", "mean"), others)


def metrics(s, others):
    "With statistics alone: the anchor, or the average."
    anchor = chosen(map(anchored, ANCHORS), alike("cell", s, others))
    return most((anchor, "mean"), alike("cell", s, others))


def nothing(s, others):
    "Of what needs a scale at most."
    return most(SCALED, others)


# situation → the decision, what is in reach by its needs, the other fixed rule
SITUATIONS = {
    "both": (both, ("–", "inputs"), SIDES["right or left"]),
    "metrics": (metrics, ("–", "inputs"), anchored(4)),
    "nothing": (nothing, ("–", "scale"), "mean"),
}


def in_reach(s, situation):
    "Our methods that may be taken in a situation."
    allowed = SITUATIONS[situation][1]
    for method, row in s.rows.items():
        needs = row.get("needs", needs_of(method))
        is_ours = row.get("code", "frechet_merge") in ("frechet_merge", "here")
        # four times the examples
        is_more = "256" in method
        is_tuned = situation == "metrics" and "by outputs" in method
        if needs in allowed and is_ours and not is_more and not is_tuned:
            yield method


def needs_of(method):
    "Of a row whose result does not say it."
    if "tuned" in method:
        return "inputs, scale"
    if method in SCALED:
        return "–" if method == "mean" else "scale"
    return "inputs"


def row(situation, s, others):
    "What is suggested, and how good it was."
    decide, _, other = SITUATIONS[situation]
    method = decide(s, others)
    if method not in s.rows:
        return None
    best = max(in_reach(s, situation), key=s.of)
    fixed = max(("TSV-M", other), key=s.of)
    regret, error = s.of(best) - s.of(method), s.error(method, best)
    return {
        "situation": situation,
        "family": s.family,
        "models": s.T,
        "suggested": method,
        "accuracy": s.of(method),
        "best": best,
        "best_accuracy": s.of(best),
        "regret": round(regret, 4),
        "se": round(error, 4),
        "hit": "yes" if regret <= 2*error else "no",
        "by_the_mean": chosen(SCALED, others) if situation == "nothing" else "",
        "TSV-M": s.of("TSV-M"),
        "other": other,
        "other_accuracy": s.of(other),
        "mean": s.of("mean"),
        "fixed": fixed,
        "from_fixed": round(s.of(method) - s.of(fixed), 4),
        "se_from": round(s.error(method, fixed), 4),
    }


def main():
    every, rows, unmeasured = list(sets()), [], []
    for situation in SITUATIONS:
        for s in every:
            others = [o for o in every if o.family != s.family]
            found = row(situation, s, others)
            if found is None:
                unmeasured.append([situation, s.family, s.T])
            else:
                rows.append(found)
    write_rows("suggest", rows, about("python bench/suggest.py", unmeasured=unmeasured))
    for r in rows:
        print(json.dumps(r, ensure_ascii=False))


if __name__ == "__main__":
    main()
