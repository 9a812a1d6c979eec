"""The promises of the torch half of every model family to the stages of training, to measures and to the export.

A new family is covered as soon as ``training/families/`` names it; a case adds what is worth testing besides its
defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InvalidParameterError, UnsupportedBundleError
from perturbscope.families import Family, load_family
from perturbscope.families.outputs import CELL_EMBEDDING
from perturbscope.families.tokens import pad
from tests.models import small_vocabulary
from training import families
from training.checkpoint import load_checkpoint, save_checkpoint
from training.data.batches import gene_tokens, keep_tokens, stacked
from training.families import TrainingFamily
from training.measure.flops import cell_cost

LENGTH = 20
ENDS = {"start": "<cls>", "end": "<eos>"}
SMALL = {"layers": 2, "hidden": 16, "heads": 2, "feed_forward": 24, "init_sd": 0.3}
"""Weights large enough that all parts of an untrained model matter."""


@dataclass(frozen=True)
class Case:
    """A family with options of its tokenizer and of its network."""

    family: str
    tokens: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)


CASES = {
    "rank": Case("rank", {}, SMALL),
    "rank, start and end": Case("rank", ENDS, {**SMALL, "pooling": "cls", "layer": "last"}),
    "rank, cell classes": Case("rank", ENDS, {**SMALL, "head": "cell_classes", "classes": ["a", "b", "c"]}),
    "rank, gene classes": Case("rank", {}, {**SMALL, "head": "gene_classes", "classes": ["a", "b"]}),
    "toy": Case("toy", {}, {}),
}


@dataclass(frozen=True)
class Both:
    """Both halves of a model."""

    half: TrainingFamily
    family: Family
    config: Any
    vocabulary: GeneVocabulary

    def model(self, seed: int = 0, **overrides: Any) -> Any:
        torch.manual_seed(seed)
        config = self.half.parse_config({**self.options, **overrides})
        return self.half.build_model(config, self.vocabulary).eval()

    options: dict[str, Any] = field(default_factory=dict)

    def batch(self, *, n: int = 6, length: int | None = None, first: int = 0) -> dict[str, Tensor]:
        """Return tokens of seeded cells, which differ in length."""
        rng = np.random.default_rng(0)
        counts = rng.poisson(rng.uniform(0.2, 1.5, size=(12, 1)) * rng.gamma(0.7, 1.5, size=60)).astype(np.int32)
        counts[:, 0] += 1
        tokens = self.family.tokenize(CountMatrix.from_matrix(counts, self.vocabulary.gene_ids))
        padded = pad(tokens, np.arange(first, first + n), self.family.inputs, length=length)
        return {name: torch.from_numpy(array) for name, array in padded.items()}


@pytest.fixture(params=[*families.FAMILIES, *(case for case in CASES if case not in families.FAMILIES)])
def both(request: pytest.FixtureRequest) -> Both:
    case = CASES.get(request.param, Case(request.param))
    vocabulary = small_vocabulary(ends=True)
    half = families.load(case.family)
    options = {"max_length": LENGTH, **case.network}
    family = load_family(case.family, {"max_length": LENGTH, **case.tokens}, vocabulary)
    return Both(half, family, half.parse_config(options), vocabulary, options)


@pytest.fixture
def pretrained(both: Both) -> Both:
    """Skip models without a head for pre-training."""
    try:
        both.half.pretraining(both.model())
    except InvalidParameterError as error:
        assert error.field == "model.head"  # noqa: PT017
        pytest.skip("no head for pre-training")
    return both


def real(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()


def test_options_are_checked_and_survive_a_checkpoint(both: Both, tmp_path: Path) -> None:
    assert both.config.max_length == LENGTH
    for bad in ({"an option of the future": 1}, {"max_length": "20"}, {"max_length": 0}):
        with pytest.raises(InvalidParameterError) as caught:
            both.half.parse_config({**both.options, **bad})
        assert caught.value.field == f"model.{next(iter(bad))}"
    model = both.model()
    path = save_checkpoint(
        tmp_path / "checkpoint",
        model=model,
        family=both.family.name,
        family_config={},
        model_config=both.config,
        vocabulary=both.vocabulary,
        provenance={},
    )
    stored = load_checkpoint(path)
    assert both.half.parse_config(stored.model_config) == both.config
    embed = [both.half.encoder(item, both.config, family=both.family) for item in (model, stored.model())]
    assert torch.equal(*(module(**both.batch()) for module in embed))


def test_the_seed_of_torch_decides_the_weights(both: Both) -> None:
    first, again, other = (both.model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("probability", [0.15, 1.0])
def test_masking_touches_genes_alone_and_follows_the_generator(both: Both, probability: float) -> None:
    batch = both.batch()
    before = {name: tensor.clone() for name, tensor in batch.items()}

    def masked(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return both.half.mask(batch, family=both.family, generator=generator, probability=probability)

    first, again, other = masked(0), masked(0), masked(1)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert set(first) > set(batch)
    if probability < 1:
        assert any(not torch.equal(first[name], other[name]) for name in first)
    is_gene = gene_tokens(batch, both.family) >= 0
    assert is_gene.any(dim=1).all()
    for name, tensor in batch.items():
        assert first[name].shape == tensor.shape
        assert first[name].dtype == tensor.dtype
        if tensor.ndim > 1:
            assert torch.equal(first[name][~is_gene], tensor[~is_gene])
    n_genes = int(is_gene.sum())
    assert 0 < both.half.n_targets(first) <= n_genes
    if probability == 1.0:
        assert both.half.n_targets(first) == n_genes


def test_the_loss_falls_and_every_parameter_of_it_gets_a_gradient(pretrained: Both) -> None:
    both = pretrained
    module = both.half.pretraining(both.model()).train()
    batch = both.half.mask(both.batch(), family=both.family, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module(**batch)
        loss.backward()
        assert [name for name, item in module.named_parameters() if item.grad is None] == []
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_a_batch_without_targets_has_a_loss_of_zero_and_all_gradients(pretrained: Both) -> None:
    both = pretrained
    module = both.half.pretraining(both.model())
    batch = both.half.mask(both.batch(), family=both.family, generator=torch.Generator(), probability=0.0)
    assert both.half.n_targets(batch) == 0
    loss = module(**batch)
    loss.backward()
    assert loss.item() == 0.0
    assert [name for name, item in module.named_parameters() if item.grad is None] == []


def test_a_cell_has_the_same_embedding_in_any_company(both: Both) -> None:
    encoder = both.half.encoder(both.model(), both.config, family=both.family).eval()
    with torch.inference_mode():
        together = encoder(**both.batch())
        assert together.shape == (6, both.half.outputs(both.config)[0].width)
        assert together.dtype == torch.float32
        assert (together - together.mean(dim=0)).abs().max() > 1e-3
        torch.testing.assert_close(encoder(**both.batch(length=LENGTH)), together, atol=1e-5, rtol=0)
        for cell in range(6):
            alone = encoder(**both.batch(n=1, first=cell))
            torch.testing.assert_close(alone[0], together[cell], atol=1e-5, rtol=0)


def test_what_stands_in_the_padding_does_not_matter(both: Both) -> None:
    encoder = both.half.encoder(both.model(), both.config, family=both.family).eval()
    batch = both.batch(length=LENGTH)
    assert not real(batch).all()
    filled = dict(batch)
    for spec in both.family.inputs:
        if spec.per == "token":
            filled[spec.name] = torch.where(real(batch), batch[spec.name], batch[spec.name][:, 1:2])
    with torch.inference_mode():
        torch.testing.assert_close(encoder(**filled), encoder(**batch), atol=1e-5, rtol=0)


def test_the_embedding_trains_the_parameters_of_its_encoder(both: Both) -> None:
    model = both.model()
    encoder = both.half.encoder(model, both.config, family=both.family)
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in encoder.parameters()} <= own
    encoder(**both.batch()).square().sum().backward()
    assert [name for name, item in encoder.named_parameters() if item.grad is None] == []


def test_hidden_genes_leave_the_others_as_they_are(both: Both) -> None:
    if any(spec.within_length for spec in both.family.inputs):
        pytest.skip("positions in the cell cannot be kept")
    batch = both.batch()
    shown = torch.rand(batch["attention_mask"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    shown[:, :2] = True
    keep = real(batch) & shown
    kept = keep_tokens(batch, keep, both.family.inputs)
    assert torch.equal(kept["attention_mask"].sum(dim=1), keep.sum(dim=1))
    for spec in both.family.inputs:
        if spec.per == "cell":
            assert torch.equal(kept[spec.name], batch[spec.name])
            continue
        assert torch.equal(kept[spec.name][real(kept)], batch[spec.name][keep])
        assert (kept[spec.name][~real(kept)] == spec.pad_value).all()
    twice = stacked([batch, kept], both.family.inputs)
    assert {len(tensor) for tensor in twice.values()} == {12}
    encoder = both.half.encoder(both.model(), both.config, family=both.family).eval()
    with torch.inference_mode():
        apart = torch.cat([encoder(**batch), encoder(**kept)])
        torch.testing.assert_close(encoder(**twice), apart, atol=1e-5, rtol=0)


def test_a_model_has_a_size_and_a_cell_a_cost(both: Both) -> None:
    size = both.half.size(both.config, both.vocabulary)
    layers = size.layers - 1 if size.embedding_layers is None else size.embedding_layers
    assert 1 <= layers <= size.layers
    embedding, training = cell_cost(size, 100, layers=layers), cell_cost(size, 100, masked_share=0.15)
    assert 0 < embedding.forward < training.forward
    assert cell_cost(size, 200, layers=layers).forward > 2 * embedding.forward


def test_a_graph_has_the_outputs_that_the_model_names(both: Both) -> None:
    spec = both.half.export_spec(both.config, family=both.family)
    assert spec.outputs == both.half.outputs(both.config)
    assert spec.outputs[0].name == CELL_EMBEDDING
    assert len({item.name for item in spec.outputs}) == len(spec.outputs)
    assert spec.inputs == both.family.inputs
    configured = both.half.embedding(both.config)  # which does not know the special tokens that a mean leaves out
    assert (spec.embedding.layer, spec.embedding.untrained) == (configured.layer, configured.untrained)
    assert all(vars(spec.embedding).values())
    model = both.model(**spec.overrides)
    module, reference = spec.module(model).eval(), spec.reference(model).eval()
    batch = both.batch()
    in_order = [batch[item.name] for item in spec.inputs] + [batch["attention_mask"]]
    with torch.inference_mode():
        found, by_place, expected = module(**batch), module(*in_order), reference(**batch)
        embedding = both.half.encoder(both.model(), both.config, family=both.family).eval()(**batch)
    assert len(found) == len(expected) == len(spec.outputs)
    torch.testing.assert_close(found[0], embedding, atol=1e-5, rtol=0)
    for item, value, same, defined in zip(spec.outputs, found, by_place, expected, strict=True):
        assert torch.equal(value, same)
        assert value.dtype == torch.float32
        places = real(batch) if item.per == "token" else slice(None)
        assert value.shape == ((*batch["attention_mask"].shape, item.width) if item.per == "token" else (6, item.width))
        torch.testing.assert_close(value[places], defined[places], atol=1e-5, rtol=0)


def test_a_graph_may_have_some_of_the_outputs(both: Both) -> None:
    spec = both.half.export_spec(both.config, family=both.family, outputs=[])
    assert [item.name for item in spec.outputs] == [CELL_EMBEDDING]
    model = both.model(**spec.overrides)
    with torch.inference_mode():
        alone, (expected,) = spec.module(model).eval()(**both.batch()), spec.reference(model).eval()(**both.batch())
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
    with pytest.raises(InvalidParameterError, match="has no output 'nothing'"):
        both.half.export_spec(both.config, family=both.family, outputs=["nothing"])


def test_a_restorer_of_genes_says_so(both: Both) -> None:
    model = both.model()
    try:
        restorer = both.half.restorer(model, family=both.family)
    except UnsupportedBundleError as error:
        assert error.field == "family"  # noqa: PT017
        return
    batch = both.batch()
    masked = real(batch) & (torch.arange(batch["attention_mask"].shape[1]) == 1)
    hidden = restorer.hide(batch, masked)
    changed = [name for name, tensor in batch.items() if not torch.equal(hidden[name], tensor)]
    assert changed
    assert all(torch.equal(hidden[name][~masked], batch[name][~masked]) for name in changed)
    with torch.inference_mode():
        logits = restorer.logits(restorer.states(hidden)[masked])
    assert logits.shape == (int(masked.sum()), len(both.vocabulary))
