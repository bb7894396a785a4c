"""The grammar of what is compared: what it takes apart, and what is refused before any work."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import MappingProxyType

import pytest
from typer.main import get_command

from arrondi.cli.commands import app
from arrondi.cli.parsing import recipe_from
from arrondi.errors import ArrondiError, SchemeError
from arrondi.pipeline import Step, steps
from arrondi.search.candidates import candidates


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with a rewrite and a repair that do nothing."""

    def turn(work: object, sites: object, *, strength: float = 0.5) -> None: ...

    def mend(work: object, sites: object) -> None: ...

    more = {"turn": Step("turn", "rewrite", apply=turn), "mend": Step("mend", "repair", apply=mend)}
    monkeypatch.setattr(steps, "STEPS", MappingProxyType({**steps.STEPS, **more}))


def test_every_scheme_by_every_method_then_recipes(table: None, tmp_path: Path) -> None:
    file = tmp_path / "mixed.json"
    file.write_text('{"rules": [{"scheme": "W4A16"}, {"scheme": "W8A16", "targets": ["re:.*down_proj"]}]}')
    found = candidates(["W4A16", "w=int3/g64,a=int8"], ["rtn", "mend+gptq:damping=0.05+turn:strength=0.25", str(file)])
    assert [(c.scheme, c.method.partition(":")[0]) for c in found[:4]] == [
        ("W4A16", "rtn"), ("W4A16", "mend+gptq"), ("w=int3/g64,a=int8", "rtn"), ("w=int3/g64,a=int8", "mend+gptq"),
    ]  # fmt: skip
    rules = found[1].recipe.rules
    assert [(r.method, dict(r.options)) for r in rules] == [
        ("turn", {"strength": 0.25}), ("gptq", {"damping": 0.05}), ("mend", {}),
    ]  # fmt: skip
    assert len(found) == 5
    assert "int4/g128" in found[4].scheme and "int8" in found[4].scheme and found[4].method == str(file)


def test_the_options_do_the_same(table: None, tmp_path: Path) -> None:
    """What a row says of itself, given to `quantize`, is the same recipe."""
    method = "turn:strength=0.25+gptq:order=dynamic+mend"
    for more in ({}, {"group_size": 64, "targets": ["re:.*q_proj", "re:.*k_proj"], "ignore": []}):
        (found,) = candidates(["w=int3/g32/asym"], [method], **more)
        context = (
            get_command(app)
            .commands["quantize"]
            .make_context("quantize", ["MODEL", "-o", "OUT", *shlex.split(found.options)])
        )
        given = {k: context.params[k] or None for k in ("scheme", "method", "group_size", "targets", "ignore")}
        others = (context.params[k] for k in ("option", "recipe", "rewrite", "repair"))
        again = recipe_from(*given.values(), *others)
        assert again == found.recipe


def test_options_go_to_those_that_have_them(table: None) -> None:
    methods = ["rtn", "gptq", "gptq:damping=0.5", "turn+rtn"]
    found = candidates(["W4A16"], methods, options={"damping": 0.02, "turn.strength": 0.75})
    options = [{r.method: dict(r.options) for r in c.recipe.rules} for c in found]
    assert options == [
        {"rtn": {}}, {"gptq": {"damping": 0.02}}, {"gptq": {"damping": 0.5}}, {"turn": {"strength": 0.75}, "rtn": {}},
    ]  # fmt: skip


def test_options_of_a_step_that_comes_with_a_method() -> None:
    (found,) = candidates(["W4A16"], ["awq:awq-scale.grid=5:grid=3"])
    assert [(r.method, dict(r.options)) for r in found.recipe.rules] == [
        ("awq-scale", {"grid": 5}),
        ("awq", {"grid": 3}),
    ]


def test_what_a_method_cannot_make_has_a_reason() -> None:
    found = candidates(["NF4", "W4A16"], ["rtn", "hqq"], group_size=32)
    assert [c.recipe is None for c in found] == [False, True, False, False]
    assert "hqq" in found[1].reason and "Use rtn" in found[1].reason
    assert str(found[2].recipe.rules[0].scheme).startswith("w=int4/g32")


@pytest.mark.parametrize(
    ("schemes", "methods", "words"),
    [
        (["W4A16"], [], "no method"),
        ([], ["rtn"], "no scheme"),
        (["W4A16"], ["rtn", "RTN"], "rtn and RTN are the same"),
        (["W4A16", "W4A16"], ["rtn"], "W4A16 is there twice"),
        (["W4A16", "w=int4/g128"], ["rtn"], "are the same"),
        (["W4A16"], ["gptqq"], "Did you mean 'gptq'"),
        (["W4A17"], ["rtn"], "W4A17"),
        (["W4A16"], ["rtn+gptq"], "rtn and gptq"),
        (["W4A16"], ["turn"], "turn+rtn"),
        (["W4A16"], ["turn+turn+rtn"], "turn is there twice"),
        (["W4A16"], ["gptq:damp=1"], "damping"),
        (["W4A16"], ["gptq:damping"], "NAME=VALUE"),
        (["W4A16"], ["gptq:damping=1:damping=2"], "damping is there twice"),
        (["W4A16"], ["gptq:damping=-1"], "damping"),
        (["W4A16"], ["gptq:turn.strength=1+turn"], "Write its options behind turn"),
        (["W4A16"], [""], "got ''"),
        (None, ["nowhere.json"], "no such file"),
    ],
)
def test_bad_input(schemes: list[str] | None, methods: list[str], words: str, table: None) -> None:
    with pytest.raises(ArrondiError) as caught:
        candidates(schemes, methods)
    assert words in str(caught.value)


@pytest.mark.parametrize("option", ["dampingg", "hqq.beta", "gptqq.damping", "gptq.dampingg"])
def test_an_option_that_nobody_has(option: str) -> None:
    with pytest.raises(SchemeError) as caught:
        candidates(["W4A16"], ["rtn", "gptq"], options={option: 0.1})
    assert option.rpartition(".")[2] in str(caught.value) or "gptqq" in str(caught.value)
