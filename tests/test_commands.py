"""One command that hands over to all others."""

import subprocess
import sys
import time
from importlib import import_module, util

import pytest

from launcher import commands
from tests.conftest import ROOT


def launcher(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_lists_the_commands_at_once() -> None:
    best_s = 9.0
    for _ in range(5):
        started_s = time.monotonic()
        shown = launcher("--help")
        best_s = min(best_s, time.monotonic() - started_s)
    assert shown.returncode == 0 and best_s < 0.3
    for name in commands.COMMANDS:
        assert f"\n  {name} " in shown.stdout
    assert "--preflight" in shown.stdout, "the run's own options follow"


@pytest.mark.parametrize("name", [name for name in commands.COMMANDS if util.find_spec(f"launcher.{name}")])
def test_every_command_is_there_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(import_module(f"launcher.{name}").main)
    with pytest.raises(SystemExit) as ended:
        commands.main([name, "--help"])
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


def test_no_command_imports_more_than_it_needs() -> None:
    heavy = "torch ray transformers deepspeed pyarrow datasets"
    for words in (["--help"], ["runs", "--help"], ["watch", "--help"]):
        code = (
            "import sys\nfrom launcher import commands\n"
            f"try: commands.main({words})\nexcept SystemExit: pass\n"
            f"print([name for name in {heavy.split()} if name in sys.modules])"
        )
        shown = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert shown.stdout.splitlines()[-1] == "[]", words


def test_a_recipe_is_a_run_with_and_without_the_word(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "launcher" / "recipes" / "quickstart.yaml")
    assert commands.main([recipe, "--show-recipe"]) == 0
    shown = capsys.readouterr().out
    assert commands.main(["run", recipe, "--show-recipe"]) == 0
    assert capsys.readouterr().out == shown and "stages:" in shown
    assert commands.main(["no-such.yaml", "--show-recipe"]) == 2
