"""Whole models: plan, quantize, restore, inspect. Every function here takes directories and returns plain data."""

from arrondi.pipeline.inspect import inspect_folds, inspect_model
from arrondi.pipeline.plan import Plan, check, make_plan
from arrondi.pipeline.presets import preset_recipe
from arrondi.pipeline.quantize import quantize_model, rehearse
from arrondi.pipeline.recipe import Recipe, Rule
from arrondi.pipeline.restore import dequantize_model
from arrondi.pipeline.step import Step
from arrondi.pipeline.steps import STEPS
from arrondi.pipeline.texts import TextOptions

__all__ = [
    "STEPS",
    "Plan",
    "Recipe",
    "Rule",
    "Step",
    "TextOptions",
    "check",
    "dequantize_model",
    "inspect_folds",
    "inspect_model",
    "make_plan",
    "preset_recipe",
    "quantize_model",
    "rehearse",
]
