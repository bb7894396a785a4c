"""Gradients unit by unit against one ordinary backward pass of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from arrondi.errors import SchemeError
from arrondi.formats import ActivationScheme, PerToken, Scheme, get_format
from arrondi.model import Budget, Gradients, OnDisk, Rounding, Stream, kl_loss, next_token_loss, walk, walk_back
from arrondi.model.backward import Loss
from arrondi.tensor.nearest import fake_quantize
from tests.conftest import ARCHITECTURES

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama-tied", {}),
    "qwen3-moe": ("qwen3-moe", {"num_local_experts": 6}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}),
}

INPUTS = ActivationScheme(Scheme(get_format("int4"), PerToken()))


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of which every parameter and every stored buffer has numbers of its own."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            name, changes = CASES[case]
            class_name, settings = ARCHITECTURES[name]
            cls = getattr(transformers, class_name)
            made[case] = tmp_path_factory.mktemp("perturbed")
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(3)
                model = cls(cls.config_class(**{**settings, **changes}))
                for tensor in model.state_dict().values():
                    tensor.add_(torch.randn_like(tensor), alpha=0.06)
            model.save_pretrained(made[case])
        return made[case]

    return get


def batches() -> list[torch.Tensor]:
    """Two sizes and two lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 2048, shape, generator=generator) for shape in ((2, 19), (1, 19), (3, 11))]


@contextmanager
def walked(path: Path, tmp_path: Path, rounding: Rounding | None = None, **options: Any) -> Iterator[Stream]:
    """A stream at its end; most of what it keeps lies in a file."""
    source = OnDisk.open(path)
    instance = source.instance()
    instance.round_inputs(rounding or {})
    with Stream(source.units_of(instance), batches(), Budget(1 << 14), tmp_path, **options) as stream:
        stream.begin()
        for _ in walk([[stream]]):
            pass
        yield stream


def ordinary(
    path: Path, prefix: str, loss: Loss, modules: list[str], rounded: str = ""
) -> tuple[dict[tuple[int, int], torch.Tensor], dict[str, torch.Tensor], dict[tuple[str, int], torch.Tensor]]:
    """Gradients of every unit's output, of every parameter, and of the outputs of modules, by one backward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if rounded:
        module = model.get_submodule(rounded)
        plain = module.forward
        module.forward = lambda x: plain(x + (fake_quantize(x.detach(), INPUTS.scheme) - x).detach())
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    inner: dict[tuple[str, int], torch.Tensor] = {}
    total: Any = 0
    for j, ids in enumerate(batches()):
        hooks = []
        for i, block in enumerate(model.get_submodule(prefix)):

            def keep(module: Any, args: Any, output: Any, i: int = i, j: int = j) -> None:
                outputs[i, j] = output if isinstance(output, torch.Tensor) else output[0]
                outputs[i, j].retain_grad()

            hooks.append(block.register_forward_hook(keep))
        for name in modules:

            def note(module: Any, args: Any, output: Any, name: str = name, j: int = j) -> None:
                inner[name, j] = output
                output.retain_grad()

            hooks.append(model.get_submodule(name).register_forward_hook(note))
        total = total + loss(j, model(input_ids=ids, use_cache=False).logits)
        for hook in hooks:
            hook.remove()
    total.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {k: t.grad for k, t in outputs.items()}, grads, {k: t.grad for k, t in inner.items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to 1e-5 of the largest number, and not all zeros by chance."""
    return float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["next token", "KL"])
def test_gradients_equal_those_of_an_ordinary_backward_pass(
    case: str, which: str, perturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    path = perturbed(case)
    generator = torch.Generator().manual_seed(9)
    logits = [torch.randn(*b.shape, 2048, generator=generator) for b in batches()]
    loss = next_token_loss(batches()) if which == "next token" else kl_loss(batches(), logits.__getitem__)
    with walked(path, tmp_path, keep_inputs=True) as stream:
        prefix = stream.units.prefix
        projections = [f"{prefix}.{i}.self_attn.{n}" for i in range(len(stream.units)) for n in ("q_proj", "o_proj")]
        found: list[Gradients] = []
        params: dict[str, torch.Tensor] = {}
        filled = set()
        for g in walk_back(
            stream, loss, params=stream.units.params, modules=lambda i: [p for p in projections if f".{i}." in p]
        ):
            filled.add(tuple(n for n in stream.units.instance.empty if not stream.units.instance.is_empty(n)))
            found.append(g)
            for name, gradient in g.params.items():
                params[name] = params.get(name, 0) + gradient
        assert all(stream.units.instance.is_empty(n) for n in stream.units.instance.empty), "nothing stays filled"
        assert filled == {tuple(stream.units.params(i)) for i in range(len(stream.units))}, "one unit at a time"
    outputs, grads, inner = ordinary(path, prefix, loss, projections)
    assert [(g.unit, g.batch) for g in found] == [(i, j) for i in (2, 1, 0) for j in (0, 1, 2)]
    for g in found:
        assert close(g.output, outputs[g.unit, g.batch]), (g.unit, g.batch)
        for name, (product,) in g.modules.items():
            assert close(product.gradient, inner[name, g.batch]), name
    inside = [n for n in grads if n.startswith(f"{prefix}.")]
    assert set(params) == set(inside)
    for name in inside:
        assert close(params[name], grads[name]), name


def test_inputs_of_a_module_and_gradients_of_its_outputs_give_the_gradient_of_its_weight(
    perturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    with walked(perturbed("llama"), tmp_path, keep_inputs=True) as stream:
        name = "model.layers.1.mlp.down_proj"
        choose = lambda i: [name] if i == 1 else []  # noqa: E731
        weights = lambda i: [f"{n}.weight" for n in choose(i)]  # noqa: E731
        seen = [g for g in walk_back(stream, next_token_loss(batches()), params=weights, modules=choose) if g.unit == 1]
    for g in seen:
        (product,) = g.modules[name]
        expected = product.gradient.flatten(0, 1).T @ product.inputs.flatten(0, 1)
        assert close(g.params[f"{name}.weight"], expected)


def test_inputs_that_are_rounded_pass_gradients_on(perturbed: Callable[[str], Path], tmp_path: Path) -> None:
    path, name = perturbed("llama"), "model.layers.1.mlp.gate_proj"
    with walked(path, tmp_path, {name: (INPUTS, None)}, keep_inputs=True) as stream:
        loss = next_token_loss(batches())
        found = {(g.unit, g.batch): g.output for g in walk_back(stream, loss)}
    outputs, _, _ = ordinary(path, "model.layers", loss, [], rounded=name)
    plain, _, _ = ordinary(path, "model.layers", loss, [])
    for key, gradient in found.items():
        assert close(gradient, outputs[key]), key
    assert not close(found[0, 0], plain[0, 0]), "rounding is seen"


def test_a_walk_that_is_left_early_leaves_nothing_behind(perturbed: Callable[[str], Path], tmp_path: Path) -> None:
    with walked(perturbed("llama"), tmp_path, keep_inputs=True) as stream:
        steps = walk_back(stream, next_token_loss(batches()))
        next(steps)
        steps.close()
        assert all(stream.units.instance.is_empty(n) for n in stream.units.instance.empty)
        assert stream.budget.used <= stream.budget.limit
    assert stream.budget.used == 0


def test_without_kept_inputs_there_is_no_way_back(perturbed: Callable[[str], Path], tmp_path: Path) -> None:
    with walked(perturbed("llama"), tmp_path) as stream, pytest.raises(SchemeError, match="keep_inputs=True"):
        next(walk_back(stream, next_token_loss(batches())))
