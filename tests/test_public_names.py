"""The package's public names: imported when first used, and hidden by no module."""

import importlib.metadata
import pkgutil
import subprocess
import sys

import pytest

import clear_attn


def loaded_by(code):
    """Return the modules that the code loads in a new interpreter."""
    code = f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    loaded = loaded_by("import clear_attn; dir(clear_attn)")
    assert "clear_attn" in loaded
    assert not {"diffusers", "transformers", "torch", "clear_attn.methods"} & loaded


def test_a_first_use_imports_the_name():
    assert "clear_attn.cascade.stages" in loaded_by("import clear_attn; clear_attn.Stage")


def test_dir_is_the_public_names():
    import clear_attn.patching.saving

    assert dir(clear_attn) == sorted(clear_attn.__all__)
    assert sorted([*clear_attn._MODULES, "methods"]) == clear_attn.__all__


@pytest.mark.parametrize("name", clear_attn.__all__)
def test_every_name_resolves(name):
    value = getattr(clear_attn, name)
    assert value.__name__.rpartition(".")[2] == name
    assert getattr(value, "__module__", value.__name__).startswith("clear_attn.")


def test_names_for_type_checkers_are_the_public_ones():
    """Imports under TYPE_CHECKING are from the modules in the table."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(clear_attn))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    imported = {
        alias.name: node.module.removeprefix("clear_attn").lstrip(".") for node in imports for alias in node.names
    }
    assert imported == {**clear_attn._MODULES, "methods": ""}


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"module 'clear_attn' has no attribute 'linearise'"):
        _ = clear_attn.linearise
    with pytest.raises(ImportError, match="linearise"):
        from clear_attn import linearise  # noqa: F401


def test_no_module_hides_a_public_name():
    modules = {module.name for module in pkgutil.walk_packages(clear_attn.__path__, "clear_attn.")}
    assert "clear_attn.parallel.parallelization" in modules
    hidden = {module for module in modules if module.rpartition(".")[2] in clear_attn.__all__}
    assert hidden == {"clear_attn.methods"}


def test_submodules_import_as_usual():
    import clear_attn.cascade as cascade
    import clear_attn.patching

    assert cascade.Stage is clear_attn.Stage
    assert callable(clear_attn.cost)
    assert clear_attn.patching.__name__ == "clear_attn.patching"


def test_version():
    assert clear_attn.__version__ == importlib.metadata.version("clear-attn")
