"""Training through the model: gradients by hand, what is left alone, the loss goes down, resume, refusals."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from acts_models import make_model, make_text
from test_train import files_of
from torch import Tensor

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.live import LiveSource, SequenceStream
from wsae.acts.source import ArraySource
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.train.config import TrainConfig
from wsae.train.endtoend import frozen, scored_batch, spliced
from wsae.train.loggers import read_json_lines
from wsae.train.loop import Stopped, batches, run_steps
from wsae.train.run import start_family, train_run
from wsae.train.state import MemberState, metrics_row

HOOK, SEQ = "layers.1", 16


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], LiveSource]:
    """A tiny language model whose sequences begin with a special token, one document each, padded."""
    root = tmp_path_factory.mktemp("endtoend")
    text = make_text(root / "text.jsonl", 80)
    cfg = HarvestConfig(
        model=str(make_model(root / "model", bos=True)),
        text=TextConfig(path=str(text)),
        hooks=(HOOK,),
        seq_len=SEQ,
        pack=False,
        sink_norm_ratio=1.3,  # so that some rows are sinks
        tokens=2_000,
    )
    first = LiveSource(cfg)
    return lambda: LiveSource(cfg, language=first.language)


def run_of(loss: str | None = "ce", **member: object) -> TrainConfig:
    data = {"d_sae": 24, "activation": {"kind": "topk", "k": 3}, "lr": 3e-3, "auxk": 0.0, **member}
    return TrainConfig.parse(
        {"members": [data], "tokens": 1_280, "batch_size": 64, "loss": loss, "log_every": 4}
    )


def by_hand(model: torch.nn.Module, ids: Tensor, mask: Tensor, swap: Callable) -> Tensor:
    """Return the logits with swap(h) in place of the second layer's output h, layer by layer."""
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    h = swap(found.hidden_states[2])
    place = torch.arange(ids.shape[1])[None]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    seen = causal[None, None] & mask[:, None, None].bool()
    rotary = model.model.rotary_emb(h, place)
    out = model.model.layers[2](h, attention_mask=seen, position_embeddings=rotary)
    out = out[0] if isinstance(out, tuple) else out
    return model.lm_head(model.model.norm(out))


def _map(member: MemberState) -> Tensor:
    return torch.eye(16) if member.inside is None else member.inside.map


def replacement(member: MemberState, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what puts a member's reconstructions in place of kept rows, by dense products."""
    sae, P = member.sae, _map(member)

    def swap(h: Tensor) -> Tensor:
        y = h @ P / member.scale
        pre = (y - sae.b_dec) @ sae.W_enc_t.T + sae.b_enc
        if "threshold" not in sae.arch.parameters:
            active = torch.zeros_like(pre).scatter(2, pre.topk(3, dim=2).indices, 1.0)
            z = pre.relu() * active
        else:  # the threshold's own gradient is of another kind
            z = pre * (pre > sae.threshold.detach())
        y_hat = z @ sae.W_dec + sae.b_dec
        x_hat = member.scale * y_hat @ torch.linalg.inv(P)
        return torch.where(kept[..., None], x_hat, h)

    return swap


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu whiten", "topk residual"])
def test_the_loss_and_its_gradients_are_those_made_by_hand(
    live: Callable[[], LiveSource], loss: str, kind: str
) -> None:
    source = live()
    _, _, map_ = kind.partition(" ")
    mapped = {"precondition": {"kind": map_, "power": 0.5}} if map_ else {}
    own = {"activation": {"kind": "jumprelu", "bandwidth": 0.5}} if "jump" in kind else {}
    cfg = run_of(loss, **mapped, **own)
    (member,) = start_family(cfg, source, source.stats()).members[HOOK]
    model, sae = source.language.model, member.sae
    generator = torch.Generator().manual_seed(0)
    for p in sae.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    tokens = SequenceStream(source, 20 * SEQ, 0).next()
    (point,) = source.flow.probed.hooks
    with frozen(model):
        found = spliced(cfg, source, point, member, scored_batch(cfg, source, tokens))
        assert found is not None
        found.loss.backward()
    assert all(p.grad is None for p in model.parameters())
    mine = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()

    ids, mask = tokens.ids, (tokens.positions >= 0).long()
    special = torch.isin(ids, torch.tensor(source.language.tokenizer.all_special_ids))
    with torch.no_grad():
        h = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    norms = h.norm(dim=2)
    kept = mask.bool() & ~special & (norms <= 1.3 * source.flow.rule.medians[HOOK])
    kept[:, 0] = False
    assert int((mask.bool() & ~special & ~kept).sum()) > 0, "no sink is among the rows"
    assert int((mask == 0).sum()) > 0, "nothing is padded"
    swap, P = replacement(member, kept), _map(member)
    logits = by_hand(model, ids, mask, swap)[:, :-1]
    target = (mask.bool() & ~special)[:, 1:]
    log_q = logits.log_softmax(-1)[target]
    if loss == "ce":
        expected = -log_q[torch.arange(len(log_q)), ids[:, 1:][target]].mean()
    else:
        with torch.no_grad():
            log_p = by_hand(model, ids, mask, lambda h: h)[:, :-1].log_softmax(-1)[target]
        expected = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    for name, p in sae.named_parameters():
        if name != "threshold":
            size = p.grad.abs().max()
            assert float((mine[name] - p.grad).abs().max() / size) < 1e-4, name
            assert float(size) > 0
    assert int(found.batch.x.shape[0]) == int(kept.sum())
    error = F.mse_loss(found.batch.x, (h[kept] @ P / member.scale))
    assert float(error) < 1e-8


def test_a_transcoder_takes_its_modules_place(live: Callable[[], LiveSource]) -> None:
    first = live()
    sides = ("layers.1.mlp.input", "layers.1.mlp")
    cfg = first.cfg.model_copy(update={"hooks": sides, "sink_norm_ratio": None})
    source = LiveSource(cfg, language=first.language)
    run = run_of(skip=True).model_copy(update={"hook_out": {sides[0]: sides[1]}})
    (member,) = start_family(run, source, source.stats()).members[sides[0]]
    model, sae = source.language.model, member.sae
    for parameter in sae.parameters():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(0)
        )
    tokens = SequenceStream(source, 20 * SEQ, 0).next()
    points = {point.name: point for point in source.flow.probed.hooks}
    with frozen(model):
        scored = scored_batch(run, source, tokens)
        found = spliced(run, source, points[sides[1]], member, scored, points[sides[0]])
        assert found is not None
        found.loss.backward()
    mine = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    kept = source.flow.rule.by_token(tokens.ids, tokens.positions) == 0

    def put(_module: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        x = args[0][kept] / member.scale_in
        pre = x @ sae.W_enc_t.T + sae.b_enc
        values, index = pre.topk(3)
        z = torch.zeros_like(pre).scatter(1, index, values.relu())
        y = (z @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T) * member.scale
        return out.masked_scatter(kept[..., None], y)

    with frozen(model), model.model.layers[1].mlp.register_forward_hook(put):
        mask = (tokens.positions >= 0).long()
        logits = model(input_ids=tokens.ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits[scored.target], tokens.ids[:, 1:][scored.target])
        loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-6)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_loss_falls_and_a_stopped_run_ends_the_same(
    tmp_path: Path, live: Callable[[], LiveSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_of("kl", lr=1e-2).model_copy(update={"tokens": 2_560})
    whole = train_run(cfg, live(), tmp_path / "whole")
    rows = read_json_lines(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["l0"] == pytest.approx(3, abs=0.1)
    assert whole.saes[HOOK]["plain"].W_dec.grad is None
    ahead, served = SequenceStream.next, 0

    def halting(self: SequenceStream) -> object:
        nonlocal served
        served += 1
        if served == 23:  # past the text's end
            os.kill(os.getpid(), signal.SIGINT)
        return ahead(self)

    monkeypatch.setattr(SequenceStream, "next", halting)
    with pytest.raises(Stopped, match="step 23 of 40"):
        train_run(cfg, live(), tmp_path / "cut")
    train_run(cfg, live(), tmp_path / "cut", resume=True)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_batches_without_a_row_to_replace_or_a_token_to_score_teach_nothing(
    tmp_path: Path, live: Callable[[], LiveSource], loss: str
) -> None:
    """One sequence a batch: of one token, so that nothing follows; of sinks alone; of as many others."""
    text, first = tmp_path / "text.jsonl", live()
    long = Path(first.cfg.text.path).read_text().splitlines()[:20]
    text.write_text("\n".join(line for one in long for line in ('{"text": ""}', one)) + "\n")
    own = {"text": TextConfig(path=str(text)), "skip_first": 0}
    cfg = run_of(loss, activation={"kind": "batch_topk", "k": 3})
    cfg = cfg.model_copy(update={"batch_size": SEQ, "tokens": 40 * SEQ, "log_every": 1})
    source = LiveSource(first.cfg.model_copy(update=own), language=first.language)
    train_run(cfg, source, tmp_path / "run")
    assert len(read_json_lines(tmp_path / "run" / "metrics.jsonl")) == 40
    text.write_text('{"text": "</s></s>"}\n' * 40)
    source = LiveSource(
        source.cfg.model_copy(update={"skip_special": False}), language=first.language
    )
    with pytest.raises(UserError, match="no sequence has a row to replace and a token to score"):
        train_run(cfg, source, tmp_path / "none")


def test_a_new_member_starts_from_its_first_batch(live: Callable[[], LiveSource]) -> None:
    cfg, source = run_of(activation={"kind": "jumprelu"}, target_l0=3), live()
    cfg = cfg.model_copy(update={"tokens": 64})
    family = start_family(cfg, source, source.stats())
    with quiet("train", None, "tokens") as tick:
        run_steps(cfg, family, batches(cfg, source), 0, tick, lambda _: None)
    (member,) = family.members[HOOK]
    row = metrics_row(member)
    assert row["l0"] == pytest.approx(3, abs=0.5)


def test_what_has_no_loss_through_a_model_is_refused(
    tmp_path: Path, live: Callable[[], LiveSource]
) -> None:
    rows = ArraySource(torch.randn(300, 16), name=HOOK)
    with pytest.raises(
        UserError, match="loss ce: runs through the model, and these data are stored"
    ):
        train_run(run_of(), rows, tmp_path / "run")
    with pytest.raises(UserError, match="loss ce has no errors by dimension to weigh"):
        run_of(gamma={"rule": "variance"})
    with pytest.raises(UserError, match="batch size 8: less than a sequence of 16 tokens"):
        train_run(run_of().model_copy(update={"batch_size": 8}), live(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
