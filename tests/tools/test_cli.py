"""What all commands of `clear-attn` share: help, version, errors, outputs."""

import dataclasses
import importlib.metadata
import inspect
import logging
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import clear_attn as clear
from clear_attn import demo
from clear_attn.cascade.planning import PUBLISHED_NTK_FACTOR
from clear_attn.cascade.stages import PRESETS
from clear_attn.methods import Clear
from clear_attn.profiling import attention_cost
from clear_attn.tools import options
from clear_attn.tools.bench import model_level, op_level, runner
from clear_attn.tools.bench.bench_command import CASE_SETTINGS, bench
from clear_attn.tools.bench.case import Case
from clear_attn.tools.cli import app
from clear_attn.tools.evaluate import evaluate
from clear_attn.tools.evaluate.metric_registry import METRICS
from clear_attn.tools.evaluate_command import evaluate as evaluate_command
from clear_attn.tools.generate_command import OF_STAGE, generate
from clear_attn.tools.reporting import quiet_imports, spell_options

SIZE = ("--height", 64, "--width", 64)
DRAW = ("generate", "--output", "out.png", *SIZE, "--prompt", "a")
DRAW_LARGE = (*DRAW, "--model", "demo", "--height", 2 * demo.SIZE, "--width", 2 * demo.SIZE)
HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "torchmetrics")


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def subprocess_output(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_help_imports_nothing_heavy():
    code = (
        "import sys, clear_attn.tools.cli as cli\n"
        "for command in ([], ['bench'], ['eval'], ['generate'], ['cost'], ['demo']):\n"
        "    cli.app([*command, '--help'], standalone_mode=False)\n"
        f"print('imported', sorted(set({HEAVY}) & set(sys.modules)))"
    )
    assert subprocess_output(code).stdout.endswith("imported []\n")


@pytest.mark.slow
def test_commands_print_nothing_of_other_libraries():
    code = "from clear_attn.tools.cli import app; app(['cost', '--height', '64', '--width', '64', '--json'])"
    output = subprocess_output(code)
    assert output.stdout.startswith("{")
    assert output.stderr == ""


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", [(), ("bench",), ("eval",), ("generate",), ("cost",), ("demo",)])
def test_help(command, option):
    result = run(*command, option)
    assert result.exit_code == 0
    assert f"Usage: {' '.join(('root', *command))} [OPTIONS]" in result.output.replace("clear-attn", "root")


def test_version_and_usage():
    assert run("--version").output == importlib.metadata.version("clear-attn") + "\n"
    assert "Usage: " in run().output


def test_shell_completion():
    result = CliRunner().invoke(
        app, [], env={"_ROOT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "root ben"}, prog_name="root"
    )
    assert "bench" in result.output


def test_what_libraries_log_after_an_import_is_printed(caplog):
    with quiet_imports():
        logging.getLogger("diffusers").warning("of an import")
    logging.getLogger("somewhere").warning("of a call")
    assert [record.message for record in caplog.records] == ["of a call"]


@pytest.mark.parametrize(
    ("message", "spelled"),
    [
        ("weights='auto' needs window=2.", "--weights auto needs --window 2."),
        ("give weights=None, or weights= a folder", "give --weights none, or --weights a folder"),
        ("leave window= out; download=True downloads it", "leave --window out; --download downloads it"),
        (
            "linearize(pipe, window=8); my_window=3; a window of 3",
            "linearize(pipe, window=8); my_window=3; a window of 3",
        ),
        ("window must be at least 1", "--window must be at least 1"),
        ("text_tokens has no effect; see out/text_tokens/x", "--text-tokens has no effect; see out/text_tokens/x"),
        ("there are some for (window, text_tokens) = (8, 1)", "there are some for (window, text_tokens) = (8, 1)"),
        ("json_file=1", "--json 1"),
    ],
)
def test_messages_name_options(message, spelled):
    names = {name: f"--{name}" for name in ("weights", "window", "download")}
    assert spell_options(message, {**names, "text_tokens": "--text-tokens", "json_file": "--json"}) == spelled


COMMANDS = typer.main.get_command(app).commands
OPTIONS = [(name, option) for name, command in COMMANDS.items() for option in command.params]
OPTION_OF = {(command, option.name): option for command, option in OPTIONS}


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=[f"{name} {option.opts[0]}" for name, option in OPTIONS])
def test_help_is_sentences_with_defaults(command, option):
    assert option.help[0].isupper()
    assert option.help.endswith(".")
    assert option.required or option.is_flag or option.show_default is not None
    if option.default is None and not option.required:
        assert isinstance(option.show_default, str), option.name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_each_option_once_and_in_full(command):
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(["--help", *(option.opts[0] for option in COMMANDS[command].params)])
    assert "..." not in text


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(attention_cost, "_settings_of", lambda transformer: transformer.no_such_name)
    result = run("cost", *SIZE)
    assert isinstance(result.exception, AttributeError)
    monkeypatch.setattr(attention_cost, "_settings_of", lambda transformer: len(3))
    assert isinstance(run("cost", *SIZE).exception, TypeError)
    assert "Error" not in run("cost", *SIZE).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("cost", "--height", 100, "--width", 64),
        ("bench", "--pixels", "100x64", "--device", "cpu", "--ranks", 1, "--window", 2),
    ],
)
def test_warnings_are_one_line(arguments):
    message = "Warning: 100 x 64 px is not a multiple of 16 px; it is rounded down to 96 x 64 px\n"
    assert run(*arguments).stderr == message


@pytest.mark.parametrize(("given", "passed"), [("none", None), ("None", None), ("NONE", None), ("auto", "auto")])
def test_no_weights_in_any_case(given, passed):
    assert options.none_or(given) == passed


def test_the_demo_replaces_its_own_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clear_attn.demo.comparison.compare", lambda *args: f"drew {args[-1]}")
    Path("clear-attn-demo.png").write_text("before")
    result = run("demo")
    assert (result.exit_code, result.stdout) == (0, "drew clear-attn-demo.png\n\nSaved clear-attn-demo.png\n")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("cost", *SIZE), "clear_attn.profiling.attention_cost.find_transformer"),
        (("bench", "--device", "cpu"), "clear_attn.tools.bench.runner.select_backend"),
    ],
)
def test_interrupts_say_what_is_kept(arguments, place, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (130, "Interrupted; nothing was saved\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cost", "--height", 8, "--width", 64), "8 x 64 px is less than one token of 16 px"),
        (("cost", *SIZE, "--text-tokens", -1), "--text-tokens must be at least 0, got -1"),
        (("cost", *SIZE, "--model", "no"), "Invalid value for '--model': 'no' is not one of flux"),
        (("bench", "--variant", "no"), "Invalid value for '--variant': 'no' is none of dense"),
        (("cost", *SIZE, "--method", "Best"), "no attention method is named 'Best'"),
        (("bench", "--grid", "4x4", "--ranks", 3), "3 ranks are too many"),
        (("demo", "--window", 0), "--window"),
        ((*DRAW, "--model", "no/model"), "Invalid value for '--model': diffusers cannot load 'no/model'"),
        ((*DRAW, "--model", "./no"), "Invalid value for '--model': ./no does not exist; give a folder, a Hub id"),
        ((*DRAW, "--model", "flux"), "Invalid value for '--model': flux does not exist; give a folder, a Hub id"),
        ((*DRAW, "--model", "."), "Invalid value for '--model': diffusers cannot load '.' as a pipeline"),
        (
            (*DRAW, "--model", "demo"),
            f"is smaller than the model's own {demo.SIZE} px; ask for at least that, or, in Python, ",
        ),
        ((*DRAW_LARGE, "--window", 5), "or --weights none to keep the model's own (training-free)"),
        ((*DRAW_LARGE, "--weights", "no"), "a Hub id (owner/repo), or --weights none"),
        ((*DRAW_LARGE, "--weights", "AUTO"), "did you mean --weights auto?"),
    ],
)
def test_errors_have_one_format(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert "\n\nError: Invalid value" in result.stderr
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--output"),
        ("bench", "--device", "cpu", "--json"),
        ("bench", "--device", "cpu", "--plot"),
        ("generate", "--model", "demo", "--output"),
    ],
)
def test_outputs_are_not_overwritten(arguments, tmp_path):
    file = tmp_path / "out.png"
    file.write_text("mine")
    result = run(*arguments, file)
    assert result.exit_code == 2
    assert "exists; give another file, or --overwrite" in result.stderr.replace("│\n│", "")
    assert file.read_text() == "mine"


class TestOptionsFitTheLibrary:
    """Help does not import the library, so its defaults are written again, and compared here."""

    def test_levels(self):
        (annotation, _) = typing.get_args(typing.get_type_hints(bench, include_extras=True)["level"])
        assert set(typing.get_args(annotation)) == set(runner.LEVELS) | {"compile"}

    def test_defaults_of_cases(self):
        options = inspect.signature(bench).parameters
        fields = {field.name: field.default for field in dataclasses.fields(Case)}
        assert {name: options[name].default for name in CASE_SETTINGS} == {name: fields[name] for name in CASE_SETTINGS}

    def test_defaults_of_evaluations(self):
        options, arguments = (inspect.signature(each).parameters for each in (evaluate_command, evaluate))
        shared = options.keys() & arguments.keys() - {"prompts", "output_dir"}
        assert {name: options[name].default for name in shared} == {name: arguments[name].default for name in shared}

    def test_defaults_of_cost(self):
        window, down_factor = (OPTION_OF["cost", name].show_default for name in ("window", "down_factor"))
        assert Clear(int(window), int(down_factor)) == Clear()

    def test_variants(self):
        listed = re.search(r"A row of the table to time: (.*?)\. May", OPTION_OF["bench", "variant"].help)[1]
        for_op, for_model = (re.split(r", | or ", part) for part in listed.split("; with --level model "))
        assert for_op == [name for name in op_level.VARIANTS if name not in op_level.CANDIDATES]
        assert for_model == list(model_level.VARIANTS)

    def test_metrics(self):
        help_text = run("eval", "--help").output
        assert all(name in help_text for name in METRICS)

    def test_defaults_of_stages(self):
        assert set(OF_STAGE) == {field.name for field in dataclasses.fields(clear.Stage)} - {"height", "width"}
        published, refined = (clear.Stage.preset(name) for name in ("published", "refined"))
        for name in OF_STAGE:
            assert inspect.signature(generate).parameters[name].default is None
            shown = OPTION_OF["generate", name].show_default
            before, _, changed = shown.partition("; refined ")
            assert before == in_words(getattr(published, name)) or name == "ntk_factor", name
            assert (changed or before) == in_words(getattr(refined, name)), name
        assert OPTION_OF["generate", "ntk_factor"].show_default.startswith(f"{PUBLISHED_NTK_FACTOR:g};")

    def test_presets(self):
        option = OPTION_OF["generate", "preset"]
        assert re.search(r": (.*?)\.", option.help)[1] == " or ".join(PRESETS)


def in_words(value):
    """Return a setting of a stage as an option shows it; None is off."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value or 0:g}"
