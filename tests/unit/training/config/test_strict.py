from __future__ import annotations

from pathlib import Path

import pytest

from perturbscope.errors import InvalidParameterError, UnreadableFileError
from training.config import strict
from training.config.stages import (
    ContrastiveConfig,
    CorpusConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    SplitConfig,
)

CONFIGS = Path(__file__).resolve().parents[4] / "training" / "configs"
MINIMAL = """
output: out
corpus: {path: corpus, sources: [{path: a.h5ad}]}
optimizer: {base_lr: 1e-3}
loop: {epochs: 1, micro_batch: 4}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_plain_values_leave_out_a_field_of_a_later_version_that_is_not_used(minimal: Path) -> None:
    config = strict.read(PretrainConfig, minimal)
    assert "family_options" not in strict.plain(config)["corpus"]
    used = strict.read(PretrainConfig, minimal, ["corpus.family_options={start: <cls>}"])
    assert strict.plain(used)["corpus"]["family_options"] == {"start": "<cls>"}
    assert strict.parse(PretrainConfig, strict.plain(used)) == used != config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_say_what_they_cost(path: Path) -> None:
    kind = PretrainConfig if "pretrain" in path.stem else ContrastiveConfig
    config = strict.read(kind, path)
    assert strict.parse(kind, strict.plain(config)) == config
    header = path.read_text().split("\n\n")[0]
    assert "Cost:" in path.read_text()
    assert header.startswith("#")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("d*.yaml")), ids=lambda path: path.stem)
def test_configurations_for_a_cpu_name_data_of_the_repository(path: Path) -> None:
    kind = PretrainConfig if "pretrain" in path.stem else ContrastiveConfig
    for source in strict.read(kind, path).corpus.sources:
        assert (CONFIGS.parents[1] / source.path).is_file()


def test_the_paper_configuration_has_the_published_numbers() -> None:
    config = strict.read(PretrainConfig, CONFIGS / "paper-pretrain.yaml")
    assert (config.loop.micro_batch, config.loop.accumulation, config.loop.epochs) == (11, 2, 3)
    assert (config.optimizer.base_lr, config.optimizer.warmup_steps, config.optimizer.weight_decay) == (
        1e-3,
        10000,
        1e-3,
    )
    fine = strict.read(ContrastiveConfig, CONFIGS / "paper-contrastive.yaml")
    assert (fine.loss.margin, fine.optimizer.base_lr, fine.optimizer.weight_decay, fine.loop.epochs) == (
        20,
        1e-5,
        1e-2,
        10,
    )


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", ".1e-2", "+0.1e-2", "0.001"])
def test_numbers_in_scientific_notation_are_numbers(minimal: Path, text: str) -> None:
    assert strict.read(PretrainConfig, minimal).optimizer.base_lr == 1e-3
    assert strict.read(PretrainConfig, minimal, [f"optimizer.base_lr={text}"]).optimizer.base_lr == 1e-3
    assert strict.read(PretrainConfig, minimal, ["optimizer.base_lr=0.15e1"]).optimizer.base_lr == 1.5


def test_a_date_is_text(minimal: Path) -> None:
    assert strict.read(PretrainConfig, minimal, ["output=2026-01-31"]).output == "2026-01-31"


def test_unknown_keys_name_the_closest(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("epochs", "epoch"))
    with pytest.raises(InvalidParameterError, match="Did you mean 'epochs'") as caught:
        strict.read(PretrainConfig, minimal)
    assert caught.value.field == "loop.epoch"


def test_missing_keys_are_named(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("epochs: 1, ", ""))
    with pytest.raises(InvalidParameterError, match="'loop' of the configuration needs the key 'epochs'"):
        strict.read(PretrainConfig, minimal)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.epochs=many", "loop.epochs is 'many'; a whole number is needed"),
        ("loop.epochs='2048'", "loop.epochs is '2048'; a whole number is needed"),
        ("loop.epochs=true", "a whole number is needed"),
        ("loop.epochs=1.5", "a whole number is needed"),
        ("loop.epochs=1.0", "a whole number is needed"),
        ("optimizer.base_lr=fast", "a number is needed"),
        ("optimizer.base_lr='1e-3'", "a number is needed"),
        ("optimizer.base_lr=[1]", "a number is needed"),
        ("optimizer.base_lr=.nan", "optimizer.base_lr is nan; it must be from 0 to 10"),
        ("optimizer.schedule=lineal", "Did you mean 'linear'"),
        ("corpus.exclude_cancer=1", "true or false is needed"),
        ("corpus.sources=a.h5ad", "a list is needed"),
        ("corpus.sources=[{path: a, nam: b}]", r"'corpus.sources\[0\]' .* has no key 'nam'.* Did you mean 'name'"),
        ("corpus.sources=[{path: a, soma: {anonym: true}}]", "Did you mean 'anonymous'"),
        ("corpus.labels=[1]", r"corpus.labels\[0\] is 1; text is needed"),
        ("corpus=a.h5ad", "keys and values are needed"),
        ("output=3", "text is needed"),
        ("loop.precision=fp64", "must be one of"),
        ("loop.device=tpu", "loop.device is 'tpu'; it must be auto, cpu or cuda"),
        ("loop.epochs=0", "loop.epochs is 0; it must be at least 1"),
        ("mask_probability=2", "from 1e-06 to 1"),
        ("panel.genes=[0.5]", "panel.genes has 1 entries; 2 are needed"),
        ("panel.genes=[0.1, 0.2, 0.3]", "panel.genes has 3 entries; 2 are needed"),
        ("panel.genes=[0.5, 0.1]", "two shares above 0 and up to 1 are needed, the smaller first"),
        ("model=!!set {a}", "holds the set"),
        ("model=&a {b: *a}", "refers to itself"),
        ("loop.epochs.more=1", "which has no keys"),
        ("loop.epochs", "not of the form key=value"),
        ("loop.epochs=[", "is not YAML"),
        ("corpus.sources=[]", "at least one file"),
    ],
)
def test_bad_values_are_refused(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        strict.read(PretrainConfig, minimal, [override])


def test_errors_of_entries_and_of_whole_sections_have_their_path(minimal: Path) -> None:
    fine = {"checkpoint": "c", "optimizer": {"base_lr": 1e-3}, **strict.plain(strict.read(PretrainConfig, minimal))}
    values = {name: fine[name] for name in ("output", "checkpoint", "corpus", "optimizer", "loop")}
    for change, field in (
        ({"mixed": {}}, "mixed"),
        ({"mixed": {"info_nce": 1.0}}, "mixed.panel.share"),
        ({"mixed": {"geometry": 1, "weights": {"kang": 0}}}, "mixed.weights.kang"),
        ({"mixed": {"geometry": 1, "expressions": {"power": {"pow": 1}}}}, "mixed.expressions.power.pow"),
        ({"degs": {"alpha": 2.0}}, "degs.alpha"),
        ({"loop": {**values["loop"], "micro_batch": 2}}, "loop.micro_batch"),
    ):
        with pytest.raises(InvalidParameterError) as caught:
            strict.parse(ContrastiveConfig, values | change)
        assert caught.value.field == field


def test_overrides_replace_and_add_values(minimal: Path) -> None:
    overrides = ["loop.max_steps=7", "sampler.megabatch=3", "corpus.sources=[{path: b.h5ad}, {path: c.h5ad}]"]
    config = strict.read(PretrainConfig, minimal, overrides)
    assert config.loop.max_steps == 7
    assert config.sampler.megabatch == 3
    assert [source.path for source in config.corpus.sources] == ["b.h5ad", "c.h5ad"]


def test_one_section_can_be_read_alone(minimal: Path) -> None:
    assert strict.section(CorpusConfig, minimal, "corpus").path == "corpus"
    with pytest.raises(InvalidParameterError, match="no section 'degs'"):
        strict.section(CorpusConfig, minimal, "degs")


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: 1\na: 2", ""])
def test_files_that_are_not_mappings_are_unreadable(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UnreadableFileError):
        strict.read(PretrainConfig, path)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        strict.read(PretrainConfig, tmp_path / "none.yaml")


def test_values_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="at most 2 apart"):
        LossConfig(normalize=True, margin=5.0)
    with pytest.raises(InvalidParameterError, match="both validation and test"):
        SplitConfig(test=("A",))
    with pytest.raises(InvalidParameterError, match="'A' is in validation and in test"):
        SplitConfig(test=("A",), validation=("A",))
    with pytest.raises(InvalidParameterError, match="add up to 1"):
        SplitConfig(fractions=(0.8, 0.1, 0.2))
    with pytest.raises(InvalidParameterError, match="base_lr"):
        OptimizerConfig(base_lr=-1.0)
