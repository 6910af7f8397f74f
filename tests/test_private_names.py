"""Private names of torch and diffusers are named in one file each."""

import ast
import inspect
import pkgutil
import re
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import clear_attn
from clear_attn.models import _diffusers
from clear_attn.utils import _torch
from tests.helpers import dummy_models

PACKAGE = Path(clear_attn.__file__).parent
# The third is for Triton's interpreter.
HELPERS = {
    Path(_torch.__file__),
    Path(_diffusers.__file__),
    PACKAGE / "backends" / "triton" / "interpreter.py",
}
PRIVATE = re.compile(r"_[A-Za-z]\w*")
# Names of named tuples, of accelerate and of datasets.
ALLOWED = {"_asdict", "_fields", "_replace", "_hf_hook", "_fingerprint"}
# diffusers reads these from attention processors.
DECLARED = {"_attention_backend", "_parallel_config"}
DECLARE = {PACKAGE / "models" / "processors" / "processor.py", PACKAGE / "cascade" / "attention_scale.py"}
# Names on objects of torch and diffusers, private to them even if a file of this package defines the same name.
FOREIGN = {
    "_attention_backend",
    "_buffers",
    "_diffusers_hook",
    "_execution_device",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_get_backend",
    "_gradient_checkpointing_func",
    "_internal_dict",
    "_interrupt",
    "_modules",
    "_name_or_path",
    "_orig_mod",
    "_parallel_config",
    "_parameters",
    "_progress_bar_config",
    "_version",
}
# Public packages of diffusers with private modules.
CLOSED = ("diffusers.hooks.",)


def named_in(tree):
    """Yield line and name of each private name that neither the module nor the package defines."""
    own = own_names(tree) | OWN
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            yield from ((node.lineno, name) for name in imported(node) if is_private_import(name))
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            if node.attr in FOREIGN or node.attr not in own:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and node.value in FOREIGN:
            yield node.lineno, node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and PRIVATE.fullmatch(name) and name not in own | FOREIGN:
                yield node.lineno, name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in FOREIGN:
            yield node.lineno, node.id


def imported(node):
    start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [f"{start}{alias.name}" for alias in node.names]


def is_private_import(name):
    foreign = name.partition(".")[0] in ("torch", "diffusers")
    return foreign and ((name.startswith(CLOSED) and name.count(".") > 2) or any(map(PRIVATE.match, name.split("."))))


def own_names(tree):
    """Return the names that a file defines: functions, classes, variables, and attributes of `self`."""
    names = set(ALLOWED)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


SOURCES = [file for file in sorted(PACKAGE.rglob("*.py")) if file not in HELPERS]
# Of the whole package, because classes inherit from those of other files.
OWN = set().union(*(own_names(ast.parse(file.read_text())) for file in SOURCES))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_private_names_elsewhere(file):
    allowed = DECLARED if file in DECLARE else set()
    named = [(line, name) for line, name in named_in(ast.parse(file.read_text())) if name not in allowed]
    assert not named


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from torch.utils._pytree import tree_leaves", "torch.utils._pytree.tree_leaves"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch import _dynamo", "torch._dynamo"),
        ("from diffusers.hooks.layer_skip import Hook", "diffusers.hooks.layer_skip.Hook"),
        ("import torch\ntorch._dynamo.reset()", "_dynamo"),
        ("torch.ops.aten._scaled_mm(x)", "_scaled_mm"),
        ("module._forward_hooks.clear()", "_forward_hooks"),
        ("class A:\n def f(self):\n  self._forward_hooks = {}", "_forward_hooks"),
        ("getattr(pipe, '_secret', None)", "_secret"),
        ("NAMES = ('_orig_mod',)", "_orig_mod"),
        ("class A:\n _parallel_config: int = 0", "_parallel_config"),
    ],
)
def test_a_private_name_is_found(code, name):
    assert name in [found for _, found in named_in(ast.parse(code))]


@pytest.mark.parametrize(
    "code",
    [
        "from diffusers.hooks import HookRegistry",
        "from torch import Tensor",
        "from torch.__future__ import x",
        "import torch.nn.functional as _f",
        "record._replace(x=1)",
        "class A:\n def f(self):\n  self._own = self._g()\n def _g(self): return other._own",
    ],
)
def test_what_is_allowed(code):
    assert not list(named_in(ast.parse(code)))


@pytest.mark.parametrize(("module", "package"), [(_torch, "torch"), (_diffusers, "diffusers")])
def test_each_helper_says_in_which_version_its_name_was_read(module, package):
    helpers = [x for x in vars(module).values() if inspect.isfunction(x) and x.__module__ == module.__name__]
    public = [helper for helper in helpers if not helper.__name__.startswith("_")]
    assert len(public) > 10
    for helper in public:
        assert f"({package} {module.READ_IN})." in inspect.getdoc(helper), helper.__name__
    oldest, newest = module.READ_IN.split(" to ")
    assert numbers(oldest) <= numbers(version(package)) <= numbers(newest)


def numbers(version):
    """Return the first two numbers of a version."""
    return tuple(map(int, version.split(".")[:2]))


@pytest.mark.parametrize(
    ("installed", "keyword"), [("0.36.0", "torch_dtype"), ("0.40.0.dev0", "dtype"), ("1.0", "dtype")]
)
def test_the_dtype_has_the_name_that_diffusers_knows(monkeypatch, installed, keyword):
    loader = types.SimpleNamespace(from_pretrained=lambda name, **options: (name, options))
    monkeypatch.setattr(_diffusers.diffusers, "__version__", installed)
    loaded = _diffusers.load_pretrained(loader, "model", dtype=torch.float16, revision="main")
    assert loaded == ("model", {keyword: torch.float16, "revision": "main"})


class TestMissingNames:
    """A private name that is missing is an error, or has a safe default."""

    def test_errors(self):
        bare = types.SimpleNamespace()
        versions = re.escape(_torch.READ_IN)
        with pytest.raises(RuntimeError, match=rf"torch .* has no _forward_pre_hooks on .*; install torch {versions}$"):
            _torch.forward_pre_hooks(bare)
        with pytest.raises(RuntimeError, match=r"has no _device_types"):
            _torch.timeout_of(bare)
        with pytest.raises(RuntimeError, match=r"diffusers .* has no _execution_device on a SimpleNamespace"):
            _diffusers.execution_device_of(bare)
        with pytest.raises(RuntimeError, match=r"has no _internal_dict"):
            _diffusers.replace_config(bare, {})
        assert not vars(bare)

    def test_safe_defaults(self):
        bare, module = types.SimpleNamespace(), nn.Linear(1, 1)
        assert _torch.version_of(bare) != _torch.version_of(bare)
        assert _torch.unwrap_compiled(module) is module
        assert _diffusers.progress_bar_config_of(bare) == {}
        assert _diffusers.attention_backend_of(bare) is _diffusers.parallel_config_of(bare) is None
        assert list(_diffusers.hooks_in(module)) == []
        assert _diffusers.remove_hook(module, "any") is None

    def test_attention_without_the_cpu_kernel(self, monkeypatch):
        from clear_attn.backends.softmax import softmax_attention

        query, key, value = torch.randn(3, 1, 2, 5, 8)
        expected = softmax_attention(query, key, value, None, 0.3, return_lse=True)
        monkeypatch.setattr(_torch, "_CPU_FLASH_ATTENTION", None)
        assert not _torch.has_cpu_flash_attention()
        torch.testing.assert_close(softmax_attention(query, key, value, None, 0.3, return_lse=True), expected)


def test_versions_change_with_writes():
    tensor = torch.zeros(2)
    before = _torch.version_of(tensor)
    assert _torch.version_of(tensor) == before
    tensor[0] = 1
    assert _torch.version_of(tensor) != before


def test_hooks_are_removed_from_all_tables():
    module = nn.Linear(1, 1)
    stays, goes = (lambda *args: None for _ in range(2))
    for hook in (stays, goes):
        module.register_forward_pre_hook(hook, with_kwargs=True)
        module.register_forward_hook(hook, with_kwargs=True)
    _torch.remove_forward_hooks(module, lambda hook: hook is goes)
    assert [len(table) for table in _torch.hook_tables(module)] == [1, 1, 1, 1]
    assert list(_torch.forward_pre_hooks(module).values()) == [stays]
    assert list(_torch.forward_hooks(module).values()) == [stays]


def test_names_in_nested_values():
    tree = {"sizes": [1, (torch.ones(1),)]}
    assert [name for name, _ in _torch.named_leaves_of(tree)] == ["['sizes'][0]", "['sizes'][1][0]"]
    assert _torch.leaves_of(tree)[0] == 1
    doubled = _torch.map_tensors(lambda x: 2 * x, tree)
    assert doubled["sizes"][0] == 1
    assert doubled["sizes"][1][0].item() == 2


def test_a_config_without_an_entry():
    transformer = dummy_models.flux_pipeline().transformer
    values = {name: value for name, value in transformer.config.items() if name != "guidance_embeds"}
    _diffusers.replace_config(transformer, values)
    assert dict(transformer.config) == values


def test_every_module_is_read():
    modules = {module.name for module in pkgutil.walk_packages(clear_attn.__path__, "clear_attn.")}
    files = {
        ".".join(("clear_attn", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in [*SOURCES, *HELPERS]
    }
    assert modules <= {name.removesuffix(".__init__") for name in files}
