"""EK-FAC: whitened features against the dense formula, laws of the fit, and the file that goes with the features."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_append import grow, write_rows
from test_build import changed, contents
from test_distributed import launch
from test_features import examples, oracle_outputs, trained_pair
from test_resume import config_file
from tiny import tiny_adapter_dir, tiny_model_dir, tiny_rows, tiny_run
from torch import Tensor, nn

from llmattrib.build import build_features
from llmattrib.config import RunConfig
from llmattrib.encoding import Encoded
from llmattrib.errors import CurvatureError, FeatureError, FingerprintMismatchError, NonFiniteGradientError
from llmattrib.features.capture import gradients
from llmattrib.features.curvature import Curvature, CurvatureFit, Shape, Whitening, fit_bytes, rotate
from llmattrib.features.extract import Extractor
from llmattrib.features.sketch import Sketch
from llmattrib.index import build_index
from llmattrib.lock import Part
from llmattrib.model import load_model
from llmattrib.query import Query, Run
from llmattrib.reduce import reduce_run
from llmattrib.sections import FeaturesConfig, LoraConfig, ModelConfig
from llmattrib.store import RowStore
from llmattrib.verify import verify_run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WHITENED = {"preconditioner": "ekfac", "sketch": {"kind": "none"}, "dtype": "float32"}

# ------------------------------------------------------------------------------------------------- arrays alone


def fitted(shapes: list[Shape], pairs: list[list[tuple[Tensor, Tensor]]], max_side: int = 4096) -> Curvature:
    """Fit to batches of (left [b, t, m], right [b, t, k]) of each block."""
    fit = CurvatureFit(shapes, max_side)
    for batch in pairs:
        for block, pair in enumerate(batch):
            fit.add_pair(block, *pair, torch.ones(pair[0].shape[:2], dtype=torch.bool))
    fit.find_bases()
    for batch in pairs:
        for block, pair in enumerate(batch):
            fit.add_gradients(block, gradients(*pair))
    return fit.curvature(sum(len(batch[0][0]) for batch in pairs))


def draw(seed: int, count: int, tokens: int, m: int, k: int) -> tuple[Tensor, Tensor]:
    """Correlated sides, so that bases are not the coordinates'."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((count, tokens, m)) @ rng.standard_normal((m, m))
    right = rng.standard_normal((count, tokens, k)) @ rng.standard_normal((k, k))
    return torch.from_numpy(left).float(), torch.from_numpy(right).float()


def dense(pairs: tuple[Tensor, Tensor], damping: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows g_i and (H + lam)^-1, both written out, in float64."""
    left, right = (side.double().numpy() for side in pairs)
    rows = np.stack([np.einsum("tm,tk->mk", *pair).ravel() for pair in zip(left, right, strict=True)])
    bases = [np.linalg.eigh(sum(np.outer(v, v) for v in side.reshape(-1, side.shape[2])))[1] for side in (left, right)]
    basis = np.kron(*bases)
    h = np.mean((rows @ basis) ** 2, axis=0)
    return rows, basis @ np.diag(1 / (h + damping * h.mean())) @ basis.T


def test_inner_products_are_those_of_the_dense_formula() -> None:
    pairs = draw(0, 9, 5, 6, 4)
    curvature = fitted([(6, 4)], [[pairs]])
    rows, inverse = dense(pairs, 0.3)
    white = Whitening(curvature, 0.3)(0, gradients(*pairs)).double().numpy()
    np.testing.assert_allclose(white @ white.T, rows @ inverse @ rows.T, rtol=2e-4, atol=1e-4)


def test_where_gradients_are_rank_one_and_sides_independent_it_is_the_empirical_fisher_matrix() -> None:
    """One token each, every left vector with every right one: E[gg^T] is a Kronecker product, so nothing is lost."""
    rng = np.random.default_rng(1)
    lefts, rights = rng.standard_normal((7, 4)), rng.standard_normal((5, 3))
    grid = list(product(lefts, rights))
    pairs = tuple(torch.tensor(np.array([pair[side] for pair in grid])[:, None]).float() for side in (0, 1))
    curvature = fitted([(4, 3)], [[pairs]])  # type: ignore[list-item]
    rows = np.array([np.outer(*pair).ravel() for pair in grid])
    fisher = rows.T @ rows / len(rows)
    lam = 0.1 * np.trace(fisher) / 12
    white = Whitening(curvature, 0.1)(0, torch.from_numpy(rows).float()).double().numpy()
    expected = rows @ np.linalg.solve(fisher + lam * np.eye(12), rows.T)
    np.testing.assert_allclose(white @ white.T, expected, rtol=1e-3, atol=1e-4)
    block = curvature.blocks[0]
    basis = np.kron(block.left.double().numpy(), block.right.double().numpy())  # type: ignore[union-attr]
    np.testing.assert_allclose(basis @ np.diag(block.eigenvalues.numpy().ravel()) @ basis.T, fisher, atol=1e-5)


def test_whitened_coordinates_have_mean_square_h_over_h_plus_lam() -> None:
    pairs = draw(2, 40, 3, 5, 6)
    curvature = fitted([(5, 6)], [[pairs]])
    h = curvature.blocks[0].eigenvalues.numpy()
    white = Whitening(curvature, 0.1)(0, gradients(*pairs)).double().numpy()
    np.testing.assert_allclose((white**2).mean(0), (h / (h + 0.1 * h.mean())).ravel(), rtol=1e-4)


@pytest.mark.parametrize(("max_side", "has"), [(6, (True, True)), (5, (False, True)), (3, (False, False))])
def test_long_sides_keep_their_coordinates_and_eigenvalues_are_the_best_there(
    max_side: int, has: tuple[bool, bool]
) -> None:
    pairs = draw(3, 9, 4, 6, 4)
    curvature = fitted([(6, 4)], [[pairs]], max_side)
    block, rows = curvature.blocks[0], gradients(*pairs)
    assert (block.left is not None, block.right is not None) == has
    rotated = rows.view(9, 6, 4) @ (torch.eye(4) if block.right is None else block.right)
    rotated = (torch.eye(6) if block.left is None else block.left).T @ rotated
    assert torch.equal(rotate(rows, (6, 4), None, None).flatten(1), rows)
    torch.testing.assert_close(block.eigenvalues.float(), rotated.square().mean(0), rtol=1e-4, atol=1e-4)
    assert fit_bytes([(6, 4)], max_side) == 8 * (36 * has[0] + 16 * has[1]) + 16 * 24


def test_with_large_damping_blocks_are_compared_by_their_gradients_alone() -> None:
    """One block: the ranking of grad_dot. Several: each in units of its root mean square."""
    pairs = [draw(4, 8, 3, 5, 4), draw(5, 8, 3, 3, 6)]
    curvature = fitted([(5, 4), (3, 6)], [pairs])
    rows = [gradients(*pair).double().numpy() for pair in pairs]
    white = [Whitening(curvature, 1e9)(block, gradients(*pair)).double().numpy() for block, pair in enumerate(pairs)]
    for raw, found in zip(rows, white, strict=True):
        np.testing.assert_allclose(found @ found.T * 1e9, raw @ raw.T / np.mean(raw**2), rtol=1e-4, atol=1e-4)
        assert (np.argsort(found @ found[0]) == np.argsort(raw @ raw[0])).all()


def test_a_block_without_gradients_is_whitened_to_zero() -> None:
    curvature = fitted([(5, 4), (2, 2)], [[draw(6, 8, 3, 5, 4), (torch.zeros(8, 1, 2), torch.ones(8, 1, 2))]])
    assert not Whitening(curvature, 0.1)(1, torch.ones(3, 4)).any()


def test_members_are_averaged() -> None:
    pairs = draw(7, 8, 3, 5, 4)
    curvature = fitted([(5, 4)], [[pairs]])
    one, of_three = (Whitening(curvature, 0.1, num_members=count)(0, gradients(*pairs)) for count in (1, 3))
    torch.testing.assert_close(of_three @ of_three.T, one @ one.T / 3)


def test_the_curvature_is_read_back() -> None:
    curvature = fitted([(6, 4), (2, 3)], [[draw(8, 5, 2, 6, 4), draw(9, 5, 2, 2, 3)]], max_side=4)
    again = Curvature.from_tensors(curvature.to_tensors())
    assert again.blocks[0].left is None
    assert {name: tensor.tolist() for name, tensor in again.to_tensors().items()} == {
        name: tensor.tolist() for name, tensor in curvature.to_tensors().items()
    }


# ---------------------------------------------------------------------------------------------------- real models


def sides(model: nn.Module, example: Encoded) -> tuple[list[list[Tensor]], list[np.ndarray]]:
    """Of one example alone, by hooks on peft's own modules: the sides of each factor, and its gradient by autograd."""
    factors = [
        getattr(module, f"lora_{role}")["default"]
        for module in model.modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
        for role in "AB"
    ]
    seen: dict[int, list[Tensor]] = {}
    handles = []
    for number, factor in enumerate(factors):

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, number: int = number) -> None:
            output.register_hook(lambda d: seen.__setitem__(number, [d[0], args[0][0].detach()]))

        handles.append(factor.register_forward_hook(keep))
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    (output,) = oracle_outputs("loss", logits, example, ())
    found = torch.autograd.grad(output, [factor.weight for factor in factors])
    for handle in handles:
        handle.remove()
    return [seen[number] for number in range(len(factors))], [gradient.numpy().ravel() for gradient in found]


def test_features_of_a_model_are_those_of_the_dense_formula(tmp_path: Path) -> None:
    """The slow way, factor by factor: autograd, eigenvectors by numpy, H + lam inverted as it stands."""
    extractor, model = trained_pair(tmp_path, "llama", 2, 4.0, False, "loss")
    extractor._config = FeaturesConfig(linearisation="trained", preconditioner="ekfac", damping=0.2)
    train, asked = examples(8), examples(3, seed=1)
    extractor.fit_curvature([train[:5], train[5:]])
    white = kernel(extractor, train, asked)
    slow = [sides(model, example) for example in train]
    queries = [sides(model, example)[1] for example in asked]
    expected = np.zeros((3, 8))
    for block in range(len(extractor.blocks)):
        rows = np.stack([found[block] for _, found in slow]).astype(np.float64)
        tokens = [np.concatenate([pairs[block][side].double().numpy() for pairs, _ in slow]) for side in (0, 1)]
        bases = [np.linalg.eigh(side.T @ side)[1] for side in tokens]
        rotate_all = lambda g, bases=bases: np.einsum("nmk,ma,kb->nab", g.reshape(len(g), *map(len, bases)), *bases)
        h = np.mean(rotate_all(rows) ** 2, axis=0)
        if h.mean() > 0:
            scaled = rotate_all(rows) / (h + 0.2 * h.mean())
            ask = rotate_all(np.stack([query[block] for query in queries]).astype(np.float64))
            expected += np.einsum("qab,nab->qn", ask, scaled)
    np.testing.assert_allclose(white, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def kernel(extractor: Extractor, train: list[Encoded], asked: list[Encoded], side: str = "right") -> np.ndarray:
    sketch = Sketch(extractor.plan("none", 0, 1, ()))
    rows, queries = (extractor.extract(part, sketch, side).phi[:, 0].astype(np.float64) for part in (train, asked))  # type: ignore[arg-type]
    return np.asarray(queries @ rows.T)


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Extractor]:
    base = tiny_model_dir(tmp_path)

    def make(**features: object) -> Extractor:
        lora = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
        loaded = load_model(ModelConfig(name=base, device="cpu", lora=lora), adapters=[])
        return Extractor(loaded, FeaturesConfig.model_validate({"preconditioner": "ekfac"} | features), 0)

    return make


def test_the_fit_does_not_depend_on_batches_order_or_padding(fresh: Callable[..., Extractor]) -> None:
    train, asked = examples(12, seed=3), examples(4, seed=4)
    found = []
    for batches in ([train], [[example] for example in train[::-1]], [train[6:], train[:6]]):
        extractor = fresh(num_inits=2)
        extractor.fit_curvature(batches)
        found += [kernel(extractor, train, asked, side) for side in ("right", "left")]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-3 * np.abs(found[0]).max())


def test_one_factor_with_large_damping_ranks_as_grad_dot(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    lora = LoraConfig(rank=4, alpha=8.0, target_modules=("down_proj",), layers="1-1")
    train, asked = examples(12, seed=3), examples(4, seed=4)
    ranked = []
    for settings in ({"preconditioner": "ekfac", "damping": 1e9}, {}):
        loaded = load_model(ModelConfig(name=base, device="cpu", lora=lora), adapters=[])
        extractor = Extractor(loaded, FeaturesConfig.model_validate(settings), 0)
        if settings:
            extractor.fit_curvature([train])
        assert len(extractor.blocks) == 1
        ranked.append(np.argsort(kernel(extractor, train, asked), axis=1))
    assert (ranked[0] == ranked[1]).all()


def test_several_adapters_have_a_curvature_each_and_their_values_are_averaged(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path)
    folders = [tiny_adapter_dir(tmp_path, base, seed=seed, name=f"adapter-{seed}") for seed in (0, 1)]
    config = FeaturesConfig(linearisation="trained", preconditioner="ekfac")
    train, asked = examples(6), examples(2, seed=1)
    found = []
    for adapters in ([folders[0]], [folders[1]], folders):
        extractor = Extractor(load_model(ModelConfig(name=base, device="cpu"), adapters=adapters), config, 0)
        extractor.fit_curvature([train])
        found.append(kernel(extractor, train, asked))
    np.testing.assert_allclose(found[2], (found[0] + found[1]) / 2, atol=1e-4 * np.abs(found[2]).max())


def test_a_layer_that_is_used_twice_is_refused(fresh: Callable[..., Extractor]) -> None:
    extractor = fresh()
    layers = extractor.loaded.model.get_base_model().model.layers
    layers[1].mlp.down_proj = layers[0].mlp.down_proj
    with pytest.raises(FeatureError, match=r"a layer is used 2 times in one forward[\s\S]*preconditioner=none"):
        extractor.fit_curvature([examples(3)])


# --------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_run(tmp_path_factory.mktemp("made"), num_rows=10, reduce={"methods": ["grad_dot"]})
    config = changed(config, features=WHITENED, query={"method": "grad_dot"})
    build_features(config)
    return config


def elsewhere(made: RunConfig, tmp_path: Path, **sections: dict[str, object]) -> RunConfig:
    """The run with data and a directory of its own, nothing made yet."""
    train = tmp_path / "train.jsonl"
    train.write_bytes(Path(made.data.train).read_bytes())
    return changed(made, tmp_path / "run", **({"data": {"train": str(train)}} | sections))


def files(config: RunConfig) -> dict[str, bytes]:
    return contents(config.layout.features) | {"curvature": Path(config.layout.curvature).read_bytes()}


def test_whitened_rows_lie_in_the_store(made: RunConfig) -> None:
    raw = changed(made, made.run_dir + "-raw", features={"preconditioner": "none"})
    build_features(raw)
    rows = [RowStore.open(config.layout.features).read(0, 10)[:, 0] for config in (made, raw)]
    curvature, start, white = Curvature.from_tensors(load_file(made.layout.curvature)), 0, []
    for number, block in enumerate(curvature.blocks):
        size = block.eigenvalues.numel()
        part = torch.from_numpy(rows[1][:, start : start + size].copy())
        white.append(Whitening(curvature, 0.1)(number, part).numpy())
        start += size
    np.testing.assert_allclose(rows[0], np.concatenate(white, axis=1), rtol=1e-3, atol=1e-4)
    assert not np.allclose(rows[0], rows[1])


def test_bytes_do_not_depend_on_parts_or_on_where_it_was_stopped(made: RunConfig, tmp_path: Path) -> None:
    config = elsewhere(made, tmp_path)
    build_features(config, part=Part(2, 3))
    build_features(config, part=Part(1, 3))
    assert build_features(config).num_shards_done == 1
    assert files(config) == files(made)


BUILD = """
import sys
from llmattrib.build import build_features
from llmattrib.config import load_config
from llmattrib.distributed import ranks
build_features(load_config(sys.argv[1]), ranks())
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(made: RunConfig, tmp_path: Path) -> None:
    config = elsewhere(made, tmp_path)
    (tmp_path / "build.py").write_text(BUILD)
    ended = launch(tmp_path / "build.py", config_file(config, tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert files(config) == files(made)


def test_a_query_agrees_with_brute_force(made: RunConfig) -> None:
    reduce_run(made)
    build_index(made, "grad_dot")
    run = Run(made)
    hits = run.query("what is the colour of a stone 3?", "green blue", top=10)
    query = Query.of("what is the colour of a stone 3?", "green blue")
    answered = run.answers([query])
    phi = run.features(answered, [run._encode(answered[0])])[0, 0].astype(np.float64)
    values = RowStore.open(made.layout.features).read(0, 10)[:, 0].astype(np.float64) @ phi
    found = {hit.row: hit.value for hit in (*hits.helpful, *hits.harmful)}
    np.testing.assert_allclose([found[row] for row in range(10)], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "key"),
    [
        ({"damping": 0.2}, "features.damping: stored 0.1, now 0.2"),
        ({"max_eigen_side": 8}, "features.max_eigen_side: stored 4096, now 8"),
        ({"curvature_examples": 5}, "features.curvature_examples: stored 2048, now 5"),
        ({"preconditioner": "none"}, "features.preconditioner: stored 'ekfac', now None"),
    ],
)
def test_other_settings_are_refused(made: RunConfig, features: dict[str, object], key: str) -> None:
    before = files(made)
    with pytest.raises(FingerprintMismatchError) as error:
        build_features(changed(made, features=features))
    assert key in str(error.value)
    assert files(made) == before


def test_data_that_grows_is_whitened_as_the_old_rows_are(made: RunConfig, tmp_path: Path) -> None:
    config = elsewhere(made, tmp_path)
    build_features(config)
    grow(config, 13)
    before = files(config)
    assert build_features(config).num_appended == 3
    assert files(config)["curvature"] == before["curvature"]
    assert verify_run(config, ["R"]) == []
    write_rows(config, tiny_rows(10))


def test_a_missing_or_other_curvature_is_named_by_every_stage(made: RunConfig, tmp_path: Path) -> None:
    config = elsewhere(made, tmp_path)
    build_features(config)
    file = Path(config.layout.curvature)
    tensors = load_file(file)
    for damage, what in (
        (lambda: save_file({k: v * 2 for k, v in tensors.items()}, file), "is not the curvature"),
        (file.unlink, "is missing"),
    ):
        damage()
        with pytest.raises(CurvatureError, match=rf"curvature.safetensors {what}[\s\S]*run `llmattrib build`"):
            build_features(config)
        with pytest.raises(CurvatureError, match=what):
            _ = Run(config).extractor
        (finding,) = verify_run(config, ["R"])
        assert finding.place == "curvature.safetensors"
        assert finding.what.startswith(what)


def test_what_does_not_fit_the_memory_is_refused_before_a_pass(
    made: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = elsewhere(made, tmp_path)
    monkeypatch.setattr("llmattrib.preconditioner.available_memory", lambda: 1000)
    monkeypatch.setattr(Extractor, "fit_curvature", lambda *_: pytest.fail("a pass was made in vain"))
    with pytest.raises(CurvatureError, match=r"the curvature \(sides up to .*4096[\s\S]*lower features.max_eigen_side"):
        build_features(config)
    assert not Path(config.layout.features).exists()


def test_a_nonfinite_gradient_is_named(fresh: Callable[..., Extractor]) -> None:
    extractor = fresh()
    with torch.no_grad():
        extractor.loaded.model.get_input_embeddings().weight[examples(1)[0].input_ids[0]] = float("inf")
    with pytest.raises(NonFiniteGradientError, match=r"a gradient is NaN or infinite[\s\S]*it names the example"):
        extractor.fit_curvature([examples(3)])
