"""``python -m training``: commands by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.__main__ import COMMANDS, main


def test_every_command_is_a_module_and_every_module_a_command() -> None:
    folder = Path(__file__).resolve().parents[3] / "training" / "commands"
    assert sorted(COMMANDS) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def test_a_command_gets_its_arguments_and_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--local_rank=3", "corpus", "--help"])  # as the deepspeed launcher puts it
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m training corpus ")


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["pre-train"], 2)])
def test_without_a_command_there_is_a_list(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    written = capsys.readouterr()
    assert all(name in written.out + written.err for name in COMMANDS)
