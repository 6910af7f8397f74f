"""The documentation: examples in docstrings run, code on pages parses, links have targets."""

import copy
import doctest
import importlib
import inspect
import json
import re
import runpy
import tomllib
from pathlib import Path

import griffe
import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel

import clear_attn as clear
from clear_attn.models import ADAPTERS
from tests.helpers.families import each_family
from tests.helpers.reference_model import put_rule, run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = ROOT / "src"
SIDES = (1024, 2048, 4096, 8192)
MODULES = [
    ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    for file in sorted(SOURCE.rglob("*.py"))
    if ">>> " in file.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(module, name):
        runner.run(test)
    results = runner.summarize(verbose=False)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_pages(page):
    """It parses, and `clear` has the names that it uses."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")
        for name in re.findall(r"\bclear\.(\w+)", block):
            assert hasattr(clear, name), name


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.stem)
def test_code_fits_the_page(page):
    """At 1300 px it has room for 98 characters."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 96] == []


@each_family()
def test_the_guides_method(family, transformer):
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    guide = {}
    exec(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0], guide)
    padding = {"padded": (1, 3)} if family.padding else {}
    grid = family.grid(7, 7)
    call = family.call(transformer, grid, batch=2, **padding)
    ours = clear.linearize(copy.deepcopy(transformer), method=guide["Cosine"](), weights=None)

    def rule(query, key, value, grid, own, bias=None):
        query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
        scores = own.temperature * query @ key.mT
        if bias is not None:
            scores[..., : bias.shape[-1]] += bias
        return scores.softmax(-1) @ value

    expected = run(put_rule(transformer, grid, ours, lambda method, number: rule), call)
    torch.testing.assert_close(run(ours, call), expected, atol=1e-5, rtol=0)
    if padding:
        assert (run(ours, {**call, family.padding_mask(call): None}) - expected).abs().max() > 1e-4
    assert clear.cost(ours, 112, 112).ratio == pytest.approx(1)


def test_the_reference_names_all_that_is_public():
    named = re.findall(r"^::: clear_attn\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(clear.__all__)
    assert all(inspect.getdoc(getattr(clear, name)) for name in named)


def test_the_pages_name_all_methods():
    pages = "\n".join(page.read_text() for page in PAGES)
    named = re.findall(r"^::: clear_attn\.methods\.(\w+)$", pages, re.MULTILINE)
    assert sorted(named) == sorted(clear.methods.__all__)


def test_the_numbers_of_the_readme():
    """FLOPs and memory by `cost`, seconds from the result files, badges from pyproject.toml."""
    readme = (ROOT / "README.md").read_text()
    with torch.device("meta"):
        flux_dev = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    costs = {side: [clear.cost(flux_dev, side, side, window=16, down_factor=f) for f in (4, 1)] for side in SIDES}
    pooled, plain = ([round(costs[side][n].ratio, 1) for side in (2048, 8192)] for n in (0, 1))
    assert f"{pooled[0]} times fewer operations at 2048 x 2048 px, and {pooled[1]} times fewer at 8192 px" in readme
    assert f"`down_factor=1` it is {plain[0]} and {plain[1]:.0f} times" in readme.replace("\n", " ")
    activations = [costs[side][0].memory.activations for side in SIDES]
    cells = " | ".join(f"{least / 2**30:.1f} to {likely / 2**30:.1f}" for least, likely in activations)
    assert f"| activations of the transformer | {cells} |" in readme

    def seconds(file, side, *variants):
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
        return [row["median_s"] for name in variants for row in rows if (row["variant"], row["height"]) == (name, side)]

    for side, decimals in {64: 2, 128: 2, 256: 1, 512: 1}.items():
        cells = " | ".join(f"{1000 * each:.{decimals}f}" for each in seconds("op-h200", side, "triton"))
        assert re.search(rf"^\| {16 * side} px \|.*\| {re.escape(cells)} \|$", readme, re.MULTILINE), cells
    (pooled_ms,) = (1000 * each for each in seconds("op-pooled-h200", 256, "triton"))
    assert f"one attention at 4096 px takes {pooled_ms:.1f} ms" in readme

    for side in (64, 128):
        (dense, ours), (dense_step, our_step) = (
            seconds(file, side, "dense", "tiled") for file in ("op-cpu", "model-cpu")
        )
        steps = [f"{step:.0f} s" if step >= 100 else f"{step:.1f} s" for step in (dense_step, our_step)]
        assert f"{dense:.2f} s | {ours:.2f} s | {' | '.join(steps)} |" in readme, side

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("torch", "diffusers"):
        (floor,) = (line.partition(">=")[2] for line in project["dependencies"] if line.startswith(f"{name}>="))
        assert f"![{name} {floor} or later](https://img.shields.io/badge/{name}-{floor}_or_later-blue)" in readme
    pythons = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: Python ::" in line]
    assert f"python-{pythons[0]}_to_{pythons[-1]}-blue" in readme
    assert f"license-{project['license'].replace('-', '--')}-blue" in readme


@pytest.mark.parametrize(
    ("title", "transformer"),
    {
        "FLUX.1": "FluxTransformer2DModel",
        "FLUX.2, FLUX.2 klein": "Flux2Transformer2DModel",
        "Qwen-Image": "QwenImageTransformer2DModel",
        "Qwen-Image 2.1": "QwenImage21Transformer2DModel",
        "Chroma": "ChromaTransformer2DModel",
        "FLUX.3": "Flux3Transformer2DModel",
        "Krea 2": "Krea2Transformer2DModel",
        "Z-Image": "ZImageTransformer2DModel",
        "Stable Diffusion 3, 3.5": "SD3Transformer2DModel",
        "DiT": "DiTTransformer2DModel",
    }.items(),
)
def test_the_table_of_models(title, transformer):
    """It says which models can be distilled. What it says on large images is tested in `tests/cascade`."""
    rows = [
        line.split(" | ") for line in (ROOT / "docs" / "models.md").read_text().splitlines() if line.startswith("| ")
    ]
    (row,) = (dict(zip(rows[0], row, strict=True)) for row in rows if row[0] == f"| {title}")
    (adapter,) = (adapter for adapter in ADAPTERS if adapter.transformer_class == transformer)
    assert (row["`clear_attn.distill`"] == "yes") == (adapter.training is not None)


def test_links_between_pages():
    """Those to notebooks are as in the site, where `examples/` is next to the pages."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            folder = ROOT if target.endswith(".ipynb") else page.parent
            assert (folder / target).exists(), f"{page.name}: {target}"


def test_citation():
    """It has the fields that the schema of CFF 1.2.0 requires, and the version of the package."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])


def test_the_reference_reads_types():
    """From annotations: not a type's markup in a docstring."""
    extensions = griffe.load_extensions(str(ROOT / "docs" / "griffe_types.py"))
    package = griffe.load("clear_attn", search_paths=[SOURCE], extensions=extensions, docstring_parser="google")

    def elements(thing):
        sections = thing.docstring.parsed if thing.docstring else ()
        assert ("\n    >>> " in thing.docstring.value if thing.docstring else False) == any(
            section.kind is griffe.DocstringSectionKind.examples for section in sections
        ), thing.path
        for section in sections:
            yield from section.value if isinstance(section.value, list) else ()
        for member in thing.members.values():
            if not member.is_alias:
                yield from elements(member)

    types = [str(element.annotation) for element in elements(package) if hasattr(element, "annotation")]
    assert len(types) > 200
    assert [kind for kind in types if "`" in kind or "optional" in kind] == []


def test_public_docstrings_have_examples():
    """And in a section that the reference shows as code."""
    missing = [name for name in clear.__all__ if ">>> " not in (inspect.getdoc(getattr(clear, name)) or "")]
    assert missing == []
    assert [file for file in SOURCE.rglob("*.py") if re.search(r"^ *Example:$", file.read_text(), re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://user:token@example.com/owner/repo.git", "https://example.com/owner/repo"),
        ("git@example.com:owner/repo.git", "https://example.com/owner/repo"),
        ("ssh://git@example.com/owner/repo", "https://example.com/owner/repo"),
        ("../repo", None),
        ("", None),
    ],
)
def test_the_sites_link_to_the_repository(remote, address):
    hooks = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))
    assert hooks["web_address"](remote) == address
