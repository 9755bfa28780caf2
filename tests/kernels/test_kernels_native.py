"""The compiled kernels against their eager twins: the same latents, values and gradients, whatever the shape."""

import functools
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsae.kernels.eager import (
    AdamStep,
    Plan,
    SparseCode,
    adam_rows_,
    select_group_topk,
    select_topk,
)
from wsae.kernels.native import build
from wsae.kernels.native import select as native
from wsae.kernels.native.build import why_not
from wsae.kernels.native.select import RoundedEncoder, dimension_scales
from wsae.kernels.native.slices import (
    Centred,
    Level,
    decode,
    dots,
    from_slices,
    residual,
    sort_pairs,
    to_slices,
)
from wsae.kernels.native.weights import Bias, Matrix, Terms, make_weights
from wsae.sae.forward import level_by_rank

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"compiled kernels: {why_not()}")


def rounded(W: Tensor, x: Tensor, group: int | None = None) -> RoundedEncoder:
    d_sae, d_in = W.shape
    spread = x.std(0, correction=0) if len(x) > 1 else torch.ones(d_in)
    encoder = RoundedEncoder(d_sae, d_in, group or d_sae, dimension_scales(spread))
    slices = to_slices(W)
    encoder.measure(slices)
    encoder.pack(slices)
    return encoder


def topk(W: Tensor, x: Tensor, bias: Tensor | None, k: int, groups: bool = False) -> SparseCode:
    encoder = rounded(W, x, len(W) // k if groups else None)
    return native.select_topk(encoder, to_slices(W), bias, Centred.of(x), k)


def data(b: int, d: int, f: int, seed: int, outlier: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations with one loud dimension, encoder rows of unequal norms, biases."""
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(b, d, generator=g), torch.randn(f, d, generator=g)
    x[:, 0] *= outlier
    return x, W * torch.rand(f, 1, generator=g).exp(), 0.3 * torch.randn(f, generator=g)


@pytest.fixture(params=[True, False], ids=["8 bits first", "float32"])
def int8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both selections, where the machine has both."""
    if not request.param:
        monkeypatch.setattr(native, "has_int8", lambda: False)
    return request.param


@settings(max_examples=60)
@given(
    b=st.integers(1, 40),
    d=st.integers(1, 70),
    f=st.integers(1, 300),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
    outlier=st.sampled_from([1.0, 100.0, 1e-4]),
)
def test_topk_finds_the_same_latents_and_their_exact_values(b, d, f, share, seed, outlier) -> None:  # noqa: ANN001
    x, W, bias = data(b, d, f, seed, outlier)
    k = max(1, min(f, round(share * f / 4)))
    code = topk(W, x, bias, k)
    pre = (x.double() @ W.double().T + bias.double()).float()
    wanted = pre.gather(1, select_topk(pre, k)).sort(1).values
    found = code.values.view(b, k)
    torch.testing.assert_close(found.sort(1).values, wanted, rtol=1e-4, atol=1e-4 * float(x.norm()))
    at = pre.gather(1, code.indices.view(b, k))
    torch.testing.assert_close(found, at, rtol=1e-4, atol=1e-5 * float(x.abs().max() * W.norm()))
    assert (code.indices.view(b, k).diff(dim=1) > 0).all()
    positive = native.select_positive(rounded(W, x), to_slices(W), bias, Centred.of(x), k)
    for part, whole in zip(positive, code.where(code.values > 0), strict=True):
        assert torch.equal(part, whole)


def test_the_selected_sets_agree_over_many_tokens() -> None:
    """On activations with structure (features in superposition), 4 of a million pairs may differ; none did here."""
    g = torch.Generator().manual_seed(0)
    d, f, k = 96, 1536, 16
    directions = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=g), dim=1)
    active = torch.rand(8000, 4 * d, generator=g) < 0.03
    x = (active * torch.rand(8000, 4 * d, generator=g)) @ directions
    x = x + 0.02 * torch.randn(8000, d, generator=g)
    x[:, 3] *= 30
    W = torch.nn.functional.normalize(torch.randn(f, d, generator=g), dim=1)
    pre = x @ W.T
    found = topk(W, x, None, k).indices.view(-1, k)
    wanted = select_topk(pre, k).sort(1).values
    assert int((found != wanted).any(1).sum()) <= 1


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize(("f", "k"), [(64, 4), (60, 6), (330, 10), (33, 1), (40, 40)])
def test_group_topk_finds_the_largest_of_each_group(f: int, k: int) -> None:
    x, W, bias = data(37, 24, f, seed=f)
    code = topk(W, x, bias, k, groups=k > 1)
    assert torch.equal(code.indices.view(37, k), select_group_topk(x @ W.T + bias, k))


def test_levels_are_those_of_the_eager_code_and_sorted_apart() -> None:
    x, W, _ = data(50, 24, 90, seed=2)
    code = topk(W, x, None, 20)
    level = native.rank_levels(code, 6)
    assert torch.equal(level, level_by_rank(code, 6))
    tied = code._replace(values=code.values.round())
    assert torch.equal(native.rank_levels(tied, 6).view(50, 20).sum(1), torch.full((50,), 14))
    for number in (0, 1):
        part = code.where(level == number)
        one = sort_pairs(code, 90, Level(level, number))
        two = sort_pairs(part, 90)
        assert torch.equal(one.offsets, two.offsets)
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(code.values[one.order], part.values[two.order])


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("above", [-0.5, 0.0, 4.0, 1e9])
def test_everything_above_a_threshold_is_found(above: float) -> None:
    x, W, bias = data(33, 40, 500, seed=7)
    floor = torch.rand(500)
    encoder = rounded(W, x)
    both = Centred.of(x)
    code = native.select_above(encoder, to_slices(W), bias, both, above + floor)
    pre = x @ W.T + bias
    margin = (pre - floor - above).abs()
    clear = margin > 1e-4  # a value on the border may fall on either side
    found = torch.zeros_like(pre, dtype=torch.bool)
    found[code.rows(), code.indices] = True
    assert torch.equal(found[clear], (pre - floor > above)[clear])
    torch.testing.assert_close(code.values, pre[code.rows(), code.indices], rtol=1e-4, atol=1e-4)


def test_a_guess_from_other_data_changes_the_effort_only() -> None:
    x, W, _ = data(200, 32, 400, seed=3)
    encoder, slices = rounded(W, x), to_slices(W)
    codes = []
    for scale in (1.0, 1.0, 100.0, 0.01, 1.0):
        rows = x * scale
        both = Centred.of(rows)
        codes.append((scale, native.select_topk(encoder, slices, None, both, 8)))
    assert encoder.effort.repeated > 0 or encoder.effort.examined > 0
    for scale, code in codes:
        pre = scale * (x @ W.T)
        assert torch.equal(code.indices.view(200, 8), select_topk(pre, 8).sort(1).values)


@pytest.mark.usefixtures("int8")
def test_parts_that_share_their_best_find_what_one_finds() -> None:
    """Three threads have a part of the latents each; the guess is too low, right, too high and wrong in turn."""
    x, W, bias = data(60, 32, 400, seed=5)
    cuts, meeting, told = (0, 100, 150, 400), threading.Barrier(3), [Tensor()] * 3
    encoders = [rounded(W[a:b], x) for a, b in itertools.pairwise(cuts)]

    def gather(part: int, values: Tensor) -> Tensor:
        told[part] = values
        meeting.wait(60)
        every = torch.stack(told)
        meeting.wait(60)
        return every

    def find(part: int, rows: Tensor) -> SparseCode:
        torch.set_num_threads(1)
        mine, b = slice(cuts[part], cuts[part + 1]), Centred.of(rows)
        slices, tell = to_slices(W[mine]), functools.partial(gather, part)
        return native.select_topk_shared(encoders[part], slices, bias[mine], b, 8, tell, part)

    with ThreadPoolExecutor(3) as pool:
        for rows in (x, x, 100 * x, 0.01 * x, torch.cat([x[:20], x[20:40] * 0.01, x[:20]])):
            found = list(pool.map(find, range(3), [rows] * 3))
            shown = torch.zeros(60, 400, dtype=torch.bool)
            for code, first in zip(found, cuts, strict=False):
                shown[code.rows(), code.indices + first] = True
                values = (rows @ W.T + bias)[code.rows(), code.indices + first]
                torch.testing.assert_close(code.values, values, rtol=1e-4, atol=1e-4)
            wanted = select_topk(rows @ W.T + bias, 8)
            assert torch.equal(shown, torch.zeros_like(shown).scatter_(1, wanted, True))


@pytest.mark.usefixtures("int8")
def test_parts_that_share_their_best_compute_little_more_than_is_wanted() -> None:
    """Two parts tell one another their bounds: alone, each would compute the k best of its own and more."""
    x, W, _ = data(84, 64, 1024, seed=2)
    halves, meeting, told = (W[:512], W[512:]), threading.Barrier(2), [Tensor()] * 2
    encoders = [rounded(half, x) for half in halves]

    def find(part: int) -> None:
        def gather(values: Tensor) -> Tensor:
            told[part] = values
            meeting.wait(60)
            every = torch.stack(told)
            meeting.wait(60)
            return every

        torch.set_num_threads(1)
        slices, both = to_slices(halves[part]), Centred.of(x)
        native.select_topk_shared(encoders[part], slices, None, both, 32, gather, part)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(find, range(2)))
    alone = rounded(W, x)
    native.select_topk(alone, to_slices(W), None, Centred.of(x), 32)
    together = sum(encoder.effort.examined for encoder in encoders)
    if alone.int8:  # else all are computed
        assert 84 * 32 <= together <= 1.1 * alone.effort.examined


@pytest.mark.usefixtures("int8")
def test_what_stops_the_parts_from_telling_one_another_is_raised() -> None:
    """An exception does not pass through C: it is kept, and raised again behind it."""
    x, W, _ = data(20, 16, 64, seed=1)

    def lost(_values: Tensor) -> Tensor:
        raise KeyboardInterrupt("rank 1 is gone")

    with pytest.raises(KeyboardInterrupt, match="rank 1 is gone"):
        native.select_topk_shared(rounded(W, x), to_slices(W), None, Centred.of(x), 4, lost, 0)


def test_tokens_with_one_loud_dimension_need_no_exhaustive_search() -> None:
    """Their 8 bits say too little of the other dimensions; 16 do, without which all 3,000 latents were computed."""
    x, W, bias = data(300, 64, 3000, seed=11)
    W = torch.nn.functional.normalize(W)
    W[:, 3] *= 0.05
    x[::50, 3] = 400.0
    encoder = rounded(W, torch.randn(300, 64))
    both, slices = Centred.of(x), to_slices(W)
    for _ in range(2):  # without a guess, and with one
        found = native.select_topk(encoder, slices, bias, both, 8).indices.view(300, 8)
        assert torch.equal(found, select_topk(x @ W.T + bias, 8).sort(1).values)
    if encoder.int8:
        assert encoder.effort.exhaustive == 0
        assert 6 <= encoder.effort.repeated < 40
        assert encoder.effort.examined < 40 * encoder.effort.tokens


@pytest.mark.usefixtures("int8")
def test_values_that_are_not_finite_stay_visible() -> None:
    x, W, _ = data(20, 16, 64, seed=1)
    x[3, 5] = torch.nan
    x[9, 0] = torch.inf
    code = topk(W, x, None, 4)
    bad = ~torch.isfinite(code.values.view(20, 4)).all(1)
    assert bad.nonzero()[:, 0].tolist() == [3, 9]
    assert code.offsets[-1] == 80


def test_all_equal_pre_activations_choose_the_lowest_latents() -> None:
    code = topk(torch.ones(100, 8), torch.ones(5, 8), None, 3)
    assert code.indices.view(5, 3).tolist() == [[0, 1, 2]] * 5


@settings(max_examples=30)
@given(st.integers(1, 50), st.integers(1, 100), st.integers(1, 60), st.integers(0, 99))
def test_sparse_products_equal_dense_ones(b: int, d: int, f: int, seed: int) -> None:
    x, W, _ = data(b, d, f, seed)
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(b, f, generator=g) * (torch.rand(b, f, generator=g) < 0.2)
    rows, latents = z.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=b)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    code = SparseCode(z[rows, latents], latents, offsets)
    pairs, scale = sort_pairs(code, f), torch.rand(f, generator=g)
    values, slices = code.values[pairs.order], to_slices(W)
    x_hat = from_slices(decode(pairs, values, slices, scale, b, d, x[0].contiguous()), d)
    torch.testing.assert_close(x_hat, z @ (W * scale[:, None]) + x[0], rtol=1e-4, atol=1e-4)
    products = dots(pairs, to_slices(x), slices, scale, d)
    dense = (x @ (W * scale[:, None]).T)[rows, latents][pairs.order]
    torch.testing.assert_close(products, dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(from_slices(slices, d), W)


def test_the_residual_is_the_gradient_of_the_weighted_loss() -> None:
    x, _, _ = data(70, 45, 1, seed=2)
    x_hat = torch.randn(70, 45, requires_grad=True)
    gamma = torch.rand(45)
    loss = ((x - x_hat) * gamma).square().sum() / 70
    loss.backward()
    left = residual(to_slices(x_hat.detach()), x, gamma)
    torch.testing.assert_close(from_slices(left.gradient, 45), x_hat.grad)
    torch.testing.assert_close(
        float(left.errors[:, 1].sum() / 70), float(loss.detach()), rtol=1e-6, atol=0
    )
    error = (
        (x.double() - x_hat.detach().double()).square().sum(1)
    )  # the kernel adds 32 squares in fp32
    torch.testing.assert_close(left.errors[:, 0], error, rtol=1e-6, atol=0)
    torch.testing.assert_close(left.total, x_hat.grad.sum(0), rtol=1e-4, atol=1e-6)


SCALES = {1: 1.0, 2: 0.25}
"""What the gradients of two steps are multiplied by."""


def one_update(threads: int) -> list[Tensor]:
    b, d, f, k = 90, 70, 200, 6
    x, W, bias = data(b, d, f, seed=11)
    torch.set_num_threads(threads)
    code = topk(W, x, bias, k)
    pairs = sort_pairs(code, f)
    G, z = torch.randn(b, d, generator=torch.Generator().manual_seed(1)), code.values[pairs.order]
    W_dec = torch.nn.functional.normalize(W, dim=1)
    weights = make_weights(
        *(Matrix.of(rows, 0 * rows, 0 * rows) for rows in (W_dec, W)), d, f, torch.ones(96)
    )
    v = dots(pairs, to_slices(G), weights.decoder.W, weights.row_scale, d) * (z > 0)
    moments = torch.zeros(2, f)
    for step in (1, 2):
        along = dots(pairs, to_slices(G), weights.decoder.W, weights.row_scale, d)
        terms = [Terms(pairs, z, v, along, to_slices(G))]
        packed = Bias(bias, moments[0], moments[1])
        adam = AdamStep(1e-2, step, scale=torch.tensor(SCALES[step]))
        through, square = weights.update(terms, to_slices(x), adam, packed)
    dense = (*weights.dense()[0], *weights.dense()[1])
    return [*dense, bias, through, square, weights.rounded.packed.float()]


def test_an_update_equals_gradient_matrices_and_adam() -> None:
    b, d, f, k = 90, 70, 200, 6
    x, W, bias = data(b, d, f, seed=11)
    code = topk(W, x, bias, k)
    plan = Plan.build(code.indices, code.offsets, f)
    G = torch.randn(b, d, generator=torch.Generator().manual_seed(1))
    W_dec, W_enc = torch.nn.functional.normalize(W, dim=1), W.clone()
    along = (G @ W_dec.T)[code.rows(), code.indices]
    v = along * (code.values > 0)
    dec, enc, b_m = torch.zeros(2, f, d), torch.zeros(2, f, d), torch.zeros(2, 1, f)
    for step in (1, 2):
        adam, db = AdamStep(1e-2, step), plan.per_latent(v)
        through, scale = db @ W_enc, SCALES[step]
        D, E = plan.scatter(code.values, G), plan.scatter(v, x)
        D -= (D * W_dec).sum(1, keepdim=True) * W_dec
        square = sum(float(t.double().square().sum()) for t in (D, E, db))
        adam_rows_(W_dec, scale * D, dec[0], dec[1], adam, unit=True)
        adam_rows_(W_enc, scale * E, enc[0], enc[1], adam, unit=False)
        adam_rows_(bias[None], scale * db[None], b_m[0], b_m[1], adam, unit=False)
    found, expected = one_update(threads=1), [W_dec, *dec, W_enc, *enc, bias, through]
    assert float(found[8]) == pytest.approx(square, rel=1e-5)
    for a, b_ in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b_, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("guess", [math.nan, 0.5, 1.2, 10.0])
def test_what_the_batch_before_was_like_changes_no_bit(guess: float) -> None:
    """Rows whose guess was too high are done again, a few at a time: a resumed run has no guess."""
    b, d, f, k = 1500, 160, 256, 4
    x, W, bias = data(b, d, f, seed=3)
    encoder, slices = RoundedEncoder(f, d, f, torch.ones(d)), to_slices(W)
    encoder.measure(slices)
    encoder.pack(slices)
    expected = native.select_topk(encoder, slices, bias, Centred.of(x), k)
    before = encoder.effort.repeated
    encoder.guess = guess * encoder.trend
    found = native.select_topk(encoder, slices, bias, Centred.of(x), k)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)
    if encoder.int8:
        repeated = (encoder.effort.repeated - before) / b
        assert {10.0: repeated == 1, 1.2: 0.1 < repeated < 0.4}.get(guess, repeated == 0)


def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    try:
        one, three = one_update(1), one_update(3)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a, b)


def test_a_thread_for_every_core_has_one_to_itself_while_kernels_work() -> None:
    cores, rows = os.sched_getaffinity(0), torch.randn(50_000, 64)
    others = set(os.listdir("/proc/self/task"))

    def places(threads: int, wanted: list[set[int]]) -> list[set[int]]:
        """Where the calling thread and its helpers stand, at the latest after some seconds of work."""
        end, found = time.monotonic() + 20, []
        with build.kernel_threads(threads):
            while found != wanted and time.monotonic() < end:
                to_slices(rows)
                new = set(os.listdir("/proc/self/task")) - others
                found = sorted((os.sched_getaffinity(int(t)) for t in new), key=min)
        assert os.sched_getaffinity(0) == cores
        return found

    one_each, anywhere = [{c} for c in sorted(cores)], [cores] * (len(cores) + 1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(places, len(cores), one_each).result() == one_each
        assert pool.submit(places, len(cores) + 1, anywhere).result() == anywhere


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("WSAE_NATIVE", "0", "WSAE_NATIVE=0 turns them off"),
        ("CXX", "no-such-compiler", "no C++ compiler found (no-such-compiler)"),
        ("CXX", "false", "false failed"),
    ],
)
def test_where_kernels_cannot_be_built_the_reason_is_told(
    tmp_path, monkeypatch, variable, value, reason
) -> None:  # noqa: ANN001
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(build, "_load", functools.cache(build._load.__wrapped__))  # as at the start
    told = why_not()
    assert told is not None
    assert reason in told
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build in a fresh cache, by a compiler that copies what is compiled already; returns the compiler."""
    compiler = tmp_path / "c++"
    built = build._built()
    compiler.write_text(
        f'#!/bin/sh\nwhile [ "$1" ] && [ "$1" != -o ]; do shift; done\n[ "$2" ] && cp "{built}" "$2"\nexit 0\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))
    return compiler


def loaded_elsewhere() -> str:
    """Return what a new process says of its kernels: a damaged library would end it by a signal."""
    script = "from wsae.kernels.native.build import why_not; print(why_not())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip() + done.stderr.strip()


@pytest.mark.parametrize("damage", ["cut", "zeroed"])
def test_a_damaged_library_is_built_again_before_it_is_loaded(quick: Path, damage: str) -> None:
    assert quick.is_file()
    path = build._built()
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] if damage == "cut" else bytes(len(whole)))
    assert loaded_elsewhere() == "None"
    assert path.read_bytes() == whole


def test_a_library_without_our_kernels_is_not_used(quick: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.so"
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "/dev/null", "-o", str(empty)]
    subprocess.run(command, check=True)
    quick.write_text(quick.read_text().replace(str(build._load()._name), str(empty)))
    assert "undefined symbol" in loaded_elsewhere()


def test_a_compiler_may_have_a_helper_before_it(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"env {quick}")
    assert build._built().is_file()


ENTRIES = """
import torch
from wsae.kernels.eager import AdamStep, SparseCode
from wsae.kernels.native.select import RoundedEncoder, select_above, select_topk
from wsae.kernels.native.slices import Centred, Level, decode, dots, from_slices, residual, sort_pairs, to_slices
from wsae.kernels.native.weights import Matrix, Terms, make_weights

B, D, F, K = 20, 40, 64, 2
g = torch.Generator().manual_seed(0)
x, W = torch.randn(B, D, generator=g), torch.randn(F, D, generator=g)
xs, Ws = to_slices(x), to_slices(W)
code = SparseCode(torch.rand(B * K), torch.randint(0, F, (B * K,)), torch.arange(0, B * K + 1, K))
pairs = sort_pairs(code, F)
bias, dim, z = torch.zeros(F), torch.ones(64), torch.rand(B * K)

def encoder(W, dim):
    made = RoundedEncoder(F, D, F, dim)
    made.measure(W)
    made.pack(W)
    return made

fine = encoder(Ws, dim)

def update(W, m, v, z, along, gradient, centred, b, bm, bv):
    weights = make_weights(Matrix(W, m, v), None, D, F, dim)
    pull = torch.zeros(F)
    terms = Terms(pairs, z, z, along, gradient)
    weights.update([terms], centred, AdamStep(1e-3, 1), (b, bm, bv), pull)

ENTRIES = {
    "centred": (Centred.of, x, torch.zeros(D)),
    "from_slices": (lambda s, c: from_slices(s, D, c), Ws, torch.ones(F)),
    "sort_pairs": (lambda i, o: sort_pairs(SparseCode(z, i, o), F), code.indices, code.offsets),
    "decode": (
        lambda z, W, c, s, o, t: decode(pairs._replace(offsets=o, tokens=t), z, W, c, B, D, s),
        z, Ws, torch.ones(F), torch.zeros(D), pairs.offsets, pairs.tokens,
    ),
    "dots": (lambda l, W, c: dots(pairs, l, W, c, D), xs, Ws, torch.ones(F)),
    "residual": (lambda s, x, c: residual(s.clone(), x, c), xs, x, torch.ones(D)),
    "encoder": (encoder, Ws, dim),
    "topk": (lambda W, b, r, s: select_topk(fine, W, b, Centred(r, s), K), Ws, bias, x, xs),
    "above": (
        lambda W, b, r, s, f: select_above(fine, W, b, Centred(r, s), f),
        Ws, bias, x, xs, torch.zeros(F),
    ),
    "update": (
        update, Ws.clone(), Ws * 0, Ws * 0, z, z, xs, xs, torch.zeros(F), torch.zeros(F), torch.ones(F),
    ),
}
WRONG = {
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.int() if t.dtype != torch.int32 else t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "short": lambda t: t[..., :-1].contiguous(),
    "long": lambda t: torch.cat([t, t], -1),
    "fewer rows": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "one more axis": lambda t: t[None],
    "elsewhere": lambda t: t.to("meta"),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "other way round": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.repeat_interleave(2)[::2],
}
tried = 0
for name, (call, *tensors) in ENTRIES.items():
    call(*tensors)
    for place, tensor in enumerate(tensors):
        for what, spoil in WRONG.items():
            if name == "centred" and place == 0 and what in ("fewer rows", "empty"):
                continue  # any number of rows is right
            given = list(tensors)
            given[place] = spoil(tensor)
            tried += 1
            try:
                found = call(*given)
            except (TypeError, ValueError, RuntimeError, AssertionError, IndexError):
                continue
            # some entries take strides, and copy; then the numbers are those of the same values in order
            given[place] = given[place].contiguous()
            assert given[place].shape == tensor.shape and given[place].dtype == tensor.dtype, (
                name, place, what)
            first = lambda r: r[0] if isinstance(r, tuple) else r
            same, found = first(call(*given)), first(found)
            if isinstance(found, torch.Tensor):
                assert torch.equal(same, found), (name, place, what)
for latents in ([-1, 0], [0, F], [2**40, 0]):
    try:
        sort_pairs(SparseCode(torch.ones(2), torch.tensor(latents), torch.tensor([0, 1, 2])), F)
    except ValueError:
        continue
    raise AssertionError(latents)
for offsets in ([0, 3, 2], [1, 2, 2], [0, 1, 5], [0, -1, 2]):
    try:
        sort_pairs(SparseCode(torch.ones(2), torch.tensor([0, 1]), torch.tensor(offsets)), F)
    except ValueError:
        continue
    raise AssertionError(offsets)
for k, group in ((0, F), (F + 1, F), (3, F // 2), (-1, F)):
    try:
        select_topk(RoundedEncoder(F, D, group, dim), Ws, None, Centred(x, xs), k)
    except ValueError:
        continue
    raise AssertionError((k, group))
print(tried)
"""


@pytest.mark.parametrize(
    "before", ["", "torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')"]
)
def test_kernels_read_no_memory_as_what_it_is_not(before: str) -> None:
    """In a process of its own, without the tests' type checks: a wrong read could end it."""
    head, rest = ENTRIES.split("B, D, F, K", 1)
    tail = "B, D, F, K" + rest
    if before:  # only our own allocations follow the default then
        tail = (
            tail.split("ENTRIES = {")[0]
            + f"{before}\n"
            + "assert select_topk(fine, Ws, bias, Centred(x, xs), K).values.dtype == torch.float32\n"
            + "assert torch.equal(from_slices(to_slices(W), D), W)\nencoder(Ws, dim)\n"
            + "update(Ws, Ws * 0, Ws * 0, z, z, xs, xs, bias, bias * 0, bias * 0)\nprint(500)"
        ).replace("pull = torch.zeros(F)", "pull = bias")
    command = [sys.executable, "-c", head + tail]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert int(done.stdout) >= 500


KERNEL = """
import resource
import torch
from wsae.core.errors import UserError
from wsae.core.errors import explained
from wsae.kernels.native import select
from wsae.kernels.native.slices import Centred, to_slices

torch.set_num_threads(2)
W, x = torch.randn(64, 32), torch.randn(300, 32)
encoder = select.RoundedEncoder(64, 32, 64, torch.ones(32))
rows = to_slices(W)
encoder.measure(rows)
encoder.pack(rows)
centred = Centred.of(x)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
asked = select.CSelection(k=2**33, keep=1)  # working memory for so many candidates is not to be had
try:
    with explained("selecting", lambda: []):
        select._run(encoder, rows, None, None, centred, asked, None)
except UserError as error:
    print(error, "|", error.__cause__)
print(select.select_topk(encoder, rows, None, centred, 3).batch)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_compiled_kernel_without_memory_ends_in_one_line(threads):
    if not build.has_int8():
        return  # the float32 selection has no working memory of its own
    script = KERNEL.replace("set_num_threads(2)", f"set_num_threads({threads})")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory while selecting" in done.stdout
    assert "std::bad_alloc in the compiled kernel select_int8" in done.stdout
    assert done.stdout.endswith("300\n")  # and the process goes on
