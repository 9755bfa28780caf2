"""`wsae reproduce figure4|figure5`: from settings to panels with verdicts, tables and pictures.

Differences are from the plain SAE, paired by seed, with Student intervals. The copies of the paper at hand give no
number for either figure, and of Figure 5 the caption alone: compared are the text's statement ("a notable improvement
in semantic consistency") and what the captions name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from wsae.acts.images.harvest import Gallery, harvest_images
from wsae.acts.images.sets import ImageSet, open_images
from wsae.acts.source import StoreSource
from wsae.core.artifact import read_manifest
from wsae.core.errors import UserError, duration, size
from wsae.core.files import read_sealed, seal, write_json
from wsae.evals.classes import score_run
from wsae.evals.glossary import CLASS_SCORES
from wsae.run import Run
from wsae.stats.classes import Hits, Strongest
from wsae.studies.drawing import panels_figure
from wsae.studies.engine import (
    NONE,
    Mean,
    Panel,
    PaperStudy,
    Row,
    Stage,
    StudyRun,
    Table,
    Verdict,
    as_series,
    cell,
    comparable,
    compared,
    judged,
    mean_interval,
    pooled,
    select,
    span,
)
from wsae.studies.reproduce_config import PLAIN, Backbone, BackboneRun, VisionConfig
from wsae.train.config import TrainConfig
from wsae.vision.pretrain import pretrain

# The proxy "top": consistency of each input dimension among its strongest training images, as the
# paper words it.

_ROWS = 4096


def top_consistency(
    source: StoreSource, labels: Int64[np.ndarray, " images"], n_top: int, cache: Path
) -> tuple[float, ...]:
    """Return, for each dimension of the only hook, the share of the most frequent class of its n strongest rows.

    Training rows alone; 0 for a dimension positive on fewer than n. Kept in the file `cache` beside the data's digest.
    """
    key = {"data": source.digest(), "n_top": n_top}
    if cache.exists():
        kept = read_sealed(cache)
        if kept.get("key") == key:
            return tuple(kept["beta"])
    ((hook, d_in),) = source.hooks.items()
    image = np.asarray(source.store.places("train")[0])
    strongest = Strongest(d_in, n_top)
    for first in range(0, source.n_rows, _ROWS):
        index = np.arange(first, min(first + _ROWS, source.n_rows))
        x = source.store.rows("train", index)[hook]
        candidates = x.topk(min(n_top, len(x)), dim=0).values[-1]
        hits = Hits.of_dense(torch.where((x >= candidates) & (x > 0), x, 0.0))
        number = image[index][hits.row.numpy()]
        strongest.update(hits.unit.numpy(), hits.value.numpy(), number, labels[number])
    beta = np.nan_to_num(strongest.share()).tolist()
    write_json(cache, seal({"key": key, "beta": beta}))
    return tuple(beta)


# What a figure is about to do, and roughly what it takes.

FORWARD = {"imagenet": 3.6e9 / 224**2, "small": 1.1e9 / 32**2, "smallest": 0.28e9 / 32**2}
"""Operations of ResNet-18's forward pass per pixel of an image, by stem (a multiplication and an addition: two)."""
SPEED = {"cpu": 5e10, "cuda": 2e13}
"""Operations a second that training reaches on a core and on a graphics card like the paper's: a guess."""


def announce(cfg: VisionConfig, images: int, torchrun_hint: bool = False) -> list[str]:
    """Return what will be done, line by line, with rough times for a single device."""
    sae, plan = cfg.plan.sae, cfg.plan
    rate = SPEED["cpu" if cfg.device == "cpu" else "cuda"]
    lines = [
        f"{plan.name}: {images:,} images, backbones: {', '.join(b.name for b in cfg.used())}; {plan.n_members} SAEs of "
        f"{sae.d_sae} latents, k {sae.k}, families: {len(plan.runs)}; finished stages are not run again"
    ]
    for backbone in cfg.used():
        if backbone.run is None:
            seconds = pretraining_operations(backbone, images) / rate
            lines.append(
                f"pretraining {backbone.name}: {backbone.pretrain.epochs} epochs, about {duration(seconds)} if nothing "
                "waits for images"
            )
    rows = round(images * (1 - cfg.used()[0].pretrain.heldout_fraction))
    widths = {"pooler": cfg.used()[0].pretrain.widths[-1]}
    total = sum(
        len(run.weightings) * widths.get(run.hook, cfg.used()[0].pretrain.projector_out)
        for run in plan.runs
    )
    seconds = 4 * total * sae.d_sae * rows * sae.passes / rate
    groups = cfg.classes.groups * sae.d_sae * 4
    lines.append(
        f"training the SAEs: {sae.passes} passes over {rows:,} rows, about {duration(seconds)}; scoring holds "
        f"{size(groups)} for each class"
    )
    if torchrun_hint:
        lines.append(
            "on several cards: pretrain first (torchrun --nproc-per-node 2 -m wsae.cli pretrain ...), then give "
            "--pretrained RUN"
        )
    return lines


def pretraining_operations(backbone: Backbone, images: int) -> float:
    """Return the operations of a pretraining run: two views, forward and backward (twice the forward)."""
    cfg = backbone.pretrain
    narrow = (cfg.widths[-1] / 512) ** 2
    each = FORWARD[cfg.stem] * cfg.size**2 * narrow * 2 * 3
    used = min(cfg.limit or images, images) * (1 - cfg.heldout_fraction)
    return each * used * cfg.epochs


# From images to scored SAEs: pretrain, harvest, then train, evaluate and score run after run.
#
# Held-out images are for the last two stages alone: they do not enter pretraining, gamma, or the training of the SAEs.


@dataclass
class FigureStudy(PaperStudy[VisionConfig]):
    """The recipe of Figures 4 and 5, which share `out`."""

    torchrun_hint: bool = False

    @cached_property
    def images(self) -> ImageSet:
        """The images; raises UserError where they have no classes."""
        found = open_images(self.cfg.images)
        if found.labels is None:
            raise UserError(
                f"images {self.cfg.images.path}: have no classes, which consistency is about; give labelled ones"
            )
        return found

    @property
    def labels(self) -> Int64[np.ndarray, " images"]:
        """The class of every image by number."""
        labels = self.images.labels
        assert labels is not None
        return labels

    def introduce(self) -> None:
        """Tell what will be done and roughly what it takes."""
        for line in announce(self.cfg, len(self.images), self.torchrun_hint):
            self.say(line)

    def prepare(self) -> None:
        """Pretrain every backbone that is not there, and harvest its embeddings."""
        cfg, images = self.cfg, self.images
        for backbone in cfg.used():
            place = self.model(backbone.name)
            if backbone.run is None:
                self.say(f"pretrain: {backbone.name}, {len(images)} images")
                settings = backbone.pretrain
                pretrain(settings, images, place, self.progress, resume=True, device=cfg.device)
            wanted = cfg.harvest(backbone.name, place)
            harvest_images(wanted, self.store(backbone.name), self.progress)

    def model(self, backbone: str) -> Path:
        """Return the directory of a backbone's pretraining run."""
        return self.cfg.backbone(backbone).run or self.out / "pretrain" / backbone

    def store(self, backbone: str) -> Path:
        """Return the directory of a backbone's embeddings."""
        return self.out / "store" / backbone

    def runs(self) -> list[StudyRun]:
        """Return the runs in the plan's order."""
        return [
            StudyRun(
                i,
                (run.hook,),
                self.out / "runs" / run.backbone / run.hook / f"seed-{run.seed}",
                f"{run.backbone}, {run.hook}, seed {run.seed}",
            )
            for i, run in enumerate(self.cfg.plan.runs)
        ]

    def source(self, run: StudyRun) -> StoreSource:
        """Return the activations of a run."""
        backbone = self.cfg.plan.runs[run.number].backbone
        return StoreSource(self.store(backbone), run.hooks, verify=False)

    def training(self, run: StudyRun) -> TrainConfig:
        """Return a run's training; the proxy `top` is computed once for each backbone and hook, from training rows."""
        planned, source = self.cfg.plan.runs[run.number], self.source(run)
        top = None
        if any(weighting.proxy == "top" for weighting in planned.weightings):
            place = run.path.parent / "top.json"
            top = top_consistency(source, self.labels, self.cfg.classes.n_top, place)
        return self.cfg.training(run.number, source.n_rows, top)

    def stages(self) -> list[Stage]:
        """Return training, evaluation and the scores by class."""

        def score(run: StudyRun) -> None:
            score_run(run.path, self.source(run), self.labels, self.cfg.classes, self.progress)

        return [
            self.trained(),
            self.evaluated(self.cfg.evaluation, lambda: Gallery(self.images)),
            Stage("score", score, lambda _: self.cfg.classes, "classes"),
        ]

    def rows(self, run: StudyRun) -> list[Row]:
        """Return the rows of one run."""
        return run_rows(self.cfg.plan.runs[run.number], run.path)

    def panels(self, rows: list[Row]) -> list[Panel]:
        """Return the figure's panels."""
        return figure4(rows) if self.cfg.plan.name == "figure4" else figure5(rows)

    def results(self, rows: list[Row]) -> dict[str, Any]:
        """Return panels, tables, and what probes of the embeddings know of the classes, beside raw pixels'."""
        models = {backbone.name: self.model(backbone.name) for backbone in self.cfg.used()}
        return {
            "panels": [panel.to_dict() for panel in self.panels(rows)],
            "tables": tables(rows),
            "backbones": {
                name: read_manifest(place, "pretrain", verify=False).info.get("probes")
                for name, place in models.items()
            },
        }

    def draw(self, rows: list[Row], out: Path) -> list[Path]:
        """Draw the panels."""
        return draw(self.cfg.plan.name, self.panels(rows), out)


class ImageDemo(FigureStudy):
    """The study of one run, as the demo has it: each stage in a directory of its own."""

    def model(self, backbone: str) -> Path:  # noqa: ARG002
        """Return the directory of the pretraining."""
        return self.out / "pretrain"

    def store(self, backbone: str) -> Path:  # noqa: ARG002
        """Return the directory of the embeddings."""
        return self.out / "store"

    def runs(self) -> list[StudyRun]:
        """Return the one run."""
        return [StudyRun(0, ("pooler",), self.out / "run")]


# One row per SAE or control: what it is, how well it reconstructs, how its latents go with the
# classes. JSON-ready.

WAYS = ("all", "matched", "density", "adjusted", "within", "images")
"""Over what a member is compared with the plain one (`wsae.evals.classes`)."""


def run_rows(planned: BackboneRun, path: Path) -> list[Row]:
    """Return the rows of one finished run: its members, then its controls."""
    hook, run = planned.hook, Run(path)
    metrics = run.evaluation_record["hooks"][hook]["members"]
    scores = run.class_record["hooks"][hook]
    base = {"backbone": planned.backbone, "hook": hook, "seed": planned.seed}
    rows = []
    for weighting in planned.weightings:
        name, found = weighting.label, metrics[weighting.label]["metrics"]
        alpha = 0.0 if weighting.proxy == "none" else weighting.alpha
        row = base | {"member": name, "proxy": weighting.proxy, "alpha": alpha}
        row |= _flat(scores["members"][name])
        row |= {key: found[key]["value"] for key in ("fvu", "fvu_weighted")}
        row["effective_dimensions"] = run.gamma_record[hook][name]["effective_dimensions"]
        lines = [line for line in scores["comparisons"] if line["b"] == PLAIN]
        rows.append(row | {"differences": compared(lines, name, WAYS)})
    for name, entry in scores["controls"].items():
        rows.append(base | {"member": name, "proxy": "control"} | _flat(entry))
    return rows


def _flat(entry: Row) -> Row:
    """Return the means of the scores by name, beside the whole entry."""
    means = {name: score["value"] for name, score in entry["scores"].items()}
    coverage = {f"share_{key}": value for key, value in entry["coverage"].items()}
    return means | coverage | {"ncl_minibatch": entry["ncl"]["minibatch"], "classes": entry}


WSAE = "consistency-a1"
"""The paper names no alpha for Figure 4; 1 is its choice elsewhere."""
TOP = "top-a1"
NEGLIGIBLE = 0.005
"""A difference under half a point is not called an effect, however sure it is."""
READINGS = {
    "consistency_ncl": "all active latents, as NCL's code counts",
    "consistency_top": "the strongest samples of each latent, as the paper words it",
    "consistency_corrected": "less chance, latents with enough support",
}
"""The readings of "semantic consistency" that are judged, each on its own."""
PROXIES = {
    "consistency": "consistency",
    "top": "consistency of the strongest images",
    "variance": "variance",
}


def figure4(rows: Sequence[Row]) -> list[Panel]:
    """Return, for every backbone, hook and reading, SAE against WSAE (alpha 1)."""
    return [
        _sae_against_wsae(select(rows, backbone=backbone, hook=hook), f"{backbone}, {hook}", score)
        for score in READINGS
        for backbone, hook in places(rows)
    ]


def _sae_against_wsae(rows: list[Row], where: str, score: str) -> Panel:
    found = paired(rows, WSAE, score)
    controls = dict.fromkeys(row["member"] for row in select(rows, proxy="control"))
    names = {PLAIN: "SAE", WSAE: "WSAE", TOP: "WSAE, weights from the strongest images"}
    names |= {name: name for name in controls}
    means = {shown: over_seeds(rows, name, score) for name, shown in names.items()}
    pair = [f"{name} {100 * m.value:.1f} %" for name in ("SAE", "WSAE") if (m := means[name])]
    shuffled = over_seeds(rows, "control-shuffled", score)
    chance = "" if shuffled is None else f"; shuffled classes {100 * shuffled.value:.1f} %"
    return Panel(
        panel=f"4: {where}",
        score=score,
        paper="WSAE notably above SAE",
        ours=f"{', '.join(pair)}{points(found)}{chance}",
        verdict=_verdict([found]),
        series=tuple(as_series(shown, {0.0: mean}) for shown, mean in means.items() if mean),
    )


def figure5(rows: Sequence[Row]) -> list[Panel]:
    """Return (a) consistency against alpha, (b) by proxy, (c) the reconstruction error against alpha."""
    panels = []
    for backbone, hook in places(rows):
        here = select(rows, backbone=backbone, hook=hook)
        powers = {r["alpha"]: r["member"] for r in here if r["proxy"] in ("none", "consistency")}
        powers = dict(sorted(powers.items()))
        if len(powers) > 2:
            where = f"{backbone}, {hook}"
            panels += [_against_alpha(here, where, score, powers) for score in READINGS]
            panels += [_by_proxy(here, where, score) for score in READINGS]
            panels.append(_error(here, where, powers))
    order = ("5a", "5b", "5c")
    return sorted(panels, key=lambda panel: order.index(panel.panel[:2]))


def _against_alpha(rows: list[Row], where: str, score: str, powers: dict[float, str]) -> Panel:
    found = {a: paired(rows, name, score) for a, name in powers.items() if a > 0}
    return Panel(
        panel=f"5a: {where}",
        score=score,
        paper="(caption only) consistency under different alpha; above alpha 0 by Figure 4",
        ours="; ".join(f"alpha {a:g}: {points(d).strip(' :')}" for a, d in found.items()),
        verdict=_verdict(list(found.values())),
        series=(as_series("WSAE (alpha 0: SAE)", _line(rows, powers, score)),),
    )


def _by_proxy(rows: list[Row], where: str, score: str) -> Panel:
    names = [PLAIN, *(f"{proxy}-a1" for proxy in PROXIES)]
    found = {name: paired(rows, name, score) for name in names[1:]}
    line = _line(rows, dict(enumerate(names)), score)
    return Panel(
        panel=f"5b: {where}",
        score=score,
        paper="(caption only) SAE beside WSAEs by semantic consistency and by variance; both above it by Figure 4",
        ours="; ".join(f"{name}: {points(d).strip(' :')}" for name, d in found.items()),
        verdict=_verdict([found["consistency-a1"], found["variance-a1"]]),
        series=(as_series("SAE and WSAEs, alpha 1", line),),
    )


def _error(rows: list[Row], where: str, powers: dict[float, str]) -> Panel:
    plain, weighted = (_line(rows, powers, score) for score in ("fvu", "fvu_weighted"))
    base = next(iter(plain.values())).value
    ratios = {a: mean.value / base - 1 for a, mean in plain.items() if a > 0}
    shown = ", ".join(f"alpha {a:g}: {ratio:+.1%}" for a, ratio in ratios.items())
    return Panel(
        panel=f"5c: {where}",
        score="fvu",
        paper="(caption only) SAE reconstruction error under different alpha; taken as comparable, as in Figure 3(c)",
        ours=f"plain FVU {base:.3f} at alpha 0; {shown}",
        verdict=comparable(max(abs(ratio) for ratio in ratios.values())),
        series=(
            as_series("plain FVU", plain),
            as_series("FVU under the member's own weights", weighted),
        ),
    )


def _line(rows: Sequence[Row], names: dict[Any, str], score: str) -> dict[Any, Mean]:
    """Return place -> the mean of the member named there, where it was scored."""
    means = {place: over_seeds(rows, name, score) for place, name in names.items()}
    return {place: mean for place, mean in means.items() if mean}


def places(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return backbones and hooks in order."""
    return list(dict.fromkeys((row["backbone"], row["hook"]) for row in rows))


def over_seeds(rows: Sequence[Row], member: str, score: str) -> Mean | None:
    """Return the mean of a score over a member's seeds; None where some seed has none."""
    values = [row[score] for row in select(rows, member=member)]
    return mean_interval(values) if values and None not in values else None


def paired(rows: Sequence[Row], member: str, score: str) -> Mean | None:
    """Return the mean over seeds of (member - plain); None where some seed lacks either."""
    plain = {row["seed"]: row[score] for row in select(rows, member=PLAIN)}
    found = [(row[score], plain.get(row["seed"])) for row in select(rows, member=member)]
    if not found or any(None in pair for pair in found):
        return None
    return mean_interval([float(a) - float(b) for a, b in found if b is not None])


def points(found: Mean | None) -> str:
    """Return ": +1.2 points [0.3, 2.1] over 3 seeds"."""
    if found is None:
        return ": not scored"
    return f": {100 * found.value:+.1f} points{span(found, 100.0, '+.1f')} over {found.n} seeds"


def _verdict(differences: Sequence[Mean | None]) -> Verdict:
    found = [difference for difference in differences if difference is not None]
    return (
        judged(found, lower_is_claimed=False, negligible=NEGLIGIBLE) if found else "not reproduced"
    )


# Pictures of Figures 4 and 5.


def draw(name: str, panels: Sequence[Panel], out: Path) -> list[Path]:
    """Draw a figure's panels; returns the paths of its pictures."""
    if name == "figure4":
        return panels_figure(_figure4(panels), out / name, "embeddings", 3)
    paths = []
    for part, xlabel in {"5a": "alpha", "5b": "weights by", "5c": "alpha"}.items():
        shown = [_drawn(panel) for panel in panels if panel.panel.startswith(part)]
        if shown:
            paths += panels_figure(shown, out / f"{name}{part[1:]}", xlabel, 3)
    return paths


def _figure4(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return a panel for each reading: SAE, WSAE and controls at every backbone and hook."""
    out = []
    for score, words in READINGS.items():
        mine = [panel for panel in panels if panel.score == score]
        lines: dict[str, dict[str, Any]] = {}
        for place, panel in enumerate(mine):
            for series in panel.series:
                line = lines.setdefault(
                    series.method,
                    {"method": series.method, "levels": [], "mean": [], "low": [], "high": []},
                )
                line["levels"].append(place)
                for key in ("mean", "low", "high"):
                    line[key].append(getattr(series, key)[0])
        ticks = [
            f"{panel.panel.partition(': ')[2]}\n{panel.verdict}".replace(", ", "\n")
            for panel in mine
        ]
        title = words[0].upper() + words[1:]
        series = list(lines.values())
        out.append({"title": title, "ylabel": "consistency", "series": series, "ticks": ticks})
    return out


def _drawn(panel: Panel) -> dict[str, Any]:
    part, _, where = panel.panel.partition(": ")
    words = READINGS.get(panel.score, "reconstruction error")
    found: dict[str, Any] = {
        "title": f"({part[1:]}) {where}: {words}\n{panel.verdict}",
        "ylabel": "consistency" if panel.score in READINGS else "FVU",
        "series": [line.to_dict() for line in panel.series],
        "bottom": min(min(line.mean) for line in panel.series if line.mean),
    }
    if part == "5b":
        found["ticks"] = ["SAE", *(word.replace(" of ", "\nof ") for word in PROXIES.values())]
    return found


# Tables of Figures 4 and 5 as header and rows of text; scores in percent, intervals over seeds.

COLUMNS = {
    "NCL": "consistency_ncl",
    "one mini-batch": "ncl_minibatch",
    "top": "consistency_top",
    "corrected": "consistency_corrected",
    "selectivity": "selectivity",
    "alive": "share_alive",
    "supported": "share_supported",
}


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Return every table by title, backbone by backbone and hook by hook."""
    out = {}
    for backbone, hook in places(rows):
        here = select(rows, backbone=backbone, hook=hook)
        out[f"{backbone}, {hook}: semantic consistency in %, mean over seeds"] = _scores(here)
        out[f"{backbone}, {hook}: weighted minus plain, points (information in bits)"] = _gains(
            here
        )
    return out


def _scores(rows: list[Row]) -> Table:
    forms = {name: (key, 100.0, ".1f") for name, key in COLUMNS.items()}
    forms |= {"information, bits": ("information", 1.0, ".4f"), "FVU": ("fvu", 1.0, ".4g")}
    forms |= {"weighted FVU": ("fvu_weighted", 1.0, ".4g")}
    forms |= {"effective dimensions": ("effective_dimensions", 1.0, ".4g")}
    body = []
    for name in dict.fromkeys(row["member"] for row in rows):
        has = select(rows, member=name)[0]  # controls were not trained
        cells = [
            cell(over_seeds(rows, name, key), scale, form) if key in has else NONE
            for key, scale, form in forms.values()
        ]
        body.append([name, *cells])
    return {"header": ["", *forms], "rows": body}


def _gains(rows: list[Row]) -> Table:
    body = []
    for name in dict.fromkeys(row["member"] for row in rows if row.get("differences")):
        mine = select(rows, member=name)
        for score in CLASS_SCORES:
            form = (1.0, "+.4f") if score == "information" else (100.0, "+.1f")
            found = [[row["differences"][score].get(way) for row in mine] for way in WAYS]
            body.append([name, score, *(cell(pooled(parts), *form) for parts in found)])
    return {"header": ["", "score", *WAYS], "rows": body}
