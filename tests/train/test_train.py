"""Training: members equal lone runs, kill and resume is exact, directories are whole or refused, losses go down."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from halting import Halting
from torch import Tensor

from wsae.acts.source import ArraySource
from wsae.core.artifact import read_manifest
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.sae import SAE, make_activation
from wsae.sae.config import GammaConfig
from wsae.train.config import MemberConfig, TrainConfig, family
from wsae.train.family import FamilyState, finished, make_family
from wsae.train.loggers import read_json_lines
from wsae.train.loop import Stopped, run_steps
from wsae.train.run import load_run, train_run
from wsae.train.state import GAMMA_EVERY
from wsae.train.step import lr_factor


def world(n: int = 4000, d_in: int = 16, n_features: int = 32, seed: int = 0) -> Tensor:
    """Sparse features in superposition, one dimension far louder than the rest, and an offset."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_features, d_in, generator=g), dim=1)
    z = (torch.rand(n, n_features, generator=g) < 0.06) * torch.rand(n, n_features, generator=g)
    x = 20 * z @ directions + 3
    x[:, 5] *= 10
    return x


def weighted(rule: str = "variance", **fields: object) -> MemberConfig:
    defaults: dict[str, object] = {"d_sae": 48, "activation": {"kind": "topk", "k": 4}, "lr": 3e-3}
    return MemberConfig.parse({"gamma": {"rule": rule}, **defaults, **fields})


def config(*members: MemberConfig, **fields: object) -> TrainConfig:
    data = {"members": members, "tokens": 24_000, "batch_size": 200, "log_every": 10, **fields}
    return TrainConfig.parse(data)


def run_all(cfg: TrainConfig, members: FamilyState, source: ArraySource) -> None:
    with quiet("train", None, "tokens") as tick:
        run_steps(cfg, members, source.stream(cfg.batch_size, 0), 0, tick, lambda _: None)


def files_of(run: Path) -> dict[str, bytes]:
    names = [p for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "speed.jsonl")]
    return {str(p.relative_to(run)): p.read_bytes() for p in names}


def test_training_lowers_the_loss_each_member_is_trained_on(tmp_path: Path) -> None:
    cfg = config(*family([weighted()]), dead_after=2_000)
    train_run(cfg, ArraySource(world()), tmp_path / "run")
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["member"] for r in rows[:2]] == ["plain", "variance-a1"]
    for name in ("plain", "variance-a1"):
        own = [r for r in rows if r["member"] == name]
        assert own[-1]["reconstruction"] < 0.3 * own[0]["reconstruction"]
        assert own[-1]["l0"] <= 4
    last = {r["member"]: r for r in rows[-2:]}
    assert last["plain"]["fvu"] == pytest.approx(last["plain"]["fvu_weighted"], rel=1e-6)
    assert last["variance-a1"]["fvu_weighted"] < last["plain"]["fvu_weighted"]


def test_each_member_of_a_family_equals_a_lone_run(tmp_path: Path) -> None:
    members = [
        weighted("none"),
        weighted("variance"),
        weighted("latent_variance"),
        weighted("variance", tied=True, l1=0.01, activation={"kind": "relu"}),
        weighted("none", seed=7, activation={"kind": "batch_topk", "k": 3}),
        weighted("none", d_sae=40, activation={"kind": "group_topk", "k": 4}, auxk=0.5),
    ]
    cfg = config(*members, tokens=6_000, dead_after=400)
    together = train_run(cfg, ArraySource(world()), tmp_path / "all").saes["acts"]
    assert len(together) == len(members)
    for i, (name, sae) in enumerate(together.items()):
        alone = config(members[i].model_copy(update={"label": name}), tokens=6_000, dead_after=400)
        (lone,) = train_run(alone, ArraySource(world()), tmp_path / str(i)).saes["acts"].values()
        for key, tensor in sae.tensors().items():
            assert torch.equal(tensor, lone.tensors()[key]), (name, key)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, dict[str, bytes]]:
    """A run of several kinds, and what it leaves."""
    members = family(
        [
            weighted(),
            weighted("latent_variance", activation={"kind": "batch_topk", "k": 3}),
            weighted(activation={"kind": "jumprelu"}, l0=0.01, target_l0=4),
            weighted(activation={"kind": "relu"}, l1=0.01, p_end=0.5),
        ]
    )
    cfg = config(*members, tokens=12_000, dead_after=600)
    place = tmp_path_factory.mktemp("uninterrupted") / "run"
    return cfg, files_of(train_run(cfg, ArraySource(world()), place).path)


@pytest.mark.parametrize("stop", [1, 10, 23, 59])
def test_a_stopped_and_resumed_run_ends_bit_for_bit_the_same(
    tmp_path: Path, uninterrupted: tuple[TrainConfig, dict[str, bytes]], stop: int
) -> None:
    (cfg, whole), source = uninterrupted, ArraySource(world())

    with pytest.raises(Stopped, match=f"step {stop} of 60"):
        train_run(cfg, Halting(world(), stop), tmp_path / "cut")
    with pytest.raises(UserError, match="add --resume"):
        train_run(cfg, source, tmp_path / "cut")
    train_run(cfg, source, tmp_path / "cut", resume=True)
    assert files_of(tmp_path / "cut") == whole


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import wsae.train.loop as loop
from test_train import ArraySource, config, family, train_run, weighted, world

torch.set_num_threads(1)
cfg = config(*family([weighted()]), tokens=40_000, dead_after=600)


def begin(out):
    child = os.fork()
    if child == 0:
        train_run(cfg, ArraySource(world()), out, resume=True)
        os._exit(0)
    return child


whole, cut = Path(sys.argv[2], "whole"), Path(sys.argv[2], "cut")
assert os.waitpid(begin(whole), 0)[1] == 0
loop.CHECKPOINT_SECONDS = 0.0  # from here on a checkpoint after every step
loop.Recorder._cost = property(lambda self: 0.0, lambda self, value: None)
pick, kills, status = random.Random(0), 0, None
while status != 0:
    child = begin(cut)
    while not (cut / "checkpoints").exists():
        time.sleep(0.001)
    if kills < 4:
        time.sleep(pick.random() * 0.5)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    kills += status != 0
print(kills)
"""


def test_a_run_killed_at_random_moments_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    """SIGKILL lands anywhere: in a step, in a checkpoint's files, between its files and its manifest."""
    command = [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no run was killed: the test showed nothing"
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_a_finished_run_is_returned_and_another_config_refused(tmp_path: Path) -> None:
    cfg, source = config(weighted(), tokens=2_000), ArraySource(world())
    first = train_run(cfg, source, tmp_path / "run").saes["acts"]["variance-a1"]
    before = files_of(tmp_path / "run")
    again = train_run(cfg, source, tmp_path / "run").saes["acts"]["variance-a1"]
    assert torch.equal(first.W_dec, again.W_dec)
    assert files_of(tmp_path / "run") == before
    other = config(weighted(), tokens=2_000, seed=1)
    with pytest.raises(UserError, match=r"train\.seed is 0 there, 1 here"):
        train_run(other, source, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="data is"):
        train_run(cfg, ArraySource(world(seed=9)), tmp_path / "run")
    labelled = ArraySource(world()).with_labels(np.arange(len(world())) % 3)
    with pytest.raises(UserError, match="data is"):
        train_run(cfg, labelled, tmp_path / "run")


@pytest.mark.parametrize("rule", ["none", "residual"])
def test_a_loss_that_is_lost_ends_the_run_in_a_line_of_the_member(
    tmp_path: Path, rule: str
) -> None:
    """Soon, and not as NaN weights at the end; a pilot's too."""
    cfg = config(weighted("variance"), weighted(rule, lr=1e10, label="fast"), tokens=200_000)
    with pytest.raises(UserError, match=r"fast: its loss is nan by step 10; lower .* \(1e\+10\)"):
        train_run(cfg, ArraySource(world()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and not a wsae run"):
        train_run(config(weighted()), ArraySource(world()), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_altered_checkpoint_or_member_is_refused_by_name(tmp_path: Path) -> None:
    cfg, source = config(weighted(), tokens=2_000), ArraySource(world())
    run = train_run(cfg, source, tmp_path / "run").path
    weights = run / "members" / "acts" / "variance-a1" / "sae.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"variance-a1/sae\.safetensors: checksum"):
        load_run(run)


def test_the_finished_sae_works_in_the_activations_own_units(tmp_path: Path) -> None:
    x = world() * 100
    cfg = config(weighted("none"), tokens=20_000)
    result = train_run(cfg, ArraySource(x), tmp_path / "run")
    sae = result.saes["acts"]["plain"]
    fvu = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert fvu == pytest.approx(rows[-1]["fvu"], rel=0.15)
    # the same data in other units gives the same SAE in those units (the scale is a power of two: exactly)
    small = train_run(cfg, ArraySource(x / 64), tmp_path / "small").saes["acts"]["plain"]
    assert torch.equal(small.W_dec, sae.W_dec)
    torch.testing.assert_close(small.b_dec * 64, sae.b_dec)


def test_decoder_rows_stay_at_unit_norm_and_the_start_is_shared() -> None:
    cfg = config(*family([weighted()]), tokens=4_000)
    source = ArraySource(world())
    members = make_family(cfg, source.stats())
    plain, other = members.members["acts"]
    assert torch.equal(plain.sae.W_dec, other.sae.W_dec)
    torch.testing.assert_close(
        plain.sae.W_enc.norm(dim=0), torch.full((plain.sae.cfg.d_sae,), 3**-0.5)
    )
    torch.testing.assert_close(plain.sae.W_enc / 3**-0.5, plain.sae.W_dec.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        plain.sae.b_dec.double() * plain.scale, source.stats()["acts"].kept.mean, rtol=1e-6, atol=0
    )
    run_all(cfg, members, source)
    for member in (plain, other):
        sae = finished(member)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
        assert not torch.equal(sae.W_enc, sae.W_dec.T)


def test_latent_variance_gamma_follows_the_latents() -> None:
    cfg = config(weighted("latent_variance"), tokens=12_000)
    source = ArraySource(world())
    built = make_family(cfg, source.stats())
    (member,) = built.members["acts"]
    assert torch.equal(member.sae.gamma, torch.ones(16))
    run_all(cfg, built, source)
    sae = finished(member)
    with torch.no_grad():
        z = sae.encode(world()).double()
        proxy = z.var(0, correction=0) @ sae.W_dec.double().square()
    expected = proxy / proxy.square().mean().sqrt()
    assert int(sae.gamma.argmax()) == int(expected.argmax()) == 5
    torch.testing.assert_close(sae.gamma.double(), expected, rtol=0.35, atol=0.05)
    assert GAMMA_EVERY < 60


def test_batch_topk_threshold_keeps_k_latents_at_inference(tmp_path: Path) -> None:
    cfg = config(weighted("none", activation={"kind": "batch_topk", "k": 4}), tokens=40_000)
    sae = train_run(cfg, ArraySource(world()), tmp_path / "run").saes["acts"]["plain"]
    with torch.no_grad():
        l0 = float((sae.encode(world()) > 0).double().sum(1).mean())
    assert l0 == pytest.approx(4, rel=0.15)


def test_an_l1_penalty_makes_codes_sparser(tmp_path: Path) -> None:
    relu = {"activation": {"kind": "relu"}}
    members = weighted("none", **relu, label="free"), weighted("none", **relu, l1=2.0, label="l1")
    train_run(config(*members, tokens=18_000), ArraySource(world()), tmp_path / "run")
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    l0 = {row["member"]: row["l0"] for row in rows}
    assert l0["l1"] < 0.5 * l0["free"]


def test_bf16_product_changes_the_fit_little(tmp_path: Path) -> None:
    fvu = {}
    for dtype in ("float32", "bfloat16"):
        train_run(config(weighted("none"), dtype=dtype), ArraySource(world()), tmp_path / dtype)
        fvu[dtype] = read_json_lines(tmp_path / dtype / "metrics.jsonl")[-1]["fvu"]
    assert fvu["bfloat16"] == pytest.approx(fvu["float32"], abs=0.01)


def test_the_learning_rate_rises_holds_and_falls() -> None:
    rates = [lr_factor(s, 100, 0.1, 0.2) for s in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(rates[10:80]) == {1.0}
    assert rates[80:] == pytest.approx([(100 - s) / 20 for s in range(80, 100)])
    assert [lr_factor(s, 3, 0.0, 0.0) for s in range(3)] == [1, 1, 1]


def test_families_name_their_members_and_bring_the_twin() -> None:
    members = family(
        [weighted(), weighted(k_aux=3), MemberConfig(gamma=GammaConfig(rule="variance", alpha=0.5))]
    )
    names = TrainConfig(members=members, tokens=10).names()
    assert len(set(names)) == len(members) == 6
    assert sum(n.startswith("plain") for n in names) == 3
    assert family([weighted("none")]) == (weighted("none"),)
    assert len(family([weighted()], twin=False)) == 1
    kinds = [{"kind": "jumprelu", "threshold": t} for t in (0.1, 0.2)] + [{"kind": "topk", "k": 4}]
    apart = config(*(weighted("none", activation=kind) for kind in kinds)).names()
    assert apart == ["plain-jumprelu-threshold0.1", "plain-jumprelu-threshold0.2", "plain-topk-k4"]
    also = [weighted("none", activation=kind, l0=i) for i, kind in enumerate(kinds[:2])]
    assert config(*also).names() == ["plain-jumprelu", "plain-jumprelu-l0-1"]  # as they always were
    with pytest.raises(UserError, match="two members are called 'a'"):
        config(weighted(label="a"), weighted("none", label="a"))


@pytest.mark.parametrize(
    "label", ["a|b", "..", "a/../../b", "/a", "a/", ".", "x" * 101, "a\nb", "\u202eab"]
)
def test_a_label_that_cannot_name_a_folder_is_refused_before_training(label):
    with pytest.raises(UserError, match="label: cannot name a folder and results"):
        MemberConfig.parse({"label": label}, where="member")
    for name in ("lr/0.1", "ü <b>", "controlled"):
        assert MemberConfig(label=name).label == name
    with pytest.raises(UserError, match="begin with control-"):
        MemberConfig.parse({"label": "control-random"}, where="member")


@pytest.mark.parametrize(
    ("x", "fields", "says"),
    [
        (torch.ones(50, 4), {}, "all .* activations are the same vector"),
        (world(), {"gamma": {"rule": "consistency"}}, "needs labels"),
        (
            world(),
            {"gamma": {"rule": "vector", "vector": (1.0, 2.0)}},
            "2 entries, the activations 16",
        ),
        (world(), {"d_sae": 3}, "k = 4 active latents of only d_sae = 3"),
    ],
)
def test_data_that_cannot_train_are_refused(
    tmp_path: Path, x: Tensor, fields: dict[str, object], says: str
) -> None:
    member = MemberConfig.parse({**weighted("none").to_dict(), **fields})
    with pytest.raises(UserError, match=says):
        train_run(config(member, batch_size=10), ArraySource(x), tmp_path / "run")


def test_classes_that_tell_no_dimension_from_another_are_refused(tmp_path: Path) -> None:
    source = ArraySource(world().relu(), labels=np.zeros(4000, dtype=int))
    with pytest.raises(UserError, match="every dimension has the same"):
        train_run(config(weighted("consistency")), source, tmp_path / "run")


def test_gamma_json_and_manifest_record_what_was_done(tmp_path: Path) -> None:
    train_run(config(*family([weighted()]), tokens=2_000), ArraySource(world()), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "gamma.json").read_text())["acts"]
    assert record["variance-a1"]["heaviest"][0][0] == 5
    assert record["variance-a1"]["tokens"] == 3600
    assert record["plain"]["max_over_median"] == 1
    manifest = read_manifest(tmp_path / "run", "run")
    assert manifest.info["members"] == {"acts": ["plain", "variance-a1"]}
    sae = SAE.load(tmp_path / "run" / "members" / "acts" / "variance-a1")
    assert float(sae.gamma.square().mean()) == pytest.approx(1, rel=1e-5)
    assert make_activation("topk", 4) == sae.cfg.activation
