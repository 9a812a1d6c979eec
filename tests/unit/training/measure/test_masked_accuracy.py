"""Pre-training scores: the streamed torch side agrees with the plain definitions, and seen cells are left out."""

import json

import numpy as np
import pytest
import torch

from perturbscope.errors import EmptyCellError, InvalidParameterError, UnsupportedBundleError
from tests.models import TINY_MODEL, small_checkpoint, small_vocabulary
from tests.training_data import VOCABULARY, pretrain_values, write_data_set
from training.checkpoint import load_checkpoint, save_checkpoint
from training.commands.evaluate import main
from training.config import strict
from training.config.stages import PretrainConfig
from training.data.corpus import build_corpus
from training.families.rank.model import build_model
from training.measure import masked_accuracy as module
from training.measure.masked_accuracy import corpus_frequencies, evaluate
from training.measure.mlm import HitTally, RankTally, choose_masked, judge
from training.measure.unseen import EvaluateOptions, read_heldout

GENES = np.asarray(VOCABULARY.tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("evaluate")
    write_data_set(made / "cells.h5ad", cells_per_target=4, controls=20)
    small_checkpoint(made / "checkpoint")
    values = pretrain_values(made)
    values["corpus"]["sources"] = [{"path": str(made / "perturbed.h5ad"), "max_cells": 30}]
    build_corpus(strict.parse(PretrainConfig, values).corpus)
    return made


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def heldout(folder, checkpoint):
    return read_heldout(folder / "cells.h5ad", checkpoint, options=EvaluateOptions(cells=25))


def test_the_model_is_scored_as_the_definitions_say(checkpoint, heldout):
    """Compute all logits at once, cell by cell, in numpy."""
    options = EvaluateOptions(batch=4, seed=3)
    found = evaluate(checkpoint, heldout, options=options)["model"].summary()
    hits, ranks = HitTally(len(VOCABULARY)), RankTally()
    model = checkpoint.model()
    for tokens, row in zip(heldout.tokens, heldout.rows, strict=True):
        masked = choose_masked(len(tokens), np.random.default_rng([3, row]))
        ids = tokens.copy()
        ids[masked] = VOCABULARY.special_tokens["<mask>"]
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().numpy()
        hits.add(judge(logits[masked], tokens[masked], GENES))
        logits[:, :2] = -np.inf
        ranks.add(tokens, logits.argmax(axis=1))
    assert found == pytest.approx(hits.summary() | ranks.summary(), rel=1e-4, nan_ok=True)
    assert found["instances"] == sum(round(0.15 * len(tokens)) for tokens in heldout.tokens)


def test_start_and_end_tokens_are_neither_masked_nor_judged(folder):
    vocabulary = small_vocabulary(ends=True)
    torch.manual_seed(0)
    path = save_checkpoint(
        folder / "with-ends",
        model=build_model(TINY_MODEL, vocabulary),
        family="rank",
        family_config={"max_length": 30, "start": "<cls>", "end": "<eos>"},
        model_config=TINY_MODEL,
        vocabulary=vocabulary,
        provenance={},
    )
    checkpoint = load_checkpoint(path)
    heldout = read_heldout(folder / "cells.h5ad", checkpoint, options=EvaluateOptions(cells=8))
    assert max(map(len, heldout.tokens)) == 28
    found = evaluate(checkpoint, heldout, options=EvaluateOptions(batch=3))["model"].summary()
    hits, model = HitTally(len(vocabulary)), checkpoint.model()
    for tokens, row in zip(heldout.tokens, heldout.rows, strict=True):
        masked = choose_masked(len(tokens), np.random.default_rng([0, row]))
        ids = np.concatenate([[2], tokens, [3]])
        ids[1 + masked] = 1
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, 1:-1].double().numpy()
        hits.add(judge(logits[masked], tokens[masked], vocabulary.tokens))
    assert {name: found[name] for name in hits.summary()} == pytest.approx(hits.summary(), rel=1e-4, nan_ok=True)


def test_neither_batches_nor_the_bound_on_logits_change_a_score(checkpoint, heldout, monkeypatch):
    whole = evaluate(checkpoint, heldout, options=EvaluateOptions(batch=25))["model"].summary()
    monkeypatch.setattr(module, "LOGIT_VALUES", 7 * 62)  # seven rows of logits
    parts = evaluate(checkpoint, heldout, options=EvaluateOptions(batch=3))["model"].summary()
    assert parts == pytest.approx(whole, rel=1e-4, nan_ok=True)


def test_baselines_stand_beside_the_model(folder, checkpoint, heldout):
    from training.data.shards import Corpus

    seen = []
    frequencies = corpus_frequencies(Corpus(folder / "corpus"), 40)
    found = evaluate(
        checkpoint,
        heldout,
        options=EvaluateOptions(),
        frequencies=frequencies,
        progress=lambda *step: seen.append(step),
    )
    assert list(found) == ["model", "copy", "frequency", "frequency at rank"]
    summaries = {name: tallies.summary() for name, tallies in found.items()}
    assert seen[-1] == ("cells.h5ad", 25, 25)
    # Untrained weights know nothing; frequencies at a rank know something; copying keeps what is shown.
    assert summaries["model"]["micro_hits@10"] < summaries["frequency at rank"]["micro_hits@10"]
    assert summaries["frequency at rank"]["perplexity"] < summaries["frequency"]["perplexity"] < 80
    assert summaries["copy"]["coverage@100"] == pytest.approx(0.85, abs=0.02)
    assert summaries["copy"]["instances"] == 0


def test_cells_of_the_corpus_are_left_out(folder, checkpoint):
    from training.data.shards import Corpus

    corpus = Corpus(folder / "corpus")
    found = read_heldout(folder / "perturbed.h5ad", checkpoint, options=EvaluateOptions(), corpus=corpus)
    assert found.left_out["in the corpus"] == 30
    assert len(found.tokens) == 130 - 30
    assert not set(found.rows) & set(corpus.per_cell("row").tolist())
    other = read_heldout(folder / "cells.h5ad", checkpoint, options=EvaluateOptions(), corpus=corpus)
    assert len(other.tokens) == 40


def test_cells_are_sampled_cut_and_filtered(folder, checkpoint):
    options = EvaluateOptions(cells=10, max_length=12)
    found = read_heldout(folder / "cells.h5ad", checkpoint, options=options)
    assert len(found.tokens) == 10
    assert max(map(len, found.tokens)) == 12
    assert found.left_out == {"not sampled": 30}
    assert found.rows == read_heldout(folder / "cells.h5ad", checkpoint, options=options).rows
    with pytest.raises(EmptyCellError, match="40 too few genes"):
        read_heldout(folder / "cells.h5ad", checkpoint, options=EvaluateOptions(min_genes=61))


def test_the_command_writes_a_table_and_json(folder, capsys):
    out = folder / "scores.json"
    arguments = [str(folder / "checkpoint"), str(folder / "cells.h5ad"), "--cells", "12", "--seed", "5"]
    assert main([*arguments, "--corpus", str(folder / "corpus"), "--out", str(out)]) == 0
    assert "frequency at rank" in capsys.readouterr().out
    facts = json.loads(out.read_text())
    assert [row["predictor"] for row in facts["results"]] == ["model", "copy", "frequency", "frequency at rank"]
    assert facts["results"][1]["perplexity"] is None
    assert facts["options"]["seed"] == 5
    assert facts["left_out"] == {"cells.h5ad": {"not sampled": 28}}
    first = out.read_text()
    assert main([*arguments, "--corpus", str(folder / "corpus"), "--out", str(out)]) == 0
    assert out.read_text() == first


def test_bad_requests_are_named(folder, checkpoint, heldout, capsys):
    cells = str(folder / "cells.h5ad")
    assert main([str(folder / "checkpoint"), cells, "--out", str(folder / "scores.txt")]) == 2
    assert ".json" in capsys.readouterr().err
    assert main([str(folder / "absent"), cells]) == 1
    assert "not a checkpoint" in capsys.readouterr().err
    for field, value in {"cells": 0, "mask_probability": 1.0, "device": "tpu"}.items():
        with pytest.raises(InvalidParameterError) as caught:
            EvaluateOptions(**{field: value})
        assert caught.value.field == field
    object.__setattr__(checkpoint, "family", "other")
    try:
        with pytest.raises(UnsupportedBundleError, match="other"):
            evaluate(checkpoint, heldout, options=EvaluateOptions())
    finally:
        object.__setattr__(checkpoint, "family", "rank")
